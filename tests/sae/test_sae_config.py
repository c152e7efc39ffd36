"""Tensors and keys that no reader understands are refused by name, in every layout; those of training are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_scope_layout import write_llama_scope
from safetensors.torch import load_file, save_file
from test_sae import D_IN, D_SAE, tensors_of, write_sae

import sts_fast
from sts_fast.errors import InputError
from sts_fast.sae import load_sae

ASSETS = Path(__file__).parents[3] / "shared" / "assets" / "saes"
CASES = Path(__file__).parents[3] / "shared" / "cases"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the published SAEs are not beside the checkout")
RECORDED = Path(__file__).parents[1] / "recorded" / "dictionary_learning"


def acts() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, D_IN)).astype(np.float32)


def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def linear() -> dict[str, torch.Tensor]:
    w = tensors_of("standard")
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    return contiguous(tensors)


def saelens(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    return write_sae(folder, tensors=extra)


def gemma_scope(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in (tensors_of("jumprelu") | extra).items()})
    return folder


def gemma_scope_2(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    tensors = {name.lower(): tensor for name, tensor in tensors_of("jumprelu").items()}
    save_file(tensors | extra, folder / "params.safetensors")
    return folder


def llama_scope(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    folder = write_llama_scope(folder / f"with_{'_'.join(extra)}", tensors_of("standard"))
    file = folder / "checkpoints" / "final.safetensors"
    save_file(load_file(file) | extra, file)
    return folder


def sparsify(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    (folder / "cfg.json").write_text(json.dumps({"k": 3, "d_in": D_IN, "num_latents": D_SAE}))
    save_file(linear() | extra, folder / "sae.safetensors")
    return folder


def dictionary_learning(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    state = torch.load(RECORDED / "AutoEncoder" / "ae.pt", weights_only=True)
    (folder / "config.json").write_text((RECORDED / "AutoEncoder" / "config.json").read_text())
    torch.save(state | extra, folder / "ae.pt")
    return folder


def qwen_scope(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    w = tensors_of("topk")
    torch.save(w | {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "k": 5} | extra, folder / "layer7.sae.pt")
    return folder


def goodfire(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    w = tensors_of("standard")
    state = {"encoder_linear.weight": w["W_enc"].T, "encoder_linear.bias": w["b_enc"]}
    state |= {"decoder_linear.weight": w["W_dec"].T, "decoder_linear.bias": w["b_dec"]}
    torch.save(state | extra, folder / "Llama-3.1-8B-Instruct-SAE-l19.pt")
    return folder


def openai(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    w = tensors_of("standard")
    tensors = {"encoder.weight": w["W_enc"].T, "latent_bias": w["b_enc"], "pre_bias": w["b_dec"]}
    save_file(contiguous(tensors) | extra, folder / "ae.safetensors")
    return folder


def circuit_tracer(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    w = tensors_of("standard")
    save_file(contiguous(w | {"W_enc": w["W_enc"].T}) | extra, folder / "layer_2.safetensors")
    return folder


def named(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    save_file(tensors_of("standard") | extra, folder / "a.safetensors")
    return folder


def named_npz(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    np.savez(folder / "a.npz", **{name: tensor.numpy() for name, tensor in (tensors_of("gated") | extra).items()})
    return folder


LAYOUTS: dict[str, Callable[[Path, dict[str, torch.Tensor]], Path]] = {
    function.__name__: function
    for function in (
        saelens, gemma_scope, gemma_scope_2, llama_scope, sparsify, dictionary_learning, qwen_scope, goodfire, openai,
        circuit_tracer, named, named_npz,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", ["input_gain", "threshold_2", "W_rotation", "log_scale"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_is_not_understood_is_refused(layout: str, name: str, tmp_path: Path) -> None:
    load_sae(LAYOUTS[layout](tmp_path, {}))
    with pytest.raises(InputError, match=f"the tensor '{name}' may change the features, .*: remove it from a copy"):
        load_sae(LAYOUTS[layout](tmp_path, {name: torch.ones(D_SAE)}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_of_training_are_ignored(layout: str, tmp_path: Path) -> None:
    counts = {"num_tokens_since_fired": torch.ones(D_SAE), "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long)}
    assert load_sae(LAYOUTS[layout](tmp_path, counts)).d_in in (D_IN, 12)


def test_a_skip_connection_that_the_config_leaves_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the tensor 'W_skip' may change"):
        load_sae(write_sae(tmp_path / "a", tensors={"W_skip": torch.eye(D_IN)}))
    with pytest.raises(InputError, match="the tensor 'W_skip' may change"):
        load_sae(sparsify(tmp_path, {"W_skip": torch.eye(D_IN)}))


@pytest.mark.parametrize("value", [True, "rms", 2.5, {"eps": 1e-6}, [1, 2]])
def test_a_key_that_is_not_understood_is_refused(value: Any, tmp_path: Path) -> None:
    for key in ("input_rescaling", "subtract_mean", "use_glu"):
        with pytest.raises(InputError, match=rf"cfg\.json: the key '{key}' may change the features"):
            load_sae(write_sae(tmp_path, config={key: value}))


@pytest.mark.parametrize("value", [None, False, 0, "none", "", [], {}, [None], {"a": None}])
def test_a_key_that_asks_for_nothing_is_ignored(value: Any, tmp_path: Path) -> None:
    assert load_sae(write_sae(tmp_path, config={"input_rescaling": value})).d_sae == D_SAE


def test_keys_of_sae_lens_before_6_are_ignored(tmp_path: Path) -> None:
    """A config of SAELens 3, which had all of its training's options in it."""
    training = {
        "model_class_name": "HookedTransformer", "hook_name": "blocks.8.hook_resid_pre", "hook_eval": "NOT_IN_USE",
        "hook_layer": 8, "hook_head_index": None, "dataset_path": "x/openwebtext", "streaming": True,
        "prepend_bos": True, "is_dataset_tokenized": True, "context_size": 128, "use_cached_activations": True,
        "cached_activations_path": "activations/x", "b_dec_init_method": "zeros", "expansion_factor": 32,
        "activation_fn": "relu", "normalize_sae_decoder": True, "noise_scale": 0.1, "from_pretrained_path": "x",
        "decoder_orthogonal_init": True, "decoder_heuristic_init": True, "init_encoder_as_decoder_transpose": True,
        "n_batches_in_buffer": 20, "training_tokens": 1000, "finetuning_tokens": 5, "store_batch_size_prompts": 32,
        "train_batch_size_tokens": 4096, "act_store_device": "cpu", "seed": 42, "autocast": True, "autocast_lm": True,
        "compile_llm": True, "llm_compilation_mode": "default", "sae_compilation_mode": "x", "adam_beta1": 0.9,
        "adam_beta2": 0.999, "mse_loss_normalization": "dense_batch", "l1_coefficient": 5, "lp_norm": 1.0,
        "scale_sparsity_penalty_by_decoder_norm": True, "l1_warm_up_steps": 10, "lr": 3e-4, "lr_end": 3e-5,
        "lr_scheduler_name": "constant", "lr_warm_up_steps": 1, "lr_decay_steps": 5, "n_restart_cycles": 1,
        "finetuning_method": "decoder", "use_ghost_grads": True, "feature_sampling_window": 2000,
        "dead_feature_window": 1000, "dead_feature_threshold": 1e-8, "n_eval_batches": 10, "eval_batch_size_prompts": 4,
        "log_to_wandb": True, "log_optimizer_state_to_wandb": True, "wandb_project": "x", "wandb_id": "a",
        "resume": True, "run_name": "x", "wandb_log_frequency": 10, "eval_every_n_wandb_logs": 100, "n_checkpoints": 3,
        "verbose": True, "checkpoint_path": "x", "tokens_per_buffer": 7, "jumprelu_init_threshold": 0.1,
        "jumprelu_bandwidth": 0.1,
        "sae_lens_version": "3.22.1", "sae_lens_training_version": "3.22.1", "seqpos_slice": [5, -5],
        "dataset_trust_remote_code": True, "exclude_special_tokens": True,
    }  # fmt: skip
    sae = load_sae(write_sae(tmp_path, config={"metadata": ..., **training}))
    assert (sae.hook_name, sae.notes) == ("blocks.8.hook_resid_pre", ())


