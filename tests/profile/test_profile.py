"""Profiles of real sets of the tiny model: read in any batches, put side by side, written to files and read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import Tiny

from sts_fast import files
from sts_fast.data.sets import Sampling, Sets, Source
from sts_fast.errors import InputError
from sts_fast.forecast.options import Settings
from sts_fast.model.session import Session
from sts_fast.ops import _cpu
from sts_fast.ops.encode import encode
from sts_fast.profile import read as read_module
from sts_fast.profile import rows as rows_module
from sts_fast.profile.profile import INDEX_FILE, RESIDUALS_FILE, ROWS_FILE, Profile
from sts_fast.profile.read import read_profiles
from sts_fast.profile.residuals import SUMS
from sts_fast.profile.rows import ENTRIES, QUANTITIES, PromptRows, rounded

SAMPLING = Settings(shots=1, domain_shots=2, limit=12, demo_draws=2)


def session_of(tiny: Tiny, *architectures: str, batch_tokens: int | None = None) -> Session:
    return Session.open(
        tiny.model, [tiny.saes[name] for name in architectures], replace(SAMPLING, batch_tokens=batch_tokens)
    )


def profiles_of(session: Session, source: Source, sampling: Sampling = SAMPLING) -> list[Profile]:
    sets = Sets.read({"train": source}, [], None, SAMPLING)
    prompt_set = session.prompts("train", "train", sets.trains["train"], None, sampling, show=True)
    return read_profiles(session.reader, session.saes, "train", prompt_set, sampling)


@pytest.fixture(scope="module")
def profile(tiny: Tiny) -> Profile:
    [found] = profiles_of(session_of(tiny, "topk"), tiny.train)
    return found


def assert_same(one: PromptRows, other: PromptRows) -> None:
    for name in ("indptr", *ENTRIES):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_rows_are_the_sums_of_each_prompts_tokens(tiny: Tiny, profile: Profile) -> None:
    session = session_of(tiny, "topk")
    [sae] = session.saes
    dense = np.zeros((4, len(profile.rows), sae.d_sae))
    for [rows] in session.reader.rows("train", profile.prompt_set):
        for tokens, of, quantity in ((rows.base, rows.base_of, 0), (rows.paired, rows.paired_of, 1)):
            active = encode(sae, tokens)
            h = np.zeros((len(tokens), sae.d_sae))
            h[np.repeat(np.arange(len(tokens)), np.diff(active.indptr)), active.indices] = active.values
            if quantity == 0:
                np.add.at(dense[0], of, h)
                np.add.at(dense[1], of, h**2)
                continue
            shown = encode(sae, rows.demos)
            g = np.zeros_like(h)
            g[np.repeat(np.arange(len(tokens)), np.diff(shown.indptr)), shown.indices] = shown.values
            np.add.at(dense[2], of, g - h)
            np.add.at(dense[3], of, (g - h) ** 2)
    for quantity, expected in zip(("sum_h", "sum_sq_h", "sum_shift", "sum_sq_shift"), dense, strict=True):
        np.testing.assert_allclose(profile.rows.matrix(quantity).toarray(), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(profile.rows.totals(quantity), expected.sum(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(profile.mean_activation(), dense[0].sum(axis=0) / profile.n_tokens, rtol=1e-12)
    np.testing.assert_allclose(profile.mean_squared_shift(), dense[3].sum(axis=0) / profile.n_pairs, rtol=1e-12)


def test_rows_on_a_gpu_give_the_sums_of_their_features(tiny: Tiny, profile: Profile, rows_on: Any) -> None:
    session = session_of(tiny, "topk")
    [sae] = session.saes
    [rows] = next(iter(session.reader.rows("train", profile.prompt_set)))
    rows = replace(rows, base=rows_on(rows.base), demos=rows_on(rows.demos))
    base, demos = (encode(sae, acts).on_cpu().parts for acts in (rows.base, rows.demos))
    of_base, of_demos = (np.cumsum([0, *map(np.sum, kept)]) for kept in (rows.kept, rows.kept_paired))
    sums = _cpu.sum_by_prompt(base, of_base, demos, of_demos, rows.pair_at, d_sae=sae.d_sae)
    assert len(sums[1])
    exact = PromptRows(sae.d_sae, *sums)
    squares = {name: rounded(getattr(exact, name)) for name in ("sum_sq_h", "sum_sq_shift")}
    assert_same(PromptRows.of(sae, rows), replace(exact, **squares))


def test_sums_of_squares_have_40_bits_behind_the_first() -> None:
    exact = np.random.default_rng(0).exponential(size=1000) ** 8
    kept = rounded(exact)
    mantissas = np.frexp(kept)[0] * 2**41
    assert (mantissas == np.rint(mantissas)).all()
    assert np.abs(kept / exact - 1).max() <= 2.0**-41
    assert rounded(np.array([0.0, 3.0, 2 - 2**-52, np.inf])).tolist() == [0, 3, 2, np.inf]


def test_several_saes_share_a_reading(tiny: Tiny, profile: Profile) -> None:
    together = profiles_of(session_of(tiny, "jumprelu", "topk"), tiny.train)
    assert [found.identity.sae["architecture"] for found in together] == ["jumprelu", "topk"]
    assert_same(together[1].rows, profile.rows)
    assert together[1].identity == profile.identity
    assert together[0].identity.key != profile.identity.key


def test_profiles_of_parts_side_by_side_are_that_of_the_whole(profile: Profile) -> None:
    n = len(profile.rows)
    parts = [profile.rows.take(np.arange(5)), profile.rows.take(np.arange(5, n))]
    assert_same(PromptRows.joined(parts), profile.rows)
    mixed = np.random.default_rng(0).permutation(n)
    assert_same(profile.rows.take(mixed).take(np.argsort(mixed)), profile.rows)


def test_rows_that_are_too_many_for_memory_lie_in_files(
    tiny: Tiny, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MOST_BYTES", 64)
    monkeypatch.setattr(rows_module, "BLOCK_PROMPTS", 3)
    monkeypatch.setattr(read_module, "JOINED_ENTRIES", 100)
    [found] = profiles_of(session_of(tiny, "topk"), tiny.train)
    assert all(isinstance(getattr(found.rows, name), np.memmap) for name in ENTRIES)
    assert_same(found.rows, profile.rows)
    monkeypatch.setattr(rows_module, "BLOCK_ENTRIES", 50)
    for quantity in QUANTITIES:
        np.testing.assert_allclose(found.rows.totals(quantity), profile.rows.totals(quantity), rtol=1e-12)
        assert np.array_equal(found.rows.matrix(quantity).toarray(), profile.rows.matrix(quantity).toarray())


def test_files_hold_the_profile(profile: Profile, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "law"
    profile.save(folder)
    assert {path.name for path in folder.iterdir()} == {INDEX_FILE, ROWS_FILE, RESIDUALS_FILE}
    again = Profile.load(folder)
    assert again.identity == profile.identity
    assert_same(again.rows, profile.rows)
    for name in SUMS:
        assert np.array_equal(getattr(again.residuals, name).value, getattr(profile.residuals, name).value)
    assert (again.n_tokens, again.n_pairs) == (profile.n_tokens, profile.n_pairs)
    assert again.log.counts() == profile.log.counts()
    assert again.prompt_set.draw_of.tolist() == profile.prompt_set.draw_of.tolist()
    assert again.prompt_set.questions == profile.prompt_set.questions
    assert (again.prompt_set.shown, again.prompt_set.warnings) == (
        profile.prompt_set.shown,
        profile.prompt_set.warnings,
    )
    assert again.log.table("shift", {}).equals(profile.log.table("shift", {}))
    # Saved again, the same bytes.
    again.save(tmp_path / "again")
    for name in (INDEX_FILE, ROWS_FILE, RESIDUALS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_other_tools_read_a_prompt_a_row(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "law")
    rows = pq.read_table(tmp_path / "law" / ROWS_FILE).to_pylist()
    assert [row["id"] for row in rows] == [prompt.id for prompt in profile.prompt_set.prompts]
    for i, row in enumerate(rows):
        entries = slice(profile.rows.indptr[i], profile.rows.indptr[i + 1])
        assert row["features"] == profile.rows.indices[entries].tolist()
        assert row["sum_sq_shift"] == profile.rows.sum_sq_shift[entries].tolist()
        assert row["n_tokens"] == len(row["positions"])


def test_key_says_what_decides_the_numbers(tiny: Tiny, profile: Profile) -> None:
    session = session_of(tiny, "topk")
    keys = {
        profiles_of(session, source, replace(SAMPLING, **changed))[0].identity.key
        for source, changed in (
            (tiny.train, {}), (tiny.train, {"shots": 2}), (tiny.train, {"tokens": "last"}), (tiny.train, {"limit": 10}),
            (tiny.train, {"seed": 1}), (next(iter(tiny.domains.values())), {}),
        )
    }  # fmt: skip
    assert len(keys) == 6
    assert profile.identity.key in keys
    identity = profile.identity
    assert replace(identity, set="other", model={**identity.model, "name": "elsewhere"}).key == identity.key
    assert replace(identity, model={**identity.model, "weights_sha256": "0"}).key != identity.key
    assert replace(identity, tuned=identity.model).key != identity.key


@pytest.mark.parametrize(
    ("column", "spoil", "message"),
    [
        ("features", lambda row: row[::-1], "features do not ascend"),
        ("features", lambda row: [*row[:-1], 256], "features do not ascend within a prompt, below 256"),
        ("sum_h", lambda row: row[:-1], "the lists of a prompt differ in length"),
        ("sum_h", lambda row: [None, *row[1:]], "sum_h has a null"),
        ("sum_sq_h", lambda row: [float("inf"), *row[1:]], "a sum is not finite"),
        ("strongest_at", lambda row: [10_000, *row[1:]], "strongest_at lies beyond"),
        ("paired", lambda row: row[:-1], "counts of residuals.safetensors are not those of the rows"),
    ],
)
def test_rows_that_another_tool_wrote_wrong_are_named(
    profile: Profile, tmp_path: Path, column: str, spoil: Any, message: str
) -> None:
    folder = tmp_path / "law"
    profile.save(folder)
    table = pq.read_table(folder / ROWS_FILE)
    lists = table.column(column).to_pylist()
    lists[1] = spoil(lists[1])
    at, kind = table.column_names.index(column), pa.list_(table.schema.field(column).type.value_type)
    pq.write_table(table.set_column(at, column, pa.array(lists, kind)), folder / ROWS_FILE)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["files"][ROWS_FILE] = files.sha256(folder / ROWS_FILE)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        Profile.load(folder)


def test_a_disk_without_room_is_told(tiny: Tiny, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows_module, "MOST_BYTES", 64)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match=r"no room for .*No space left on device"):
        profile.rows.take(np.arange(3))


@pytest.mark.parametrize("name", [ROWS_FILE, RESIDUALS_FILE])
@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "other"])
def test_damaged_files_are_named(profile: Profile, tmp_path: Path, name: str, damage: str) -> None:
    profile.save(tmp_path / "law")
    path = tmp_path / "law" / name
    content = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "short":
            path.write_bytes(content[:-10])
        case "flipped":
            path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
        case "other":
            path.write_bytes(b"")
    with pytest.raises(InputError, match=f"{name} is missing or damaged: make the profile again"):
        Profile.load(tmp_path / "law")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, "is of no profile"),
        ({"version": 99}, "is of version 99"),
        ({"sae": None}, "is damaged"),
        ({"files": 3}, "is damaged"),
        ({"shown": None}, "is no whole profile"),
        ({"sae": {"d_sae": "many", "d_in": 3, "source": "s", "fingerprint": "f"}}, r"is damaged \(sae\.architecture"),
        ({"sae": {"d_sae": 256}}, r"is damaged \(sae\.source"),
        ({"model": 3}, r"is damaged \(model\)"),
        ({"files": {}}, "is missing or damaged"),
        ({"prompts_sha256": "0"}, "its key is not that of what it was made of"),
    ],
)
def test_damaged_indices_are_named(profile: Profile, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    profile.save(tmp_path / "law")
    path = tmp_path / "law" / INDEX_FILE
    index = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in index.items() if value is not None or key == "tuned"}))
    with pytest.raises(InputError, match=message):
        Profile.load(tmp_path / "law")
    path.unlink()
    with pytest.raises(InputError, match=f"has no {INDEX_FILE}"):
        Profile.load(tmp_path / "law")
