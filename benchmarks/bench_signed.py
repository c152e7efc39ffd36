"""Times the signed estimators' passes over a set beside the bare ones that they cannot do without.

    python -m benchmarks.bench_signed --model FOLDER --sae FOLDER --set FILE [--prompts 64] [--json results/signed.json]

In turns, in processor time of one thread:

  bare      the model forward over the same batches, the head on the answers' tokens, and back to the hook
  ntk       the set's gradient with respect to a map from features (`measure_push`)
  domain    the same of a domain, beside --trains training sets (`measure_pull`)

The losses of all must be the same to 1e-5. Peak memory is that of a process of its own, beside one full step of AdamW
on four prompts of the set.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sts_fast
from benchmarks.records import machine
from sts_fast.data.examples import load_examples
from sts_fast.data.prompts import Prompt, build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.model.answers import in_batches, read_answers
from sts_fast.profile.projection import projection
from sts_fast.signed.gradients import HookedModel, frozen
from sts_fast.signed.push import Features, Push, measure_pull, measure_push
from sts_fast.signed.signed import hook_layer

ROUNDS = 3


class Setting:
    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        sts_fast.set_num_threads(1)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        template = PromptTemplate(tokenizer, prepend_bos=False)
        examples = [example for example in load_examples(options.set) if example.answer is not None]
        self.prompts: list[Prompt] = build_prompts(
            "set", examples, template, tokens="answer", context_length=2048, limit=options.prompts
        ).prompts
        self.model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        self.sae = sts_fast.load_sae(options.sae)
        self.hooked = HookedModel(self.model, hook_layer(self.sae))
        self.features, self.Q = Features(self.sae), projection(self.sae.d_in, seed=0)
        self.n_trains = options.trains

    def bare(self) -> np.ndarray:
        """[n_prompts] the losses."""
        nll, leaf = np.zeros(len(self.prompts)), []

        def at_hook(module: Any, args: Any, output: Any) -> Any:
            leaf[:] = [(output[0] if isinstance(output, tuple) else output).detach().requires_grad_()]
            return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

        def read(batch: list[int], ids: torch.Tensor) -> None:
            with torch.enable_grad():
                losses, _ = read_answers(self.model, ids, [self.prompts[i] for i in batch])
            torch.autograd.grad(losses.sum(), leaf[0])
            nll[batch] = losses.detach().numpy()

        handle = self.hooked._block.register_forward_hook(at_hook)
        with frozen(self.model):
            most = self.hooked.batch_tokens(gradient=True)
            for _ in in_batches(self.model, self.prompts, read, batch_tokens=most, memory=self.hooked.memory):
                pass
        handle.remove()
        return nll

    def push(self) -> Push:
        return measure_push(self.hooked, self.features, self.Q, "set", self.prompts)

    def domain(self, pushes: list[Push]) -> np.ndarray:
        return measure_pull(self.hooked, self.features, self.Q, "set", self.prompts, pushes).nll

    def training_step(self) -> None:
        weights = list(self.model.parameters())
        optimizer = torch.optim.AdamW(weights)

        def read(batch: list[int], ids: torch.Tensor) -> None:
            losses, _ = read_answers(self.model, ids, [self.prompts[i] for i in batch])
            torch.autograd.backward(losses.mean())

        for _ in in_batches(self.model, self.prompts[:4], read, batch_tokens=10**6, memory=self.hooked.memory):
            optimizer.step()


def peak(options: argparse.Namespace, run: Callable[[Setting], Any]) -> int:
    """MB of a process that does it."""

    def measure(queue: Any) -> None:
        run(Setting(options))
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=measure, args=(queue,))
    process.start()
    process.join()
    found: int = queue.get()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sae", required=True)
    parser.add_argument("--set", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--trains", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peaks = {
        "nothing": peak(options, lambda setting: None),
        "ntk": peak(options, Setting.push),
        "training step": peak(options, Setting.training_step),
    }
    setting = Setting(options)
    pushes = [replace(setting.push(), name=str(i)) for i in range(options.trains)]
    contestants = {
        "bare": setting.bare, "ntk": lambda: setting.push().nll, "domain": lambda: setting.domain(pushes),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        found = {}
        for name, run in contestants.items():
            start = time.process_time()
            found[name] = run()
            seconds[name].append(round(time.process_time() - start, 2))
        for nll in found.values():
            np.testing.assert_allclose(nll, found["bare"], rtol=1e-5)
    least = {name: min(of) for name, of in seconds.items()}
    record = {
        "machine": machine("cpu"), "dtype": options.dtype, "prompts": len(setting.prompts),
        "tokens": int(sum(prompt.positions[-1] + 1 for prompt in setting.prompts)),
        "answer_tokens": sum(len(prompt.positions) for prompt in setting.prompts), "trains": options.trains,
        "processor_seconds": seconds, "over_bare": {name: round(of / least["bare"], 3) for name, of in least.items()},
        "peak_mb": peaks,
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