def test_values_beside_the_tensors_of_a_pt_file(tmp_path: Path) -> None:
    harmless = {"epoch": 3, "step": 100, "optimizer_state_dict": {"lr": 0.1}, "run_name": "x"}
    torch.save({"state_dict": tensors_of("standard"), **harmless}, tmp_path / "a.pt")
    assert load_sae(tmp_path / "a.pt").architecture == "standard"
    for value in ({"activation": "topk", "k": 3}, "topk"):
        torch.save({"state_dict": tensors_of("standard"), "cfg": value}, tmp_path / "a.pt")
        with pytest.raises(InputError, match="the key 'cfg' may change the features"):
            load_sae(tmp_path / "a.pt")
    torch.save({**tensors_of("standard"), "more": {"threshold": torch.ones(D_SAE)}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="the key 'more' may change the features"):
        load_sae(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "is_log"),
    [
        ("threshold", False),
        ("threshold_", False),
        ("activation.threshold", False),
        ("activation_threshold", False),
        ("jumprelu.threshold", False),
        ("log_threshold", True),
        ("activation_function.log_threshold", True),
        ("log_jumprelu_threshold", True),
    ],
)
def test_other_names_of_a_threshold(name: str, is_log: bool, tmp_path: Path) -> None:
    w = tensors_of("jumprelu")
    threshold = w.pop("threshold")
    save_file({**w, name: threshold.log() if is_log else threshold}, tmp_path / "a.safetensors")
    x = acts().astype(np.float64) - w["b_dec"].double().numpy()
    pre = x @ w["W_enc"].double().numpy() + w["b_enc"].double().numpy()
    fires = pre > threshold.double().numpy()
    features = sts_fast.encode(load_sae(tmp_path / "a.safetensors"), acts())
    assert [set(row) for row in np.split(features.indices, features.indptr[1:-1])] == [
        set(np.flatnonzero(row)) for row in fires
    ]
    save_file({**w, name: threshold, "threshold_2": threshold + 1}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="the tensor 'threshold_2' may change"):
        load_sae(tmp_path / "a.safetensors")


