"""What to mix into a training set, from files of questions to the mixed file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import N_QUESTIONS, N_TOO_LONG, Tiny
from written_run import make_scores, write_scores

import sts_fast
from sts_fast.cli import main
from sts_fast.data.examples import load_examples
from sts_fast.errors import InputError
from sts_fast.mix.mix import RULES, mix_schema, validate_mix
from sts_fast.model.stored.index import INDEX_FILE

BUDGET, LIMIT, N_ASKED = 20, 10, 3
N_ANSWERED = N_QUESTIONS + N_TOO_LONG  # what is too long to be measured can be trained on


def mixed(tiny: Tiny, **options: Any) -> sts_fast.Mixture:
    given = {"train": tiny.train, "pool": tiny.domains, "budget": BUDGET, "limit": LIMIT, **options}
    return sts_fast.mix(**given)


def forecast(tiny: Tiny, **options: Any) -> sts_fast.Mixture:
    return mixed(tiny, model=tiny.model, sae=tiny.saes["topk"], batch_tokens=500, **options)


def counts(mixture: sts_fast.Mixture) -> dict[str, int]:
    return {domain.name: domain.n_examples for domain in mixture.domains}


@pytest.fixture(scope="module")
def best(tiny: Tiny) -> sts_fast.Mixture:
    return forecast(tiny)


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores made up, and a domain that asks three questions of the pool."""
    scores = make_scores(3)
    values = (("spelling", 3.0, 1.0), ("days", 1.0, 4.0), ("sums", 7.0, 7.0))
    for domain, (name, act, icl) in zip(scores["domains"], values, strict=True):
        domain["name"] = name
        domain["scores"] = {key: {"value": value, "ci": [0.0, 9.0]} for key, value in (("act", act), ("icl", icl))}
    scores["provenance"]["inputs"] = []
    folder = write_scores(tmp_path_factory.mktemp("run"), scores)
    asked, _ = asked_of(tiny)
    rows = [{"stage": "score", "domain": "days", "question": question} for question in asked]
    rows += [{"stage": "score", "domain": "sums", "question": None}]
    rows += [{"stage": "shift", "domain": "train", "question": load_examples(tiny.domains["days"])[9].question}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")
    return folder


def asked_of(tiny: Tiny) -> tuple[list[str], int]:
    """Three questions of a pool, and how many of it share 13 words in a row with one, or all of a shorter one."""

    def words(question: str) -> str:
        return " ".join(["", *re.findall(r"\w+", question.lower()), ""])

    answered = [example.question for example in load_examples(tiny.domains["days"]) if example.answer is not None]
    asked, n = answered[:N_ASKED], 0
    for question in answered:
        of = words(question).split()
        runs = [" ".join(["", *of[i : i + 13], ""]) for i in range(max(1, len(of) - 12))]
        n += any(run in words(other) and (len(of) >= 13 or run == words(other)) for run in runs for other in asked)
    return asked, n


def test_questions_of_a_runs_domains_are_not_added(tiny: Tiny, run: Path) -> None:
    said: list[str] = []
    asked, n = asked_of(tiny)
    found = mixed(tiny, rule="uniform", run=run, budget=2 * N_ANSWERED - n, say=said.append)
    assert {domain.name: domain.n_available for domain in found.domains} == {
        "spelling": N_ANSWERED, "days": N_ANSWERED - n,
    }  # fmt: skip
    [refused] = [warning for warning in found.warnings if "are not added" in warning]
    assert refused.startswith(f"{n} of the {N_ANSWERED} examples of 'days' ask the same as questions of the run's")
    assert f"warning: {refused}" in said
    assert not {*asked} & {example.question for name, example in found.examples if name == "days"}
    with pytest.raises(InputError, match=r"the pool has .* answered examples in all.*; \d of the "):
        mixed(tiny, rule="uniform", run=run, budget=2 * N_ANSWERED)


def test_questions_that_the_run_left_undrawn_are_not_added_either(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    scores = json.loads((run / "scores.json").read_text())
    asked = tmp_path / "asked.jsonl"
    asked.write_bytes(tiny.domains["days"].read_bytes())
    entry = {"role": "domains", "path": str(asked), "sha256": hashlib.sha256(asked.read_bytes()).hexdigest()}
    scores["provenance"]["inputs"] = [entry]
    (tmp_path / "run" / "scores.json").write_text(json.dumps(scores))
    found = mixed(tiny, rule="uniform", run=tmp_path / "run")
    assert counts(found) == {"spelling": BUDGET, "days": 0}
    asked.write_text(asked.read_text() + "\n")
    changed = mixed(tiny, rule="uniform", run=tmp_path / "run")
    assert counts(changed)["days"] > 0
    assert any(f"of {asked} only the questions that the run read are known" in text for text in changed.warnings)


def test_forecast_rule_has_the_least_forecast_loss(tiny: Tiny, best: sts_fast.Mixture) -> None:
    even = forecast(tiny, rule="uniform")
    assert counts(even) == {"spelling": BUDGET // 2, "days": BUDGET // 2}
    assert sum(counts(best).values()) == BUDGET

    def total(mixture: sts_fast.Mixture) -> float:
        return mixture.train.mixed + np.mean([domain.mixed for domain in mixture.domains])

    assert total(best) <= total(even)
    assert best.mean_change["mixed"] == pytest.approx(np.mean([domain.mixed for domain in best.domains]))
    assert best.mean_change["alone"] == even.mean_change["alone"]
    for one in (best.train, *best.domains):
        assert one.alone_ci[0] < one.alone_ci[1]
        assert one.mixed_ci[0] < one.mixed_ci[1]
        assert one.loss + one.mixed > 0


def test_weights_say_whose_loss_counts(tiny: Tiny) -> None:
    for name in tiny.domains:
        found = forecast(tiny, protect=[name], weights={"train": 0})
        others = [one.mixed for one in forecast(tiny, rule="uniform").domains if one.name == name]
        kept = next(one for one in found.domains if one.name == name)
        assert kept.mixed <= others[0] + 1e-9
        assert found.mean_change["mixed"] == pytest.approx(kept.mixed)


def test_rows_that_repeat_others_are_no_further_examples(tiny: Tiny) -> None:
    rows = sts_fast.load_examples(tiny.domains["days"])
    domains = {**tiny.domains, "days": [*rows, *rows]}
    found = mixed(tiny, pool=domains, rule="uniform", budget=36)
    assert {domain.name: domain.n_available for domain in found.domains}["days"] == N_ANSWERED
    assert len({(name, example.question) for name, example in found.examples}) == len(found.examples)


def test_proportional_follows_a_run(tiny: Tiny, run: Path) -> None:
    assert counts(mixed(tiny, rule="proportional", run=run)) == {"spelling": 15, "days": 5}
    assert counts(mixed(tiny, rule="proportional", run=run, estimator="icl")) == {"spelling": 4, "days": 16}
    capped = mixed(tiny, rule="proportional", run=run / "scores.json", budget=36)
    assert counts(capped) == {"spelling": N_ANSWERED, "days": 36 - N_ANSWERED}
    assert [warning.split()[0] for warning in capped.warnings] == [str(asked_of(tiny)[1]), "'spelling'"]
    assert capped.train.loss is None
    assert capped.mean_change is None


@pytest.mark.parametrize("rule", RULES)
def test_command_writes_a_valid_file_and_the_mixed_set(
    tiny: Tiny,
    run: Path,
    rule: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["mix", "--train", tiny.train, "--budget", "12", "--limit", "8", "--rule", rule]
    words += [word for name, path in tiny.domains.items() for word in ("--pool", f"{name}={path}")]
    words += ["--from", run] if rule == "proportional" else ["--model", tiny.model, "--sae", tiny.saes["topk"]]
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        monkeypatch.setattr("sys.argv", ["sts-fast", *map(str, words), "--output", str(folder)])
        main()
        written.append([(folder / name).read_bytes() for name in ("mix.json", "mixed.jsonl")])
    shown = capsys.readouterr().out
    assert "12 further examples" in shown
    assert "spelling" in shown
    assert written[0] == written[1]
    found = json.loads(written[0][0])
    validate_mix(found)
    rows = [json.loads(line) for line in written[0][1].splitlines()]
    by_set = Counter(row["set"] for row in rows)
    assert by_set == {
        one["name"]: one["n_examples"] for one in (found["train"], *found["domains"]) if one["n_examples"]
    }
    assert by_set["train"] == N_ANSWERED
    assert len(rows) == N_ANSWERED + 12
    # Every row is one of its set's, none comes twice, and the file is read back as a training set.
    pools = {
        name: {(one.id, one.question, one.answer) for one in load_examples(path)}
        for name, path in {"train": tiny.train, **tiny.domains}.items()
    }
    read = [(one.id, one.question, one.answer) for one in load_examples(tmp_path / "one" / "mixed.jsonl")]
    assert len(set(read)) == len(rows)
    assert all(one in pools[row["set"]] for one, row in zip(read, rows, strict=True))
    assert [row["set"] for row in rows] != sorted(row["set"] for row in rows)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--weight", "days"], "--weight takes SET=NUMBER, not 'days'"),
        (["--weight", "days=much"], "--weight takes SET=NUMBER, not 'days=much'"),
        (["--limit", "-1"], "--limit must be at least 1, or 0 for all, not -1"),
        (["--batch-tokens", "0"], "--batch-tokens must be at least 1, not 0"),
    ],
)
def test_wrong_option_is_told_in_a_line(
    tiny: Tiny,
    words: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["mix", "--train", tiny.train, "--pool", f"days={tiny.domains['days']}", "--budget", 5]
    given += ["--rule", "uniform", "--output", tmp_path, *words]
    monkeypatch.setattr("sys.argv", ["sts-fast", *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {told}\n"


def test_json_is_what_the_file_holds(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["mix", "--train", tiny.train, "--pool", f"days={tiny.domains['days']}", "--budget", 30, "--rule"]
    words += ["uniform", "--output", tmp_path / "mix", "--json"]
    monkeypatch.setattr("sys.argv", ["sts-fast", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert told.err == (
        "train, days: id from id, question from question, answer from answer; 58 rows\n"
        f"error: the pool has {N_ANSWERED} answered examples in all, fewer than the budget of 30: "
        "lower --budget, or add examples\n"
    )
    words[words.index(30)] = N_ANSWERED
    monkeypatch.setattr("sys.argv", ["sts-fast", *map(str, words)])
    main()
    assert capsys.readouterr().out == (tmp_path / "mix" / "mix.json").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": 0}, "--budget must be at least 1"),
        ({"budget": 1000}, "answered examples in all, fewer than the budget of 1000"),
        ({"rule": "best"}, "rule must be one of forecast, proportional, uniform"),
        ({"rule": "forecast"}, "needs both --model and --sae"),
        ({"rule": "proportional"}, "--rule proportional needs --from RUN"),
        ({"run": "elsewhere"}, "there is no folder elsewhere"),
        ({"rule": "proportional", "run": "elsewhere"}, "there is no folder elsewhere"),
        ({"loss_left": 1.0}, "--loss-left must lie between 0 and 1"),
        ({"weights": {"law": 1.0}}, "a weight is given for 'law', but the domains are spelling, days"),
        ({"protect": ["train"]}, "a weight is given for 'train'"),
        ({"weights": {"days": -1.0}}, "the weight of 'days' must be a number of at least 0"),
        ({"weights": {"days": float("nan")}}, "the weight of 'days' must be a number"),
        ({"weights": {"days": 0.0, "spelling": 0.0}}, "no domain counts"),
        ({"pool": {}}, "there is no domain to take examples from"),
        ({"estimator": "act"}, "--estimator chooses among the scores of a run"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_sentence(tiny: Tiny, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        mixed(tiny, **{"rule": "uniform", **options})


def test_scores_of_other_domains_or_of_another_kind_are_refused(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no scores by 'act_sq', only by act, icl"):
        mixed(tiny, rule="proportional", run=run, estimator="act_sq")
    write_scores(tmp_path, make_scores() | {"domains": [{"name": "law"}]})
    with pytest.raises(InputError, match=r"is not a scores\.json: \$\.domains\[0\]"):
        mixed(tiny, rule="proportional", run=tmp_path)
    with pytest.raises(InputError, match="has no score of 'law'"):
        mixed(tiny, rule="proportional", run=run, pool={"law": tiny.domains["days"]})


def test_activations_are_not_enough(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(InputError, match=r"needs the whole model, and its gradients, but .* holds activations"):
        mixed(tiny, model=tmp_path, sae=tiny.saes["topk"])


def test_model_and_sae_are_read_as_asked(tiny: Tiny, best: sts_fast.Mixture) -> None:
    assert forecast(tiny, device_map="cpu").to_dict() == best.to_dict()
    rounded = sts_fast.load_sae(tiny.saes["topk"], dtype="bfloat16", layer=0)
    given = {"model": tiny.model, "batch_tokens": 500}
    expected = mixed(tiny, sae=rounded, **given).to_dict()
    assert mixed(tiny, sae=tiny.saes["topk"], sae_dtype="bfloat16", layer=0, **given).to_dict() == expected
    assert mixed(tiny, sae=rounded, hook="blocks.0.hook_resid_post", **given).to_dict() == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--strict"], r"may not belong to .* \(--strict\)"),
        (["--hook", "blocks.1.hook_mlp_out"], "use an SAE of a resid_post hook"),
        (["--layer", "1", "--hook", "mlp_out"], "use an SAE of a resid_post hook"),
        (["--layer", "99"], "has layers 0 to"),
        (["--device-map", "everywhere"], "--device-map is one of"),
        (["--norm-scaling-factor", "2"], "does not ask for --norm-scaling-factor"),
    ],
)
def test_command_reads_model_and_sae_as_asked(
    tiny: Tiny,
    words: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["mix", "--train", tiny.train, "--pool", f"days={tiny.domains['days']}", "--budget", 5]
    given += ["--model", tiny.model, "--sae", tiny.saes["topk"], "--limit", 8, "--output", tmp_path, *words]
    monkeypatch.setattr("sys.argv", ["sts-fast", *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.search(told, capsys.readouterr().err)


def test_schema_is_closed(best: sts_fast.Mixture) -> None:
    import jsonschema

    content = best.to_dict()
    validate_mix(content)
    for broken in ({**content, "more": 1}, {**content, "budget": 0}, {**content, "domains": []}):
        with pytest.raises(jsonschema.ValidationError):
            validate_mix(broken)
    assert mix_schema()["title"] == "sts-fast mix.json"
