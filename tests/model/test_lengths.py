"""Models whose activations depend on the length of the sequence, against each sequence alone in a fresh model."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import GROUPED

from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.model.answers import answer_outcomes
from sts_fast.model.cost import count_passes
from sts_fast.model.forward import ForwardPasses, run_batches
from sts_fast.model.language_model import LanguageModel
from sts_fast.model.lengths import EACH_LENGTH, LengthRule, length_rule

LAYER, SWITCH, N_DEMOS = 2, 64, 60
QUERIES = (5, 40, 3, 24, 30, 4, 12, 2)
# The rotary embedding of heads of 8 numbers has 4 frequencies.
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 8.0, 16.0]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("Phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": SWITCH}),
    "longrope of Llama": (
        "Llama",
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": SWITCH, "factor": 4.0}},
    ),
    "dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": SWITCH}),
    "dynamic in GPT-NeoX": (
        "GPTNeoX",
        {
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            "rotary_pct": 1.0,
            "max_position_embeddings": SWITCH,
        },
    ),
    "yarn": (
        "Llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SWITCH}},
    ),
    "llama3": (
        "Llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": SWITCH,
            }
        },
    ),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
}
DEPENDENT = ("longrope", "longrope of Llama", "dynamic", "dynamic in GPT-NeoX")


@cache
def pristine(name: str) -> Any:
    """A random model, never run itself."""
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**GROUPED, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def make(name: str) -> Any:
    return copy.deepcopy(pristine(name))


def alone(name: str, ids: np.ndarray) -> torch.Tensor:
    """[n_tokens, d] in a model that has seen no other sequence."""
    with torch.no_grad():
        states = make(name)(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True, use_cache=False
        )
    rows: torch.Tensor = states.hidden_states[LAYER + 1][0]
    return rows


def behind(n_shared: int, lengths: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 50, n_shared)
    return [np.concatenate([shared, rng.integers(3, 50, n)]).astype(np.int32) for n in lengths]


def assert_alone(passes: ForwardPasses, name: str, sides: list[tuple[list[np.ndarray], list[np.ndarray]]]) -> None:
    """Every row read and every norm equals the sequence alone, to 1e-5 of the largest value."""
    prepared = [passes.prepare(*side) for side in sides]
    seen = []
    for batch, reads in run_batches(*prepared):
        seen += batch
        for (ids, positions), of_side in zip(sides, reads, strict=True):
            for index, read in zip(batch, of_side, strict=True):
                expected = alone(name, ids[index])
                at = positions[index].astype(np.int64)
                assert float((read.rows[0] - expected[at]).abs().max()) <= 1e-5 * float(expected.abs().max())
                np.testing.assert_allclose(read.norms[0], expected[: at[-1] + 1].double().norm(dim=-1), rtol=1e-4)
    assert sorted(seen) == list(range(len(sides[0][0])))


def all_of(ids: list[np.ndarray], start: int = 0) -> list[np.ndarray]:
    return [np.arange(start, len(sequence), dtype=np.int32) for sequence in ids]


@pytest.mark.parametrize("batch_tokens", [30, 200, 4000])
@pytest.mark.parametrize("name", MODELS)
def test_each_sequence_is_as_alone(name: str, batch_tokens: int) -> None:
    """Queries without demonstrations, and behind some of 60 tokens: half of the latter cross the switch."""
    with_demos = behind(N_DEMOS, QUERIES)
    without = [sequence[N_DEMOS - 2 :] for sequence in with_demos]
    passes = ForwardPasses(LanguageModel(make(name), LAYER), batch_tokens=batch_tokens)
    assert_alone(passes, name, [(without, all_of(without)), (with_demos, all_of(with_demos, N_DEMOS))])
    mixed = behind(0, (20, 70, 100, 63, 64, 65, 30, 90))
    assert_alone(passes, name, [(mixed, all_of(mixed))])
    assert passes.strategy == "packed"


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_of_demonstrations_is_kept_where_it_can_be(name: str) -> None:
    ids = behind(N_DEMOS, QUERIES)
    passes = ForwardPasses(LanguageModel(make(name), LAYER), batch_tokens=4000)
    prepared = passes.prepare(ids, all_of(ids, N_DEMOS))
    list(run_batches(prepared))
    crossing = sum(N_DEMOS + n > SWITCH for n in QUERIES) if name in DEPENDENT else 0
    assert passes.n_tokens == N_DEMOS + sum(QUERIES) + N_DEMOS * crossing


@pytest.mark.parametrize("name", MODELS)
def test_a_dry_run_counts_what_is_run(name: str) -> None:
    with_demos = behind(N_DEMOS, QUERIES)
    prompts = []
    for i, ids in enumerate(with_demos):
        read = np.arange(2, len(ids) - N_DEMOS + 2, dtype=np.int32)
        prompts.append(Prompt(str(i), ids[N_DEMOS - 2 :], ids, read, read, read + np.int32(N_DEMOS - 2), 0))
    model = LanguageModel(make(name), LAYER)
    model.passes.batch_tokens = 100
    for _ in model.rows("train", PromptSet("train", prompts, 0, 0)):
        pass
    rule = length_rule(model.model.config)
    counted = count_passes(PromptSet("train", prompts, 0, 0), lambda n_shared: 100, rule=rule)
    assert counted == (model.passes.n_passes, model.passes.n_tokens)


def test_demonstrations_beyond_the_switch_serve_all_and_run_in_one_piece() -> None:
    name, ids = "longrope", behind(80, QUERIES)
    passes = ForwardPasses(LanguageModel(make(name), LAYER), batch_tokens=50)
    assert_alone(passes, name, [(ids, all_of(ids, 80))])
    assert passes.n_tokens == 80 + sum(QUERIES)


@pytest.mark.parametrize("name", DEPENDENT)
def test_tokens_after_the_last_one_read_count_for_the_length(name: str) -> None:
    """A prompt of 90 tokens, of which 50 are read: their frequencies are those of 90."""
    ids = behind(0, (90, 70, 40, 90))
    positions = [np.arange(min(50, len(sequence)), dtype=np.int32) for sequence in ids]
    assert_alone(ForwardPasses(LanguageModel(make(name), LAYER), batch_tokens=400), name, [(ids, positions)])


@pytest.mark.parametrize("name", DEPENDENT)
def test_residuals_of_several_lengths(name: str) -> None:
    ids = behind(0, (90, 20, 70, 64))
    for rows, sequence in zip(LanguageModel(make(name), LAYER).residuals(ids)[0], ids, strict=True):
        expected = alone(name, sequence)
        assert float((rows - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", DEPENDENT)
def test_answers_of_several_lengths(name: str) -> None:
    ids = behind(0, (90, 20, 70, 64, 100))
    prompts = []
    for i, sequence in enumerate(ids):
        read = np.arange(len(sequence) - 4, len(sequence) - 1, dtype=np.int32)
        prompts.append(Prompt(str(i), sequence, sequence[:0], read, read[:0], read[:0], 0))
    nll, _, _ = answer_outcomes(make(name), prompts, batch_tokens=4000)
    for prompt, found in zip(prompts, nll, strict=True):
        with torch.no_grad():
            logits = make(name)(torch.from_numpy(prompt.base_ids.astype(np.int64))[None]).logits[0].double()
        expected = -logits.log_softmax(-1)[prompt.positions - 1, prompt.base_ids[prompt.positions]].sum()
        assert found == pytest.approx(float(expected), rel=1e-5)


class Growing(LanguageModel):
    """A model that no config describes: in a row of more than 50 tokens, all activations are larger."""

    def run(self, **inputs: Any) -> Any:
        cache = inputs.get("cache", inputs.get("past_key_values"))
        n_before = 0 if cache is None else cache.get_seq_length()
        factor = 1.5 if n_before + inputs["input_ids"].shape[1] > 50 else 1.0
        return [rows * factor for rows in super().run(**inputs)]


def assert_growing(passes: ForwardPasses, name: str, ids: list[np.ndarray], n_shared: int) -> None:
    for batch, (reads,) in run_batches(passes.prepare(ids, all_of(ids, n_shared))):
        for index, read in zip(batch, reads, strict=True):
            expected = alone(name, ids[index])[n_shared:] * (1.5 if len(ids[index]) > 50 else 1)
            assert float((read.rows[0] - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_dependence_that_nothing_announces_is_found_by_the_check() -> None:
    name, ids = "linear", behind(45, (3, 30, 8, 40, 30, 20))
    said: list[str] = []
    passes = ForwardPasses(Growing(make(name), LAYER), batch_tokens=4000, say=said.append)
    assert_growing(passes, name, ids, 45)
    assert (passes.lengths, passes.strategy) == (EACH_LENGTH, "plain")
    assert "not different lengths together (off by 0.5 at 85 tokens)" in said[-1]


def test_a_row_of_many_short_sequences_is_checked_as_long_as_it_will_be() -> None:
    name, ids = "linear", behind(0, (3, 30, 8, 40, 30, 20, 22, 25))
    passes = ForwardPasses(Growing(make(name), LAYER), batch_tokens=4000)
    assert_growing(passes, name, ids, 0)
    assert passes.strategy == "cached"


def test_a_longer_set_is_checked_again() -> None:
    name, short, long = "linear", behind(0, (10, 20, 30)), behind(0, (10, 70))
    passes = ForwardPasses(Growing(make(name), LAYER), batch_tokens=4000)
    passes.prepare(short, all_of(short))
    assert passes.strategy == "cached"
    assert_growing(passes, name, long, 0)
    assert passes.lengths == EACH_LENGTH


def test_rules() -> None:
    rule = LengthRule(switches=(64, 100))
    assert [rule.regime(n)[0] for n in (1, 64, 65, 100, 101)] == [0, 0, 1, 1, 2]
    assert rule.groups([70, 3, 64, 80]) == [[0, 3], [1, 2]]
    assert [EACH_LENGTH.regime(n) == EACH_LENGTH.regime(n + 1) for n in (1, 50)] == [False, False]
    layers = {"full_attention": {**LONGROPE, "original_max_position_embeddings": 40}, "other": {"rope_type": "default"}}
    config = transformers.LlamaConfig(**GROUPED)
    config.rope_parameters = layers
    assert length_rule(config) == LengthRule(switches=(40,))
