"""Places inside decoder layers, against forward hooks on the modules that each architecture is known to have."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from sts_fast import encode, load_sae
from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.errors import InputError
from sts_fast.model.language_model import LanguageModel, load_decoder
from sts_fast.model.sae_check import measure_fit
from sts_fast.places import PLACES, place_name, split_name

N_LAYERS, VOCABULARY, D_MODEL = 4, 60, 32
LAYER = 1
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2_LIKE = {"vocab_size": VOCABULARY, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128}


@dataclass(frozen=True)
class Family:
    """An architecture as its source has it, and where it computes what.

    layers: path of its layers; attn, mlp: modules whose outputs, times `scale`, are added to the residual stream
    projection: module whose input is hook_z; entrance: module that takes mlp_in; None: there is no such place
    parallel: attention and MLP are added at once
    """

    model: str
    options: dict[str, Any]
    layers: str = "model.layers"
    attn: str | None = "self_attn"
    mlp: str | None = "mlp"
    projection: str | None = "self_attn.o_proj"
    entrance: str | None = "mlp"
    parallel: bool = False
    scale: float = 1.0


SANDWICH = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", GROUPED),
    "mistral": Family("MistralForCausalLM", {**GROUPED, "sliding_window": 5}),
    "qwen2": Family("Qwen2ForCausalLM", GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", {**GROUPED, "head_dim": 8, "num_experts": 4, "decoder_sparse_step": 1, **EXPERTS}
    ),
    "mixtral": Family("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": Family("GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA, **SANDWICH),  # type: ignore[arg-type]
    "gemma3": Family("Gemma3ForCausalLM", GEMMA, **SANDWICH),  # type: ignore[arg-type]
    "olmo2": Family("Olmo2ForCausalLM", GROUPED, **SANDWICH),  # type: ignore[arg-type]
    "phi3": Family("Phi3ForCausalLM", {**GROUPED, "sliding_window": 5}),
    "gpt_oss": Family("GptOssForCausalLM", {**GROUPED, "head_dim": 8, "num_local_experts": 4, **EXPERTS}),
    "granite": Family("GraniteForCausalLM", {**GROUPED, "residual_multiplier": 0.22}, scale=0.22),
    "starcoder2": Family("Starcoder2ForCausalLM", GROUPED),
    "gpt2": Family(
        "GPT2LMHeadModel", GPT2_LIKE, layers="transformer.h", attn="attn", projection="attn.c_proj"
    ),
    "bloom": Family(
        "BloomForCausalLM", {**COMMON, "n_layer": N_LAYERS, "n_head": 4}, layers="transformer.h",
        attn="self_attention.dense", projection="self_attention.dense", mlp="mlp.dense_4h_to_h",
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", COMMON, layers="gpt_neox.layers", attn="attention", projection="attention.dense",
        parallel=True,
    ),
    "gpt_neox_sequential": Family(
        "GPTNeoXForCausalLM", {**COMMON, "use_parallel_residual": False}, layers="gpt_neox.layers", attn="attention",
        projection="attention.dense",
    ),
    "gptj": Family(
        "GPTJForCausalLM", {**GPT2_LIKE, "rotary_dim": 4}, layers="transformer.h", attn="attn",
        projection="attn.out_proj", parallel=True,
    ),
    "falcon": Family(
        "FalconForCausalLM", {**COMMON, "multi_query": True, "parallel_attn": True, "alibi": False},
        layers="transformer.h", attn="self_attention", projection="self_attention.dense", parallel=True,
    ),
    "phi": Family("PhiForCausalLM", COMMON, projection="self_attn.dense", parallel=True),
    "cohere": Family("CohereForCausalLM", GROUPED, parallel=True),
    "mamba": Family(
        "MambaForCausalLM", {**COMMON, "state_size": 4}, layers="backbone.layers", attn="mixer", mlp=None,
        entrance=None, projection="mixer.out_proj",
    ),
}  # fmt: skip


@cache
def model_of(family: str) -> Any:
    made = FAMILIES[family]
    model_class = getattr(transformers, made.model)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**made.options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def watched(model: Any, ids: torch.Tensor, paths: list[tuple[str, str]]) -> dict[tuple[str, str], torch.Tensor]:
    """[n_tokens, d] inputs and outputs of modules in one whole forward pass."""
    seen: dict[tuple[str, str], torch.Tensor] = {}

    def first(value: Any) -> torch.Tensor:
        return (value[0] if isinstance(value, tuple) else value)[0].clone()

    handles = []
    for path, side in paths:
        module = model.get_submodule(path)
        if side == "input":
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, options, key=(path, side): seen.update(
                        {key: first(args or options["hidden_states"])}
                    ),
                    with_kwargs=True,
                )
            )
        else:
            handles.append(
                module.register_forward_hook(lambda m, args, out, key=(path, side): seen.update({key: first(out)}))
            )
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def expected_places(family: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    made, block = FAMILIES[family], f"{FAMILIES[family].layers}.{LAYER}"
    wanted = {
        "attn_out": (made.attn, "output"), "mlp_out": (made.mlp, "output"), "mlp_in": (made.entrance, "input"),
        "hook_z": (made.projection, "input"),
    }  # fmt: skip
    sources = {place: (f"{block}.{path}", side) for place, (path, side) in wanted.items() if path}
    sources |= {"resid_pre": (block, "input"), "resid_post": (block, "output")}
    seen = watched(model_of(family), ids, list(sources.values()))
    places = {place: seen[source] for place, source in sources.items()}
    for place in {"attn_out", "mlp_out"} & places.keys():
        places[place] = places[place] * made.scale
    if not made.parallel and made.mlp:
        places["resid_mid"] = places["resid_pre"] + places["attn_out"]
    return places


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


IDS = torch.randint(3, VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_what_the_architecture_computes(family: str) -> None:
    expected = expected_places(family, IDS)
    decoder = LanguageModel(model_of(family), *(place_name(place, LAYER) for place in expected))
    seen = dict(zip(expected, decoder.run(input_ids=IDS), strict=True))
    for (place, value), hook in zip(expected.items(), decoder.hooks, strict=True):
        close(seen[place][0], value)
        assert (hook.layer, hook.d_in) == (LAYER, value.shape[-1]), place
    for place in {"resid_mid", "mlp_in", "mlp_out"} - expected.keys():
        with pytest.raises(InputError, match=f"has no {place} .* in its layer 1 .*: give the path of a module") as e:
            LanguageModel(model_of(family), place_name(place, LAYER))
        assert "\n" not in str(e.value)
    if "resid_mid" in expected:
        close(seen["resid_mid"] + seen["mlp_out"], seen["resid_post"])
    elif family != "mamba":
        close(seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"], seen["resid_post"])


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_the_same_in_half_precision(family: str) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(model_of(family)).to(dtype)
        places = [place for place in PLACES if place in expected_places(family, IDS)]
        found[dtype] = [
            (hook.path, hook.side, round(hook.scale, 2))
            for hook in LanguageModel(model, *(place_name(place, LAYER) for place in places)).hooks
        ]
    assert found[torch.bfloat16] == found[torch.float32]


NORMS = {
    "llama": ("post_attention_layernorm", "rms_norm_eps", False),
    "qwen3": ("post_attention_layernorm", "rms_norm_eps", False),
    "gemma": ("post_attention_layernorm", "rms_norm_eps", False),
    "gemma2": ("pre_feedforward_layernorm", "rms_norm_eps", False),
    "gemma3": ("pre_feedforward_layernorm", "rms_norm_eps", False),
    "mixtral": ("post_attention_layernorm", "rms_norm_eps", False),
    "gpt2": ("ln_2", "layer_norm_epsilon", True),
    "bloom": ("post_attention_layernorm", "layer_norm_epsilon", True),
    "gpt_neox": ("post_attention_layernorm", "layer_norm_eps", True),
    "phi": ("input_layernorm", "layer_norm_eps", True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", NORMS)
def test_what_enters_the_mlp_before_the_gain_of_its_norm(family: str, dtype: torch.dtype) -> None:
    """As TransformerLens has ln2.hook_normalized, in float64 from the input of the norm."""
    path, epsilon, centred = NORMS[family]
    model = copy.deepcopy(model_of(family)).to(dtype)
    norm = f"{FAMILIES[family].layers}.{LAYER}.{path}"
    x = watched(model, IDS, [(norm, "input")])[norm, "input"].double()
    x = x - x.mean(dim=-1, keepdim=True) if centred else x
    expected = x / (x.pow(2).mean(dim=-1, keepdim=True) + getattr(model.config, epsilon)).sqrt()
    decoder = LanguageModel(model, f"blocks.{LAYER}.ln2.hook_normalized")
    assert (decoder.hooks[0].path, decoder.hooks[0].d_in) == (norm, D_MODEL)
    [value] = decoder.run(input_ids=IDS)
    assert value.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 0.01
    assert float((value[0].double() - expected).abs().max()) <= rounding * float(expected.abs().max())


def write_transcoders(folder: Path) -> list[Path]:
    """A transcoder of Gemma Scope 1, and one of Llama Scope's library, that read at ln2 of layer 1."""
    rng = np.random.default_rng(0)
    w = {
        "W_enc": rng.normal(size=(D_MODEL, 40)),
        "W_dec": rng.normal(size=(40, D_MODEL)),
        "b_dec": rng.normal(size=D_MODEL),
    }
    w |= {"b_enc": rng.normal(size=40), "threshold": np.full(40, 0.5)}
    w = {name: value.astype(np.float32) for name, value in w.items()}
    gemma = folder / "gemma-scope-2b-pt-transcoders" / f"layer_{LAYER}" / "width_16k" / "average_l0_5"
    gemma.mkdir(parents=True)
    np.savez(gemma / "params.npz", **w)
    llama = folder / "llama"
    (llama / "checkpoints").mkdir(parents=True)
    said = {"hook_point_in": f"blocks.{LAYER}.ln2.hook_normalized", "hook_point_out": f"blocks.{LAYER}.hook_mlp_out"}
    said |= {"act_fn": "jumprelu", "jump_relu_threshold": 0.5, "norm_activation": "inference", "d_model": D_MODEL}
    (llama / "hyperparams.json").write_text(json.dumps(said))
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    linear |= {"decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in linear.items()}
    save_file(tensors, llama / "checkpoints" / "final.safetensors")
    return [gemma, llama]


def test_transcoders_run_where_their_readers_say(tmp_path: Path) -> None:
    """Features are those of x / rms(x), without the norm's gain, and b_dec is not subtracted."""
    model = model_of("gemma2")
    norm = f"model.layers.{LAYER}.pre_feedforward_layernorm"
    x = watched(model, IDS, [(norm, "input")])[norm, "input"].double()
    x = x / (x.pow(2).mean(dim=-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    for folder in write_transcoders(tmp_path):
        sae = load_sae(folder)
        decoder = LanguageModel(model, sae.hook_name, sae.target_hook_name)
        read, _ = decoder.run(input_ids=IDS)
        features = encode(sae, read[0].numpy())
        rng = np.random.default_rng(0)
        W_enc = rng.normal(size=(D_MODEL, 40)).astype(np.float32)
        pre = x.numpy() @ W_enc + sae.b_enc
        assert sae.notes == ()
        assert len(features.indices) == int((pre > 0.5).sum()) > 0
        [fit] = measure_fit(decoder, [sae], PromptSet("train", [prompt_of(IDS[0])], 0, 0))
        assert fit.variance_explained is not None


def prompt_of(ids: torch.Tensor) -> Prompt:
    none = np.zeros(0, np.int32)
    tokens = ids.numpy().astype(np.int32)
    return Prompt("0", tokens, none, np.arange(1, len(tokens), dtype=np.int32), none, none, 0)


@pytest.mark.parametrize("family", ["olmo2", "mamba"])
def test_an_mlp_without_a_norm_before_it(family: str) -> None:
    with pytest.raises(InputError, match=r"has no mlp_normalized .* in its layer 1 .*: give the path of a module"):
        LanguageModel(model_of(family), "blocks.1.ln2.hook_normalized")


def test_several_layers_in_one_pass_that_ends_at_the_last() -> None:
    model = model_of("llama")
    names = ["blocks.2.hook_mlp_out", "model.layers.0", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"]
    ran: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))
        for i, layer in enumerate(model.model.layers)
    ]
    decoder = LanguageModel(model, *names)
    ran.clear()
    seen = decoder.run(input_ids=IDS)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2]
    for value, name in zip(seen, names, strict=True):
        assert torch.equal(value, LanguageModel(model, name).run(input_ids=IDS)[0])
    assert torch.equal(seen[1], seen[2])  # what leaves layer 0 enters layer 1
    assert [hook.layer for hook in decoder.hooks] == [2, 0, 1, 1]


