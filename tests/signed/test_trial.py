"""Trials against a training written by hand: merged weights in float64, prompt by prompt, and Adam's own equations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from families import make_model
from literal_push import answered_prompts
from numpy.typing import NDArray
from tiny import Tiny
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import sts_fast
from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.errors import InputError
from sts_fast.files import Kept
from sts_fast.signed import trial
from sts_fast.signed.trial import ALPHA, BATCH_ROWS, LEARNING_RATE, RANK, Trial, TrialDesign, measure_trial

Doubles = NDArray[np.float64]

N_PROMPTS, N_STEPS, SEED = 6, 4, 3


@pytest.fixture(scope="module")
def sets(tiny: Tiny) -> dict[str, PromptSet]:
    """Answers of several lengths, so that a mean over tokens is none over prompts."""
    return answered_prompts(tiny, ("apple", "apple river", "apple river stone"), N_PROMPTS)


def by_hand(model: Any, sets: dict[str, PromptSet]) -> dict[str, Doubles]:
    """By set, the loss per token of each answer after N_STEPS of Adam on A and B of every W + (α/r) B A."""
    matrices = [
        name for name, weight in model.named_parameters() if ".layers." in name or ".h." in name if weight.ndim == 2
    ]
    weights = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(SEED)
    A, B, moments = {}, {}, {}
    for name in matrices:
        n_out, n_in = weights[name].shape[::-1] if is_transposed(model, name) else weights[name].shape
        A[name] = ((2 * torch.rand(RANK, n_in, generator=generator) - 1) / n_in**0.5).double().requires_grad_()
        B[name] = torch.zeros(n_out, RANK, dtype=torch.float64, requires_grad=True)
    trained = [*A.values(), *B.values()]
    moments = {id(weight): (torch.zeros_like(weight), torch.zeros_like(weight)) for weight in trained}

    def loss(prompt: Prompt) -> torch.Tensor:
        merged = {}
        for name in matrices:
            change = ALPHA / RANK * B[name] @ A[name]
            merged[name] = weights[name] + (change.T if is_transposed(model, name) else change)
        ids = torch.from_numpy(prompt.base_ids.astype(np.int64))[None]
        log_p = functional_call(model, {**weights, **merged}, (ids,)).logits[0].log_softmax(-1)
        return -torch.stack([log_p[at - 1, ids[0, at]] for at in prompt.positions.tolist()])

    rng, order = np.random.default_rng([SEED, N_PROMPTS]), []
    for step in range(1, N_STEPS + 1):
        if len(order) < BATCH_ROWS:
            order += rng.permutation(N_PROMPTS).tolist()
        rows, order = order[:BATCH_ROWS], order[BATCH_ROWS:]
        total = torch.cat([loss(sets["train"].prompts[row]) for row in rows]).mean()
        for weight, gradient in zip(trained, torch.autograd.grad(total, trained), strict=True):
            first, second = moments[id(weight)]
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).add_(gradient**2, alpha=0.001)
            with torch.no_grad():
                weight -= LEARNING_RATE * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    with torch.no_grad():
        return {
            name: np.asarray([float(loss(prompt).mean()) for prompt in prompt_set.prompts])
            for name, prompt_set in sets.items()
        }


def is_transposed(model: Any, name: str) -> bool:
    """True for a matrix of GPT-2, which is stored as [n_in, n_out]."""
    return type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trial_is_the_training_written_by_hand(family: str, tiny: Tiny, sets: dict[str, PromptSet]) -> None:
    if family == "llama":
        model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64).eval()
    else:
        model, sets = make_model(family).double().eval(), {name: within(59, of) for name, of in sets.items()}
    domains = [prompt_set for name, prompt_set in sets.items() if name != "train"]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = measure_trial(model, sets["train"], domains, TrialDesign(N_STEPS, seed=SEED), batch_tokens=150)
    expected = by_hand(model, sets)
    assert found.design.n_steps == N_STEPS
    np.testing.assert_allclose(found.nll_after, expected.pop("train"), rtol=2e-5)
    for name, nll in expected.items():
        np.testing.assert_allclose(found.domains[name], nll, rtol=2e-5)
    assert abs(found.nll_after - found.nll).max() > 0.01
    # The model is as it was.
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def within(n_ids: int, prompt_set: PromptSet) -> PromptSet:
    """The set in the ids of a small vocabulary."""
    prompts = [
        Prompt(p.id, p.base_ids % n_ids, p.demos_ids, p.positions, p.paired, p.paired_demos, p.n_special)
        for p in prompt_set.prompts
    ]
    return PromptSet(prompt_set.name, prompts, 0, 0)


def test_the_size_of_passes_does_not_change_a_trial(tiny: Tiny, sets: dict[str, PromptSet]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64).eval()
    trials = [
        measure_trial(model, sets["train"], [sets["days"]], TrialDesign(2), batch_tokens=batch_tokens)
        for batch_tokens in (1, 100, None)
    ]
    for other in trials[1:]:
        np.testing.assert_allclose(other.domains["days"], trials[0].domains["days"], rtol=1e-6)


def test_scores_of_a_trial_are_means_over_prompts(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    given = {"train": tiny.train, "domains": tiny.domains, "limit": 12, "shots": 1, "domain_shots": 2, "top_n": 8}
    forecast = sts_fast.score(
        model=tiny.model, sae=tiny.saes["topk"], estimators=("act", "trial"), trial_steps=3, **given
    )  # fmt: skip
    forecast.save(folder)
    scores = json.loads((folder / "scores.json").read_text())
    signed, rows = scores["signed"], pq.read_table(folder / "prompts.parquet").to_pylist()
    assert signed["features"] is None
    assert signed["top_features"] == []
    assert signed["trial"]["n_steps"] == 3
    assert signed["trial"]["n_rows"] == 12 == len([row for row in rows if row["stage"] == "trial_train"])
    assert signed["trial"]["loss_after"] < signed["trial"]["loss_before"]
    for domain in scores["domains"]:
        of_domain = [row for row in rows if row["stage"] == "trial" and row["domain"] == domain["name"]]
        assert len(of_domain) == 12
        for field in ("trial", "trial_loss"):
            assert domain["scores"][field]["value"] == pytest.approx(np.mean([row[field] for row in of_domain]))
            low, high = domain["scores"][field]["ci"]
            assert low <= domain["scores"][field]["value"] <= high
        p, (low, high) = signed["domains"][domain["name"]]["p_answer"], domain["scores"]["trial"]["ci"]
        assert -p <= low <= high <= 1 - p
        assert domain["change"] is None
    for name, of in signed["trial"]["domains"].items():
        assert of == {"n_prompts": 12, "mean_fall": pytest.approx(scores_of(scores, name)["value"]), "own_share": 1}
    # Beside other signed estimators it is the same, whatever their SAE.
    both = sts_fast.score(
        model=tiny.model, sae=[tiny.saes["topk"], tiny.saes["jumprelu"]], estimators=("act", "ntk", "trial"),
        trial_steps=3, **given,
    )  # fmt: skip
    for forecast in both:
        document = forecast.to_dict()
        assert document["signed"]["features"] == "sae"
        assert document["signed"]["trial"] == signed["trial"]
        for domain, alone in zip(document["domains"], scores["domains"], strict=True):
            assert set(domain["scores"]) == {"act", "ntk", "ntk_loss", "trial", "trial_loss"}
            assert domain["scores"]["trial_loss"] == alone["scores"]["trial_loss"]


def scores_of(scores: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(domain for domain in scores["domains"] if domain["name"] == name)["scores"][
        "trial_loss"
    ]
    return found


def test_a_few_prompts_are_asked_again(tiny: Tiny, tmp_path: Path) -> None:
    given = {"train": tiny.train, "domains": tiny.domains, "limit": 12, "shots": 1, "domain_shots": 2, "top_n": 8}
    made = {}
    for n in (0, 5):
        forecast = sts_fast.score(
            model=tiny.model, sae=tiny.saes["topk"], estimators=("act", "trial"), trial_steps=3,
            trial_prompts=n, **given,
        )  # fmt: skip
        forecast.save(tmp_path / str(n))
        made[n] = forecast.to_dict(), pq.read_table(tmp_path / str(n) / "prompts.parquet").to_pylist()
    for name in tiny.domains:
        every, some = (
            {row["id"]: row for row in rows if row["stage"] == "trial" and row["domain"] == name}
            for _, rows in made.values()
        )
        asked = {id for id, row in some.items() if row["trial_loss"] is not None}
        assert list(some) == list(every)
        assert len(asked) == 5 == made[5][0]["signed"]["trial"]["domains"][name]["n_prompts"]
        for id in asked:
            assert some[id]["trial_loss"] == pytest.approx(every[id]["trial_loss"], abs=1e-5)
            assert some[id]["trial"] == pytest.approx(every[id]["trial"], abs=1e-6)
        assert all(some[id]["answer_nll_sum"] == pytest.approx(every[id]["answer_nll_sum"]) for id in every)


def test_each_domain_draws_its_own_prompts(sets: dict[str, PromptSet]) -> None:
    drawn = [trial.asked_again(replace(sets["days"], name=name), TrialDesign(3, 3)) for name in ("a", "a", "b")]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert list(trial.asked_again(sets["days"], TrialDesign(3))) == list(range(N_PROMPTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trial_steps": 3, "trial_cost": "2%"}, "say the same thing"),
        ({"trial_cost": "200%"}, "above 0%, as 2%, not '200%'"),
        ({"trial_cost": "a lot"}, "not 'a lot'"),
        ({"trial_cost": "2%%"}, "not '2%%'"),
        ({"trial_steps": 1}, "--trial-steps must be at least 2"),
        ({"trial_steps": 3, "estimators": ("act",)}, "add trial to --estimators"),
        ({"trial_prompts": 1}, "--trial-prompts must be 2 or more"),
        ({"trial_prompts": 4, "estimators": ("act",)}, "--trial-prompts is of the estimator trial"),
    ],
)
def test_lengths_that_are_refused(tiny: Tiny, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sts_fast.plan(
            model=tiny.model, sae=tiny.saes["topk"], trains={"train": tiny.train}, domains=tiny.domains,
            **{"estimators": ("act", "trial"), **options},
        )  # fmt: skip


def test_cost_is_a_share_of_the_training_set(tiny: Tiny) -> None:
    def rows(cost: str) -> int:
        outlook = sts_fast.plan(
            model=tiny.model, sae=tiny.saes["topk"], trains={"train": tiny.train}, domains=tiny.domains,
            estimators=("act", "trial"), trial_cost=cost,
        )  # fmt: skip
        return next(planned.n_prompts for planned in outlook.sets if planned.use == "trial")

    assert rows("1%") == 2 * BATCH_ROWS
    assert rows("0.5") == 16  # of 29 rows, 24 of which can be asked: four steps of four
    assert rows("50%") == 16


def test_rollouts_have_no_answers_to_try(tiny: Tiny) -> None:
    rows = [{"prompt": "1 + 1", "completion": "2", "reward": 1.0}]
    with pytest.raises(InputError, match="which rollouts have not"):
        sts_fast.rollouts(
            model=tiny.model, sae=tiny.saes["topk"], rollouts=rows, domains=tiny.domains, estimators=("act", "trial")
        )


def test_a_loss_that_breaks_is_told(tiny: Tiny, sets: dict[str, PromptSet], monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    monkeypatch.setattr(trial, "LEARNING_RATE", 1e30)
    with pytest.raises(InputError, match="NaN"):
        measure_trial(model, sets["train"], [sets["days"]], TrialDesign(3))
    assert not any(module._forward_hooks for module in model.modules())


def test_maps_that_do_not_run_stay_as_they_are(tiny: Tiny, sets: dict[str, PromptSet]) -> None:
    """As experts to which no token goes."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64).eval()
    plain = measure_trial(model, sets["train"], [sets["days"]], TrialDesign(2))
    model.model.layers[-1].never_run = torch.nn.Linear(8, 8)  # the last one, so that the others start alike
    found = measure_trial(model, sets["train"], [sets["days"]], TrialDesign(2))
    np.testing.assert_allclose(found.domains["days"], plain.domains["days"], rtol=1e-12)


