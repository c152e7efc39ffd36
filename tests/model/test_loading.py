"""Checkpoints of which files or weights are missing, strange or harmful, against the model that was saved."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import D_MODEL, GROUPED, N_LAYERS
from safetensors.torch import load_file, save_file

from sts_fast.data.prompts import Prompt
from sts_fast.errors import InputError
from sts_fast.model.answers import answer_outcomes
from sts_fast.model.language_model import LanguageModel, load_decoder, load_language_model

IDS = np.arange(3, 30, dtype=np.int32)
SHARDS = 6


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def shards_of(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The weights by file: the embedding, each of the four layers, and then norm and head."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        shard = 1 if "embed" in name else 2 + int(parts[2]) if "layers" in parts else SHARDS
        files.setdefault(f"model-{shard:05}-of-{SHARDS:05}.safetensors", {})[name] = tensor.clone()
    return files


def save_sharded(model: Any, folder: Path, *, pickled: bool = False) -> Path:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    files = shards_of(model)
    if pickled:
        files = {name.replace("model", "pytorch_model").replace("safetensors", "bin"): of for name, of in files.items()}
    for name, tensors in files.items():
        if pickled:
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name, metadata={"format": "pt"})
    index = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
    weight_map = {weight: name for name, tensors in files.items() for weight in tensors}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def assert_reads(decoder: LanguageModel, model: Any, layer: int) -> None:
    with torch.no_grad():
        states = model(torch.from_numpy(IDS.astype(np.int64))[None], output_hidden_states=True).hidden_states
    expected = states[layer + 1][0]
    assert float((decoder.residuals([IDS])[0][0] - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def one_sentence(error: pytest.ExceptionInfo[InputError]) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert 20 < len(message) < 700


# Files that are not there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("layer", [0, 2])
def test_files_of_layers_above_and_of_the_head_need_not_be_there(layer: int, pickled: bool, tmp_path: Path) -> None:
    model = make()
    save_sharded(model, tmp_path, pickled=pickled)
    for path in tmp_path.glob("*.bin" if pickled else "*.safetensors"):
        if int(path.name.split("-")[1]) > layer + 2:
            path.unlink()
    assert_reads(load_decoder(tmp_path, layer, device="cpu"), model, layer)
    with pytest.raises(
        InputError, match=rf"lacks the file .*-0000{layer + 3}-of-00006\..*, which has weights that are read"
    ):
        load_decoder(tmp_path, layer + 1, device="cpu")


def test_a_hub_s_files_of_layers_above_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with the files of the first layers alone, as offline."""
    model, snapshot = make(), tmp_path / "models--someone--model" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    save_sharded(model, snapshot)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("0123456789abcdef")
    for shard in (4, 5, 6):
        next(snapshot.glob(f"*-0000{shard}-of*")).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    decoder = load_decoder("someone/model", 1, device="cpu")
    assert_reads(decoder, model, 1)
    with pytest.raises(InputError, match="someone/model lacks the file model-00004-of-00006"):
        load_decoder("someone/model", 2, device="cpu")


@pytest.mark.parametrize("shard", [1, 2])
def test_a_file_below_the_hook_is_named(shard: int, tmp_path: Path) -> None:
    save_sharded(make(), tmp_path)
    name = f"model-0000{shard}-of-00006.safetensors"
    (tmp_path / name).unlink()
    with pytest.raises(
        InputError, match=f"lacks the file {name}, which .* are read .*: copy or download that file too"
    ) as e:
        load_decoder(tmp_path, 1, device="cpu")
    one_sentence(e)


