"""D_N from completions and their advantages, against dense float64 features of every token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import oracle
import pytest
import torch
from numpy.typing import NDArray
from tiny import D_IN, LAYER, Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sts_fast.data.examples import Example, load_examples
from sts_fast.data.prompts import build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.forecast.dims import Shift
from sts_fast.forecast.options import Settings
from sts_fast.model.language_model import LanguageModel
from sts_fast.profile.projection import projection
from sts_fast.rollouts.dims import N_FOLDS, Completions, correlation_shifts, gradient_shift, step_shift
from sts_fast.sae import SAE, load_sae
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.objectives import group_advantages
from sts_fast.signed.push import Features, measure_push

Doubles = NDArray[np.float64]

TOP_N = 20
SETTINGS = Settings(top_n=TOP_N)


@dataclass(frozen=True)
class Read:
    model: torch.nn.Module
    sae: SAE
    completions: Completions
    shift: Shift


@pytest.fixture(scope="module")
def read(tiny: Tiny) -> Read:
    """Ten prompts with four completions each, of which one has rewards all the same."""
    template = PromptTemplate(AutoTokenizer.from_pretrained(tiny.model), prepend_bos=True)
    rng = np.random.default_rng(0)
    words = ["apple", "river", "stone", "cloud", "table~", "green"]
    asked = [
        Example(f"{example.id}-{i}", example.question, " ".join(rng.choice(words, rng.integers(1, 6))))
        for example in load_examples(tiny.train)[:10]
        for i in range(4)
    ]
    prompts = build_prompts("correlation", asked, template, tokens="answer")
    group_of = np.repeat(np.arange(10), 4)
    rewards = rng.random(40).round(1)
    rewards[8:12] = 0.5
    completions = Completions(prompts, group_advantages(rewards, group_of), group_of)
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64).eval()
    sae = load_sae(tiny.saes["topk"])
    [shift] = correlation_shifts(LanguageModel(model, sae.hook_name), [sae], completions, SETTINGS)
    return Read(model, sae, completions, shift)


def residual(model: torch.nn.Module, ids: NDArray[np.int32]) -> Doubles:
    with torch.no_grad():
        hidden = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
    return hidden[LAYER + 1][0].numpy().astype(np.float32).astype(np.float64)


def dense(tiny: Tiny, read: Read) -> tuple[Doubles, NDArray[np.int64]]:
    """[n_tokens, d_sae] features of every completion's tokens but sinks, and whose they are."""
    found, prompt_of = [], []
    for i, prompt in enumerate(read.completions.prompt_set.prompts):
        x = residual(read.model, prompt.base_ids)
        at = prompt.positions[~oracle.attention_sinks(x)[prompt.positions]]
        found.append(oracle.literal_encode(tiny.saes["topk"], x[at])[oracle.VALUE])
        prompt_of += [i] * len(at)
    return np.concatenate(found), np.asarray(prompt_of)


def top_of(importance: Doubles) -> list[int]:
    return np.argsort(-importance, kind="stable")[:TOP_N].tolist()


def test_correlation_is_pearsons_over_the_completions_tokens(tiny: Tiny, read: Read) -> None:
    h, prompt_of = dense(tiny, read)
    A = read.completions.advantages[prompt_of]
    varies = h.std(axis=0) > 0
    r = np.zeros(h.shape[1])
    r[varies] = np.abs(np.corrcoef(h[:, varies].T, A)[-1, :-1])
    assert np.allclose(read.shift.importance, r, rtol=0, atol=1e-5)
    assert read.shift.top.tolist() == top_of(read.shift.importance)
    assert np.allclose(read.shift.mean_activation, h.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert read.shift.profile.log.n_read.sum() == len(A)
    # Each resampling draws whole prompts; |covariance| with the advantage, in deviations of the whole set.
    draws = read.completions.draws(SETTINGS.seed)
    assert all(len(np.unique(draws[read.completions.group_of == group], axis=0)) == 1 for group in range(10))
    assert (draws[::4].sum(axis=0) == 10).all()
    w = draws[prompt_of][:, 3]
    mean_h, mean_A = (w @ h) / w.sum(), (w @ A) / w.sum()
    covariance = np.einsum("t,tj,t->j", w, h - mean_h, A - mean_A) / w.sum()
    expected = np.abs(covariance[varies]) / h.std(axis=0)[varies] / A.std()
    assert np.allclose(read.shift.replicates[varies, 3], expected, rtol=0, atol=1e-4)


def test_gradient_and_step_rank_by_the_policy_gradient_and_by_what_it_shifts(tiny: Tiny, read: Read) -> None:
    hooked, Q, features = HookedModel(read.model, LAYER, batch_tokens=400), projection(D_IN), Features(read.sae)
    prompts = read.completions.prompt_set.prompts
    push = measure_push(
        hooked, features, Q, "rollouts", prompts,
        objective=read.completions.objective, maps=("step",), n_folds=N_FOLDS,
    )  # fmt: skip
    gradient = gradient_shift(push, read.shift, SETTINGS)
    M = push.direction * push.norm
    assert gradient.name == "gradient"
    assert np.allclose(gradient.importance, (M**2).sum(axis=1), rtol=1e-9)
    assert gradient.top.tolist() == top_of(gradient.importance)
    # Resamplings draw eighths of the prompts, and together have the size of the whole.
    assert gradient.replicates.shape == (256, 32)
    assert 0.2 < gradient.replicates.sum(axis=0).mean() / gradient.importance.sum() < 5
    assert (gradient.overlaps(TOP_N) <= 1).all()
    with pytest.raises(ValueError, match="folds"):
        gradient_shift(replace(push, folds=None), read.shift, SETTINGS)

    step = step_shift(hooked, read.sae, Q, push, read.shift, read.completions, SETTINGS)
    W, total, n = push.maps["step"].W, np.zeros(256), 0
    for prompt in prompts:
        x = residual(read.model, prompt.base_ids)[: int(prompt.positions[-1]) + 1]
        kept = ~oracle.attention_sinks(x)
        kept[0] = kept[-1] = False  # BOS, and the last token, which leads to no other
        h = oracle.literal_encode(tiny.saes["topk"], x[kept])[oracle.VALUE]
        moved = (x[kept] + h @ W @ Q.T).astype(np.float32).astype(np.float64)
        total += ((oracle.literal_encode(tiny.saes["topk"], moved)[oracle.VALUE] - h) ** 2).sum(axis=0)
        n += int(kept.sum())
    # A feature within rounding of the k-th largest may flip: one of these tokens at most.
    off = np.abs(step.importance - total / n) > 1e-4 * (total / n).max()
    assert off.sum() <= 2
    assert step.name == "step"
    assert step.top.tolist() == top_of(step.importance)
    assert len(set(step.top.tolist()) & set(top_of(total / n))) >= TOP_N - 1
