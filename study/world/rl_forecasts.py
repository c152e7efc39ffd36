"""Forecasts of what reinforcement learning moves, made from the base model and its own completions alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.data.examples import Example
from sts_fast.data.prompts import Prompt, build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.demo import organism
from sts_fast.forecast.controls import cosine
from sts_fast.model.answers import score_answers
from sts_fast.model.language_model import LanguageModel, capture
from sts_fast.ops.correlate import CorrelationStats
from sts_fast.ops.shift import ShiftStats, top_indices
from sts_fast.profile.projection import projection
from sts_fast.sae import SAE, load_sae
from sts_fast.signed.gradients import AnswerRows, HookedModel
from sts_fast.signed.objectives import AnswerLoss, PolicyLoss
from sts_fast.signed.push import Features, LinearMap, Push, measure_pull, measure_push
from study.world import grpo
from study.world.predictors import LAYER, mean_residual
from study.world.trials import DOMAINS, SHOTS

N_PROMPTS = 48
N_ANSWERED = 32  # of them, for the signed forecasts
TOP_N = 32
N_RANDOM = 10
MOST_DOUBLINGS = 10

# D_N is taken from these, before training; 'true' stands beside them for each run.
DIMS = (
    "own verified completions",
    "own completions, unverified",
    "correlation with the advantage",
    "policy gradient",
    "moved along the policy gradient",
    "step along the policy gradient",
    "adapter on the policy gradient",
    "one step of all parameters",
    "ground-truth demonstrations",
    "most active",
    "random",
)


@dataclass
class World:
    """A base model, its SAE, and what every forecast needs of them.

    prompts: by domain, questions with their right answers; queries: those without
    act:     [n_domains, d_sae] mean activation on question tokens; icl: likewise, E (h(demos, x) - h(x))^2
    means:   [n_domains, d_in] mean residual on question tokens
    """

    model: Any
    tokenizer: Any
    sae: SAE
    template: PromptTemplate
    decoder: LanguageModel
    hooked: HookedModel
    Q: Any
    prompts: dict[str, list[Prompt]]
    act: Any
    icl: Any
    means: Any


def world(folder: Path) -> World:
    model, tokenizer = organism.load_model(folder / "model")
    sae, template = load_sae(folder / "sae"), PromptTemplate(tokenizer)
    decoder = LanguageModel(model, sae.hook_name)
    act, icl, means, prompts = [], [], [], {}
    for name in DOMAINS:
        asked = organism.examples(name, N_PROMPTS + SHOTS, seed=1)
        stats, mean = icl_shift(decoder, sae, template, asked[SHOTS:], asked[:SHOTS])
        act.append(stats.mean_base)
        icl.append(stats.mean_squared_shift)
        means.append(mean)
        prompts[name] = build_prompts(name, asked[SHOTS : SHOTS + N_ANSWERED], template, tokens="answer").prompts
    return World(
        model, tokenizer, sae, template, decoder, HookedModel(model, LAYER), projection(sae.d_in), prompts,
        np.stack(act), np.stack(icl), np.stack(means),
    )  # fmt: skip


def icl_shift(
    decoder: LanguageModel, sae: SAE, template: PromptTemplate, queries: Sequence[Example], demos: Sequence[Example]
) -> tuple[ShiftStats, Any]:
    """Shift of the questions' tokens by demonstrations, and [d_in] their mean residual without."""
    stats, total = ShiftStats(sae), np.zeros(sae.d_in)
    for (rows,) in capture(decoder, build_prompts("queries", queries, template, draws=[demos]).prompts):
        stats.update(rows.paired, rows.demos)
        total += rows.base.double().sum(dim=0).numpy()
    return stats, total / stats.n_tokens


def true_shift(base: World, tuned: Any, train: str) -> Any:
    """[d_sae] E_x (h_j(x; tuned) - h_j(x; base))^2 over the training domain's question tokens."""
    stats = ShiftStats(base.sae)
    queries = organism.examples(train, N_PROMPTS + SHOTS, seed=1)[SHOTS:]
    other = LanguageModel(tuned, base.sae.hook_name)
    for (rows,) in capture(base.decoder, build_prompts(train, queries, base.template).prompts, other=other):
        stats.update(rows.paired, rows.demos)
    return stats.mean_squared_shift


