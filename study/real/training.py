"""Fine-tunings of the model: full ones, light and long, and LoRA."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from study.real.measure import Asking
from study.real.sources import Row

BATCH_ROWS = 4
N_HELD_OUT = 24  # rows of a training set, its last ones, that choose the learning rate
LORA_RANK, LORA_ALPHA = 16, 32


@dataclass(frozen=True)
class Way:
    """A way of training: its steps, the learning rates it chooses from, and its seeds."""

    name: str
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    lora: bool = False


WAYS = {
    way.name: way
    for way in (
        Way("light", steps=30, rates=(2e-5, 8e-5), seeds=(0, 1)),
        Way("lora", steps=100, rates=(3e-4, 1.5e-3), seeds=(0,), lora=True),
        Way("long", steps=200, rates=(), seeds=(0,)),  # at the rate that was best for light training
    )
}


@contextmanager
def products() -> Iterator[str]:
    """Products in bfloat16 where the processor has them, weights and sums in float32; yields which it is."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    # A cached bfloat16 copy of a weight would outlive the steps that change it.
    with torch.autocast("cpu", torch.bfloat16, enabled=fast, cache_enabled=False):
        yield "bfloat16" if fast else "float32"


def train(
    model: Any, asking: Asking, rows: list[Row], way: Way, *, rate: float, seed: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Trains `model` in place on the answers of `rows`, end of turn included; returns its record.

    AdamW (betas .9, .95, no decay), gradients clipped to norm 1; the rate rises over a tenth of the steps and falls
    along a cosine to a tenth. Rows are drawn in passes over the set, each shuffled anew.
    """
    torch.manual_seed(seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    order = _order(len(rows), way.steps * BATCH_ROWS, seed)
    items = [asking.asked(row) for row in rows]
    losses, n_tokens, start = [], 0, time.process_time()
    model.train()
    for step in range(way.steps):
        batch = [items[i] for i in order[step * BATCH_ROWS : (step + 1) * BATCH_ROWS]]
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(step, way.steps)
        loss = answer_loss(model, [(item.question, [*item.answer, asking.end]) for item in batch], asking.end)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        n_tokens += sum(len(item.question) + len(item.answer) for item in batch)
        if step % 20 == 19:
            tell(f"step {step + 1} of {way.steps}, loss {sum(losses[-20:]) / 20:.3f}")
    model.eval()
    return {
        "rate": rate,
        "losses": losses,
        "train_tokens": n_tokens,
        "train_seconds": round(time.process_time() - start, 1),
    }


def answer_loss(model: Any, pairs: list[tuple[list[int], list[int]]], padding: int) -> torch.Tensor:
    """Mean loss over the answers' tokens of one padded batch."""
    n = max(len(question) + len(answer) for question, answer in pairs) - 1
    ids = torch.full((len(pairs), n), padding)
    mask = torch.zeros(len(pairs), n, dtype=torch.long)
    at, targets = [], []
    for i, (question, answer) in enumerate(pairs):
        fed = (question + answer)[:-1]
        ids[i, : len(fed)] = torch.tensor(fed)
        mask[i, : len(fed)] = 1
        at += [i * n + len(question) - 1 + k for k in range(len(answer))]
        targets += answer
    with products():
        hidden = _decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden.flatten(0, 1)[at])
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(targets))


def held_out_loss(model: Any, asking: Asking, rows: list[Row]) -> float:
    """Mean loss of an answer's token over rows, end of turn included."""
    items = sorted((asking.asked(row) for row in rows), key=lambda item: len(item.question) + len(item.answer))
    total, n = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(items), 2 * BATCH_ROWS):
            batch = [(item.question, [*item.answer, asking.end]) for item in items[start : start + 2 * BATCH_ROWS]]
            n_here = sum(len(answer) for _, answer in batch)
            total += answer_loss(model, batch, asking.end).item() * n_here
            n += n_here
    return total / n


def with_lora(model: Any) -> Any:
    """The model with a low-rank adapter on every projection; only the adapter is trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _decoder(model: Any) -> Any:
    """The layers under the head, under an adapter's wrappers too."""
    while not hasattr(model, "layers"):
        model = model.model
    return model


def _order(n_rows: int, n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < n:
        order += rng.sample(range(n_rows), n_rows)
    return order[:n]


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
