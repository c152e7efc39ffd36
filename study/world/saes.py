"""Sparse autoencoders of several kinds, widths and sparsities, trained in seconds on the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["topk", "jumprelu", "standard", "untrained"]

N_STEPS, BATCH, LEARNING_RATE = 250, 256, 2e-3
# Weight of the sum of activations in a standard SAE's loss, such that about 16 fire on a row.
SPARSITY = 0.02


@dataclass(frozen=True)
class Variant:
    """topk: the k largest fire. jumprelu: trained so that k fire on average, saved with one threshold.

    standard: relu and a penalty on the sum of activations. untrained: topk with random directions
    """

    kind: Kind = "topk"
    d_sae: int = 1024
    k: int = 16

    def train(self, x: torch.Tensor, seed: int) -> Encoder:
        """On rows [n, d_in] of the residual stream."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        scale = x.shape[1] ** 0.5 / float(x.norm(dim=1).mean())
        x = x * scale
        variance = (x - x.mean(dim=0)).square().sum(dim=1).mean()
        directions = torch.nn.functional.normalize(torch.randn(self.d_sae, x.shape[1], generator=generator), dim=1)
        W_enc, b_enc, W_dec, b_dec = directions.T.clone(), torch.zeros(self.d_sae), directions.clone(), x.mean(dim=0)
        parameters = [tensor.requires_grad_() for tensor in (W_enc, b_enc, W_dec, b_dec)]
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
        threshold = 0.0
        for step in range(0 if self.kind == "untrained" else N_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 30) * (1 - 0.95 * step / N_STEPS)
            rows = x[torch.randint(len(x), (BATCH,), generator=generator)]
            pre = (rows - b_dec) @ W_enc + b_enc
            if self.kind == "jumprelu":
                least = pre.detach().flatten().topk(self.k * BATCH).values[-1]
                threshold = 0.98 * threshold + 0.02 * float(least) if step else float(least)
                h = torch.where(pre > least.clamp(min=0), pre, 0.0)
            else:
                h = self._fire(pre, 0.0)
            loss = (rows - h @ W_dec - b_dec).square().sum(dim=1).mean() / variance
            if self.kind == "standard":
                loss = loss + SPARSITY * h.sum(dim=1).mean() / x.shape[1] ** 0.5
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                W_dec.copy_(torch.nn.functional.normalize(W_dec, dim=1))
        W_enc, b_enc, W_dec, b_dec = (tensor.detach() for tensor in parameters)
        encoder = Encoder(self, W_enc, b_enc, b_dec, max(threshold, 0.0), scale)
        h = encoder.encode(x[:4096] / scale)
        error = (x[:4096] - h @ W_dec - b_dec).square().sum(dim=1).mean() / variance
        return Encoder(self, W_enc, b_enc, b_dec, encoder.threshold, scale, float(error), float((h > 0).sum()) / len(h))

    def _fire(self, pre: torch.Tensor, threshold: float) -> torch.Tensor:
        import torch

        if self.kind in ("topk", "untrained"):
            values, indices = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, indices, values.relu())
        return torch.where(pre > threshold, pre, 0.0).relu()


@dataclass(frozen=True)
class Encoder:
    """fvu: share of variance that is not explained; l0: features that fire on a row."""

    variant: Variant
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    b_dec: torch.Tensor
    threshold: float
    scale: float
    fvu: float = 0.0
    l0: float = 0.0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_sae] feature activations of [..., d_in]."""
        pre = (x * self.scale - self.b_dec) @ self.W_enc + self.b_enc
        return self.variant._fire(pre, self.threshold)
