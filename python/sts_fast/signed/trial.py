"""A trial: the model is trained on the training set for a few steps, and each domain's answers are read again.

It is what a user would do instead of a forecast, and the yardstick of the other signed estimators. Beside every linear
map of the decoder's layers stands one of low rank (LoRA, arXiv 2106.09685),

    W x  ->  W x + (α/r) B A x,    A [r, n_in] uniform within ±1/sqrt(n_in),  B [n_out, r] zero before training,

and Adam (arXiv 1412.6980) lowers the mean loss of an answer's token with it, BATCH_ROWS prompts a step. Then

    trial       rise of P(answer), the probability of all of its tokens
    trial_loss  fall of the answer's loss, in nats per token

of which a few prompts of each domain are asked again; small_areas makes the domains' means of them and of what the base
model gave for all prompts. The model's own weights do not change, and the maps are taken away again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data.prompts import Prompt, PromptSet, Tell
from sts_fast.errors import InputError
from sts_fast.files import NOTHING_KEPT, Kept
from sts_fast.model.answers import answer_outcomes, in_batches, read_answers
from sts_fast.model.hooks import decoder_layers
from sts_fast.model.layer_trace import input_device
from sts_fast.model.log import AnswerLog
from sts_fast.model.memory import TokenBudget, most_tokens
from sts_fast.signed.gradients import frozen

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles, Indices

BATCH_ROWS = 4
# Rows of the training set whose loss is read before and after.
OWN_ROWS = 16
RANK, ALPHA = 16, 32
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class TrialDesign:
    """n_steps: steps of training; n_prompts: most of a domain that are asked again, 0 for all; seed: of all draws"""

    n_steps: int
    n_prompts: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """One training set's trial.

    train:   the prompts that the model was trained on, in order; design: steps of BATCH_ROWS of them, and the rest
    nll:     [n_train] loss per token of their answers before training, in nats; nll_after: after it; NaN of those that
             were not read
    domains: by domain, [n_prompts] the same loss after training; NaN of prompts that were not asked again
    """

    train: PromptSet
    design: TrialDesign
    nll: Doubles
    nll_after: Doubles
    domains: dict[str, Doubles]


def values(answers: AnswerLog, nll_after: Doubles) -> dict[str, Doubles]:
    """By field, [n_prompts] each prompt's change; NaN of prompts that were not asked again."""
    p_after = np.exp(-nll_after * answers.n_tokens)
    return {"trial": p_after - answers.p_answer, "trial_loss": answers.loss - nll_after}


def measure_trial(
    model: Any,
    train: PromptSet,
    domains: Sequence[PromptSet],
    design: TrialDesign,
    *,
    batch_tokens: int | None = None,
    name: str = "the model",
    say: Callable[[str], None] | None = None,
    tell: Tell | None = None,
    kept: Kept = NOTHING_KEPT,
) -> Trial:
    """Trains a model on `train` for a few steps, reads the domains' answers, and leaves the model as it was.

    model:  a causal language model with its head; name: its name in errors
    train, domains: prompts that read their answers
    batch_tokens: most tokens of one pass; say: is told where that did not fit into memory
    tell:   is told of each step and each domain; kept: what has been computed with this model

    Raises InputError where the weights are not in memory, the loss becomes NaN or infinite, or a prompt does not fit.
    """
    import torch

    done, n_done = 0, design.n_steps + len(domains)

    def step_done() -> None:
        nonlocal done
        done += 1
        if tell is not None:
            tell(done, n_done)

    def losses(prompts: Sequence[Prompt], rows: Indices, kept: Kept) -> Doubles:
        asked = [prompts[i] for i in rows]
        total, n_tokens, _ = answer_outcomes(model, asked, batch_tokens=batch_tokens, say=say, kept=kept)
        nll = np.full(len(prompts), np.nan)
        nll[rows] = total / n_tokens
        return nll

    memory = TokenBudget(input_device(model), name, say=say)
    most = most_tokens(memory.device, gradient=True)
    most = min(batch_tokens or most, most)
    own = np.arange(min(OWN_ROWS, len(train.prompts)))
    before = losses(train.prompts, own, kept)
    with frozen(model), low_rank_maps(model, seed=design.seed, name=name) as maps:

        def trained() -> dict[str, NDArray[Any]]:
            optimizer = torch.optim.Adam(maps, lr=LEARNING_RATE)
            for rows in _steps(len(train.prompts), design.n_steps, design.seed):
                prompts = [train.prompts[i] for i in rows]
                for weight, gradient in zip(maps, _gradients(model, maps, prompts, most, memory), strict=True):
                    weight.grad = gradient
                optimizer.step()
                step_done()
            return {f"{'AB'[i % 2]}.{i // 2}": weight.detach().cpu().numpy() for i, weight in enumerate(maps)}

        of_train = [prompt.read_plain for prompt in train.prompts]
        weights = kept.arrays("trials", [of_train, design.n_steps, design.seed, most], trained)
        with torch.no_grad():
            for i, weight in enumerate(maps):
                weight.copy_(torch.from_numpy(weights[f"{'AB'[i % 2]}.{i // 2}"]))
        done, kept = design.n_steps, kept.of(weights)
        after = losses(train.prompts, own, kept)
        moved = {}
        for domain in domains:
            moved[domain.name] = losses(domain.prompts, asked_again(domain, design), kept)
            step_done()
    if any(np.isinf(nll).any() for nll in (after, *moved.values())):
        raise InputError(f"the trial of '{train.name}' made the loss NaN or infinite: try --dtype float32")
    return Trial(train, design, before, after, moved)


