"""The forecast put together of what was measured, with what it rests on."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from sts_fast import files
from sts_fast._version import __version__
from sts_fast.data.columns import RowsBlock
from sts_fast.data.folders import Origin
from sts_fast.data.prompts import prompts_sha256, set_warnings
from sts_fast.errors import listed
from sts_fast.files import Document, InputFile
from sts_fast.forecast.blocks import ConcentrationBlock, ModelBlock, ProvenanceBlock, SetBlock
from sts_fast.forecast.dims import N_REPLICATES, Shift
from sts_fast.forecast.domains import Use, domain_scores, use_of
from sts_fast.forecast.estimators import BY_NAME
from sts_fast.forecast.length import LengthEffect, length_effect
from sts_fast.forecast.options import Settings
from sts_fast.forecast.plan import Plan
from sts_fast.forecast.run import Forecast, Score, ShiftedFeature, with_value_columns
from sts_fast.forecast.shown_prompts import N_PROMPTS, part_column, spread_out, text_column
from sts_fast.model import explain
from sts_fast.model.forward import PassRecord
from sts_fast.model.log import AnswerLog
from sts_fast.model.reader import Reader
from sts_fast.model.sae_check import Fit
from sts_fast.ops import _cpu
from sts_fast.profile.identity import sae_document
from sts_fast.profile.means import FeatureMeans
from sts_fast.profile.profile import Profile
from sts_fast.sae import SAE
from sts_fast.signed.signed import CarrierBlock, SignedForecast
from sts_fast.statistics import CONFIDENCE, N_BOOTSTRAP, percentile_interval

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from sts_fast.statistics import Doubles


@dataclass(frozen=True)
class Basis:
    """Facts about model, SAE and inputs that forecasts with one SAE record beside the profiles' numbers.

    model:     block of scores.json; tuned: the name of the model after training, or None
    sae:       an SAE's source, architecture, d_in, d_sae, k and hook_name; neuronpedia: its name there, or None
    fit:       whether it belongs to the model
    labels:    of its features, by index
    tokenizer: that writes out where features fire; None where it is not at hand, and nothing is written
    promoted:  the output tokens that features promote, of those of which it is known
    passes:    record of the forward passes
    warnings, inputs, rows: by training set; inputs: all that its forecast is made of; rows: counts and columns of the
        rows that were read
    """

    model: ModelBlock
    tuned: str | None
    sae: Document
    neuronpedia: str | None
    fit: Fit
    labels: Mapping[int, str]
    tokenizer: PreTrainedTokenizerBase | None
    promoted: Callable[[list[int]], dict[int, list[str]]]
    passes: Callable[[], PassRecord]
    warnings: Mapping[str, list[str]]
    inputs: Mapping[str, list[InputFile]]
    rows: Mapping[str, list[RowsBlock]]

    @classmethod
    def of(cls, plan: Plan, sae: SAE, fit: Fit, trains: Sequence[str]) -> Basis:
        """The basis of a run of the model."""
        session, reader, hook = plan.session, plan.session.reader, plan.session.reader.hook(sae)
        general = [*plan.warnings, *filter(None, (fit.warning, fit.names)), *(f"SAE: {note}" for note in sae.notes)]
        return cls(
            model={
                "name": reader.name,
                "layer": hook.layer,
                "module": hook.path,
                "side": hook.side,
                "d_in": hook.d_in,
                "dtype": reader.dtype,
                "context_length": reader.context_length,
                "revision": reader.revision,
                "weights_sha256": reader.weights_sha256(hook),
            },
            tuned=None if session.tuned is None else session.tuned.name,
            sae=sae_document(sae),
            neuronpedia=sae.metadata.get("neuronpedia_id"),
            fit=fit,
            labels=plan.labels.get(sae, {}),
            tokenizer=session.tokenizer,
            promoted=lambda features: promoted_tokens(reader, sae, features, session.tokenizer),
            passes=reader.forward_passes,
            warnings={name: [*general, *plan.sets.warnings(name), *plan.shared.get(name, ())] for name in trains},
            inputs={name: _inputs(plan, sae, name) for name in trains},
            rows={name: plan.sets.blocks(name) for name in trains},
        )


def assemble(
    basis: Basis,
    shifts: Sequence[Shift],
    domains: Sequence[Profile],
    settings: Settings,
    *,
    signed: Mapping[str, SignedForecast] = MappingProxyType({}),
    answers: Mapping[str, AnswerLog] = MappingProxyType({}),
) -> dict[str, Forecast]:
    """The forecast of each training set.

    shifts:  of each training set; domains: the profile of each
    signed:  by training set; empty where no signed estimator was asked for
    answers: how well the base model answers each domain, where that was asked for
    """
    uses = {shift.name: [use_of(domain, shift, settings) for domain in domains] for shift in shifts}
    firings = {shift.name: shift.firings() for shift in shifts}
    for name, of_shift in firings.items():
        for use in uses[name]:
            use.add_firings(of_shift)
    explained = [*firings.values(), *(of_train.firings for of_train in signed.values())]
    shown = sorted({int(j) for of_train in explained for j in of_train.features})
    promoted = basis.promoted(shown)
    forecasts = {
        shift.name: _forecast(
            basis, settings, shift, uses[shift.name], answers, firings[shift.name].table(basis.tokenizer), promoted
        )
        for shift in shifts
    }
    return {
        name: _with_signed(forecast, signed[name], basis, promoted) if name in signed else forecast
        for name, forecast in forecasts.items()
    }


def _forecast(
    basis: Basis,
    settings: Settings,
    shift: Shift,
    uses: Sequence[Use],
    answers: Mapping[str, AnswerLog],
    firings: pa.Table,
    promoted: Mapping[int, list[str]],
) -> Forecast:
    import pyarrow as pa

    profile, top_n, d_in = shift.profile, settings.top_n, basis.model["d_in"]
    means = FeatureMeans.of(profile, shift.importance, shift.replicates)
    n_moved = int((shift.importance > 0).sum())
    prompt_sets = [profile.prompt_set, *(use.profile.prompt_set for use in uses)]
    warnings = [*basis.warnings[shift.name]]
    warnings += [*set_warnings(prompt_sets[:1]), *set_warnings(prompt_sets[1:])]
    untold = [prompt_set.name for prompt_set in prompt_sets if prompt_set.questions is None]
    if untold:
        warnings.append(
            f"the text of the questions is not known of {', '.join(untold)}: no control is made of it there"
        )
    if settings.controls == "all":
        unanswered = [use.name for use in uses if use.name not in answers]
        if unanswered:
            warnings.append(f"too few answers to measure the base model on {', '.join(unanswered)}")
    if n_moved < top_n:
        warnings.append(
            f"only {n_moved} features shift at all, so {top_n - n_moved} of the {top_n} in D_N stand there by their "
            "index alone: lower --top-n"
        )
    single = [prompt_set.name for prompt_set in prompt_sets if len(prompt_set.shown) == 1]
    if settings.demo_draws > 1 and single:
        warnings.append(
            f"there are demonstrations for one draw only of {listed(single, most=4)}: the intervals do not say how "
            "much other demonstrations would change; add answered examples, there or to --demos"
        )
    length = {name: _length_effect(uses, name) for name in settings.sizes} if uses else {}
    warnings += [
        warning
        for name, effect in length.items()
        if (warning := effect.warning(BY_NAME[name].label, len(uses), settings.tokens)) is not None
    ]
    stability = shift.overlaps(top_n)
    total = float(shift.importance.sum())
    of_train = profile.log.table("shift", shift.prompt_values, name=shift.name)
    texts = text_column(profile.log.prompts, range(N_PROMPTS), basis.tokenizer)
    tables = [of_train.append_column("texts", texts)]
    for use in uses:
        values = {
            f"{control}_{estimator}_sum".removeprefix("_"): sums for (control, estimator), sums in use.sums.items()
        }
        main = settings.sizes[0]
        shown = spread_out(use.sums["", main] / np.maximum(use.n_terms(main), 1))
        texts = text_column(use.profile.log.prompts, shown, basis.tokenizer)
        of_use = use.profile.log.table("score", values).append_column("texts", texts)
        tables.append(of_use.append_column("parts", part_column(use, shown, shift.top, main)))
    tables += [log.table() for log in answers.values()]
    return Forecast(
        model=basis.model,
        sae={
            "source": basis.sae["source"],
            "architecture": basis.sae["architecture"],
            "d_in": basis.sae["d_in"],
            "d_sae": basis.sae["d_sae"],
            "k": basis.sae["k"],
            "hook_name": basis.sae["hook_name"],
            "mean_l0": float(means.n_fired.sum()) / max(means.n_tokens, 1),
            "fit": asdict(basis.fit),
        },
        train=_train_block(shift),
        settings={
            "dims": settings.dims,
            "estimators": list(settings.sizes),
            "controls": settings.controls,
            "top_n": top_n,
            "tokens": settings.tokens,
            "shots": settings.shots,
            "domain_shots": settings.domain_shots,
            "demo_draws": settings.demo_draws,
            "limit": settings.limit,
            "n_bootstrap": N_BOOTSTRAP,
            "confidence": CONFIDENCE,
            "tuned": basis.tuned,
        },
        shift={
            "share_of_top_n": float(shift.importance[shift.top].sum() / total) if total else 0.0,
            "n_features_shifted": n_moved,
            "concentration": concentration(shift.importance),
            "stability": {
                "n_replicates": N_REPLICATES,
                "mean_overlap": float(np.mean(stability)),
                "overlap_ci": list(percentile_interval(stability)),
            },
        },
        length={name: effect.to_plain() for name, effect in length.items()},
        domains=domain_scores(uses, shift, answers, settings),
        shifted_features=[
            ShiftedFeature(
                index=int(j),
                mean_squared_shift=float(shift.importance[j]) if shift.of_change else None,
                mean_activation=float(shift.mean_activation[j]),
                share=float(shift.importance[j] / total) if total else 0.0,
                promoted_tokens=promoted.get(int(j)) if rank < explain.N_FEATURES else None,
                neuronpedia=link,
                label=basis.labels.get(int(j)),
            )
            for rank, (j, link) in enumerate(
                zip(shift.top, explain.neuronpedia_links(basis.neuronpedia, shift.top.tolist()), strict=True)
            )
        ],
        warnings=warnings,
        provenance=_provenance(
            basis.inputs[shift.name], basis.rows[shift.name], settings, prompts_sha256(prompt_sets), basis.passes()
        ),
        means=means,
        controls={
            **{f"{control}_features": members for control, members in shift.feature_sets.items() if control},
            **{f"{control}_dimensions": dims for control, dims in shift.raw_sets.items()},
            "mean_residual": profile.residuals.mean,
            "domain_mean_residuals": np.stack([use.profile.residuals.mean for use in uses] or [np.zeros(d_in)]),
            "projected_mean": profile.residuals.projected_mean,
            "projected_covariance": profile.residuals.covariance,
            "domain_projected_means": np.stack([use.profile.residuals.projected_mean for use in uses] or [np.zeros(0)]),
            "domain_projected_covariances": np.stack(
                [use.profile.residuals.covariance for use in uses] or [np.zeros((0, 0))]
            ),
            **{
                f"domain_{name}": np.stack(
                    [getattr(use.profile.residuals, name).value for use in uses] or [np.zeros(d_in)]
                )
                for name in ("abs_base", "sq_base", "sq_shift")
            },
            "domain_mean_activations": np.stack([use.mean_activation for use in uses] or [np.zeros(0)]),
        },
        prompts=pa.concat_tables([with_value_columns(table) for table in tables], promote_options="default"),
        firings=firings,
    )


def _train_block(shift: Shift) -> SetBlock:
    prompt_set, counts = shift.profile.prompt_set, shift.profile.log.counts()
    return {
        "name": shift.name,
        "n_prompts": len(prompt_set.prompts),
        "n_skipped": prompt_set.n_too_long + prompt_set.n_unanswered,
        "n_too_long": prompt_set.n_too_long,
        "n_unanswered": prompt_set.n_unanswered,
        "n_tokens": counts["n_tokens"],
        "n_pairs": counts["n_pairs"],
        "n_special": counts["n_special"],
        "n_straddling": counts["n_straddling"],
        "n_sinks": counts["n_sinks"],
        "demonstrations": [list(draw) for draw in prompt_set.shown],
    }


def _length_effect(uses: Sequence[Use], estimator: str) -> LengthEffect:
    """Of the score that D_N gives."""
    return length_effect([use.sums["", estimator] for use in uses], [use.n_terms(estimator) for use in uses])


def concentration(importance: Doubles) -> list[ConcentrationBlock]:
    """Share of the whole shift that the most shifted features hold: of the first, the first 2, 5, 10, 20, 50 and so on.

    importance: [d_sae] E_x ||h_j(x) - h_j(demos, x)||^2, or what else D_N is ranked by
    """
    held = np.cumsum(np.sort(importance)[::-1])
    steps = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]
    sizes = [n for n in steps if n < len(held)] + [len(held)]
    return [{"n": n, "share": float(held[n - 1] / held[-1]) if held[-1] else 0.0} for n in sizes]


def _with_signed(
    forecast: Forecast, signed: SignedForecast, basis: Basis, promoted: Mapping[int, list[str]]
) -> Forecast:
    import pyarrow as pa

    top = signed.block["top_features"]
    links = explain.neuronpedia_links(basis.neuronpedia, [feature["index"] for feature in top])
    described: list[CarrierBlock] = [
        {
            **feature,
            "promoted_tokens": promoted.get(feature["index"]) if rank < explain.N_FEATURES else None,
            "neuronpedia": link,
            "label": basis.labels.get(feature["index"]),
        }
        for rank, (feature, link) in enumerate(zip(top, links, strict=True))
    ]
    unanswered = [domain.name for domain in forecast.domains if domain.name not in signed.block["domains"]]
    more = [f"too few answers for a signed forecast of {', '.join(unanswered)}"] if unanswered else []
    scores = {name: {key: Score(*score) for key, score in of.items()} for name, of in signed.scores.items()}
    return replace(
        forecast,
        domains=[replace(domain, scores=domain.scores | scores.get(domain.name, {})) for domain in forecast.domains],
        signed={**signed.block, "top_features": described},
        warnings=[*forecast.warnings, *signed.warnings, *more],
        # Runs without signed estimators have no columns for their values.
        prompts=pa.concat_tables([forecast.prompts, signed.prompts], promote_options="default"),
        firings=pa.concat_tables([forecast.firings, signed.firings.table(basis.tokenizer)]),
    )


def promoted_tokens(
    reader: Reader, sae: SAE, features: list[int], tokenizer: PreTrainedTokenizerBase
) -> dict[int, list[str]]:
    """The output tokens that each feature promotes; none where W_dec or the unembedding is not at hand."""
    try:
        directions, matrix = sae.decoder_rows(features), reader.unembedding()
        if directions is None or matrix is None or matrix.shape[1] != directions.shape[1]:
            return {}
        return dict(zip(features, explain.promoted_tokens(directions, matrix, tokenizer), strict=True))
    except Exception:  # an ornament of the report: a damaged head must not cost the forecast
        return {}


def _inputs(plan: Plan, sae: SAE, train: str) -> list[InputFile]:
    """Everything that a forecast of one training set is made from: files, rows in memory, data sets of the hub."""
    inputs: list[InputFile] = []
    for role, source in {**plan.sources, "sae": sae.source}.items():
        # Hub ids and models in memory are no files.
        if isinstance(source, (str, Path)) and Path(source).exists():
            inputs += files.hashed_inputs(role, [source])
        elif isinstance(source, Origin):
            inputs += [table.record(role) for table in source.tables]
    inputs += [table.record("domains") for table in plan.sets.tables("domain")]
    inputs += [table.record("demos") for table in plan.sets.tables("demos")]
    return inputs + [table.record("train") for table in plan.sets.tables("train", train)]


def _provenance(
    inputs: list[InputFile], rows: list[RowsBlock], settings: Settings, prompts_digest: str, passes: PassRecord
) -> ProvenanceBlock:
    return {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": settings.command,
        "seed": settings.seed,
        "versions": {
            "sts_fast": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            **{package: version(package) for package in ("torch", "transformers")},
        },
        "instruction_set": _cpu.instruction_set(),
        "inputs": inputs,
        "rows": rows,
        "prompts_sha256": prompts_digest,
        "forward_passes": passes,
    }
