"""sum_by_prompt, on the CPU and on a GPU, against sums over dense features in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import sts_fast
from sts_fast.ops import _cpu, backend, cuda, cuda_kernels
from sts_fast.ops.sum_by_prompt import sum_by_prompt
from sts_fast.sae.features import SparseFeatures

Sparse = tuple[Any, Any, Any]

NAMES = (
    "indptr", "indices", "n_fired", "sum_h", "sum_sq_h", "sum_shift", "sum_sq_shift", "strongest", "strongest_at",
)  # fmt: skip
DTYPES = ("i8", "i4", "i4", "f8", "f8", "f8", "f8", "f4", "i4")


def features(rng: np.random.Generator, n: int, n_columns: int, *, signed: bool = False) -> NDArray[np.float32]:
    """[n, n_columns] mostly zero, some values equal, of so many sizes that the order of a sum changes it."""
    values = rng.integers(-3 if signed else 1, 4, size=(n, n_columns)) * (rng.random((n, n_columns)) < 0.2)
    return (values * 0.1 * 10.0 ** rng.integers(-8, 9, size=(n, n_columns))).astype(np.float32)


def starts(sizes: list[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *sizes], dtype=np.int64)


@dataclass
class Tokens:
    """Dense features of prompts' tokens; base[t, c] is that of feature columns[c], and pairs name rows of a prompt."""

    base: NDArray[np.float32]
    other: NDArray[np.float32]
    sizes: list[int]
    pairs: list[list[int]]
    columns: NDArray[np.int64]
    d_sae: int

    @classmethod
    def random(
        cls, seed: int, sizes: list[int], pairs: list[list[int]], *, d_sae: int = 40, columns: Any = None, **kind: Any
    ) -> Tokens:
        rng = np.random.default_rng(seed)
        columns = np.arange(d_sae) if columns is None else np.asarray(columns)
        base, other = (features(rng, n, len(columns), **kind) for n in (sum(sizes), sum(map(len, pairs))))
        return cls(base, other, sizes, pairs, columns, d_sae)

    @property
    def arguments(self) -> dict[str, Any]:
        first = starts(self.sizes)
        pair_at = [start + np.asarray(pairs, np.int64) for start, pairs in zip(first[:-1], self.pairs, strict=True)]
        return {
            "base": self.sparse(self.base), "base_starts": first, "other": self.sparse(self.other),
            "other_starts": starts([len(pairs) for pairs in self.pairs]),
            "pair_at": np.concatenate([np.zeros(0, np.int64), *pair_at]), "d_sae": self.d_sae,
        }  # fmt: skip

    def sparse(self, dense: NDArray[np.float32]) -> Sparse:
        rows, columns = np.nonzero(dense)
        indptr = starts(np.bincount(rows, minlength=len(dense)).tolist())
        return indptr, self.columns[columns].astype(np.int32), dense[rows, columns]

    def wanted(self) -> dict[str, Any]:
        """By the equations, token after token: nothing is rounded otherwise in the ops."""
        found: dict[str, list[Any]] = {name: [] for name in NAMES[1:]}
        counts, base_at, other_at = [], 0, 0
        for size, pairs in zip(self.sizes, self.pairs, strict=True):
            base = self.base[base_at : base_at + size].astype(np.float64)
            shift = self.other[other_at : other_at + len(pairs)].astype(np.float64) - base[pairs]
            here = (base != 0).any(0) | (self.other[other_at : other_at + len(pairs)] != 0).any(0)
            base_at, other_at = base_at + size, other_at + len(pairs)
            counts.append(int(here.sum()))
            for c in np.flatnonzero(here):
                fires = np.flatnonzero(base[:, c])
                at = int(fires[np.argmax(base[fires, c])]) if len(fires) else -1
                found["indices"].append(self.columns[c])
                found["n_fired"].append(len(fires))
                found["strongest_at"].append(at)
                found["strongest"].append(base[at, c] if len(fires) else 0)
                for name, values in (("h", base[:, c]), ("shift", shift[:, c])):
                    found[f"sum_{name}"].append(np.cumsum([0, *values])[-1])
                    found[f"sum_sq_{name}"].append(np.cumsum([0, *values**2])[-1])
        return {"indptr": starts(counts), **found}

    def check(self, found: tuple[NDArray[Any], ...]) -> None:
        wanted = self.wanted()
        for name, dtype, values in zip(NAMES, DTYPES, found, strict=True):
            assert values.dtype == dtype, name
            np.testing.assert_array_equal(values, wanted[name], err_msg=name)


@pytest.fixture
def on_gpu(gpu: Any) -> Callable[..., tuple[NDArray[Any], ...]]:
    """The CUDA op, between numpy arrays."""

    def run(**given: Any) -> tuple[NDArray[Any], ...]:
        rows = {name: tuple(torch.from_numpy(part).to(gpu) for part in given[name]) for name in ("base", "other")}
        return tuple(values.cpu().numpy() for values in cuda.sum_by_prompt(**{**given, **rows}))

    return run


