"""Forecasts from the profiles of a library alone: no model is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.forecast.assemble import Basis, assemble
from sts_fast.forecast.cross import check_alike
from sts_fast.forecast.dims import measure_shift
from sts_fast.forecast.estimators import BY_NAME, SizeEstimator
from sts_fast.forecast.options import Dims, Settings
from sts_fast.forecast.run import Forecast
from sts_fast.model.forward import PassRecord
from sts_fast.model.sae_check import Fit
from sts_fast.places import split_name
from sts_fast.profile.library import Library
from sts_fast.profile.profile import INDEX_FILE, Profile
from sts_fast.signed.signed import SignedEstimator

NO_PASSES: PassRecord = {
    "strategy": None, "why": "profiles were read from files", "batch_tokens": None, "n_passes": 0, "n_tokens": 0,
    "seconds": 0.0, "tokens_per_second": None,
}  # fmt: skip


def compare_stored(
    library: str | Path,
    trains: Sequence[str],
    domains: Sequence[str] | None = None,
    *,
    sae: str | None = None,
    estimators: Sequence[SizeEstimator | SignedEstimator] = ("act", "icl"),
    dims: Dims = "icl",
    top_n: int = 100,
    seed: int = 0,
    command: str | None = None,
) -> dict[str, Forecast]:
    """The forecasts that `compare` makes, of sets that a library has; no model is run or opened.

    trains, domains: names of sets in the library; None for all of its domains
    sae:     source of the SAE whose profiles are used, where the library has those of several
    estimators: without a sign; dims: 'icl' or 'active'; top_n: as for `compare`
    seed:    of the intervals; command: see Reading

    Returns a forecast by training set, its numbers the same as those of `compare`. Without a model it says neither
    which tokens a feature promotes nor in which texts it fires, and the fit of the SAE is not measured. Raises
    InputError where a set is not in the library, or profiles cannot be held against each other.
    """
    settings = Settings(dims=dims, estimators=estimators, top_n=top_n, seed=seed, command=command)
    if settings.signed or dims == "tuned":
        raise InputError(
            "profiles have no answers and no model after training: estimators with a sign and dims tuned need the model"
        )
    shelf = Library(library).shelf(sae)
    pairs = any(BY_NAME[name].of == "pairs" for name in settings.sizes)
    of_trains = shelf.find("train", trains, shown=dims == "icl")
    of_domains = shelf.find("domain", domains, shown=pairs)
    if not of_trains or not of_domains:
        missing = "domains" if of_trains else "training sets"
        raise InputError(f"{shelf.library} has no {missing} to make a forecast of: add some with sts-fast profile")
    scored = [_plain(Profile.load(folder), keep=pairs) for folder in of_domains.values()]
    forecasts: dict[str, Forecast] = {}
    for folder in of_trains.values():
        train = _plain(Profile.load(folder), keep=dims == "icl")
        for profile in scored:
            check_alike(train.identity, profile.identity)
        read_with = _as_read(settings, train, scored)
        shift = measure_shift(train, read_with)
        forecasts |= assemble(_basis(train, [folder, *of_domains.values()]), [shift], scored, read_with)
    return forecasts


def _plain(profile: Profile, *, keep: bool) -> Profile:
    """A profile without what was read behind demonstrations, where that is not asked for."""
    return profile if keep else profile.plain()


def _as_read(settings: Settings, train: Profile, domains: Sequence[Profile]) -> Settings:
    """The settings with the sampling that the profiles were made with.

    Raises InputError where the domains differ in their demonstrations, or the SAE has fewer features than top_n.
    """
    if settings.top_n > train.rows.d_sae:
        raise InputError(f"--top-n is {settings.top_n}, but the SAE has {train.rows.d_sae} features")
    own, others = train.identity.sampling, [profile.identity.sampling for profile in domains]
    first = others[0]
    for profile, sampling in zip(domains, others, strict=True):
        if profile.identity.shown_sha256 and any(sampling[name] != first[name] for name in ("shots", "demo_draws")):
            raise InputError(
                f"the profiles of '{domains[0].name}' and '{profile.name}' were read behind different numbers of "
                "demonstrations: make one of them again"
            )
    return replace(
        settings, shots=own["shots"], domain_shots=first["shots"], demo_draws=own["demo_draws"], tokens=own["tokens"],
        limit=own["limit"],
    )  # fmt: skip


def _basis(train: Profile, folders: Sequence[Path]) -> Basis:
    model, sae, n_tokens = train.identity.model, train.identity.sae, max(train.n_tokens, 1)
    n_fired = train.rows.totals("n_fired")
    return Basis(
        model={
            "name": model["name"],
            "layer": split_name(sae["hook_name"])[1],
            "module": model["module"],
            "side": model["side"],
            "d_in": sae["d_in"],
            "dtype": model["dtype"],
            "context_length": None,
            "revision": model["revision"],
            "weights_sha256": model["weights_sha256"],
        },
        tuned=None,
        sae=sae,
        neuronpedia=sae.get("neuronpedia"),
        fit=Fit(train.n_tokens, None, float(n_fired.sum()) / n_tokens, None, float((n_fired == 0).mean()), None, None),
        labels={},
        tokenizer=None,
        promoted=lambda features: {},
        passes=lambda: NO_PASSES,
        warnings={train.name: []},
        inputs={train.name: files.hashed_inputs("profile", [folder / INDEX_FILE for folder in folders])},
        rows={train.name: []},
    )
