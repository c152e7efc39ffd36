"""The features of rows, of an SAE with random weights: ours, SAELens' encode and sparsify's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import bench_encode
from benchmarks.bench_encode import Check, Entries, Lap
from benchmarks.cases import Case, Contestant, Size
from benchmarks.peers.question import Question, peer

SIZE = Size(d_in=768, d_sae=24576, rows=2048)


def topk(size: Size = SIZE) -> Question:
    case = Case(size, "topk")
    return Question(
        f"The {case.sae.k} largest features of each of {size.rows:,} rows; SAE {size.d_in:,} × {size.d_sae:,}",
        (case.base,),
        (case.base[:512],),
        [*contestants(case), peer("sparsify", partial(sparsify, case))],
        Check(case, columns=np.arange(size.d_sae)),
    )


def relu(size: Size = SIZE) -> Question:
    case = Case(size, "standard")
    return Question(
        f"The active features of {size.rows:,} rows; ReLU SAE {size.d_in:,} × {size.d_sae:,}, about 64 active in a row",
        (case.base,),
        (case.base[:512],),
        contestants(case),
        Check(case),
        lacking={"sparsify": "it has TopK and GroupMax SAEs, none with ReLU alone"},
    )


def contestants(case: Case) -> list[Contestant]:
    return [
        Contestant("sts_fast", partial(bench_encode.ours, case)),
        Contestant("sts_fast, torch backend", partial(bench_encode.torch_ours, case)),
        peer("SAELens", partial(bench_encode.SaeLens, case)),
    ]


def sparsify(case: Case) -> Callable[[torch.Tensor, Lap], Entries]:
    coder = sparse_coder(case)

    def run(acts: torch.Tensor, lap: Lap) -> Entries:
        of_rows = coder.encode(acts)
        rows = torch.arange(len(acts)).repeat_interleave(case.sae.k)
        return Entries(rows, of_rows.top_indices.flatten(), of_rows.top_acts.flatten())

    return run


def sparse_coder(case: Case) -> Any:
    """The case's TopK SAE as sparsify builds it: the encoder's weights in its layout, [d_sae, d_in]."""
    from sparsify import SparseCoder, SparseCoderConfig

    size = case.size
    coder = SparseCoder(size.d_in, SparseCoderConfig(num_latents=size.d_sae, k=case.sae.k), decoder=False)
    coder.requires_grad_(False)
    coder.encoder.weight.copy_(case.W_enc.T)
    coder.encoder.bias.copy_(case.b_enc)
    coder.b_dec.copy_(case.b_dec)
    return coder
