"""Prediction of answers by a language model: the likelihood of their tokens, and whether it would say them itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sts_fast.data.prompts import Prompt
from sts_fast.errors import InputError
from sts_fast.files import NOTHING_KEPT, Kept
from sts_fast.model.language_model import padded_ids
from sts_fast.model.layer_trace import input_device
from sts_fast.model.lengths import ANY_LENGTH, forget_lengths, length_rule
from sts_fast.model.memory import TokenBudget, most_tokens, running
from sts_fast.ops.devices import doubled

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles

T = TypeVar("T")

# Logits held at a time, in the answers' forward passes: 1 GB in float32.
MOST_LOGITS = 2**28


def score_tokens(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., n] float64 log-probability of each token (differentiable), [..., n] bool whether it is the first choice.

    logits: [..., n, vocabulary] from which the tokens [..., n] are to be foretold
    """
    # In float64, because the loss of an answer that is nearly certain is the difference of near equals.
    log_p = doubled(logits).log_softmax(dim=-1)
    return log_p.gather(-1, tokens[..., None])[..., 0], log_p.argmax(dim=-1) == tokens


def score_answers(
    logits: torch.Tensor, ids: torch.Tensor, prompts: Sequence[Prompt]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n_prompts] float64 mean negative log-likelihood of each answer's tokens, in nats (differentiable), and
    [n_prompts] bool whether each of them is the model's first choice: then greedy decoding gives this answer.

    logits: [n_prompts, longest, vocabulary]; ids: [n_prompts, longest]; prompts read their answers (tokens='answer')
    """
    import torch

    losses, exact, ids = [], [], ids.to(logits.device)
    for row, prompt in enumerate(prompts):
        at = torch.from_numpy(prompt.positions.astype(np.int64)).to(logits.device)
        log_p, is_first = score_tokens(logits[row, at - 1], ids[row, at])
        losses.append(-log_p.mean())
        exact.append(is_first.all())
    return torch.stack(losses), torch.stack(exact)


def read_answers(
    model: Any, ids: torch.Tensor, prompts: Sequence[Prompt], *, name: str = "the model"
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `score_answers` gives, from a forward pass in which the head is run on the answers' tokens alone.

    ids: [n_prompts, longest]; name: the model's in errors
    Raises InputError where the model fails.
    """
    import torch

    width = ids.shape[1]
    ends = np.cumsum([len(prompt.positions) for prompt in prompts])
    before = np.concatenate([row * width + prompt.positions - 1 for row, prompt in enumerate(prompts)])
    at = torch.from_numpy(before.astype(np.int64))

    def pick(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        return (hidden.flatten(0, 1)[at.to(hidden.device)][None], *args[1:]) if hidden.shape[:2] == ids.shape else None

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    handle = None if head is None else head.register_forward_pre_hook(pick)
    try:
        logits = _logits(model, ids, name)
    finally:
        if handle is not None:
            handle.remove()
    if logits.shape[:2] == ids.shape:  # a head that is no module of its own
        return score_answers(logits, ids, prompts)
    losses, exact = [], []
    tokens = ids.flatten()[(at + 1).to(ids.device)].to(logits.device)
    for start, end in pairwise([0, *ends.tolist()]):
        log_p, is_first = score_tokens(logits[0, start:end], tokens[start:end])
        losses.append(-log_p.mean())
        exact.append(is_first.all())
    return torch.stack(losses), torch.stack(exact)


def _logits(model: Any, ids: torch.Tensor, name: str) -> torch.Tensor:
    if (config := getattr(model, "config", None)) and length_rule(config.get_text_config()).each_above is not None:
        forget_lengths(model)
    with running(name):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def in_batches(
    model: Any,
    prompts: Sequence[Prompt],
    read: Callable[[list[int], torch.Tensor], T],
    *,
    batch_tokens: int,
    memory: TokenBudget,
) -> Iterator[tuple[list[int], T]]:
    """Yields what `read` makes of prompts that read their answers, shortest first, a batch at a time.

    A model whose activations depend on the length of the sequence gets prompts of one regime at a time (LengthRule).

    read:         takes the indices of a batch, and its token ids [n_prompts, longest] on the model's device, up to the
                  last token of each answer: what follows it is not needed
    batch_tokens: most tokens of a pass; fewer where the logits of their answers would be more than MOST_LOGITS
    """
    rule = ANY_LENGTH
    if config := getattr(model, "config", None):
        rule = length_rule(config.get_text_config())
    needed = [rule.needed(prompt.base_ids, int(prompt.positions[-1]) + 1) for prompt in prompts]
    if config and prompts:
        share = max(len(prompt.positions) / len(ids) for prompt, ids in zip(prompts, needed, strict=True))
        batch_tokens = min(batch_tokens, max(1, int(MOST_LOGITS / config.get_text_config().vocab_size / share)))

    def read_ids(batch: list[int]) -> T:
        return read(batch, padded_ids(model, [needed[i] for i in batch]).to(memory.device))

    lengths = [len(ids) for ids in needed]
    for group in rule.groups(lengths):
        yield from memory.in_batches(lengths, batch_tokens, read_ids, group)


def answer_outcomes(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_tokens: int | None = None,
    say: Callable[[str], None] | None = None,
    kept: Kept = NOTHING_KEPT,
) -> tuple[Doubles, NDArray[np.int64], NDArray[np.bool_]]:
    """Measures how well a language model predicts the answers, at the positions `prompts` read (tokens='answer').

    model: with its head: what it returns has `logits` [batch, n_tokens, vocabulary]
    batch_tokens: most tokens of a pass, by default `most_tokens` of the device; say: is told where that did not fit
        into memory, and half of it follows
    kept: what has been computed with this model

    Returns, per prompt: [n_prompts] summed negative log-likelihood of the answer's tokens (nats), [n_prompts] their
    number, [n_prompts] whether each of them is the model's first choice (then greedy decoding gives this answer).
    Raises InputError where the model returns NaN or lacks a token, or a single prompt does not fit into memory.
    """
    import torch

    n_tokens = np.asarray([len(prompt.positions) for prompt in prompts], np.int64)
    memory = TokenBudget(input_device(model), "the model", say=say)
    most = batch_tokens or most_tokens(memory.device)

    def outcomes() -> dict[str, NDArray[Any]]:
        nll, exact = np.zeros(len(prompts)), np.zeros(len(prompts), bool)

        def read(batch: list[int], ids: torch.Tensor) -> None:
            with torch.inference_mode():
                scored = read_answers(model, ids, [prompts[i] for i in batch])
            nll[batch], exact[batch] = (part.cpu().numpy() for part in scored)
            if np.isnan(nll[batch]).any():
                raise InputError("the model gives NaN for the answers' likelihood: try --dtype float32")

        for _ in in_batches(model, prompts, read, batch_tokens=most, memory=memory):
            pass
        return {"nll": nll, "exact": exact}

    of = kept.arrays("answers", [[prompt.read_plain for prompt in prompts], most], outcomes)
    return of["nll"] * n_tokens, n_tokens, of["exact"]
