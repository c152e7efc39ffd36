from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from html_tree import plain
from written_run import make_scores, page_of, write_full_run, write_scores

from sts_fast import InputError
from sts_fast.forecast.run import FEATURES_FILE
from sts_fast.report import build_report


def with_scores(change: Any) -> Any:
    def write(folder: Path) -> None:
        scores = make_scores()
        change(scores)
        write_scores(folder, scores)

    return write


def with_file(name: str, content: bytes) -> Any:
    def write(folder: Path) -> None:
        write_scores(folder, make_scores())
        (folder / name).write_bytes(content)

    return write


def with_features(rows: list[dict[str, Any]]) -> Any:
    def write(folder: Path) -> None:
        write_scores(folder, make_scores())
        pq.write_table(pa.Table.from_pylist(rows), folder / FEATURES_FILE)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: folder.rmdir(), "there is no folder"),
        (lambda folder: None, "has no scores.json"),
        (with_file("scores.json", b""), "not readable JSON"),
        (with_file("scores.json", b"\xff\xfe"), "not readable JSON"),
        (with_file("scores.json", b"[" * 200_000), "not readable JSON"),
        (with_file("scores.json", b"[1]"), "not a JSON object"),
        (with_file("scores.json", b"{}"), "without a schema version"),
        (with_scores(lambda s: s.update(schema_version="2.0")), "schema version 2.0"),
        (with_scores(lambda s: s.update(schema_version=["x"])), "without a schema version"),
        (with_scores(lambda s: s.update(domains={})), "not a scores.json"),
        (with_scores(lambda s: s.pop("train")), "'train' is a required property"),
        (with_scores(lambda s: s["domains"][0]["scores"]["act"].update(value="5")), "not a scores.json: $.domains[0]"),
        (with_scores(lambda s: s["domains"][0].update(controls=5)), "not a scores.json: $.domains[0].controls"),
        (
            with_scores(lambda s: s["domains"][0]["controls"].update(x={"act": []})),
            "not a scores.json: $.domains[0]",
        ),
        (with_scores(lambda s: s["domains"][0]["scores"]["act"].update(value=math.nan)), "NaN"),
        (with_scores(lambda s: s["domains"][0]["scores"]["act"].update(value=10**200)), "beyond 1e100"),
        (with_file("shift.safetensors", b"junk"), "shift.safetensors"),
        (with_file("features.parquet", b"junk"), "features.parquet is not a readable parquet file"),
        (with_features([{"token": "x"}]), "features.parquet has no numbers"),
        (with_features([{"feature": "x", "rank": 1, "value": 1.0}]), "features.parquet has no numbers"),
        (with_file("validation.json", b"{"), "validation.json is not readable JSON"),
        (with_file("validation.json", b'{"size": Infinity}'), "validation.json is not readable JSON"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, write: Any, message: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder)
    with pytest.raises(InputError) as caught:
        build_report(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (folder / "report.html").exists()


def test_files_of_another_run_are_named(tmp_path: Path) -> None:
    scores = write_full_run(tmp_path)
    scores["domains"][2]["scores"]["act"]["value"] += 0.01
    scores["shifted_features"].reverse()
    text = plain(page_of(tmp_path, scores).one("section", class_="warnings").text())
    assert "validation.json belongs to another run than scores.json" in text
    assert "ablation.json belongs to another run than scores.json" in text
    assert "shift.safetensors belongs to another run than scores.json" in text


def test_later_minor_versions_may_add_keys(tmp_path: Path) -> None:
    scores = make_scores()
    scores["schema_version"] = "1.9"
    scores["new"] = {"a": 1}
    scores["domains"][0]["new"] = [1]
    page_of(tmp_path, scores)
