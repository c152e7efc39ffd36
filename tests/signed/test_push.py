"""Signed forecasts against their equations: a map W at the hook, differentiated in float64, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, make_model
from literal_push import Literal, Material, sae_features
from numpy.typing import NDArray
from tiny import D_IN, LAYER, Tiny
from transformers import AutoModelForCausalLM

from sts_fast import files
from sts_fast.data.prompts import Prompt
from sts_fast.errors import InputError
from sts_fast.files import Kept
from sts_fast.profile.projection import projection
from sts_fast.sae import load_sae
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.objectives import PolicyLoss, group_advantages
from sts_fast.signed.push import (
    Features,
    LinearMap,
    Pull,
    Push,
    measure_pull,
    measure_push,
    pull_warnings,
    push_warnings,
)

Doubles = NDArray[np.float64]

TOLERANCE = 1e-5  # of a sum, relative to the largest: features and residuals reach the core as float32
BATCH_TOKENS = 300


def test_answers_and_gradients_that_do_not_fit_are_run_in_halves(material: Material) -> None:
    prompts, said = material.prompts["train"], []
    Q = projection(D_IN)

    def rows_by_prompt(model: HookedModel) -> dict[int, tuple[float, Doubles]]:
        found = {}
        for rows in model.answer_rows(prompts, Q):
            for slot, index in enumerate(rows.prompts):
                found[index] = float(rows.nll[slot]), rows.g[rows.prompt_of == slot]
        return found

    expected = rows_by_prompt(HookedModel(material.model, LAYER, batch_tokens=10_000))

    def holds_few(module: Any, args: Any, options: Any) -> None:
        if options["input_ids"].numel() > 200:
            raise MemoryError

    handle = material.model.register_forward_pre_hook(holds_few, with_kwargs=True)
    try:
        found = rows_by_prompt(HookedModel(material.model, LAYER, batch_tokens=10_000, say=said.append))
    finally:
        handle.remove()
    assert len(said) >= 1
    assert found.keys() == expected.keys()
    for index, (nll, g) in expected.items():
        assert found[index][0] == pytest.approx(nll, rel=1e-9)
        np.testing.assert_allclose(found[index][1], g, rtol=0, atol=1e-9 * np.abs(g).max())


def test_signed_passes_go_on_from_what_was_kept(
    material: Material, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, prompts = load_sae(tiny.saes["topk"]), material.prompts
    kept = Kept(tmp_path)

    def measured(
        features: Features, Q: Doubles, train: list[Prompt], *, batch_tokens: int = BATCH_TOKENS, layer: int = LAYER
    ) -> tuple[Push, Pull]:
        hooked = HookedModel(material.model, layer, batch_tokens=batch_tokens, kept=kept)
        push = measure_push(hooked, features, Q, "train", train, maps=("step",))
        return push, measure_pull(hooked, features, Q, "spelling", prompts["spelling"], [push])

    first = measured(Features(sae), projection(D_IN), prompts["train"])
    assert kept.counts() == {"gradients": 1, "maps": 1, "responses": 1}
    with monkeypatch.context() as patch:
        patch.setattr(material.model, "forward", None)  # nothing is run
        again = measured(Features(sae), projection(D_IN), prompts["train"])
    assert files.digest(first) == files.digest(again)
    assert [*first[1].values] == [*again[1].values]
    # Without the map what else was computed is of use; of anything else nothing is.
    hooked = HookedModel(material.model, LAYER, batch_tokens=BATCH_TOKENS, kept=kept)
    measure_push(hooked, Features(sae), projection(D_IN), "train", prompts["train"])
    assert kept.counts() == {"gradients": 1, "maps": 1, "responses": 1}
    for n, given in enumerate(
        (
            {"features": Features(sae, "fired")},
            {"features": Features(load_sae(tiny.saes["jumprelu"]))},
            {"Q": projection(D_IN)[:, ::-1].copy()},
            {"train": prompts["train"][::-1]},
            {"batch_tokens": BATCH_TOKENS + 1},
            {"layer": LAYER + 1},
        ),
        2,
    ):
        measured(**{"features": Features(sae), "Q": projection(D_IN), "train": prompts["train"], **given})  # type: ignore[arg-type]
        assert kept.counts() == dict.fromkeys(("gradients", "maps", "responses"), n)


def literal_features(tiny: Tiny, kind: str, centre: Doubles) -> Callable[[Doubles], Doubles]:
    if kind == "raw":
        return lambda x: x.astype(np.float32).astype(np.float64) - centre
    encode = sae_features(tiny.saes["topk"])
    return (lambda x: (encode(x) > 0).astype(np.float64)) if kind == "fired" else encode


def close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> bool:
    """Everywhere within the tolerance of the largest."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return bool(np.abs(actual - expected).max() <= tolerance * np.abs(expected).max())


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_first_order_forecasts_are_the_derivatives_of_loss_and_probability(
    material: Material, tiny: Tiny, architecture: str
) -> None:
    model, train, domain = material.model, material.prompts["train"], material.prompts["spelling"]
    literal = Literal(model, sae_features(tiny.saes[architecture]))
    features, Q = Features(load_sae(tiny.saes[architecture])), projection(D_IN)
    hooked = HookedModel(model, LAYER, batch_tokens=BATCH_TOKENS)
    push = measure_push(hooked, features, Q, "train", train)
    M = literal.gradient(train, literal.nll)
    norm = np.sqrt((M**2).sum())
    assert close(push.norm, norm)
    assert close(push.direction, M / norm)
    zero = torch.zeros(M.shape, dtype=torch.float64)
    assert close(push.loss, literal.values(train, literal.nll, zero).mean())

    pull = measure_pull(hooked, features, Q, "spelling", domain, [push])
    # The rate of change along -M / norm; a fall of the loss counts as positive.
    M_T = literal.gradient(domain, literal.nll)
    assert close(pull.values["ntk_loss"][0].mean(), (M * M_T).sum() / norm)
    assert close(pull.values["ntk"][0].mean(), -(M * literal.gradient(domain, literal.p_answer)).sum() / norm)
    assert close(pull.contributions[0], (M * M_T).sum(axis=1) / norm)
    assert close(pull.norm, np.sqrt((M_T**2).sum()))
    assert close(pull.contributions[0].sum(), pull.values["ntk_loss"][0].mean())
    assert close(pull.p_answer, literal.values(domain, literal.p_answer, zero))
    assert set(pull.values) == {"ntk", "ntk_loss"}


