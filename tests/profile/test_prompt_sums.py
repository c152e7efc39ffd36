"""Columns of a profile that are read alone: those of the whole, and damage that is noticed without reading the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import Tiny

import sts_fast
from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.profile.profile import INDEX_FILE, ROWS_FILE
from sts_fast.profile.prompt_sums import PromptSums, questions_of


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> sts_fast.Profile:
    [found] = sts_fast.profile(
        model=tiny.model, sae=tiny.saes["topk"], library=tmp_path_factory.mktemp("sums"), trains={"sums": tiny.train},
        shots=1, limit=12, demo_draws=3,
    )  # fmt: skip
    return found


@pytest.fixture
def folder(made: sts_fast.Profile, tmp_path: Path) -> Path:
    made.save(tmp_path / "law")
    return tmp_path / "law"


def test_columns_are_those_of_the_profile(made: sts_fast.Profile, folder: Path) -> None:
    found = PromptSums.of(folder, ["sum_h", "sum_sq_shift"])
    assert found.identity == made.identity
    assert set(found.sums.values) == {"sum_h", "sum_sq_shift"}
    assert found.n_read.tolist() == [int(kept.sum()) for kept in made.log.kept]
    assert found.n_pairs.tolist() == [int(kept.sum()) for kept in made.log.kept_paired]
    assert found.draw_of.tolist() == [prompt.draw for prompt in made.prompt_set.prompts]
    assert questions_of(folder) == [(prompt.id, prompt.question) for prompt in made.prompt_set.prompts]
    wanted = np.zeros(made.rows.d_sae, bool)
    wanted[made.rows.indices[::7]] = True
    for quantity in ("sum_h", "sum_sq_shift"):
        dense = np.zeros((12, made.rows.d_sae))
        dense[made.rows.prompt_of, made.rows.indices] = getattr(made.rows, quantity)
        for columns in (found, PromptSums.of(made, [quantity])):
            assert np.array_equal(columns.sums.matrix(quantity).toarray(), dense)
            assert np.array_equal(columns.sums.of_features(wanted).matrix(quantity).toarray(), dense * wanted)
            np.testing.assert_allclose(columns.sums.totals(quantity), dense.sum(axis=0), rtol=1e-12)


def assert_told(folder: Path) -> None:
    with pytest.raises(InputError, match=f"{ROWS_FILE} is missing or damaged: make the profile again"):
        PromptSums.of(folder, ["sum_h"])


def test_a_damaged_page_is_named(folder: Path) -> None:
    content = (folder / ROWS_FILE).read_bytes()
    with pq.ParquetFile(folder / ROWS_FILE) as file:
        group = file.metadata.row_group(0)
        chunks = {(at := group.column(i)).path_in_schema: at for i in range(group.num_columns)}
    for name in ("features", "sum_h"):
        chunk = chunks[f"{name}.list.element"]
        last = chunk.data_page_offset + chunk.total_compressed_size - 1
        (folder / ROWS_FILE).write_bytes(content[:last] + bytes([content[last] ^ 1]) + content[last + 1 :])
        assert_told(folder)


def test_rows_of_another_profile_are_named(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps({**index, "key": "0" * 64}))
    assert_told(folder)
    (folder / ROWS_FILE).unlink()
    assert_told(folder)


def test_rows_without_a_key_are_hashed(folder: Path) -> None:
    path = folder / ROWS_FILE
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    assert_told(folder)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["files"][ROWS_FILE] = files.sha256(path)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert PromptSums.of(folder, ["sum_h"]).sums.values.keys() == {"sum_h"}
    # A column that another tool left out.
    pq.write_table(pq.read_table(path).drop_columns(["sum_h"]), path)
    index["files"][ROWS_FILE] = files.sha256(path)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert_told(folder)
