"""Forecasts from gradients which domains a training set moves, and which way: ours, bergson's and dattri's.

The model is the demo's. Each answer is held against what fine-tuning on the training sets really did: r, over the other
domains, between the forecast and the fall of the loss; mean over the trainings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from study.world.trials import change

from benchmarks.bench_encode import Lap
from benchmarks.cases import Contestant
from benchmarks.oracle import Doubles, WrongResult
from benchmarks.peers.question import Question, peer
from sts_fast import load_sae
from sts_fast.data.prompts import Prompt, build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.demo import demo, organism
from sts_fast.profile.projection import projection
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import Features, MapKind, Push, measure_pull, measure_push
from sts_fast.statistics import pearson

LAYER = 1
# What dattri differentiates together: so many sets.
SETS = 8
# So far may a float32 result be from float64, relative to the largest; so well must a random projection correlate.
TOLERANCE, LEAST_R = 1e-3, 0.9
# Training sets and domains whose maps are followed in float64.
FOLLOWED = (2, 8)

Names = Sequence[str]


class Moves(NamedTuple):
    """[n_trains, n_domains] fall of each domain's loss, in any unit; and what it was computed from, of ours."""

    values: Doubles
    pushes: tuple[Push, ...] = ()


class World:
    """The demo's model and SAE, the prompts of its domains, all of one length, and trainings on some of them."""

    def __init__(self, trains: Names, domains: Names, n_prompts: int, seeds: Sequence[int]) -> None:
        self.trains, self.domains, self.seeds = trains, domains, seeds
        self.model, self.tokenizer = organism.load_model(organism.weights_folder() / "model")
        self.sae = load_sae(organism.weights_folder() / "sae")
        self.Q = projection(self.sae.d_in)
        template = PromptTemplate(self.tokenizer)
        self.prompts: dict[str, list[Prompt]] = {
            name: build_prompts(name, organism.examples(name, n_prompts, seed=1), template, tokens="answer").prompts
            for name in domains
        }
        self.at = torch.tensor(self.prompts[trains[0]][0].positions.astype(np.int64))

    def ids(self, names: Names) -> torch.Tensor:
        """[n_sets, n_prompts, n_tokens]"""
        sets = [[prompt.base_ids for prompt in self.prompts[name]] for name in names]
        return torch.tensor(np.asarray(sets).astype(np.int64))

    def loss(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The answers' mean loss, of logits [n_prompts, n_tokens, vocabulary] and ids [n_prompts, n_tokens]."""
        return torch.nn.functional.cross_entropy(logits[:, self.at - 1].flatten(0, 1), ids[:, self.at].flatten())

    @cached_property
    def falls(self) -> list[tuple[str, Doubles]]:
        """Of each training, what was trained on and the fall of every domain's loss, on questions not seen before."""

        def abilities(model: Any) -> organism.Abilities:
            return organism.measure(model, self.tokenizer, self.domains, n=demo.N_QUESTIONS, seed=2)

        before, (steps, lr) = abilities(self.model), demo.LIGHT
        found = []
        for train in self.trains:
            for seed in self.seeds:
                questions = organism.examples(train, demo.N_TRAIN, seed=1000 + seed)
                tuned = organism.fine_tune(self.model, self.tokenizer, questions, steps=steps, lr=lr, seed=seed)
                found.append((train, change(before, abilities(tuned))["dloss"]))
        return found

    def r(self, moves: Moves) -> float:
        """Mean over the trainings of Pearson's r over all domains but the one trained on."""
        others = {train: np.asarray([name != train for name in self.domains]) for train in self.trains}
        forecast = dict(zip(self.trains, moves.values, strict=True))
        return float(
            np.mean([pearson(forecast[train][others[train]], fall[others[train]]) for train, fall in self.falls])
        )


def influence(
    trains: Names = demo.TRAINS,
    domains: Names = tuple(organism.DOMAINS),
    n_prompts: int = demo.N_PROMPTS,
    seeds: Sequence[int] = (0, 1, 2),
) -> Question:
    world = World(trains, domains, n_prompts, seeds)
    return Question(
        f"Which way {len(trains)} training sets would move {len(domains)} domains of {n_prompts} prompts each; the "
        f"demo's model. r: with the fall of the loss in {len(trains) * len(seeds)} real fine-tunings",
        (trains, domains),
        (trains[:1], domains[:2]),
        [
            Contestant("sts_fast, ntk", partial(ours, world, None)),
            Contestant("sts_fast, step", partial(ours, world, "step")),
            Contestant("sts_fast, adapter", partial(ours, world, "adapter")),
            peer("bergson, projected to 16 × 16", partial(bergson_projected, world)),
            peer("bergson, whole gradients", partial(bergson_whole, world)),
            peer("dattri, projected to 512", partial(dattri, world, {"proj_type": "normal", "proj_dim": 512})),
            peer("dattri, whole gradients", partial(dattri, world, {"proj_type": "identity", "proj_dim": 1})),
        ],
        partial(check, world),
        world.r,
    )


def ours(world: World, kind: MapKind | None, trains: Names, domains: Names, lap: Lap) -> Moves:
    hooked, features = HookedModel(world.model, LAYER), Features(world.sae)
    prompts, maps = world.prompts, [kind] if kind else []
    pushes = [measure_push(hooked, features, world.Q, name, prompts[name], maps=maps) for name in trains]
    pulls = [measure_pull(hooked, features, world.Q, name, prompts[name], pushes) for name in domains]
    falls = [pull.values[f"{kind or 'ntk'}_loss"].mean(axis=1) for pull in pulls]
    return Moves(np.stack(falls, axis=1), tuple(pushes))


def bergson_projected(world: World) -> Callable[[Names, Names, Lap], Moves]:
    """A gradient for each prompt, all in one pass, then their means over each set."""
    from study.world.bergson_gradients import projected

    def run(trains: Names, domains: Names, lap: Lap) -> Moves:
        names = list(dict.fromkeys([*trains, *domains]))
        rows = projected(world.model, [prompt for name in names for prompt in world.prompts[name]])
        means = rows.reshape(len(names), -1, rows.shape[1]).mean(axis=1)
        return products(dict(zip(names, means, strict=True)), trains, domains)

    return run


def bergson_whole(world: World) -> Callable[[Names, Names, Lap], Moves]:
    """The mean gradient of each set, as bergson adds it up."""
    from study.world.bergson_gradients import mean_gradient

    def run(trains: Names, domains: Names, lap: Lap) -> Moves:
        of = {name: mean_gradient(world.model, world.prompts[name]) for name in dict.fromkeys([*trains, *domains])}
        return products(of, trains, domains)

    return run


def dattri(world: World, projector: dict[str, Any]) -> Callable[[Names, Names, Lap], Moves]:
    """Grad-Dot by TracIn with one checkpoint; an "example" is a set, so that one gradient is taken of each."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    def loss(parameters: Any, data: tuple[torch.Tensor]) -> torch.Tensor:
        out = torch.func.functional_call(world.model, parameters, (data[0],), {"use_cache": False})
        return world.loss(out.logits, data[0])

    def loader(names: Names) -> DataLoader[Any]:
        return DataLoader(TensorDataset(world.ids(names)), batch_size=SETS)

    task = AttributionTask(loss, world.model, world.model.state_dict())

    def run(trains: Names, domains: Names, lap: Lap) -> Moves:
        attributor = TracInAttributor(task, torch.ones(1), normalized_grad=False, projector_kwargs=projector)
        return Moves(attributor.attribute(loader(trains), loader(domains)).double().numpy())

    return run


def products(gradients: dict[str, Doubles], trains: Names, domains: Names) -> Moves:
    rows, columns = (np.stack([gradients[name] for name in names]) for names in (trains, domains))
    return Moves(rows @ columns.T)


# ---- in float64


def check(world: World, contestant: str, result: Moves, inputs: tuple[Names, Names]) -> float:
    """Largest error relative to the largest value, or, of a random projection, relative to the norm of all."""
    trains, domains = inputs
    if result.pushes:
        expected = expected_of_ours(world, contestant, result.pushes, trains, domains)
    else:
        expected = expected_of_peers(world, contestant, trains, domains)
    values = result.values[: expected.shape[0], : expected.shape[1]]
    if "projected" in contestant:
        r = pearson(values.ravel(), expected.ravel())
        if not r >= LEAST_R:
            raise WrongResult(f"{contestant}: r with products of whole gradients is {r:.2f}")
        return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))
    error = float(np.abs(values - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE:
        raise WrongResult(f"{contestant}: it differs from float64 by {error:.1e}, relative")
    return error


def expected_of_peers(world: World, contestant: str, trains: Names, domains: Names) -> Doubles:
    """Products of gradients with respect to all parameters, or to those of linear layers below the head."""
    model = copy.deepcopy(world.model).double()
    parameters = list(model.parameters())
    if contestant.startswith("bergson"):
        parameters = [part.weight for part in model.base_model.modules() if isinstance(part, torch.nn.Linear)]

    def gradient(name: str) -> Doubles:
        ids = world.ids([name])[0]
        loss = world.loss(model(input_ids=ids, use_cache=False).logits, ids)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]).numpy()

    return products({name: gradient(name) for name in {*trains, *domains}}, trains, domains).values


def expected_of_ours(world: World, contestant: str, pushes: Sequence[Push], trains: Names, domains: Names) -> Doubles:
    """ntk: products of gradients of a map at the hook. Else the loss with each map in place, of FOLLOWED only."""
    model = copy.deepcopy(world.model).double()
    if contestant.endswith("ntk"):
        M = {name: map_gradient(world, model, name) for name in {*trains, *domains}}
        norms = np.asarray([np.linalg.norm(M[name]) for name in trains])
        return products(M, trains, domains).values / norms[:, None]
    kind = contestant.split(", ")[1]
    domains = domains[: FOLLOWED[1]]
    before = np.asarray([loss_with(world, model, name, None) for name in domains])
    maps = [push.maps[kind].W @ world.Q.T for push in pushes[: FOLLOWED[0]]]
    return np.stack([before - [loss_with(world, model, name, W) for name in domains] for W in maps])


def map_gradient(world: World, model: Any, name: str) -> Doubles:
    """[d_sae * r] sum over tokens of h(x) g^T Q, mean over prompts."""
    ids, seen = world.ids([name])[0], []
    with at_hook(model, lambda x: seen.append(x) or x):
        loss = world.loss(model(input_ids=ids, use_cache=False).logits, ids)
    (g,) = torch.autograd.grad(loss, seen)
    h = features(world, seen[0].detach())
    return torch.einsum("pti,ptr->ir", h, g @ torch.from_numpy(world.Q)).flatten().numpy()


@torch.no_grad()
def loss_with(world: World, model: Any, name: str, W: Doubles | None) -> float:
    """The mean loss of a set where W [d_sae, d_in], if there is one, is added at the hook."""
    ids = world.ids([name])[0]
    with at_hook(model, lambda x: x if W is None else x + features(world, x) @ torch.from_numpy(W)):
        return float(world.loss(model(input_ids=ids, use_cache=False).logits, ids))


class at_hook:
    """The layer's output x [n_prompts, n_tokens, d_in] becomes change(x)."""

    def __init__(self, model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.block, self.change = model.model.layers[LAYER], change

    def __enter__(self) -> None:
        self.handle = self.block.register_forward_hook(
            lambda _, __, out: (self.change(out[0]), *out[1:]) if isinstance(out, tuple) else self.change(out)
        )

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def features(world: World, x: torch.Tensor) -> torch.Tensor:
    """[n_prompts, n_tokens, d_sae] float64 features; none of the first token, which every text has."""
    W_enc, b_enc, b_dec = (
        torch.as_tensor(part).double() for part in (world.sae.W_enc, world.sae.b_enc, world.sae.b_dec)
    )
    pre = (x - b_dec) @ W_enc + b_enc
    top = pre.topk(world.sae.k, dim=-1)
    h = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    h[:, 0] = 0
    return h