TOKENS = {
    "several prompts": Tokens.random(0, [5, 0, 9, 1], [[0, 3, 4], [], [8, 1, 1], []]),
    "below zero": Tokens.random(1, [5, 0, 9, 1], [[0, 3, 4], [], [8, 1, 1], []], signed=True),
    "no pairs": Tokens.random(2, [7, 3], [[], []]),
    "no prompts": Tokens.random(3, [], []),
    "no tokens": Tokens.random(4, [0, 0], [[], []]),
    "one token a prompt": Tokens.random(5, [1, 1, 1, 1], [[0], [], [0, 0], [0]]),
    "many tokens": Tokens.random(6, [70, 3], [[*range(69, -1, -1)], [2]], d_sae=9),
    "wide": Tokens.random(
        7, [6, 0, 4], [[5, 0, 2], [], [3]], d_sae=2**20, columns=[0, 31, 32, 65535, 65536, 65537, 2**20 - 1]
    ),
}
for one_sided in ("base", "other"):  # features of one of the two readings alone, and of none
    TOKENS[f"none in {one_sided}"] = Tokens.random(8, [4, 2, 3], [[3, 0], [], [1]])
    getattr(TOKENS[f"none in {one_sided}"], one_sided)[:] = 0
    TOKENS[f"never at first in {one_sided}"] = Tokens.random(9, [4, 2, 3], [[3, 0], [1], [1]])
    getattr(TOKENS[f"never at first in {one_sided}"], one_sided)[:2] = 0


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("threads", [1, 3])
def test_sums_are_those_of_dense_features(tokens: str, threads: int) -> None:
    before = sts_fast.get_num_threads()
    sts_fast.set_num_threads(threads)
    try:
        TOKENS[tokens].check(_cpu.sum_by_prompt(**TOKENS[tokens].arguments))
    finally:
        sts_fast.set_num_threads(before)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_sums_on_a_gpu_are_the_cpus(
    on_gpu: Any, gpu: Any, tokens: str, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if narrow:
        monkeypatch.setattr(cuda, "PROMPT_WINDOW", max(32, TOKENS[tokens].d_sae // 64))
    arguments = TOKENS[tokens].arguments
    found = on_gpu(**arguments)
    TOKENS[tokens].check(found)
    assert [part.tobytes() for part in found] == [part.tobytes() for part in _cpu.sum_by_prompt(**arguments)]
    if gpu.type == "cpu":
        cuda_kernels.load().set_order(2)  # threads take turns in another order
        assert [part.tobytes() for part in on_gpu(**arguments)] == [part.tobytes() for part in found]
        cuda_kernels.load().set_order()


def test_the_order_of_tokens_is_part_of_the_sums() -> None:
    tokens = TOKENS["many tokens"]
    turned = replace(tokens, base=np.concatenate([tokens.base[69::-1], tokens.base[70:]]))
    assert turned.wanted()["indices"] == tokens.wanted()["indices"]
    assert turned.wanted()["sum_h"] != tokens.wanted()["sum_h"]


@pytest.mark.parametrize("kernels_serve", [True, False])
def test_features_on_a_device_are_summed_by_our_kernels_or_on_the_cpu(
    rows_on: Any, kernels_serve: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels_serve:
        monkeypatch.setattr(backend, "kernels_serve", lambda values: False)
        monkeypatch.setattr(cuda, "sum_by_prompt", None)
    tokens = TOKENS["several prompts"]
    given = tokens.arguments
    base_starts, other_starts, pair_at = (given[name] for name in ("base_starts", "other_starts", "pair_at"))
    on_cpu = [SparseFeatures(*given[name], tokens.d_sae) for name in ("base", "other")]
    on_device = [SparseFeatures(*map(rows_on, of.parts), tokens.d_sae) for of in on_cpu]
    for base, other in (on_cpu, on_device):
        tokens.check(sum_by_prompt(base, base_starts, other, other_starts, pair_at))


def test_kernels_run_on_the_callers_stream(gpu: Any) -> None:
    if gpu.type != "cuda":
        pytest.skip("the emulated GPU has one stream")
    tokens, stream = TOKENS["several prompts"], torch.cuda.Stream(gpu)
    given = tokens.arguments
    with torch.cuda.stream(stream):
        rows = {name: [torch.from_numpy(part).to(gpu) for part in given[name]] for name in ("base", "other")}
        late = {name: tuple(torch.zeros_like(part) for part in parts) for name, parts in rows.items()}
        torch.cuda._sleep(10**8)
        for name, parts in late.items():
            for to, part in zip(parts, rows[name], strict=True):
                to.copy_(part)
        found = cuda.sum_by_prompt(**{**given, **late})
        tokens.check(tuple(part.cpu().numpy() for part in found))


def test_rows_of_prompts_do_not_depend_on_each_other() -> None:
    tokens = Tokens.random(1, [5, 7], [[0, 4], [2, 6]])
    both = _cpu.sum_by_prompt(**tokens.arguments)
    alone = [
        Tokens(tokens.base[rows], tokens.other[pairs], [size], [of], tokens.columns, tokens.d_sae)
        for rows, pairs, size, of in (
            (slice(5), slice(2), 5, tokens.pairs[0]), (slice(5, 12), slice(2, 4), 7, tokens.pairs[1])
        )
    ]  # fmt: skip
    one, two = (_cpu.sum_by_prompt(**of.arguments) for of in alone)
    assert both[0].tolist() == [*one[0].tolist(), *(two[0][1:] + one[0][-1]).tolist()]
    for whole, first, second in zip(both[1:], one[1:], two[1:], strict=True):
        assert np.array_equal(whole, np.concatenate([first, second]))


def faulty(indptr: list[int], indices: list[int], n_values: int) -> Sparse:
    return np.asarray(indptr, np.int64), np.asarray(indices, np.int32), np.ones(n_values, np.float32)


BAD = [
    ({"base_starts": starts([3])}, "base_starts must ascend from 0 to the number of rows, 4"),
    ({"base_starts": np.asarray([0, 5, 4])}, "base_starts must ascend"),
    ({"base_starts": np.zeros(0, np.int64)}, "base_starts must have an entry for each prompt and one more"),
    ({"base_starts": np.asarray([0, 4], np.int32)}, "base_starts must be a numpy array of int64"),
    ({"other_starts": starts([1, 1])}, "other_starts must have 2 entries, got 3"),
    ({"pair_at": np.asarray([0])}, "pair_at must have 2 entries, got 1"),
    ({"pair_at": np.asarray([0, 4])}, "pair_at must name a row of the same prompt, which pair 1 does not"),
    ({"d_sae": 2}, "base_indices must ascend within a row and lie below d_sae, 2"),
    ({"base": faulty([0, 0, 2, 2, 2], [3, 3], 2)}, "base_indices must ascend .*, which row 1 does not"),
    ({"other": faulty([0, 0, 2], [-1, 3], 2)}, "other_indices must ascend .*, which row 1 does not"),
    ({"base": faulty([0, 2, 1, 2, 2], [3, 4], 2)}, "base_indptr must ascend from 0"),
    ({"base": faulty([1, 1, 1, 2, 2], [3, 4], 2)}, "base_indptr must ascend from 0"),
    (
        {
            "base": faulty([0, 2**40, 2, 2, 2], [3, 4], 2),  # far beyond the memory of the indices
            "base_starts": starts([1, 3]),
            "other_starts": starts([1, 1]),
            "pair_at": np.asarray([0, 1]),
        },
        "base_indptr must ascend from 0",
    ),
    ({"other": faulty([0, 1, 1], [3, 4], 2)}, "other_indptr must ascend from 0"),
    ({"base": faulty([0, 2, 2, 2, 2], [3, 4], 1)}, "base_values must have 2 entries, got 1"),
    ({"base": faulty([0, 2, 2, 2, 2], [3, 4], 2)[:2]}, "base must be"),
    ({"base": faulty([], [], 0)}, "base_indptr must have an entry for each"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = Tokens.random(2, [4], [[0, 1]]).arguments
    _cpu.sum_by_prompt(**arguments)
    with pytest.raises(ValueError, match=f"^{message}"):
        _cpu.sum_by_prompt(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *BAD,
        ({"d_sae": 0}, "d_sae must lie between 1 and"),
        ({"pair_at": np.zeros((2, 1), np.int64)}, "pair_at must have 1 dimension, got 2"),
        ({"pair_at": [0, 1]}, "pair_at must be a numpy array of int64, got list"),
        (
            {"other": tuple(np.zeros(n) for n in (3, 0, 0))},
            r"other_indptr must be a tensor of torch\.int64 on .*float64",
        ),
    ],
)
def test_bad_arguments_on_a_gpu_are_named(on_gpu: Any, change: dict[str, Any], message: str) -> None:
    arguments = Tokens.random(2, [4], [[0, 1]]).arguments
    with pytest.raises(ValueError, match=f"^{message}"):
        on_gpu(**{**arguments, **change})


def test_more_rows_than_a_token_can_count(gpu: Any) -> None:
    given = Tokens.random(2, [4], [[0, 1]]).arguments
    rows = {name: tuple(torch.from_numpy(part).to(gpu) for part in given[name]) for name in ("base", "other")}
    many = torch.zeros(1, dtype=torch.int64, device=gpu).expand(2**31 + 1)
    with pytest.raises(ValueError, match=r"^other must have fewer than 2\^31 rows in one call, got 2147483648: pass"):
        cuda.sum_by_prompt(**{**given, "base": rows["base"], "other": (many, *rows["other"][1:])})
