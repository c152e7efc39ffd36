"""Training and saving of the organism's TopK SAE."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sts_fast.data.prompts import Progress

D_SAE = 1024
K = 16
N_STEPS = 1000
BATCH = 1024
LEARNING_RATE = 2e-3
REVIVE_EVERY = 150
VARIANCE_ROWS = 200_000


@dataclass(frozen=True)
class TopK:
    """A TopK SAE: x ~ b_dec + W_dec^T h, with h the positive ones of the k largest of (x - b_dec) W_enc + b_enc.

    W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in] with rows of norm 1, b_dec [d_in]
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    k: int = K

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[n, d_sae] feature activations of rows [n, d_in]."""
        import torch

        hidden_pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = hidden_pre.topk(self.k, dim=-1)
        return torch.zeros_like(hidden_pre).scatter(-1, indices, values.relu())

    def decode(self, h: torch.Tensor) -> torch.Tensor:
        """[n, d_in] reconstruction from feature activations [n, d_sae]."""
        return h @ self.W_dec + self.b_dec


def train_sae(
    x: torch.Tensor,
    seed: int,
    progress: Progress,
    n_steps: int = N_STEPS,
    *,
    d_sae: int = D_SAE,
    k: int = K,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
) -> TopK:
    """Trains an SAE on rows [n, d_in] of the residual stream.

    Features that have not fired for 100 steps are reset to the errors of rows drawn in proportion to squared error.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    # Rows are scaled to a mean norm of sqrt(d_in), so that the step size suits any model; undone at the end.
    scale = x.shape[1] ** 0.5 / float(x.norm(dim=1).mean())
    x = x * scale
    first = x[:VARIANCE_ROWS]
    variance = (first - first.mean(dim=0)).square().sum(dim=1).mean()
    directions = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[1], generator=generator), dim=1)
    sae = TopK(directions.T.clone(), torch.zeros(d_sae), directions.clone(), x.mean(dim=0), k)
    parameters = [tensor.requires_grad_() for tensor in sae.tensors().values()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99), fused=True)
    silent_for = torch.zeros(d_sae)
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (1 - 0.95 * step / n_steps)
        rows = x[torch.randint(len(x), (batch,), generator=generator)]
        h = sae.encode(rows)
        error = rows - sae.decode(h)
        loss = error.square().sum(dim=1).mean() / variance
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
            silent_for = torch.where((h > 0).any(dim=0), 0, silent_for + 1)
            dead = (silent_for > 100).nonzero()[:, 0]
            if len(dead) and step % REVIVE_EVERY == REVIVE_EVERY - 1 and step < 0.8 * n_steps:
                worst = torch.multinomial(error.square().sum(dim=1), len(dead), generator=generator)
                sae.W_dec[dead] = torch.nn.functional.normalize(error[worst], dim=1)
                sae.W_enc[:, dead] = 0.8 * sae.W_dec[dead].T
                sae.b_enc[dead] = 0
                silent_for[dead] = 0
        progress("SAE", step + 1, n_steps)
    W_enc, b_enc, W_dec, b_dec = (tensor.detach() for tensor in parameters)
    return TopK(W_enc.contiguous(), b_enc / scale, W_dec.contiguous(), b_dec / scale, k)


def quality(sae: TopK, x: torch.Tensor) -> dict[str, float]:
    """Share of unexplained variance (fvu), mean number of features firing on a row (l0), features that never fire."""
    h = sae.encode(x)
    unexplained = (x - sae.decode(h)).square().sum() / (x - x.mean(dim=0)).square().sum()
    fires = h > 0
    return {
        "fvu": float(unexplained),
        "l0": float(fires.sum()) / len(x),
        "n_dead": int((~fires.any(dim=0)).sum()),
    }


def save_sae(sae: TopK, folder: Path, *, layer: int, model_name: str, prepend_bos: bool = True) -> None:
    """Writes a folder in SAELens 6's layout: cfg.json and sae_weights.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "topk",
        "d_in": sae.W_enc.shape[0],
        "d_sae": sae.W_enc.shape[1],
        "k": sae.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": "6.0.0",  # whose layout this is
            "model_name": model_name,
            "hook_name": f"model.layers.{layer}",
            "prepend_bos": prepend_bos,
        },
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(sae.tensors(), folder / "sae_weights.safetensors")