@pytest.mark.parametrize("kind", ["sae", "fired", "raw"])
@pytest.mark.parametrize("dims", [64, 16])
def test_virtual_training_is_the_model_with_the_map_in_place(
    material: Material, tiny: Tiny, kind: Any, dims: int
) -> None:
    centre = np.random.default_rng(0).standard_normal(D_IN)
    Q = projection(D_IN, dims=dims)
    literal = Literal(material.model, literal_features(tiny, kind, centre), Q)
    features = Features(load_sae(tiny.saes["topk"]), kind, centre)
    train, domain = material.prompts["train"], material.prompts["days"]
    hooked = HookedModel(material.model, LAYER, batch_tokens=BATCH_TOKENS)
    push = measure_push(hooked, features, Q, "train", train, maps=("step", "adapter"))
    M = literal.gradient(train, literal.nll)
    assert close(push.direction * push.norm, M)
    pull = measure_pull(hooked, features, Q, "days", domain, [push])
    nll, p_answer = (
        literal.values(domain, of, torch.zeros(M.shape).double()) for of in (literal.nll, literal.p_answer)
    )
    for name, share in (("step", 0.25), ("adapter", 0.05)):
        found = push.maps[name]
        W = torch.from_numpy(found.W)
        assert found.loss_left == pytest.approx(literal.values(train, literal.nll, W).mean() / push.loss, rel=1e-5)
        if dims == D_IN:
            assert found.loss_left <= share * 1.0001
        elif found.loss_left > share:  # so few directions may not bring the loss down that far
            assert any(f"{found.loss_left:.0%}" in warning for warning in push_warnings(push))
        assert close(pull.values[f"{name}_loss"][0], nll - literal.values(domain, literal.nll, W))
        assert close(pull.values[name][0], literal.values(domain, literal.p_answer, W) - p_answer)
    # A step goes against the gradient, and no further than it must.
    step = push.maps["step"]
    assert close(step.W / np.sqrt((step.W**2).sum()), -M / np.sqrt((M**2).sum()))
    if dims == D_IN:
        assert step.loss_left > 0.24


