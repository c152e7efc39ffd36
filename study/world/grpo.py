"""Reinforcement learning of a base model of the embedded world, with TRL, and the rollouts that it learns from."""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from sts_fast.data.examples import Example
from sts_fast.demo import organism
from sts_fast.signed.objectives import group_advantages

# Chosen by how often the package's model, sampled at temperature 1, answers right, before any training: of each tag
# that stands for two skills, the domain whose share is nearest to one half; of these the six nearest, 35% to 67%.
TRAINS = ("T0.reverse.a", "T1.swap.c", "T3.copy.c", "T4.swap.a", "T6.first.b", "T7.reverse-next.d")
STEPS = 50
# Way of training: seeds and learning rate. In 'rising' the reward still rises at the end, as it does in practice; in
# 'saturated' every completion is right after a third of the steps.
REGIMES = {"rising": ((0, 1, 2), 3e-5), "saturated": ((0,), 3e-4)}
GROUP, GROUPS = 8, 8  # completions of a prompt, and prompts in a step
N_TRAIN = 216
ANSWER_TOKENS = 3
# A run counts where the mean reward of its last ten steps exceeds that of its first five by so much.
LEAST_RISE = 0.05


def is_right(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """The reward: 1 for exactly the answer, else 0."""
    return [float(said.split() == right.split()) for said, right in zip(completions, answer, strict=True)]


def train(model: Any, tokenizer: Any, domain: str, *, lr: float, seed: int) -> tuple[Any, list[float]]:
    """A copy of the model after TRL's GRPOTrainer, and the mean reward of each step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token
    questions = organism.examples(domain, N_TRAIN, seed=1000 + seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=copy.deepcopy(model),
            reward_funcs=is_right,
            args=GRPOConfig(
                output_dir=folder,
                seed=seed,
                max_steps=STEPS,
                learning_rate=lr,
                per_device_train_batch_size=GROUP * GROUPS,
                num_generations=GROUP,
                max_completion_length=ANSWER_TOKENS,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
                log_level="error",
            ),
            train_dataset=Dataset.from_list([{"prompt": one.question, "answer": one.answer} for one in questions]),
            processing_class=tokenizer,
        )
        trainer.remove_callback(_printer())
        trainer.train()
    rewards = [logs["reward"] for logs in trainer.state.log_history if "reward" in logs]
    return trainer.model.eval(), rewards


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def has_risen(rewards: list[float]) -> bool:
    return float(np.mean(rewards[-10:]) - np.mean(rewards[:5])) >= LEAST_RISE


@dataclass(frozen=True)
class Rollouts:
    """Completions that a model samples at temperature 1, and what they earn.

    completions: [n_prompts][GROUP] as text
    rewards:     [n_prompts, GROUP]
    advantages, group_of: [n_prompts * GROUP], see PolicyLoss
    """

    questions: list[str]
    completions: list[list[str]]
    rewards: Any

    @property
    def group_of(self) -> Any:
        return np.repeat(np.arange(len(self.questions)), GROUP)

    @property
    def advantages(self) -> Any:
        return group_advantages(self.rewards.ravel(), self.group_of)

    def examples(self, only_right: bool) -> list[Example]:
        """Each question with its first right completion, left out where it has none; or with its first one."""
        found = []
        for i, (question, said) in enumerate(zip(self.questions, self.completions, strict=True)):
            chosen = np.flatnonzero(self.rewards[i] > 0) if only_right else [0]
            found += [Example(f"own-{i}", question, said[g]) for g in chosen[:1]]
        return found


def sample(model: Any, tokenizer: Any, domain: str, n: int, seed: int) -> Rollouts:
    """GROUP completions for each of `n` questions of a domain."""
    import torch

    asked = organism.examples(domain, n, seed=seed)
    ids: torch.Tensor = torch.tensor(tokenizer([one.question for one in asked])["input_ids"]).repeat_interleave(
        GROUP, 0
    )
    generator = torch.Generator().manual_seed(seed)
    n_prompt = ids.shape[1]
    with torch.inference_mode():
        for _ in range(ANSWER_TOKENS):
            p = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    said = tokenizer.batch_decode(ids[:, n_prompt:])
    completions = [said[i * GROUP : (i + 1) * GROUP] for i in range(n)]
    rewards = [is_right(of_one, [one.answer or ""] * GROUP) for of_one, one in zip(completions, asked, strict=True)]
    return Rollouts([one.question for one in asked], completions, np.asarray(rewards))
