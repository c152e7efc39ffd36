"""Zeroing features: every answer against a float64 forward pass by hand, every number against the answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
import torch
from tiny import LAYER, Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import sts_fast
from sts_fast.ablate.record import ablation_schema, validate_ablation
from sts_fast.cli import main
from sts_fast.demo import organism
from sts_fast.errors import InputError
from sts_fast.files import Kept
from sts_fast.forecast.controls import like_activity
from sts_fast.signed.gradients import HookedModel

LIMIT, TOP_N, DRAWS = 8, 12, 2
CONDITIONS = ("top", "random", "like_activity", "low_shift")


@pytest.fixture(scope="module")
def forecasts(tiny: Tiny) -> dict[str, sts_fast.Forecast]:
    return {
        architecture: sts_fast.score(
            model=tiny.model, sae=tiny.saes[architecture], train=tiny.train, domains=tiny.domains, shots=1,
            domain_shots=1, demo_draws=1, limit=LIMIT, top_n=TOP_N, estimators=("act", "ntk"),
        )
        for architecture in ("topk", "jumprelu")
    }  # fmt: skip


@pytest.fixture(scope="module", params=["topk", "jumprelu"])
def run(request: pytest.FixtureRequest, forecasts: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("ablate")
    forecasts[request.param].save(folder)
    sts_fast.ablate(folder, n_draws=DRAWS, batch_tokens=300, seed=3).save(folder)
    return request.param, folder


def document_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    return document


def answer_without(
    tiny: Tiny, sae: Path, row: dict[str, Any], features: list[int]
) -> tuple[float, bool, tuple[float, float]]:
    """The answer's nll (nats, summed), whether it is the first choice, and ||removed||^2 and ||x||^2, all in float64.

    One unbatched forward pass; sae-lens decodes the dense features with and without those that are zeroed.
    """
    model, ids = oracle.load_model(tiny.model, torch.float64), row["base_ids"]
    x = oracle.residual(tiny.model, LAYER, tuple(ids), torch.float64)
    h = torch.from_numpy(oracle.encode(sae, x)[oracle.VALUE])
    kept = torch.from_numpy(~oracle.attention_sinks(x[: row["positions"][-1] + 1]))
    kept[0], kept[-1] = False, False  # BOS; nothing is read of the last token
    without = h.clone()
    without[:, features] = 0
    by_sae_lens = oracle.load_sae_lens(sae)
    with torch.no_grad():
        removed = (by_sae_lens.decode(h) - by_sae_lens.decode(without))[: len(kept)] * kept[:, None]
        changed = torch.from_numpy(x).clone()
        changed[: len(kept)] -= removed
        handle = model.model.layers[LAYER].register_forward_hook(lambda module, args, output: changed[None])
        try:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            handle.remove()
    log_p = torch.log_softmax(logits, dim=-1)
    at = torch.tensor(row["positions"])
    tokens = torch.tensor(ids)[at]
    nll = -float(log_p[at - 1, tokens].sum())
    energy = float((torch.from_numpy(x[: len(kept)])[kept] ** 2).sum())
    return nll, bool((log_p[at - 1].argmax(dim=-1) == tokens).all()), (float((removed**2).sum()), energy)


def test_answers_are_those_of_a_forward_pass_by_hand(tiny: Tiny, run: tuple[str, Path]) -> None:
    architecture, folder = run
    document, sae = document_of(folder), tiny.saes[architecture]
    prompts = [row for row in pq.read_table(folder / "prompts.parquet").to_pylist() if "signed" in row["stage"]]
    sent = {(row["stage"] == "signed_train", row["domain"], row["id"]): row for row in prompts}
    answers = pq.read_table(folder / "ablation.parquet").to_pylist()
    assert len(answers) == 3 * LIMIT * (2 + 3 * DRAWS)
    energies: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for answer in answers:
        row = sent[answer["kind"] == "train", answer["set"], answer["id"]]
        features = [] if answer["condition"] == "none" else document["features"][answer["condition"]][answer["draw"]]
        nll, exact, energy = answer_without(tiny, sae, row, features)
        assert answer["answer_nll_sum"] == pytest.approx(nll, rel=2e-5, abs=1e-5)
        assert answer["answer_exact"] == exact
        assert answer["n_answer"] == len(row["positions"])
        energies.setdefault((answer["set"], answer["condition"]), []).append(energy)
    for one in document["sets"]:
        for name in CONDITIONS:
            removed, total = np.asarray(energies[one["name"], name]).sum(axis=0)
            assert one["conditions"][name]["removed"] == pytest.approx(removed / total, rel=1e-4)
    # It does something, or all of this would say nothing.
    assert document["sets"][0]["conditions"]["top"]["removed"] > 0.01


def test_every_number_follows_from_the_answers(run: tuple[str, Path]) -> None:
    _, folder = run
    document = document_of(folder)
    validate_ablation(document)
    rows = pq.read_table(folder / "ablation.parquet").to_pylist()
    assert [(one["kind"], one["name"]) for one in document["sets"]] == [
        ("train", "train"), ("domain", "spelling"), ("domain", "days"),
    ]  # fmt: skip

    def outcomes(name: str, condition: str, draw: int) -> dict[str, Any]:
        chosen = [row for row in rows if (row["set"], row["condition"], row["draw"]) == (name, condition, draw)]
        nll, n = (np.asarray([row[key] for row in chosen]) for key in ("answer_nll_sum", "n_answer"))
        exact = np.asarray([row["answer_exact"] for row in chosen])
        return {"loss": nll / n, "p_answer": np.exp(-nll), "accuracy": exact}

    for one in document["sets"]:
        before = outcomes(one["name"], "none", 0)
        draws = oracle.drawn_anew([0] * LIMIT, 3, one["name"], 1000)

        def interval(values: Any, draws: Any = draws) -> Any:
            return pytest.approx(np.percentile((draws * values).sum(axis=1) / LIMIT, [2.5, 97.5]), abs=1e-12)

        top = outcomes(one["name"], "top", 0)
        for outcome, value in one["before"].items():
            assert value == pytest.approx(before[outcome].mean(), abs=1e-12)
            for name in CONDITIONS:
                n = 1 if name == "top" else DRAWS
                after = [outcomes(one["name"], name, i)[outcome] for i in range(n)]
                change = np.mean(after, axis=0) - before[outcome]
                found = one["conditions"][name][outcome]
                assert found["value"] == pytest.approx(change.mean(), abs=1e-12)
                assert found["ci"] == interval(change)
                assert found["draws"] == pytest.approx([(x - before[outcome]).mean() for x in after], abs=1e-12)
                if name != "top":
                    less = top[outcome] - np.mean(after, axis=0)
                    assert found["top_less_this"]["value"] == pytest.approx(less.mean(), abs=1e-12)
                    assert found["top_less_this"]["ci"] == interval(less)


def test_features_zeroed_beside_those_of_the_forecast(forecasts: Any, run: tuple[str, Path]) -> None:
    architecture, folder = run
    features, forecast = document_of(folder)["features"], forecasts[architecture]
    means = forecast.means
    top = [feature.index for feature in forecast.shifted_features]
    assert features["top"] == [sorted(top)]
    fired = np.flatnonzero(means.n_fired > 0)
    outside = [j for j in fired if j not in top]
    least = sorted(outside, key=lambda j: means.importance[j])[: 4 * TOP_N]
    for name in CONDITIONS[1:]:
        assert len(features[name]) == DRAWS
        for draw in features[name]:
            assert len(set(draw)) == TOP_N
            assert not set(draw) & set(top)
    assert features["random"][0] != features["random"][1]
    assert features["like_activity"][0] != features["like_activity"][1]
    assert all(set(draw) <= set(least) for draw in features["low_shift"])


def test_random_features_are_about_as_active() -> None:
    activity = np.arange(1000.0) ** 2
    top = np.asarray([900, 10, 500])
    draws = [like_activity(activity, top, np.random.default_rng(seed)) for seed in range(20)]
    assert all(np.abs(np.sort(draw) - np.sort(top)).max() <= 15 for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 15


def test_answers_of_a_run_without_any_are_read_from_their_files(
    tiny: Tiny, forecasts: Any, run: tuple[str, Path]
) -> None:
    architecture, folder = run
    forecast = forecasts[architecture]
    stages = forecast.prompts["stage"].to_pylist()
    without = replace(forecast, prompts=forecast.prompts.filter([stage == "score" for stage in stages]))
    with pytest.raises(InputError, match="contains no answers"):
        sts_fast.ablate(without)
    with pytest.raises(InputError, match="--train and --domains go together"):
        sts_fast.ablate(without, train=tiny.train)
    again = sts_fast.ablate(
        without, model=AutoModelForCausalLM.from_pretrained(tiny.model),
        tokenizer=AutoTokenizer.from_pretrained(tiny.model), train=tiny.train, domains=tiny.domains, n_draws=DRAWS,
        batch_tokens=300, seed=3,
    )  # fmt: skip
    assert again.to_dict()["sets"] == document_of(folder)["sets"]
    assert again.to_dict()["model"] == "the model"


def test_questions_behind_demonstrations(tiny: Tiny, forecasts: Any) -> None:
    forecast = forecasts["topk"]
    with pytest.raises(InputError, match="--few-shot needs --train and --domains"):
        sts_fast.ablate(forecast, few_shot=True)
    found = sts_fast.ablate(
        forecast, train=tiny.train, domains=tiny.domains, few_shot=True, n_draws=1, batch_tokens=600
    )  # fmt: skip
    document = found.to_dict()
    validate_ablation(document)
    sets = {"train": tiny.train, **tiny.domains}
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    n_checked = 0
    for row in found.answers.to_pylist():
        if row["condition"] in ("none", "top") and row["draw"] == 0:
            asked = {q["id"]: q for q in map(json.loads, sets[row["set"]].read_text().splitlines())}
            demo, query = next(iter(asked.values())), asked[row["id"]]
            text = "".join(f"Question: {q['question']}\nAnswer: {q['answer']}\n\n" for q in (demo, query)).rstrip("\n")
            ids = tokenizer(text).input_ids
            n_before = len(tokenizer(text[: -len(query["answer"]) - 1]).input_ids)
            n_before += not tokenizer.decode(ids[n_before]).strip()  # a blank before the answer is not the answer's
            prompt = {"base_ids": ids, "positions": list(range(n_before, len(ids)))}
            features = [] if row["condition"] == "none" else document["features"]["top"][0]
            nll, _, _ = answer_without(tiny, tiny.saes["topk"], prompt, features)
            assert row["answer_nll_sum"] == pytest.approx(nll, rel=2e-5)
            n_checked += 1
    assert n_checked == 2 * 3 * LIMIT


def test_what_cannot_be_zeroed_is_told(tiny: Tiny, forecasts: Any) -> None:
    forecast = forecasts["topk"]
    sae = sts_fast.load_sae(tiny.saes["topk"])
    with pytest.raises(InputError, match="not the SAE of this run"):
        sts_fast.ablate(forecast, sae=tiny.saes["jumprelu"])
    with pytest.raises(InputError, match="have no W_dec"):
        sts_fast.ablate(forecast, sae=replace(sae, decoder=None))
    with pytest.raises(InputError, match="is a transcoder"):
        sts_fast.ablate(forecast, sae=replace(sae, target_hook_name="blocks.2.hook_mlp_out"))
    with pytest.raises(InputError, match=r"reads .* dimensions, but .* has 96"):
        sts_fast.ablate(forecast, model=organism.model_folder())
    with pytest.raises(InputError, match="are taken from the run"):
        sts_fast.ablate(forecast, layer=LAYER)
    with pytest.raises(InputError, match=r"may not belong to .* \(--strict\)"):
        sts_fast.ablate(forecast, strict=True)
    with pytest.raises(InputError, match="at least 1"):
        sts_fast.ablate(forecast, n_draws=0)
    many = replace(forecast, shifted_features=[replace(forecast.shifted_features[0], index=j) for j in range(130)])
    with pytest.raises(InputError, match="lower --top-n"):
        sts_fast.ablate(many)


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale", "scaled"])
def test_written_is_what_reconstructions_differ_by(tiny: Tiny, norm: str) -> None:
    sae = sts_fast.load_sae(tiny.saes["standard"])
    sae = replace(sae, input_scale=0.3) if norm == "scaled" else replace(sae, input_norm=norm)
    x = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(0)) * 3 + 1
    whole = sts_fast.encode(sae, x)
    half = np.isin(whole.indices, np.arange(0, sae.d_sae, 2))
    rows = np.repeat(np.arange(len(x)), np.diff(whole.indptr))

    def those(chosen: Any) -> Any:
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows[chosen], minlength=len(x)))])
        return indptr, whole.indices[chosen], whole.values[chosen]

    every, rest = sae.reconstruct(x, whole), sae.reconstruct(x, those(~half))
    assert every is not None
    assert rest is not None
    written = sae.written(x, those(half))
    assert torch.allclose(written, every - rest, atol=1e-5)
    assert written.abs().max() > 0.1


def test_schema_names_every_key() -> None:
    def objects(schema: Any) -> Any:
        if isinstance(schema, dict):
            if "properties" in schema:
                yield schema
            for value in schema.values():
                yield from objects(value)

    for schema in objects(ablation_schema()):
        assert schema["additionalProperties"] is False
        assert set(schema["required"]) == set(schema["properties"]) - {"run"}  # of one that lies beside its run


def call(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr("sys.argv", ["sts-fast", "ablate", *map(str, words)])
    main()


def test_command_line(
    tiny: Tiny, forecasts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forecasts["topk"].save(tmp_path)
    call(monkeypatch, tmp_path, "--draws", 1, "--top-n", 5, "--tuned", tiny.tuned)
    printed = " ".join(capsys.readouterr().out.split())
    document = document_of(tmp_path)
    assert (document["top_n"], document["n_draws"], document["model"]) == (5, 1, str(tiny.tuned))
    assert document["features"]["top"] == [sorted(f.index for f in forecasts["topk"].shifted_features[:5])]
    assert "Zeroing the 5 features of D_N changes" in printed
    assert "training set" in printed
    assert "Zeroing the 5 features of D_N" in (tmp_path / "report.html").read_text(encoding="utf-8")
    for words, message in (
        ((tmp_path, "--limit", 8), "are taken from the run"),
        ((tmp_path, "--layer", LAYER), "are taken from the run"),
        ((tmp_path, "--strict"), "(--strict)"),
        ((tmp_path, "--device-map", "everywhere"), "--device-map is one of"),
        ((), "give the folder of a run"),
        (("--model", tiny.model, "--sae", tiny.saes["topk"]), "needs --model, --sae, --train and --domains"),
        ((tmp_path / "nowhere",), "there is no folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, *words, *(["--output", tmp_path / "other"] if len(words) != 1 else []))
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_command_line_without_a_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domains = [word for name, path in tiny.domains.items() for word in ("--domains", f"{name}={path}")]
    call(
        monkeypatch, "--model", tiny.model, "--sae", tiny.saes["topk"], "--train", tiny.train, *domains, "--limit", 8,
        "--shots", 1, "--top-n", 6, "--draws", 1, "--output", tmp_path, "--layer", LAYER - 1, "--device-map", "cpu",
    )  # fmt: skip
    document = document_of(tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert document["features"]["top"] == [sorted(feature["index"] for feature in scores["shifted_features"])]
    assert [one["n_prompts"] for one in document["sets"]] == [8, 8, 8]
    assert document["hook_name"] == scores["sae"]["hook_name"] == f"blocks.{LAYER - 1}.hook_resid_post"


def test_an_ablation_goes_on_from_what_was_kept(
    run: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = run
    kept, given = Kept(tmp_path), {"n_draws": DRAWS, "batch_tokens": 300, "seed": 3}
    first = sts_fast.ablate(folder, kept=kept, **given)
    n_sets = len(first.to_dict()["sets"])
    assert kept.counts() == {"ablations": n_sets}
    assert first.to_dict()["sets"] == document_of(folder)["sets"]
    with monkeypatch.context() as patch:
        patch.setattr(HookedModel, "answer_rows", None)  # nothing is asked
        again = sts_fast.ablate(folder, kept=kept, **given)
    assert again.to_dict()["sets"] == first.to_dict()["sets"]
    assert again.answers.equals(first.answers)
    sts_fast.ablate(folder, kept=kept, **{**given, "seed": 4})
    assert kept.counts() == {"ablations": 2 * n_sets}


def test_an_ablation_without_a_run_replaces_no_other(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "--model", tiny.model, "--sae", tiny.saes["topk"], "--train", tiny.train, "--domains", tiny.domains["days"],
        "--limit", 8, "--shots", 1, "--top-n", 6, "--draws", 1, "--output", tmp_path / "run",
    )  # fmt: skip
    call(monkeypatch, *words)
    first = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    call(monkeypatch, *words, "--seed", 1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == first
    assert document_of(tmp_path / "run-2")["provenance"]["seed"] == 1
    call(monkeypatch, *words, "--seed", 1, "--overwrite")
    assert document_of(tmp_path / "run")["provenance"]["seed"] == 1
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path / "run", "--draws", 1, "--overwrite")
    assert "--overwrite is for an ablation without a run" in capsys.readouterr().err
