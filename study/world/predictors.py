"""What is held against the outcomes: signed forecasts, the paper's scores, controls, and an expensive reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.data.examples import Example
from sts_fast.data.prompts import Prompt, build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.demo import organism
from sts_fast.demo.demo import CONTROLS as DEMO_CONTROLS
from sts_fast.demo.demo import PREDICTORS as DEMO_PREDICTORS
from sts_fast.demo.demo import TOP_N
from sts_fast.forecast.score import compare
from sts_fast.model.answers import score_answers
from sts_fast.profile.projection import projection
from sts_fast.sae import load_sae
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import Features, measure_pull, measure_push
from study.world.grounds import Ground
from study.world.trials import SHOTS

N_PROMPTS = 48
N_FEW_SHOT = 16
LAYER = 1

# Predictors of (a change of P or of accuracy, a change of the loss), by name.
SIGNED = {
    f"{estimator} ({kind})": (f"{estimator} ({kind})", f"{estimator}_loss ({kind})")
    for kind in ("raw", "sae")
    for estimator in ("adapter", "step", "ntk")
}
# Frozen after a look at `package` alone, see README.md.
EXTENTS = (4, 8)
TOGETHER = {f"both adapters, {extent} times as far": (f"adapters x{extent}", "adapters_loss") for extent in EXTENTS}
FEW_SHOT = {"adapter behind demonstrations (raw)": ("adapter few-shot", "adapter_loss few-shot")}
WITHOUT_GRADIENTS = ("STS_act", "STS_icl", *DEMO_CONTROLS, "training demonstrations in context")
REFERENCE = {"gradients of all parameters": ("parameters", "parameters_loss")}


def predict(ground: Ground, folder: Path, tell: Any) -> dict[str, Any]:
    """[n_trains, n_domains] by predictor, for one base model and its SAE."""
    model, tokenizer = organism.load_model(folder / "model")
    sae, template = load_sae(folder / "sae"), PromptTemplate(tokenizer)
    hooked, Q = HookedModel(model, LAYER), projection(sae.d_in)
    prompts = {
        name: build_prompts(name, ground.world.examples(name, N_PROMPTS, seed=1), template, tokens="answer").prompts
        for name in ground.domains
    }
    found: dict[str, Any] = {}
    centre = mean_residual(hooked, prompts)
    tell("mean residual")
    for kind in ("raw", "sae"):
        features = Features(sae, kind, centre if kind == "raw" else None)
        pushes = [
            measure_push(hooked, features, Q, train, prompts[train], maps=("step", "adapter"))
            for train in ground.trains
        ]
        tell(f"training sets, {kind}")
        pulls = [measure_pull(hooked, features, Q, name, prompts[name], pushes)
                 for name in ground.domains]  # fmt: skip
        for estimator in pulls[0].values:
            found[f"{estimator} ({kind})"] = np.stack([pull.values[estimator].mean(axis=1) for pull in pulls], axis=1)
        for i in range(len(pushes)):
            cosines = [pull.values["ntk_loss"][i].mean() / pull.norm for pull in pulls]
            found.setdefault(f"cosine of gradients in features ({kind})", []).append(cosines)
        found["P"] = np.asarray([pull.p_answer.mean() for pull in pulls])
        tell(f"domains, {kind}")
        if kind == "raw":
            shown = [
                measure_pull(hooked, features, Q, name, behind(ground, name, name, template), pushes)
                for name in ground.domains
            ]
            for estimator in ("adapter", "adapter_loss"):
                found[f"{estimator} few-shot"] = np.stack([p.values[estimator].mean(axis=1) for p in shown], axis=1)
            found["loss of training sets"] = np.asarray([push.loss for push in pushes])
            tell("domains behind demonstrations")
    alone = np.asarray([mean_nll(hooked, prompts[name][:N_FEW_SHOT]) for name in ground.domains])
    found["training demonstrations in context"] = np.asarray(
        [[alone[i] - mean_nll(hooked, behind(ground, train, name, template)) for i, name in enumerate(ground.domains)]
         for train in ground.trains]
    )  # fmt: skip
    tell("training demonstrations in context")
    found |= parameter_gradients(ground, model, prompts)
    tell("gradients of all parameters")
    return found | together(found) | scores(ground, folder)


def together(found: dict[str, Any]) -> dict[str, Any]:
    """Both adapters' changes of P, averaged in log-odds and moved on there: training goes further than a map does.

        l(P) = log P / (1 - P),    dP = l^-1(l(P) + extent * mean_k (l(P + dP_k) - l(P))) - P

    for P the mean probability of a domain's answers and k the two kinds of features. The loss: their mean.
    """
    P = np.asarray(found["P"])
    changes = [np.asarray(found[f"adapter ({kind})"]) for kind in ("raw", "sae")]
    step = np.mean([log_odds(P + change) - log_odds(P) for change in changes], axis=0)
    losses = [np.asarray(found[f"adapter_loss ({kind})"]) for kind in ("raw", "sae")]
    moved = {f"adapters x{extent}": 1 / (1 + np.exp(-log_odds(P) - extent * step)) - P for extent in EXTENTS}
    return {**moved, "adapters_loss": np.mean(losses, axis=0)}


def log_odds(P: Any) -> Any:
    P = np.clip(P, 1e-4, 1 - 1e-4)
    return np.log(P / (1 - P))


def behind(ground: Ground, shown: str, asked: str, template: PromptTemplate) -> list[Prompt]:
    """Questions of one domain behind demonstrations of another, or of its own."""
    demos = ground.world.examples(shown, N_PROMPTS + SHOTS, seed=1)[-SHOTS:]
    context = tuple(turn for demo in demos for turn in (("user", demo.question), ("assistant", demo.answer or "")))
    queries = [
        Example(example.id, example.question, example.answer, context)
        for example in ground.world.examples(asked, N_FEW_SHOT, seed=1)
    ]
    return build_prompts(asked, queries, template, tokens="answer").prompts


def mean_nll(hooked: HookedModel, prompts: list[Prompt]) -> float:
    return float(np.mean(np.concatenate([rows.nll for rows in hooked.answer_rows(prompts)])))


def mean_residual(hooked: HookedModel, prompts: dict[str, list[Prompt]]) -> Any:
    means = [
        np.concatenate([rows.x.numpy() for rows in hooked.answer_rows(asked)]).mean(axis=0)
        for asked in prompts.values()
    ]
    return np.mean(means, axis=0, dtype=np.float64)


def parameter_gradients(ground: Ground, model: Any, prompts: dict[str, list[Prompt]]) -> dict[str, Any]:
    """Inner products of the gradients of all parameters: what a first step of real gradient descent does."""
    import torch

    of_loss, of_p = [], []
    parameters = list(model.parameters())
    for asked in prompts.values():
        ids = torch.tensor(np.stack([prompt.base_ids for prompt in asked]).astype(np.int64))
        nll, _ = score_answers(model(input_ids=ids, use_cache=False).logits, ids, asked)
        p = torch.exp(-len(asked[0].positions) * nll)
        for value, gradients in ((nll.mean(), of_loss), (-p.mean(), of_p)):
            parts = torch.autograd.grad(value, parameters, retain_graph=True)
            gradients.append(torch.cat([part.flatten() for part in parts]).numpy())
    trained = np.stack([of_loss[ground.domains.index(train)] for train in ground.trains])
    return {"parameters": trained @ np.stack(of_p).T, "parameters_loss": trained @ np.stack(of_loss).T}


def scores(ground: Ground, folder: Path) -> dict[str, Any]:
    """The paper's scores and the controls that stand beside them in every run."""
    domains = {name: ground.world.examples(name, N_PROMPTS + SHOTS, seed=1) for name in ground.domains}
    forecasts = compare(
        model=folder / "model",
        sae=folder / "sae",
        trains={f"train on {name}": domains[name] for name in ground.trains},
        domains=domains,
        shots=SHOTS,
        domain_shots=SHOTS,
        top_n=TOP_N,
        limit=N_PROMPTS,
        controls="all",
    )
    found = {}
    for predictor, keys in DEMO_PREDICTORS.items():
        rows = []
        for forecast in forecasts.values():
            values: list[Any] = forecast.to_dict()["domains"]
            for key in keys:
                values = [value[key] for value in values]
            rows.append(values)
        found[predictor] = np.asarray(rows)
    return found