def test_fitting_a_map_tells_of_the_prompts_it_has_passed(material: Material, tiny: Tiny) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    hooked, features = HookedModel(material.model, LAYER), Features(load_sae(tiny.saes["topk"]))
    train = material.prompts["train"]
    measure_push(
        hooked, features, projection(D_IN), "train", train, maps=("step", "adapter"),
        tell=lambda stage, done, total: told.setdefault(stage, []).append((done, total)),
    )  # fmt: skip
    assert list(told) == ["gradients of train", "step of train", "adapter of train"]
    for stage, most in (("step of train", 48), ("adapter of train", 65)):
        *passes, last = told[stage]
        assert passes == [(len(train) * (i + 1), len(train) * most) for i in range(len(passes))]
        assert last == (len(train) * most, len(train) * most)


def test_adapter_is_gradient_descent_on_the_map(material: Material, tiny: Tiny) -> None:
    literal = Literal(material.model, sae_features(tiny.saes["topk"]))
    features, train = Features(load_sae(tiny.saes["topk"])), material.prompts["train"]
    push = measure_push(
        HookedModel(material.model, LAYER, batch_tokens=BATCH_TOKENS), features, projection(D_IN), "train", train,
        maps=("adapter",),
    )  # fmt: skip
    W = torch.zeros(push.direction.shape, dtype=torch.float64)
    while literal.values(train, literal.nll, W).mean() > 0.05 * push.loss:
        M = torch.from_numpy(literal.gradient(train, literal.nll, W))
        W = W - push.loss / push.norm / 8 * M / M.norm()
    assert close(push.maps["adapter"].W, W.numpy(), 1e-4)


def test_the_push_of_rollouts_is_their_policy_gradient(material: Material, tiny: Tiny) -> None:
    """M_S, and a step along it, of completions weighted by advantage; groups of 4, 1, 3 and 2."""
    model, completions = material.model, material.prompts["train"]
    group_of = np.repeat([0, 1, 2, 3], [4, 1, 3, 2])
    advantages = group_advantages(np.random.default_rng(0).random(len(completions)), group_of)
    literal = Literal(model, sae_features(tiny.saes["topk"]))
    no_map = torch.zeros(256, D_IN, dtype=torch.float64)
    base = literal.values(completions, literal.nll, no_map)

    def loss(W: torch.Tensor) -> torch.Tensor:
        lacking = []
        for group in range(4):
            at = np.flatnonzero(group_of == group)
            ratio = torch.stack([torch.exp(float(base[i]) - literal.nll(completions[i], W)) for i in at])
            A = torch.from_numpy(advantages[at])
            lacking.append(A.max() - (ratio * A).sum() / ratio.sum())
        return torch.stack(lacking).mean()

    push = measure_push(
        HookedModel(model, LAYER, batch_tokens=BATCH_TOKENS), Features(load_sae(tiny.saes["topk"])), projection(D_IN),
        "rollouts", completions,
        objective=PolicyLoss(advantages, group_of), maps=("step", "adapter"), n_folds=3,
    )  # fmt: skip
    W = no_map.clone().requires_grad_()
    start = loss(W)
    M = torch.autograd.grad(start, W)[0].numpy()
    assert push.loss == pytest.approx(start.item(), rel=1e-6)
    assert close(push.direction * push.norm, M)
    for name, share in (("step", 0.25), ("adapter", 0.05)):
        found = push.maps[name]
        assert found.loss_left == pytest.approx(loss(torch.from_numpy(found.W)).item() / push.loss, rel=1e-5)
        assert found.loss_left <= share * 1.0001
    # Folds are whole groups: fold 0 has the groups 0 and 3.
    assert push.folds is not None
    assert close(push.folds.sum(axis=0), M)
    alone = [0, 1, 2, 3, 8, 9]
    M_0 = literal.gradient(
        [completions[i] for i in alone],
        lambda prompt, W: literal.nll(prompt, W) * policy_slope(advantages, group_of, completions.index(prompt)) * 6,
    )
    assert close(push.folds[0], M_0)


