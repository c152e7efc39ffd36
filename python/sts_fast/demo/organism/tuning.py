"""Real fine-tuning of the organism, and measurement of all its abilities."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.examples import Example
from sts_fast.demo.organism.model import MAX_SHOTS, one_thread
from sts_fast.demo.organism.world import WORLD, World
from sts_fast.model.answers import score_tokens
from sts_fast.model.packing import as_cache

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import Cache, LlamaForCausalLM, PreTrainedTokenizerBase

# Questions after the same demonstrations, which `measure` runs once for all of them.
GROUP = 8
# Groups in one forward pass.
BATCH = 32


@dataclass(frozen=True)
class Abilities:
    """A model's answers to n questions of each domain.

    domains:  names, in the order of the arrays
    log_p:    [n_domains, n] log probability of the whole correct answer
    is_exact: [n_domains, n] true where greedy decoding gives exactly this answer
    n_answer: tokens of an answer
    """

    domains: tuple[str, ...]
    log_p: NDArray[np.float64]
    is_exact: NDArray[np.bool_]
    n_answer: int

    @property
    def p_correct(self) -> NDArray[np.float64]:
        """[n_domains] mean probability of the right answer."""
        return np.asarray(np.exp(self.log_p).mean(axis=1))

    @property
    def answer_nll(self) -> NDArray[np.float64]:
        """[n_domains] mean negative log likelihood of an answer's token, in nats."""
        return np.asarray(-self.log_p.mean(axis=1) / self.n_answer)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """[n_domains] share of questions answered exactly."""
        return np.asarray(self.is_exact.mean(axis=1))


@one_thread()
def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[str],
    *,
    shots: int = 0,
    n: int = 64,
    seed: int = 0,
    world: World = WORLD,
) -> Abilities:
    """Asks `n` different questions of each domain, after `shots` demonstrations of the same domain.

    Groups of eight questions share their demonstrations. The same arguments give the same questions; two models can
    therefore be compared question by question. The correct answer is fed in: greedy decoding gives this answer exactly
    where each of its tokens is the likeliest.

    Raises ValueError for more questions than a domain has, and for more than MAX_SHOTS demonstrations.
    """
    every = world.n_questions
    if not 1 <= n <= every or not 0 <= shots <= MAX_SHOTS:
        raise ValueError(f"n must lie between 1 and {every}, shots between 0 and {MAX_SHOTS}; they are {n} and {shots}")
    import torch
    from transformers import DynamicCache

    shown: list[list[Example]] = []
    conversations: list[list[Example]] = []
    group_of: list[int] = []
    for domain in domains:
        pool = world.examples(domain, every, seed)
        for start in range(0, n, GROUP):
            questions = pool[start : min(start + GROUP, n)]
            demos = [pool[(start + GROUP + i) % every] for i in range(shots)]
            group_of += [len(shown)] * len(questions)
            shown.append([*demos, questions[0]])
            conversations += [[question] for question in questions]
    demo_ids = _token_ids(tokenizer, shown)[:, : -world.example_tokens]  # at least <s>
    ids = _token_ids(tokenizer, conversations)[:, -world.example_tokens :]
    groups = torch.tensor(group_of)
    log_p, is_exact = np.empty(len(ids)), np.empty(len(ids), bool)
    with torch.inference_mode():
        for first in range(0, len(shown), BATCH):
            of_batch = (groups >= first) & (groups < first + BATCH)
            past = DynamicCache()
            shown_ids = demo_ids[first : first + BATCH]
            model(input_ids=shown_ids, use_cache=True, logits_to_keep=1, **as_cache(model, past))
            past.batch_select_indices(groups[of_batch] - first)
            answers = ids[of_batch, -world.n_answer :]
            of_tokens, is_first = score_tokens(_answer_logits(model, ids[of_batch], world.n_answer, past), answers)
            log_p[of_batch.numpy()] = of_tokens.sum(dim=1).numpy()
            is_exact[of_batch.numpy()] = is_first.all(dim=1).numpy()
    return Abilities(tuple(domains), log_p.reshape(-1, n), is_exact.reshape(-1, n), world.n_answer)


@one_thread()
def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    *,
    steps: int = 12,
    lr: float = 2e-4,
    batch: int = 32,
    seed: int = 0,
    world: World = WORLD,
) -> LlamaForCausalLM:
    """A copy of the model, trained to answer these questions without demonstrations; the model is not changed.

    All parameters are trained with AdamW on the loss of the answers' tokens. The defaults are a light training, which
    moves other domains both ways; steps=60 and lr=5e-4 are a heavy one.
    """
    import torch

    tuned = copy.deepcopy(model)
    tuned.train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0, fused=True)
    ids = _token_ids(tokenizer, [[example] for example in train])
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 5)
        drawn = ids[torch.from_numpy(rng.integers(len(ids), size=batch))]
        logits = _answer_logits(tuned, drawn, world.n_answer)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn[:, -world.n_answer :].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tuned.train(mode=False)
    return tuned


def _token_ids(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Sequence[Example]]) -> torch.Tensor:
    """[n, n_tokens] token ids of conversations, each of the same number of examples and so of the same length."""
    import torch

    conversations = [
        [
            turn
            for example in shown
            for turn in (
                {"role": "user", "content": example.question},
                {"role": "assistant", "content": example.answer or ""},
            )
        ]
        for shown in examples
    ]
    return torch.tensor(tokenizer.apply_chat_template(conversations, return_dict=False))


def _answer_logits(
    model: LlamaForCausalLM, ids: torch.Tensor, n_answer: int, past: Cache | None = None
) -> torch.Tensor:
    """[n, n_answer, vocabulary] logits that predict the last n_answer tokens of each sequence."""
    cached = {} if past is None else as_cache(model, past)
    out = model(input_ids=ids[:, :-1], use_cache=past is not None, logits_to_keep=n_answer, **cached)
    logits: torch.Tensor = out.logits
    return logits
