"""Feature labels of Neuronpedia: every form of its exports, and labels of other SAEs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from sts_fast import InputError, score
from sts_fast.model.labels import Labels, Source
from sts_fast.sae import SAE

CASES = Path(__file__).parents[3] / "shared" / "cases" / "65_labels"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the checkout")
MODEL, LAYER, WIDTH = "gemma-2-2b", 20, 16_384
SOURCE = "20-gemmascope-res-16k"


def make_sae(
    model: str = f"google/{MODEL}",
    hook: str = f"blocks.{LAYER}.hook_resid_post",
    width: int = WIDTH,
    target: str = "",
    neuronpedia: str | None = None,
) -> SAE:
    vector = np.zeros(2, np.float32)
    return SAE(
        "standard",
        np.zeros((2, width), np.float32),
        np.zeros(width, np.float32),
        vector,
        hook_name=hook,
        target_hook_name=target,
        model_name=model,
        source="an SAE",
        metadata={"neuronpedia_id": neuronpedia} if neuronpedia else {},
    )


def row(index: Any, description: Any, **more: Any) -> dict[str, Any]:
    return {"modelId": MODEL, "layer": SOURCE, "index": index, "description": description, **more}


ROWS = [row("7", " a first label "), row(7, "a second"), row(3, ""), row(4, None), row(511, "the last"), row("x", "no")]
EXPECTED = {7: "a first label", 511: "the last"}


def lines(rows: list[dict[str, Any]]) -> str:
    return "\n\n".join(json.dumps(row) for row in rows) + "\n"


def api(rows: list[dict[str, Any]]) -> dict[str, Any]:
    bare = [{key: value for key, value in row.items() if key in ("index", "description")} for row in rows]
    return {"modelId": MODEL, "layer": SOURCE, "explanations": bare, "explanationsCount": len(bare)}


def features_of_api(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers about single features, whose explanations have no index of their own."""
    return [
        {key: row[key] for key in ("modelId", "layer", "index")}
        | {"explanations": [{"description": row["description"]}]}
        for row in rows
    ]


def write(path: Path, form: str) -> Path:
    texts = {
        "list": json.dumps(ROWS),
        "lines": lines(ROWS),
        "api": json.dumps(api(ROWS)),
        "api, indented": json.dumps(api(ROWS), indent=2),
        "features": json.dumps(features_of_api(ROWS)),
        "one feature": json.dumps({**row(7, None), "explanations": [{"description": "a first label"}]}),
    }
    path.write_text(texts[form])
    return path


@pytest.mark.parametrize("form", ["list", "lines", "api", "api, indented", "features"])
def test_forms_of_a_file(form: str, tmp_path: Path) -> None:
    assert Labels.read(write(tmp_path / "labels", form)).of(make_sae(), "") == EXPECTED


def test_one_feature(tmp_path: Path) -> None:
    assert Labels.read(write(tmp_path / "a.json", "one feature")).of(make_sae(), "") == {7: "a first label"}


@pytest.mark.parametrize("below", ["", "explanations", "gemma-2-2b/20-gemmascope-res-16k/explanations"])
def test_a_folder_of_batches(below: str, tmp_path: Path) -> None:
    """In the order of their numbers: the first label of a feature is that of batch 2, not of batch 10."""
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    for n, rows in ((10, [row(7, "later")]), (2, ROWS)):
        (folder / f"batch-{n}.jsonl.gz").write_bytes(gzip.compress(lines(rows).encode()))
    (tmp_path / "readme.md").write_text("no labels")
    assert Labels.read(tmp_path).of(make_sae(), "") == EXPECTED


@pytest.mark.parametrize(
    ("sae", "reason"),
    [
        (make_sae(model="google/gemma-2-9b"), "is of google/gemma-2-9b"),
        (make_sae(model="gemma-2b"), "is of gemma-2b"),
        (make_sae(model="google/gemma-2-2b-it"), "is of google/gemma-2-2b-it"),
        (make_sae(model="stories260K"), "is of stories260K"),
        (make_sae(hook="blocks.2.hook_resid_post"), r"reads at blocks\.2\.hook_resid_post"),
        (make_sae(hook="model.layers.19"), r"reads at model\.layers\.19"),
        (make_sae(hook="blocks.20.hook_mlp_out"), r"reads at blocks\.20\.hook_mlp_out"),
        (make_sae(hook="blocks.20.attn.hook_z"), r"reads at blocks\.20\.attn\.hook_z"),
        (make_sae(width=65_536), "has 65536 features"),
        (make_sae(width=512), "has 512 features"),
        (make_sae(neuronpedia="gemma-2-2b/20-gemmascope-res-65k"), "is gemma-2-2b/20-gemmascope-res-65k"),
    ],
)
def test_labels_of_another_sae_are_refused_by_name(sae: SAE, reason: str, tmp_path: Path) -> None:
    labels = Labels.read(write(tmp_path / "labels.jsonl", "lines"))
    with pytest.raises(
        InputError, match=f"does not label the SAE an SAE: .*gemma-2-2b/{SOURCE}, but this SAE {reason}: give"
    ):
        labels.of(sae, "")