@pytest.mark.parametrize(
    ("asked", "path", "side"),
    [
        ("model.layers.1.mlp", "model.layers.1.mlp", "output"),
        ("layers.1.mlp", "model.layers.1.mlp", "output"),
        ("model.layers.1.mlp.output", "model.layers.1.mlp", "output"),
        ("model.layers.1.mlp.down_proj.input", "model.layers.1.mlp.down_proj", "input"),
        (
            "base_model.model.model.layers.1.post_attention_layernorm",
            "model.layers.1.post_attention_layernorm",
            "output",
        ),
        ("model.embed_tokens", "model.embed_tokens", "output"),
        ("model.norm", "model.norm", "output"),
    ],
)
def test_module_paths(asked: str, path: str, side: str, tmp_path: Path) -> None:
    """Of the whole model, and of the one loaded without its head, whose modules have other paths."""
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    expected = watched(model, IDS, [(path, side)])[path, side]
    for decoder in (LanguageModel(model, asked), load_decoder(tmp_path, asked, device="cpu")):
        [value] = decoder.run(input_ids=IDS)
        assert torch.equal(value[0], expected)
        assert decoder.hooks[0].d_in == expected.shape[-1]
    n_loaded = len(decoder.model.layers)
    assert n_loaded == (2 if ".layers.1." in path else N_LAYERS)