def policy_slope(advantages: Doubles, group_of: NDArray[np.int64], i: int) -> float:
    return float(advantages[i] / (group_of == group_of[i]).sum() / len(np.unique(group_of)))


def test_several_pushes_and_batch_budgets_change_no_number(material: Material, tiny: Tiny) -> None:
    features, Q = Features(load_sae(tiny.saes["topk"])), projection(D_IN)

    def measured(names: Sequence[str], batch_tokens: int) -> tuple[list[Push], Pull]:
        hooked = HookedModel(material.model, LAYER, batch_tokens=batch_tokens)
        pushes = [measure_push(hooked, features, Q, name, material.prompts[name], maps=("step",)) for name in names]
        return pushes, measure_pull(hooked, features, Q, "spelling", material.prompts["spelling"], pushes)

    pushes, pull = measured(["train", "days"], 2000)
    [alone], pull_alone = measured(["days"], 100)
    assert close(pushes[1].direction, alone.direction)
    assert set(pull.values) == {"ntk", "ntk_loss", "step", "step_loss"}
    for name, values in pull.values.items():
        assert close(values[1], pull_alone.values[name][0]), name
    assert close(pull.contributions[1], pull_alone.contributions[0])
    assert close(pull.nll, pull_alone.nll)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family_run_on_from_the_hook_as_they_were(family: str) -> None:
    rng, none = np.random.default_rng(0), np.zeros(0, np.int32)
    prompts = [
        Prompt(str(n), rng.integers(3, 60, n).astype(np.int32), none, np.arange(6, n, dtype=np.int32), none, none, 0)
        for n in (8, 11, 12)
    ]
    hooked = HookedModel(make_model(family), 1, batch_tokens=30)
    Q = projection(hooked.d_in)
    for rows in hooked.answer_rows(prompts, Q):
        nll, g = hooked.from_hook(rows, prompts, torch.zeros(len(rows.at), hooked.d_in, dtype=torch.float64), Q)
        assert close(nll, rows.nll)
        assert close(g, rows.g)


def test_the_model_is_left_as_it_was(material: Material, tiny: Tiny) -> None:
    model = material.model
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    prompts = material.prompts["train"]
    ids = torch.from_numpy(prompts[0].base_ids.astype(np.int64))[None]
    before = model(ids).logits
    features, hooked = Features(load_sae(tiny.saes["topk"])), HookedModel(model, LAYER, batch_tokens=BATCH_TOKENS)
    measure_push(hooked, features, projection(D_IN), "train", prompts, maps=("step",))
    assert torch.equal(model(ids).logits, before)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        name for name, parameter in model.named_parameters() if parameter is frozen
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen.requires_grad_(True)


