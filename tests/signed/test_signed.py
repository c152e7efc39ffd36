"""The signed part of a forecast, from files of questions to scores.json and its comparison with outcomes."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
import torch
from tiny import D_IN, LAYER, Tiny
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import sts_fast
from sts_fast.cli import main
from sts_fast.data.examples import load_examples
from sts_fast.data.prompts import build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.errors import InputError
from sts_fast.outcomes.outcomes import Outcome
from sts_fast.outcomes.validate import validate
from sts_fast.profile.projection import projection
from sts_fast.sae import load_sae
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import Features, measure_pull, measure_push

SHOTS, DOMAIN_SHOTS, LIMIT = 1, 2, 12


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    n_before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_before)


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "run"
    sts_fast.score(
        model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, shots=SHOTS,
        domain_shots=DOMAIN_SHOTS, limit=LIMIT, top_n=8, estimators=("act", "ntk", "step"), batch_tokens=500,
    ).save(folder)  # fmt: skip
    return folder


def scores_of(folder: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return scores


def test_block_holds_the_mean_over_prompts_of_each_estimator(tiny: Tiny, run: Path) -> None:
    scores = scores_of(run)
    signed, domains = scores["signed"], {domain["name"]: domain["scores"] for domain in scores["domains"]}
    template = PromptTemplate(AutoTokenizer.from_pretrained(tiny.model), prepend_bos=True)
    model = HookedModel(AutoModelForCausalLM.from_pretrained(tiny.model), LAYER, batch_tokens=700)
    features, Q = Features(load_sae(tiny.saes["topk"])), projection(D_IN)

    def answered(path: Path) -> Any:
        return build_prompts(
            "", load_examples(path), template, tokens="answer", context_length=512, limit=LIMIT
        ).prompts

    push = measure_push(model, features, Q, "", answered(tiny.train), maps=("step",))
    assert signed["train_loss"] == pytest.approx(push.loss, rel=1e-5)
    assert signed["loss_left"] == pytest.approx({"step": push.maps["step"].loss_left}, rel=1e-3)
    assert set(signed["domains"]) == set(tiny.domains)
    for name, path in tiny.domains.items():
        pull = measure_pull(model, features, Q, "", answered(path), [push])
        found = signed["domains"][name]
        assert found["n_prompts"] == LIMIT
        assert found["p_answer"] == pytest.approx(pull.p_answer.mean(), rel=1e-4)
        for estimator, values in pull.values.items():
            score = domains[name][estimator]
            assert score["value"] == pytest.approx(values.mean(), rel=1e-3, abs=1e-9)
            low, high = score["ci"]
            assert low <= score["value"] <= high
            # A mean over prompts has about this spread.
            assert high - low == pytest.approx(3.92 * values.std() / np.sqrt(LIMIT), rel=0.35)
        along = pull.contributions[0].sum()  # <M_S, M_T> / ||M_S||
        assert found["gradient_cosine"] == pytest.approx(along / pull.norm, rel=1e-3, abs=1e-6)
        assert abs(found["gradient_cosine"]) <= 1
        contributions = pull.contributions[0]
        top = found["top_features"]
        assert [entry["index"] for entry in top] == np.argsort(-np.abs(contributions))[: len(top)].tolist()
        assert top[0]["contribution"] == pytest.approx(contributions[top[0]["index"]], rel=1e-3)


def test_every_number_follows_from_the_files(tiny: Tiny, run: Path) -> None:
    """prompts.parquet alone gives the signed forecasts and their intervals, and the scores beside them."""
    scores, rows = scores_of(run), pq.read_table(run / "prompts.parquet").to_pylist()

    def column(stage: str, domain: str, name: str) -> Any:
        return np.asarray([row[name] for row in rows if (row["stage"], row["domain"]) == (stage, domain)])

    def n_answer(stage: str, domain: str) -> Any:
        return np.asarray([len(row["positions"]) for row in rows if (row["stage"], row["domain"]) == (stage, domain)])

    train_loss = column("signed_train", "train", "answer_nll_sum") / n_answer("signed_train", "train")
    assert scores["signed"]["train_loss"] == pytest.approx(train_loss.mean(), rel=1e-12)
    for domain in scores["domains"]:
        name, found = domain["name"], scores["signed"]["domains"][domain["name"]]
        nll, n = column("signed", name, "answer_nll_sum"), n_answer("signed", name)
        assert found["base_loss"] == pytest.approx((nll / n).mean(), rel=1e-12)
        assert found["p_answer"] == pytest.approx(np.exp(-nll).mean(), rel=1e-12)
        seed = scores["provenance"]["seed"]
        draws = oracle.drawn_anew([0] * len(nll), seed, name, scores["settings"]["n_bootstrap"])
        for field in ("ntk", "ntk_loss", "step", "step_loss"):
            values = column("signed", name, field)
            assert domain["scores"][field]["value"] == pytest.approx(values.mean(), rel=1e-12)
            ci = np.percentile((draws * values).sum(axis=1) / len(values), [2.5, 97.5])
            assert domain["scores"][field]["ci"] == pytest.approx(ci, rel=1e-9)
        assert set(column("signed", name, "adapter")) == {None}
        n_read = sum(len(row["positions"]) for row in rows if (row["stage"], row["domain"]) == ("score", name))
        assert domain["scores"]["act"]["value"] == pytest.approx(
            column("score", name, "act_sum").sum() / n_read, rel=1e-12
        )
    for row in rows:  # what a stage has no value for is null
        assert (row["act_sum"] is not None) == (row["stage"] == "score")
        assert (row["step"] is not None) == (row["stage"] == "signed")


def test_features_that_carry_a_forecast_are_explained(tiny: Tiny, run: Path) -> None:
    signed = scores_of(run)["signed"]
    features = {feature["index"]: feature for feature in signed["top_features"]}
    listed = {top["index"] for found in signed["domains"].values() for top in found["top_features"]}
    assert set(features) == listed
    shares = [feature["share"] for feature in signed["top_features"]]
    assert shares == sorted(shares, reverse=True)
    # The share of a feature that every domain lists.
    totals = {
        name: sum(abs(top["contribution"]) for top in found["top_features"]) / found["share_of_top_features"]
        for name, found in signed["domains"].items()
    }
    everywhere = set.intersection(*({top["index"] for top in f["top_features"]} for f in signed["domains"].values()))
    assert everywhere
    every_part = [top for found in signed["domains"].values() for top in found["top_features"]]
    for j in everywhere:
        size = sum(abs(top["contribution"]) for top in every_part if top["index"] == j)
        assert features[j]["share"] == pytest.approx(size / sum(totals.values()), rel=1e-9)
    assert all(feature["promoted_tokens"] for feature in signed["top_features"][:20])

    # Where they fire: the token named, in the prompt named, has that activation in a plain forward pass.
    firings = [row for row in pq.read_table(run / "features.parquet").to_pylist() if row["stage"] == "signed"]
    assert {row["feature"] for row in firings} <= {feature["index"] for feature in signed["top_features"][:20]}
    prompts = {(row["domain"], row["id"]): row for row in pq.read_table(run / "prompts.parquet").to_pylist()
               if row["stage"] == "signed"}  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    model, sae = AutoModelForCausalLM.from_pretrained(tiny.model), load_sae(tiny.saes["topk"])
    for row in firings[:12]:
        ids = torch.tensor([prompts[row["domain"], row["id"]]["base_ids"]])
        with torch.no_grad():
            x = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0]
        features_of = sts_fast.encode(sae, x[:-1])
        at = np.repeat(np.arange(len(x) - 1), np.diff(features_of.indptr))[features_of.indices == row["feature"]]
        values = features_of.values[features_of.indices == row["feature"]]
        found = at[np.isclose(values, row["value"], rtol=1e-4)]
        assert any(tokenizer.decode(ids[0, i]).strip() == row["token"].strip() for i in found)


def test_a_run_without_signed_estimators_has_no_such_block(tiny: Tiny) -> None:
    forecast = sts_fast.score(
        model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, shots=1, domain_shots=1,
        limit=8, top_n=8, estimators=("act",),
    )  # fmt: skip
    assert forecast.to_dict()["signed"] is None


def test_what_signed_estimators_cannot_do_is_told(tiny: Tiny, tmp_path: Path) -> None:
    def forecast(**changed: Any) -> Any:
        options: dict[str, Any] = {
            "model": tiny.model, "sae": tiny.saes["topk"], "train": tiny.train, "domains": tiny.domains, "shots": 1,
            "domain_shots": 1, "limit": 8, "top_n": 8, "estimators": ("ntk",), **changed,
        }  # fmt: skip
        return sts_fast.score(**options)

    with pytest.raises(InputError, match="not 'nkt'"):
        forecast(estimators=("nkt",))
    headless = AutoModel.from_pretrained(tiny.model)
    with pytest.raises(InputError, match="head"):
        forecast(model=headless, tokenizer=AutoTokenizer.from_pretrained(tiny.model))
    questions = [{"question": f"Where is the river number {i}?"} for i in range(20)]
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text("".join(json.dumps(row) + "\n" for row in questions))
    with pytest.raises(InputError, match="no domain has the 8 answered questions"):
        forecast(domains={"rivers": unanswered})
    mixed = forecast(domains={"rivers": unanswered, **tiny.domains})
    assert set(mixed.to_dict()["signed"]["domains"]) == set(tiny.domains)
    assert any("too few answers for a signed forecast of rivers" in warning for warning in mixed.warnings)


def test_validate_judges_direction_and_size() -> None:
    forecast = {"a": 3.0, "b": -2.0, "c": 1.0, "d": -0.5, "e": 0.2}
    change = {"a": 0.3, "b": -0.2, "c": 0.1, "d": 0.05, "e": -0.02}
    scores = {
        "domains": [
            {"name": name, "scores": {"step": {"value": v, "ci": [v, v]}}, "controls": {}}
            for name, v in forecast.items()
        ],
    }
    outcomes = {
        name: Outcome(change=v, before=0.5, after=0.5 + v, stderr=None, n=None, paired=False, metric="acc")
        for name, v in change.items()
    }
    result = validate(scores, outcomes, estimator="step")
    x, y = np.asarray(list(forecast.values())), np.asarray(list(change.values()))
    assert result.signed.pearson.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert result.size.pearson.value == pytest.approx(np.corrcoef(abs(x), abs(y))[0, 1])
    # Risen: a, c, d at 3, 1, -.5; fallen: b, e at -2, .2. Five of the six pairs are in order.
    assert result.sign_auc == pytest.approx(5 / 6)
    assert "83%" in result.to_text()
    assert "size, not direction" not in result.to_text()
    with pytest.raises(InputError, match="no scores by 'ntk'"):
        validate(scores, outcomes, estimator="ntk")


def test_command_line_prints_both_directions(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    words = ["sts-fast", "score", "--model", tiny.model, "--sae", tiny.saes["topk"], "--train", tiny.train]
    for name, path in tiny.domains.items():
        words += ["--domains", f"{name}={path}"]
    words += ["--shots", 1, "--domain-shots", 1, "--limit", 8, "--top-n", 8, "--estimators", "ntk,adapter"]
    words += ["--signed-features", "raw", "--output", tmp_path / "run"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    main()
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("Training is forecast to")
    assert "by adapter" in printed
    scores = scores_of(tmp_path / "run")
    assert scores["signed"]["features"] == "raw"
    assert scores["settings"]["estimators"] == ["act"]
    for domain in scores["domains"]:
        assert set(domain["scores"]) == {"act", "ntk", "ntk_loss", "adapter", "adapter_loss"}
    for found in scores["signed"]["domains"].values():
        assert found["top_features"] is None


def test_several_training_sets_side_by_side(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [{"question": f"Where is the river number {i}?"} for i in range(12)]
    (tmp_path / "unanswered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    days, spelling = tiny.domains["days"], tiny.domains["spelling"]
    words = ["sts-fast", "compare", "--model", tiny.model, "--sae", tiny.saes["topk"], "--train", f"sums={tiny.train}"]
    words += ["--train", f"letters={spelling}", "--domains", f"days={days}"]
    words += ["--domains", f"rivers={tmp_path / 'unanswered.jsonl'}", "--shots", 1, "--limit", 8, "--top-n", 8]
    words += ["--estimators", "act,step", "--output", tmp_path / "run"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    main()
    compared = json.loads((tmp_path / "run" / "compare.json").read_text(encoding="utf-8"))
    assert compared["domains"] == ["days", "rivers"]
    assert list(compared["scores"]) == ["act", "step", "step_loss"]
    printed = capsys.readouterr().out
    for field, of_trains in [(field, compared["scores"][field]) for field in ("step", "step_loss")]:
        assert list(of_trains) == ["sums", "letters"]
        for train, found in of_trains.items():
            alone = scores_of(tmp_path / "run" / train)["domains"][0]["scores"][field]
            assert found == {"value": [alone["value"], None], "ci": [alone["ci"], None]}
            shown = f"{100 * alone['value']:+.1f}" if field == "step" else f"{alone['value']:+.3g}"
            assert (f" {shown} [" if field == "step" else f" {shown} ") in printed
    assert printed.count("no answers") == 4
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("no answers") == 4
    assert 'href="sums/report.html"' in page
    assert "Forecast change of P(answer), by step, in points" in printed


def test_the_written_tables_are_those_of_the_results() -> None:
    world = Path(__file__).parents[2] / "study" / "world"
    table = runpy.run_path(str(world / "table.py"))["table"]
    results = json.loads((world / "results" / "study.json").read_text(encoding="utf-8"))
    assert table(results) in (world / "results" / "study.md").read_text(encoding="utf-8")


def test_controls_of_all_ask_no_answer_again(tiny: Tiny) -> None:
    """Beside signed estimators the base loss and accuracy cost no pass, and are those of a pass of their own."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    n_sequences = 0

    def count(module: Any, args: Any) -> None:
        nonlocal n_sequences
        n_sequences += len(args[0])

    model.lm_head.register_forward_pre_hook(count)  # what is read at the SAE's hook does not come as far

    def scored(**options: Any) -> tuple[sts_fast.Forecast, int]:
        nonlocal n_sequences
        n_sequences = 0
        forecast = sts_fast.score(
            model=model, tokenizer=AutoTokenizer.from_pretrained(tiny.model), sae=tiny.saes["topk"], train=tiny.train,
            domains=tiny.domains, shots=SHOTS, domain_shots=DOMAIN_SHOTS, limit=LIMIT, top_n=8, **options,
        )  # fmt: skip
        return forecast, n_sequences

    # Each answer once; where features fire is read up to the hook.
    _, n_signed = scored(estimators=("act", "ntk"))
    assert n_signed == LIMIT * (len(tiny.domains) + 1)
    together, n_together = scored(estimators=("act", "ntk"), controls="all")
    assert n_together == n_signed
    alone, n_alone = scored(estimators=("act",), controls="all")
    assert n_alone == LIMIT * len(tiny.domains)
    for one, other in zip(together.domains, alone.domains, strict=True):
        assert one.controls["base_loss"]["nll"] == pytest.approx(other.controls["base_loss"]["nll"], rel=1e-6)
        assert one.controls["base_accuracy"] == other.controls["base_accuracy"]
