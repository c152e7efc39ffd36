"""Statistics objects in several threads, under Ctrl-C, copied and pickled: sums of whole updates, always."""

from __future__ import annotations

import copy
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from exact_sae import KINDS, Put, assert_sums, features, make_acts, make_sae

from sts_fast import CorrelationStats, InputError, ShiftStats, encode, get_num_threads, set_num_threads
from sts_fast.ops import backend

N_THREADS, N_UPDATES = 4, 25


def in_threads(*works: Callable[[], None]) -> None:
    """Runs all at once, and raises what any of them raised."""
    faults: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def many_switches() -> Any:
    before, threads = sys.getswitchinterval(), get_num_threads()
    sys.setswitchinterval(1e-5)
    set_num_threads(2)
    yield
    sys.setswitchinterval(before)
    set_num_threads(threads)


@pytest.mark.usefixtures("many_switches")
@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_threads_add_to_one_object(put: Put, kind: str) -> None:
    # Whole numbers, so that the sums are exact in any order.
    sae, rng = make_sae(kind), np.random.default_rng(0)
    n = N_THREADS * N_UPDATES * 7
    base, other = make_acts(n), make_acts(n, seed=1)
    weights, targets = rng.integers(0, 3, (n, 2)), rng.integers(-4, 5, (n, 3))
    stats, moments = ShiftStats(sae, n_replicates=2), CorrelationStats(sae, 3)

    def work(thread: int) -> None:
        for i in range(thread, N_THREADS * N_UPDATES, N_THREADS):
            rows = slice(7 * i, 7 * i + 7)
            stats.update(put(base[rows]), put(other[rows]), weights[rows])
            moments.update(put(base[rows]), targets[rows])

    in_threads(*(lambda thread=thread: work(thread) for thread in range(N_THREADS)))
    h, g = features(sae, base), features(sae, other)
    assert stats.n_tokens == moments.n_tokens == n
    found = stats.arrays() | {
        "sum_hy": moments.sum_hy + np.outer(moments.sum_h, moments.origin),
        "sum_y": moments.sum_y + n * moments.origin,
    }
    expected = {
        "sum_sq_shift": ((g - h) ** 2).sum(0),
        "n_fired_other": (g != 0).sum(0),
        "weighted_sq_shift": ((g - h) ** 2).T @ weights,
        "sum_hy": h.T @ targets,
        "sum_y": targets.sum(0).astype(np.float64),
    }
    assert_sums(found, expected, put.rounding)


