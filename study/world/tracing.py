"""Which training examples carry a forecast: harmful ones are named and dropped, and subsets foretold; tracing_plan.md.

Trainings that are there already are not run again.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sts_fast.data.examples import Example
from sts_fast.data.prompts import Prompt, PromptSet, build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.demo import organism
from sts_fast.model.answers import score_answers
from sts_fast.profile.projection import projection
from sts_fast.sae import load_sae
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.influence import measure_influence
from sts_fast.signed.push import Features
from sts_fast.statistics import percentile_interval, spearman
from study.world.grounds import SHORT
from study.world.predictors import LAYER
from study.world.trials import BATCH, REGIMES, Remembering

RESULTS = Path(__file__).parent / "results" / "tracing.json"
TABLES = RESULTS.with_suffix(".md")
WAYS = ("light", "heavy")
PRODUCT = "gradients at the hook (sts-fast)"
EVERY_QUESTION, N_EVALUATED, N_ASKED = 216, 64, 48
N_OWN, N_GOOD, N_NAMED = 460, 26, 26
N_MIXED, N_EACH, N_HALVES = 16, 32, 100
SEEDS, HALF_SEEDS = (0, 1, 2), (0, 1)
RANDOM_DRAWS = 3
K1, B = 1.5, 0.75  # of BM25, its usual ones

Tell = Callable[[str], None]
Scores = dict[str, np.ndarray]


class Ground:
    """The embedded model with its SAE, and every domain's questions, which are dealt out once."""

    def __init__(self, folder: Path) -> None:
        self.model, tokenizer = organism.load_model(folder / "model")
        self.tokenizer, self.template = Remembering(tokenizer), PromptTemplate(tokenizer)
        self.sae = load_sae(folder / "sae")
        pools = {name: organism.examples(name, EVERY_QUESTION, seed=2)[N_EVALUATED:] for name in SHORT.domains}
        self.asked = {name: pool[:N_ASKED] for name, pool in pools.items()}
        self.trained = {name: pool[N_ASKED:] for name, pool in pools.items()}

    def prompts(self, name: str, examples: Sequence[Example]) -> PromptSet:
        return build_prompts(name, examples, self.template, tokens="answer")

    def loss_after(self, train: Sequence[Example], way: str, seed: int, domains: Sequence[str]) -> np.ndarray:
        """[n_domains] loss per token of the evaluated questions after training."""
        _, steps, lr = REGIMES[way]
        tuned = organism.fine_tune(
            self.model, self.tokenizer.tokenizer, train, steps=steps, lr=lr, batch=BATCH, seed=seed
        )
        return organism.measure(tuned, self.tokenizer, domains, n=N_EVALUATED, seed=2).answer_nll


