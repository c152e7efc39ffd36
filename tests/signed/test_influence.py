"""Influence of single training examples against its equation, from gradients taken prompt by prompt in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from literal_push import Literal, Material, sae_features
from tiny import D_IN, LAYER, Tiny

from sts_fast.data.prompts import PromptSet
from sts_fast.errors import InputError
from sts_fast.files import Kept
from sts_fast.profile.projection import projection
from sts_fast.sae import load_sae
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.influence import Influence, carriers, measure_influence
from sts_fast.signed.push import Features, measure_pull, measure_push


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_influences_are_the_parts_of_the_first_order_forecast(
    material: Material, tiny: Tiny, architecture: str
) -> None:
    prompts = material.prompts
    literal = Literal(material.model, sae_features(tiny.saes[architecture]))
    features, Q = Features(load_sae(tiny.saes[architecture])), projection(D_IN)
    hooked = HookedModel(material.model, LAYER, batch_tokens=300)
    sets = {name: PromptSet(name, of, 0, 0) for name, of in prompts.items()}
    domains = [sets["spelling"], PromptSet("days", prompts["days"][:7], 0, 0)]
    influence = measure_influence(hooked, features, Q, sets["train"], domains)

    of_examples = np.stack([literal.gradient([prompt], literal.nll) for prompt in prompts["train"]])
    norm = np.sqrt((of_examples.mean(axis=0) ** 2).sum())
    for i, domain in enumerate(domains):
        M_T = literal.gradient(domain.prompts, literal.nll)
        expected = np.einsum("njr,jr->n", of_examples, M_T) / norm
        np.testing.assert_allclose(influence.values[i], expected, atol=1e-5 * np.abs(expected).max())
        for half in range(2):
            M_half = literal.gradient(domain.prompts[half::2], literal.nll)
            of_half = np.einsum("njr,jr->n", of_examples, M_half) / norm
            np.testing.assert_allclose(influence.halves[i, half], of_half, atol=1e-5 * np.abs(of_half).max())
        push = measure_push(hooked, features, Q, "train", prompts["train"])
        pull = measure_pull(hooked, features, Q, domain.name, domain.prompts, [push])
        assert influence.values[i].mean() == pytest.approx(pull.values["ntk_loss"][0].mean(), rel=1e-6)
        parts = carriers(hooked, features, Q, prompts["train"][2:4], influence, i)
        for prompt, of_prompt in zip((2, 3), parts, strict=True):
            by_feature = np.einsum("jr,jr->j", of_examples[prompt], M_T) / norm
            found = np.asarray([of_prompt.get(j, 0.0) for j in range(len(by_feature))])
            np.testing.assert_allclose(found, by_feature, atol=1e-5 * np.abs(by_feature).max())
    zero = torch.zeros(of_examples.shape[1:], dtype=torch.float64)
    np.testing.assert_allclose(influence.nll, literal.values(prompts["train"], literal.nll, zero), rtol=1e-6)


def test_reliability_is_that_of_twice_as_many_prompts() -> None:
    rng = np.random.default_rng(0)
    true, noise = rng.normal(size=50_000), rng.normal(size=(2, 2, 50_000))
    halves = np.stack([true + noise[0], np.ones((2, 50_000))])
    values = halves.mean(axis=1)
    measured = Influence(values, halves, np.zeros(50_000), [], 1.0).reliability()
    again = np.corrcoef(values[0], (true + noise[1]).mean(axis=0))[0, 1]
    assert measured[0] == pytest.approx(again, abs=0.01)
    assert measured[1] is None


def test_a_training_set_without_gradient_is_named(material: Material, tiny: Tiny) -> None:
    features, Q = Features(load_sae(tiny.saes["topk"])), np.zeros((D_IN, 64))
    hooked = HookedModel(material.model, LAYER)
    sets = {name: PromptSet(name, of, 0, 0) for name, of in material.prompts.items()}
    with pytest.raises(InputError, match="the answers of 'spelling' have no gradient"):
        measure_influence(hooked, features, Q, sets["train"], [sets["spelling"]])


def test_influences_go_on_from_what_was_kept(
    material: Material, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, Q, kept = Features(load_sae(tiny.saes["topk"])), projection(D_IN), Kept(tmp_path)
    sets = {name: PromptSet(name, of, 0, 0) for name, of in material.prompts.items()}
    hooked = HookedModel(material.model, LAYER, kept=kept)
    first = measure_influence(hooked, features, Q, sets["train"], [sets["spelling"]])
    assert kept.counts() == {"gradients": 1, "influences": 1}
    with monkeypatch.context() as patch:
        patch.setattr(material.model, "forward", None)  # nothing is run
        again = measure_influence(hooked, features, Q, sets["train"], [sets["spelling"]])
    np.testing.assert_array_equal(again.values, first.values)
    measure_influence(hooked, features, Q, sets["train"], [sets["days"]])
    assert kept.counts() == {"gradients": 2, "influences": 2}
