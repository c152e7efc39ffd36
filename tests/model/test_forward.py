"""Forward passes that share what sequences have in common, against the whole model run on each sequence alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import D_MODEL, FAMILIES, N_LAYERS, VOCABULARY, make_model
from transformers import AutoModelForCausalLM

from sts_fast.errors import InputError
from sts_fast.model import forward, memory, packing
from sts_fast.model.forward import ForwardPasses, Sequences, run_batches
from sts_fast.model.language_model import LanguageModel

LAYER = 2
N_SHARED = 40
LENGTHS = (9, 4, 13, 30, 1, 22)

# What the self-check is to find: softmax attention is packed, linear attention gets a copy of its state, and models
# whose own cached forward takes no more than one token at a time start every sequence from its first token.
STRATEGIES = {name: "packed" for name in FAMILIES} | {
    "gpt_neo": "cached",  # its local attention counts places in the row
    "bloom": "cached",  # its positions are made of a mask
    "qwen3_next": "copied",
    "falcon_h1": "copied",
    "jamba": "plain",
}

model_of = cache(make_model)


def sequences(n_shared: int = N_SHARED, lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 50, n_shared)
    return [np.concatenate([shared, rng.integers(3, 50, n)]).astype(np.int32) for n in lengths]


def whole_model(model: Any, ids: np.ndarray, layer: int = LAYER) -> torch.Tensor:
    """[n_tokens, d] of one sequence, alone in a full forward pass."""
    with torch.no_grad():
        states = model(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True, use_cache=False
        )
    rows: torch.Tensor = states.hidden_states[layer + 1][0]
    return rows


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert actual.shape == expected.shape
    if expected.numel():
        assert float((actual - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def assert_reads(passes: ForwardPasses, ids: list[np.ndarray], positions: list[np.ndarray], model: Any) -> Sequences:
    """Every token read, and every norm, is what the whole model gives for that sequence alone."""
    prepared = passes.prepare(ids, positions)
    seen = []
    for batch, (reads,) in run_batches(prepared):
        for index, read in zip(batch, reads, strict=True):
            expected = whole_model(model, ids[index])
            assert_close(read.rows[0], expected[positions[index].astype(np.int64)])
            end = int(positions[index][-1]) + 1
            norms = expected[:end].double().norm(dim=-1).numpy()
            np.testing.assert_allclose(read.norms[0], norms, rtol=1e-4)
            seen.append(index)
    assert sorted(seen) == list(range(len(ids)))
    return prepared


def own_positions(ids: list[np.ndarray]) -> list[np.ndarray]:
    return [np.arange(N_SHARED, len(one), dtype=np.int32) for one in ids]


@pytest.mark.parametrize(
    ("family", "batch_tokens"),
    [*((family, 60) for family in FAMILIES), ("gemma2", 1), ("gemma2", 10_000), ("falcon_h1", 1)],
)
def test_every_token_is_that_of_its_sequence_alone(family: str, batch_tokens: int) -> None:
    model, ids, said = model_of(family), sequences(), []
    passes = ForwardPasses(LanguageModel(model, LAYER), batch_tokens=batch_tokens, say=said.append)
    prepared = assert_reads(passes, ids, own_positions(ids), model)
    assert passes.strategy == STRATEGIES[family]
    assert len(said) == 1
    assert said[0].startswith(f"forward passes of the model: {passes.strategy} (equals each sequence run alone")
    # What is shared is run once, and nothing is run twice.
    assert prepared.n_shared == (0 if passes.strategy == "plain" else N_SHARED)
    assert passes.n_tokens == prepared.n_shared + sum(len(one) - prepared.n_shared for one in ids)


@pytest.mark.parametrize("family", ["llama", "falcon_h1"])
def test_sequences_of_which_nothing_is_read(family: str) -> None:
    """The first among them, whose start would have been run for all."""
    model, ids = model_of(family), sequences()
    positions = own_positions(ids)
    positions[0] = positions[3] = positions[0][:0]
    passes = ForwardPasses(LanguageModel(model, LAYER), batch_tokens=60)
    prepared = passes.prepare(ids, positions)
    assert prepared.n_shared == N_SHARED
    for batch, (reads,) in run_batches(prepared):
        for index, read in zip(batch, reads, strict=True):
            assert_close(read.rows[0], whole_model(model, ids[index])[positions[index].astype(np.int64)])
            assert len(read.norms[0]) == (0 if index in (0, 3) else len(ids[index]))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2", "llama4"])
@pytest.mark.parametrize("n_rows", [1, 2, 4])
def test_rows_of_several_sequences_with_nothing_shared(
    family: str, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    ids = [one[i:] for i, one in enumerate(sequences(0, (12, 25, 7, 31, 18, 40)))]
    passes = ForwardPasses(LanguageModel(model, LAYER), batch_tokens=10_000)
    monkeypatch.setattr(
        passes, "_layout", lambda lengths, n_shared: packing.packed_rows(lengths, -(-sum(lengths) // n_rows))
    )
    positions = [np.arange(0, len(one), 2, dtype=np.int32) for one in ids]
    assert assert_reads(passes, ids, positions, model).n_shared == 0
    assert passes.strategy == "packed"
    assert passes.n_passes == 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_half_precision_is_checked_against_itself(family: str) -> None:
    model = make_model(family).to(torch.bfloat16)
    ids = sequences()
    passes = ForwardPasses(LanguageModel(model, LAYER), batch_tokens=10_000)
    prepared = passes.prepare(ids, own_positions(ids))
    assert passes.strategy == "packed"
    for batch, (reads,) in run_batches(prepared):
        for index, read in zip(batch, reads, strict=True):
            expected = whole_model(model, ids[index])[N_SHARED:]
            assert read.rows[0].dtype == torch.bfloat16
            error = (read.rows[0].double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
            assert float(error.median()) < 0.03


class Without(LanguageModel):
    """A model that takes no notice of some of its inputs, as models do that were not made for them."""

    ignored: tuple[str, ...] = ()

    def run(self, **inputs: Any) -> Any:
        return super().run(**{name: value for name, value in inputs.items() if name not in self.ignored})


@pytest.mark.parametrize(
    ("ignored", "strategy"),
    [
        (("attention_mask",), "cached"),
        (("position_ids",), "cached"),
        (("cache", "past_key_values"), "plain"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_model_does_not_heed_is_not_used(family: str, ignored: tuple[str, ...], strategy: str) -> None:
    model, ids = model_of(family), sequences()
    decoder = Without(model, LAYER)
    decoder.ignored = ignored
    said: list[str] = []
    passes = ForwardPasses(decoder, batch_tokens=10_000, say=said.append)
    assert_reads(passes, ids, own_positions(ids), model)
    assert passes.strategy == strategy
    assert "; not packed (" in said[0]


class WrongWithoutMask(LanguageModel):
    """A model that masks sequences wrongly by itself, and rightly where it is told what each token sees."""

    def run(self, **inputs: Any) -> Any:
        off = len(inputs["input_ids"]) > 1 and inputs["use_cache"] and "attention_mask" not in inputs
        return [rows + off for rows in super().run(**inputs)]


def test_sequences_in_rows_of_their_own_are_checked_where_they_may_be_packed() -> None:
    model, ids = model_of("llama"), sequences()
    passes = ForwardPasses(WrongWithoutMask(model, LAYER), batch_tokens=10_000)
    assert_reads(passes, ids, own_positions(ids), model)
    assert passes.strategy == "plain"


def test_the_windows_are_as_before() -> None:
    model, ids = model_of("gemma2"), sequences()
    before = model.config.to_dict()
    ForwardPasses(LanguageModel(model, LAYER)).prepare(ids, own_positions(ids))
    assert model.config.to_dict() == before


@pytest.mark.parametrize("on_disk", [("model.layers.1", "model.layers.2"), ("model.embed_tokens",)])
def test_a_model_of_which_parts_lie_on_disk(on_disk: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, ids = model_of("qwen3"), sequences()
    model.save_pretrained(tmp_path)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    parts += [f"model.layers.{i}" for i in range(N_LAYERS)]
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map={part: "disk" if part in on_disk else "cpu" for part in parts},
        offload_folder=tmp_path / "offloaded",
    )
    assert any(parameter.is_meta for parameter in spread.parameters())
    passes = ForwardPasses(LanguageModel(spread, LAYER), batch_tokens=60)
    assert_reads(passes, ids, own_positions(ids), model)
    assert passes.strategy == "packed"


# What is shared, and what is run --------------------------------------------------------------------------------------


def prepare(ids: list[Any], positions: list[Any]) -> Sequences:
    as_arrays = [np.asarray(one, np.int32) for one in ids], [np.asarray(one, np.int32) for one in positions]
    return ForwardPasses(LanguageModel(model_of("llama"), 0)).prepare(*as_arrays)


def test_shared_is_what_all_have_in_common_before_the_first_token_read() -> None:
    start = list(range(3, 33))
    assert prepare([[*start, 40], [*start, 41, 42]], [[30], [30, 31]]).n_shared == 30
    assert prepare([[*start, 40], [*start, 41, 42]], [[30], [20, 31]]).n_shared == 20
    assert prepare([[*start, 40], [*start[:18], 50, 51, 52]], [[30], [19]]).n_shared == 18
    assert prepare([[*start, 40], [*start, 40]], [[30], [30]]).n_shared == 30
    # One token of each at least is its own.
    assert prepare([start, [*start, 41]], [[29], [30]]).n_shared == 29
    # Too little, or one alone: not worth a pass.
    assert prepare([[*start, 40], [*start, 41]], [[5], [30]]).n_shared == 0
    assert prepare([[*start, 40]], [[30]]).n_shared == 0
    # A prompt of which nothing is read is not run, and does not count.
    assert prepare([[*start, 40], [9], [*start, 41]], [[30], [], [30]]).n_shared == 30


def test_nothing_after_the_last_token_read_is_run() -> None:
    ids = [np.arange(3, 3 + n, dtype=np.int32) for n in (20, 30, 5)]
    read = [np.array([2, 7], np.int32), np.array([11], np.int32), np.array([], np.int32)]
    passes = ForwardPasses(LanguageModel(model_of("llama"), LAYER), batch_tokens=1000)
    found = {
        index: one
        for batch, (reads,) in run_batches(passes.prepare(ids, read))
        for index, one in zip(batch, reads, strict=True)
    }
    assert passes.n_tokens == 8 + 12
    for index in (0, 1):
        expected = whole_model(model_of("llama"), ids[index])
        assert_close(found[index].rows[0], expected[read[index].astype(np.int64)])
        assert len(found[index].norms[0]) == read[index][-1] + 1
    assert found[2].rows[0].shape == (0, D_MODEL)


def test_nothing_to_run() -> None:
    passes = ForwardPasses(LanguageModel(model_of("llama"), 0))
    assert list(run_batches(passes.prepare([], []))) == []


def test_two_sides_go_through_together() -> None:
    """Queries without and with demonstrations: the same queries in a batch, each side with what it shares."""
    model = model_of("qwen3")
    with_demos = sequences()
    without = [one[N_SHARED - 2 :] for one in with_demos]
    passes = ForwardPasses(LanguageModel(model, LAYER), batch_tokens=60)
    sides = [
        passes.prepare(without, [np.arange(2, len(one), dtype=np.int32) for one in without]),
        passes.prepare(with_demos, own_positions(with_demos)),
    ]
    sizes = []
    for batch, (base, demos) in run_batches(*sides):
        sizes.append(len(batch))
        for slot, index in enumerate(batch):
            assert_close(base[slot].rows[0], whole_model(model, without[index])[2:])
            assert_close(demos[slot].rows[0], whole_model(model, with_demos[index])[N_SHARED:])
    assert sum(sizes) == len(LENGTHS)
    assert len(sizes) > 1
    assert passes.n_tokens == sum(map(len, without)) + N_SHARED + sum(LENGTHS)


@pytest.mark.parametrize("row_length", [1, 10, 25, 1000])
def test_packed_rows_hold_each_sequence_once(row_length: int) -> None:
    lengths = [3, 3, 4, 5, 7, 7, 8, 12]
    rows = packing.packed_rows(lengths, row_length)
    assert [slot for row in rows for slot in row] == list(range(8))
    assert all(rows)
    assert max(sum(lengths[slot] for slot in row) for row in rows) <= row_length + max(lengths)


def test_with_a_stream_of_its_own_the_model_is_one_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where, and when, with a stream that only takes notes in the place of CUDA's."""
    current, happened = ["caller"], []

    class Stream:
        def __init__(self, device: Any) -> None:
            happened.append(("new stream", current[0]))

        def wait_stream(self, other: str) -> None:
            happened.append(("waits for the weights", other))

    @contextmanager
    def stream(one: Stream) -> Iterator[None]:
        current[0] = "model"
        yield
        current[0] = "caller"

    class Watched(LanguageModel):
        def run(self, **inputs: Any) -> Any:
            happened.append(("pass", current[0]))
            return super().run(**inputs)

    model, ids = model_of("llama"), sequences()
    passes = ForwardPasses(Watched(model, LAYER), batch_tokens=30)
    prepared = passes.prepare(ids, own_positions(ids))
    happened.clear()
    monkeypatch.setattr(passes.runnable, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(forward, "moved", lambda tensor, device: tensor)
    for name, fake in (("Stream", Stream), ("stream", stream), ("current_stream", lambda device: "caller's")):
        monkeypatch.setattr(torch.cuda, name, fake)
    for batch, (reads,) in run_batches(prepared):
        happened.append(("used", current[0]))
        for index, read in zip(batch, reads, strict=True):
            assert_close(read.rows[0], whole_model(model, ids[index])[N_SHARED:])
    started, passed, used = ("waits for the weights", "caller's"), ("pass", "model"), ("used", "caller")
    n_batches = happened.count(used)
    assert n_batches >= 3
    # The shared start (in two pieces) and two batches are on their way before the first is used; then always one more.
    between = [used, passed] * (n_batches - 2)
    assert happened == [("new stream", "caller"), started, *[passed] * 4, *between, used, used]
    happened.clear()
    passes.prepare(ids, own_positions(ids))
    assert happened == [started]  # the caller may have trained the model since


def test_on_a_gpu_the_caller_and_the_model_do_not_disturb_each_other() -> None:
    """The model has a stream of its own, where the next batch is under way while the caller works on this one."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    model, ids = make_model("llama"), sequences(lengths=(9, 4, 13, 30, 1, 22) * 8)
    expected = [whole_model(model, one)[N_SHARED:] for one in ids]
    passes = ForwardPasses(LanguageModel(model.to("cuda"), LAYER), batch_tokens=60)
    busy = torch.randn(2000, 2000, device="cuda")
    kept = {}
    for batch, (reads,) in run_batches(passes.prepare(ids, own_positions(ids))):
        for index, read in zip(batch, reads, strict=True):
            busy = (busy @ busy).tanh()  # so that the rows are read long after they have been let go
            kept[index] = read.rows[0] + 0 * busy[0, 0]
        del reads
    for index, rows in kept.items():
        assert float((rows.cpu() - expected[index]).abs().max()) <= 1e-4 * max(1.0, float(expected[index].abs().max()))


# Memory ---------------------------------------------------------------------------------------------------------------


class Small(LanguageModel):
    """A model whose device holds only so many tokens."""

    holds = 0
    error: Callable[[], Exception] = MemoryError

    def run(self, **inputs: Any) -> Any:
        if inputs["input_ids"].numel() > self.holds:
            raise self.error()
        return super().run(**inputs)


def cpu_allocator_error() -> Exception:
    try:
        torch.empty(1 << 55)
    except RuntimeError as error:
        return error
    raise AssertionError("that much memory should not be there")


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, cpu_allocator_error])
@pytest.mark.parametrize("holds", [45, 100])
def test_a_batch_that_does_not_fit_is_halved(error: Callable[[], Exception], holds: int) -> None:
    model, ids = model_of("llama"), sequences()
    decoder = Small(model, LAYER)
    decoder.holds, decoder.error = 1000, error
    said: list[str] = []
    passes = ForwardPasses(decoder, batch_tokens=400, say=said.append)
    passes.prepare(ids, own_positions(ids))
    decoder.holds = holds
    assert_reads(passes, ids, own_positions(ids), model)
    assert all("out of memory with " in line and "(--batch-tokens)" in line for line in said[1:])
    assert len(said) > (1 if holds < sum(LENGTHS) else 0)
    assert passes.batch_tokens is not None
    assert passes.batch_tokens < 400 or holds >= sum(LENGTHS)


def test_one_prompt_that_does_not_fit_is_told() -> None:
    model, ids = model_of("llama"), sequences(0, (5, 30))
    decoder = Small(model, LAYER)
    decoder.holds = 1000
    passes = ForwardPasses(decoder, batch_tokens=400)
    prepared = passes.prepare(ids, [np.arange(len(one), dtype=np.int32) for one in ids])
    decoder.holds = 20
    with pytest.raises(InputError, match="a prompt of 30 tokens does not fit into the memory of cpu beside the model"):
        list(run_batches(prepared))


def test_other_errors_are_not_taken_for_memory() -> None:
    decoder = Small(model_of("llama"), LAYER)
    decoder.holds, decoder.error = 1000, lambda: RuntimeError("expected scalar type Float")
    ids = sequences(0, (5,))
    passes = ForwardPasses(decoder)
    prepared = passes.prepare(ids, [np.arange(5, dtype=np.int32)])
    decoder.holds = 1
    with pytest.raises(RuntimeError, match="expected scalar type"):
        list(run_batches(prepared))


@pytest.mark.parametrize(("free", "expected"), [(0, 256), (20_000_000, None), (10**12, 2048), (None, 2048)])
def test_the_budget_comes_from_the_free_memory(
    free: int | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    ids = sequences()
    passes = ForwardPasses(LanguageModel(model_of("llama"), LAYER))
    assert passes.batch_tokens is None
    list(run_batches(passes.prepare(ids, own_positions(ids))))
    assert passes.batch_tokens == expected or (expected is None and passes.batch_tokens in (512, 1024))


def test_free_memory_of_this_machine() -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 1_000_000 < free < 10**15


def test_files_that_were_read_do_not_count_against_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "memory.max": "2000000\n",
        "memory.current": "1900000\n",
        "memory.stat": "anon 400000\nfile 1500000\ninactive_file 900000\nactive_file 500000\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == 2_000_000 - 1_900_000 + 1_400_000
    (tmp_path / "memory.max").write_text("max\n")
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or free > 2_000_000


def test_tokenizer_of_another_model() -> None:
    passes = ForwardPasses(LanguageModel(model_of("llama"), 0))
    with pytest.raises(InputError, match="the model knows 60 tokens, but its tokenizer gives token id 60: "):
        passes.prepare([np.array([3, VOCABULARY], np.int32)], [np.array([1], np.int32)])
