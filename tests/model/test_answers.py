"""Answers scored against cases by hand and a loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, make_model
from numpy.typing import NDArray
from scipy import special
from tiny import SINK, Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sts_fast.data.examples import load_examples
from sts_fast.data.prompts import Prompt, build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.errors import InputError
from sts_fast.model import answers

BATCH_BUDGETS = (1, 64, 300, 10**6)
NONE = np.empty(0, np.int32)


def prompt(ids: Sequence[int], positions: Sequence[int]) -> Prompt:
    read = np.asarray(positions, np.int32)
    return Prompt("one", np.asarray(ids, np.int32), NONE, read, NONE, NONE, n_special=0)


class Bigrams(torch.nn.Module):
    """A language model whose next token depends on the last alone: row t of the table has the logits after t."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.as_tensor(table, dtype=torch.float32))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_answers_by_hand() -> None:
    """After 0 comes 1 with probability 1/2, after 1 comes 2 with 3/4, after 2 anything."""
    table = np.log([[1 / 4, 1 / 2, 1 / 4], [1 / 8, 1 / 8, 3 / 4], [1 / 3, 1 / 3, 1 / 3]])
    prompts = [
        prompt([2, 0, 1, 2], [2, 3]),  # likeliest, likeliest
        prompt([0, 2], [1]),  # not the likeliest
        prompt([0, 1, 0], [1, 2]),  # likeliest, not the likeliest
        prompt([2, 2, 0, 1, 2, 1], [3]),  # only what is read counts
        prompt([0, 1, 1, 2], [1, 3]),  # with a token between that is not read
    ]
    nll, n_tokens, exact = answers.answer_outcomes(Bigrams(table), prompts, batch_tokens=8)
    likelihoods = [1 / 2 * 3 / 4, 1 / 4, 1 / 2 * 1 / 8, 1 / 2, 1 / 2 * 3 / 4]
    np.testing.assert_allclose(nll, -np.log(likelihoods), rtol=1e-6)
    assert n_tokens.tolist() == [2, 1, 2, 1, 2]
    assert exact.tolist() == [True, False, False, True, True]


