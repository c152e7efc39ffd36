"""SAEs that belong to their model, and SAEs of another layer, model or normalisation."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny import Tiny

from sts_fast import InputError, load_sae, score
from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.model.language_model import LanguageModel
from sts_fast.model.sae_check import check_names, measure_fit
from sts_fast.sae import SAE

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the real material is not beside this checkout")

D_IN, D_SAE, LAYER, VOCABULARY = 64, 256, 2, 50


def make_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D_IN, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def make_prompts(seed: int = 0) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    prompts = []
    for i in range(40):
        ids = rng.integers(3, VOCABULARY, 30).astype(np.int32)
        read, none = np.arange(2, 30, dtype=np.int32), np.zeros(0, np.int32)
        prompts.append(Prompt(str(i), ids, none, read, none, none, 0))
    return prompts


def make_set(n: int | None = None) -> PromptSet:
    return PromptSet("train", make_prompts()[:n], 0, 0)


def states(model: Any, layer: int, seed: int = 1) -> torch.Tensor:
    """[n_tokens, d_in] what a layer gives for other prompts than those that the fit is measured on."""
    ids = torch.from_numpy(np.stack([prompt.base_ids for prompt in make_prompts(seed)]).astype(np.int64))
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[layer + 1][:, 2:].reshape(-1, D_IN)


def trained(folder: Path, x: torch.Tensor, hook: str = f"blocks.{LAYER}.hook_resid_post", **config: Any) -> SAE:
    """An SAE that belongs to x: each feature knows rows near one of x's own, and the decoder gives x back best."""
    generator = torch.Generator().manual_seed(0)
    b_dec = x.mean(dim=0)
    known = (x - b_dec)[torch.randperm(len(x), generator=generator)[:D_SAE]].T
    W_enc = torch.linalg.lstsq(torch.cov(x.T).double(), known.double()).solution.float()
    W_enc = (W_enc / W_enc.norm(dim=0)).contiguous()
    b_enc = -((x - b_dec) @ W_enc).quantile(0.9, dim=0)
    h = torch.relu((x - b_dec) @ W_enc + b_enc)
    W_dec = torch.linalg.lstsq(h.double(), (x - b_dec).double()).solution.float().contiguous()
    folder.mkdir()
    save_file({"W_enc": W_enc, "b_enc": b_enc, "b_dec": b_dec, "W_dec": W_dec}, folder / "sae_weights.safetensors")
    settings = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "normalize_activations": "none", **config}
    (folder / "cfg.json").write_text(json.dumps({**settings, "metadata": {"hook_name": hook}}))
    return load_sae(folder)


def fit_of(sae: SAE, model: Any) -> Any:
    [fit] = measure_fit(LanguageModel(model, sae.hook_name), [sae], make_set())
    return fit


def test_an_sae_that_belongs(tmp_path: Path) -> None:
    """Its numbers against the equations in float64, over the same tokens."""
    model = make_model()
    sae = trained(tmp_path / "sae", states(model, LAYER))
    fit = fit_of(sae, model)
    x = states(model, LAYER, seed=0)[: fit.n_tokens].double()
    weights = {name: torch.as_tensor(getattr(sae, name)).double() for name in ("W_enc", "b_enc", "b_dec")}
    W_dec = sae.decoder_rows(range(D_SAE)).double()
    h = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    left = ((x - h @ W_dec - weights["b_dec"]) ** 2).sum() / ((x - x.mean(dim=0)) ** 2).sum()
    assert fit.n_tokens == 1024
    assert fit.variance_explained == pytest.approx(1 - float(left), abs=1e-5)
    assert fit.variance_explained > 0.6
    assert fit.mean_l0 == pytest.approx(float((h > 0).sum(dim=1).double().mean()), abs=0.01)
    assert fit.dead_share == pytest.approx(float((h <= 0).all(dim=0).double().mean()), abs=0.011)
    assert (fit.fits, fit.warning) == (True, None)
    # Rows of it are enough for the decoder, and a config that tells L0 is heeded.
    assert fit_of(replace(sae, l0=fit.mean_l0 / 2.9), model).fits
    doubtful = fit_of(replace(sae, l0=fit.mean_l0 / 3.1), model)
    assert not doubtful.fits
    assert re.search(r"of its features fire per token, but .* did in training", doubtful.warning)


