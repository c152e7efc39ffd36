"""The paper's analyses on one base model, over dense features, so that every choice can be varied at once.

In the product each is an option: see docs/analyses.md. Outcomes are those of the study (`run` comes first).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.demo import organism
from sts_fast.demo.demo import TOP_N
from sts_fast.demo.organism.training import LAYER
from sts_fast.forecast import controls
from sts_fast.profile.projection import projection
from sts_fast.sae import load_sae
from study.world.correlations import pearson, rounded
from study.world.grounds import Ground
from study.world.saes import Variant
from study.world.trials import BATCH, N_TRAIN, REGIMES, SHOTS

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

N_PROMPTS = 24
N_SAE_ROWS = 40_000
TOP_NS = (4, 8, 16, 32, 64, 128, 256, 512)
SHOWN = (1, 2, 4, 8)
VARIANTS = {
    **{f"{width} wide": Variant(d_sae=width) for width in (256, 1024, 4096)},
    **{f"{k} fire": Variant(k=k) for k in (4, 64)},
    **{f"kind: {kind}": Variant(kind=kind) for kind in ("jumprelu", "standard", "untrained")},
}
TUNED = ("light", "heavy")


class Reader:
    """Residual streams of a model: by layer, [n_prompts, n_tokens, d_in] at the last example's tokens."""

    def __init__(self, ground: Ground, model: Any, tokenizer: Any) -> None:
        self.ground, self.tokenizer = ground, tokenizer
        self.layers = model.config.num_hidden_layers
        self.ids = {name: self._ids(name, 0) for name in ground.domains}

    def _ids(self, name: str, shots: int) -> torch.Tensor:
        import torch

        world = self.ground.world
        examples = world.examples(name, N_PROMPTS + max(SHOWN), seed=1)
        demos = examples[-shots:] if shots else []
        conversations = [
            [
                turn
                for example in (*demos, asked)
                for turn in (
                    {"role": "user", "content": example.question},
                    {"role": "assistant", "content": example.answer or ""},
                )
            ]
            for asked in examples[:N_PROMPTS]
        ]
        return torch.tensor(self.tokenizer.apply_chat_template(conversations, return_dict=False))

    def read(self, model: Any, names: Any, shots: int = 0) -> list[torch.Tensor]:
        """By layer [n_names, n_prompts, n_tokens, d_in]."""
        import torch

        n = self.ground.world.example_tokens
        seen: list[list[torch.Tensor]] = [[] for _ in range(self.layers)]
        handles = [
            layer.register_forward_hook(lambda module, args, output, i=i: seen[i].append(output[:, -n:].clone()))
            for i, layer in enumerate(model.model.layers)
        ]
        with torch.inference_mode():
            for name in names:
                ids = self._ids(name, shots) if shots else self.ids[name]
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return [torch.stack(of_layer) for of_layer in seen]