def forecast(base: World, tell: Any) -> dict[str, Any]:
    """`dims`: by name of DIMS, [n_trains, n_sets, TOP_N] features; `direct`: [n_trains, n_domains] by predictor."""
    dims: dict[str, list[Any]] = {name: [] for name in DIMS}
    pushes: dict[str, list[Push]] = {}
    steps = []
    rng = np.random.default_rng(0)
    features = {
        "sae": Features(base.sae, "sae"),
        "raw": Features(base.sae, "raw", mean_residual(base.hooked, base.prompts)),
    }
    for train in grpo.TRAINS:
        queries = organism.examples(train, N_PROMPTS + SHOTS, seed=1)[SHOTS:]
        rolled = grpo.sample(base.model, base.tokenizer, train, N_PROMPTS, seed=3)
        everything = completions(base, rolled)
        objective = PolicyLoss(rolled.advantages, rolled.group_of)
        slopes = objective.slopes(np.zeros(len(everything)), np.zeros(len(everything)))
        of_train = {
            "policy gradient (sae)": push(base, features["sae"], everything, objective),
            "policy gradient (raw)": push(base, features["raw"], everything, objective),
            "ground truth (sae)": push(base, features["sae"], base.prompts[train], AnswerLoss()),
        }
        for name, found in of_train.items():
            pushes.setdefault(name, []).append(found)
        policy = of_train["policy gradient (sae)"]
        stepped, change = parameter_step(base, everything, slopes)
        steps.append(change)
        importance = {
            "own verified completions": by_demos(base, queries, rolled.examples(only_right=True)),
            "own completions, unverified": by_demos(base, queries, rolled.examples(only_right=False)),
            "correlation with the advantage": by_correlation(base, everything, objective),
            "policy gradient": np.einsum("jr,jr->j", policy.direction, policy.direction),
            "moved along the policy gradient": by_gradient(base, everything, slopes),
            "step along the policy gradient": by_map(base, features["sae"], everything, policy.maps["step"]),
            "adapter on the policy gradient": by_map(base, features["sae"], everything, policy.maps["adapter"]),
            "one step of all parameters": true_shift(base, stepped, train),
            "ground-truth demonstrations": base.icl[DOMAINS.index(train)],
            "most active": base.act[DOMAINS.index(train)],
        }
        for name, of_feature in importance.items():
            dims[name].append(top_indices(of_feature, TOP_N)[None])
        dims["random"].append(np.stack([rng.choice(base.sae.d_sae, TOP_N, replace=False) for _ in range(N_RANDOM)]))
        tell(f"forecast: {train}")
    direct = {f"one step of all parameters, {outcome}": np.stack([change[outcome] for change in steps])
              for outcome in ("dP", "dloss")}  # fmt: skip
    for name, of_trains in pushes.items():
        kind = "raw" if name.endswith("(raw)") else "sae"
        pulls = [
            measure_pull(base.hooked, features[kind], base.Q, domain, base.prompts[domain], of_trains)
            for domain in DOMAINS
        ]
        for estimator in pulls[0].values:
            direct[f"{estimator}, {name}"] = np.stack([pull.values[estimator].mean(axis=1) for pull in pulls], axis=1)
        tell(f"forecast: {name}")
    at = [DOMAINS.index(train) for train in grpo.TRAINS]
    direct["cosine of means"] = np.asarray([[cosine(base.means[i], mean) for mean in base.means] for i in at])
    return {"dims": dims, "direct": direct}


def push(base: World, features: Features, prompts: Sequence[Prompt], objective: AnswerLoss | PolicyLoss) -> Push:
    return measure_push(
        base.hooked, features, base.Q, "completions", prompts, objective=objective, maps=("step", "adapter")
    )


def by_demos(base: World, queries: Sequence[Example], own: Sequence[Example]) -> Any:
    demos = own[:SHOTS]
    others = [query for query in queries if query.question not in [demo.question for demo in demos]]
    return icl_shift(base.decoder, base.sae, base.template, others, demos)[0].mean_squared_shift


def completions(base: World, rolled: grpo.Rollouts) -> list[Prompt]:
    """Every completion behind its question, those of one question side by side."""
    rows = [
        Example(f"{i}-{g}", question, said)
        for i, question in enumerate(rolled.questions)
        for g, said in enumerate(rolled.completions[i])
    ]
    return build_prompts("rollouts", rows, base.template, tokens="answer").prompts


def by_correlation(base: World, prompts: list[Prompt], objective: PolicyLoss) -> Any:
    """[d_sae] |r| of a feature with the advantage of the completion, over the tokens of completions."""
    stats = CorrelationStats(base.sae, 1)
    for (rows,) in capture(base.decoder, prompts):
        stats.update(rows.base, objective.advantages[rows.base_of][:, None])
    return np.nan_to_num(np.abs(stats.pearson()[0]))


