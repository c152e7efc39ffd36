"""The equations of signed forecasts, literally: a map W at the hook, differentiated in float64, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import torch
from numpy.typing import NDArray
from tiny import D_IN, LAYER, Tiny
from transformers import AutoTokenizer

from sts_fast.data.examples import Example, load_examples
from sts_fast.data.prompts import Prompt, PromptSet, build_prompts
from sts_fast.data.template import PromptTemplate

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Material:
    """A model in float64 and prompts that read their answers, by set."""

    model: Any
    prompts: dict[str, list[Prompt]]


def answered_prompts(tiny: Tiny, answers: Sequence[str], limit: int) -> dict[str, PromptSet]:
    """Prompts that read their answers, by set; the answers take turns."""
    template = PromptTemplate(AutoTokenizer.from_pretrained(tiny.model), prepend_bos=True)
    made = {}
    for name, path in {"train": tiny.train, **tiny.domains}.items():
        asked = [
            Example(example.id, example.question, answers[i % len(answers)])
            for i, example in enumerate(load_examples(path))
            if example.answer is not None
        ]
        made[name] = build_prompts(name, asked, template, tokens="answer", context_length=200, limit=limit)
    return made


class Literal:
    """The equations, one prompt at a time: x -> x + h(x) W at the hook, differentiated with respect to W.

    W [n_features, r] acts through Q [64, r].
    """

    def __init__(self, model: Any, encode: Callable[[Doubles], Doubles], Q: Doubles | None = None) -> None:
        self.model, self.encode = model, encode
        self.Q = torch.from_numpy(np.eye(D_IN) if Q is None else Q)

    def nll(self, prompt: Prompt, W: torch.Tensor) -> torch.Tensor:
        """Mean over the answer's tokens, from the whole sequence."""
        ids = torch.from_numpy(prompt.base_ids.astype(np.int64))

        def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            x = output[0].detach()
            kept = ~oracle.attention_sinks(x.numpy())
            kept[0] = False  # BOS
            h = torch.from_numpy(self.encode(x.numpy()) * kept[:, None])
            return output + h @ W @ self.Q.T

        handle = self.model.model.layers[LAYER].register_forward_hook(add)
        try:
            logits = self.model(ids[None], use_cache=False).logits[0]
        finally:
            handle.remove()
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        return losses[prompt.positions.astype(np.int64) - 1].mean()

    def gradient(
        self,
        prompts: Sequence[Prompt],
        of: Callable[[Prompt, torch.Tensor], torch.Tensor],
        W: torch.Tensor | None = None,
    ) -> Doubles:
        """[n_features, r] of the mean over prompts, where the map is W, by default none."""
        shape = self.encode(np.zeros((1, D_IN))).shape[1], self.Q.shape[1]
        W = (torch.zeros(shape, dtype=torch.float64) if W is None else W.detach().clone()).requires_grad_()
        total = sum(of(prompt, W) for prompt in prompts) / len(prompts)
        return torch.autograd.grad(total, W)[0].numpy()

    def p_answer(self, prompt: Prompt, W: torch.Tensor) -> torch.Tensor:
        return torch.exp(-len(prompt.positions) * self.nll(prompt, W))

    def values(
        self, prompts: Sequence[Prompt], of: Callable[[Prompt, torch.Tensor], torch.Tensor], W: torch.Tensor
    ) -> Doubles:
        with torch.no_grad():
            return np.asarray([float(of(prompt, W)) for prompt in prompts])


def sae_features(folder: Path) -> Callable[[Doubles], Doubles]:
    def encode(x: Doubles) -> Doubles:
        # As the core gets them. None of these rows has a feature so near its border that float32 decides otherwise.
        return oracle.literal_encode(folder, x.astype(np.float32).astype(np.float64))[oracle.VALUE]

    return encode
