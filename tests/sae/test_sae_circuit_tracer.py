"""Transcoders of circuit-tracer, against its equations in float64."""

from __future__ import annotations

import json
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
from sts_fast.sae.load import NO_PLACE

CASE = Path(__file__).parents[3] / "shared" / "cases" / "24_circuit_tracer"
needs_case = pytest.mark.skipif(not CASE.is_dir(), reason="the cases are not beside the checkout")
D_IN, D_SAE, K = 6, 20, 4
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}

Arrays = dict[str, np.ndarray]


def tensors(*more: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D_SAE, D_IN), "W_dec": (D_SAE, D_IN)}
    shapes |= {"b_enc": (D_SAE,), "b_dec": (D_IN,), "W_skip": (D_IN, D_IN), "activation_function.threshold": (D_SAE,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["activation_function.threshold"].abs_()
    return {name: made[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", *more)}


def write(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any] | None, name: str = "layer_2") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / f"{name}.safetensors")
    if config is not None:  # JSON is YAML too
        (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def acts(d_in: int = D_IN) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, d_in)).astype(np.float32)


def features(w: Arrays, x: np.ndarray, k: int | None = None) -> np.ndarray:
    """The library's equations: b_dec is not subtracted from the input."""
    pre = x @ w["W_enc"].T + w["b_enc"]
    if k is not None:
        pre = np.where(pre >= np.sort(pre, axis=1)[:, [-k]], pre, 0)
    return np.where(pre > np.maximum(w.get("activation_function.threshold", 0.0), 0), pre, 0)


def check(folder: Path, state: dict[str, torch.Tensor], k: int | None = None) -> None:
    sae, x = load_sae(folder), acts(state["W_enc"].shape[1])
    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    h = features(w, x.astype(np.float64), k)
    check_alike(dense(sae, x), h)
    expected = h @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)
    decoded = sae.reconstruct(x, sts_fast.encode(sae, x))
    assert decoded is not None
    assert np.allclose(decoded, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more", [(), ("W_skip",), ("activation_function.threshold",), ("activation_function.threshold", "W_skip")]
)
def test_features_and_outputs(more: tuple[str, ...], tmp_path: Path) -> None:
    config = {"model_name": "google/gemma-2-2b", "model_kind": "transcoder_set", "scan": "x/y", **HOOKS}
    folder = write(tmp_path, tensors(*more), config)
    sae = load_sae(folder)
    assert (sae.layout, sae.model_name, sae.apply_b_dec_to_input) == ("circuit-tracer", "google/gemma-2-2b", False)
    assert (sae.hook_name, sae.target_hook_name, sae.notes) == ("blocks.2.mlp.hook_in", "blocks.2.mlp.hook_out", ())
    assert sae.architecture == ("jumprelu" if "activation_function.threshold" in more else "standard")
    check(folder, tensors(*more))


def test_topk_by_its_config_or_its_tensor(tmp_path: Path) -> None:
    check(write(tmp_path / "a", tensors(), {"activation": "topk", "k": K, **HOOKS}), tensors(), K)
    check(write(tmp_path / "b", {**tensors(), "k": torch.tensor(K)}, HOOKS), tensors(), K)


def test_without_a_config_or_under_another_name(tmp_path: Path) -> None:
    for name, more in (("layer_2", ()), ("mine", ("W_skip",)), ("mine", ("activation_function.threshold",))):
        folder = write(tmp_path / f"{name}{len(more)}{'_'.join(more)}", tensors(*more), None, name)
        sae = load_sae(folder)
        assert (sae.hook_name, sae.target_hook_name) == ("", "unknown")
        assert sae.notes == (NO_PLACE,)
        assert load_sae(folder, layer=2).notes == ()
        check(folder, tensors(*more))


def test_a_folder_of_several_layers(tmp_path: Path) -> None:
    write(tmp_path, tensors(), HOOKS, "layer_0")
    write(tmp_path, tensors(), HOOKS, "layer_11")
    with pytest.raises(InputError, match=r"several files of weights \(layer_0\.safetensors, layer_11\.safetensors\)"):
        load_sae(tmp_path)
    assert load_sae(tmp_path / "layer_11.safetensors").hook_name == "blocks.11.mlp.hook_in"


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ({"activation": "gelu"}, (), "activation 'gelu' is not supported: use relu, jumprelu or topk"),
        ({"model_kind": "cross_layer_transcoder"}, (), "model_kind 'cross_layer_transcoder' is not supported"),
        ({"activation": "topk"}, (), "k must be a whole number between 1 and d_sae = 20, but is None"),
        ({"activation": "relu"}, ("activation_function.threshold",), "the tensor 'activation_function.threshold' may"),
        ({"input_scale": 3.0}, (), "the key 'input_scale' may change the features"),
        ({"feature_input_hook": 3}, (), "feature_input_hook must be a text, but is 3"),
    ],
)
def test_what_is_refused(config: dict[str, Any], more: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_sae(write(tmp_path, tensors(*more), {**HOOKS, **config}))


@pytest.mark.parametrize("text", ["a: [", "- a\n- b", "\x00"])
def test_a_config_that_is_not_one(text: str, tmp_path: Path) -> None:
    write(tmp_path, tensors(), None)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml (is not readable YAML|does not hold names with values)"):
        load_sae(tmp_path)


@needs_case
def test_the_case() -> None:
    sae = load_sae(CASE)
    assert (sae.hook_name, sae.target_hook_name) == ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
    check(CASE, load_file(CASE / "layer_2.safetensors"))