@pytest.mark.parametrize("shard", [2, SHARDS])
def test_no_links_are_left_behind(shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file below the hook is missing, loading fails; where one above is, it works, and the model is dropped."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(links))
    folder = save_sharded(make(), tmp_path / "model")
    next(folder.glob(f"*-0000{shard}-of*")).unlink()
    if shard == 2:
        with pytest.raises(InputError):
            load_decoder(folder, 1, device="cpu")
    else:
        decoder = load_decoder(folder, 1, device="cpu")
        assert [*links.iterdir()]
        del decoder
    gc.collect()
    assert not [*links.iterdir()]


def test_the_whole_model_needs_all_files(tmp_path: Path) -> None:
    save_sharded(make(), tmp_path)
    (tmp_path / "model-00006-of-00006.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks the file model-00006-of-00006\.safetensors") as e:
        load_language_model(tmp_path, device="cpu")
    one_sentence(e)


def test_an_index_that_names_files_elsewhere_or_is_none(tmp_path: Path) -> None:
    save_sharded(make(), tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shutil.move(tmp_path / "model" / "model-00002-of-00006.safetensors", tmp_path / "outside.safetensors")
    for weight, file in whole["weight_map"].items():
        if "00002" in file:
            whole["weight_map"][weight] = "../outside.safetensors"
    index.write_text(json.dumps(whole))
    with pytest.raises(InputError, match=r"lacks the file \.\./outside\.safetensors"):
        load_decoder(tmp_path / "model", 1, device="cpu")
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(InputError) as e:
            load_decoder(tmp_path / "model", 1, device="cpu")
        one_sentence(e)


def test_weights_that_are_nowhere(tmp_path: Path) -> None:
    """Neither in a file that is here nor in one that the index names."""
    save_sharded(make(), tmp_path)
    (tmp_path / "model-00006-of-00006.safetensors").unlink()
    path = tmp_path / "model-00002-of-00006.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks .*layers\.0\.mlp\.up_proj\.weight"):
        load_decoder(tmp_path, 1, device="cpu")


def test_positions_in_a_file_that_is_missing(tmp_path: Path) -> None:
    """Outside of the layers too, weights that are run before the hook are needed."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=D_MODEL, n_layer=4, n_head=4))
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    files = {name: "b" if name.startswith(("transformer.wpe", "transformer.ln_f")) else "a" for name in state}
    for file in ("a", "b"):
        held = {name: tensor for name, tensor in state.items() if files[name] == file}
        save_file(held, tmp_path / f"{file}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"{file}.safetensors" for name, file in files.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load_decoder(tmp_path, 1, device="cpu")
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks the file b\.safetensors, which has weights"):
        load_decoder(tmp_path, 1, device="cpu")


# Weights that were not understood -------------------------------------------------------------------------------------


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantised(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "proj" in name]:
            scale = tensors[name].abs().max() / 448
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", suffix)] = scale.reshape(1, 1)

    return change


STRANGE: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "scales of fp8": quantised(".weight_scale_inv"),
    "scales by other names": quantised(".scale_weight"),
    "norms of another architecture": lambda tensors: tensors.update(
        {f"model.layers.{i}.self_attn.q_norm.weight": torch.ones(8) for i in range(N_LAYERS)}
    ),
    "a scale of the embedding": lambda tensors: tensors.update({"model.embed_tokens.weight_scale": torch.ones(1)}),
    "an adapter not merged": lambda tensors: tensors.update(
        {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, D_MODEL)}
    ),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("load", [load_decoder, load_language_model])
def test_weights_without_a_place_are_refused_by_name(kind: str, load: Callable[..., Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    change_weights(tmp_path, STRANGE[kind])
    with pytest.raises(
        InputError, match=r"tensors for which Llama\w* has no place, such as model\..*config\.json"
    ) as e:
        load(tmp_path, *((1,) if load is load_decoder else ()), device="cpu")
    one_sentence(e)


WHOLE_NUMBERS = {
    "int8": (torch.int8, "up_proj"),
    "packed in uint8": (torch.uint8, "q_proj"),
    "int16": (torch.int16, "embed_tokens"),
    "int64": (torch.int64, "input_layernorm"),
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", WHOLE_NUMBERS)
def test_whole_numbers_without_their_scales_are_refused_by_name(kind: str, pickled: bool, tmp_path: Path) -> None:
    """Weights that were quantised, and have lost the config that says how."""
    dtype, part = WHOLE_NUMBERS[kind]
    model = make()
    for name, tensor in model.state_dict().items():
        if part in name:
            model.get_submodule(name.rpartition(".")[0]).weight = torch.nn.Parameter(
                (tensor * 100).to(dtype), requires_grad=False
            )
    save_sharded(model, tmp_path, pickled=pickled)
    with pytest.raises(InputError, match=rf"has whole numbers \(\w*\.?\w+\) as model\..*{part}\.weight, and its") as e:
        load_decoder(tmp_path, 1, device="cpu")
    one_sentence(e)


def test_whole_numbers_that_are_no_weights(tmp_path: Path) -> None:
    """Masks and positions, as older versions of transformers saved them, and layers above the hook."""
    model = make()
    model.save_pretrained(tmp_path)
    own = {
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "model.position_ids": torch.arange(8),
        f"model.layers.{N_LAYERS - 1}.mlp.up_proj.weight": torch.ones(48, D_MODEL, dtype=torch.int8),
    }
    change_weights(tmp_path, lambda tensors: tensors.update(own))
    assert_reads(load_decoder(tmp_path, 1, device="cpu"), model, 1)


@pytest.mark.parametrize(
    ("key", "value", "weight"),
    [
        ("vocab_size", 59, "embed_tokens"),
        ("intermediate_size", 40, "mlp.down_proj"),
        ("num_key_value_heads", 4, "k_proj"),
    ],
)
def test_a_config_of_other_sizes(key: str, value: int, weight: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=rf"{weight}\.weight has shape \[\d+, \d+\], but LlamaModel of its") as e:
        load_decoder(tmp_path, 1, device="cpu")
    one_sentence(e)


@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/spec/v1\n", "", "cut"])
def test_a_damaged_file_or_a_pointer_to_it(content: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000] if content == "cut" else content.encode())
    with pytest.raises(InputError, match=r"its files are damaged, or pointers of Git LFS; copy or download them") as e:
        load_decoder(tmp_path, 1, device="cpu")
    one_sentence(e)


def test_weights_of_other_parts_are_left_out(tmp_path: Path) -> None:
    """Layers and heads beyond the model's, what is no weight, and other towers: as checkpoints have them."""
    model = make()
    model.save_pretrained(tmp_path)
    change_weights(
        tmp_path,
        lambda tensors: tensors.update(
            {
                f"model.layers.{N_LAYERS}.mlp.up_proj.weight": torch.ones(48, D_MODEL),  # predicts a second token
                "v_head.summary.weight": torch.ones(1, D_MODEL),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.layers.0.self_attn.k_scale": torch.ones(1),
                "vision_tower.layers.0.self_attn.q_proj.weight_scale": torch.ones(1),
            }
        ),
    )
    assert_reads(load_decoder(tmp_path, 1, device="cpu"), model, 1)
    assert load_language_model(tmp_path, device="cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_its_own_or_shared(tied: bool, tmp_path: Path) -> None:
    model = make(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    ids = torch.from_numpy(IDS.astype(np.int64))[None]
    with torch.no_grad():
        assert torch.equal(load_language_model(tmp_path, device="cpu")(ids).logits, model(ids).logits)
    assert_reads(load_decoder(tmp_path, 1, device="cpu"), model, 1)


# Code in pickles, and failures of the model ---------------------------------------------------------------------------


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_never_run(tmp_path: Path) -> None:
    model, proof = make(), tmp_path / "was_run"
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert_reads(load_decoder(folder, 1, device="cpu"), model, 1)
    for write in (
        lambda: torch.save({**model.state_dict(), "more": Harmful(proof)}, folder / "pytorch_model.bin"),
        lambda: (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(proof))),
    ):
        write()
        with pytest.raises(InputError, match=r"cannot load the model .*model") as e:
            load_decoder(folder, 1, device="cpu")
        one_sentence(e)
        assert not proof.exists()


def test_an_error_of_the_model_s_own_is_a_sentence() -> None:
    model = make()
    model.model.layers[1].mlp.double()
    prompt = Prompt("a", IDS, IDS[:0], IDS[3:5] - 3, IDS[:0], IDS[:0], 0)
    for run in (
        lambda: LanguageModel(model, 2).residuals([IDS]),
        lambda: LanguageModel(model, "blocks.1.hook_mlp_out"),
        lambda: LanguageModel(model, "model.layers.2.mlp"),
        lambda: answer_outcomes(model, [prompt], batch_tokens=100),
    ):
        with pytest.raises(InputError, match=r"the model fails when it is run .RuntimeError: .*: try --dtype f") as e:
            run()
        one_sentence(e)


def test_fp8_weights_in_bfloat16_without_a_gpu(tmp_path: Path) -> None:
    """In float32 they are read; in bfloat16, which transformers cannot run on a CPU, the remedy says so."""
    options = {**GROUPED, "hidden_size": 128, "intermediate_size": 128}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, quantised(".weight_scale_inv"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = load_decoder(tmp_path, 1, dtype="float32", device="cpu")
    stored = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(stored[name].float() * stored[f"{name}_scale_inv"])
    assert_reads(decoder, model, 1)
    decoder = load_decoder(tmp_path, 1, dtype="bfloat16", device="cpu")
    if {parameter.dtype for parameter in decoder.model.parameters()} == {torch.bfloat16}:
        return  # a version of transformers that can
    with pytest.raises(InputError, match=r"fails when it is run .RuntimeError: .*: try --dtype float32") as e:
        decoder.residuals([IDS])
    one_sentence(e)
