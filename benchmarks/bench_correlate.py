"""Moments of every feature and cross-moments with K targets: the streaming sums behind a Pearson correlation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import oracle
from benchmarks.cases import Bench, Case, Contestant, Product
from sts_fast import CorrelationStats
from sts_fast.ops import backend, torch_backend

Lap = Callable[[str], None]
N_TARGETS = (1, 16, 64)


def bench(case: Case) -> Bench:
    targets = np.random.default_rng(3).standard_normal((case.size.rows, max(N_TARGETS)))
    contestants = [Contestant(f"sts_fast, K = {k}", partial(ours, case, k)) for k in N_TARGETS]
    contestants += [Contestant(f"torch backend, K = {k}", partial(torch_ours, case, k)) for k in N_TARGETS]
    contestants.append(Contestant("product", product := BareProduct(case), product.prepare))
    contestants += [Contestant(f"in place, K = {k}", partial(in_place, case, k)) for k in N_TARGETS]
    flops = 2 * case.size.rows * case.size.d_in * case.size.d_sae
    return Bench("correlate", case, (case.base, targets), flops, contestants, Check(case))


def ours(case: Case, n_targets: int, acts: torch.Tensor, targets: oracle.Doubles, lap: Lap) -> dict[str, Any]:
    stats = CorrelationStats(case.sae, n_targets)
    stats.update(acts, targets[:, :n_targets])
    # The statistics are of y - origin: say them of y, as the equations do.
    return {
        **{"sum_h": stats.sum_h, "sum_sq_h": stats.sum_sq_h, "n_fired": stats.n_fired},
        "sum_hy": stats.sum_hy + np.outer(stats.sum_h, stats.origin),
    }


def torch_ours(case: Case, n_targets: int, acts: torch.Tensor, targets: oracle.Doubles, lap: Lap) -> dict[str, Any]:
    """By torch, as on a device without our kernels."""
    device, d_sae = torch.device(case.device), case.size.d_sae
    sums = {name: torch.zeros(d_sae, dtype=torch.float64, device=device) for name in ("sum_h", "sum_sq_h")}
    sums["n_fired"] = torch.zeros(d_sae, dtype=torch.int64, device=device)
    sums["sum_hy"] = torch.zeros((d_sae, n_targets), dtype=torch.float64, device=device)
    y = np.ascontiguousarray(targets[:, :n_targets])
    torch_backend.accumulate_moments(backend.by_torch(case.sae, device).encoder, acts, y, **sums)
    return sums


def in_place(case: Case, n_targets: int, acts: torch.Tensor, targets: oracle.Doubles, lap: Lap) -> dict[str, Any]:
    """Dense features in float32; one product gives their sums and cross-moments, the rest is in place."""
    y = torch.from_numpy(targets[:, :n_targets]).to(device=case.device, dtype=torch.float32)
    y_and_one = torch.cat([y, torch.ones(len(y), 1, device=case.device)], dim=1).T.contiguous()
    sums = torch.empty(n_targets + 3, case.size.d_sae, device=case.device)
    for columns in case.slices():
        h = torch.addmm(case.bias[columns], acts, case.W_enc[:, columns])
        lap("product")
        h.relu_()
        lap("activation")
        torch.mm(y_and_one, h, out=sums[: n_targets + 1, columns])
        lap("cross-moments")
        torch.sum(h.square_(), dim=0, out=sums[n_targets + 1, columns])
        lap("squares")
        torch.sum(h.sign_(), dim=0, out=sums[n_targets + 2, columns])
        lap("firings")
    sum_hy, (sum_h, sum_sq_h, n_fired) = sums[:n_targets].T, sums[n_targets:]
    return {"sum_h": sum_h, "sum_sq_h": sum_sq_h, "n_fired": n_fired, "sum_hy": sum_hy}


class BareProduct(Product):
    """The product alone; targets are of no use to it."""

    def __call__(self, *inputs: Any, lap: Lap) -> dict[str, Any]:
        return super().__call__(inputs[0], lap=lap)


class Check:
    """Every sum of a contestant on a sample of columns."""

    def __init__(self, case: Case) -> None:
        self.case, self.columns = case, oracle.sample(case.size.d_sae)
        self.features: dict[int, oracle.Bounds] = {}

    def __call__(self, contestant: str, result: dict[str, Any], inputs: tuple[torch.Tensor, oracle.Doubles]) -> float:
        acts, targets = inputs
        if "hidden_pre" in result:
            return oracle.check(self.case, contestant, oracle.product_errors(self.case, acts, result))
        if len(acts) not in self.features:
            self.features[len(acts)] = oracle.features(self.case, acts, self.columns)
        h, y = self.features[len(acts)], targets[:, : result["sum_hy"].shape[1]]
        # Terms of both signs: the error is relative to the sum of their sizes.
        sizes = h.value.T @ np.abs(y)
        scales = {"sum_hy": np.maximum(sizes, sizes.mean())}
        return oracle.check(
            self.case,
            contestant,
            (
                (name, oracle.error(result[name][self.columns], bounds, scales.get(name)))
                for name, bounds in oracle.moment_sums(h, y).items()
            ),
        )
