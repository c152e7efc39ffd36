"""A written forecast held against what the oracle expects."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import oracle
import pyarrow.parquet as pq
import pytest

TOLERANCE = 2e-5  # of a number, relative to what the oracle allows
MOST_FLIPS = 3e-4  # of all features of all rows
CONTROLS = {"random", "low_shift", "most_active", "raw", "z_scored", "cosine_of_means", "cka", "probe"}
CONTROLS |= {"text_similarity", "text_compression", "text_length", "text_digits"}
ANSWER_CONTROLS = {"base_loss", "base_accuracy"}


def written(run: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    return scores


def values_by_domain(run: Path) -> dict[str, dict[str, list[float]]]:
    """Domain -> column -> value of each prompt."""
    table = pq.read_table(run / "prompts.parquet").to_pylist()
    values: dict[str, dict[str, list[float]]] = {}
    for row in (row for row in table if row["stage"] in ("score", "answer")):
        of_domain = values.setdefault(row["domain"], {})
        for column in (name for name in row if name.endswith(("_sum", "_exact")) and row[name] is not None):
            of_domain.setdefault(column, []).append(row[column])
    return values


def assert_as_expected(run: Path, expected: oracle.Expected, request: pytest.FixtureRequest) -> None:
    values = values_by_domain(run)
    assert {domain: set(columns) for domain, columns in values.items()} == {
        domain: set(columns) for domain, columns in expected.prompts.items()
    }
    found = [
        *oracle.deviations(expected.scores, written(run)),
        *(
            (f"{domain}.{column}[{i}]", deviation)
            for domain, columns in expected.prompts.items()
            for column, of_prompts in columns.items()
            for i, actual in enumerate(values[domain][column])
            for _, deviation in oracle.deviations(of_prompts[:, i], actual)
        ),
    ]
    by_control = {
        control: [deviation for path, deviation in found if re.search(rf"\.{control}[._]", path)]
        for control in sorted({*CONTROLS, *ANSWER_CONTROLS, "answer"})
    }
    request.node.user_properties += [
        *((f"largest_deviation_{control}", float(max(some))) for control, some in by_control.items() if some),
        ("n_numbers", len(found)),
        ("largest_deviation", float(max(deviation for _, deviation in found))),
        ("n_flips", expected.n_flips),
        ("n_ties", expected.n_ties),
    ]
    assert not [(path, deviation) for path, deviation in found if deviation > TOLERANCE]
    assert expected.n_flips <= MOST_FLIPS * expected.n_features_read