def test_real_numbers_of_threads_agree_to_rounding() -> None:
    sae, rng = make_sae(), np.random.default_rng(1)
    acts, targets = rng.normal(size=(400, 24)).astype(np.float32), rng.normal(size=(400, 2))
    alone, together = CorrelationStats(sae, 2), CorrelationStats(sae, 2)
    alone.update(acts, targets)
    parts = [slice(start, start + 100) for start in range(0, 400, 100)]
    in_threads(*(lambda part=part: together.update(acts[part], targets[part]) for part in parts))
    np.testing.assert_allclose(together.sum_sq_h, alone.sum_sq_h, rtol=1e-12)
    np.testing.assert_allclose(together.pearson(), alone.pearson(), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("many_switches")
def test_readers_see_whole_updates(put: Put) -> None:
    # Every update adds the same row, so that any consistent reading is a multiple of its features.
    sae, row = make_sae(), np.repeat(make_acts(1), 3, axis=0)
    h, row = features(sae, row)[0], put(row)
    stats, done = ShiftStats(sae), threading.Event()
    stats.update(row, row)
    seen: list[int] = []

    def add() -> None:
        for _ in range(200):
            stats.update(row, row)
        done.set()

    def read() -> None:
        while not done.is_set():
            assert np.array_equal(stats.mean_base, h)
            kept = copy.copy(stats)
            assert np.array_equal(kept.sum_base, kept.n_tokens * h)
            doubled = stats + stats
            assert np.array_equal(doubled.sum_base, doubled.n_tokens * h)
            seen.append(kept.n_tokens)

    in_threads(add, read)
    assert stats.n_tokens == 603
    assert seen == sorted(seen)


def test_threads_fold_an_sae_once(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, fold, calls = make_sae(), backend._folded, []

    def slowly(*args: Any) -> Any:
        calls.append(args)
        time.sleep(0.05)
        return fold(*args)

    monkeypatch.setattr(backend, "_folded", slowly)
    in_threads(*[lambda: encode(sae, put(make_acts(3)))] * 4)
    assert len(calls) == 1


# Copies and errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda stats: pickle.loads(pickle.dumps(stats))])
def test_copies_go_on_by_themselves(put: Put, duplicate: Any) -> None:
    sae, base, other = make_sae(), make_acts(40), make_acts(40, seed=1)
    h, base, other = features(sae, base), put(base), put(other)
    columns = np.array([3, 9])
    stats, moments = ShiftStats(sae, columns=columns, n_replicates=1), CorrelationStats(sae, 1)
    columns[0] = 5  # the caller's array, no longer that of the statistics
    stats.update(base[:30], other[:30], np.ones((30, 1)))
    moments.update(base[:30], np.ones((30, 1)))
    other_stats, other_moments = duplicate(stats), duplicate(moments)
    other_stats.update(base[30:], other[30:], np.ones((10, 1)))
    other_moments.update(base[30:], np.ones((10, 1)))
    assert (stats.n_tokens, other_stats.n_tokens) == (30, 40)
    assert np.array_equal(stats.sum_base, h[:30, [3, 9]].sum(0))
    assert np.array_equal(other_stats.sum_base, h[:, [3, 9]].sum(0))
    assert np.array_equal(moments.sum_h, h[:30].sum(0))
    assert np.array_equal(other_moments.sum_h, h.sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_that_was_read_does_not_change_later(put: Put, kind: str) -> None:
    sae, stats = make_sae(kind), CorrelationStats(make_sae(kind), 1)
    stats.update(put(make_acts(9)), np.ones((9, 1)))
    before = stats.sum_h
    stats.update(put(make_acts(9)), np.ones((9, 1)))
    h = features(sae, make_acts(9)).sum(0)
    assert np.array_equal(before, h)
    assert np.array_equal(stats.sum_h, 2 * h)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_an_update_that_ends_early_adds_nothing(fault: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    sae, base, other = make_sae(), make_acts(20), make_acts(20, seed=1)
    stats, moments = ShiftStats(sae), CorrelationStats(sae, 1)

    class Broken:
        """Ops that stop after they have changed some of the sums."""

        @staticmethod
        def accumulate_shift(*_: Any, sum_base: Any, **__: Any) -> None:
            sum_base += 1
            raise fault

        @staticmethod
        def accumulate_moments(*_: Any, sum_h: Any, **__: Any) -> None:
            sum_h += 1
            raise fault

    monkeypatch.setattr(backend, "of", lambda sae, acts: backend.Backend(Broken, None, None))
    with pytest.raises(fault):
        stats.update(base, other)
    with pytest.raises(fault):
        moments.update(base, np.ones((20, 1)))
    monkeypatch.undo()
    assert not stats.sum_base.any()
    assert not moments.sum_h.any()
    assert moments.origin.tolist() == [0]
    stats.update(base, other)
    moments.update(base, np.ones((20, 1)))
    assert np.array_equal(stats.sum_base, features(sae, base).sum(0))
    assert np.array_equal(moments.sum_h, features(sae, base).sum(0))


@pytest.mark.parametrize("size", [1e20, 3e38])
def test_features_too_large_for_their_sums_are_named_and_nothing_is_added(put: Put, size: float) -> None:
    sae, acts = make_sae(), make_acts(8)
    acts[5] = 0
    acts[5, 0] = size / 3  # features are three times that at most
    sae.W_enc[0, :2] = [3, -3] if size < 1e38 else [4, -4]  # the core sums squares in float64: only features overflow
    stats, moments = ShiftStats(sae, n_replicates=1), CorrelationStats(sae, 1)
    stats.update(put(make_acts(8)), put(make_acts(8)), np.ones((8, 1)))
    moments.update(put(make_acts(8)), np.ones((8, 1)))
    before = stats.arrays(), moments.arrays()
    if size < 1e38:
        assert np.isfinite(encode(sae, put(acts)).on_cpu().values).all()
    else:
        with pytest.raises(InputError, match=r"^features of these rows are too large for float32, .*: give the act"):
            encode(sae, put(acts))
    if size > 1e38 or put.as_tensors:
        with pytest.raises(InputError, match=r"^sum_sq_shift would not be finite: features of these rows are too"):
            stats.update(put(make_acts(8)), put(acts), np.ones((8, 1)))
        with pytest.raises(InputError, match=r"^sum_(sq_)?h would not be finite: features of these rows are too large"):
            moments.update(put(acts), np.ones((8, 1)))
        assert (stats.n_tokens, moments.n_tokens) == (8, 8)
        assert_sums(stats.arrays(), before[0])
        assert_sums(moments.arrays(), before[1])
    else:
        moments.update(put(acts), np.ones((8, 1)))
        h = features(sae, np.concatenate([make_acts(8), acts]))
        np.testing.assert_allclose(moments.sum_sq_h, (h**2).sum(0), rtol=1e-6)


# Ctrl-C ---------------------------------------------------------------------------------------------------------------

# A call that would take minutes: the rows are one row in memory, and relu lets nothing fire.
LONG_CALL = """
import sys, time
import numpy as np
from sts_fast import SAE, CorrelationStats, ShiftStats, encode, set_num_threads

op, architecture, n_threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
set_num_threads(n_threads)
rng = np.random.default_rng(0)
d_in, d_sae, n = 256, 16384, 1 << 20
W_enc = rng.standard_normal((d_in, d_sae), np.float32)
sae = SAE(architecture=architecture, W_enc=W_enc, b_enc=np.full(d_sae, -1e6, np.float32),
          b_dec=np.zeros(d_in, np.float32), k=32 if "topk" in architecture else 0)
row = np.ones((1, d_in), np.float32)
rows = np.broadcast_to(row, (n, d_in))
stats, moments = ShiftStats(sae), CorrelationStats(sae, 8)
stats.update(row, 2 * row)
moments.update(row, np.ones((1, 8)))
print("ready", flush=True)
try:
    if op == "encode":
        encode(sae, rows)
    elif op == "shift":
        stats.update(rows, rows)
    elif op == "correlate":
        moments.update(rows, np.broadcast_to(np.ones((1, 8)), (n, 8)))
    print("finished", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
stats.update(row, row)
moments.update(row, np.ones((1, 8)))
undisturbed = ShiftStats(sae), CorrelationStats(sae, 8)
undisturbed[0].update(np.repeat(row, 2, axis=0), np.concatenate([2 * row, row]))
undisturbed[1].update(np.repeat(row, 2, axis=0), np.ones((2, 8)))
for found, wanted in zip((stats, moments), undisturbed):
    print(found.n_tokens, all(np.array_equal(found.arrays()[name], values) for name, values in wanted.arrays().items()))
"""


@pytest.mark.parametrize(
    ("op", "architecture", "n_threads"),
    [
        ("encode", "standard", 2),
        ("encode", "topk", 1),
        ("shift", "standard", 1),
        ("shift", "abstopk", 2),
        ("correlate", "standard", 2),
        ("correlate", "topk", 2),
    ],
)
def test_ctrl_c_stops_a_long_call_and_adds_nothing(op: str, architecture: str, n_threads: int) -> None:
    command = [sys.executable, "-c", LONG_CALL, op, architecture, str(n_threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            sent = time.monotonic()
            assert process.stdout.readline() == "stopped\n"
            # A second is the promise, for a machine with nothing else to do.
            assert time.monotonic() - sent < 10
            out, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert out == "2 True\n2 True\n", errors
    assert process.returncode == 0


def test_sums_add_up_and_say_what_they_are() -> None:
    sae, acts = replace(make_sae(), source="a/b"), make_acts(10)
    parts = [ShiftStats(sae) for _ in range(3)]
    for part in parts:
        part.update(acts, acts + 1)
    total = sum(parts)
    assert total.n_tokens == 30
    np.testing.assert_allclose(total.sum_sq_shift, 3 * parts[0].sum_sq_shift)
    assert repr(total) == "ShiftStats(30 rows of a/b)"
    assert total._repr_html_() == "<code>ShiftStats(30 rows of a/b)</code>"
    with pytest.raises(TypeError):
        1 + parts[0]