@pytest.fixture(scope="module")
def answer_prompts(tiny: Tiny) -> list[Prompt]:
    """Prompts of many lengths: questions with their answers, some cut short, and with what the model would say."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    examples = [example for example in load_examples(tiny.train) if len(example.question) < 1000]
    prompts = build_prompts("sums", examples, PromptTemplate(tokenizer), tokens="answer").prompts
    assert any(SINK in tokenizer.decode(one.base_ids) for one in prompts)
    model = float64_model(tiny)
    greedy = []
    for length, one in enumerate(prompts[:8], start=1):
        ids = one.base_ids[: one.positions[0]].tolist()
        for _ in range(length):
            ids.append(int(logits_of(model, ids)[-1].argmax()))
        greedy.append(prompt(ids, range(len(ids) - length, len(ids))))
    last_differs = [
        prompt([*one.base_ids[:-1].tolist(), (int(one.base_ids[-1]) + 1) % 300], one.positions.tolist())
        for one in greedy
    ]
    early = [prompt(one.base_ids[5 * i :].tolist(), one.positions - 5 * i) for i, one in enumerate(prompts[:5])]
    return [*prompts, *greedy, *last_differs, *early]


def float64_model(tiny: Tiny) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64).eval()


def logits_of(model: Any, ids: list[int]) -> NDArray[np.float64]:
    """[n_tokens, vocabulary] of one sequence alone."""
    with torch.no_grad():
        logits: NDArray[np.float64] = model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()
    return logits


@pytest.mark.parametrize("batch_tokens", BATCH_BUDGETS)
def test_answers_equal_a_loop_over_tokens(
    tiny: Tiny, answer_prompts: list[Prompt], batch_tokens: int, request: pytest.FixtureRequest
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    nll, n_tokens, exact = answers.answer_outcomes(model, answer_prompts, batch_tokens=batch_tokens)
    assert sum(n_sequences for n_sequences, _ in shapes) == len(answer_prompts)
    assert all(n_sequences == 1 or n_sequences * longest <= batch_tokens for n_sequences, longest in shapes)
    assert len({len(one.base_ids) for one in answer_prompts}) > 10

    literal = float64_model(tiny)
    expected_nll, expected_exact = [], []
    for one in answer_prompts:
        logits = logits_of(literal, one.base_ids.tolist())
        total, right = 0.0, True
        for position in one.positions.tolist():
            before, token = logits[position - 1], int(one.base_ids[position])
            total -= special.log_softmax(before)[token]
            right = right and int(before.argmax()) == token
        expected_nll.append(total)
        expected_exact.append(right)
    assert sum(expected_exact) >= 8
    assert not all(expected_exact)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5)
    assert exact.tolist() == expected_exact
    assert n_tokens.tolist() == [len(one.positions) for one in answer_prompts]
    request.node.user_properties.append(("largest_deviation", float(np.max(np.abs(nll / expected_nll - 1)))))


def test_no_batch_gives_more_logits_than_fit(
    tiny: Tiny, answer_prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    expected = answers.answer_outcomes(model, answer_prompts, batch_tokens=10**6)
    n_logits: list[tuple[int, int]] = []
    model.register_forward_hook(
        lambda module, args, options, output: n_logits.append((len(options["input_ids"]), output.logits.numel())),
        with_kwargs=True,
    )
    most = 300 * model.config.vocab_size
    monkeypatch.setattr(answers, "MOST_LOGITS", most)
    found = answers.answer_outcomes(model, answer_prompts, batch_tokens=10**6)
    assert all(n_sequences == 1 or n <= most for n_sequences, n in n_logits)
    assert any(n_sequences > 1 for n_sequences, _ in n_logits)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_answers_keep_their_order(tiny: Tiny, answer_prompts: list[Prompt]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    forwards = answers.answer_outcomes(model, answer_prompts, batch_tokens=300)
    backwards = answers.answer_outcomes(model, answer_prompts[::-1], batch_tokens=300)
    for one, other in zip(forwards, backwards, strict=True):
        np.testing.assert_allclose(one, other[::-1], rtol=1e-5)


def test_no_prompts_have_no_outcomes() -> None:
    nll, n_tokens, exact = answers.answer_outcomes(Bigrams(np.zeros((2, 2))), [], batch_tokens=8)
    assert (len(nll), len(n_tokens), len(exact)) == (0, 0, 0)


@pytest.mark.parametrize("batch_tokens", BATCH_BUDGETS)
def test_a_model_that_gives_nan_is_refused(tiny: Tiny, answer_prompts: list[Prompt], batch_tokens: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(InputError, match=r"the model gives NaN .*--dtype float32"):
        answers.answer_outcomes(model, answer_prompts, batch_tokens=batch_tokens)


def test_a_batch_of_answers_that_does_not_fit_is_halved(tiny: Tiny, answer_prompts: list[Prompt]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    expected = answers.answer_outcomes(model, answer_prompts, batch_tokens=10**6)

    def holds_few(module: Any, args: Any, options: Any) -> None:
        if options["input_ids"].numel() > 300:
            raise MemoryError

    model.register_forward_pre_hook(holds_few, with_kwargs=True)
    said: list[str] = []
    found = answers.answer_outcomes(model, answer_prompts, batch_tokens=10**6, say=said.append)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert found[2].tolist() == expected[2].tolist()
    assert said
    assert all(line.startswith("out of memory with ") and line.endswith("(--batch-tokens)") for line in said)


def test_one_nan_among_the_answers_is_enough() -> None:
    table = np.zeros((4, 4))
    table[3, 0] = np.nan
    fine, broken = prompt([0, 1, 2], [1, 2]), prompt([0, 3, 1], [1, 2])
    answers.answer_outcomes(Bigrams(table), [fine, fine], batch_tokens=6)
    # What comes after a token that is not read does not matter.
    answers.answer_outcomes(Bigrams(table), [fine, prompt([0, 3, 1], [1])], batch_tokens=6)
    with pytest.raises(InputError, match="NaN"):
        answers.answer_outcomes(Bigrams(table), [fine, broken], batch_tokens=6)


def test_token_that_the_model_does_not_know() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(InputError, match="knows 8 tokens, but its tokenizer gives token id 8"):
        answers.answer_outcomes(model, [prompt([0, 8], [1])], batch_tokens=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_run_on_the_answers_alone_and_says_the_same(family: str) -> None:
    """Heads that scale or cap their logits too; against a forward pass of the whole batch."""
    model = make_model(family).eval()
    rng = np.random.default_rng(0)
    prompts = [
        prompt(rng.integers(3, VOCABULARY - 8, n).tolist(), range(n - n_answer, n))
        for n, n_answer in ((9, 1), (12, 3), (12, 11))
    ]
    ids = answers.padded_ids(model, [one.base_ids for one in prompts])
    head, rows = model.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        losses, exact = answers.read_answers(model, ids, prompts)
        handle.remove()
        whole = answers.score_answers(model(input_ids=ids, use_cache=False).logits, ids, prompts)
    assert rows == [1 + 3 + 11]
    np.testing.assert_allclose(losses.numpy(), whole[0].numpy(), rtol=2e-6)
    assert exact.tolist() == whole[1].tolist()
    assert not head._forward_pre_hooks


def test_a_head_that_is_no_module_is_read_whole(tiny: Tiny, answer_prompts: list[Prompt]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    ids = answers.padded_ids(model, [one.base_ids for one in answer_prompts[:3]])

    class Headless(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return model(**inputs)

    with torch.no_grad():
        losses, exact = answers.read_answers(Headless(), ids, answer_prompts[:3])
        expected = answers.read_answers(model, ids, answer_prompts[:3])
    np.testing.assert_allclose(losses.numpy(), expected[0].numpy(), rtol=2e-6)
    assert exact.tolist() == expected[1].tolist()
