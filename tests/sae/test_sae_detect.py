"""Which layout a folder or file is of, told by its files; layouts written by hand are marked so."""

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
from sparse_features import check_alike, dense
from test_sae import D_IN, D_SAE, tensors_of, write_sae

import sts_fast
from sts_fast.errors import InputError
from sts_fast.places import split_name
from sts_fast.sae import load_sae
from sts_fast.sae.sae import FORGOTTEN_FOLDING

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the published SAEs are not beside the checkout")

Arrays = dict[str, np.ndarray]


def numpy_of(architecture: str) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors_of(architecture).items()}


def acts() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, D_IN)).astype(np.float32)


def relu(w: Arrays, x: np.ndarray, *, subtract: bool, threshold: Any = 0.0) -> np.ndarray:
    """[n, d_sae] float64 relu(x W_enc + b_enc) where above the threshold."""
    pre = (x.astype(np.float64) - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]
    return np.where(pre > np.maximum(threshold, 0), pre, 0)


# Layouts written by hand ----------------------------------------------------------------------------------------------


def gemma_scope(folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **numpy_of("jumprelu"), **options)
    return folder


def gemma_scope_2(folder: Path, config: dict[str, Any] | None, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    lower = {name.lower(): tensor for name, tensor in tensors_of("jumprelu").items()}
    save_file({**lower, **tensors}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
    return folder


@pytest.mark.parametrize(
    ("path", "hook", "target", "model"),
    [
        (
            "gemma-scope-9b-it-res/layer_9/width_16k/average_l0_88",
            "blocks.9.hook_resid_post",
            "",
            "google/gemma-2-9b-it",
        ),
        ("gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_88", "blocks.0.attn.hook_z", "", "google/gemma-2-2b"),
        ("gemma-scope-2b-pt-mlp/layer_7/width_16k/average_l0_88", "blocks.7.hook_mlp_out", "", "google/gemma-2-2b"),
        (
            "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_88",
            "blocks.3.ln2.hook_normalized",
            "blocks.3.hook_mlp_out",
            "google/gemma-2-2b",
        ),
        ("somewhere/layer_12", "blocks.12.hook_resid_post", "", ""),
    ],
)
def test_gemma_scope_layout_only(path: str, hook: str, target: str, model: str, tmp_path: Path) -> None:
    sae = load_sae(gemma_scope(tmp_path / path))
    assert (sae.layout, sae.architecture, sae.hook_name) == ("Gemma Scope", "jumprelu", hook)
    assert (sae.target_hook_name, sae.model_name) == (target, model)
    assert sae.l0 == (88.0 if "l0" in path else None)
    w = numpy_of("jumprelu")
    check_alike(dense(sae, acts()), relu(w, acts(), subtract=False, threshold=w["threshold"]))
    assert load_sae(tmp_path / path / "params.npz").hook_name == hook


def test_gemma_scope_embedding_layout_only(tmp_path: Path) -> None:
    sae = load_sae(gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_5"))
    assert sae.hook_name == "hook_embed"
    w = numpy_of("jumprelu")
    expected = relu(w, acts() / np.sqrt(D_IN), subtract=False, threshold=w["threshold"])
    check_alike(dense(sae, acts()), expected)


def test_gemma_scope_2_layout_only(tmp_path: Path) -> None:
    place = "gemma-scope-2-1b-it"
    said = {"model_name": "gemma-v3-1b-it", "hf_hook_point_in": "model.layers.13.self_attn.o_proj.input", "l0": 60}
    sae = load_sae(gemma_scope_2(tmp_path / place / "attn_out" / "layer_13_width_16k_l0_medium", said))
    assert (sae.layout, sae.hook_name, sae.l0) == ("Gemma Scope 2", "model.layers.13.self_attn.o_proj.input", 60.0)
    w = numpy_of("jumprelu")
    check_alike(dense(sae, acts()), relu(w, acts(), subtract=False, threshold=w["threshold"]))

    sae = load_sae(gemma_scope_2(tmp_path / place / "resid_post" / "layer_7_width_16k_l0_medium", None))
    assert (sae.hook_name, sae.model_name) == ("blocks.7.hook_resid_post", "google/gemma-3-1b-it")

    # As published: an SAE whose config has the same place for what it reads and what it predicts.
    said = {"hf_hook_point_in": "model.layers.13.output", "hf_hook_point_out": "model.layers.13.output"}
    said |= {"width": D_SAE, "l0": 60, "affine_connection": False, "type": "sae", "model_name": "gemma-v3-1b-it"}
    sae = load_sae(gemma_scope_2(tmp_path / place / "resid_post" / "layer_13_width_16k_l0_small", said))
    assert (sae.hook_name, sae.target_hook_name) == ("model.layers.13", "")

    said = {"hf_hook_point_in": "model.layers.2.pre_feedforward_layernorm.output", "affine_connection": True}
    said |= {"hf_hook_point_out": "model.layers.2.post_feedforward_layernorm.output"}
    skip = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(1))
    sae = load_sae(gemma_scope_2(tmp_path / place / "transcoder_all" / "layer_2", said, affine_skip_connection=skip))
    assert sae.hook_name == "model.layers.2.pre_feedforward_layernorm"
    assert sae.target_hook_name == "model.layers.2.post_feedforward_layernorm"
    expected = dense(sae, acts()) @ w["W_dec"] + w["b_dec"] + acts() @ skip.numpy()
    decoded = sae.reconstruct(acts(), sts_fast.encode(sae, acts()))
    assert decoded is not None
    assert np.allclose(decoded, expected, rtol=1e-4, atol=1e-4)

    cross = torch.zeros(D_SAE, 3, D_IN)
    sae = load_sae(gemma_scope_2(tmp_path / place / "clt" / "layer_2", None, w_dec=cross))
    assert sae.decoder is None
    assert sae.notes == ("its decoder writes to several layers, and is not used",)


def test_llama_scope_layout_only(tmp_path: Path) -> None:
    w = numpy_of("standard")
    scale = np.sqrt(D_IN) / 4.0
    folder = write_llama_scope(tmp_path / "sae", tensors_of("standard"))
    expected = relu(w, acts() * scale, subtract=False, threshold=0.6 * scale)
    for place in (folder, folder / "checkpoints", folder / "checkpoints" / "final.safetensors"):
        sae = load_sae(place)
        check_alike(dense(sae, acts()), expected)
        decoded = sae.reconstruct(acts(), sts_fast.encode(sae, acts()))
        assert decoded is not None
        assert np.allclose(decoded, (expected @ w["W_dec"] + w["b_dec"]) / scale, rtol=1e-4, atol=1e-4)
    sae = load_sae(write_llama_scope(tmp_path / "t", tensors_of("standard"), hook_point_out="blocks.15.hook_mlp_out"))
    assert sae.target_hook_name == "blocks.15.hook_mlp_out"
    decoded = sae.reconstruct(acts(), sts_fast.encode(sae, acts()))
    assert decoded is not None
    assert np.allclose(decoded, (expected @ w["W_dec"] + w["b_dec"]) / (np.sqrt(D_IN) / 5.0), rtol=1e-4, atol=1e-4)
    sae = load_sae(
        write_llama_scope(tmp_path / "forgotten", tensors_of("standard"), dataset_average_activation_norm={})
    )
    assert sae.notes == (FORGOTTEN_FOLDING,)


@pytest.mark.parametrize(
    ("hyperparams", "message"),
    [
        ({"act_fn": "topk"}, "act_fn 'topk' is not supported"),
        ({"use_glu_encoder": True}, "use_glu_encoder is not supported"),
        ({"norm_activation": "batch-wise"}, "norm_activation 'batch-wise' is not supported: use dataset-wise or"),
        ({"sae_type": "crosscoder"}, "sae_type 'crosscoder' is not supported: use sae or transcoder"),
        ({"input_whitening": True}, "the key 'input_whitening' may change the features"),
        ({"jump_relu_threshold": None}, "has no jump_relu_threshold"),
        ({"jump_relu_threshold": "much"}, "jump_relu_threshold must be a finite number, but is 'much'"),
        ({"dataset_average_activation_norm": {"in": 0}}, "in must be a positive number, but is 0"),
        ({"d_model": 7}, "says d_model = 7, but the weights have 6"),
    ],
)
def test_llama_scope_refused_layout_only(hyperparams: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_sae(write_llama_scope(tmp_path / "sae", tensors_of("standard"), **hyperparams))


@pytest.mark.parametrize("norm", ["inference", "none", "token-wise"])
def test_other_normalisations_of_llama_scope_layout_only(norm: str, tmp_path: Path) -> None:
    """No scale but what the weights contain, or each row's own."""
    w, x = numpy_of("standard"), acts().astype(np.float64)
    folder = write_llama_scope(tmp_path / "sae", tensors_of("standard"), norm_activation=norm)
    sae = load_sae(folder)
    if norm == "token-wise":
        x = x * np.sqrt(D_IN) / np.linalg.norm(x, axis=1, keepdims=True)
    assert sae.notes == ()
    check_alike(dense(sae, acts()), relu(w, x, subtract=False, threshold=0.6))


def test_scales_of_llama_scope_in_its_weights_layout_only(tmp_path: Path) -> None:
    w, hook = tensors_of("standard"), "blocks.15.hook_resid_post"
    folder = write_llama_scope(tmp_path / "sae", w, dataset_average_activation_norm=None)
    file = folder / "checkpoints" / "final.safetensors"
    save_file(load_file(file) | {f"dataset_average_activation_norm.{hook}": torch.tensor(4.0)}, file)
    assert load_sae(folder).input_scale == pytest.approx(np.sqrt(D_IN) / 4)


def test_decoder_norms_of_llama_scope_are_named_layout_only(tmp_path: Path) -> None:
    w = tensors_of("standard")
    said = {"sparsity_include_decoder_norm": True}
    [note] = load_sae(write_llama_scope(tmp_path / "a", w, **said)).notes
    assert "sparsity_include_decoder_norm, but the rows of its W_dec have other norms than 1" in note
    w["W_dec"] = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True)
    assert load_sae(write_llama_scope(tmp_path / "b", w, **said)).notes == ()


def test_later_llama_scope_layout_only(tmp_path: Path) -> None:
    w = tensors_of("standard")
    hook = "blocks.15.hook_resid_post"
    said = {"hook_point_in": hook, "hook_point_out": hook, "d_model": D_IN, "act_fn": "jumprelu"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    logs = torch.linspace(-2, 0, D_SAE)
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    tensors |= {"decoder.bias": w["b_dec"], "log_jumprelu_threshold": logs}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "sae_weights.safetensors")
    sae = load_sae(tmp_path, norm_scaling_factor=0.7)
    expected = relu(numpy_of("standard"), acts() * 0.7, subtract=False, threshold=np.exp(logs.numpy()))
    check_alike(dense(sae, acts()), expected)


def test_qwen_scope_layout_only(tmp_path: Path) -> None:
    folder = tmp_path / "SAE-Res-Qwen3-8B-Base-W64K-L0_5"
    folder.mkdir()
    w = tensors_of("topk")
    state = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    for path in (folder / "layer7.sae.pt", tmp_path / "layer7.sae.pt"):
        torch.save(state, path)
    sae = load_sae(folder)
    assert (sae.layout, sae.k, split_name(sae.hook_name)[1], sae.model_name) == (
        "Qwen-Scope",
        5,
        7,
        "Qwen/Qwen3-8B-Base",
    )
    pre = acts().astype(np.float64) @ numpy_of("topk")["W_enc"] + numpy_of("topk")["b_enc"]
    kth = np.sort(pre, axis=1)[:, [-5]]
    check_alike(dense(sae, acts()), np.where(pre >= kth, np.maximum(pre, 0), 0))
    with pytest.raises(InputError, match=r"layer7\.sae\.pt does not contain its k: keep it in a folder named as"):
        load_sae(tmp_path / "layer7.sae.pt")
    torch.save({**state, "k": 5}, tmp_path / "layer7.sae.pt")
    assert load_sae(tmp_path / "layer7.sae.pt").k == 5
    torch.save(state, folder / "layer8.sae.pt")
    with pytest.raises(InputError, match=r"several files of weights \(layer7\.sae\.pt, layer8\.sae\.pt\): give one"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("name", "prefix", "model", "layer"),
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "_linear", "meta-llama/Llama-3.1-8B-Instruct", 19),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 19),
        ("renamed.pt", "_linear", "", None),
    ],
)
def test_goodfire_layout_only(name: str, prefix: str, model: str, layer: int | None, tmp_path: Path) -> None:
    w = tensors_of("standard")
    state = {f"encoder{prefix}.weight": w["W_enc"].T, f"encoder{prefix}.bias": w["b_enc"]}
    state |= {f"decoder{prefix}.weight": w["W_dec"].T, f"decoder{prefix}.bias": w["b_dec"]}
    torch.save(state, tmp_path / name)
    for place in (tmp_path, tmp_path / name):
        sae = load_sae(place)
        assert (sae.layout, sae.model_name, split_name(sae.hook_name)[1]) == ("Goodfire", model, layer)
        check_alike(dense(sae, acts()), relu(numpy_of("standard"), acts(), subtract=False))


