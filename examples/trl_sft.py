"""Forecast, then fine-tune with TRL while the forecast is watched: on the embedded model, in a minute.

    python examples/trl_sft.py [folder]

With a model of your own, put its name, its SAE and your files in the place of `organism`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from sts_fast import score
from sts_fast.demo import organism
from sts_fast.trainer import TransferMonitor

TRAIN, DOMAINS = "T3.next.b", ("T2.previous.c", "T0.reverse.a", "T1.swap.a")


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
    examples = organism.examples(TRAIN, 512, seed=1)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "checkpoints"),
            max_steps=40,
            per_device_train_batch_size=32,
            learning_rate=2e-4,
            logging_steps=20,
            save_strategy="no",
            report_to=[],  # "wandb", "trackio", "tensorboard": the monitor's numbers go there too
            bf16=False,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": example.question, "completion": f" {example.answer}"} for example in examples]
        ),
        processing_class=tokenizer,
    )
    monitor = TransferMonitor(folder / "forecast", output=folder / "training", every=20).attach(trainer)
    trainer.train()

    last = monitor.history[-1]
    print(f"step {last.step}: {last.overlap:.0%} of the features that moved most were forecast")
    for domain in sorted(forecast.domains, key=lambda domain: -domain.scores["act"].value):
        print(f"{domain.name}: forecast {domain.scores['act'].value:.3g}, exposure {last.exposure[domain.name]:.3g}")


if __name__ == "__main__":
    with organism.one_thread():  # a model this small gains nothing from more
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "trl-sft"))
