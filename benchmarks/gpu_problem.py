"""A random problem on the device for the CUDA ops, and what float64 says of it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from typing import Any

TOP_K = 64
TARGETS = 16


class Problem:
    """Random weights and rows on the device, and what float64 says of them."""

    def __init__(
        self, d_in: int, d_sae: int, rows: int, activation: str, precision: str, seed: int = 0, dtype: Any = None
    ) -> None:
        import torch

        from sts_fast.ops import device_encoder

        self.activation, self.d_sae, self.precision = activation, d_sae, precision
        generator = torch.Generator("cuda").manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, device="cuda", generator=generator)  # noqa: E731
        self.W_enc = normal(d_in, d_sae) / d_in**0.5
        if precision == "bf16":
            self.W_enc = self.W_enc.bfloat16()
        dtype = dtype or torch.float32
        self.base = normal(rows, d_in).to(dtype)
        self.other = (self.base.float() + 0.3 * normal(rows, d_in)).to(dtype)
        self.targets = normal(rows, TARGETS).double()
        border = statistics.NormalDist().inv_cdf(1 - 64 / d_sae)  # about 64 features fire in a row
        self.threshold = torch.full((d_sae,), border, device="cuda")
        self.bias = 0.1 * normal(d_sae)
        topk = activation == "topk"
        self.encoder = device_encoder.Encoder(
            device_encoder.prepare_weights(self.W_enc, torch.zeros(d_in).numpy(), torch.device("cuda", 0), precision),
            self.bias.cpu().numpy(),
            d_in=d_in,
            precision=precision,
            activation=activation,
            scale=torch.ones(d_sae).numpy(),
            threshold=None if topk else self.threshold.cpu().numpy(),
            k=TOP_K if topk else 0,
        )

    def new_sums(self) -> dict[str, Any]:
        import torch

        sums = ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other")
        found = {name: torch.zeros(self.d_sae, dtype=torch.float64, device="cuda") for name in sums}
        counts = ("n_fired_base", "n_fired_other")
        return found | {name: torch.zeros(self.d_sae, dtype=torch.int64, device="cuda") for name in counts}

    def shift(self, sums: dict[str, Any] | None = None) -> dict[str, Any]:
        from sts_fast.ops import cuda

        sums = sums or self.new_sums()
        cuda.accumulate_shift(self.encoder, self.base, self.other, **sums)
        return sums

    def weighted_shift(self) -> dict[str, Any]:
        """With TARGETS weights a row."""
        import torch

        from sts_fast.ops import cuda

        sums = self.new_sums()
        sums["weighted_sq_shift"] = torch.zeros((self.d_sae, TARGETS), dtype=torch.float64, device="cuda")
        cuda.accumulate_shift(self.encoder, self.base, self.other, row_weights=self.targets, **sums)
        return sums

    def shift_of(self, columns: Any) -> dict[str, Any]:
        """Of these columns alone."""
        import torch

        from sts_fast.ops import cuda

        sums = {
            name: torch.zeros(len(columns), dtype=values.dtype, device="cuda")
            for name, values in self.new_sums().items()
        }
        cuda.accumulate_shift(self.encoder, self.base, self.other, columns=columns, **sums)
        return sums

    def moments(self) -> dict[str, Any]:
        import torch

        from sts_fast.ops import cuda

        sums = {name: torch.zeros(self.d_sae, dtype=torch.float64, device="cuda") for name in ("sum_h", "sum_sq_h")}
        sums["n_fired"] = torch.zeros(self.d_sae, dtype=torch.int64, device="cuda")
        sums["sum_hy"] = torch.zeros((self.d_sae, TARGETS), dtype=torch.float64, device="cuda")
        cuda.accumulate_moments(self.encoder, self.base, self.targets, **sums)
        return sums

    def sparse(self) -> Any:
        from sts_fast.ops import cuda

        return cuda.encode_sparse(self.encoder, self.base)

    def prompts(self) -> dict[str, Any]:
        """Arguments of sum_by_prompt: prompts of 0 to 99 tokens, and pairs of every other token, the last one first."""
        import numpy as np

        from sts_fast.ops import cuda

        n = len(self.base)
        starts = np.minimum(np.cumsum([0, *(np.arange(n) * 37 % 100)]), n)
        pair_at = [np.arange(begin, end)[::-2] for begin, end in itertools.pairwise(starts)]
        return {
            "base": cuda.encode_sparse(self.encoder, self.base), "base_starts": starts,
            "other": cuda.encode_sparse(self.encoder, self.other[np.concatenate(pair_at)]),
            "other_starts": np.cumsum([0, *map(len, pair_at)]), "pair_at": np.concatenate(pair_at),
            "d_sae": self.d_sae,
        }  # fmt: skip

    def by_prompt(self) -> Any:
        from sts_fast.ops import cuda

        return cuda.sum_by_prompt(**self.prompts())

    def features(self, acts: Any, columns: Any) -> tuple[Any, Any]:
        """(features, distance of each from its threshold) in float64; of jumprelu."""
        pre = acts.double() @ self.W_enc[:, columns].double() + self.bias[columns].double()
        threshold = self.threshold[columns].double()
        return pre * (pre > threshold), (pre - threshold).abs()

    def columns(self) -> Any:
        import torch

        return torch.randperm(self.d_sae, device="cuda")[:1024].sort().values

    def shift_error(self, sums: dict[str, Any]) -> float:
        columns = self.columns()
        (a, near_a), (b, near_b) = (self.features(acts, columns) for acts in (self.base, self.other))
        firm = (near_a.amin(0) > self.margin()) & (near_b.amin(0) > self.margin())
        wanted = {"sum_sq_shift": (b - a).square(), "sum_base": a, "sum_other": b, "sum_sq_base": a.square()}
        wanted |= {"sum_sq_other": b.square(), "n_fired_base": a != 0, "n_fired_other": b != 0}
        return worst((sums[name][columns][firm], values.double().sum(0)[firm]) for name, values in wanted.items())

    def moments_error(self) -> float:
        columns, sums = self.columns(), self.moments()
        h, near = self.features(self.base, columns)
        firm = near.amin(0) > self.margin()
        pairs = [(sums["sum_h"], h.sum(0)), (sums["sum_sq_h"], h.square().sum(0)), (sums["n_fired"], (h != 0).sum(0))]
        found = worst((got[columns][firm], values[firm]) for got, values in pairs)
        size = h.abs().T @ self.targets.abs() + 1e-3
        off = (sums["sum_hy"][columns] - h.T @ self.targets).abs() / size
        return max(found, float(off[firm].max()))

    def by_prompt_error(self) -> float:
        """Against the features as they were encoded; infinite where the CPU's sums differ in a bit."""
        import torch

        from sts_fast.ops import _cpu, cuda
        from sts_fast.sae.features import SparseFeatures

        given = self.prompts()
        found = cuda.sum_by_prompt(**given)
        of_cpu = {name: tuple(part.cpu().numpy() for part in given[name]) for name in ("base", "other")}
        on_cpu = _cpu.sum_by_prompt(**{**given, **of_cpu})
        if any(got.cpu().numpy().tobytes() != wanted.tobytes() for got, wanted in zip(found, on_cpu, strict=True)):
            return math.inf
        base, other = (SparseFeatures(*given[name], self.d_sae).to_dense().double() for name in ("base", "other"))
        pairs = []
        for p in range(len(given["base_starts"]) - 1):
            rows, paired = (slice(*given[name][p : p + 2]) for name in ("base_starts", "other_starts"))
            h, shift = base[rows], other[paired] - base[given["pair_at"][paired]]
            here = torch.cat([h, other[paired]]).ne(0).any(0).nonzero()[:, 0]
            part = slice(*found[0][p : p + 2].tolist())
            if not torch.equal(found[1][part].long(), here):
                return math.inf
            sums = (h != 0, h, h.square(), shift, shift.square())
            pairs += [(got[part], values.double().sum(0)[here]) for got, values in zip(found[2:7], sums, strict=True)]
        return worst((got, wanted) for got, wanted in pairs if len(got))

    def margin(self) -> float:
        """What products may be off by; weights of "bf16" are bfloat16 here, so that nothing is rounded."""
        return 1e-5 if self.precision == "fp32" else 1e-4

    def top_k_error(self) -> float:
        """Of a sample of rows; a row whose k-th and next value lie within the margin is left out."""
        import torch

        indptr, indices, values = self.sparse()
        rows = torch.randperm(len(self.base), device="cuda")[:256]
        pre = self.base[rows].double() @ self.W_enc.double() + self.bias.double()
        top = pre.topk(TOP_K + 1, dim=1)
        firm = (top.values[:, TOP_K - 1] - top.values[:, TOP_K]) > self.margin()
        found = torch.zeros_like(pre)
        for place, row in enumerate(rows.tolist()):
            part = slice(int(indptr[row]), int(indptr[row + 1]))
            found[place, indices[part].long()] = values[part].double()
        wanted = torch.zeros_like(pre).scatter_(1, top.indices[:, :TOP_K], top.values[:, :TOP_K].relu())
        return float(((found - wanted).abs().amax(1) / wanted.amax(1))[firm].max())


def worst(pairs: Iterator[tuple[Any, Any]]) -> float:
    """The largest error, relative to a column's own sum, or to a hundredth of the largest where that is more."""
    found = 0.0
    for got, wanted in pairs:
        size = wanted.abs().clamp(min=0.01 * float(wanted.abs().max()) + 1e-30)
        found = max(found, float(((got.double() - wanted.double()).abs() / size).max()))
    return found
