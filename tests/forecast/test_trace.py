"""Training examples that carry a forecast: their parts against the equations, the rows that are written, the words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from literal_push import Literal, sae_features
from tiny import N_QUESTIONS, N_TOO_LONG, N_UNANSWERED, Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import sts_fast
from sts_fast.cli import main
from sts_fast.data.examples import load_examples
from sts_fast.data.prompts import build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.errors import InputError
from sts_fast.forecast.run import belongs
from sts_fast.forecast.stored_prompts import answered_sets, sets_of_stage
from sts_fast.profile.projection import projection

OPTIONS: dict[str, Any] = {"shots": 1, "domain_shots": 1, "demo_draws": 2, "limit": 8, "top_n": 12}


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace") / "run"
    sts_fast.score(
        model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, estimators=("act", "ntk"),
        **OPTIONS,
    ).save(folder)  # fmt: skip
    return folder


def test_influences_are_those_of_every_example_alone(tiny: Tiny, run: Path) -> None:
    traced = sts_fast.trace(run, n_shown=3)
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64).eval()
    literal = Literal(model, sae_features(tiny.saes["topk"]))
    template = PromptTemplate(AutoTokenizer.from_pretrained(tiny.model), prepend_bos=True)
    answered = [example for example in load_examples(tiny.train) if example.answer is not None]
    prompts = build_prompts("train", answered, template, tokens="answer", context_length=512).prompts
    of_examples = np.stack([literal.gradient([prompt], literal.nll) for prompt in prompts])
    norm = np.sqrt((of_examples.mean(axis=0) ** 2).sum())
    _, domains = answered_sets(pq.read_table(run / "prompts.parquet"))
    rows, document = traced.examples.to_pylist(), traced.to_dict()
    assert [row["id"] for row in rows] == [f"sums-{i}" for i in range(N_QUESTIONS)]
    assert [row["row"] for row in rows] == list(range(1, N_QUESTIONS + 1))
    assert document["left_out"] == {
        "repeated": 0, "unanswered": N_UNANSWERED, "too_long": N_TOO_LONG, "not_drawn": 0
    }  # fmt: skip
    for domain, block in zip(domains, document["domains"], strict=True):
        expected = np.einsum("njr,jr->n", of_examples, literal.gradient(domain.prompts, literal.nll)) / norm
        found = np.asarray([row[f"part_in_{domain.name}"] for row in rows])
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        assert block["value"] == pytest.approx(found.mean())
        assert block["share_below_zero"] == (found < 0).mean()
        order = np.argsort(-found)
        assert [example["row"] for example in block["highest"]] == (order[:3] + 1).tolist()
        assert [example["row"] for example in block["lowest"]] == (order[::-1][:3] + 1).tolist()
        harm = found[found < 0].sum()
        assert block["share_of_harm_in_worst"] == (pytest.approx(min(found) / harm) if harm else None)
        by_feature = np.einsum("jr,jr->j", of_examples[order[0]], literal.gradient(domain.prompts, literal.nll)) / norm
        feature = block["highest"][0]["features"][0]
        assert feature["index"] == np.abs(by_feature).argmax()
        assert feature["part"] == pytest.approx(by_feature[feature["index"]], rel=1e-3)
    assert projection(64).shape == (64, 64)  # the model is so narrow that gradients are not projected


@pytest.mark.parametrize("dims", ["icl", "active"])
def test_parts_in_the_score_add_up_to_it(tiny: Tiny, tmp_path: Path, dims: Any) -> None:
    library = tmp_path / "library"
    sts_fast.score(
        model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, estimators=("act",), dims=dims,
        library=library, **OPTIONS,
    ).save(tmp_path / "run")  # fmt: skip
    document = json.loads((tmp_path / "run" / "scores.json").read_text(encoding="utf-8"))
    folder = next(path for path in sts_fast.Library(library) if "-train-" in path.name)
    rows = sts_fast.Profile.load(folder).rows
    s = rows.matrix("sum_sq_shift" if dims == "icl" else "sum_h").toarray()
    traced = sts_fast.trace(tmp_path / "run", by="act", domain=["days"])
    top = [feature["index"] for feature in document["shifted_features"]]
    domain = next(domain for domain in document["domains"] if domain["name"] == "days")
    of_domain = sts_fast.Profile.load(next(path for path in sts_fast.Library(library) if path.name.startswith("days")))
    a = of_domain.mean_activation()
    expected = [len(s) * sum(a[j] * row[j] / s[:, j].sum() for j in top) for row in s]
    found = traced.examples["part_in_days"].to_numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert found.mean() == pytest.approx(domain["scores"]["act"]["value"], rel=1e-10)
    [shown] = traced.to_dict()["domains"]
    assert shown["highest"][0]["part"] == found.max()
    assert sum(feature["part"] for feature in shown["highest"][0]["features"]) <= found.max() + 1e-9
    assert traced.examples.column_names == ["row", "id", "question", "answer", "loss", "part_in_days"]


def test_rows_without_and_with_only_the_named_ones(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    lines = tiny.train.read_text(encoding="utf-8").splitlines()
    values = sts_fast.trace(run, domain=["days"]).examples["part_in_days"].to_numpy()
    worst, best = lines[int(values.argmin())], lines[int(values.argmax())]
    repeated = json.dumps({**json.loads(worst), "id": "again", "source": "elsewhere"})
    unreadable = json.dumps({"id": "no question", "note": 1})
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join([*lines, "", unreadable, repeated]) + "\n", encoding="utf-8")
    for option, kept in (
        ({"drop": "1"}, [line for line in [*lines, unreadable] if line != worst]),
        ({"keep": "4%"}, [best]),
    ):
        said: list[str] = []
        traced = sts_fast.trace(run, train=train, domain=["days"], say=said.append, **option)
        warned = "drop" in option and values.min() >= 0
        assert any(line.startswith("warning: 1 of the 1 examples dropped lower the loss") for line in said) == warned
        traced.save(tmp_path / "out")
        written = (tmp_path / "out" / "selected.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in written] == [json.loads(line) for line in kept]
        assert traced.to_dict()["left_out"]["repeated"] == 1
        selection = traced.to_dict()["selection"]
        assert (selection["n_examples"], selection["n_rows"]) == ((1, 2) if "drop" in option else (1, 1))
    sampled = sts_fast.trace(run, limit=10, drop="20%")
    assert len(sampled.examples) == 10
    assert sum(sampled.to_dict()["left_out"].values()) == N_QUESTIONS + N_UNANSWERED + N_TOO_LONG - 10
    assert sampled.named is not None
    assert len(sampled.named) == 2


def test_influences_as_a_column(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in tiny.train.read_text(encoding="utf-8").splitlines()]
    lines.append({**lines[0], "id": "again"})
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    traced = sts_fast.trace(run, train=train, column="influence")
    traced.save(tmp_path)
    written = [json.loads(line) for line in (tmp_path / "selected.jsonl").read_text().splitlines()]
    assert [{**row, "influence": 0} for row in lines] == [{**row, "influence": 0} for row in written]
    parts = [column for column in traced.examples.column_names if column.startswith("part_in_")]
    means = {row["row"]: np.mean([row[part] for part in parts]) for row in traced.examples.to_pylist()}
    means[len(lines)] = means[1]  # which it repeats
    assert [row["influence"] for row in written] == [means.get(number) for number in range(1, len(lines) + 1)]
    assert None in [row["influence"] for row in written]
    best = sts_fast.trace(run, train=train, column="influence", keep="2")
    best.save(tmp_path)
    assert len((tmp_path / "selected.jsonl").read_text().splitlines()) in (2, 3)
    with pytest.raises(InputError, match="has a column 'id' already: give --column another name"):
        sts_fast.trace(run, train=train, column="id").save(tmp_path)


def test_command_line(
    tiny: Tiny, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trace(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["sts-fast", "trace", *map(str, words)])
        main()
        return capsys.readouterr().out

    told = trace(run, "--domain", "days", "--show", 2, "--drop", "5%", "--output", tmp_path)
    document = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    [days] = document["domains"]
    assert f"days: {days['share_below_zero']:.0%} of 24 examples raise its loss" in told
    assert "r = " in told
    assert f"{days['lowest'][0]['part']:+.3g}" in told
    assert len((tmp_path / "selected.jsonl").read_text(encoding="utf-8").splitlines()) == 28
    printed = json.loads(trace(run, "--domain", "days", "--show", 2, "--json", "--output", tmp_path))
    assert printed["domains"] == [days]
    assert printed["selection"] is None
    assert "parts of 8 training prompts in STS_act" in trace(run, "--by", "act", "--output", tmp_path)
    assert pq.read_table(tmp_path / "trace.parquet")["row"].null_count == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": ["law"]}, "the run has no domain called law: its domains are spelling, days"),
        ({"drop": "0%"}, "as in 5%, or a number of examples, not '0%'"),
        ({"drop": "100%"}, "not '100%'"),
        ({"drop": "nan%"}, "not 'nan%'"),
        ({"drop": ""}, "not ''"),
        ({"domain": "law"}, "no domain called law: its"),
        ({"keep": "half"}, "not 'half'"),
        ({"drop": "1", "keep": "1"}, "exclude each other"),
        ({"by": "act", "keep": "1"}, "need a sign"),
        ({"by": "act", "train": "x.jsonl"}, "--train is for ntk"),
        ({"by": "icl"}, "--by must be one of ntk, act"),
        ({"layer": 1}, "are taken from the run"),
        ({"n_shown": 0}, "--show must be at least 1"),
    ],
)
def test_what_cannot_be_traced_is_told(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sts_fast.trace(run, **options)


def test_runs_that_lack_something_are_told(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    scores = json.loads((moved / "scores.json").read_text(encoding="utf-8"))

    def changed(**blocks: Any) -> Path:
        (moved / "scores.json").write_text(json.dumps(scores | blocks), encoding="utf-8")
        return moved

    inputs = scores["provenance"]["inputs"]
    elsewhere = [{**entry, "path": "gone.jsonl"} if entry["role"] == "train" else entry for entry in inputs]
    with pytest.raises(InputError, match=r"training set is not at gone\.jsonl: give it with --train"):
        sts_fast.trace(changed(provenance={**scores["provenance"], "inputs": elsewhere}))
    other = [{**entry, "sha256": "0" * 64} if entry["role"] == "train" else entry for entry in inputs]
    with pytest.raises(InputError, match="has changed since the run"):
        sts_fast.trace(changed(provenance={**scores["provenance"], "inputs": other}))
    rows = [{**block, "columns": {"question": ["prompt"]}} for block in scores["provenance"]["rows"]]
    with pytest.raises(InputError, match="from other columns"):
        sts_fast.trace(changed(provenance={**scores["provenance"], "rows": rows}))
    with pytest.raises(InputError, match="D_N is that of a model after training"):
        sts_fast.trace(changed(settings={**scores["settings"], "dims": "tuned"}), by="act")
    with pytest.raises(InputError, match="only the shift of its training set"):
        sts_fast.trace(changed(domains=[]))
    with pytest.raises(InputError, match="is not the SAE of this run"):
        sts_fast.trace(run, sae=tiny.saes["jumprelu"])
    sts_fast.score(
        model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, **OPTIONS
    ).save(tmp_path / "unanswered")  # fmt: skip
    with pytest.raises(InputError, match="the run read no answers of spelling, days: make it again"):
        sts_fast.trace(tmp_path / "unanswered")


def test_prompts_of_a_run_are_those_it_sent(run: Path) -> None:
    table = pq.read_table(run / "prompts.parquet")
    [train], domains = answered_sets(table)
    assert (train.name, [domain.name for domain in domains]) == ("train", ["spelling", "days"])
    [shifted] = sets_of_stage(table, "shift")
    sent = [row for row in table.to_pylist() if row["stage"] == "shift"]
    for prompt, row in zip(shifted.prompts, sent, strict=True):
        for name in ("base_ids", "demos_ids", "positions", "paired", "paired_demos"):
            assert getattr(prompt, name).tolist() == row[name]
        assert (prompt.id, prompt.question, prompt.draw) == (row["id"], row["question"], row["draw"])
    assert answered_sets(table.filter([stage == "score" for stage in table["stage"].to_pylist()])) == ([], [])


def test_examples_have_no_rows_to_write(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    examples = load_examples(tiny.train)
    traced = sts_fast.trace(run, train=[*examples[:9], *load_examples(tiny.domains["days"])[:9]], drop=2)
    assert traced.named is not None
    assert traced.named <= set(range(1, 19))
    with pytest.raises(InputError, match=r"have no rows to write: see Trace\.named"):
        traced.save(tmp_path)


def test_rows_that_no_text_file_can_hold_are_written_escaped(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"note": "\ud83d", "é": "é"} for line in tiny.train.read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sts_fast.trace(run, train=tmp_path / "train.jsonl", domain=["days"], keep="3").save(tmp_path / "out")
    written = (tmp_path / "out" / "selected.jsonl").read_text().splitlines()
    assert [json.loads(line)["note"] for line in written] == ["\ud83d"] * 3
    sts_fast.trace(run, domain=["days"]).save(tmp_path / "out")
    assert not (tmp_path / "out" / "selected.jsonl").exists()  # of the earlier trace


def test_another_model_is_named(tiny: Tiny, run: Path) -> None:
    said: list[str] = []
    sts_fast.trace(run, model=tiny.tuned, domain="days", say=said.append)
    assert any(
        line.startswith("warning: the model's weights, or their dtype, are not those of the run") for line in said
    )
    with pytest.raises(InputError, match=r"of another model \(--strict\)"):
        sts_fast.trace(run, model=tiny.tuned, strict=True)
    said.clear()
    sts_fast.trace(run, domain="days", say=said.append)
    assert not any("weights" in line for line in said)


def test_a_trace_names_the_run_that_it_is_of(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "scores.json").write_text((run / "scores.json").read_text() + "\n")
    sts_fast.trace(run, domain=["days"]).save(other)
    assert not belongs(other, json.loads((other / "trace.json").read_text()))
    sts_fast.trace(run, domain=["days"]).save(run)
    assert belongs(run, json.loads((run / "trace.json").read_text()))