def test_a_vision_model_is_read_in_its_language_part() -> None:
    text = {**GEMMA, "num_hidden_layers": N_LAYERS}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    language = model.model.language_model.layers
    expected = watched(model, IDS, [("model.language_model.layers.1.post_feedforward_layernorm", "output")])
    for name in ("blocks.1.hook_mlp_out", "model.layers.1.post_feedforward_layernorm"):
        decoder = LanguageModel(model, name)
        assert decoder.model.get_submodule(decoder.hooks[0].path) is language[1].post_feedforward_layernorm
        close(decoder.run(input_ids=IDS)[0][0], next(iter(expected.values())))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("model.layers.1.attention", "the model has no module 'model.layers.1.attention': .*model.layers.1.self_attn"),
        ("nonsense", "the model has no module 'nonsense': give the path of a module"),
        ("blocks.1.hook_k", "no module 'blocks.1.hook_k'"),
        ("blocks.9.hook_mlp_out", "the model has layers 0 to 3, but layer 9 is to be read"),
        ("model.layers.4.mlp", "the model has layers 0 to 3, but layer 4 is to be read"),
        ("model.rotary_emb", "does not have one vector per token as its output: read another module"),
    ],
)
def test_no_such_place(place: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        LanguageModel(model_of("llama"), place)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500


def test_a_layer_that_cannot_be_understood_is_refused_with_its_modules() -> None:
    """OPT flattens its tokens in the middle of a layer; what enters and leaves the layer can be read all the same."""
    options = {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": D_MODEL}
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**options)).eval()
    for place in ("resid_mid", "mlp_out", "mlp_in"):
        with pytest.raises(InputError, match=rf"has no {place} .*OPTDecoderLayer.*: .*layers\.1\.self_attn, "):
            LanguageModel(model, place_name(place, LAYER))
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    before, after = LanguageModel(model, "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post").run(input_ids=IDS)
    close(before, states[1])
    close(after, states[2])


