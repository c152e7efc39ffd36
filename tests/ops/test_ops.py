"""The ops, by the core and in plain torch, against literal float64 equations over dense features.

What is not computed `at` a place is the core's alone: threads, instruction sets, memory that it borrows. Needs numpy
and pytest only; what needs torch or hypothesis skips without them.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.exact_sums import errors
from ops_problem import (
    ACTIVATIONS,
    INTEGER,
    NORMS,
    REAL,
    Place,
    Problem,
    assert_all_exact,
    assert_close,
    assert_exact,
    assert_same,
    some_columns,
)

from sts_fast.ops import _cpu


def available_instruction_sets() -> list[str]:
    default, found = _cpu.instruction_set(), []
    for name in ("avx512", "avx2", "portable"):
        try:
            _cpu.set_instruction_set(name)
        except ValueError:
            continue
        found.append(name)
    _cpu.set_instruction_set(default)
    return found


INSTRUCTION_SETS = available_instruction_sets()
EVERY = [*INSTRUCTION_SETS, "torch"]
N, D_IN, D_SAE = 6, 8, 12


@pytest.fixture(autouse=True)
def defaults_restored() -> Iterator[None]:
    threads, name = _cpu.get_num_threads(), _cpu.instruction_set()
    yield
    _cpu.set_num_threads(threads)
    _cpu.set_instruction_set(name)


@pytest.fixture(params=["core", "torch"])
def at(request: pytest.FixtureRequest) -> Place:
    """Where an op computes: the core, by an instruction set's name with it alone, or plain torch on the CPU."""
    if request.param == "torch":
        torch = pytest.importorskip("torch")
        from sts_fast.ops import torch_backend

        return Place(torch_backend, torch.device("cpu"))
    if request.param != "core":
        _cpu.set_instruction_set(request.param)
    return Place()


SHAPES = [
    (0, 7, 5),
    (1, 1, 1),
    (1, 129, 1000),
    (5, 64, 64),
    (5, 7, 1000),
    (37, 64, 5),
    (37, 129, 64),
    (37, 300, 1000),
    (1030, 1, 64),
    (1030, 7, 5),
    (1030, 64, 1000),
    (1030, 129, 1),
]
# The core's tiles of a few rows and features, with their rests, need the others; torch has groups of 256 rows.
OF_TORCH = [(0, 7, 5), (1, 1, 1), (5, 7, 1000), (37, 129, 64), (1030, 1, 64), (1030, 7, 5), (1030, 129, 1)]


def cases(places: list[str], of_core: list[Any], of_torch: list[Any]) -> list[Any]:
    """(place, value) of each."""
    values = {at: of_torch if at == "torch" else of_core for at in places}
    return [pytest.param(at, value, id=f"{at}-{value}") for at in places for value in values[at]]


@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
class TestAgainstFloat64:
    @pytest.mark.parametrize(("at", "shape"), cases(["core", "torch"], SHAPES, OF_TORCH), indirect=["at"])
    def test_real_values(self, at: Place, activation: str, shape: tuple[int, int, int], subset: bool) -> None:
        problem = Problem(activation, *shape, columns=some_columns(shape[2]) if subset else None, at=at)
        assert_close(problem, problem.shift(), problem.wanted_shift(), (problem.base, problem.other))
        assert_close(problem, problem.moments(), problem.wanted_moments(), (problem.base,))

    @pytest.mark.parametrize(("at", "shape"), cases(EVERY, SHAPES, OF_TORCH), indirect=["at"])
    def test_integers_exactly_and_ties(
        self, at: Place, activation: str, shape: tuple[int, int, int], subset: bool
    ) -> None:
        columns = some_columns(shape[2]) if subset else None
        assert_all_exact(Problem(activation, *shape, columns=columns, values=INTEGER, at=at))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sparse_rows_of_real_values_are_the_features_that_moments_sum(at: Place, activation: str) -> None:
    problem = Problem(activation, 1030, 64, 1000, at=at)
    indptr, indices, values = problem.sparse()
    sums = problem.moments()
    n_flips = np.abs(np.bincount(indices, minlength=1000) - sums["n_fired"]).sum()
    total = np.zeros(1000)
    np.add.at(total, indices, values.astype(np.float64))
    if at.is_core:
        assert n_flips == 0
        np.testing.assert_array_equal(total, sums["sum_h"])
    else:  # tiles of other sizes round their products in another way, and sums of 256 rows are float32
        assert n_flips <= 2
        np.testing.assert_allclose(total, sums["sum_h"], rtol=1e-5, atol=1e-2 if n_flips else 1e-4)
    assert (values < 0).any() if activation == "abstopk" else (values > 0).all()
    assert (values != 0).all()
    for t in range(problem.n):
        assert (np.diff(indices[indptr[t] : indptr[t + 1]]) > 0).all()


