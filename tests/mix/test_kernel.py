"""The kernel against inner products of gradients that are differentiated in float64 (see test_ntk)."""

from __future__ import annotations

import numpy as np
import torch
from literal_push import Literal, sae_features
from tiny import D_IN, LAYER, Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sts_fast.data.examples import load_examples
from sts_fast.data.prompts import build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.mix.kernel import measure_kernel
from sts_fast.profile.projection import projection
from sts_fast.sae import load_sae
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import Features

N_PROMPTS = 8


def test_kernel_holds_inner_products_of_gradients(tiny: Tiny) -> None:
    template = PromptTemplate(AutoTokenizer.from_pretrained(tiny.model), prepend_bos=True)
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64).eval()
    sets = [
        build_prompts(name, load_examples(path), template, tokens="answer", context_length=200, limit=N_PROMPTS)
        for name, path in {"train": tiny.train, **tiny.domains}.items()
    ]
    told = []
    kernel = measure_kernel(
        HookedModel(model, LAYER, batch_tokens=300), Features(load_sae(tiny.saes["topk"])), projection(D_IN), sets,
        tell=lambda stage, done, total: told.append((stage, done == total)),
    )  # fmt: skip
    K, loss = kernel.means()
    literal = Literal(model, sae_features(tiny.saes["topk"]))
    M = np.stack([literal.gradient(one.prompts, literal.nll) for one in sets])
    expected = np.einsum("ajr,bjr->ab", M, M)
    assert np.abs(K - expected).max() <= 1e-5 * np.abs(expected).max()
    no_map = torch.zeros(M.shape[1:], dtype=torch.float64)
    assert np.allclose(loss, [literal.values(one.prompts, literal.nll, no_map).mean() for one in sets], rtol=1e-6)
    assert kernel.names == [one.name for one in sets]
    assert {stage for stage, all_done in told if all_done} == {
        f"{what} of {one.name}" for what in ("gradients", "kernel") for one in sets
    }

    K_drawn, loss_drawn = kernel.resampled(400, seed=3)
    assert np.abs(K_drawn.mean(axis=0) - K).max() < 0.1 * np.abs(K).max()
    for i in range(len(sets)):
        assert np.isclose(loss_drawn[:, i].std(), kernel.nll[i].std() / np.sqrt(N_PROMPTS), rtol=0.15)
    again = kernel.resampled(400, seed=3)
    assert np.array_equal(K_drawn, again[0])
    assert np.array_equal(loss_drawn, again[1])
