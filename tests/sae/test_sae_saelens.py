"""Every architecture and normalisation that sae-lens can save, written by it and encoded as by it."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sparse_features import check_alike, dense

import sts_fast
from sts_fast.errors import InputError
from sts_fast.sae import SAE, load_sae
from sts_fast.sae.sae import FORGOTTEN_FOLDING
from sts_fast.sae.saelens import FORGOTTEN_WHITENING

D_IN, D_SAE, D_OUT, N = 12, 40, 9, 400
NORMS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening")
SAES = {"standard": "Standard", "jumprelu": "JumpReLU", "gated": "Gated", "topk": "TopK", "abstopk": "AbsTopK"}
TRANSCODERS = {
    "transcoder": "Transcoder",
    "skip_transcoder": "SkipTranscoder",
    "jumprelu_transcoder": "JumpReLUTranscoder",
    "jumprelu_skip_transcoder": "JumpReLUSkipTranscoder",
}
TRAINED = {
    "standard": ("StandardTrainingSAE", {}, "standard"),
    "jumprelu": ("JumpReLUTrainingSAE", {}, "jumprelu"),
    "gated": ("GatedTrainingSAE", {}, "gated"),
    "topk": ("TopKTrainingSAE", {"k": 5, "rescale_acts_by_decoder_norm": False}, "topk"),
    "topk, rescaled": ("TopKTrainingSAE", {"k": 5, "rescale_acts_by_decoder_norm": True}, "topk"),
    "abstopk": ("AbsTopKTrainingSAE", {"k": 5}, "abstopk"),
    "batchtopk": ("BatchTopKTrainingSAE", {"k": 5, "rescale_acts_by_decoder_norm": False}, "jumprelu"),
    "batchtopk, rescaled": ("BatchTopKTrainingSAE", {"k": 5, "rescale_acts_by_decoder_norm": True}, "jumprelu"),
    "matryoshka": (
        "MatryoshkaBatchTopKTrainingSAE",
        {"k": 5, "matryoshka_widths": [10, 20, D_SAE], "rescale_acts_by_decoder_norm": False},
        "jumprelu",
    ),
    "matryoshka, rescaled": (
        "MatryoshkaBatchTopKTrainingSAE",
        {"k": 5, "matryoshka_widths": [10, 20, D_SAE], "rescale_acts_by_decoder_norm": True},
        "jumprelu",
    ),
}


@pytest.fixture(scope="module")
def sae_lens() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports warn
        return pytest.importorskip("sae_lens")


def acts(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape or (N, D_IN)).astype(np.float32) * 2 + 0.5


def with_random_weights(module: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            scale = 0.4 if name in ("r_mag", "threshold", "log_threshold", "topk_threshold") else 1.0
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
            if "threshold" in name:
                tensor.abs_()
    return module


def made(sae_lens: Any, name: str, **options: Any) -> Any:
    config = getattr(sae_lens.saes, f"{name}Config")(d_in=D_IN, d_sae=D_SAE, **options)
    config.metadata.hook_name = "blocks.3.hook_resid_post"
    return with_random_weights(getattr(sae_lens.saes, name)(config))


def room(module: Any, x: np.ndarray) -> np.ndarray:
    """[N, d_sae] how far each feature is, in float64, from firing or falling silent, by sae-lens' pre-activations."""
    module = module.to(dtype=torch.float64)
    caught = {}
    handle = module.hook_sae_acts_pre.register_forward_hook(lambda *args: caught.update(pre=args[2]))
    with torch.no_grad():
        module.encode(torch.from_numpy(x).double())
        handle.remove()
        pre = caught["pre"]
        if hasattr(module, "b_gate"):
            gate = module.process_sae_in(torch.from_numpy(x).double()) @ module.W_enc + module.b_gate
            return torch.minimum(gate.abs(), pre.abs()).numpy()
        if hasattr(module, "threshold"):
            return torch.minimum((pre - module.threshold).abs(), pre.abs()).numpy()
        if not hasattr(module.cfg, "k"):
            return pre.abs().numpy()
        if module.cfg.rescale_acts_by_decoder_norm:
            pre = pre * module.W_dec.norm(dim=-1)
        rank = pre.abs() if module.cfg.architecture() == "abstopk" else pre
        ordered = rank.sort(dim=1, descending=True).values
        last_in, first_out = (ordered[:, [module.cfg.k + i]] for i in (-1, 0))
        return torch.minimum(torch.where(rank >= last_in, rank - first_out, last_in - rank), pre.abs()).numpy()