def named_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def named_npz(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})


def named_packed_npz(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in tensors.items()})


def named_pt(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, path)


def named_state_dict(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save({"epoch": 3, "state_dict": tensors}, path)


FORMATS: dict[str, Callable[[Path, dict[str, torch.Tensor]], None]] = {
    "a.safetensors": named_safetensors,
    "a.npz": named_npz,
    "packed.npz": named_packed_npz,
    "a.pt": named_pt,
    "nested.pth": named_state_dict,
}


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("name", FORMATS)
def test_named_tensors_layout_only(name: str, architecture: str, tmp_path: Path) -> None:
    tensors = tensors_of(architecture) | ({"k": torch.tensor(3)} if architecture == "topk" else {})
    FORMATS[name](tmp_path / name, tensors)
    config = {"k": 3} if architecture == "topk" else {}
    expected = load_sae(write_sae(tmp_path / "saelens", architecture, config=config))
    sae = load_sae(tmp_path / name, layer=3)
    assert (sae.layout, sae.architecture, split_name(sae.hook_name)[1]) == ("named tensors", architecture, 3)
    assert np.array_equal(dense(sae, acts()), dense(expected, acts()))
    assert "assumed to be subtracted" in sae.notes[-1]
    ours, theirs = (s.decoder_rows([3, 17, 0]) for s in (sae, expected))
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs)
    turned = {**tensors, "W_enc": tensors["W_enc"].T, "W_dec": tensors["W_dec"].T}
    FORMATS[name](tmp_path / f"turned_{name}", turned)
    assert np.array_equal(dense(load_sae(tmp_path / f"turned_{name}"), acts()), dense(expected, acts()))


