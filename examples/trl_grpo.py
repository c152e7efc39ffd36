"""Forecast, then GRPO with TRL while the forecast is watched; training stops where a protected domain moves too far.

python examples/trl_grpo.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from sts_fast import score
from sts_fast.demo import organism
from sts_fast.trainer import TransferMonitor

TRAIN, DOMAINS = "T3.next.b", ("T2.previous.c", "T0.reverse.a", "T1.swap.a")
PROTECTED, BUDGET = "T0.reverse.a", 0.5


def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """The part of the answer's words that are right."""
    pairs = [(said.split(), right.split()) for said, right in zip(completions, answer, strict=True)]
    return [sum(a == b for a, b in zip(said, right, strict=False)) / len(right) for said, right in pairs]


def main(folder: Path) -> None:
    forecast = score(
        model=organism.model_folder(),
        sae=organism.sae_folder(),
        train=organism.examples(TRAIN, 64, seed=0),
        domains={name: organism.examples(name, 64, seed=0) for name in DOMAINS},
        shots=4,
        domain_shots=4,
        top_n=32,
    )
    forecast.save(folder / "forecast")

    model, tokenizer = organism.load_model()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token
    examples = organism.examples(TRAIN, 256, seed=1)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder / "checkpoints"),
            max_steps=20,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=3,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            log_completions=True,  # sts-fast rollouts reads them: a forecast without answers
            num_completions_to_print=0,
            report_to=[],
            bf16=False,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": example.question, "answer": example.answer} for example in examples]
        ),
        processing_class=tokenizer,
    )
    monitor = TransferMonitor(
        folder / "forecast", output=folder / "training", every=5, stop_when={PROTECTED: BUDGET}
    ).attach(trainer)
    trainer.train()

    for found in monitor.history:
        print(
            f"step {found.step}: overlap {found.overlap:.0%}, exposure of {PROTECTED} {found.exposure[PROTECTED]:.3g}"
        )
    rewards = [logs["reward"] for logs in trainer.state.log_history if "reward" in logs]
    print(f"reward {rewards[0]:.2f} at first, {rewards[-1]:.2f} at last")


if __name__ == "__main__":
    with organism.one_thread():  # a model this small gains nothing from more
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "trl-grpo"))