def check_encodes_alike(sae: SAE, module: Any, x: np.ndarray) -> None:
    """Values to 1e-5 of the largest and the same firings, but for those within rounding of their threshold."""
    with torch.no_grad():
        theirs = module.encode(torch.from_numpy(x)).numpy()
    assert 0.02 < (theirs != 0).mean() < 0.98
    assert check_alike(dense(sae, x.reshape(len(x), -1)), theirs, room(module, x)) <= 2


def check_decodes_alike(sae: SAE, module: Any, x: np.ndarray) -> None:
    with torch.no_grad():
        theirs = module(torch.from_numpy(x))
    ours = sae.reconstruct(x, sts_fast.encode(sae, x))
    assert ours is not None
    assert torch.allclose(ours, theirs.reshape(len(x), -1), rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", [*SAES, "topk, rescaled", "abstopk, rescaled"])
def test_sae(architecture: str, norm: str, tmp_path: Path, sae_lens: Any) -> None:
    name, _, rescaled = architecture.partition(",")
    options: dict[str, Any] = {"k": 5, "rescale_acts_by_decoder_norm": bool(rescaled)} if "topk" in name else {}
    for subtracts in (True, False):
        module = made(
            sae_lens, f"{SAES[name]}SAE", normalize_activations=norm, apply_b_dec_to_input=subtracts, **options
        )
        module.save_model(tmp_path)
        sae = load_sae(tmp_path)
        note = {"expected_average_only_in": (FORGOTTEN_FOLDING,), "covariance_whitening": (FORGOTTEN_WHITENING,)}
        assert (sae.architecture, sae.notes) == (name, note.get(norm, ()))
        check_decodes_alike(sae, module, acts())
        check_encodes_alike(sae, module, acts())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoder(architecture: str, norm: str, tmp_path: Path, sae_lens: Any) -> None:
    options = {"d_out": D_OUT, "apply_b_dec_to_input": False, "normalize_activations": norm}
    module = made(sae_lens, TRANSCODERS[architecture], **options)
    module.cfg.metadata.hook_name_out = "blocks.3.hook_mlp_out"
    module.save_model(tmp_path)
    sae = load_sae(tmp_path)
    assert sae.target_hook_name == "blocks.3.hook_mlp_out"
    check_decodes_alike(sae, module, acts())
    check_encodes_alike(sae, module, acts())


@pytest.mark.parametrize("kind", TRAINED)
def test_trained_sae_saved_for_inference_and_as_a_checkpoint(kind: str, tmp_path: Path, sae_lens: Any) -> None:
    name, options, architecture = TRAINED[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = made(sae_lens, name, **options)
        module.save_model(tmp_path / "checkpoint")
        module.save_inference_model(tmp_path / "inference")
        theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    for folder in (tmp_path / "inference", tmp_path / "checkpoint"):
        sae = load_sae(folder)
        assert sae.architecture == architecture
        check_encodes_alike(sae, theirs.to(dtype=torch.float32), acts())


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_heads_are_joined(norm: str, tmp_path: Path, sae_lens: Any) -> None:
    hook = "blocks.3.attn.hook_z"
    options = {"reshape_activations": "hook_z", "normalize_activations": norm}
    config = sae_lens.saes.StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, **options)
    config.metadata.hook_name = hook
    module = with_random_weights(sae_lens.saes.StandardSAE(config))
    module.save_model(tmp_path)
    sae, x = load_sae(tmp_path), acts(N, 3, D_IN // 3)
    assert sae.hook_name == hook
    check_decodes_alike(sae, module, x)
    check_encodes_alike(sae, module, x)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk, rescaled", "jumprelu_transcoder"])
def test_forgotten_scaling_is_folded_as_sae_lens_folds_it(kind: str, tmp_path: Path, sae_lens: Any) -> None:
    name, _, rescaled = kind.partition(",")
    options: dict[str, Any] = {"normalize_activations": "expected_average_only_in"}
    if "transcoder" in kind:
        options |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
    elif rescaled:
        options |= {"k": 5, "rescale_acts_by_decoder_norm": True}
    module = made(sae_lens, TRANSCODERS.get(name) or f"{SAES[name]}SAE", **options)
    module.save_model(tmp_path)
    sae = load_sae(tmp_path, norm_scaling_factor=0.37)
    assert (sae.input_scale, sae.notes) == (0.37, ())
    module.fold_activation_norm_scaling_factor(0.37)
    check_decodes_alike(sae, module, acts())
    check_encodes_alike(sae, module, acts())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", SAES)
def test_a_row_of_zeros_breaks_nothing(architecture: str, norm: str, tmp_path: Path, sae_lens: Any) -> None:
    """It stays zero under every normalisation, also where sae-lens divides by its norm; other rows do not change."""
    options: dict[str, Any] = {"k": 5, "rescale_acts_by_decoder_norm": False} if "topk" in architecture else {}
    made(sae_lens, f"{SAES[architecture]}SAE", normalize_activations=norm, **options).save_model(tmp_path)
    sae, x = load_sae(tmp_path), acts(5, D_IN)
    x[2] = 0
    features = dense(sae, x)
    assert np.array_equal(features[2], dense(replace(sae, input_norm="none"), x[2:3])[0])
    assert np.array_equal(np.delete(features, 2, 0), dense(sae, np.delete(x, 2, 0)))
    decoded = sae.reconstruct(x, sts_fast.encode(sae, x))
    assert decoded is not None
    assert bool(torch.isfinite(decoded).all())
    stats = sts_fast.ShiftStats(sae)
    stats.update(x, x[::-1].copy())
    assert np.isfinite(stats.sum_sq_shift).all()


def test_a_scaling_that_nobody_asked_for_is_refused(tmp_path: Path, sae_lens: Any) -> None:
    made(sae_lens, "StandardSAE").save_model(tmp_path)
    with pytest.raises(InputError, match=r"does not ask for --norm-scaling-factor .*normalize_activations none"):
        load_sae(tmp_path, norm_scaling_factor=2.0)
    assert load_sae(tmp_path, norm_scaling_factor=1.0).fingerprint == load_sae(tmp_path).fingerprint
    made(sae_lens, "StandardSAE", normalize_activations="expected_average_only_in").save_model(tmp_path)
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="must be a positive number, but --norm-scaling-factor gives"):
            load_sae(tmp_path, norm_scaling_factor=factor)
    with pytest.raises(InputError, match=r"must be a positive number, but sae-lens' list: some-release gives -1\.0"):
        load_sae(tmp_path).scaled(-1.0, "sae-lens' list: some-release")


@pytest.mark.parametrize(("name", "reason"), [("MatchingPursuit", "subtracted"), ("Temporal", "through attention")])
def test_what_one_product_cannot_encode_is_refused_by_name(
    name: str, reason: str, tmp_path: Path, sae_lens: Any
) -> None:
    made(sae_lens, "StandardSAE").save_model(tmp_path)
    architecture = getattr(sae_lens.saes, f"{name}SAEConfig").architecture()
    config = json.loads((tmp_path / "cfg.json").read_text()) | {"architecture": architecture}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"architecture '{architecture}' is not supported, because .*{reason}"):
        load_sae(tmp_path)
