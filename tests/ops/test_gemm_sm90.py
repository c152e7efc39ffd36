"""The main loop for Hopper, run on the CPU by the emulator in tests/emulator, against products in float64."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
CORE = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}")
EMULATOR = ROOT / "tests" / "emulator"
N_TARGETS = 16

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
BF16 = NDArray[np.uint16]


class Operands(ctypes.Structure):
    _fields_ = [
        ("W", ctypes.c_void_p * 2),
        ("base", ctypes.c_void_p * 2),
        ("other", ctypes.c_void_p * 2),
        *((name, ctypes.c_int64) for name in ("n_features", "n_tokens", "depth", "W_stride", "x_stride")),
    ]


class Vectors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("scale", "bias", "threshold")]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulator") / "gemm_sm90.so"
    includes = [f"-I{EMULATOR}", *CORE]
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
    subprocess.run([compiler, *flags, *includes, str(EMULATOR / "gemm_sm90.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.deal.restype = loaded.emulate_append.restype = ctypes.c_int64
    return loaded


def bf16_bits(values: F32) -> BF16:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: BF16) -> F32:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass
class Parts:
    """A matrix as one or two bf16 parts, rows padded to a stride with not-a-numbers, 16-byte aligned."""

    hi: BF16
    lo: BF16 | None
    values: F64  # the sum of the parts

    @classmethod
    def of(cls, values: F32, n_parts: int, stride: int) -> Parts:
        hi = bf16_bits(values)
        lo = bf16_bits(values - bf16_values(hi)) if n_parts == 2 else None
        total = bf16_values(hi).astype(np.float64) + (0 if lo is None else bf16_values(lo))
        return cls(cls.padded(hi, stride), None if lo is None else cls.padded(lo, stride), total)

    @staticmethod
    def padded(bits: BF16, stride: int) -> BF16:
        n_rows, n_columns = bits.shape
        storage = np.full(n_rows * stride + 8, 0x7FC0, np.uint16)
        start = -storage.ctypes.data % 16 // 2
        rows = storage[start : start + n_rows * stride].reshape(n_rows, stride)
        rows[:, :n_columns] = bits
        return rows

    @property
    def pointers(self) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * 2)(self.hi.ctypes.data, 0 if self.lo is None else self.lo.ctypes.data)


@dataclass
class Problem:
    """One product with random operands; two parts leave out the product of lo and lo, as the kernel does."""

    W: Parts
    base: Parts
    other: Parts
    scale: F32
    bias: F32
    threshold: F32

    @classmethod
    def random(
        cls, seed: int, n_features: int, n_tokens: int, depth: int, parts: tuple[int, int] = (1, 1), x_stride: int = 0
    ) -> Problem:
        """`parts`: of the weights and of the activations."""
        rng = np.random.default_rng(seed)
        x_stride = x_stride or depth
        W_parts, x_parts = parts
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        return cls(
            Parts.of(draw(n_features, depth) / np.float32(np.sqrt(depth)), W_parts, depth),
            Parts.of(draw(n_tokens, depth), x_parts, x_stride),
            Parts.of(draw(n_tokens, depth), x_parts, x_stride),
            rng.uniform(0.5, 2, n_features).astype(np.float32),
            rng.uniform(-0.5, 0.5, n_features).astype(np.float32),
            rng.uniform(0.5, 2, n_features).astype(np.float32),
        )

    def pre(self, x: Parts) -> F64:
        return self.scale * (x.values @ self.W.values.T) + self.bias

    def features(self, x: Parts) -> F64:
        pre = self.pre(x)
        return np.where(pre > self.threshold, pre, 0)

    @property
    def arguments(self) -> tuple[object, object]:
        n_features, n_tokens = len(self.W.hi), len(self.base.hi)
        sizes = (n_features, n_tokens, self.W.values.shape[1], self.W.hi.shape[1], self.base.hi.shape[1])
        operands = Operands(self.W.pointers, self.base.pointers, self.other.pointers, *sizes)
        vectors = Vectors(*(v.ctypes.data for v in (self.scale, self.bias, self.threshold)))
        return ctypes.byref(operands), ctypes.byref(vectors)


def doubles(array: F64) -> object:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_double))


def shift(emulated: ctypes.CDLL, problem: Problem, n_multiprocessors: int, seed: int) -> F64:
    sums = np.zeros((7, len(problem.scale)))
    assert emulated.emulate_shift(*problem.arguments, n_multiprocessors, ctypes.c_uint64(seed), doubles(sums)) == 0
    return sums


def expected_shift(problem: Problem) -> F64:
    a, b = problem.features(problem.base), problem.features(problem.other)
    return np.stack([column.sum(0) for column in ((b - a) ** 2, a, b, a**2, b**2, a != 0, b != 0)])


@pytest.mark.parametrize(
    ("n_features", "n_tokens", "depth", "parts", "x_stride"),
    [
        pytest.param(256, 256, 64, (1, 1), 0, id="one tile, one step"),
        pytest.param(300, 600, 192, (1, 1), 200, id="ragged strips and tiles, strided rows"),
        pytest.param(40, 130, 576, (1, 1), 0, id="more steps than stages"),
        pytest.param(264, 300, 128, (2, 1), 0, id="weights of two parts"),
        pytest.param(8, 1, 64, (2, 2), 0, id="both of two parts, one token"),
    ],
)
def test_every_product_reaches_its_feature_and_token(
    emulated: ctypes.CDLL, n_features: int, n_tokens: int, depth: int, parts: tuple[int, int], x_stride: int
) -> None:
    problem = Problem.random(1, n_features, n_tokens, depth, parts, x_stride)
    pre = np.full((n_tokens, n_features), np.nan, np.float32)
    status = emulated.emulate_dense(*problem.arguments, 4, ctypes.c_uint64(5), ctypes.c_void_p(pre.ctypes.data))
    assert status == 0
    # lo times lo, which is left out, is below 2^-16 of the product of absolute values
    bound = 2e-6 + (2**-16 if parts == (2, 2) else 0)
    size = np.abs(problem.base.values) @ np.abs(problem.W.values.T) * problem.scale + 1
    assert (np.abs(pre - problem.pre(problem.base)) <= bound * size).all()


@pytest.mark.parametrize("seed", range(3))
def test_shift_under_any_order_of_warps_and_arrival_of_boxes(emulated: ctypes.CDLL, seed: int) -> None:
    problem = Problem.random(seed, 520, 400, 320)
    sums = shift(emulated, problem, 4, seed)
    np.testing.assert_allclose(sums, expected_shift(problem), rtol=1e-5, atol=1e-4)
    assert (shift(emulated, problem, 4, seed + 100) == sums).all(), "one plan gives one result, bit for bit"


def test_moments_read_one_matrix_by_halves(emulated: ctypes.CDLL) -> None:
    problem = Problem.random(3, 70, 700, 192)
    targets = np.random.default_rng(4).standard_normal((700, N_TARGETS)).astype(np.float32)
    sums = np.zeros((3 + N_TARGETS, 70))
    pointer = ctypes.c_void_p(targets.ctypes.data)
    assert emulated.emulate_moments(*problem.arguments, pointer, 6, ctypes.c_uint64(1), doubles(sums)) == 0
    h = problem.features(problem.base)
    expected = np.stack([h.sum(0), (h**2).sum(0), (h != 0).sum(0), *(targets.astype(np.float64).T @ h)])
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [0, 2], ids=["a quarter", "most, a warp's list full at any place"])
def test_appends_what_fires_and_counts_on_beyond_the_capacity(emulated: ctypes.CDLL, bias: float) -> None:
    problem = Problem.random(5, 140, 300, 64)
    problem.bias += np.float32(bias)
    h = problem.features(problem.base)
    n_fired = np.count_nonzero(h)
    keys, values = np.zeros(n_fired, np.int64), np.zeros(n_fired, np.float32)
    arrays = (ctypes.c_void_p(keys.ctypes.data), ctypes.c_void_p(values.ctypes.data))
    assert (
        emulated.emulate_append(*problem.arguments, 4, ctypes.c_uint64(1), ctypes.c_int64(n_fired), *arrays) == n_fired
    )
    order = np.argsort(keys)
    token, feature = keys[order] >> 32, keys[order] & 0xFFFFFFFF
    assert (np.stack([token, feature]) == np.nonzero(h)).all()
    np.testing.assert_allclose(values[order], h[token, feature], rtol=1e-5)
    keys[10:] = -1
    assert emulated.emulate_append(*problem.arguments, 4, ctypes.c_uint64(1), ctypes.c_int64(10), *arrays) == n_fired
    assert (keys[10:] == -1).all(), "nothing is written past the capacity"


@pytest.mark.parametrize("absolute", [False, True])
def test_lists_what_exceeds_its_rows_bound(emulated: ctypes.CDLL, absolute: bool) -> None:
    n_tokens, n_features, capacity = 290, 150, 100
    problem = Problem.random(6, n_features, n_tokens, 64)
    # nothing, a few and nearly everything: lists that are flushed within a tile, and one that overflows
    bounds = np.full(n_tokens, 3.0, np.float32)
    bounds[:7], bounds[7:100] = 9, 1
    bounds[5] = 0
    columns, values = np.full((n_tokens, capacity), -1, np.int32), np.zeros((n_tokens, capacity), np.float32)
    counts = np.zeros(n_tokens, np.int32)
    arrays = [ctypes.c_void_p(array.ctypes.data) for array in (columns, values, counts)]
    sizes = (4, ctypes.c_uint64(1), ctypes.c_int64(capacity))
    pointer = ctypes.c_void_p(bounds.ctypes.data)
    assert emulated.emulate_candidates(*problem.arguments, pointer, int(absolute), *sizes, *arrays) == 0
    pre = problem.pre(problem.base)
    exceeds = (np.abs(pre) if absolute else pre) > bounds[:, None]
    assert (counts == exceeds.sum(1)).all()
    assert counts.max() > 50
    for row in np.flatnonzero(counts <= capacity):
        listed = np.argsort(columns[row, : counts[row]])
        assert (columns[row, listed] - 1000 == np.flatnonzero(exceeds[row])).all()
        np.testing.assert_allclose(values[row, listed], pre[row, exceeds[row]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stride", "offset"), [(68, 0), (72, 1)], ids=["stride of 8 bytes", "rows not aligned"])
def test_refuses_what_the_memory_accelerator_cannot_read(emulated: ctypes.CDLL, stride: int, offset: int) -> None:
    problem = Problem.random(1, 8, 16, 64, x_stride=stride)
    problem.base.hi = problem.base.hi.reshape(-1)[offset:].reshape(1, -1) if offset else problem.base.hi
    sums = np.zeros((7, 8))
    operands, vectors = problem.arguments
    assert emulated.emulate_shift(operands, vectors, 2, ctypes.c_uint64(1), doubles(sums)) == -1


MIB = 1 << 20
SCHEDULES = [
    # strips, tiles, clusters, bytes of a strip: the widths and depths of the benchmark on 132 multiprocessors
    (256, 256, 66, 3584 * 512),
    (512, 256, 66, 2 * 4096 * 512),
    (64, 256, 66, 2304 * 512),
    # little to do, or wide strips
    *itertools.product((1, 2, 7), (1, 3, 40), (1, 5, 66), (MIB, 100 * MIB)),
]


@pytest.mark.parametrize(("n_strips", "n_tiles", "max_clusters", "strip_bytes"), SCHEDULES)
def test_schedule_deals_every_tile_once_evenly_and_in_step(
    emulated: ctypes.CDLL, n_strips: int, n_tiles: int, max_clusters: int, strip_bytes: int
) -> None:
    cache = 24 * MIB
    dealt = np.full((n_strips * n_tiles, 4), -1, np.int64)
    shape = np.zeros(3, np.int64)
    longs = ctypes.POINTER(ctypes.c_int64)
    sizes = (ctypes.c_int64(size) for size in (n_strips, n_tiles, max_clusters, strip_bytes, cache))
    n = emulated.deal(*sizes, shape.ctypes.data_as(longs), dealt.ctypes.data_as(longs))
    lanes_n, lanes_m, n_slots = shape
    assert n == len(dealt)
    cluster, strip, tile, slot = dealt.T
    assert len(np.unique(strip * n_tiles + tile)) == n, "every tile is dealt once"
    assert strip.max() == n_strips - 1
    assert tile.max() == n_tiles - 1
    per_cluster = np.bincount(cluster, minlength=lanes_n * lanes_m)
    assert per_cluster.max() - per_cluster.min() <= 2
    assert lanes_n * lanes_m >= 0.9 * min(max_clusters, n)
    assert lanes_n == 1 or lanes_n * strip_bytes <= cache
    assert (slot >= 0).all()
    assert (slot < n_slots).all()
    owners = np.unique(np.stack([strip * n_slots + slot, cluster]), axis=1)[0]
    assert len(np.unique(owners)) == len(owners), "no two clusters share a slot of a strip"

    runs = [dealt[cluster == c] for c in range(lanes_n * lanes_m)]
    assert all((np.diff(run[:, 1]) >= 0).all() for run in runs), "a cluster leaves a strip once"
    for lane_m in range(lanes_m):
        in_step = [run[run[:, 1] < run[-1, 1], 2] for run in runs[lane_m::lanes_m] if len(run)]
        longest = max(in_step, key=len)
        assert all((tiles == longest[: len(tiles)]).all() for tiles in in_step), "but for their last strip"


def cuda_tool(name: str) -> str:
    """A program of the CUDA toolkit, from PATH or from packages of this environment."""
    packaged = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob(f"*/bin/{name}"))
    found = shutil.which(name) or (str(packaged[0]) if packaged else None)
    if found is None:
        pytest.skip(f"no {name}")
    return found


FIND_DEVICE = """
#include "cuda/device.cu"
int main() {
    sts::cuda::Device device{};
    return sts::cuda::find_device(0, nullptr, &device) ? 2 : device.sm90;
}
"""


@pytest.mark.parametrize("built", [True, False])
def test_only_a_build_for_90a_takes_this_loop(built: bool, tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "device.cpp").write_text(FIND_DEVICE, encoding="utf-8")
    folders = [f"-I{EMULATOR}", *CORE]
    options = ["-std=c++17", *folders, *(["-DSTS_SM90A"] if built else [])]
    subprocess.run([compiler, *options, str(tmp_path / "device.cpp"), "-o", str(tmp_path / "device")], check=True)
    assert subprocess.run([str(tmp_path / "device")], check=False).returncode == built


PROGRAM = """
#include "cuda/epilogue.cuh"
#include "cuda/gemm_sm90.cuh"
namespace sts::cuda {
using Shift = ShiftEpilogue<JumpRelu<float>, 0>;
template cudaError_t sm90_launch<Shift>(const Product&, const Shift::Params&, int, cudaStream_t);
}
"""


def compiled_for(architecture: str, folder: Path) -> Compiled:
    """The shift kernel."""
    (folder / "shift.cu").write_text(PROGRAM, encoding="utf-8")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [cuda_tool("nvcc"), "-std=c++17", "-O3", target, "-Xptxas=-v", "-cubin", *CORE]
    command += ["--keep", "--keep-dir", str(folder), "-o", str(folder / "shift.cubin"), str(folder / "shift.cu")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    command = [cuda_tool("cuobjdump"), "-sass", str(folder / "shift.cubin")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][^;]*?) ?;", listing)
    return Compiled(code, (folder / "shift.ptx").read_text(encoding="utf-8"), ran.stderr)


@dataclass
class Compiled:
    """Machine code, an instruction a line without its predicate; what it was made of; what the assembler said."""

    code: list[str]
    ptx: str
    said: str

    def at(self, name: str) -> list[int]:
        """Where instructions of this name, or with further suffixes, are."""
        return [i for i, line in enumerate(self.code) if re.match(rf"{re.escape(name)}(?![A-Z0-9])", line)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled_for("90a", tmp_path_factory.mktemp("sm90"))


def test_stops_where_the_instructions_are_missing(tmp_path: Path) -> None:
    assert compiled_for("90", tmp_path).at("BPT.TRAP"), "sums stay zero without a word"


def test_keeps_its_accumulators_in_registers(compiled: Compiled) -> None:
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.said)
    assert spills == [("0", "0", "0")]
    assert "serializ" not in compiled.said, "products that wait for each other"


def test_products_take_their_operands_as_they_are_and_in_order(compiled: Compiled) -> None:
    products = [compiled.code[i] for i in compiled.at("HGMMA")]
    # Neither transposed nor negated, the accumulators' registers in and out, the last with the group's end.
    as_they_are = r"HGMMA\.64x256x16\.F32\.BF16 (R\d+), gdesc\[UR\d+\], \1(, !?UP\d+)?(, gsb0)?"
    assert len(products) == 4
    assert all(re.fullmatch(as_they_are, product) for product in products), products
    assert [product.endswith("gsb0") for product in products] == [False, False, False, True]
    begin, waits = compiled.at("WARPGROUP.ARRIVE"), compiled.at("WARPGROUP.DEPBAR")
    assert [compiled.code[i] for i in waits] == ["WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    assert len(begin) == 1
    assert begin[0] < compiled.at("HGMMA")[0] < compiled.at("HGMMA")[-1] < waits[0] < waits[1]
    assert not [i for i in compiled.at("MEMBAR") if begin[0] < i < waits[1]], "a fence waits for memory nobody shares"
    between = compiled.code[begin[0] : waits[0]]
    moved = [line for line in between if re.match(r"(MOV|IMAD\.MOV)\S* R\d+, R(\d+)$", line)]
    assert not moved, "accumulators are not copied"


def test_one_box_goes_to_both_blocks(compiled: Compiled) -> None:
    (multicast,) = compiled.at("UTMALDG.2D.MULTICAST")
    assert len(compiled.at("UTMALDG")) == 2, "and one to its own"
    register = compiled.code[multicast].rsplit(", ", 1)[1]
    masks = [line for line in compiled.code[:multicast] if line.startswith(f"UMOV {register}, 0x")]
    assert int(masks[-1].split("0x")[1], 16) >> 16 == 0b11
    assert ".reqnctapercluster 2, 1, 1" in compiled.ptx


def test_registers_are_within_what_each_role_asks_for(compiled: Compiled) -> None:
    (take,), (give,) = compiled.at("USETMAXREG.TRY_ALLOC"), compiled.at("USETMAXREG.DEALLOC")
    asked = [int(compiled.code[i].split("0x")[1], 16) for i in (give, take)]
    assert 128 * (asked[0] + 2 * asked[1]) <= 65536, "or the products' warps wait for ever"

    def most(lines: list[str]) -> int:
        return 1 + max(int(n) for line in lines for n in re.findall(r"\bR(\d+)", line))

    end = next(i for i in compiled.at("UCGABAR_ARV") if i > give)
    assert take < give, "the listing has the products first"
    assert most(compiled.code[give:end]) <= asked[0]
    assert most(compiled.code[take:give]) <= asked[1]


def test_blocks_of_a_cluster_meet_before_they_signal_and_at_the_end(compiled: Compiled) -> None:
    arrive, wait = compiled.at("UCGABAR_ARV"), compiled.at("UCGABAR_WAIT")
    assert (len(arrive), len(wait)) == (2, 2)
    initialised, signals = compiled.at("SYNCS.EXCH"), [*compiled.at("SYNCS.ARRIVE"), *compiled.at("UTMALDG")]
    assert len(initialised) == 9, "full and empty of four stages, and one for being ahead"
    assert max(initialised) < arrive[0] < wait[0] < min(signals)
    assert max(signals) < arrive[1] < wait[1]
    for i in arrive:
        assert "MEMBAR.ALL.GPU" in compiled.code[i - 5 : i], "what came before is released"
    # The fence of initialised barriers leaves no instruction behind.
    words = ("mbarrier.init", "fence.mbarrier_init.release.cluster", "barrier.cluster.arrive.release", "setmaxnreg")
    order = re.findall("|".join(map(re.escape, words)), compiled.ptx)
    assert order[:11] == [*[words[0]] * 9, words[1], words[2]]
