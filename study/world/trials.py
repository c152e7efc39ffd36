"""Real fine-tunings of a base model, and what each did to every domain."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np

from sts_fast.data.examples import Example
from sts_fast.data.prompts import build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.demo import organism
from study.world.grounds import SHORT, Ground

TRAINS, DOMAINS = SHORT.trains, SHORT.domains

# Way of training: seeds, and steps and learning rate.
REGIMES = {"light": ((0, 1, 2), 12, 2e-4), "heavy": ((0, 1, 2), 60, 5e-4), "lora": ((0, 1, 2), 40, 3e-3)}
LORA_RANK, LORA_SCALE = 4, 2.0
N_TRAIN, BATCH = 512, 32
N_QUESTIONS = {"zero-shot": 64, "few-shot": 32}
SHOTS = 4


class Remembering:
    """A tokenizer that renders the same conversations once: every model is asked the same questions."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.rendered = tokenizer, {}

    def apply_chat_template(self, conversations: Any, **options: Any) -> Any:
        key = json.dumps(conversations)
        if key not in self.rendered:
            self.rendered[key] = self.tokenizer.apply_chat_template(conversations, **options)
        return self.rendered[key]


def run_trials(ground: Ground, model: Any, tokenizer: Any, regime: str, tell: Any) -> list[dict[str, Any]]:
    """One row per training set and seed: `train`, `seed`, and for zero-shot and few-shot [n_domains] changes.

    dP, dloss, daccuracy: rise of P(answer), fall of the loss per token, rise of exact answers; z_dP, z_dloss: the first
    two over their standard errors, paired over questions.
    """
    asking = Remembering(tokenizer)
    before = abilities(model, asking, ground)
    seeds, steps, lr = REGIMES[regime]
    rows = []
    for train in ground.trains:
        for seed in seeds:
            questions = ground.world.examples(train, N_TRAIN, seed=1000 + seed)
            options: dict[str, Any] = {"steps": steps, "lr": lr, "batch": BATCH, "seed": seed}
            if regime == "lora":
                tuned = lora_tune(model, tokenizer, questions, **options)
            else:
                tuned = organism.fine_tune(model, tokenizer, questions, world=ground.world, **options)
            after = abilities(tuned, asking, ground)
            row: dict[str, Any] = {"train": train, "seed": seed}
            for shots, old in before.items():
                row[shots] = change(old, after[shots])
            rows.append(row)
            tell(f"{regime}: {train}, seed {seed}")
    return rows


def abilities(model: Any, tokenizer: Any, ground: Ground = SHORT) -> dict[str, organism.Abilities]:
    return {
        shots: organism.measure(
            model,
            tokenizer,
            ground.domains,
            shots=SHOTS if shots == "few-shot" else 0,
            n=N_QUESTIONS[shots],
            seed=2,
            world=ground.world,
        )
        for shots in N_QUESTIONS
    }


def change(before: organism.Abilities, after: organism.Abilities) -> dict[str, Any]:
    rise = np.exp(after.log_p) - np.exp(before.log_p)
    fall = (after.log_p - before.log_p) / before.n_answer
    return {
        "dP": rise.mean(axis=1),
        "dloss": fall.mean(axis=1),
        "daccuracy": after.accuracy - before.accuracy,
        "z_dP": z(rise),
        "z_dloss": z(fall),
    }


def z(differences: Any) -> Any:
    stderr = differences.std(axis=1, ddof=1) / np.sqrt(differences.shape[1])
    return differences.mean(axis=1) / np.maximum(stderr, 1e-12)


def lora_tune(model: Any, tokenizer: Any, train: list[Example], *, steps: int, lr: float, batch: int, seed: int) -> Any:
    """A copy of the model with a low-rank adapter on every projection of every layer, trained and merged."""
    import torch

    tuned = copy.deepcopy(model)
    tuned.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    handles = []
    for module in tuned.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            A = torch.randn(LORA_RANK, module.in_features, generator=generator) / module.in_features**0.5
            A, B = A.requires_grad_(), torch.zeros(module.out_features, LORA_RANK, requires_grad=True)
            pairs.append((module, A, B))
            handles.append(
                module.register_forward_hook(
                    lambda module, args, output, A=A, B=B: output + LORA_SCALE * args[0] @ A.T @ B.T
                )
            )
    optimizer = torch.optim.AdamW([w for _, A, B in pairs for w in (A, B)], lr=lr, weight_decay=0.0)
    prompts = build_prompts("train", train, PromptTemplate(tokenizer), tokens="answer").prompts
    ids = torch.tensor(np.stack([prompt.base_ids for prompt in prompts]).astype(np.int64))
    at = torch.tensor(prompts[0].positions.astype(np.int64))
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        drawn = ids[torch.from_numpy(rng.integers(len(ids), size=batch))]
        logits = tuned(input_ids=drawn[:, :-1], use_cache=False).logits[:, at - 1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn[:, at].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for module, A, B in pairs:
            module.weight += LORA_SCALE * B @ A
    return tuned