@pytest.mark.parametrize("activation", ["topk", "abstopk"])
@pytest.mark.parametrize("k", [1, 3, 64, 300, 399, 400])
def test_topk_of_any_k_with_ties(at: Place, activation: str, k: int) -> None:
    problem = Problem(activation, 64, 5, 400, values=INTEGER, at=at)
    problem.k = problem.parameters["k"] = k
    assert_all_exact(problem)


def test_topk_keeps_the_lower_columns_where_all_values_are_equal(at: Place) -> None:
    encoder = at.encoder(np.ones((2, 5000), np.float32), np.zeros(5000, np.float32), activation="topk", k=9)
    for threads in (1, 3) if at.is_core else (1,):
        _cpu.set_num_threads(threads)
        indptr, indices, values = at.sparse(encoder, np.ones((500, 2), np.float32))
        np.testing.assert_array_equal(indptr, 9 * np.arange(501))
        np.testing.assert_array_equal(indices, np.tile(np.arange(9), 500))
        assert (values == 2).all()


def test_abstopk_of_opposite_values_keeps_the_lower_column(at: Place) -> None:
    W_enc, bias = np.zeros((1, 7), np.float32), np.array([0, -3, 3, 2, -3, 3, 0], np.float32)
    encoder = at.encoder(W_enc, bias, activation="abstopk", k=3)
    _, indices, values = at.sparse(encoder, np.ones((1, 1), np.float32))
    assert (indices.tolist(), values.tolist()) == ([1, 2, 4], [-3, 3, -3])
    encoder = at.encoder(W_enc, bias, activation="abstopk", k=7)
    assert at.sparse(encoder, np.ones((1, 1), np.float32))[1].tolist() == [1, 2, 3, 4, 5]  # zeros are dropped


