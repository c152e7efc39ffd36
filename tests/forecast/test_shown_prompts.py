"""The prompts that a report shows, beside the tokenizer's own text and the oracle's dense features."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from tiny import Tiny
from transformers import AutoTokenizer

import sts_fast
from sts_fast.forecast.shown_prompts import N_FEATURES, N_PROMPTS, spread_out


@pytest.fixture(scope="module")
def forecast(tiny: Tiny) -> sts_fast.Forecast:
    return sts_fast.score(
        model=tiny.model, sae=tiny.saes["jumprelu"], train=tiny.train, domains=tiny.domains, shots=1, domain_shots=1,
        top_n=20,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(forecast: sts_fast.Forecast) -> list[dict[str, Any]]:
    return forecast.prompts.to_pylist()


def test_texts_are_those_of_the_tokens(tiny: Tiny, rows: list[dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    shown = [row for row in rows if row["texts"] is not None]
    assert {row["stage"] for row in shown} == {"shift", "score"}
    for row in shown:
        assert len(row["texts"]) == len(row["base_ids"])
        assert "".join(row["texts"]) == tokenizer.decode(row["base_ids"], clean_up_tokenization_spaces=False)
        if not row["n_special"] + row["n_sinks"]:
            assert "".join(row["texts"][i] for i in row["positions"]).strip() in row["question"]


def test_shown_prompts_have_the_largest_the_middle_and_the_smallest_score(
    forecast: sts_fast.Forecast, rows: list[dict[str, Any]]
) -> None:
    for domain in forecast.domains:
        of_domain = [row for row in rows if row["stage"] == "score" and row["domain"] == domain.name]
        scores = [row["act_sum"] / len(row["positions"]) for row in of_domain]
        shown = [score for score, row in zip(scores, of_domain, strict=True) if row["parts"] is not None]
        assert len(shown) == N_PROMPTS
        assert {max(scores), min(scores)} < set(shown)
    assert spread_out(np.array([1.0, 5, 3, 2, 4])) == [1, 2, 0]
    assert spread_out(np.array([1.0])) == [0]


def test_parts_are_the_features_that_add_most(
    tiny: Tiny, forecast: sts_fast.Forecast, rows: list[dict[str, Any]]
) -> None:
    top = [feature.index for feature in forecast.shifted_features]
    shown = [row for row in rows if row["parts"]]
    assert shown
    for row in shown:
        x = oracle.residual(tiny.model, forecast.model["layer"] or 0, tuple(row["base_ids"]), torch.float64)
        low, _, high = oracle.encode(tiny.saes["jumprelu"], x)[:, row["positions"]][..., top]
        least, most = low.sum(axis=0), high.sum(axis=0)
        parts = {part["feature"]: part for part in row["parts"]}
        assert len(parts) <= N_FEATURES
        for place, feature in enumerate(top):
            if feature in parts:
                assert least[place] * (1 - 1e-4) <= parts[feature]["sum"] <= most[place] * (1 + 1e-4)
                at = row["positions"].index(parts[feature]["position"])
                assert high[at, place] >= low[:, place].max() * (1 - 1e-4)
            elif len(parts) == N_FEATURES:
                assert least[place] <= min(part["sum"] for part in parts.values()) * (1 + 1e-4)


def test_a_character_of_several_tokens_stands_at_the_last_of_them(tiny: Tiny) -> None:
    train = [{"question": f"says 🧮 {i} times", "answer": "yes"} for i in range(24)]
    found = sts_fast.score(
        model=tiny.model, sae=tiny.saes["jumprelu"], train=train, domains={"abacus": train}, shots=1, domain_shots=1,
        top_n=20,
    )  # fmt: skip
    for row in found.prompts.to_pylist():
        if row["texts"] is not None:
            assert "".join(row["texts"]).count("🧮") == 1
            assert not any("\ufffd" in text for text in row["texts"])
