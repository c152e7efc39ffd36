"""How far the core's float64 sums are from the exact ones after many rows.

    python -m benchmarks.exact_sums --rows 10_000_000

W_enc is the identity, so that the features are the activations above zero. Activations are whole multiples of 2^-20
below 16, so that every feature, difference and square is exact in float64, and only the summing rounds; the exact sums
are taken in whole numbers. Beside it stand the same sums taken row by row in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sts_fast.ops import _cpu

WIDTH, CHUNK, UNIT = 4, 100_000, 2.0**20
NAMES = ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other")


def whole_sum(values: NDArray[np.int64]) -> list[int]:
    """[WIDTH] exact sums of values below 2^50, by their upper and lower 25 bits."""
    high, low = values >> 25, values & (2**25 - 1)
    return [int(upper) * 2**25 + int(lower) for upper, lower in zip(high.sum(0), low.sum(0), strict=True)]


def errors(n_rows: int) -> dict[str, tuple[float, float]]:
    """Largest relative error over the columns of each sum: of the core, and of float32."""
    zero = np.zeros(WIDTH, np.float32)
    encoder = _cpu.Encoder(np.eye(WIDTH, dtype=np.float32), zero, activation="relu")
    sums: dict[str, Any] = {name: np.zeros(WIDTH) for name in NAMES}
    counts: dict[str, Any] = {name: np.zeros(WIDTH, np.int64) for name in ("n_fired_base", "n_fired_other")}
    exact = {name: [0] * WIDTH for name in NAMES}
    single = {name: np.zeros((1, WIDTH), np.float32) for name in NAMES}
    rng = np.random.default_rng(0)
    for start in range(0, n_rows, CHUNK):
        n = min(CHUNK, n_rows - start)
        whole = [np.clip(np.rint(UNIT * rng.standard_normal((n, WIDTH))), -15 * UNIT, 15 * UNIT) for _ in range(2)]
        _cpu.accumulate_shift(encoder, *((x / UNIT).astype(np.float32) for x in whole), **sums, **counts)
        a, b = (np.maximum(x, 0).astype(np.int64) for x in whole)
        for name, terms, unit in zip(NAMES, ((b - a) ** 2, a, b, a**2, b**2), (2, 1, 1, 2, 2), strict=True):
            exact[name] = [x + y for x, y in zip(exact[name], whole_sum(terms), strict=True)]
            rows = (terms / UNIT**unit).astype(np.float32)
            single[name] = np.add.accumulate(np.concatenate([single[name], rows]), dtype=np.float32)[-1:]
    result = {}
    for name in NAMES:
        unit = int(UNIT) ** (2 if "sq" in name else 1)
        # Differences of whole numbers first: in float64 the exact sum itself would be rounded.
        core, naive = (
            max(abs(int(float(got) * unit) - want) / want for got, want in zip(values, exact[name], strict=True))
            for values in (sums[name], single[name][0])
        )
        result[name] = core, naive
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    options = parser.parse_args(arguments)
    print(f"{'sum':14} {'core':>9} {'float32':>9}   relative to the exact sum, {options.rows:,} rows")
    for name, (core, naive) in errors(options.rows).items():
        print(f"{name:14} {core:9.1e} {naive:9.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