@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize("input_norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("at", "d_in"), cases(EVERY, [2, 129, 300], [2, 129]), indirect=["at"])
def test_rows_are_normalised(at: Place, activation: str, input_norm: str, d_in: int, subset: bool) -> None:
    columns = some_columns(200) if subset else None
    problem = Problem(activation, 37, d_in, 200, columns=columns, input_norm=input_norm, at=at)
    # Rows of very different size, and one far from 0: they must not lose their digits.
    problem.base *= np.logspace(-3, 3, 37, dtype=np.float32)[:, None]
    problem.other += np.float32(100)
    assert_close(problem, problem.shift(), problem.wanted_shift(), (problem.base, problem.other))
    assert_close(problem, problem.moments(), problem.wanted_moments(), (problem.base,))


@pytest.mark.parametrize("input_norm", NORMS)
def test_normalised_bfloat16_rows_are_those_of_their_values(at: Place, input_norm: str) -> None:
    torch = pytest.importorskip("torch")
    problem = Problem("relu", 37, 300, 100, input_norm=input_norm, at=at)
    base = torch.from_numpy(problem.base).bfloat16()
    problem.base = base.float().numpy()
    assert_same(problem.shift(base=base), problem.shift())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_of_zeros_stays_zero(at: Place, activation: str) -> None:
    """It has no direction that could be scaled to a norm: its features are those of the biases alone."""
    problem = Problem(activation, N, D_IN, D_SAE, input_norm="constant_norm_rescale", at=at)
    problem.other[4] = [0.0, -0.0] * (D_IN // 2)
    problem.base[2] = 0
    assert_close(problem, problem.shift(), problem.wanted_shift(), (problem.base, problem.other))
    assert_close(problem, problem.moments(), problem.wanted_moments(), (problem.base,))


def test_rows_that_are_not_finite_are_named_and_change_nothing(at: Place) -> None:
    problem = Problem("relu", N, D_IN, D_SAE, input_norm="constant_norm_rescale", at=at)
    sums = at.zeros(D_SAE)
    problem.other[2, 3] = np.nan
    base, other = at.rows(problem.base), at.rows(problem.other)
    with pytest.raises(ValueError, match=r"^other contains a NaN or infinity at row 2, column 3"):
        at.ops.accumulate_shift(problem.encoder(), base, other, sum_sq_shift=sums)
    assert not sums.any()
    with pytest.raises(ValueError, match=r"^acts contains a NaN or infinity at row 2, column 3"):
        at.sparse(problem.encoder(), other)


def test_constant_rows_have_no_standard_deviation_but_an_epsilon(at: Place) -> None:
    problem = Problem("relu", N, D_IN, D_SAE, input_norm="layer_norm", at=at)
    problem.base[:] = 3
    assert_close(problem, problem.moments(), problem.wanted_moments(), (problem.base,))


# Rows are packed in one way, whatever activation follows.
@pytest.mark.parametrize(
    ("activation", "input_norm"),
    [*((activation, "none") for activation in ACTIVATIONS), ("relu", NORMS[0]), ("topk", NORMS[1])],
)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_bit_identical_over_threads_and_chunks(activation: str, instruction_set: str, input_norm: str) -> None:
    _cpu.set_instruction_set(instruction_set)
    problem = Problem(activation, 5003, 300, 400, input_norm=input_norm)
    _cpu.set_num_threads(1)
    encoder = problem.encoder()
    shift, moments = problem.shift(encoder), problem.moments(encoder)
    sparse = _cpu.encode_sparse(encoder, problem.base)
    chunks = [[None], [slice(0, 1), slice(1, 2500), slice(2500, 5003)], [slice(s, s + 97) for s in range(0, 5003, 97)]]
    for threads in (1, 2, 3):
        _cpu.set_num_threads(threads)
        for parts in chunks:
            assert_same(problem.shift(encoder, parts), shift)
            assert_same(problem.moments(encoder, parts), moments)
        for got, wanted in zip(_cpu.encode_sparse(encoder, problem.base), sparse, strict=True):
            np.testing.assert_array_equal(got, wanted, strict=True)


def test_sums_of_many_rows_are_those_of_whole_numbers() -> None:
    for name, (core, single) in errors(200_000).items():
        assert core < 1e-12 < 1e-6 < single, name


def test_strides_of_more_than_two_billion_elements(tmp_path: Path) -> None:
    problem = Problem("gated", 2, 2, 70, values=INTEGER)
    far = 2**31 + 5
    # A sparse file: only the pages that are written take space.
    memory = np.memmap(tmp_path / "sparse", np.float32, "w+", shape=(far + 1000,))

    def spread(values: Any, at: int) -> Any:
        view = np.lib.stride_tricks.as_strided(memory[at:], values.shape, (4 * far, 4))
        view[:] = values
        return view

    base, W_enc = spread(problem.base, 0), spread(problem.W_enc, 100)
    assert_exact(problem.shift(problem.encoder(W_enc), base=base), problem.wanted_shift())
    transposed = np.ascontiguousarray(problem.W_enc[:, :2].T)
    columns = Problem("relu", 2, 2, 2, values=INTEGER)
    columns.W_enc = transposed.T
    strided = spread(transposed, 200).T
    assert_exact(columns.shift(columns.encoder(strided)), columns.wanted_shift())


def test_more_than_two_billion_features() -> None:
    n, d_sae = 33_000, 65_536
    W_enc = np.tile(np.array([0, 0, 0, 0, 0, 0, 0, 2], np.float32), d_sae // 8)[None]
    encoder = _cpu.Encoder(W_enc, np.zeros(d_sae, np.float32), activation="relu")
    acts = np.ones((n, 1), np.float32)
    sums, fired = [np.zeros(d_sae), np.zeros(d_sae)], np.zeros(d_sae, np.int64)
    _cpu.accumulate_moments(encoder, acts, sum_h=sums[0], sum_sq_h=sums[1], n_fired=fired)
    np.testing.assert_array_equal(sums[0], n * W_enc[0])
    np.testing.assert_array_equal(fired, n * (W_enc[0] > 0))
    W_enc[:, :-1] = 0
    indptr, indices, values = _cpu.encode_sparse(encoder, acts)
    np.testing.assert_array_equal(indptr, np.arange(n + 1))
    assert (indices == d_sae - 1).all()
    assert (values == 2).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_subset_is_bit_identical_to_the_same_columns_of_the_whole(activation: str) -> None:
    problem = Problem(activation, 200, 300, 1000)
    whole = problem.shift()
    problem.columns, problem.n_columns = np.array([0, 1, 2, 500, 501, 998, 999]), 7
    assert_same(problem.shift(), {name: value[problem.columns] for name, value in whole.items()})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_halves_add_up_to_the_whole(at: Place, activation: str) -> None:
    problem = Problem(activation, 1030, 64, 100, values=INTEGER, at=at)
    first, second = (problem.shift(parts=[part]) for part in (slice(0, 400), slice(400, None)))
    assert_same(problem.shift(), {name: first[name] + second[name] for name in first})


def test_without_the_optional_sums_the_rest_is_the_same(at: Place) -> None:
    problem = Problem("jumprelu", 100, 64, 100, at=at)
    alone = at.zeros(100)
    base, other = at.rows(problem.base), at.rows(problem.other)
    at.ops.accumulate_shift(problem.encoder(), base, other, sum_sq_shift=alone)
    np.testing.assert_array_equal(alone, problem.shift()["sum_sq_shift"])


def test_the_same_rows_twice_have_no_shift(at: Place) -> None:
    problem = Problem("relu", 100, 64, 100, at=at)
    problem.other = problem.base
    sums = problem.shift()
    assert not sums["sum_sq_shift"].any()
    assert not sums["weighted_sq_shift"].any()
    np.testing.assert_array_equal(sums["sum_base"], sums["sum_other"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_W_enc_in_either_orientation_and_rows_of_any_stride(at: Place, activation: str) -> None:
    # By the core real numbers are the same to the last bit; torch may round its products by their strides.
    values = REAL if at.is_core else INTEGER
    problem = Problem(activation, 200, 129, 1000, columns=np.r_[0:200, 203:999:5], values=values, at=at)
    wanted = problem.shift()
    transposed = np.ascontiguousarray(problem.W_enc.T).T
    wide = np.zeros((129, 1100), np.float32)
    wide[:, :1000] = problem.W_enc
    for W_enc in (transposed, wide[:, :1000]):
        assert_same(problem.shift(problem.encoder(W_enc)), wanted)
    strided = np.zeros((400, 140), np.float32)
    strided[::2, 3:132] = problem.base
    assert_same(problem.shift(base=strided[::2, 3:132]), wanted)
    if at.is_core:  # tensors have no negative strides
        assert_same(problem.shift(base=np.ascontiguousarray(problem.base[::-1])[::-1]), wanted)


def test_read_only_and_memory_mapped_weights(tmp_path: Path) -> None:
    problem = Problem("relu", 20, 64, 100)
    np.save(tmp_path / "W_enc.npy", problem.W_enc)
    mapped = np.load(tmp_path / "W_enc.npy", mmap_mode="r")
    problem.base.flags.writeable = False
    assert_same(problem.shift(problem.encoder(mapped)), problem.shift())


def test_the_encoder_keeps_its_weights_alive() -> None:
    problem = Problem("relu", 20, 64, 100)
    wanted = problem.shift()
    encoder = _cpu.Encoder(problem.W_enc.copy(), problem.bias, activation="relu", scale=problem.scale)
    assert_same(problem.shift(encoder), wanted)
    assert (encoder.d_in, encoder.d_sae, encoder.activation, encoder.k) == (64, 100, "relu", 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16(at: Place, activation: str) -> None:
    torch = pytest.importorskip("torch")
    problem = Problem(activation, 200, 129, 100, at=at)
    base, other, W_enc = (torch.from_numpy(x).bfloat16() for x in (problem.base, problem.other, problem.W_enc))
    problem.base, problem.other, problem.W_enc = (x.float().numpy() for x in (base, other, W_enc))
    wanted = problem.shift()
    assert_same(problem.shift(problem.encoder(W_enc), base=base, other=other), wanted)
    assert_same(problem.shift(problem.encoder(W_enc.T.contiguous().T), base=base, other=problem.other), wanted)
    problem.columns, problem.n_columns = some_columns(100), 34
    subset = problem.shift(problem.encoder(W_enc), base=base, other=other)
    assert_same(subset, problem.shift())
    if at.is_core:
        assert_same(subset, {name: value[problem.columns] for name, value in wanted.items()})


def test_torch_tensors_and_their_refusals() -> None:
    torch = pytest.importorskip("torch")
    problem = Problem("relu", 20, 64, 100)
    tensor = torch.from_numpy(problem.base)
    assert_same(problem.shift(problem.encoder(torch.from_numpy(problem.W_enc)), base=tensor), problem.shift())
    for wrong, message in (
        (tensor.clone().requires_grad_(), r"acts requires grad: pass its detach\(\)"),
        (tensor.double(), r"acts must be float32 or bfloat16, got torch\.float64"),
        (tensor.half(), r"acts must be float32 or bfloat16, got torch\.float16"),
        (tensor.to_sparse(), "acts cannot be read through DLPack"),
        (tensor.to("meta"), "acts cannot be read through DLPack"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            _cpu.encode_sparse(problem.encoder(), wrong)


def test_a_tensor_on_another_device_is_named() -> None:
    class OnCuda:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self) -> Any:
            raise AssertionError("not to be asked for")

    with pytest.raises(ValueError, match=r"^acts must be on the CPU"):
        _cpu.encode_sparse(Problem("relu", 1, 2, 3).encoder(), OnCuda())


def test_borrowed_tensors_are_given_back() -> None:
    torch = pytest.importorskip("torch")
    problem = Problem("relu", 20, 64, 100)
    encoder = problem.encoder()
    for dtype in (torch.float32, torch.int32):
        memory = np.zeros((20, 64), np.float32)
        before = sys.getrefcount(memory)
        tensor = torch.from_numpy(memory).view(dtype)
        if dtype == torch.float32:
            _cpu.encode_sparse(encoder, tensor)
        else:
            with pytest.raises(ValueError, match=r"^acts must be float32"):
                _cpu.encode_sparse(encoder, tensor)
        del tensor
        assert sys.getrefcount(memory) == before


def test_threads_and_instruction_sets_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^n must be at least 1 thread, got 0$"):
        _cpu.set_num_threads(0)
    with pytest.raises(ValueError, match=r"^name must be an instruction set that this machine has \(.*portable\)"):
        _cpu.set_instruction_set("mmx")
    _cpu.set_num_threads(5)
    assert _cpu.get_num_threads() == 5


def test_no_columns_and_columns_of_any_integer_type(at: Place) -> None:
    problem = Problem("topk", N, D_IN, D_SAE, at=at)
    indptr, indices, _ = at.sparse(problem.encoder(), problem.base, np.array([], np.int64))
    np.testing.assert_array_equal(indptr, np.zeros(N + 1, np.int64))
    assert not indices.size
    wanted = at.sparse(problem.encoder(), problem.base, np.array([1, 4, 9]))
    for columns in (np.array([1, 4, 9], np.uint8), np.array([1, 4, 9], np.int32), np.array([1, 0, 4, 0, 9])[::2]):
        for got, want in zip(at.sparse(problem.encoder(), problem.base, columns), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def test_ops_run_side_by_side_in_threads(at: Place) -> None:
    problem = Problem("topk", 500, 64, 1000, at=at)
    encoder, wanted, got = problem.encoder(), problem.shift(), []
    threads = [threading.Thread(target=lambda: got.append(problem.shift(encoder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    for sums in got:
        assert_same(sums, wanted)


MEMORY = """
import resource, sys
import numpy as np
from sts_fast.ops import _cpu
rng = np.random.default_rng(0)
W = rng.standard_normal((16, 128)).astype(np.float32)
acts = rng.standard_normal((10_000, 16)).astype(np.float32)
zero = np.zeros(128, np.float32)
encoders = [
    _cpu.Encoder(W, zero, activation="jumprelu", threshold=zero + 4),
    _cpu.Encoder(W, zero, activation="topk", k=8),
]
shift, sums, fired = np.zeros(128), [np.zeros(128), np.zeros(128)], np.zeros(128, np.int64)
for _ in range(int(sys.argv[1]) // 10_000):
    for encoder in encoders:
        _cpu.accumulate_shift(encoder, acts, acts[::-1], sum_sq_shift=shift)
        _cpu.accumulate_moments(encoder, acts, sum_h=sums[0], sum_sq_h=sums[1], n_fired=fired)
        _cpu.encode_sparse(encoder, acts)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_does_not_grow_with_the_rows() -> None:
    def peak(rows: int) -> int:
        run = subprocess.run(
            [sys.executable, "-c", MEMORY, str(rows)], capture_output=True, text=True, check=True, timeout=300
        )
        return int(run.stdout)

    assert resource.RUSAGE_SELF == 0
    assert peak(1_000_000) - peak(10_000) < 8_000


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_the_extension_links_nothing_but_the_c_and_cxx_libraries() -> None:
    linked = subprocess.run(["ldd", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].split("/")[-1].split(".so")[0] for line in linked.splitlines() if line.strip()}
    allowed = {
        "linux-vdso",
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libpthread",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert names <= allowed, names - allowed
