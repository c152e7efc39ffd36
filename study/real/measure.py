"""How well a model answers the rows of a domain: loss, its format and its content, and exact answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sts_fast.model.packing import as_cache
from study.real.sources import LETTERS, Row, asked

MEASURES = ("loss", "format", "content", "exact")
BATCH_TOKENS = 4096  # of one forward pass, padding included
LONG_ANSWER, FIRST_TOKENS = 8, 3  # an answer of so many tokens has so many first ones; a shorter one has 1


@dataclass(frozen=True)
class Asked:
    """A row as token ids: the rendered question, its answer, and the tokens of its options' letters if any."""

    question: list[int]
    answer: list[int]
    letters: list[int]


class Asking:
    """Renders rows with the model's chat template; its start, which all prompts share, is run once a model."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.letters = [self._ids(letter)[0] for letter in LETTERS]
        one, other = self._prompt("A"), self._prompt("B")
        self.n_shared = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        self.shared = one[: self.n_shared]

    def asked(self, row: Row) -> Asked:
        question = self._prompt(asked(row))
        if question[: self.n_shared] != self.shared:
            raise ValueError(f"the template begins otherwise for {row['question'][:60]!r}")
        return Asked(question, self._ids(row["answer"]), self.letters[: len(row.get("options", ()))])

    def _prompt(self, text: str) -> list[int]:
        turns = [{"role": "user", "content": text}]
        return self._ids(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


def measure(model: Any, asking: Asking, rows: list[Row]) -> dict[str, list[float]]:
    """Each measure of every row, [n_rows].

    loss:    mean negative log probability of an answer token, in nats, the question alone before it
    format:  options: -log of the mass on their letters; otherwise the mean loss of the answer's first tokens
    content: options: -log P(right letter, given one of the letters); otherwise the mean loss of the other tokens
             (NaN for an answer of one token)
    exact:   1 if greedy decoding gives the answer and ends the turn (options: if the right letter is the likeliest
             of the letters)
    """
    items = [asking.asked(row) for row in rows]
    order = sorted(range(len(items)), key=lambda i: len(items[i].question) + len(items[i].answer))
    found: list[dict[str, float]] = [{} for _ in items]
    with torch.inference_mode():
        prefix = _prefix(model, asking)
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * _length(items[order[stop]], asking) <= BATCH_TOKENS:
                stop += 1
            batch = order[start:stop]
            for i, log_p in zip(batch, _log_p(model, asking, prefix, [items[i] for i in batch]), strict=True):
                found[i] = _measures(items[i], log_p, asking.end)
            start = stop
    return {name: [row[name] for row in found] for name in MEASURES}


def _length(item: Asked, asking: Asking) -> int:
    return len(item.question) + len(item.answer) - asking.n_shared


def _prefix(model: Any, asking: Asking) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the start that all prompts share, a pair a layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model.model(input_ids=torch.tensor([asking.shared]), use_cache=True, **as_cache(model.model, cache))
    return [(layer.keys, layer.values) for layer in cache.layers]


def _log_p(model: Any, asking: Asking, prefix: Any, batch: list[Asked]) -> list[torch.Tensor]:
    """Log probabilities [n_answer + 1, vocabulary] at every answer token and at the end of the turn."""
    from transformers import DynamicCache

    n = max(_length(item, asking) for item in batch)
    ids = torch.full((len(batch), n), asking.end)
    mask = torch.zeros(len(batch), asking.n_shared + n, dtype=torch.long)
    for i, item in enumerate(batch):
        own = (item.question + item.answer)[asking.n_shared :]
        ids[i, : len(own)] = torch.tensor(own)
        mask[i, : asking.n_shared + len(own)] = 1
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(len(batch), -1, -1, -1), values.expand(len(batch), -1, -1, -1), layer)
    cached = as_cache(model.model, cache)
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=True, **cached).last_hidden_state
    at = [range(_length(item, asking) - len(item.answer) - 1, _length(item, asking)) for item in batch]
    read = torch.cat([hidden[i, list(positions)] for i, positions in enumerate(at)])
    log_p = torch.log_softmax(model.lm_head(read).float(), dim=-1)
    return list(log_p.split([len(positions) for positions in at]))


def _measures(item: Asked, log_p: torch.Tensor, end: int) -> dict[str, float]:
    targets = torch.tensor(item.answer)
    losses = -log_p[:-1].gather(1, targets[:, None])[:, 0].double().numpy()
    if item.letters:
        letters = log_p[0, item.letters].double()
        mass = float(torch.logsumexp(letters, dim=0))
        right = item.letters.index(item.answer[0])
        return {
            "loss": float(losses[0]),
            "format": -mass,
            "content": mass - float(letters[right]),
            "exact": float(int(letters.argmax()) == right),
        }
    n_first = FIRST_TOKENS if len(losses) >= LONG_ANSWER else 1
    exact = bool((log_p.argmax(dim=1) == torch.tensor([*item.answer, end])).all())
    return {
        "loss": float(losses.mean()),
        "format": float(losses[:n_first].mean()),
        "content": float(losses[n_first:].mean()) if len(losses) > n_first else float("nan"),
        "exact": float(exact),
    }


def paired(before: list[float], after: list[float]) -> tuple[float, float, np.ndarray]:
    """(mean change, its standard error, changes) over the rows that have both."""
    change = np.asarray(after) - np.asarray(before)
    change = change[~np.isnan(change)]
    if len(change) < 2:
        return float("nan"), float("nan"), change
    return float(change.mean()), float(change.std(ddof=1) / len(change) ** 0.5), change
