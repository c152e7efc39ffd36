"""SAEs of OpenAI's sparse_autoencoder, against its equations in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_features import check_alike, dense

import sts_fast
from sts_fast.errors import InputError
from sts_fast.sae import load_sae
from sts_fast.sae.openai import ASSUMED

CASE = Path(__file__).parents[3] / "shared" / "cases" / "23_openai_names"
STORIES = Path(__file__).parents[3] / "shared" / "assets" / "models" / "stories260K"
needs_case = pytest.mark.skipif(not CASE.is_dir(), reason="the cases are not beside the checkout")
D_IN, D_SAE, K = 6, 20, 4

Arrays = dict[str, np.ndarray]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE)}
    shapes |= {"pre_bias": (D_IN,), "latent_bias": (D_SAE,)}
    statistics = {"stats_last_nonzero": torch.ones(D_SAE, dtype=torch.long), "latents_mean_square": torch.ones(D_SAE)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | statistics


def acts() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, D_IN)).astype(np.float32) * 3 + 1


def float64(state: dict[str, torch.Tensor]) -> Arrays:
    return {name: value.double().numpy() for name, value in state.items()}


def normed(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, deviation = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
    return (x - mean) / (deviation + 1e-5), mean, deviation


def latents(w: Arrays, x: np.ndarray, k: int | None) -> np.ndarray:
    pre = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    kept = pre if k is None else np.where(pre >= np.sort(pre, axis=1)[:, [-k]], pre, 0)
    return np.maximum(kept, 0)


def test_relu(tmp_path: Path) -> None:
    w = float64(tensors())
    torch.save({**tensors(), "activation": "ReLU", "activation_state_dict": {}}, tmp_path / "3.pt")
    sae = load_sae(tmp_path / "3.pt", layer=3)
    assert (sae.layout, sae.architecture, sae.input_norm, ASSUMED in sae.notes) == ("OpenAI", "standard", "none", False)
    h = latents(w, acts().astype(np.float64), None)
    check_alike(dense(sae, acts()), h)
    decoded = sae.reconstruct(acts(), sts_fast.encode(sae, acts()))
    assert decoded is not None
    assert np.allclose(decoded, h @ w["decoder.weight"].T + w["pre_bias"], rtol=1e-4, atol=1e-4)


def test_topk_is_on_layer_normed_inputs(tmp_path: Path) -> None:
    w = float64(tensors())
    state = {"k": K, "postact_fn": "ReLU"}
    torch.save({**tensors(), "activation": "TopK", "activation_state_dict": state}, tmp_path / "3.pt")
    sae = load_sae(tmp_path / "3.pt")
    assert (sae.architecture, sae.k, sae.input_norm) == ("topk", K, "layer_norm")
    x, mean, deviation = normed(acts().astype(np.float64))
    h = latents(w, x, K)
    check_alike(dense(sae, acts()), h)
    decoded = sae.reconstruct(acts(), sts_fast.encode(sae, acts()))
    assert decoded is not None
    expected = (h @ w["decoder.weight"].T + w["pre_bias"]) * deviation + mean
    assert np.allclose(decoded, expected, rtol=1e-4, atol=1e-4)


def test_tied_decoder_and_no_name_of_an_activation(tmp_path: Path) -> None:
    state = tensors()
    del state["decoder.weight"]
    save_file({**state, "decoder.linear.weight": state["encoder.weight"] * 1}, tmp_path / "a.safetensors")
    sae = load_sae(tmp_path / "a.safetensors")
    assert ASSUMED in sae.notes
    rows = sae.decoder_rows([5, 0])
    assert rows is not None
    assert torch.equal(rows, state["encoder.weight"][[5, 0]])


@pytest.mark.parametrize(
    ("place", "hook"),
    [
        ("resid_post_mlp_v5_32k/autoencoders/8.pt", "blocks.8.hook_resid_post"),
        ("resid_delta_attn_v5_128k/autoencoders/11.pt", "blocks.11.hook_attn_out"),
        ("resid_delta_mlp/autoencoders/0.pt", "blocks.0.hook_mlp_out"),
        ("resid_post_attn_v5_32k/autoencoders/5.pt", "blocks.5.hook_resid_mid"),
        ("mlp_post_act/autoencoders/5.pt", ""),
    ],
)
def test_places_of_the_published_saes(place: str, hook: str, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(parents=True)
    torch.save({**tensors(), "activation": "ReLU", "activation_state_dict": {}}, tmp_path / place)
    sae = load_sae(tmp_path / place)
    assert (sae.hook_name, sae.model_name) == (hook, "gpt2-small" if hook else "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation": "Identity"}, "activation 'Identity' is not supported: use an SAE with ReLU or TopK"),
        (
            {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "Identity"}},
            "activation 'TopK with Identity' is not supported",
        ),
        ({"activation": "TopK", "activation_state_dict": {"k": 21}}, "k must be a whole number between 1 and d_sae"),
        ({"activation": "TopK", "activation_state_dict": {"k": 3, "sign": "any"}}, "the key 'sign' may change"),
        ({"activation": "ReLU", "input_norm": "rms"}, "the key 'input_norm' may change the features"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save({**tensors(), **values}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=message):
        load_sae(tmp_path / "a.pt")


@needs_case
def test_the_case_on_its_model() -> None:
    """The residual stream of stories260K after layer 2: 197 features a token, where without latent_bias 262 fire."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    ids = tokenizer("Once upon a time there was a little girl who had a red ball.", return_tensors="pt").input_ids
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[3][0, 1:].numpy()
    w = float64(load_file(CASE / "ae.safetensors"))
    expected = latents(w, x.astype(np.float64), None)
    check_alike(dense(load_sae(CASE), x), expected)
    without = latents(w | {"latent_bias": np.zeros(512)}, x.astype(np.float64), None)
    assert (expected > 0).sum() < 0.9 * (without > 0).sum()