def analyse(ground: Ground, folder: Path, raw: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Correlations of every variant with the size of the zero-shot change of P, a list over trainings; and the rest."""
    model, tokenizer = organism.load_model(folder / "model")
    reader = Reader(ground, model, tokenizer)
    base, shown = reader.read(model, ground.domains), reader.read(model, ground.domains, SHOTS)
    few = {shots: reader.read(model, ground.trains, shots)[LAYER] for shots in SHOWN}
    tell("residual streams")
    question = slice(0, ground.world.question_tokens)
    answer = slice(ground.world.question_tokens, None)
    last = slice(ground.world.question_tokens - 1, ground.world.question_tokens)
    at = [ground.domains.index(train) for train in ground.trains]
    rows: dict[str, Doubles] = {}  # [n_trains, n_domains]

    sae = load_sae(folder / "sae")
    encode = encoder_of(sae)
    act, icl = means(encode, base[LAYER], shown[LAYER], question)
    top = top_of(icl[at], TOP_N)
    rows["STS_act"], rows["STS_icl"] = picked(act, top), picked(icl, top)
    for n in TOP_NS:
        of_n = top_of(icl[at], n)
        rows[f"STS_act, N = {n}"], rows[f"STS_icl, N = {n}"] = picked(act, of_n), picked(icl, of_n)
    for shots, behind in few.items():
        of_shots = top_of(means(encode, base[LAYER][at], behind, question)[1], TOP_N)
        rows[f"STS_act, demonstrations: {shots}"] = picked(act, of_shots)
    for name, tokens in {"last token of the question": last, "answer": answer, "both": slice(None)}.items():
        of_tokens, shift = means(encode, base[LAYER], shown[LAYER], tokens)
        rows[f"STS_act, tokens: {name}"] = picked(of_tokens, top_of(shift[at], TOP_N))
        rows[f"STS_icl, tokens: {name}"] = picked(shift, top_of(shift[at], TOP_N))
    fires = act > 0
    least = np.where(fires[at], icl[at], np.inf)
    rows["least shifted features"] = picked(act, np.argsort(least, axis=1)[:, :TOP_N])
    rows["most active features"] = picked(act, top_of(act[at], TOP_N))
    rows["features shifted more than in other domains"] = picked(act, top_of(icl[at] - icl.mean(axis=0), TOP_N))
    rows["features more active than in other domains"] = picked(act, top_of(act[at] - act.mean(axis=0), TOP_N))
    rows["z-scored"] = np.stack([controls.z_scored(act[:, one]) for one in top])
    rng = np.random.default_rng(0)
    rows["random features"] = np.mean(
        [picked(act, np.stack([rng.permutation(act.shape[1])[:TOP_N] for _ in at])) for _ in range(10)], axis=0
    )
    rows |= likenesses(base[LAYER][:, :, question], shown[LAYER][:, :, question], at)
    rows["H-score"] = np.tile([h_score(x[:, last].squeeze(1), ids) for x, ids in zip(
        base[LAYER], (reader.ids[name][:, ground.world.question_tokens + 1] for name in ground.domains), strict=True
    )], (len(at), 1))  # fmt: skip
    tell("controls")

    overlaps: dict[str, dict[str, list[float]]] = {}
    held = {"demonstrations": np.mean([concentration(one) for one in icl[at]], axis=0)}
    per_regime: dict[str, dict[str, Doubles]] = {}
    for regime in TUNED:
        _, steps, lr = REGIMES[regime]
        found: dict[str, list[Any]] = {}
        true_shift = []
        for train in ground.trains:
            questions = ground.world.examples(train, N_TRAIN, seed=1000)
            tuned = organism.fine_tune(
                model, tokenizer, questions, steps=steps, lr=lr, batch=BATCH, seed=0, world=ground.world
            )
            after = reader.read(tuned, ground.domains)[LAYER]
            true = means(encode, base[LAYER], after, question)[1]
            index = ground.domains.index(train)
            true_top = top_of(true[index][None], TOP_N)
            true_shift.append(true[index])
            own = top[ground.trains.index(train)][None]
            found.setdefault("true shifted features", []).append(picked(act, true_top)[0])
            found.setdefault("post-training shift in D_N", []).append(picked(true, own)[0])
            moved = (after[:, :, question] - base[LAYER][:, :, question]).double().square().sum(-1).mean((1, 2))
            found.setdefault("post-training shift of residuals", []).append(moved.numpy())
        per_regime[regime] = {name: np.stack(values) for name, values in found.items()}
        truth = top_of(np.stack(true_shift), TOP_N)
        candidates = {
            "predicted": top,
            "predicted, last token": top_of(means(encode, base[LAYER], shown[LAYER], last)[1][at], TOP_N),
            "most active": top_of(act[at], TOP_N),
        }
        overlaps[regime] = {name: rounded(overlap(one, truth)) for name, one in candidates.items()}
        others = [np.mean([len(np.intersect1d(top[j], truth[i])) / TOP_N for j in range(len(at)) if j != i])
                  for i in range(len(at))]  # fmt: skip
        overlaps[regime] |= {"predicted for other sets": rounded(others), "chance": [round(TOP_N / act.shape[1], 4)]}
        held[f"{regime} training"] = np.mean([concentration(one) for one in true_shift], axis=0)
    tell("trainings")
    return {
        "n_prompts": N_PROMPTS,
        "r_with_size_of_dP": {
            regime: correlations(ground, rows | per_regime.get(regime, {}), trials)
            for regime, trials in raw["trials"].items()
        },
        "overlap_with_true": overlaps,
        "share_held_by_top_n": {name: rounded(values) for name, values in held.items()},
    }


def analyse_saes(ground: Ground, folder: Path, raw: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """The same correlations with SAEs of other widths, sparsities and kinds, and after other layers."""
    model, tokenizer = organism.load_model(folder / "model")
    reader = Reader(ground, model, tokenizer)
    base, shown = reader.read(model, ground.domains), reader.read(model, ground.domains, SHOTS)
    question = slice(0, ground.world.question_tokens)
    at = [ground.domains.index(train) for train in ground.trains]
    samples = residual_rows(ground, model)
    rows: dict[str, Doubles] = {}
    quality = {}
    kinds = {f"SAE {name}": (variant, LAYER) for name, variant in VARIANTS.items()}
    for name, (variant, layer) in (kinds | {f"layer {i}": (Variant(), i) for i in range(reader.layers)}).items():
        trained = variant.train(samples[layer], seed=0)
        quality[name] = {"fvu": round(trained.fvu, 4), "l0": round(trained.l0, 2)}
        act, icl = means(trained.encode, base[layer], shown[layer], question)
        top = top_of(icl[at], TOP_N)
        rows[f"STS_act, {name}"], rows[f"STS_icl, {name}"] = picked(act, top), picked(icl, top)
        rows[f"most active, {name}"] = picked(act, top_of(act[at], TOP_N))
        tell(name)
    return {
        "r_with_size_of_dP": {regime: correlations(ground, rows, trials) for regime, trials in raw["trials"].items()},
        "saes": quality,
    }


def encoder_of(sae: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    W_enc, b_enc, b_dec = (torch.as_tensor(np.asarray(tensor)) for tensor in (sae.W_enc, sae.b_enc, sae.b_dec))

    def encode(x: torch.Tensor) -> torch.Tensor:
        values, indices = ((x - b_dec) @ W_enc + b_enc).topk(sae.k, dim=-1)
        return torch.zeros(*x.shape[:-1], sae.d_sae).scatter(-1, indices, values.relu())

    return encode


def means(encode: Any, base: torch.Tensor, other: torch.Tensor, tokens: slice) -> tuple[Doubles, Doubles]:
    """[n_sets, d_sae] mean activation, and mean squared shift."""
    acts, shifts = [], []
    for one, moved in zip(base, other, strict=True):
        h, g = encode(one[:, tokens]), encode(moved[:, tokens])
        acts.append(h.double().mean(dim=(0, 1)).numpy())
        shifts.append((g - h).double().square().mean(dim=(0, 1)).numpy())
    return np.stack(acts), np.stack(shifts)


def top_of(shift: Doubles, n: int) -> NDArray[np.int64]:
    """[n_trains, n] features that shift most."""
    return np.argsort(-shift, axis=1, kind="stable")[:, :n]


def picked(values: Doubles, top: NDArray[np.int64]) -> Doubles:
    """[n_trains, n_domains] sum over each training set's features."""
    return np.stack([values[:, one].sum(axis=1) for one in top])


def likenesses(base: torch.Tensor, shown: torch.Tensor, at: list[int]) -> dict[str, Doubles]:
    """Numbers of the residual stream alone; base, shown: [n_domains, n_prompts, n_tokens, d_in]."""
    x = base.flatten(1, 2).double().numpy()
    difference = shown.flatten(1, 2).double().numpy() - x
    mean = x.mean(axis=1)
    centred = mean - mean.mean(axis=0)
    y = x @ projection(x.shape[2])
    covariances = np.stack([np.cov(rows.T, ddof=0) for rows in y])
    projected = y.mean(axis=1)
    n_raw = min(TOP_N, x.shape[2] // 4)
    raw, principal = [], []
    for i in at:
        dims = np.argsort(-(difference[i] ** 2).sum(axis=0), kind="stable")[:n_raw]
        raw.append(np.abs(x[:, :, dims]).sum(axis=2).mean(axis=1))
        _, directions = np.linalg.eigh(difference[i].T @ difference[i])
        principal.append(np.abs(x @ directions[:, -n_raw:]).sum(axis=2).mean(axis=1))
    return {
        "raw dimensions": np.stack(raw),
        "principal directions of the shift": np.stack(principal),
        "cosine of means": np.asarray([[controls.cosine(mean[i], one) for one in mean] for i in at]),
        "cosine of means, domain-centred": np.asarray(
            [[controls.cosine(centred[i], one) for one in centred] for i in at]
        ),
        "CKA": np.asarray([[controls.cka(covariances[i], one) for one in covariances] for i in at]),
        "probe": np.stack([
            controls.probe_logits(projected[i], projected, np.concatenate([covariances[i][None], covariances]))
            for i in at
        ]),
    }  # fmt: skip


def h_score(x: torch.Tensor, labels: torch.Tensor) -> float:
    """tr(cov(x)^-1 cov(E[x | label])), a tenth of the mean variance added to each (Bao et al. 2019)."""
    rows, classes = x.double().numpy(), labels.numpy()
    rows = rows - rows.mean(axis=0)
    between = np.stack([rows[classes == one].mean(axis=0) for one in classes])
    covariance = rows.T @ rows / len(rows)
    covariance += 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return float(np.trace(np.linalg.solve(covariance, between.T @ between / len(rows))))


def residual_rows(ground: Ground, model: Any) -> list[torch.Tensor]:
    """By layer, rows [about N_SAE_ROWS, d_in] of fresh documents."""
    import torch

    from sts_fast.demo.organism.model import document_ids

    rng = np.random.default_rng(1)
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.register_forward_hook(
            lambda module, args, output, i=i: seen[i].append(output[:, 1:].flatten(0, 1).clone())
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.inference_mode():
        while sum(map(len, seen[0])) < N_SAE_ROWS:
            model(input_ids=document_ids(64, 5, rng, ground.world), use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return [torch.cat(of_layer).clone() for of_layer in seen]


def concentration(shift: Doubles) -> Doubles:
    """Share of the whole that the top n of TOP_NS hold."""
    held = np.cumsum(np.sort(shift)[::-1])
    return np.asarray([held[n - 1] / held[-1] for n in TOP_NS])


def overlap(top: NDArray[np.int64], truth: NDArray[np.int64]) -> list[float]:
    return [len(np.intersect1d(one, other)) / len(one) for one, other in zip(top, truth, strict=True)]


def correlations(
    ground: Ground, rows: dict[str, Doubles], trials: list[dict[str, Any]]
) -> dict[str, list[float | None]]:
    """By predictor, Pearson's r with the size of the zero-shot change of P in each training."""
    found: dict[str, list[float | None]] = {name: [] for name in rows}
    for row in trials:
        others = np.asarray([name != row["train"] for name in ground.domains])
        change = np.abs(np.asarray(row["zero-shot"]["dP"]))[others]
        for name, values in rows.items():
            found[name].append(pearson(values[ground.trains.index(row["train"])][others], change))
    return {name: rounded(values) for name, values in found.items()}