@needs_assets
@pytest.mark.parametrize("case", ["24c_activation_threshold", "24c_threshold_"])
def test_thresholds_of_the_cases(case: str) -> None:
    folder = CASES / case
    w = {name: t.double().numpy() for name, t in load_file(folder / "my.safetensors").items()}
    threshold = next(value for name, value in w.items() if "threshold" in name)
    x = np.random.default_rng(1).normal(size=(50, 64)).astype(np.float32)
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    n_firing = int((pre > np.maximum(threshold, 0)).sum())
    assert len(sts_fast.encode(load_sae(folder), x).indices) == n_firing != int((pre > 0).sum())


@pytest.mark.parametrize("tuned", [True, False])
def test_a_scaling_factor_of_the_decoder(tuned: bool, tmp_path: Path) -> None:
    gain = torch.linspace(0.5, 2, D_SAE)
    config = {"finetuning_scaling_factor": tuned}
    folder = write_sae(tmp_path, config=config, tensors={"scaling_factor": gain})
    if not tuned:
        with pytest.raises(InputError, match=r"a scaling_factor other than 1, but .* finetuning_scaling_factor false"):
            load_sae(folder)
        write_sae(tmp_path, config=config, tensors={"scaling_factor": torch.ones(D_SAE)})
        assert load_sae(folder).notes == ()
        return
    sae, w = load_sae(folder), {name: t.double().numpy() for name, t in tensors_of("standard").items()}
    h = np.maximum((acts() - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    decoded = sae.reconstruct(acts(), sts_fast.encode(sae, acts()))
    assert decoded is not None
    assert np.allclose(decoded, (h * gain.numpy()) @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_a_setting_of_another_architecture(architecture: str, tmp_path: Path) -> None:
    for config in ({"rescale_acts_by_decoder_norm": True}, {"k": 3}, {"activation_fn_kwargs": {"k": 3}}):
        with pytest.raises(InputError, match=f"the key '{next(iter(config))}' may change the features"):
            load_sae(write_sae(tmp_path, architecture, config=config))


@pytest.mark.parametrize("key", ["hook_head_index", "hook_point_head_index", "hook_head_index_out"])
def test_single_heads_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{key} 3: an SAE of a single head"):
        load_sae(write_sae(tmp_path, config={key: 3}))


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ({"center_writing_weights": True}, "center_writing_weights=True"),
        ({"center_writing_weights": True, "fold_ln": True}, "center_writing_weights=True, fold_ln=True"),
        ({"center_writing_weights": False, "fold_ln": False}, ""),
        ({"dtype": "bfloat16", "n_devices": 2}, ""),
        ({"center_unembed": True}, ""),  # changes the head alone
    ],
)
@pytest.mark.parametrize("place", ["config", "metadata"])
def test_models_that_were_changed_before_training(place: str, given: dict[str, Any], note: str, tmp_path: Path) -> None:
    options = {"model_from_pretrained_kwargs": given}
    sae = load_sae(write_sae(tmp_path, config=options if place == "config" else {"metadata": options}), layer=2)
    if not note:
        assert sae.notes == ()
        return
    [said] = sae.notes
    assert f"a model that TransformerLens had changed ({note})" in said


@needs_assets
def test_the_case_of_centred_weights() -> None:
    [note] = load_sae(CASES / "22_center_writing_weights").notes
    assert "center_writing_weights=True" in note
