"""SAEs of every architecture whose features are exact in float32, and the same features in float64 by the equations.

Activations and weights are small whole numbers, biases whole numbers and binary fractions, scales powers of two: every
product and sum is then exact whatever its order, so that tests may ask for equality. Nothing of sts_fast's computing
code is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sts_fast.sae import SAE

Doubles = NDArray[np.float64]

ARCHITECTURES = ("standard", "jumprelu", "gated", "topk", "abstopk")
KINDS = (*ARCHITECTURES, "topk, rescaled")


@dataclass(frozen=True)
class Put:
    """Gives rows to the ops as numpy arrays, for the core, or as tensors; what is no plain array stays as it is."""

    as_tensors: bool

    def __call__(self, acts: Any) -> Any:
        if not self.as_tensors or type(acts) is not np.ndarray:
            return acts
        import torch

        return torch.from_numpy(acts)

    @property
    def rounding(self) -> float:
        """Of sums, relative to the largest: on a device squares, targets and sums over a group of rows are float32."""
        return 1e-6 if self.as_tensors else 0.0


def assert_sums(actual: dict[str, Any], expected: dict[str, Any], rounding: float = 0.0) -> None:
    """Of one type and equal, to the last bit or to `rounding`; whole numbers to the last bit."""
    for name, value in expected.items():
        got, wanted = np.asarray(actual[name]), np.asarray(value)
        assert got.dtype == wanted.dtype, name
        allowed = rounding * np.abs(wanted).max(initial=0) if wanted.dtype.kind == "f" else 0
        np.testing.assert_allclose(got, wanted, rtol=0, atol=allowed, err_msg=name)


def make_sae(kind: str = "standard", *, d_in: int = 24, d_sae: int = 70, k: int = 9, seed: int = 0) -> SAE:
    rng = np.random.default_rng(seed)

    def whole(low: int, high: int, *shape: int) -> NDArray[np.float32]:
        return rng.integers(low, high + 1, shape).astype(np.float32)

    # Fractions of 2048 that all differ, so that a row never has two equal pre-activations; odd ones, so that features
    # that are scaled by two differ from the others too.
    fractions = ((2 * rng.permutation(d_sae) + 1) / 2048).astype(np.float32)
    own: dict[str, Any] = {"b_enc": whole(-20, 4, d_sae) + fractions}
    if kind == "jumprelu":
        own["threshold"] = whole(0, 9, d_sae) + np.float32(0.25)
    elif kind == "gated":
        # exp of r_mag, rounded to float32, is 1/2, 1 or 2.
        own = {"b_enc": np.zeros(d_sae, np.float32), "r_mag": (np.log(2.0) * whole(-1, 1, d_sae)).astype(np.float32)}
        own |= {"b_mag": whole(-20, 4, d_sae) + fractions, "b_gate": whole(-20, 4, d_sae) + fractions}
    elif "topk" in kind:
        own["k"] = k
    if kind == "topk, rescaled":
        own["W_dec_norm"] = whole(0, 1, d_sae) + 1
    return SAE(
        architecture=kind.partition(",")[0],
        W_enc=whole(-3, 3, d_in, d_sae),
        b_dec=whole(-2, 2, d_in),
        source=f"exact {kind}",
        **own,
    )


def make_acts(n_tokens: int, d_in: int = 24, *, seed: int = 0) -> NDArray[np.float32]:
    """[n_tokens, d_in] whole numbers, which are exact in bfloat16 too."""
    return np.random.default_rng([seed, 1]).integers(-4, 5, (n_tokens, d_in)).astype(np.float32)


def features(sae: SAE, acts: Any) -> Doubles:
    """[n_tokens, d_sae] float64 features, by the equations in the docstring of SAE."""
    x = np.asarray(acts, np.float64) * sae.input_scale
    if sae.input_norm == "layer_norm":
        x = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-5)
    elif sae.input_norm == "constant_norm_rescale":
        x = x * np.sqrt(sae.d_in) / np.sqrt((x**2).sum(axis=1, keepdims=True))
    if sae.apply_b_dec_to_input:
        x = x - sae.b_dec
    p = x @ np.asarray(sae.W_enc, np.float64)
    pre = p + sae.b_enc
    if sae.architecture == "standard":
        return np.maximum(pre, 0)
    if sae.architecture == "jumprelu":
        return np.where(pre > sae.threshold, np.maximum(pre, 0), 0)
    if sae.architecture == "gated":
        scale = np.exp(sae.r_mag, dtype=np.float64).astype(np.float32)
        return np.where(p + sae.b_gate > 0, np.maximum(scale * p + sae.b_mag, 0), 0)
    if sae.W_dec_norm is not None:
        pre = pre * sae.W_dec_norm
    absolute = sae.architecture == "abstopk"
    h = np.zeros_like(pre)
    for row, values in enumerate(pre):
        rank = abs(values) if absolute else values
        for j in sorted(range(sae.d_sae), key=lambda j: -rank[j])[: sae.k]:
            h[row, j] = values[j] if absolute else max(values[j], 0)
    return h