def run(folder: Path, tell: Tell) -> None:
    with organism.one_thread():
        ground = Ground(folder)
        for i, train in enumerate(SHORT.trains):
            if train not in results().get("dropped", {}):
                keep("dropped", train, dropped(ground, i, train))
                tell(f"dropped from {train}")
        mixture = mixed(ground)
        if "scores" not in results().get("halves", {}):
            prompts = ground.prompts("mixture", mixture)
            scores, costs = influences(ground, mixture, prompts, SHORT.domains)
            halves = np.random.default_rng(17).permuted(np.tile(np.arange(len(mixture)), (N_HALVES, 1)), axis=1)
            chosen = np.sort(halves[:, : len(mixture) // 2], axis=1)
            sums = {name: of[:, chosen].sum(axis=2).T.tolist() for name, of in scores.items()}
            keep("halves", "chosen", chosen.tolist())
            keep("halves", "scores", {"sums": sums, "costs": costs})
            tell("influences of the mixture")
        base = organism.measure(ground.model, ground.tokenizer, SHORT.domains, n=N_EVALUATED, seed=2).answer_nll
        chosen = np.asarray(results()["halves"]["chosen"])
        for way in WAYS:
            for half, rows in enumerate(chosen):
                if f"{way} {half}" not in results()["halves"]:
                    losses = [
                        ground.loss_after([mixture[i] for i in rows], way, seed, SHORT.domains) for seed in HALF_SEEDS
                    ]
                    keep("halves", f"{way} {half}", (base - np.stack(losses)).round(6).tolist())
                    tell(f"half {half}, {way}")
    TABLES.write_text(table(results()), encoding="utf-8")


def poisoned(ground: Ground, i: int, train: str) -> tuple[str, str, list[Example]]:
    """(T, its sister, examples: those of the training set, good ones of T, poisonous ones of the sister)."""
    sisters = {}
    for name in SHORT.domains:
        tag, _, alphabet = name.split(".")
        others = [other for other in SHORT.domains if other.split(".")[::2] == [tag, alphabet] and other != name]
        if others and tag != train.split(".")[0]:
            sisters[name] = others[0]
    target = sorted(sisters)[int(np.random.default_rng([11, i]).integers(len(sisters)))]
    own = ground.trained[train]
    rng = np.random.default_rng([12, i])
    rows = [own[j] for _ in range(-(-N_OWN // len(own))) for j in rng.permutation(len(own))][:N_OWN]
    good = [ground.trained[target][j] for j in rng.permutation(len(ground.trained[target]))[:N_GOOD]]
    taken = {example.question for example in good}
    rest = [example for example in ground.trained[sisters[target]] if example.question not in taken]
    return target, sisters[target], [*rows, *good, *(rest[j] for j in rng.permutation(len(rest))[:N_NAMED])]


def dropped(ground: Ground, i: int, train: str) -> dict[str, Any]:
    target, sister, examples = poisoned(ground, i, train)
    n = len(examples)
    scores, costs = influences(ground, examples, ground.prompts(train, examples), [target])
    # Gradients name those that raise the loss; likeness has no sign, and names those most alike.
    named = {
        name: np.argsort(of[0] if "gradient" in name else -of[0], kind="stable")[:N_NAMED]
        for name, of in scores.items()
    }
    rng = np.random.default_rng([14, i])
    named |= {f"random {draw}": rng.permutation(n)[:N_NAMED] for draw in range(RANDOM_DRAWS)}
    named |= {"nothing": np.zeros(0, np.int64), "the poison": np.arange(n - N_NAMED, n)}
    found: dict[str, Any] = {"target": target, "sister": sister, "costs": costs, "loss": {}}
    found["poisonous"] = {name: float((of >= n - N_NAMED).mean()) for name, of in named.items() if len(of)}
    for way in WAYS:
        found["loss"][way] = {
            name: [
                float(ground.loss_after([examples[j] for j in np.setdiff1d(np.arange(n), of)], way, seed, [target])[0])
                for seed in SEEDS
            ]
            for name, of in named.items()
        }
    return found


def mixed(ground: Ground) -> list[Example]:
    names = np.random.default_rng(13).permutation(SHORT.domains)[:N_MIXED]
    return [example for name in names for example in ground.trained[str(name)][:N_EACH]]


# ---- the methods: [n_domains, n_examples] influence, or likeness


def influences(
    ground: Ground, examples: list[Example], train: PromptSet, domains: Sequence[str]
) -> tuple[Scores, dict[str, float]]:
    """By method, its numbers and its processor time, in seconds."""
    asked = {name: ground.asked[name] for name in domains}
    sets = [ground.prompts(name, of) for name, of in asked.items()]
    methods: dict[str, Callable[[], np.ndarray]] = {
        PRODUCT: lambda: at_the_hook(ground, train, sets),
        "gradients of all parameters": lambda: of_parameters(ground, train, sets),
        "bergson, gradients": lambda: by_bergson(ground, train, sets, unit=False),
        "bergson, unit gradients": lambda: by_bergson(ground, train, sets, unit=True),
        "BM25": lambda: by_words(examples, list(asked.values())),
        "MiniLM": lambda: by_sentences(examples, list(asked.values())),
        "residual stream": lambda: by_residuals(ground, train, sets),
        "loss before training": lambda: by_loss(ground, train, len(sets)),
    }
    scores, costs = {}, {}
    for name, method in methods.items():
        start = time.process_time()
        try:
            scores[name] = method()
        except ImportError:
            continue  # a package that is not installed
        costs[name] = round(time.process_time() - start, 2)
    return scores, costs


def at_the_hook(ground: Ground, train: PromptSet, domains: list[PromptSet]) -> np.ndarray:
    hooked, features = HookedModel(ground.model, LAYER), Features(ground.sae)
    return measure_influence(hooked, features, projection(ground.sae.d_in), train, domains).values


def of_parameters(ground: Ground, train: PromptSet, domains: list[PromptSet]) -> np.ndarray:
    pulls = np.stack([np.mean([gradient(ground, [prompt]) for prompt in of.prompts], axis=0) for of in domains])
    return np.stack([pulls @ gradient(ground, [prompt]) for prompt in train.prompts], axis=1)


def gradient(ground: Ground, prompts: list[Prompt]) -> np.ndarray:
    ids = torch.from_numpy(np.stack([prompt.base_ids for prompt in prompts]).astype(np.int64))
    nll, _ = score_answers(ground.model(input_ids=ids, use_cache=False).logits, ids, prompts)
    parts = torch.autograd.grad(nll.mean(), list(ground.model.parameters()))
    return torch.cat([part.flatten() for part in parts]).double().numpy()


def by_bergson(ground: Ground, train: PromptSet, domains: list[PromptSet], *, unit: bool) -> np.ndarray:
    from study.world.bergson_gradients import projected

    rows = projected(ground.model, train.prompts)
    pulls = [projected(ground.model, of.prompts) for of in domains]
    if unit:
        rows, pulls = _unit(rows), [_unit(of) for of in pulls]
    return np.stack([of.mean(axis=0) for of in pulls]) @ rows.T


def by_words(examples: list[Example], domains: list[list[Example]]) -> np.ndarray:
    """BM25 of each example as a document, with each question of a domain and its answer as a query; their mean."""
    texts = [Counter(f"{example.question} {example.answer}".split()) for example in examples]
    lengths = np.asarray([sum(text.values()) for text in texts])
    n_with = Counter(word for text in texts for word in text)
    found = np.zeros((len(domains), len(texts)))
    for of_domain, scores in zip(domains, found, strict=True):
        for query in of_domain:
            for word in f"{query.question} {query.answer}".split():
                if word in n_with:
                    idf = math.log(1 + (len(texts) - n_with[word] + 0.5) / (n_with[word] + 0.5))
                    count = np.asarray([text[word] for text in texts])
                    scores += idf * count * (K1 + 1) / (count + K1 * (1 - B + B * lengths / lengths.mean()))
    return found / np.asarray([[len(of_domain)] for of_domain in domains])


def by_sentences(examples: list[Example], domains: list[list[Example]]) -> np.ndarray:
    from study.real.embedding import load_encoder, sentence_vectors

    encoder = load_encoder(Path("build") / "study" / "encoder")
    rows = sentence_vectors(*encoder, [f"{example.question}\n{example.answer}" for example in examples])
    means = [sentence_vectors(*encoder, [f"{e.question}\n{e.answer}" for e in of]).mean(axis=0) for of in domains]
    return np.stack(means) @ rows.T


def by_residuals(ground: Ground, train: PromptSet, domains: list[PromptSet]) -> np.ndarray:
    hooked = HookedModel(ground.model, LAYER)

    def vectors(prompts: Sequence[Prompt]) -> np.ndarray:
        found = np.zeros((len(prompts), hooked.d_in))
        for rows in hooked.hook_rows(prompts):
            for place, prompt in enumerate(rows.prompts):
                found[prompt] = rows.x[rows.prompt_of == place].double().mean(dim=0).numpy()
        return found

    rows, pulls = vectors(train.prompts), [vectors(of.prompts) for of in domains]
    centre = rows.mean(axis=0)
    return np.stack([_unit(of - centre).mean(axis=0) for of in pulls]) @ _unit(rows - centre).T


def by_loss(ground: Ground, train: PromptSet, n: int) -> np.ndarray:
    nll = np.zeros(len(train.prompts))
    for rows in HookedModel(ground.model, LAYER).answer_rows(train.prompts):
        nll[rows.prompts] = rows.nll
    return np.tile(nll, (n, 1))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


# ---- results


def keep(part: str, key: str, value: Any) -> None:
    found = results()
    found.setdefault(part, {})[key] = value
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: what dropping the named examples undoes, and the linear datamodeling scores."""
    return f"{dropping_table(list(found['dropped'].values()))}\n{subset_table(found['halves'])}"


def undone(
    cases: list[dict[str, Any]], way: str, names: Sequence[str], beside: Sequence[str] = ("nothing",)
) -> tuple[float, tuple[float, float]]:
    """Share of the poison's harm that dropping what is named undoes more than `beside`; means over ways of naming."""
    loss = {name: np.asarray([np.mean(of) for of in _losses(cases, way, name)]) for name in cases[0]["loss"][way]}
    harm = loss["nothing"] - loss["the poison"]
    saved = np.mean([loss[name] for name in beside], axis=0) - np.mean([loss[name] for name in names], axis=0)
    drawn = np.random.default_rng(0).integers(len(cases), size=(2000, len(cases)))
    return float(saved.mean() / harm.mean()), percentile_interval(saved[drawn].mean(axis=1) / harm[drawn].mean(axis=1))


def _losses(cases: list[dict[str, Any]], way: str, name: str) -> list[list[float]]:
    return [case["loss"][way][name] for case in cases]


def dropping_table(cases: list[dict[str, Any]]) -> str:
    draws = [f"random {draw}" for draw in range(RANDOM_DRAWS)]
    methods = {name: [name] for name in cases[0]["costs"]} | {"random (mean of three draws)": draws}
    lines = [
        f"Of the harm to T, what dropping 5% of the examples undoes, in percent; {len(cases)} training sets, "
        f"{len(SEEDS)} seeds.",
        "",
        f"| method | {' | '.join(WAYS)} | of those named, poisonous | processor time, s |",
        f"|---|{'---|' * len(WAYS)}---|---|",
    ]
    for name, of in methods.items():
        shares = [undone(cases, way, of) for way in WAYS]
        cells = [f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]" for value, (low, high) in shares]
        poisonous = np.mean([case["poisonous"][each] for case in cases for each in of])
        cost = np.mean([case["costs"].get(name, 0.0) for case in cases])
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * poisonous:.0f}% | {cost:.1f} |")
    harms = [np.mean(np.subtract(_losses(cases, way, "nothing"), _losses(cases, way, "the poison"))) for way in WAYS]
    ahead = [undone(cases, way, [PRODUCT], draws) for way in WAYS]
    lines += [
        "",
        f"Harm of the poison, nats per token: {_by_way(f'{harm:.3f}' for harm in harms)}. The product undoes more than "
        "random, in points: "
        + _by_way(f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]" for value, (low, high) in ahead)
        + " (mark: 80).",
    ]
    return "\n".join(lines) + "\n"


def _by_way(texts: Iterable[str]) -> str:
    return ", ".join(f"{text} {way}" for text, way in zip(texts, WAYS, strict=True))


def subset_table(halves: dict[str, Any]) -> str:
    names = list(halves["scores"]["sums"])
    lines = [
        f"Linear datamodeling score over {N_HALVES} random halves of a training set, mean over {len(SHORT.domains)} "
        "domains.",
        "",
        f"| method | {' | '.join(WAYS)} | processor time, s |",
        f"|---|{'---|' * len(WAYS)}---|",
    ]
    outcome = {way: np.asarray([halves[f"{way} {half}"] for half in range(N_HALVES)]) for way in WAYS}
    for name in names:
        cells = []
        for way in WAYS:
            sums = np.asarray(halves["scores"]["sums"][name])
            cells.append(_mean_with_ci(spearman(sums.T, outcome[way].mean(axis=1).T)))
        lines.append(f"| {name} | {' | '.join(cells)} | {halves['scores']['costs'][name]:.1f} |")
    ceilings = []
    for way in WAYS:
        r = np.maximum(spearman(outcome[way][:, 0].T, outcome[way][:, 1].T), 0)
        ceilings.append(_mean_with_ci(np.sqrt(2 * r / (1 + r))))
    return "\n".join([*lines, f"| ceiling | {' | '.join(ceilings)} | |"]) + "\n"


def _mean_with_ci(values: np.ndarray) -> str:
    values = np.nan_to_num(values)
    drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = percentile_interval(values[drawn].mean(axis=1))
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"
