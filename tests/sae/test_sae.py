"""SAE folders: read as sae-lens reads them, and refused in one sentence where they are damaged or not supported."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_features import check_alike, dense

import sts_fast
from sts_fast.errors import InputError
from sts_fast.model.language_model import load_decoder
from sts_fast.places import split_name
from sts_fast.sae import SAE, load_sae

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the published SAEs are not beside the checkout")
PUBLISHED = [
    "saelens_v5.11.0_stories260K_L2_jumprelu",
    "saelens_v6_stories260K_L2_gated",
    "saelens_v6_stories260K_L2_jumprelu",
    "saelens_v6_stories260K_L2_standard",
    "saelens_v6_stories260K_L2_topk",
]

D_IN, D_SAE = 6, 20
ARCHITECTURES = ("standard", "jumprelu", "gated", "topk")
OWN_TENSORS = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("r_mag", "b_mag", "b_gate"),
    "topk": ("b_enc",),
}


def tensors_of(architecture: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    shapes |= dict.fromkeys(OWN_TENSORS[architecture], (D_SAE,))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    return tensors


def config_of(architecture: str) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "model_name": "tiny", "prepend_bos": True},
        **({"k": 3, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
    }


def write_sae(
    folder: Path,
    architecture: str = "standard",
    *,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor | None] | None = None,
) -> Path:
    """A folder as SAELens 6 writes it; `...` in `config` and None in `tensors` leave an entry out."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = {**config_of(architecture), **(config or {})}
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))
    kept = {**tensors_of(architecture), **(tensors or {})}
    save_file({name: t for name, t in kept.items() if t is not None}, folder / "sae_weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def sae_lens() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports warn
        return pytest.importorskip("sae_lens")


def distance_to_threshold(folder: Path, acts: np.ndarray) -> np.ndarray:
    """[n_tokens, d_sae] how far, in float64, each feature is from firing or not, by the equations of SAELens."""
    config = json.loads((folder / "cfg.json").read_text())
    w = {name: tensor.double().numpy() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    x = acts.astype(np.float64) - w["b_dec"] * config["apply_b_dec_to_input"]
    product = x @ w["W_enc"]
    if config["architecture"] == "gated":
        return np.minimum(np.abs(product + w["b_gate"]), np.abs(product * np.exp(w["r_mag"]) + w["b_mag"]))
    pre = product + w["b_enc"]
    if config["architecture"] == "jumprelu":
        return np.minimum(np.abs(pre - w["threshold"]), np.abs(pre))
    if config["architecture"] == "topk":
        if config["rescale_acts_by_decoder_norm"]:
            pre = pre * np.linalg.norm(w["W_dec"], axis=1)
        kth = np.sort(pre, axis=1)[:, -config["k"]][:, None]
        below = np.sort(pre, axis=1)[:, -config["k"] - 1][:, None]
        gap = np.where(pre >= kth, pre - below, kth - pre)
        return np.minimum(gap, np.abs(pre))
    return np.abs(pre)


# As sae-lens reads them -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_activations() -> np.ndarray:
    """[n_tokens, 64] the residual stream of stories260K after layer 2, on a published story."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ASSETS / "models" / "stories260K"
    text = (ASSETS / "data" / "tinystories" / "cs336_sample.txt").read_text(encoding="utf-8")[:6000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False).input_ids)
    rows = []
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        for part in ids[: len(ids) // 400 * 400].view(-1, 400):
            rows.append(model(part[None], output_hidden_states=True).hidden_states[3][0])
    return torch.cat(rows).numpy()


@needs_assets
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sae_encodes_as_sae_lens_does(name: str, real_activations: np.ndarray, sae_lens: Any) -> None:
    folder = ASSETS / "saes" / name
    sae = load_sae(folder)
    theirs = sae_lens.SAE.load_from_disk(folder)
    assert (sae.d_in, sae.d_sae, sae.architecture) == (64, 512, theirs.cfg.architecture())
    assert (split_name(sae.hook_name)[1], sae.model_name, sae.prepend_bos, sae.notes) == (2, "stories260K", True, ())
    with torch.no_grad():
        expected = theirs.encode(torch.from_numpy(real_activations)).numpy()
    assert len(real_activations) >= 1000
    assert (expected > 0).sum() > len(real_activations)
    n_flips = check_alike(dense(sae, real_activations), expected, distance_to_threshold(folder, real_activations))
    assert n_flips <= 1e-4 * (expected > 0).sum()


@needs_assets
def test_published_sae_of_pooled_layers_needs_a_layer(sae_lens: Any) -> None:
    folder = ASSETS / "saes" / "toy_router_relu64"
    sae = load_sae(folder, layer=1)
    assert (split_name(sae.hook_name)[1], sae.d_in, sae.d_sae) == (1, 32, 64)
    model, tokens = ASSETS / "models" / "toy_router_gpt2", torch.zeros((1, 4), dtype=torch.long)
    with pytest.raises(InputError, match=r"has no module 'blocks\.\*\.hook_resid .*--hook.*; or --layer"):
        load_decoder(model, load_sae(folder).hook_name)
    assert load_decoder(model, sae.hook_name).run(input_ids=tokens)[0].shape == (1, 4, sae.d_in)
    acts = np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32)
    with torch.no_grad():
        expected = sae_lens.SAE.load_from_disk(folder).encode(torch.from_numpy(acts)).numpy()
    check_alike(dense(sae, acts), expected, distance_to_threshold(folder, acts))


def test_topk_of_all_and_of_one(tmp_path: Path, sae_lens: Any) -> None:
    acts = np.random.default_rng(1).normal(size=(300, D_IN)).astype(np.float32)
    for k in (1, D_SAE):
        folder = write_sae(tmp_path / str(k), "topk", config={"k": k})
        with torch.no_grad():
            expected = sae_lens.SAE.load_from_disk(folder).encode(torch.from_numpy(acts)).numpy()
        assert np.allclose(dense(load_sae(folder), acts), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "rescaled"])
def test_features_are_decoded_as_sae_lens_does(architecture: str, tmp_path: Path, sae_lens: Any) -> None:
    """More rows than are decoded at a time, and some of the features alone."""
    config = {"rescale_acts_by_decoder_norm": True} if architecture == "rescaled" else {}
    folder = write_sae(tmp_path, architecture.replace("rescaled", "topk"), config=config)
    sae, theirs = load_sae(folder), sae_lens.SAE.load_from_disk(folder)
    acts = np.random.default_rng(2).normal(size=(1500, D_IN)).astype(np.float32)
    features = sae.encode(acts)
    for name in ("indptr", "indices", "values"):
        assert np.array_equal(getattr(features, name), getattr(sts_fast.encode(sae, acts), name))
    for some in (features, sts_fast.encode(sae, acts, columns=np.array([3, 7]))):
        decoded = sae.decode(some)
        assert (decoded.shape, decoded.dtype) == ((1500, D_IN), torch.float32)
        with torch.no_grad():
            expected = theirs.decode(torch.from_numpy(some.to_dense()))
        assert torch.allclose(decoded, expected, rtol=1e-4, atol=1e-5)
    assert sae.decode(features.rows(0, 0)).shape == (0, D_IN)
    assert np.array_equal(features.rows(1490, 1600).to_dense(), features.to_dense()[1490:])


def test_what_cannot_be_decoded_alone(tmp_path: Path) -> None:
    acts = np.ones((2, D_IN), np.float32)
    without = load_sae(write_sae(tmp_path / "without", tensors={"W_dec": None}))
    with pytest.raises(InputError, match="without has no decoder in its files"):
        without.decode(without.encode(acts))
    normalising = load_sae(write_sae(tmp_path / "norm", config={"normalize_activations": "layer_norm"}))
    with pytest.raises(InputError, match=r"normalises its input: decode with that input, as sae\.reconstruct\(acts"):
        normalising.decode(normalising.encode(acts))


def test_a_dtype_is_given_by_name_or_as_torch_has_it(tmp_path: Path) -> None:
    folder = write_sae(tmp_path)
    for dtype in ("bfloat16", torch.bfloat16):
        assert load_sae(folder, dtype=dtype).W_enc.dtype == torch.bfloat16
        assert load_sae(folder).with_dtype(dtype).W_enc.dtype == torch.bfloat16
    with pytest.raises(InputError, match="must be float32 or bfloat16, not int8"):
        load_sae(folder, dtype=torch.int8)


def test_only_a_sample_is_reconstructed(tmp_path: Path) -> None:
    sae = load_sae(write_sae(tmp_path))
    zeros = np.zeros((1025, D_IN), np.float32)
    with pytest.raises(InputError, match="at most 1024 rows can be reconstructed at a time, not 1025"):
        sae.reconstruct(zeros, sts_fast.encode(sae, zeros))
    without = load_sae(write_sae(tmp_path / "without", tensors={"W_dec": None}))
    assert without.reconstruct(zeros[:5], sts_fast.encode(without, zeros[:5])) is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_sae_lens_saves_is_read(architecture: str, tmp_path: Path, sae_lens: Any) -> None:
    name = {"standard": "Standard", "jumprelu": "JumpReLU", "gated": "Gated", "topk": "TopK"}[architecture]
    options = {"k": 3} if architecture == "topk" else {}
    config = getattr(sae_lens, f"{name}SAEConfig")(d_in=D_IN, d_sae=D_SAE, **options)
    config.metadata.hook_name = "blocks.7.hook_resid_pre"
    theirs = getattr(sae_lens, f"{name}SAE")(config)
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    theirs.save_model(tmp_path / "sae")
    sae = load_sae(tmp_path / "sae")
    place = ("resid_pre", 7)
    assert (sae.architecture, split_name(sae.hook_name), sae.source) == (architecture, place, str(tmp_path / "sae"))
    for field in ("W_enc", "b_dec", *OWN_TENSORS[architecture]):
        assert np.array_equal(np.asarray(getattr(sae, field)), getattr(theirs, field).detach().numpy()), field


# What a folder may look like ------------------------------------------------------------------------------------------


def test_fields_of_a_folder(tmp_path: Path) -> None:
    sae = load_sae(write_sae(tmp_path / "sae", "topk", config={"apply_b_dec_to_input": False}))
    assert (sae.architecture, sae.k, sae.d_in, sae.d_sae) == ("topk", 3, D_IN, D_SAE)
    assert sae.apply_b_dec_to_input is False
    assert (sae.hook_name, split_name(sae.hook_name)[1]) == ("blocks.3.hook_resid_post", 3)
    assert (sae.model_name, sae.prepend_bos, sae.source) == ("tiny", True, str(tmp_path / "sae"))
    assert sae.W_dec_norm is None


def test_flat_config_of_version_5(tmp_path: Path) -> None:
    flat = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "model_name": "old",
        "hook_name": "blocks.5.hook_resid_pre",
        "hook_layer": 5,
        "prepend_bos": True,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    }
    folder = write_sae(tmp_path / "sae")
    (folder / "cfg.json").write_text(json.dumps(flat))  # no architecture: it was standard
    sae = load_sae(folder)
    assert (sae.architecture, sae.model_name, sae.prepend_bos) == ("standard", "old", True)
    assert sae.hook_name == "blocks.5.hook_resid_pre"
    assert sae.apply_b_dec_to_input is False
    (folder / "cfg.json").write_text(
        json.dumps({**flat, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "architecture": "standard"})
    )
    sae = load_sae(folder)
    assert (sae.architecture, sae.k) == ("topk", 4)
    assert ((dense(sae, np.ones((5, D_IN), np.float32)) > 0).sum(axis=1) <= 4).all()


def test_hook_point_of_the_oldest_configs(tmp_path: Path) -> None:
    config = {"metadata": ..., "hook_point": "blocks.2.hook_resid_post"}
    assert load_sae(write_sae(tmp_path, config=config)).hook_name == "blocks.2.hook_resid_post"


def test_topk_normalises_booleans_of_old_configs(tmp_path: Path) -> None:
    assert load_sae(write_sae(tmp_path, config={"normalize_activations": False})).notes == ()
    assert load_sae(write_sae(tmp_path, config={"normalize_activations": None})).notes == ()
    assert len(load_sae(write_sae(tmp_path, config={"normalize_activations": True})).notes) == 1


def test_expected_average_only_in_is_noted(tmp_path: Path) -> None:
    sae = load_sae(write_sae(tmp_path, config={"normalize_activations": "expected_average_only_in"}))
    (note,) = sae.notes
    assert "expected_average_only_in" in note
    assert "wrong" in note


def test_log_threshold_stands_in_for_threshold(tmp_path: Path) -> None:
    threshold = tensors_of("jumprelu")["threshold"]
    sae = load_sae(write_sae(tmp_path, "jumprelu", tensors={"threshold": None, "log_threshold": threshold.log()}))
    assert sae.threshold is not None
    assert np.allclose(sae.threshold, threshold.numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_weights(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(architecture).items()}
    sae = load_sae(write_sae(tmp_path, architecture, tensors=dict(tensors)))
    assert sae.W_enc.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert torch.equal(sae.W_enc.float(), tensors["W_enc"].float())
    assert sae.b_dec.dtype == np.float32
    assert np.array_equal(sae.b_dec, tensors["b_dec"].float().numpy())
    upcast = load_sae(
        write_sae(tmp_path / "f32", architecture, tensors={name: t.float() for name, t in tensors.items()})
    )
    acts = np.random.default_rng(0).normal(size=(50, D_IN)).astype(np.float32)
    assert np.allclose(dense(sae, acts), dense(upcast, acts), rtol=1e-5, atol=1e-6)


def test_with_dtype_rounds_to_nearest(tmp_path: Path) -> None:
    sae = load_sae(write_sae(tmp_path))
    rounded = sae.with_dtype("bfloat16")
    assert rounded.W_enc.dtype == torch.bfloat16
    assert torch.equal(rounded.W_enc, sae.W_enc.bfloat16())
    assert np.array_equal(rounded.b_enc, sae.b_enc)
    assert rounded.with_dtype("float32").W_enc.dtype == torch.float32
    with pytest.raises(InputError, match="float32 or bfloat16, not float16"):
        sae.with_dtype("float16")


def resident(path: Path) -> int:
    """Bytes of the file that are mapped into this process and were touched."""
    pages = 0
    for part in Path("/proc/self/smaps").read_text().split("\n")[::-1]:
        if part.startswith("Rss:"):
            size = int(part.split()[1]) * 1024
        elif part.endswith(str(path)):
            pages += size
    return pages


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="tells mapped pages by Linux's own means")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_decoder_is_not_loaded_and_the_encoder_is_mapped(architecture: str, tmp_path: Path) -> None:
    d_in, d_sae = 50, 60_000
    wide = {"W_enc": torch.ones(d_in, d_sae), "W_dec": torch.ones(d_sae, d_in), "b_dec": torch.zeros(d_in)}
    wide |= {name: torch.ones(d_sae) for name in OWN_TENSORS[architecture]}
    folder = write_sae(tmp_path, architecture, tensors=dict(wide), config={"d_in": d_in, "d_sae": d_sae})
    weights = folder / "sae_weights.safetensors"
    sae = load_sae(folder)
    assert resident(weights) < 0.1 * sae.W_enc.nbytes  # some pages of the vectors
    assert float(sae.W_enc.sum()) == d_in * d_sae
    assert resident(weights) < 1.1 * sae.W_enc.nbytes
    rows = sae.decoder_rows(range(1000))
    assert rows is not None
    assert rows.shape == (1000, d_in)
    assert resident(weights) < 1.1 * sae.W_enc.nbytes
    del sae
    assert resident(weights) == 0
    assert load_sae(write_sae(tmp_path / "without", architecture, tensors={"W_dec": None})).decoder_rows([1]) is None


def test_of_the_decoder_only_norms_are_kept_where_topk_rescales(tmp_path: Path) -> None:
    sae = load_sae(write_sae(tmp_path, "topk", config={"rescale_acts_by_decoder_norm": True}))
    assert sae.W_dec_norm is not None
    assert np.allclose(sae.W_dec_norm, np.linalg.norm(tensors_of("topk")["W_dec"].numpy(), axis=1), rtol=1e-6)


def test_norms_of_many_rows_are_read_in_blocks(tmp_path: Path) -> None:
    d_sae = 9001
    wide = {"W_enc": torch.randn(D_IN, d_sae), "W_dec": torch.randn(d_sae, D_IN), "b_enc": torch.zeros(d_sae)}
    config = {"rescale_acts_by_decoder_norm": True, "d_sae": d_sae}
    sae = load_sae(write_sae(tmp_path, "topk", config=config, tensors=dict(wide)))
    assert sae.W_dec_norm is not None
    assert np.allclose(sae.W_dec_norm, np.linalg.norm(wide["W_dec"].numpy(), axis=1), rtol=1e-6)


# Where an SAE reads ---------------------------------------------------------------------------------------------------


def test_layer_and_hook_override_the_files(tmp_path: Path) -> None:
    folder = write_sae(tmp_path)
    assert load_sae(folder, layer=9).hook_name == "blocks.9.hook_resid_post"
    assert load_sae(folder, hook="blocks.4.hook_resid_pre").hook_name == "blocks.4.hook_resid_pre"
    assert load_sae(folder, layer=0).hook_name == "blocks.0.hook_resid_post"
    with pytest.raises(InputError, match="--layer counts from 0, and is not -1"):
        load_sae(folder, layer=-1)
    with pytest.raises(InputError, match="--layer and --hook say the same thing"):
        load_sae(folder, layer=1, hook="blocks.1.hook_resid_post")


# Damaged and unsupported folders --------------------------------------------------------------------------------------

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def broken_at(name: str, content: bytes | None) -> Callable[[Path], Any]:
    """A good folder in which one file is missing or holds something else."""

    def write(folder: Path) -> None:
        write_sae(folder)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return write


def cut_off(folder: Path) -> None:
    whole = (write_sae(folder) / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-50])


def with_config(architecture: str = "standard", **config: Any) -> Callable[[Path], Any]:
    return lambda folder: write_sae(folder, architecture, config=config)


def with_architecture(name: str | None, **config: Any) -> Callable[[Path], Any]:
    return lambda folder: write_sae(folder, config={"architecture": name, **config})


def with_tensors(architecture: str = "standard", **tensors: torch.Tensor | None) -> Callable[[Path], Any]:
    return lambda folder: write_sae(folder, architecture, tensors=tensors)


NAN, INF = float("nan"), float("inf")


def one_bad(architecture: str, name: str, value: float) -> torch.Tensor:
    tensor = tensors_of(architecture)[name].clone()
    tensor.view(-1)[3] = value
    return tensor


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (broken_at(CFG, None), r"has no cfg\.json"),
    "no weights": (broken_at(WEIGHTS, None), r"no sae_weights\.safetensors"),
    "config cut off": (broken_at(CFG, b'{"d_in": 6,'), r"cfg\.json is not readable JSON"),
    "config empty": (broken_at(CFG, b""), r"cfg\.json is not readable JSON"),
    "config not UTF-8": (broken_at(CFG, b'{"a": "\xff\xfe"}'), r"cfg\.json is not readable JSON"),
    "config a list": (broken_at(CFG, b"[1, 2]"), r"cfg\.json does not hold a JSON object"),
    "config a string": (broken_at(CFG, b'"standard"'), r"cfg\.json does not hold a JSON object"),
    "config null": (broken_at(CFG, b"null"), r"cfg\.json does not hold a JSON object"),
    "config nested without end": (broken_at(CFG, b"[" * 100_000), r"cfg\.json is not readable JSON"),
    "weights empty": (broken_at(WEIGHTS, b""), "not a readable safetensors file"),
    "weights random": (broken_at(WEIGHTS, np.random.default_rng(0).bytes(9999)), "not a readable safetensors file"),
    "weights a huge header": (broken_at(WEIGHTS, b"\xff" * 8 + b"{}"), "not a readable safetensors file"),
    "weights cut off": (cut_off, "not a readable safetensors file"),
    "weights of another format": (broken_at(WEIGHTS, b"PK\x03\x04" + bytes(500)), "not a readable safetensors file"),
    "no W_enc": (with_tensors(W_enc=None), "no tensor 'W_enc', which its layout needs"),
    "no b_enc": (with_tensors(b_enc=None), "no tensor 'b_enc'"),
    "no b_dec": (with_tensors(b_dec=None), "no tensor 'b_dec'"),
    "no threshold": (with_tensors("jumprelu", threshold=None), "no tensor 'threshold', which its layout needs"),
    "no r_mag": (with_tensors("gated", r_mag=None), "no tensor 'r_mag', which its layout needs"),
    "no W_dec to rescale with": (
        lambda f: write_sae(f, "topk", config={"rescale_acts_by_decoder_norm": True}, tensors={"W_dec": None}),
        "no tensor 'W_dec', which its layout needs",
    ),
    "no tensors": (
        with_tensors(W_enc=None, W_dec=None, b_enc=None, b_dec=None),
        "no tensor 'W_enc'",
    ),
    "W_enc the other way round": (
        with_tensors(W_enc=torch.zeros(D_SAE, D_IN)),
        r"cfg\.json says d_in = 6, but the weights have 20",
    ),
    "W_enc flat": (with_tensors(W_enc=torch.zeros(D_IN * D_SAE)), r"W_enc has shape \[120\]"),
    "W_enc of rank 3": (with_tensors(W_enc=torch.zeros(1, D_IN, D_SAE)), r"W_enc has shape \[1, 6, 20\]"),
    "W_enc without rows": (with_tensors(W_enc=torch.zeros(0, D_SAE)), r"W_enc has shape \[0, 20\]"),
    "W_enc without columns": (with_tensors(W_enc=torch.zeros(D_IN, 0)), r"W_enc has shape \[6, 0\]"),
    "W_enc a number": (with_tensors(W_enc=torch.tensor(1.0)), r"W_enc has shape \[\]"),
    "b_dec of d_sae": (with_tensors(b_dec=torch.zeros(D_SAE)), r"b_dec has shape \[20\], but \[6\] is needed"),
    "b_enc of d_in": (with_tensors(b_enc=torch.zeros(D_IN)), r"b_enc has shape \[6\], but \[20\] is needed"),
    "b_enc as a row": (with_tensors(b_enc=torch.zeros(1, D_SAE)), r"b_enc has shape \[1, 20\], but \[20\] is needed"),
    "threshold a number": (
        with_tensors("jumprelu", threshold=torch.tensor(0.5)),
        r"threshold has shape \[\], but \[20\] is needed",
    ),
    "log_threshold of d_in": (
        with_tensors("jumprelu", threshold=None, log_threshold=torch.zeros(D_IN)),
        r"log_threshold has shape \[6\]",
    ),
    "W_dec the other way round": (
        lambda f: write_sae(
            f, "topk", config={"rescale_acts_by_decoder_norm": True}, tensors={"W_dec": torch.zeros(D_IN, D_SAE)}
        ),
        r"W_dec has shape \[6, 20\], but \[20, 6\] is needed",
    ),
    "another width": (with_config(d_sae=D_SAE + 1), r"cfg\.json says d_sae = 21, but the weights have 20"),
    "another input": (with_config(d_in=768), r"cfg\.json says d_in = 768, but the weights have 6"),
    "width as text": (with_config(d_in="6"), "d_in must be a whole number, but is '6'"),
    "NaN in W_enc": (with_tensors(W_enc=one_bad("standard", "W_enc", NAN)), "W_enc contains NaN or infinity"),
    "infinity in W_enc": (with_tensors(W_enc=one_bad("standard", "W_enc", -INF)), "W_enc contains NaN or infinity"),
    "NaN in b_enc": (with_tensors(b_enc=one_bad("standard", "b_enc", NAN)), "b_enc contains NaN or infinity"),
    "NaN in b_dec": (with_tensors(b_dec=one_bad("standard", "b_dec", NAN)), "b_dec contains NaN or infinity"),
    "NaN in threshold": (
        with_tensors("jumprelu", threshold=one_bad("jumprelu", "threshold", NAN)),
        "threshold contains NaN or infinity",
    ),
    "infinity in r_mag": (with_tensors("gated", r_mag=one_bad("gated", "r_mag", INF)), "r_mag contains NaN"),
    "NaN in W_dec": (
        lambda f: write_sae(
            f,
            "topk",
            config={"rescale_acts_by_decoder_norm": True},
            tensors={"W_dec": one_bad("topk", "W_dec", NAN)},
        ),
        "W_dec.* contains NaN or infinity",
    ),
    "integer W_enc": (with_tensors(W_enc=torch.zeros(D_IN, D_SAE, dtype=torch.int8)), "W_enc has dtype int8"),
    "integer b_enc": (with_tensors(b_enc=torch.zeros(D_SAE, dtype=torch.int64)), "b_enc has dtype int64"),
    "boolean threshold": (
        with_tensors("jumprelu", threshold=torch.zeros(D_SAE, dtype=torch.bool)),
        "threshold has dtype bool",
    ),
    "fp8 W_enc": (
        with_tensors(W_enc=torch.zeros(D_IN, D_SAE).to(torch.float8_e4m3fn)),
        "W_enc has dtype float8_e4m3fn",
    ),
    "no k": (with_config("topk", k=...), r"k must be .* between 1 and d_sae = 20"),
    "k null": (with_config("topk", k=None), "k must be .* is None"),
    "k zero": (with_config("topk", k=0), "k must be .* is 0"),
    "k negative": (with_config("topk", k=-3), "k must be .* is -3"),
    "k too large": (with_config("topk", k=D_SAE + 1), "k must be .* is 21"),
    "k true": (with_config("topk", k=True), "k must be .* is True"),
    "k a fraction": (with_config("topk", k=2.5), r"k must be .* is 2\.5"),
    "k text": (with_config("topk", k="3"), "k must be a whole number"),
    "k of version 5 missing": (with_config(activation_fn_str="topk", activation_fn_kwargs={}), "k must be"),
    "unknown architecture": (with_architecture("crosscoder"), r"cfg\.json: architecture 'crosscoder' is not"),
    "matching pursuit": (with_architecture("matching_pursuit"), "architecture 'matching_pursuit' is not"),
    "temporal": (with_architecture("temporal"), "architecture 'temporal' is not supported"),
    "transcoder": (with_architecture("transcoder", d_out=7), r"cfg\.json says d_out = 7, but the weights have 6"),
    "an unknown normalisation": (with_config(normalize_activations="rms"), "normalize_activations 'rms' is not"),
    "an unknown reshaping": (
        with_config(reshape_activations="hook_q"),
        "reshape_activations 'hook_q' is not supported",
    ),
    "a single head": (with_config(hook_head_index=3), "hook_head_index 3: an SAE of a single head"),
    "a flag as text": (with_config(apply_b_dec_to_input="false"), "apply_b_dec_to_input must be true or false"),
    "tanh-relu": (with_config(activation_fn_str="tanh-relu"), "activation_fn 'tanh-relu' is not supported"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_folder_is_told_in_one_sentence(fault: str, tmp_path: Path) -> None:
    write, message = BROKEN[fault]
    write(tmp_path / "bad")
    started = time.process_time()
    with pytest.raises(InputError, match=message) as e:
        load_sae(tmp_path / "bad")
    assert time.process_time() - started < 1
    text = str(e.value)
    assert str(tmp_path / "bad") in text
    assert len(text) < 500
    assert "\n" not in text


# What a hand-edited or foreign cfg.json may hold anywhere: it is either understood or refused, never a traceback.
JUNK: list[Any] = [None, [], [1], {}, {"k": [1]}, "", "x", "é" * 300, -1, 0, 2.5, 10**400, True, False]


KEYS = ("architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "k")
KEYS += ("reshape_activations", "metadata", "hook_name", "model_name", "prepend_bos", "activation_fn_str")
KEYS += ("activation_fn", "activation_fn_kwargs", "rescale_acts_by_decoder_norm", "hook_point")


def refusal(folder: Path) -> str | None:
    try:
        load_sae(folder)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_junk_in_the_config_never_ends_in_a_traceback(architecture: str, key: str, tmp_path: Path) -> None:
    folder, good = write_sae(tmp_path, architecture), config_of(architecture)
    old_topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}
    for junk in JUNK:
        for change in (
            {key: junk},
            {**old_topk, key: junk},
            {"metadata": {"hook_name": "blocks.1.hook_resid_post", key: junk}},
        ):
            (folder / "cfg.json").write_text(json.dumps({**good, **change}))
            assert "\n" not in (refusal(folder) or "")


# What can be given as an SAE ------------------------------------------------------------------------------------------


def test_places_where_there_is_no_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "nowhere", "./nowhere", "../no/where", "nowhere", "", "x" * 5000, "./" + "x" * 300):
        with pytest.raises(InputError, match="there is no SAE at"):
            load_sae(place)


# An SAE made by hand --------------------------------------------------------------------------------------------------


def made(**changes: Any) -> SAE:
    fields: dict[str, Any] = {
        "architecture": "standard",
        "W_enc": np.zeros((D_IN, D_SAE), np.float32),
        "b_enc": np.zeros(D_SAE, np.float32),
        "b_dec": np.zeros(D_IN, np.float32),
    }
    return SAE(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "batchtopk"}, "architecture 'batchtopk', which is not supported"),
        ({"W_enc": np.zeros(4, np.float32)}, "W_enc must have two dimensions"),
        ({"b_enc": np.zeros(D_IN, np.float32)}, r"b_enc must have shape \(20,\), but has \(6,\)"),
        ({"b_dec": np.zeros(D_SAE, np.float32)}, r"b_dec must have shape \(6,\)"),
        ({"architecture": "jumprelu"}, "a jumprelu SAE needs threshold"),
        ({"architecture": "jumprelu", "threshold": np.zeros(3, np.float32)}, "threshold must have shape"),
        ({"architecture": "gated"}, "a gated SAE needs r_mag"),
        ({"architecture": "topk"}, "k must lie between 1 and d_sae = 20, but is 0"),
        ({"architecture": "topk", "k": 21}, "k must lie between 1 and d_sae = 20, but is 21"),
    ],
)
def test_parts_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**changes)
