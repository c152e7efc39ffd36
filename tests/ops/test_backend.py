"""The folding of b_dec, rescaling and gates, against the equations taken literally in float64."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_sae import ARCHITECTURES, KINDS, features, make_acts, make_sae

from sts_fast import encode
from sts_fast.ops import backend, cuda_kernels
from sts_fast.sae import SAE


def random_sae(kind: str, d_in: int = 300, d_sae: int = 128) -> SAE:
    """Weights as training leaves them, with a b_dec that is far larger than the features; W_enc has unit columns."""
    rng = np.random.default_rng(3)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(np.float32)

    sae = make_sae(kind, d_in=d_in, d_sae=d_sae)
    changes = {"W_enc": normal(d_in, d_sae, scale=d_in**-0.5), "b_dec": normal(d_in, scale=5), "b_enc": normal(d_sae)}
    if kind == "jumprelu":
        changes["threshold"] = np.abs(normal(d_sae))
    if kind == "gated":
        changes |= {"r_mag": normal(d_sae), "b_mag": normal(d_sae), "b_gate": normal(d_sae), "b_enc": 0 * normal(d_sae)}
    if kind == "topk, rescaled":
        changes["W_dec_norm"] = np.abs(normal(d_sae)) + 0.5
    return replace(sae, **changes)


def encode_dense(sae: SAE, acts: np.ndarray) -> np.ndarray:
    found = encode(sae, acts)
    values = np.zeros((len(acts), sae.d_sae))
    values[np.repeat(np.arange(len(acts)), np.diff(found.indptr)), found.indices] = found.values
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_folding_changes_nothing(kind: str, apply_b_dec_to_input: bool) -> None:
    sae = replace(random_sae(kind), apply_b_dec_to_input=apply_b_dec_to_input)
    acts = np.random.default_rng(4).normal(size=(400, sae.d_in)).astype(np.float32)
    if apply_b_dec_to_input:
        acts += sae.b_dec
    expected, actual = features(sae, acts), encode_dense(sae, acts)
    scale = expected.max()
    flipped = (expected != 0) != (actual != 0)
    assert flipped.mean() < 1e-4
    # A firing that flips lies at its threshold: of relu and topk its value is then next to nothing or next to the k-th.
    assert np.abs(np.where(flipped, 0, expected - actual)).max() <= 1e-5 * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"input_scale": 0.0371}, {"input_norm": "layer_norm"}], ids=["scale", "layer_norm"])
def test_scale_and_norm_of_the_input_come_before_b_dec(kind: str, change: dict[str, Any]) -> None:
    sae = replace(random_sae(kind), **change)
    acts = np.random.default_rng(4).normal(loc=2, scale=30, size=(400, sae.d_in)).astype(np.float32)
    expected, actual = features(sae, acts), encode_dense(sae, acts)
    flipped = (expected != 0) != (actual != 0)
    assert flipped.mean() < 1e-4
    assert 0.02 < (expected != 0).mean() < 0.98
    assert np.abs(np.where(flipped, 0, expected - actual)).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_the_input_is_exact_where_float32_is(kind: str) -> None:
    sae, acts = replace(make_sae(kind), input_scale=0.25), 4 * make_acts(60)
    assert np.array_equal(encode_dense(sae, acts), features(sae, acts))


@pytest.mark.parametrize("input_norm", ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "topk, rescaled", "abstopk, rescaled"])
def test_features_are_those_of_sae_lens(architecture: str, input_norm: str) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    architecture, _, rescaled = architecture.partition(", ")
    sae = random_sae(architecture)
    W_dec = np.random.default_rng(6).normal(size=(sae.d_sae, sae.d_in)).astype(np.float32)
    config: dict[str, Any] = {"architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "metadata": {}}
    config |= {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": input_norm}
    if sae.k:
        config |= {"rescale_acts_by_decoder_norm": bool(rescaled), "k": sae.k}
    theirs = sae_lens.SAE.from_dict(config)
    tensors = {"W_enc": sae.W_enc, "W_dec": W_dec, "b_dec": sae.b_dec, "threshold": sae.threshold, "r_mag": sae.r_mag}
    tensors |= {"b_mag": sae.b_mag, "b_gate": sae.b_gate, "b_enc": None if architecture == "gated" else sae.b_enc}
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items() if value is not None})
    acts = np.random.default_rng(5).normal(loc=1, scale=3, size=(300, sae.d_in)).astype(np.float32)
    if input_norm == "expected_average_only_in":
        mine = replace(sae, input_scale=0.31)
        theirs.fold_activation_norm_scaling_factor(0.31)
    else:
        mine = replace(sae, input_norm=input_norm)
    if rescaled:
        # Of the decoder as it is after folding, which divides it by the factor.
        mine = replace(mine, W_dec_norm=theirs.W_dec.detach().norm(dim=1).numpy())
    with torch.no_grad():
        expected = theirs.double().encode(torch.from_numpy(acts).double()).numpy()
    actual = encode_dense(mine, acts)
    flipped = (expected != 0) != (actual != 0)
    assert flipped.mean() < 1e-4
    assert (expected != 0).mean() > 0.02
    assert np.abs(np.where(flipped, 0, expected - actual)).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_norm": "rms_norm"}, "input_norm 'rms_norm' is not one of none, layer_norm, constant_norm_rescale"),
        ({"input_scale": 0.0}, "input_scale must be a positive number, but is 0.0"),
        ({"input_scale": float("nan")}, "input_scale must be a positive number, but is nan"),
        ({"input_scale": 2.0, "input_norm": "layer_norm"}, "input_scale must be 1 where input_norm is layer_norm"),
    ],
)
def test_a_scale_or_norm_that_makes_no_sense_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(make_sae(), **change)


def test_a_fingerprint_knows_scale_and_norm() -> None:
    sae = make_sae()
    others = [replace(sae, input_scale=2.0), replace(sae, input_norm="layer_norm"), replace(sae)]
    assert [other.fingerprint == sae.fingerprint for other in others] == [False, False, True]


def test_b_dec_is_folded_in_float64() -> None:
    # b_dec W cancels to 1/16 out of products of 2^30: in float32 the sum would be off by many units.
    d_in = 3
    W_enc = np.array([[2.0**15], [-(2.0**15)], [2.0**-4]], np.float32)
    b_dec = np.array([2.0**15, 2.0**15, 1.0], np.float32)
    sae = SAE(architecture="standard", W_enc=W_enc, b_enc=np.ones(1, np.float32), b_dec=b_dec)
    assert encode(sae, np.zeros((1, d_in), np.float32)).values.tolist() == [1 - 2.0**-4]


@pytest.mark.parametrize("d_in", [1, 127, 128, 129, 300])
def test_b_dec_is_folded_whole_whatever_the_width(d_in: int) -> None:
    sae = make_sae("standard", d_in=d_in)
    acts = make_acts(20, d_in)
    assert np.array_equal(encode_dense(sae, acts), features(sae, acts))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_are_folded_as_their_values_say(kind: str) -> None:
    sae, acts = make_sae(kind), make_acts(60)
    as_bfloat16 = sae.with_dtype("bfloat16")
    assert as_bfloat16.W_enc.dtype == torch.bfloat16
    assert np.array_equal(encode_dense(as_bfloat16, acts), features(sae, acts))


def test_an_sae_is_folded_once_and_forgotten_with_it() -> None:
    sae = make_sae()
    assert backend.encoder(sae) is backend.encoder(sae)
    assert backend.encoder(replace(sae)) is not backend.encoder(sae)
    gone = weakref.ref(sae)
    del sae
    gc.collect()
    assert gone() is None


def test_cuda_is_ready_or_says_why_not() -> None:
    reason = cuda_kernels.missing_reason()
    assert reason is None or (len(reason) > 10 and "\n" not in reason)


def test_weights_with_nan_are_refused_at_first_use() -> None:
    sae = replace(make_sae(), apply_b_dec_to_input=False)
    sae.W_enc[3, 5] = np.nan
    with pytest.raises(ValueError, match="W_enc"):
        encode(sae, make_acts(3))