def asked_again(domain: PromptSet, design: TrialDesign) -> Indices:
    """Ascending indices of the prompts that a trial asks again, drawn from a domain by the seed and its name."""
    n = len(domain.prompts)
    if not 0 < design.n_prompts < n:
        return np.arange(n)
    rng = np.random.default_rng([design.seed, zlib.crc32(domain.name.encode())])
    return np.sort(rng.choice(n, design.n_prompts, replace=False))


def _steps(n_rows: int, n_steps: int, seed: int) -> Iterator[list[int]]:
    """The rows of each step: passes over all of them, each in a new order."""
    rng = np.random.default_rng([seed, n_rows])
    order: list[int] = []
    for _ in range(n_steps):
        while len(order) < BATCH_ROWS:
            order += rng.permutation(n_rows).tolist()
        yield order[:BATCH_ROWS]
        order = order[BATCH_ROWS:]


def _gradients(
    model: Any, maps: Sequence[torch.Tensor], prompts: Sequence[Prompt], most: int, memory: TokenBudget
) -> list[torch.Tensor]:
    """Gradients of the mean loss of an answer's token over the prompts, in as many passes as memory asks for."""
    import torch

    n_tokens = sum(len(prompt.positions) for prompt in prompts)

    def read(batch: list[int], ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chosen = [prompts[i] for i in batch]
        with torch.enable_grad():
            nll, _ = read_answers(model, ids, chosen, name=memory.name)
            share = torch.tensor([len(prompt.positions) / n_tokens for prompt in chosen], dtype=nll.dtype)
            # Of experts to which no token went, and other maps that did not run, the gradient is zero.
            return torch.autograd.grad(
                (nll * share.to(nll.device)).sum(), maps, allow_unused=True, materialize_grads=True
            )

    total = [torch.zeros_like(weight) for weight in maps]
    for _, gradients in in_batches(model, prompts, read, batch_tokens=most, memory=memory):
        for summed, gradient in zip(total, gradients, strict=True):
            summed += gradient
    return total


@contextmanager
def low_rank_maps(model: Any, *, seed: int, name: str = "the model") -> Iterator[list[torch.Tensor]]:
    """Adds a low-rank map to every linear one of the decoder's layers; yields A and B of each, in turn.

    A: [RANK, n_in], B: [n_out, RANK] float32, beside the weights. Raises InputError where there is no linear map, or
    weights are left on disk.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    config = model.config.get_text_config()
    layers = model.get_submodule(decoder_layers(model, config.num_hidden_layers))
    linear: list[Any] = [module for module in layers.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    if not linear:
        raise InputError(f"{name} has no linear map in its layers that a trial could change: leave out trial")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"a trial trains, which weights on disk cannot: leave out trial, or --device-map, for {name}")
    generator = torch.Generator().manual_seed(seed)
    maps: list[torch.Tensor] = []
    handles = []
    try:
        for module in linear:
            is_transposed = isinstance(module, Conv1D)
            n_in, n_out = (module.nx, module.nf) if is_transposed else (module.in_features, module.out_features)
            A = (torch.rand(RANK, n_in, generator=generator) * 2 - 1) / n_in**0.5
            A, B = (weight.to(module.weight.device).requires_grad_() for weight in (A, torch.zeros(n_out, RANK)))
            maps += (A, B)
            handles.append(module.register_forward_hook(_adding(A, B)))
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def _adding(A: torch.Tensor, B: torch.Tensor) -> Callable[..., torch.Tensor]:
    def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        low = args[0].to(A.dtype) @ A.T
        return output + (ALPHA / RANK * (low @ B.T)).to(output.dtype)

    return hook