def on_questions(rows: AnswerRows, prompts: Sequence[Prompt]) -> Any:
    """[n_tokens] which rows are tokens of the question, not of the completion."""
    starts = np.asarray([prompts[i].positions[0] for i in rows.prompts])
    return rows.at.numpy() % rows.ids.shape[1] < starts[rows.prompt_of]


def by_map(base: World, features: Features, prompts: list[Prompt], found: LinearMap) -> Any:
    """[d_sae] E (h_j(x + W^T h(x)) - h_j(x))^2 over question tokens: the shift that a trained map makes itself."""
    import torch

    stats = ShiftStats(base.sae)
    for rows in base.hooked.answer_rows(prompts):
        moved = torch.from_numpy(features.times(rows.x, found.W)[0] @ base.Q.T).float()
        keep = torch.from_numpy(on_questions(rows, prompts))
        stats.update(rows.x[keep], (rows.x + moved)[keep])
    return stats.mean_squared_shift


def by_gradient(base: World, prompts: list[Prompt], slopes: Any) -> Any:
    """[d_sae] E (h_j(x - eta g) - h_j(x))^2: questions' residuals moved along the policy gradient at the hook itself.

    g of a question is the sum over its completions; eta makes the mean |eta g| a tenth of the mean |x|
    """
    import torch

    g_of: dict[tuple[str, int], Any] = {}
    x_of: dict[tuple[str, int], Any] = {}
    for rows in base.hooked.answer_rows(prompts, np.eye(base.sae.d_in)):
        at = rows.at.numpy() % rows.ids.shape[1]
        for row in np.flatnonzero(on_questions(rows, prompts)):
            index = rows.prompts[rows.prompt_of[row]]
            key = (prompts[index].id.partition("-")[0], int(at[row]))
            g_of[key] = g_of.get(key, 0.0) + slopes[index] * rows.g[row]
            x_of[key] = rows.x[row]
    x = torch.stack([x_of[key] for key in g_of])
    g = torch.from_numpy(np.stack(list(g_of.values()))).float()
    stats = ShiftStats(base.sae)
    stats.update(x, x - g * (0.1 * x.norm(dim=1).mean() / g.norm(dim=1).mean()))
    return stats.mean_squared_shift


def parameter_step(base: World, prompts: list[Prompt], slopes: Any) -> tuple[Any, dict[str, Any]]:
    """The model after one policy-gradient step of all parameters, and what it does to every domain.

    Its length, doubled until it does, brings the loss of completions with a positive advantage to half or less.
    """
    import torch

    model = copy.deepcopy(base.model)
    model.requires_grad_(True)
    parameters = list(model.parameters())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for start in range(0, len(prompts), 128):
        part = prompts[start : start + 128]
        nll, _ = score_answers(logits(model, part), ids_of(part), part)
        loss = (nll * torch.tensor(slopes[start : start + 128])).sum()
        for total, found in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
            total += found
    right = [prompt for prompt, slope in zip(prompts, slopes, strict=True) if slope > 0][:64]
    with torch.no_grad():
        start = [parameter.clone() for parameter in parameters]
        eta, left = 0.05 / float(torch.cat([gradient.flatten() for gradient in gradients]).norm()), np.inf
        goal = float(score_answers(logits(base.model, right), ids_of(right), right)[0].mean()) / 2
        for _ in range(MOST_DOUBLINGS):
            if left <= goal:
                break
            eta *= 2
            for parameter, before, gradient in zip(parameters, start, gradients, strict=True):
                parameter.copy_(before - eta * gradient)
            left = float(score_answers(logits(model, right), ids_of(right), right)[0].mean())
        dP, dloss = [], []
        for asked in base.prompts.values():
            old, _ = score_answers(logits(base.model, asked), ids_of(asked), asked)
            new, _ = score_answers(logits(model, asked), ids_of(asked), asked)
            dloss.append(float((old - new).mean()))
            dP.append(float((torch.exp(-3 * new) - torch.exp(-3 * old)).mean()))
    return model, {"dP": np.asarray(dP), "dloss": np.asarray(dloss)}


def ids_of(prompts: Sequence[Prompt]) -> Any:
    import torch

    return torch.tensor(np.stack([prompt.base_ids for prompt in prompts]).astype(np.int64))


def logits(model: Any, prompts: Sequence[Prompt]) -> Any:
    return model(input_ids=ids_of(prompts), use_cache=False).logits