@pytest.mark.parametrize(
    ("name", "sae"),
    [
        ("20-gemmascope-res-16k", make_sae()),
        ("20-gemmascope-res-16k", make_sae(model="")),
        ("20-gemmascope-res-16k", make_sae(hook="model.layers.20")),
        ("20-gemmascope-res-16k", make_sae(neuronpedia="gemma-2-2b/20-gemmascope-res-16k")),
        ("20-res-jb", make_sae(hook="blocks.20.hook_resid_pre")),
        ("20-gemmascope-mlp-16k", make_sae(hook="blocks.20.hook_mlp_out")),
        ("20-att_16k-oai", make_sae(hook="blocks.20.hook_attn_out")),
        ("20-gemmascope-att-16k", make_sae(hook="blocks.20.attn.hook_z")),
        ("20-res_mid_16k-oai", make_sae(hook="blocks.20.hook_resid_mid")),
        ("20-gemmascope-transcoder-16k", make_sae(hook="blocks.20.ln2.hook_normalized", target="x")),
        ("12-sae_bench-topk-res-16k__trainer_0_step_final", make_sae(hook="blocks.12.hook_resid_post")),
        ("mine", make_sae(hook="model.layers.3.self_attn.o_proj.input")),
    ],
)
def test_labels_of_the_sae_itself(name: str, sae: SAE) -> None:
    assert Source(MODEL, name).mismatch(sae, "./runs/checkpoint-400") is None


def test_the_model_that_is_read_decides_where_the_sae_names_none() -> None:
    assert Source(MODEL, SOURCE).mismatch(make_sae(model=""), "google/gemma-2-2b-it") is None
    assert Source(MODEL, SOURCE).mismatch(make_sae(model=""), "google/gemma-2-9b") == "is of google/gemma-2-9b"


def test_the_sae_of_several_in_a_file(tmp_path: Path) -> None:
    rows = [*ROWS, row(7, "of layer 2", layer="2-gemmascope-res-16k")]
    (tmp_path / "a.jsonl").write_text(lines(rows[::-1]))
    labels = Labels.read(tmp_path / "a.jsonl")
    assert labels.of(make_sae(hook="blocks.2.hook_resid_post"), "") == {7: "of layer 2"}
    assert labels.of(make_sae(), "") == {7: "a second", 511: "the last"}
    with pytest.raises(InputError, match=r"it labels .*, but this SAE reads at .*; .*, but this SAE reads at"):
        labels.of(make_sae(hook="blocks.3.hook_resid_post"), "")
    (tmp_path / "a.jsonl").write_text(lines([*ROWS, row(7, "of a transcoder", layer="20-matryoshka-res-16k")]))
    with pytest.raises(InputError, match=r"labels several SAEs that may be an SAE .*: keep the labels of one"):
        Labels.read(tmp_path / "a.jsonl").of(make_sae(), "")


def test_labels_that_name_no_sae(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"index": 7, "description": "mine"}]))
    assert Labels.read(tmp_path / "a.json").of(make_sae(), "") == {7: "mine"}
    with pytest.raises(
        InputError, match="an SAE without a name, but this SAE has 5 features, and feature 7 is labelled"
    ):
        Labels.read(tmp_path / "a.json").of(make_sae(width=5), "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no row with 'index' and 'description'"),
        ("[", "is not a readable export of feature labels"),
        ('{"index": 3}', "has no row with"),
        ("7", "has no row with"),
        ("[" * 100_000, "is not a readable export"),
    ],
)
def test_what_is_no_export(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Labels.read(tmp_path / "a.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"contains no labels: give a file or folder of \.jsonl"):
        Labels.read(tmp_path / "empty")
    with pytest.raises(InputError, match="No such file"):
        Labels.read(tmp_path / "nowhere")


@needs_cases
def test_the_cases() -> None:
    sae = make_sae()
    assert Labels.read(CASES / "batches").of(sae, "") == {i: f"label {i}" for i in range(512)}
    assert Labels.read(CASES / "api.json").of(sae, "") == {i: f"label {i}" for i in range(5)}
    two = Labels.read(CASES / "two_layers.jsonl")
    assert two.of(sae, "")[3] == "layer 20 label 3"
    stories = make_sae(model="stories260K", hook="model.layers.2", width=512)
    for labels in (Labels.read(CASES / "other_model.jsonl"), two):
        with pytest.raises(InputError, match=r"does not label the SAE an SAE: .*, but this SAE is of stories260K"):
            labels.of(stories, "")


def test_labels_reach_the_forecast_of_their_sae(tiny: Tiny, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": tiny.model, "train": tiny.train, "domains": {}, "shots": 1, "top_n": 24}
    sae = tiny.saes["standard"]
    (tmp_path / "mine.json").write_text(json.dumps([{"index": i, "description": f"label {i}"} for i in range(40)]))
    forecast = score(sae=sae, labels=tmp_path / "mine.json", **options)
    said = {feature.index: feature.label for feature in forecast.shifted_features}
    assert said == {index: f"label {index}" if index < 40 else None for index in said}
    with pytest.raises(InputError, match="does not label the SAE"):
        score(sae=sae, labels=write(tmp_path / "other.jsonl", "lines"), **options)