@pytest.mark.parametrize(
    ("name", "place", "layer"),
    [
        ("blocks.25.hook_resid_post", "resid_post", 25),
        ("blocks.0.hook_resid_pre", "resid_pre", 0),
        ("blocks.3.attn.hook_z", "hook_z", 3),
        ("blocks.3.mlp.hook_in", "mlp_in", 3),
        ("blocks.3.mlp.hook_out", "mlp_out", 3),
        ("blocks.3.ln2.hook_normalized", "mlp_normalized", 3),
        ("blocks.3.hook_out", "resid_post", 3),
        ("model.layers.25", "resid_post", 25),
        ("transformer.h.4", "resid_post", 4),
        ("layers.25", "resid_post", 25),
        ("model.language_model.layers.7.input", "resid_pre", 7),
        ("model.layers.2.mlp", "model.layers.2.mlp", 2),
        ("model.layers.2.mlp.experts.3", "model.layers.2.mlp.experts.3", 2),
        ("model.vision_tower.encoder.layers.3", "model.vision_tower.encoder.layers.3", None),
        ("model.audio_tower.layers.3.input", "model.audio_tower.layers.3.input", None),
        ("model.norm", "model.norm", None),
        ("", "", None),
    ],
)
def test_names(name: str, place: str, layer: int | None) -> None:
    assert split_name(name) == (place, layer)
    if place in PLACES:
        assert split_name(place_name(place, layer or 0)) == (place, layer)