def test_a_trial_goes_on_from_what_was_kept(tiny: Tiny, sets: dict[str, PromptSet], tmp_path: Path) -> None:
    model, steps = AutoModelForCausalLM.from_pretrained(tiny.model).eval(), []
    domains = [sets["days"], sets["spelling"]]

    def measured(design: TrialDesign, train: PromptSet = sets["train"], of: str = "model") -> Trial:
        kept = Kept(tmp_path).of(of)
        return measure_trial(
            model, train, domains, design, kept=kept, tell=lambda done, total: steps.append((done, total))
        )

    def counts() -> tuple[int, ...]:
        return tuple(Kept(tmp_path).counts()[name] for name in ("trials", "answers"))

    first = measured(TrialDesign(2, 3))
    assert counts() == (1, 4)  # before training, after it, and of two domains
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    steps.clear()
    with monkeypatched(model, "forward", None):  # nothing is run
        again = measured(TrialDesign(2, 3))
    assert steps == [(3, 4), (4, 4)]
    for name in ("days", "spelling"):
        np.testing.assert_array_equal(again.domains[name], first.domains[name])
    np.testing.assert_array_equal([again.nll, again.nll_after], [first.nll, first.nll_after])
    # The same training, of which other prompts are asked; another domain's answers; and other trainings.
    measured(TrialDesign(2, 4))
    assert counts() == (1, 6)
    for design, train, of in (
        (TrialDesign(3, 3), sets["train"], "model"),
        (TrialDesign(2, 3, seed=1), sets["train"], "model"),
        (TrialDesign(2, 3), replace(sets["train"], prompts=sets["train"].prompts[::-1]), "model"),
        (TrialDesign(2, 3), sets["train"], "another"),
    ):
        before = counts()
        measured(design, train, of)
        assert counts()[0] == before[0] + 1
        assert counts()[1] >= before[1] + 3
    # What was trained is read as it was, bit for bit, and not made again from half of it.
    for path in tmp_path.glob("answers-*"):
        path.unlink()
    alone = measured(TrialDesign(2, 3))
    for name in ("days", "spelling"):
        np.testing.assert_array_equal(alone.domains[name], first.domains[name])


@contextmanager
def monkeypatched(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def test_type_of_a_trial(tiny: Tiny, sets: dict[str, PromptSet]) -> None:
    """In a model of half precision the maps are float32, as trainers keep them."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.bfloat16).eval()
    found: Trial = measure_trial(model, sets["train"], [sets["days"]], TrialDesign(2))
    assert np.isfinite(found.domains["days"]).all()
    assert found.nll_after.mean() < found.nll.mean()