def test_no_weight_gets_a_gradient_and_nothing_below_the_hook_is_kept(material: Material) -> None:
    hooked = HookedModel(material.model, LAYER, batch_tokens=BATCH_TOKENS)
    recorded = []
    handles = [
        layer.register_forward_hook(lambda module, args, output, i=i: recorded.append((i, output.requires_grad)))
        for i, layer in enumerate(material.model.model.layers)
    ]
    try:
        next(hooked.answer_rows(material.prompts["train"], projection(D_IN)))
    finally:
        for handle in handles:
            handle.remove()
    # Hooks run in the order they were put there: this one sees the hook layer's output before it is made a leaf.
    assert dict(recorded) == {i: i >= LAYER for i in range(5)} or dict(recorded) == {i: i > LAYER for i in range(5)}


def test_projection_keeps_inner_products_on_average() -> None:
    d_in, dims = 96, 64
    Q = projection(d_in)
    assert Q.shape == (d_in, dims)
    assert np.allclose(Q.T @ Q, d_in / dims * np.eye(dims), atol=1e-12)
    mean = np.mean([P @ P.T for P in (projection(d_in, seed=seed, dims=dims) for seed in range(100))], axis=0)
    # Each entry's deviation is of order sqrt(1 / (100 dims)) = .013.
    assert np.abs(mean - np.eye(d_in)).max() < 0.06
    assert np.array_equal(projection(d_in, seed=1), projection(d_in, seed=1))
    assert np.array_equal(projection(64), np.eye(64))


def test_what_cannot_be_used_is_told(material: Material, tiny: Tiny) -> None:
    with pytest.raises(InputError, match="layers 0 to 4, but layer 7"):
        HookedModel(material.model, 7)
    with pytest.raises(InputError, match="head"):
        HookedModel(material.model.model, LAYER)
    # Where no feature fires, there is no gradient.
    sae = load_sae(tiny.saes["standard"])
    silent = Features(type(sae)("standard", sae.W_enc, sae.b_enc - 1e6, sae.b_dec))
    with pytest.raises(InputError, match="'train' have no gradient at the SAE's features"):
        measure_push(
            HookedModel(material.model, LAYER, batch_tokens=BATCH_TOKENS),
            silent,
            projection(D_IN),
            "train",
            material.prompts["train"],
        )
    broken = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        next(HookedModel(broken, LAYER, batch_tokens=BATCH_TOKENS).answer_rows(material.prompts["train"]))


def test_weak_forecasts_carry_a_warning() -> None:
    direction = np.ones((1, 1))

    def push(loss: float, loss_left: float) -> Push:
        return Push("s", direction, 1.0, loss, np.full(4, loss), {"step": LinearMap(direction, loss_left, 0.25)})

    assert push_warnings(push(0.5, 0.25)) == []
    [solved] = push_warnings(push(0.002, 0.25))
    assert "already answers 's'" in solved
    [stuck] = push_warnings(push(0.5, 0.6))
    assert "leaves 60%" in stuck

    def pull(nll: float, n_answer: int) -> Pull:
        return Pull("t", {}, np.zeros((1, 1)), np.asarray([nll]), np.asarray([n_answer]), np.asarray([False]), 1.0)

    assert pull_warnings([pull(0.5, 3)]) == []
    [long] = pull_warnings([pull(0.5, 3), pull(0.5, 40)])
    assert "in t (2e-09): use the forecasts of the loss" in long


def test_rows_up_to_the_hook_are_those_of_a_whole_pass(material: Material) -> None:
    hooked = HookedModel(material.model, LAYER, batch_tokens=BATCH_TOKENS)
    prompts, ran = material.prompts["train"], []
    head = material.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: ran.append("head"))
    found = list(hooked.hook_rows(prompts))
    assert not ran
    expected = list(hooked.answer_rows(prompts))
    handle.remove()
    assert len(ran) == len(expected) == len(found)
    for one, other in zip(found, expected, strict=True):
        assert one.prompts == other.prompts
        for name in ("padded", "ids", "at", "x"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert (one.prompt_of == other.prompt_of).all()
