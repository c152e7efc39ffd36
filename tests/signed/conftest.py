"""Answered questions of the tiny model, for the equations of signed forecasts."""

from __future__ import annotations

import pytest
import torch
from literal_push import Material
from tiny import Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sts_fast.data.examples import Example, load_examples
from sts_fast.data.prompts import build_prompts
from sts_fast.data.template import PromptTemplate

N_PROMPTS = 10


@pytest.fixture(scope="module")
def material(tiny: Tiny) -> Material:
    template = PromptTemplate(AutoTokenizer.from_pretrained(tiny.model), prepend_bos=True)
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64).eval()
    prompts = {}
    for name, path in {"train": tiny.train, **tiny.domains}.items():
        # Answers of several lengths, some of them likely enough for their probability to count.
        asked = [
            Example(example.id, example.question, "apple river"[: 5 + 6 * (i % 2)])
            for i, example in enumerate(load_examples(path))
            if example.answer is not None
        ]
        prompts[name] = build_prompts(
            name, asked, template, tokens="answer", context_length=200, limit=N_PROMPTS
        ).prompts
    return Material(model, prompts)
