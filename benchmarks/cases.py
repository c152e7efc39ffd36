"""What is timed: an SAE and activations of one size, and the contestants that compute the same from them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from sts_fast.sae import SAE

L0 = 64  # features that fire in a row, about, whatever the width
TOP_K = 64
SLICE_BYTES = 2**30  # a dense peer works on slices of columns where one of its tensors would be larger


@dataclass(frozen=True)
class Size:
    d_in: int
    d_sae: int
    rows: int  # of activations; pairs of rows, for the shift


@lru_cache(maxsize=1)
def weights(d_in: int, d_sae: int) -> torch.Tensor:
    """[d_in, d_sae] float32, such that the product with a row of unit variance has unit variance."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(d_in, d_sae, generator=generator).div_(d_in**0.5)


class Case:
    """Random weights and activations of one size, and the same SAE as sts_fast and as sae-lens know it.

    W_enc [d_in, d_sae], b_enc and threshold [d_sae], b_dec [d_in]: float32, on the device
    bias [d_sae] float32: b_enc - b_dec W_enc, computed in float64, for peers that fold what is constant
    base, other [rows, d_in] float32: paired rows, a shift apart
    tolerance: relative error that a result may have; a pre-activation so near its threshold may fire or not
    """

    def __init__(self, size: Size, architecture: str = "standard", device: str = "cpu") -> None:
        self.size, self.architecture, self.device = size, architecture, device
        self.tolerance = 1e-5 if device == "cpu" else 1e-4  # float32, or weights and activations as two bfloat16
        d_in, d_sae = size.d_in, size.d_sae
        generator = torch.Generator().manual_seed(1)
        self.W_enc = weights(d_in, d_sae).to(device)
        self.base = torch.randn(size.rows, d_in, generator=generator).to(device)
        self.other = self.base + 0.3 * torch.randn(size.rows, d_in, generator=generator).to(device)
        # Pre-activations are about normal with deviation 1, so that this quantile leaves L0 of them.
        border = statistics.NormalDist().inv_cdf(1 - min(L0 / d_sae, 0.5))
        self.b_dec = (0.1 * torch.randn(d_in, generator=generator)).to(device)
        self.b_enc = torch.full((d_sae,), -border if architecture == "standard" else 0.0, device=device)
        self.threshold = torch.full((d_sae,), border, device=device) if architecture == "jumprelu" else None
        through = [self.b_dec.double() @ block.double() for block in self.W_enc.split(8192, dim=1)]
        self.bias = (self.b_enc.double() - torch.cat(through)).float()
        self.sae = SAE(
            architecture=architecture,
            W_enc=weights(d_in, d_sae),
            b_enc=self.b_enc.cpu().numpy(),
            b_dec=self.b_dec.cpu().numpy(),
            threshold=None if self.threshold is None else self.threshold.cpu().numpy(),
            k=TOP_K if architecture == "topk" else 0,
        )

    def activate(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """The activation in place: [n_tokens, d_sae] features in the memory of hidden_pre."""
        if self.threshold is None:
            return hidden_pre.relu_()
        return hidden_pre.mul_(hidden_pre > self.threshold)

    def slices(self) -> Iterator[slice]:
        """Slices of columns such that a dense [rows, columns] float32 tensor takes no more than SLICE_BYTES."""
        n = -(-self.size.rows * self.size.d_sae * 4 // SLICE_BYTES)
        width = -(-self.size.d_sae // n)
        return (slice(start, min(start + width, self.size.d_sae)) for start in range(0, self.size.d_sae, width))

    def sae_lens(self, columns: slice = slice(None)) -> Any:
        """The SAE of these columns as sae-lens builds it, on the same weights; its decoder is left empty."""
        from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

        W_enc, parameter = self.W_enc[:, columns], torch.nn.Parameter
        shape: dict[str, Any] = {"d_in": W_enc.shape[0], "d_sae": W_enc.shape[1], "device": "meta"}
        with torch.device("meta"):
            sae: Any = {
                "standard": lambda: StandardSAE(StandardSAEConfig(**shape)),
                "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**shape)),
                "topk": lambda: TopKSAE(TopKSAEConfig(**shape, k=TOP_K)),
            }[self.architecture]()
        sae.W_enc, sae.b_enc = parameter(W_enc), parameter(self.b_enc[columns])
        sae.b_dec = parameter(self.b_dec)
        if self.threshold is not None:
            sae.threshold = parameter(self.threshold[columns])
        return sae.requires_grad_(False)


@dataclass
class Contestant:
    """One way to compute the result. `run(*inputs, lap)` calls lap(part) after each part of its work.

    prepare: what need not be timed, such as memory allocated once
    """

    name: str
    run: Callable[..., Any]
    prepare: Callable[[], object] = field(default=lambda: None)


@dataclass
class Bench:
    """One op at one size, our contestants first.

    inputs: arrays with a row per token, given to every contestant
    flops:  multiplications and additions of our product
    check:  (contestant's name, result, inputs) -> largest relative error; raises oracle.WrongResult
    """

    op: str
    case: Case
    inputs: tuple[torch.Tensor | np.ndarray[Any, Any], ...]
    flops: int
    contestants: list[Contestant]
    check: Callable[[str, Any, tuple[Any, ...]], float]


class Product:
    """The bare product in torch, into memory that torch allocated before: what any dense encoder pays at least.

    Returns {"hidden_pre": the last slice of columns of the last member, "columns": which these are}.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.out = case, torch.empty(0)

    def prepare(self) -> None:
        self.reserve(self.case.size.rows)

    def reserve(self, rows: int) -> None:
        widest = next(self.case.slices()).stop
        if self.out.numel() < rows * widest:
            self.out = torch.zeros(rows * widest, device=self.case.device)

    def __call__(self, *members: torch.Tensor, lap: Callable[[str], None]) -> dict[str, Any]:
        self.reserve(len(members[0]))
        for columns in self.case.slices():
            W_enc = self.case.W_enc[:, columns]
            for acts in members:
                out = self.out[: len(acts) * W_enc.shape[1]].view(len(acts), W_enc.shape[1])
                torch.mm(acts, W_enc, out=out)
        return {"hidden_pre": out, "columns": columns}