def test_of_another_layer(tmp_path: Path) -> None:
    model = make_model()
    sae = trained(tmp_path / "sae", states(model, LAYER), hook="blocks.3.hook_resid_post")
    fit = fit_of(sae, model)
    assert not fit.fits
    assert fit.warning.endswith("otherwise: read it at blocks.2.hook_resid_post")


def test_of_another_model(tmp_path: Path) -> None:
    sae = trained(tmp_path / "sae", states(make_model(1), LAYER))
    fit = fit_of(sae, make_model())
    assert not fit.fits
    assert "is it of another model or layer" in fit.warning
    assert "--norm-scaling-factor" not in fit.warning  # which this SAE does not take
    assert "(give --norm-scaling-factor then)?" in fit_of(replace(sae, needs_scaling=True), make_model()).warning


@pytest.mark.parametrize("told", [True, False])
def test_a_scaling_that_was_forgotten(told: bool, tmp_path: Path) -> None:
    """Found with its factor; which then is all that was missing, where the files ask for it."""
    model = make_model()
    x = states(model, LAYER)
    factor = D_IN**0.5 / float(x.norm(dim=1).mean())
    asks = {"normalize_activations": "expected_average_only_in"} if told else {}
    sae = trained(tmp_path / "sae", x * factor, **asks)
    fit = fit_of(sae, model)
    assert not fit.fits
    assert "trained on inputs scaled to a mean norm of the root of d_in" in fit.warning
    if told:
        found = float(re.search(r"give --norm-scaling-factor ([\d.]+)", fit.warning)[1])
        assert found == pytest.approx(factor, rel=0.02)
        mended = load_sae(tmp_path / "sae", norm_scaling_factor=found)
        assert fit_of(mended, model).fits
        assert fit_of(mended, model).variance_explained > 0.6


def test_a_scaling_given_for_nothing(tmp_path: Path) -> None:
    model = make_model()
    sae = trained(tmp_path / "sae", states(model, LAYER), normalize_activations="expected_average_only_in")
    fit = fit_of(sae.scaled(0.1), model)
    assert "otherwise: leave out --norm-scaling-factor" in fit.warning
    assert fit_of(sae, model).fits


def test_a_normalisation_that_the_files_do_not_name(tmp_path: Path) -> None:
    model = make_model()
    x = states(model, LAYER)
    normed = (x - x.mean(dim=1, keepdim=True)) / (x.std(dim=1, keepdim=True) + 1e-5)
    fit = fit_of(trained(tmp_path / "sae", normed * 1.0), model)
    assert "otherwise: its files should say normalize_activations 'layer_norm'" in fit.warning


def test_several_at_once_and_what_cannot_be_told(tmp_path: Path) -> None:
    model = make_model()
    right = trained(tmp_path / "right", states(model, LAYER))
    blind = replace(right, decoder=None, hook_name="blocks.1.hook_mlp_out")
    silent = replace(right, b_enc=right.b_enc - 1e6)
    saes = [right, blind, silent]
    fits = measure_fit(LanguageModel(model, *dict.fromkeys(sae.hook_name for sae in saes)), saes, make_set())
    assert [fit.fits for fit in fits] == [True, None, False]
    assert fits[1].variance_explained is None
    assert "none of its features fires" in fits[2].warning
    # A forecast does without what a transcoder predicts, where the model has no such place.
    [elsewhere] = measure_fit(
        LanguageModel(model, LAYER),
        [replace(right, hook_name="blocks.2.hook_resid_post", target_hook_name="blocks.1.mlp.hook_post_linear")],
        make_set(),
    )
    assert (elsewhere.variance_explained, elsewhere.n_tokens) == (None, 1024)
    [few] = measure_fit(
        LanguageModel(model, LAYER), [replace(right, hook_name="blocks.2.hook_resid_post")], make_set(1)
    )
    assert (few.n_tokens, few.fits) == (28, None)


