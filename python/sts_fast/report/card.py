"""The card of a run: Markdown with the YAML head that the Hugging Face hub reads."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from sts_fast import files
from sts_fast.forecast.blocks import DomainBlock, Scores
from sts_fast.forecast.estimators import BY_NAME, IN_ORDER, Estimator
from sts_fast.forecast.run import CARD_FILE, Run
from sts_fast.report import ranking
from sts_fast.report.numbers import NOT_THERE, counted, plain
from sts_fast.report.report import conclusion, short_name

# A data set of the hub, as a run names it: owner/name:config:split@revision.
_HUB_SET = re.compile(r"([\w.-]+/[\w.-]+):.+@[0-9a-f]{16,}")
TITLE = "Forecast of what fine-tuning {model} on {train} will move"


def write_card(folder: str | Path) -> Path:
    """Writes README.md into a run's folder and returns its path. The same scores.json gives the same bytes.

    Raises InputError where the folder contains no run, or nothing can be written.
    """
    run = Run.load(folder)
    with files.atomic_path(run.folder / CARD_FILE) as path:
        path.write_text(_card(run.scores), encoding="utf-8", newline="\n")
    return run.folder / CARD_FILE


def _card(scores: Scores) -> str:
    shown = [BY_NAME[name] for name in IN_ORDER if any(name in domain["scores"] for domain in scores["domains"])]
    title = TITLE.format(model=_text(short_name(scores["model"]["name"])), train=_text(_train(scores)))
    parts = [
        f"---\n{yaml.safe_dump(_head(scores), sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        _text(conclusion(scores)),
        "The forecast was made before any training, from features of a sparse autoencoder (SAE) in the frozen model "
        "([SAE as a Crystal Ball](https://arxiv.org/abs/2603.02908)).",
        "## Forecast",
        _table(scores, shown),
        _listed(f"**{estimator.label}**{_unit(estimator)}: {estimator.meaning}." for estimator in shown),
        "## What was read",
        _listed(_read(scores)),
        "## Limits",
        _listed(_limits(scores, shown)),
        "## How to make it again",
        _again(scores),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(scores: Scores) -> dict[str, Any]:
    """The card's metadata; the model and the training set are named where they are on the hub."""
    sets = [_HUB_SET.fullmatch(entry["path"]) for entry in scores["provenance"]["inputs"] if entry["role"] == "train"]
    names = list(dict.fromkeys(match[1] for match in sets if match))
    return {
        "library_name": "sts-fast",
        "tags": ["sparse-autoencoder", "transferability", "forecast"],
        **({"base_model": scores["model"]["name"]} if scores["model"]["revision"] else {}),
        **({"datasets": names} if names else {}),
    }


def _table(scores: Scores, shown: list[Estimator]) -> str:
    if not shown:
        return "No domain was scored."
    first = shown[0].name

    def value(domain: DomainBlock) -> float:
        return domain["scores"][first]["value"] if first in domain["scores"] else float("-inf")

    rows = [["domain", *(f"{estimator.label} [95%]" for estimator in shown), "prompts"], ["---"] * (len(shown) + 2)]
    for domain in sorted(scores["domains"], key=value, reverse=True):
        cells = [NOT_THERE] * len(shown)
        for i, estimator in enumerate(shown):
            if score := domain["scores"].get(estimator.name):
                cells[i] = estimator.text(score["value"], (score["ci"][0], score["ci"][1]))
        rows.append([_text(domain["name"]), *cells, str(domain["n_prompts"])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _read(scores: Scores) -> list[str]:
    model, sae, settings, train = scores["model"], scores["sae"], scores["settings"], scores["train"]
    inputs = [entry for entry in scores["provenance"]["inputs"] if entry["role"] == "train"]
    moves = "activates" if settings["dims"] == "active" else "shifts"
    revision = f", revision `{model['revision']}`" if model["revision"] else ""
    weights = f", SHA-256 of the weights `{model['weights_sha256']}`" if model["weights_sha256"] else ""
    return [
        f"Model: {_text(short_name(model['name']))}, {model['dtype']}{revision}{weights}",
        f"SAE: {_text(short_name(sae['source']))} at `{sae['hook_name']}`, {sae['d_sae']:,} features",
        f"Training set: {counted(train['n_prompts'], 'prompt')}, {train['n_tokens']:,} tokens, of "
        + "; ".join(f"{_text(_base(entry['path']))} (SHA-256 `{entry['sha256']}`)" for entry in inputs),
        f"D_N: the {settings['top_n']} features that the training set {moves} most (`--dims {settings['dims']}`); "
        f"resampling its prompts keeps {scores['shift']['stability']['mean_overlap']:.0%} of them",
    ]


def _limits(scores: Scores, shown: list[Estimator]) -> list[str]:
    limits = ["An interval says how much other prompts would change a score, not how surely the forecast comes true."]
    if any(not estimator.signed for estimator in shown):
        limits.append(
            "A score without sign compares domains: which move more, not whether they gain or lose, nor by how much."
        )
    limits.append(
        "On a real model (ten training sets, 36 domains) STS_act had r .17 with the size of the change of loss, and a "
        "short trial (`--estimators trial`) r .82 with the change itself: hold forecasts against measured changes."
    )
    cautions = ranking.cautions(scores, ranking.rankings(scores))
    return limits + [_text(plain(warning)) for warning in dict.fromkeys([*cautions, *scores["warnings"]])]


def _again(scores: Scores) -> str:
    provenance = scores["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    made = f"Seed {provenance['seed']}; {_text(versions)}. The same input gives the same scores, bit for bit."
    if provenance["command"] is None:
        return f"The forecast was made from Python, with the settings in `scores.json`. {made}"
    ticks = max(re.findall("`+", provenance["command"]), key=len, default="")
    fence = "`" * max(3, len(ticks) + 1)
    return f"{fence}bash\n{provenance['command']}\n{fence}\n\n{made}"


def _train(scores: Scores) -> str:
    names = [_base(entry["path"]) for entry in scores["provenance"]["inputs"] if entry["role"] == "train"]
    return " and ".join(names[:2]) if 0 < len(names) < 3 else scores["train"]["name"]


def _base(path: str) -> str:
    """The name of a file, or of a data set of the hub as it is: a card needs no folders of the machine."""
    return path if _HUB_SET.fullmatch(path) else PurePosixPath(path.replace("\\", "/")).name


def _unit(estimator: Estimator) -> str:
    return f" ({estimator.unit})" if estimator.unit else ""


def _listed(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _text(text: str) -> str:
    """Text of the user on one line, without a sign that Markdown or HTML would read."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(text.split()))