def test_orientation_that_cannot_be_told_layout_only(tmp_path: Path) -> None:
    save_file({"W_enc": torch.ones(D_IN, D_SAE)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"W_enc has shape \[6, 20\], and its biases do not show which width is d_in"):
        load_sae(tmp_path / "a.safetensors")
    save_file({"weight": torch.ones(D_IN, D_SAE)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"contains no encoder: looked for W_enc, w_enc, .* but it has weight"):
        load_sae(tmp_path / "b.safetensors")


# What is none, or more than one ---------------------------------------------------------------------------------------


def test_several_layouts_in_one_folder(tmp_path: Path) -> None:
    np.savez(write_sae(tmp_path) / "params.npz", **numpy_of("jumprelu"))
    with pytest.raises(InputError, match=r"several layouts \(params\.npz, sae_weights\.safetensors\): keep one"):
        load_sae(tmp_path)


def test_a_config_stands_for_its_folder(tmp_path: Path) -> None:
    assert load_sae(write_sae(tmp_path) / "cfg.json").source == str(tmp_path)


def test_folders_without_an_sae(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"contains no SAE: looked for cfg\.json with sae_weights\.safetensors or"):
        load_sae(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(InputError, match=r"notes\.txt is not a checkpoint of an SAE: give its folder, or one file of"):
        load_sae(tmp_path / "notes.txt")
    (tmp_path / "ae.pt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"contains no SAE: looked for"):
        load_sae(tmp_path)
    for i in range(9):
        write_sae(tmp_path / "deep" / f"layer_{i}")
    with pytest.raises(InputError, match=r"its subfolders may \(deep/layer_0, .*deep/layer_4, …\): give one of them"):
        load_sae(tmp_path)


# What others wrote ----------------------------------------------------------------------------------------------------

# By folder: what loads, on the residual stream of stories260K after layer 2.
PUBLISHED = {
    "saelens_v5.11.0_stories260K_L2_jumprelu": "SAELens 5.11.0",
    "saelens_v6_stories260K_L2_jumprelu": "SAELens 6.54.12",
    "saelens_v6_stories260K_L2_standard": "SAELens 6.54.12",
    "saelens_v6_stories260K_L2_topk": "SAELens 6.54.12",
    "saelens_v6_stories260K_L2_gated": "SAELens 6.54.12",
    "sparsify_stories260K/layers.2": "sparsify",
    "dictionary_learning_stories260K/trainer_0": "dictionary_learning",
    "gemma_scope_layout/layer_2/width_512/average_l0_3": "Gemma Scope",
    "llama_scope_layout/stories260K-L2R-8x": "Llama Scope",
}


@pytest.fixture(scope="module")
def residual() -> np.ndarray:
    """[1000, 64] the residual stream of stories260K after layer 2 on published stories, BOS left out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ASSETS / "models" / "stories260K"
    text = (ASSETS / "data" / "tinystories" / "tinystories_train_head_2MiB.txt").read_text(encoding="utf-8")[:20_000]
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), []
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        for story in text.split("<|endoftext|>")[:6]:
            ids = torch.tensor([tokenizer(story.strip(), verbose=False).input_ids[:400]])
            rows.append(model(ids, output_hidden_states=True).hidden_states[3][0, 1:])
    return torch.cat(rows)[:1000].numpy()


def fvu(x: np.ndarray, decoded: np.ndarray) -> float:
    return float(np.square(x - decoded).sum() / np.square(x - x.mean(axis=0)).sum())


@needs_assets
@pytest.mark.parametrize("name", sorted(path.name for path in (ASSETS / "saes").glob("*") if path.is_dir()))
def test_every_published_folder_loads_as_it_lies(name: str) -> None:
    assert load_sae(ASSETS / "saes" / name).d_sae in (64, 512)


@needs_assets
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sae_explains_as_much_as_its_library_says(name: str, residual: np.ndarray) -> None:
    """FVU and L0 to 1%: those of sae-lens where it reads the layout, and of the library's equations elsewhere."""
    folder = ASSETS / "saes" / name
    sae = load_sae(folder)
    assert (sae.layout, split_name(sae.hook_name)[1], sae.d_in, sae.d_sae) == (PUBLISHED[name], 2, 64, 512)
    features = sts_fast.encode(sae, residual)
    decoded = sae.reconstruct(residual, features)
    assert decoded is not None
    h = EQUATIONS[sae.layout.split()[0]](folder, residual.astype(np.float64))
    assert len(features.values) == pytest.approx((h[0] != 0).sum(), rel=0.01)
    assert fvu(residual, decoded.numpy()) == pytest.approx(fvu(residual, h[1]), rel=0.01)
    if "layout" not in name:  # trained, and not rewritten with one threshold for all
        assert fvu(residual, decoded.numpy()) < 0.2


Pair = tuple[np.ndarray, np.ndarray]


def by_sae_lens(folder: Path, x: np.ndarray) -> Pair:
    import warnings

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        import sae_lens

        sae = sae_lens.SAE.load_from_disk(folder)
        h = sae.encode(torch.from_numpy(x).float())
        return h.numpy(), sae.decode(h).numpy()


def by_sparsify(folder: Path, x: np.ndarray) -> Pair:
    import warnings

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        import sparsify

        coder = sparsify.SparseCoder.load_from_disk(folder)
        values, indices, _ = coder.encode(torch.from_numpy(x).float())
        h = torch.zeros(len(x), coder.num_latents).scatter_(1, indices, values)
        return h.numpy(), coder.decode(values, indices).numpy()


def by_batch_topk(folder: Path, x: np.ndarray) -> Pair:
    w = {name: t.double().numpy() for name, t in torch.load(folder / "ae.pt", weights_only=True).items()}
    pre = np.maximum((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    h = pre * (pre > w["threshold"])
    return h, h @ w["decoder.weight"].T + w["b_dec"]


def by_gemma_scope(folder: Path, x: np.ndarray) -> Pair:
    w = {name: array.astype(np.float64) for name, array in np.load(folder / "params.npz").items()}
    h = relu(w, x, subtract=False, threshold=w["threshold"])
    return h, h @ w["W_dec"] + w["b_dec"]


def by_llama_scope(folder: Path, x: np.ndarray) -> Pair:
    from safetensors.torch import load_file

    said = json.loads((folder / "hyperparams.json").read_text())
    w = {name: t.double().numpy() for name, t in load_file(folder / "checkpoints" / "final.safetensors").items()}
    scale = np.sqrt(said["d_model"]) / said["dataset_average_activation_norm"]["in"]
    pre = scale * x @ w["encoder.weight"].T + w["encoder.bias"]
    h = np.where(pre > scale * said["jump_relu_threshold"], pre, 0)
    return h, (h @ w["decoder.weight"].T + w["decoder.bias"]) / scale


EQUATIONS: dict[str, Callable[[Path, np.ndarray], Pair]] = {
    "SAELens": by_sae_lens,
    "sparsify": by_sparsify,
    "dictionary_learning": by_batch_topk,
    "Gemma": by_gemma_scope,
    "Llama": by_llama_scope,
}
