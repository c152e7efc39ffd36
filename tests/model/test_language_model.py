"""The residual stream as captured, against the unbatched full model's own hidden states."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sts_fast.data.prompts import Prompt
from sts_fast.errors import InputError
from sts_fast.model.checkpoint import Checkpoint
from sts_fast.model.language_model import LanguageModel, attention_sinks, capture, load_decoder

MODELS = Path(__file__).parents[3] / "shared" / "assets" / "models"
needs_assets = pytest.mark.skipif(not MODELS.is_dir(), reason="the published models are not beside the checkout")

N_LAYERS = 4
VOCABULARY = 60
D_MODEL = 32

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
# Sliding windows far shorter than the prompts, so that a wrong position or mask would show.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3Text",
        {**GROUPED, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128},
    ),
    "gpt_neox": ("GPTNeoX", {**COMMON, "rotary_pct": 0.5}),
    "phi3": ("Phi3", {**GROUPED, "sliding_window": 5}),
    "olmo2": ("Olmo2", GROUPED),
}
CAUSAL_CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], Any]:
    """Random models by family, whose weights are large enough that every layer and position matters."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            class_name, options = FAMILIES[name]
            config = getattr(transformers, f"{class_name}Config")(**options)
            torch.manual_seed(0)
            model = getattr(transformers, CAUSAL_CLASSES.get(class_name, f"{class_name}ForCausalLM"))(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.15)
            made[name] = model.eval()
        return made[name]

    return make


@pytest.fixture
def saved(tmp_path: Path, model_of: Callable[[str], Any]) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        model_of(name).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def hidden_states(model: Any, ids: np.ndarray, layer: int) -> torch.Tensor:
    """[n_tokens, d] of one sequence alone: hidden_states[layer + 1], which the last layer's lacks the final norm of."""
    inputs = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        if layer < N_LAYERS - 1:
            return model(input_ids=inputs, output_hidden_states=True).hidden_states[layer + 1][0]
        grabbed: list[torch.Tensor] = []
        norm = next(m for n, m in model.named_modules() if n.endswith((".norm", "ln_f", "final_layer_norm")))
        handle = norm.register_forward_pre_hook(lambda module, args: grabbed.append(args[0][0]))
        model(input_ids=inputs)
        handle.remove()
        return grabbed[0]


def sequences(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]


def capture_within(batch_tokens: int, decoder: LanguageModel, *arguments: Any, **options: Any) -> Iterator[Any]:
    decoder.passes.batch_tokens = batch_tokens
    return capture(decoder, *arguments, **options)


def make_prompt(name: str, base: Any, demos: Any = (), positions: Any = None, n_common: int | None = None) -> Prompt:
    """Reads `positions` (all by default); the last `n_common` tokens of both prompts are the same."""
    base, demos = np.asarray(base, np.int32), np.asarray(demos, np.int32)
    read = np.arange(len(base), dtype=np.int32) if positions is None else np.asarray(positions, np.int32)
    paired = read[read >= len(base) - (n_common or 0)]
    return Prompt(name, base, demos, read, paired, paired + np.int32(len(demos) - len(base)), 0)


