"""Answered questions of the tiny model, for the equations of signed forecasts."""

from __future__ import annotations

import pytest
import torch
from literal_push import Material, answered_prompts
from tiny import Tiny
from transformers import AutoModelForCausalLM

N_PROMPTS = 10


@pytest.fixture(scope="module")
def material(tiny: Tiny) -> Material:
    """Answers of several lengths, some of them likely enough for their probability to count."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64).eval()
    sets = answered_prompts(tiny, ("apple", "apple river"), N_PROMPTS)
    return Material(model, {name: prompt_set.prompts for name, prompt_set in sets.items()})