@pytest.mark.parametrize(
    ("trained_on", "name", "model_type", "warned"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "qwen2", False),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B", "qwen2", False),
        ("gemma-2-9b", "google/gemma-2-9b-it", "gemma2", False),
        ("Qwen/Qwen2.5-7B", "someone/qwen2.5-7b-math-rl", "qwen2", False),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "./runs/checkpoint-400", "llama", False),
        ("gpt2-small", "openai-community/gpt2", "gpt2", False),
        ("gemma-2b", "google/gemma-2b", "gemma", False),
        ("gemma-2b", "./runs/checkpoint-400", "gemma", False),
        ("gemma-2b-it", "someone/gemma-2b-finetuned", "gemma", False),
        ("gemma-2b", "./runs/checkpoint-400", "gemma2", True),
        ("gemma-2b", "google/gemma-2-2b", "gemma2", True),
        ("gemma-2-2b", "models/gemma-2b", "gemma", True),
        ("gpt2-small", "openai-community/gpt2-xl", "gpt2", True),
        ("Llama-3.1-8B", "/models/Llama-3-8B", "llama", True),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m", "gpt_neox", True),
        ("", "anything/at-all", "llama", False),
        ("google/gemma-2-9b", "./runs/checkpoint-400", "llama", True),
        ("Llama-3.1-8B", "meta-llama/Llama-3.2-3B", "llama", True),
        ("gemma-2-9b", "Qwen/Qwen2.5-7B", "qwen2", True),
    ],
)
def test_names(trained_on: str, name: str, model_type: str, warned: bool) -> None:
    class Config:
        def __init__(self) -> None:
            self.model_type, self.hidden_size, self._name_or_path = model_type, 2, ""

        def get_text_config(self) -> Config:
            return self

    vector = np.zeros(2, np.float32)
    sae = SAE("standard", np.zeros((2, 2), np.float32), vector, vector, hook_name="layers.1", model_name=trained_on)
    warning = check_names(sae, Config(), name)
    assert (warning is not None) == warned
    assert warning is None or f"was trained on {trained_on}, not on {name}" in warning


def test_a_forecast_tells_and_strict_stops(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random SAE explains nothing; a wrong name or width is told before any weight is read."""
    options: dict[str, Any] = {"model": tiny.model, "train": tiny.train, "domains": {}, "shots": 1, "top_n": 24}
    said: list[str] = []
    forecast = score(sae=tiny.saes["standard"], say=said.append, **options)
    fit = forecast.sae["fit"]
    assert (fit["fits"], fit["names"]) == (False, None)
    assert f"warning: {fit['warning']}" in said
    assert forecast.warnings[0] == fit["warning"]
    with pytest.raises(InputError, match=r"may not belong to .*\(--strict\)"):
        score(sae=tiny.saes["standard"], strict=True, **options)

    monkeypatch.setattr(sys.modules["sts_fast.model.session"], "load_decoder", None)
    other = replace(load_sae(tiny.saes["standard"]), model_name="google/gemma-2-9b")
    with pytest.raises(InputError, match=r"was trained on google/gemma-2-9b, not on .*\(--strict\)"):
        score(sae=other, strict=True, **options)
    vector = np.zeros(32, np.float32)
    narrow = SAE("standard", np.zeros((32, 32), np.float32), vector, vector, hook_name="blocks.1.hook_mlp_out")
    with pytest.raises(InputError, match=r"reads 32 dimensions, but .* has 64 at blocks\.1\.hook_mlp_out"):
        score(sae=narrow, **options)


@needs_assets
@pytest.mark.parametrize("name", ["standard", "jumprelu", "topk", "gated"])
def test_trained_saes_of_a_trained_model(name: str) -> None:
    """Each fits where it was trained, and is sent back there from the layer above."""
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "models" / "stories260K").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "models" / "stories260K")
    file = next((ASSETS / "data" / "gsm8k").rglob("*.jsonl"))
    rows = [json.loads(line)["question"] for line in file.read_text().splitlines()[:30]]
    none = np.zeros(0, np.int32)
    prompts = [
        Prompt("", ids, none, np.arange(1, len(ids), dtype=np.int32), none, none, 0)
        for ids in (np.asarray(tokenizer(row).input_ids[:500], np.int32) for row in rows)
    ]
    sae = load_sae(ASSETS / "saes" / f"saelens_v6_stories260K_L2_{name}")
    for layer, fits in ((2, True), (3, False), (4, False)):
        sae = replace(sae, hook_name=f"blocks.{layer}.hook_resid_post")
        [fit] = measure_fit(LanguageModel(model, layer), [sae], PromptSet("train", prompts, 0, 0))
        assert fit.fits == fits
        assert fits or fit.warning.endswith("read it at blocks.2.hook_resid_post")