def demo_prompts() -> list[Prompt]:
    """Seven prompts of which each has demonstrations in front of its last tokens."""
    prompts = []
    for i, n in enumerate((9, 4, 13, 4, 7, 1, 11)):
        base, front = sequences(n, 6 + i)
        prompts.append(make_prompt(f"p{i}", base, np.concatenate([front, base[n // 3 :]]), n_common=n - n // 3))
    return prompts


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest value: the float32 forward is not batch-invariant to the last bit."""
    assert actual.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert float((actual - expected).abs().max()) <= 1e-5 * scale if expected.numel() else True


# Against the full model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2, N_LAYERS - 1])
def test_residuals_are_the_full_model_s_hidden_states(family: str, layer: int, model_of: Callable[[str], Any]) -> None:
    model = model_of(family)
    ids = sequences(1, 17, 5, 30)
    for captured, sequence in zip(LanguageModel(model, layer).residuals(ids)[0], ids, strict=True):
        expected = hidden_states(model, sequence, layer)
        assert captured.shape == (len(sequence), D_MODEL)
        assert_close(captured, expected)


@pytest.mark.parametrize("layer", [0, 2, N_LAYERS - 1])
def test_truncated_load_equals_the_model_in_memory(
    family: str, layer: int, model_of: Callable[[str], Any], saved: Callable[[str], Path]
) -> None:
    loaded = load_decoder(saved(family), layer, device="cpu")
    ids = sequences(3, 21)
    for captured, expected in zip(
        loaded.residuals(ids)[0], LanguageModel(model_of(family), layer).residuals(ids)[0], strict=True
    ):
        assert torch.equal(captured, expected)
    assert (loaded.hooks[0].layer, loaded.hooks[0].d_in, loaded.context_length) == (layer, D_MODEL, 128)


def test_layers_above_and_the_head_are_not_loaded(
    family: str, model_of: Callable[[str], Any], saved: Callable[[str], Path]
) -> None:
    loaded = load_decoder(saved(family), 1, device="cpu").model
    names = [name for name, _ in loaded.named_parameters()]
    assert any(".0." in f".{name}" for name in names)
    assert any(".1." in f".{name}" for name in names)
    assert not any(f".{upper}." in f".{name}" for name in names for upper in range(2, N_LAYERS))
    assert not any("lm_head" in name or "embed_out" in name for name in names)
    per_layer = sum(p.numel() for n, p in loaded.named_parameters() if ".0." in f".{n}")
    head = model_of(family).get_output_embeddings().weight
    tied = head is model_of(family).get_input_embeddings().weight
    n_all = sum(parameter.numel() for parameter in model_of(family).parameters())
    n_left_out = 2 * per_layer + (0 if tied else head.numel())
    assert sum(parameter.numel() for parameter in loaded.parameters()) == n_all - n_left_out


@needs_assets
@pytest.mark.parametrize(("name", "layers"), [("stories260K", (0, 2, 4)), ("toy_router_gpt2", (0, 1))])
def test_published_models(name: str, layers: tuple[int, ...]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODELS / name).eval()
    text = "Once upon a time there was a little girl who liked to play in the park. " * 3
    ids = np.asarray(
        Checkpoint(MODELS / name).tokenizer(text).input_ids[: model.config.max_position_embeddings], np.int32
    )
    for layer in layers:
        captured = load_decoder(MODELS / name, layer, device="cpu").residuals([ids[:3], ids])[0]
        with torch.no_grad():
            states = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
        if layer + 1 < len(states) - 1:
            expected = states[layer + 1][0]
            assert_close(captured[1], expected)
            assert_close(captured[0], expected[:3])
        else:  # the last of hidden_states has been normed
            norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
            with torch.no_grad():
                assert_close(norm(captured[1]), states[-1][0])


def test_layers_may_return_tuples(model_of: Callable[[str], Any]) -> None:
    ids = sequences(4, 9)
    expected = LanguageModel(model_of("llama"), 1).residuals(ids)[0]

    class AsTuple(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
            output = self.block(*args, **options)
            return (output[0] if isinstance(output, tuple) else output, torch.zeros(2, 3))

    model = model_of("llama")
    blocks = model.model.layers
    plain = blocks[1]
    try:
        blocks[1] = AsTuple(plain)
        captured = LanguageModel(model, 1).residuals(ids)[0]
    finally:
        blocks[1] = plain
    for actual, wanted in zip(captured, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_capture_leaves_the_model_as_it_was(model_of: Callable[[str], Any]) -> None:
    model = model_of("llama")
    before = hidden_states(model, sequences(5)[0], 2)
    LanguageModel(model, 0).residuals(sequences(5))
    assert torch.equal(hidden_states(model, sequences(5)[0], 2), before)


# Batches and pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"], indirect=True)
def test_pairs_are_the_same_for_every_batch_budget(
    family: str, batch_tokens: int, model_of: Callable[[str], Any]
) -> None:
    model, prompts = model_of(family), demo_prompts()
    seen = []
    for (rows,) in capture_within(batch_tokens, LanguageModel(model, 2), prompts):
        assert list(dict.fromkeys(rows.base_of.tolist())) == rows.prompts
        for slot, index in enumerate(rows.prompts):
            prompt = prompts[index]
            seen.append(index)
            base = hidden_states(model, prompt.base_ids, 2)
            demos = hidden_states(model, prompt.demos_ids, 2)
            assert rows.kept[slot].all()
            assert rows.kept_paired[slot].all()
            assert_close(rows.base[rows.base_of == index], base[prompt.positions])
            assert_close(rows.paired[rows.paired_of == index], base[prompt.paired])
            assert_close(rows.demos[rows.paired_of == index], demos[prompt.paired_demos])
            n_pairs = len(prompt.base_ids) - len(prompt.base_ids) // 3
            assert np.array_equal(prompt.base_ids[prompt.paired], prompt.demos_ids[prompt.paired_demos])
            assert len(rows.paired[rows.paired_of == index]) == n_pairs
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize(("batch_tokens", "sizes"), [(1, [1] * 7), (40, [3, 2, 2]), (10_000, [7])])
def test_batches_keep_to_the_budget_and_run_shortest_first(
    batch_tokens: int, sizes: list[int], model_of: Callable[[str], Any]
) -> None:
    prompts = demo_prompts()
    # Of the longer prompt of each: 6 + i tokens of demonstration in front of the n - n // 3 in common.
    lengths = [12, 10, 17, 12, 15, 12, 20]
    assert [max(len(p.base_ids), len(p.demos_ids)) for p in prompts] == lengths
    batches = [rows.prompts for (rows,) in capture_within(batch_tokens, LanguageModel(model_of("llama"), 0), prompts)]
    assert [index for batch in batches for index in batch] == [1, 0, 3, 5, 4, 2, 6]
    assert [len(batch) for batch in batches] == sizes
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens


def test_prompts_without_demonstrations_have_no_pairs(model_of: Callable[[str], Any]) -> None:
    prompts = [make_prompt("a", [5, 6, 7], positions=[2]), make_prompt("b", [8, 9], positions=[])]
    ((rows,),) = capture_within(100, LanguageModel(model_of("llama"), 0), prompts)
    assert rows.prompts == [1, 0]
    assert rows.base_of.tolist() == [0]
    assert rows.base.shape == (1, D_MODEL)
    assert rows.paired.shape == rows.demos.shape == (0, D_MODEL)
    assert rows.paired_of.tolist() == []


def test_no_prompts_no_rows(model_of: Callable[[str], Any]) -> None:
    assert list(capture_within(100, LanguageModel(model_of("llama"), 0), [])) == []


def test_a_second_model_is_read_at_the_same_tokens(model_of: Callable[[str], Any]) -> None:
    model, tuned = model_of("llama"), model_of("qwen3")
    prompts = [make_prompt(f"p{i}", ids, positions=range(1, len(ids))) for i, ids in enumerate(sequences(6, 3, 8))]
    for (rows,) in capture_within(20, LanguageModel(model, 1), prompts, other=LanguageModel(tuned, 1)):
        for index in rows.prompts:
            ids = prompts[index].base_ids
            assert_close(rows.base[rows.base_of == index], hidden_states(model, ids, 1)[1:])
            assert_close(rows.paired[rows.paired_of == index], hidden_states(model, ids, 1)[1:])
            assert_close(rows.demos[rows.paired_of == index], hidden_states(tuned, ids, 1)[1:])


# Attention sinks ------------------------------------------------------------------------------------------------------


def test_sinks_stand_over_ten_times_the_median_norm() -> None:
    norms = np.array([10.5, 1.0, 1.0, 1.0, 9.5, 1.0, 10.01])
    assert attention_sinks(norms).tolist() == [True, False, False, False, False, False, True]
    assert attention_sinks(np.zeros(4)).tolist() == [False] * 4
    assert attention_sinks(np.zeros(0)).tolist() == []
    assert attention_sinks(np.ones(1)).tolist() == [False]


def test_the_median_is_that_of_the_tokens_up_to_the_last_one_read() -> None:
    # What stands after the last token read is not run: with it the median would be 2, and 30 a sink.
    prompt = make_prompt("p", [4, 4, 30, 4, 2, 2, 2, 2, 2], positions=[2, 3])
    ((rows,),) = capture_within(100, LanguageModel(HandMade(), 0), [prompt])
    assert rows.base[:, 0].tolist() == [30, 4]


class HandMade(torch.nn.Module):
    """A "model" of one layer: the residual of token t is (t, 1), so that large ids are sinks by design."""

    def __init__(self, *, last: float = 1.0) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig(
            **{**COMMON, "hidden_size": 2, "num_attention_heads": 1, "num_hidden_layers": 1}
        )
        self.layers = torch.nn.ModuleList([torch.nn.Identity()])
        self.last = torch.nn.Parameter(torch.tensor(last))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> None:
        residual = torch.stack([input_ids.float(), self.last.expand(input_ids.shape)], dim=-1)
        self.layers[0](residual)
        raise AssertionError("nothing after the layer should run")


def test_a_pair_goes_where_either_token_is_a_sink() -> None:
    # In the base prompt 90 is a sink (median 3), in the demonstration prompt 900 is, and 90 is not (median 50).
    prompt = make_prompt("p", [90, 2, 3, 3, 900], [50, 50, 50, 50, 50, 50, 90, 2, 3, 3, 900], [1, 2, 4, 0], n_common=5)
    ((rows,),) = capture_within(100, LanguageModel(HandMade(), 0), [prompt])
    assert rows.base[:, 0].tolist() == [2, 3]
    assert rows.kept[0].tolist() == [True, True, False, False]
    assert rows.paired[:, 0].tolist() == rows.demos[:, 0].tolist() == [2, 3]
    assert rows.kept_paired[0].tolist() == [True, True, False, False]
    # A token that is a sink only beside demonstrations stays among the base tokens, but its pair goes.
    prompt = make_prompt("p", [30, 40, 50], [3, 3, 3, 3, 3, 3, 3, 3, 3, 30, 40, 50], n_common=3)
    ((rows,),) = capture_within(100, LanguageModel(HandMade(), 0), [prompt])
    assert rows.base[:, 0].tolist() == [30, 40, 50]
    assert rows.paired[:, 0].tolist() == [30]
    assert rows.kept[0].tolist() == [True, True, True]
    assert rows.kept_paired[0].tolist() == [True, False, False]


def test_padding_does_not_move_the_median() -> None:
    # Beside a long prompt the short one is padded with zeros; its own median is 20, so 100 is no sink.
    prompts = [make_prompt("long", [5] * 30), make_prompt("short", [20, 20, 100])]
    ((rows,),) = capture_within(1000, LanguageModel(HandMade(), 0), prompts)
    assert rows.base[rows.base_of == 1][:, 0].tolist() == [20, 20, 100]


def test_rows_for_the_core_are_float32_or_bfloat16() -> None:
    for dtype, expected in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
    ):
        model = HandMade()
        model.layers[0].register_forward_hook(lambda module, args, output, dtype=dtype: output.to(dtype))
        ((rows,),) = capture_within(10, LanguageModel(model, 0), [make_prompt("p", [1, 2])])
        assert rows.base.dtype == rows.paired.dtype == rows.demos.dtype == expected


# Faults ---------------------------------------------------------------------------------------------------------------


def one_sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert 20 < len(message) < 500
    return message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_the_example(value: float) -> None:
    prompts = [make_prompt("row 7", [1, 2])]
    with pytest.raises(InputError, match="the model gives NaN or infinity after layer 0 for example row 7: try") as e:
        list(capture_within(10, LanguageModel(HandMade(last=value), 0), prompts))
    one_sentence(e)


class Overflowing(HandMade):
    """Overflows as soon as it is given more than one sequence, as half precision may for some shapes of a batch."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> None:
        super().forward(input_ids if input_ids.shape[1] <= 3 else input_ids.float() / 0, **options)


def test_nan_in_company_is_run_again_alone() -> None:
    prompts = [make_prompt("a", [4, 5, 6]), make_prompt("b", [7, 8, 9])]
    decoder, said = LanguageModel(Overflowing(), 0), []
    decoder.passes.say = said.append
    decoder.passes.strategy = "packed"
    decoder.passes.batch_tokens = 100
    decoder.passes._layout = lambda lengths, n_shared: [list(range(len(lengths)))]  # both in one row
    ((rows,),) = capture(decoder, prompts)
    assert rows.base[:, 0].tolist() == [4, 5, 6, 7, 8, 9]
    assert said == [
        f"the model gave NaN or infinity for example {name} in a batch, but not alone: it is used" for name in "ab"
    ]


def test_nan_of_the_second_model_names_that() -> None:
    tuned = LanguageModel(HandMade(last=float("nan")), 0, name="tuned/model")
    with pytest.raises(InputError, match="tuned/model gives NaN or infinity after layer 0 for example p"):
        list(capture_within(10, LanguageModel(HandMade(), 0), [make_prompt("p", [1, 2])], other=tuned))


def test_nan_weights(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    change_weights(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    prompts = [make_prompt("row 3", [4, 5, 6])]
    assert list(capture_within(10, load_decoder(folder, 0, device="cpu"), prompts))
    with pytest.raises(InputError, match=r"llama gives NaN or infinity after layer 1 for example row 3"):
        list(capture_within(10, load_decoder(folder, 1, device="cpu"), prompts))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_named(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    load_decoder(folder, 0, device="cpu")  # the layer that is incomplete is not needed
    with pytest.raises(InputError, match=r"lacks the weights layers\.1\.mlp\.up_proj\.weight: .*incomplete") as e:
        load_decoder(folder, 1, device="cpu")
    one_sentence(e)


def test_weights_of_another_shape(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    change_weights(folder, lambda weights: weights.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 4)}))
    with pytest.raises(InputError, match="cannot load the model") as e:
        load_decoder(folder, 0, device="cpu")
    one_sentence(e)


def truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def without_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"], config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))


def of_unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_architecture"}))


BROKEN_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "there is no model folder .*broken: give a folder with config.json, or a hub id"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "cannot load the model .*broken"),
    "no config": (lambda f: (f / "config.json").unlink(), "cannot load the model .*broken"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot load the model .*broken"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "cannot load the model .*broken"),
    "no type": (without_type, "cannot load the model .*broken"),
    "unknown type": (of_unknown_type, "cannot load the model .*broken: .*no_such_architecture"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot load the model .*broken"),
    "weights cut off": (truncate, "cannot load the model .*broken"),
    "random bytes": (
        lambda f: (f / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(5000)),
        "cannot load the model .*broken",
    ),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot load the model .*broken"),
}


@pytest.mark.parametrize("fault", BROKEN_MODELS)
def test_broken_model_is_told_in_one_line(
    fault: str, saved: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = saved("llama").rename(tmp_path / "broken")
    breaks, message = BROKEN_MODELS[fault]
    breaks(folder)
    capfd.readouterr()
    with pytest.raises(InputError, match=message) as e:
        load_decoder(folder, 0, device="cpu")
    one_sentence(e)
    assert capfd.readouterr() == ("", "")


def test_tokenizer_of_another_model(model_of: Callable[[str], Any]) -> None:
    decoder = LanguageModel(model_of("llama"), 0)
    assert decoder.residuals([np.array([VOCABULARY - 1], np.int32)])[0][0].shape == (1, D_MODEL)
    with pytest.raises(InputError, match="the model knows 60 tokens, but its tokenizer gives token id 60: ") as e:
        decoder.residuals([np.array([3, VOCABULARY], np.int32)])
    one_sentence(e)


@pytest.mark.parametrize("layer", [-1, N_LAYERS, 1000])
def test_layer_out_of_range(layer: int, model_of: Callable[[str], Any], saved: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=f"the model has layers 0 to 3, but layer {layer} is to be read"):
        LanguageModel(model_of("llama"), layer)
    with pytest.raises(InputError, match=f"llama has layers 0 to 3, but layer {layer} is to be read"):
        load_decoder(saved("llama"), layer, device="cpu")


@pytest.mark.parametrize("device", ["cuda:99", "xpu:9", "mps"])
def test_device_that_is_not_there(device: str, saved: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=f"cannot be moved to the device '{device}'"):
        load_decoder(saved("llama"), 0, device=device)
    with pytest.raises(InputError, match="not 'toaster'"):
        load_decoder(saved("llama"), 0, device="toaster")


def test_missing_tokenizer(saved: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"cannot load the .*llama") as e:
        _ = Checkpoint(saved("llama")).tokenizer
    one_sentence(e)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype: str, saved: Callable[[str], Path]) -> None:
    decoder = load_decoder(saved("llama"), 0, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in decoder.model.parameters()} == {getattr(torch, dtype)}


def test_auto_is_float32_on_the_cpu(saved: Callable[[str], Path], model_of: Callable[[str], Any]) -> None:
    folder = saved("llama")
    change_weights(folder, lambda w: w.update({name: value.bfloat16() for name, value in w.items()}))
    decoder = load_decoder(folder, 0, device="cpu")
    assert {parameter.dtype for parameter in decoder.model.parameters()} == {torch.float32}


def test_layers_that_depend_on_their_number_are_loaded_whole(tmp_path: Path) -> None:
    config = transformers.MiniCPM3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        scale_depth=1.4,
    )
    torch.manual_seed(0)
    model = transformers.MiniCPM3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ids = np.arange(1, 12, dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True).hidden_states[2][0]
    [actual] = load_decoder(tmp_path, 1).residuals([ids])[0]
    assert_close(actual, expected)
