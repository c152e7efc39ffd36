"""What TransferMonitor costs: a random Llama is trained, and every second step is followed by a measurement.

    python -m benchmarks.bench_monitor [--json benchmarks/results/monitor.json]

The Trainer of Transformers, in float32, on one thread. First the last measurement is compared with dense features in
float64; then, for each measurement, its processor time is set against `--every` steps as long as the two before it.
Processor time, because the machine may be shared; a step is from the end of the one before to its own, data included.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

import sts_fast
from benchmarks.records import processor
from sts_fast.data.examples import Example
from sts_fast.sae import SAE
from sts_fast.trainer import TransferMonitor

N_WORDS = 8000
LAYER, N_LAYERS, D_MODEL, D_SAE = 5, 8, 512, 16384
PROBE_TOKENS, N_PROBES, N_DOMAINS = 64, 64, 4
SEQUENCES, SEQUENCE_TOKENS = 4, 512
WARM_UP = 2  # steps that are not counted; an even number
LARGEST_ERROR = 1e-4


class Clock(TrainerCallback):
    """Processor time at the end of each step, before or after what else is called then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time())


def make_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    words = ["?", "Question:", "Answer:", *(f"w{i}" for i in range(N_WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=D_MODEL,
        intermediate_size=3 * D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=D_MODEL // 64,
        num_key_value_heads=D_MODEL // 128,
    )
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def make_sae() -> SAE:
    generator = torch.Generator().manual_seed(1)
    W_enc = torch.randn(D_MODEL, D_SAE, generator=generator)
    return SAE(
        "standard",
        W_enc.numpy(),
        np.full(D_SAE, -0.5, np.float32),
        np.zeros(D_MODEL, np.float32),
        apply_b_dec_to_input=False,
        hook_name=f"blocks.{LAYER}.hook_resid_post",
        source="random",
    )


def make_sets() -> dict[str, list[Example]]:
    rng = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, N_WORDS, n))

    names = ["train", *(f"domain {i}" for i in range(N_DOMAINS))]
    return {
        name: [Example(f"{name} {i}", text(PROBE_TOKENS), text(5)) for i in range(2 + N_PROBES // 2)] for name in names
    }


def check(monitor: TransferMonitor, before: LlamaForCausalLM, after: LlamaForCausalLM, sae: SAE) -> float:
    """Relative error of the last measurement's shift; raises AssertionError where it is large."""
    total, n_tokens = 0.0, 0
    probes = monitor.probes
    n_train = int(probes.row_probes[probes.row_sets == 0].max()) + 1
    for ids, positions in list(zip(probes.ids, probes.positions, strict=True))[:n_train]:
        features = []
        for model in (before, after):
            with torch.no_grad():
                states = model(
                    input_ids=torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True
                ).hidden_states
            x = states[LAYER + 1][0, positions].to(torch.bfloat16).double()
            features.append(torch.relu(x @ torch.from_numpy(sae.W_enc).double() + torch.from_numpy(sae.b_enc).double()))
        total += float((features[1] - features[0]).square().sum())
        n_tokens += len(positions)
    error = abs(monitor.history[-1].shift / (total / n_tokens) - 1)
    assert error < LARGEST_ERROR, f"the shift measured differs from the equation's by {error:.1e}"
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measurements", type=int, default=10)
    parser.add_argument("--every", type=int, default=50, help="steps from one measurement to the next")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sts_fast.set_num_threads(1)

    model, tokenizer = make_model()
    before, sae, sets = copy.deepcopy(model), make_sae(), make_sets()
    n_steps = WARM_UP + 2 * arguments.measurements
    rows = torch.randint(3, N_WORDS, (n_steps * SEQUENCES, SEQUENCE_TOKENS), generator=torch.Generator().manual_seed(2))
    with tempfile.TemporaryDirectory() as folder:
        forecast = sts_fast.score(
            model=model,
            sae=sae,
            tokenizer=tokenizer,
            train=sets.pop("train"),
            domains=sets,
            shots=2,
            domain_shots=2,
            top_n=100,
        )
        forecast.save(f"{folder}/forecast")
        trainer = Trainer(
            model=model,
            args=Arguments(
                output_dir=f"{folder}/checkpoints",
                max_steps=n_steps,
                per_device_train_batch_size=SEQUENCES,
                learning_rate=1e-4,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        )
        clocks = Clock(), Clock()
        trainer.add_callback(clocks[0])
        monitor = TransferMonitor(
            f"{folder}/forecast", output=f"{folder}/training", every=2, n_probes=N_PROBES, sae=sae
        )
        monitor.attach(trainer)
        trainer.add_callback(clocks[1])
        trainer.train()
    error = check(monitor, before, model, sae)

    ended, left = (np.asarray(clock.times) for clock in clocks)
    took, steps = left - ended, ended[1:] - left[:-1]  # steps[i] is step i + 1, counted from 0
    measured = np.arange(WARM_UP + 1, n_steps, 2)
    around = (steps[measured - 1] + steps[measured - 2]) / 2
    costs = took[measured] / (arguments.every * around)
    found = {
        "machine": f"{processor()}, torch {torch.__version__}, one thread",
        "model": {
            "parameters": sum(parameter.numel() for parameter in before.parameters()),
            "layers": N_LAYERS,
            "d_model": D_MODEL,
            "hook_layer": LAYER,
            "d_sae": D_SAE,
        },
        "tokens_per_step": SEQUENCES * SEQUENCE_TOKENS,
        "probes": N_PROBES,
        "tokens_per_probe": statistics.median(len(ids) for ids in monitor.probes.ids),
        "every": arguments.every,
        "relative_error_of_shift": error,
        "step_cpu_seconds": [round(float(seconds), 3) for seconds in around],
        "measurement_cpu_seconds": [round(float(seconds), 3) for seconds in took[measured]],
        "cost": {"median": statistics.median(costs), "lowest": min(costs), "highest": max(costs)},
        "step_after_measurement_over_other": statistics.median(steps[measured[:-1]] / steps[measured[:-1] + 1]),
    }
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
