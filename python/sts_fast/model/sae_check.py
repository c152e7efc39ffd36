"""Checks that an SAE belongs to a model: by its names before anything is run, then by its numbers on a few tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data.prompts import PromptSet
from sts_fast.errors import InputError
from sts_fast.model.hooks import Hook
from sts_fast.model.model_names import model_type, same_model
from sts_fast.model.reader import Reader
from sts_fast.ops.devices import doubled
from sts_fast.ops.encode import encode
from sts_fast.places import PLACES, place_name, split_name
from sts_fast.sae import SAE

if TYPE_CHECKING:
    import torch

# Most tokens that are measured; most for each remedy tried; fewest for a verdict.
N_TOKENS, N_TRIAL_TOKENS, LEAST_TOKENS = 1024, 256, 32
# Shares of variance. DOUBTFUL: remedies are tried below it. CLEARLY_MORE: least gain of a remedy. TOO_LOW: a warning
# below it even without a remedy. AS_WELL: remedies within it of the best count as equal.
DOUBTFUL, CLEARLY_MORE, TOO_LOW, AS_WELL = 0.85, 0.1, 0.4, 0.03
# Largest ratio, in either direction, of the mean number of active features to that in training.
MOST_L0_RATIO = 3.0
# Number of lower layers that are tried too: they are run anyway.
N_LOWER_LAYERS = 3


@dataclass(frozen=True)
class Fit:
    """Fit of an SAE to the model, measured on a few tokens of the first training set.

    n_tokens:    tokens read, without demonstrations and attention sinks
    variance_explained: 1 - E||x - x'||^2 / E||x - E x||^2, x' the features of x decoded (for a transcoder, x is the
                 place that it predicts); None where the checkpoint has no decoder
    mean_l0:     features that fire per token
    expected_l0: the same in training, if the SAE's files contain it
    dead_share:  share of all features that fire on none of these tokens
    fits:        true if these numbers are those of an SAE of this model; None where they allow no verdict
    warning:     one sentence where the SAE seems not to belong to the model, with the remedy, if one is known
    names:       one sentence where its files name another model
    """

    n_tokens: int
    variance_explained: float | None
    mean_l0: float
    expected_l0: float | None
    dead_share: float
    fits: bool | None
    warning: str | None
    names: str | None = None


def check_names(sae: SAE, config: Any, name: str) -> str | None:
    """Compares the model that an SAE was trained on with a model's config, before any weight is loaded.

    config: of a Hugging Face model
    name:   its folder or hub id

    Returns a warning where the names are those of different models. Names of which one extends the other give none,
    because the model may have been tuned further. Raises InputError where the SAE reads another number of dimensions.
    """
    text = config.get_text_config()
    place, layer = split_name(sae.hook_name)
    if place in PLACES and place != "hook_z" and sae.d_in != text.hidden_size:
        where = f"after layer {layer}" if place == "resid_post" else f"at {sae.hook_name}"
        raise InputError(
            f"the SAE {sae.source} reads {sae.d_in} dimensions, but {name} has {text.hidden_size} {where}: "
            "give an SAE that was trained on this place of this model"
        )
    names = {str(name), str(getattr(config, "_name_or_path", "") or name)}
    related = {same_model(sae.model_name, model_name) for model_name in names}
    if not sae.model_name or True in related:
        return None
    mismatch = f"the SAE {sae.source} was trained on {sae.model_name}, not on {name}"
    if (other := model_type(sae.model_name)) and not f"{text.model_type}_".startswith(f"{other}_"):
        return f"{mismatch}, a model of type {text.model_type}: give an SAE of this model"
    from_hub = "/" in str(name) and not str(name).startswith(("/", ".", "~"))
    hedge = ", unless it is that one tuned further" if related == {None} else ""
    return f"{mismatch}: give an SAE of this model{hedge}" if from_hub or False in related else None


def check_width(sae: SAE, hook: Hook, name: str) -> None:
    """Raises InputError where an SAE reads another number of dimensions than a hook of the model `name` has."""
    if sae.d_in != hook.d_in:
        raise InputError(
            f"the SAE {sae.source} reads {sae.d_in} dimensions, but {name} has {hook.d_in} {hook.where}: "
            "give an SAE that was trained on this place of this model"
        )


def measure_fit(reader: Reader, saes: Sequence[SAE], prompt_set: PromptSet) -> list[Fit]:
    """Measures the fit of each SAE on at most N_TOKENS tokens of a training set's first prompts.

    Places that transcoders predict, and lower layers, are read too where the reader has them.
    """
    beside = {place for sae in saes for place in (sae.target_hook_name, *_lower_places(sae)) if place}
    rows = reader.sample(prompt_set, sorted(beside), N_TOKENS)
    fits = []
    for sae in saes:
        elsewhere = {place: rows[place] for place in _lower_places(sae) if place in rows}
        fits.append(_fit(sae, rows[sae.hook_name], rows.get(sae.target_hook_name), elsewhere))
    return fits


def _lower_places(sae: SAE) -> list[str]:
    place, layer = split_name(sae.hook_name)
    if layer is None or place not in ("resid_pre", "resid_post") or sae.target_hook_name:
        return []
    return [place_name(place, lower) for lower in range(max(0, layer - N_LOWER_LAYERS), layer)]


def _fit(sae: SAE, acts: torch.Tensor, target: torch.Tensor | None, elsewhere: dict[str, torch.Tensor]) -> Fit:
    import torch

    n = len(acts)
    if not bool(torch.isfinite(acts).all()) or n == 0:  # the pass over the prompts names the example
        return Fit(0, None, 0.0, sae.l0, 1.0, None, None)
    features = encode(sae, acts)
    explained = None if sae.target_hook_name and target is None else _explained(sae, acts, target)
    mean_l0 = len(features.indices) / n
    warning = None
    if n >= LEAST_TOKENS:
        if mean_l0 == 0:
            warning = "none of its features fires"
        elif explained is not None and explained < DOUBTFUL:
            warning = _low_variance(sae, acts, target, elsewhere, explained)
        if warning is None and sae.l0 and not 1 / MOST_L0_RATIO <= mean_l0 / sae.l0 <= MOST_L0_RATIO:
            warning = f"{mean_l0:.3g} of its features fire per token, but {sae.l0:.3g} did in training"
    if warning is not None:
        warning = f"the SAE {sae.source} may not belong to {sae.hook_name} of this model: {warning}"
    can_tell = n >= LEAST_TOKENS and (explained is not None or bool(sae.l0) or mean_l0 == 0)
    return Fit(
        n_tokens=n,
        variance_explained=explained,
        mean_l0=mean_l0,
        expected_l0=sae.l0,
        dead_share=1 - len(np.unique(features.indices)) / sae.d_sae,
        fits=warning is None if can_tell else None,
        warning=warning,
    )


def _explained(sae: SAE, acts: torch.Tensor, target: torch.Tensor | None = None, scale: float = 1.0) -> float | None:
    """Share of the variance that the decoder reconstructs; the SAE reads the rows times `scale`."""
    decoded = sae.reconstruct(acts * scale, encode(sae, acts * scale))
    if decoded is None:
        return None
    wanted = doubled(acts if target is None else target)
    left = float(((wanted - doubled(decoded) / scale) ** 2).sum())
    total = float(((wanted - wanted.mean(dim=0)) ** 2).sum())
    return 1 - left / total if total and math.isfinite(left) else None


def _low_variance(
    sae: SAE, acts: torch.Tensor, target: torch.Tensor | None, elsewhere: dict[str, torch.Tensor], explained: float
) -> str | None:
    """The likely problem, with a remedy that explains clearly more if there is one; None where variance suffices."""
    some = slice(None, None, max(1, len(acts) // N_TRIAL_TOKENS))
    acts, wanted = acts[some], None if target is None else target[some]
    tried: list[tuple[float, str]] = []

    def attempt(words: str, sae: SAE, rows: torch.Tensor, scale: float = 1.0) -> None:
        value = _explained(sae, rows, wanted, scale)
        if value is not None:
            tried.append((value, words))

    norms = doubled(acts).norm(dim=-1)
    if sae.input_scale != 1:
        attempt("leave out --norm-scaling-factor", replace(sae, input_scale=1.0), acts)
    elif sae.input_norm == "none":
        for size, trained in (
            (float(norms.mean()) / math.sqrt(sae.d_in), "scaled to a mean norm of the root of d_in"),
            (math.sqrt(float((norms**2).mean())), "scaled to a mean squared norm of 1"),
        ):
            try:
                scaled = sae.scaled(1 / size)
            except InputError:  # its files do not ask for a scaling
                attempt(f"it was trained on inputs {trained}, which its files do not say", sae, acts, 1 / size)
            else:
                words = f"it was trained on inputs {trained}: give --norm-scaling-factor {1 / size:.4g}"
                attempt(words, scaled, acts)
        for norm in ("layer_norm", "constant_norm_rescale"):
            words = f"its files should say normalize_activations '{norm}'"
            attempt(words, replace(sae, input_norm=norm), acts)
    else:
        attempt("its files should not ask for a normalisation", replace(sae, input_norm="none"), acts)
    if not sae.target_hook_name:
        words = f"its files should say apply_b_dec_to_input {str(not sae.apply_b_dec_to_input).lower()}"
        attempt(words, replace(sae, apply_b_dec_to_input=not sae.apply_b_dec_to_input), acts)
    for place, rows in elsewhere.items():
        attempt(f"read it at {place}", sae, rows[some])
    best = max((value for value, _ in tried), default=-math.inf)
    # Of remedies that explain as much, the first: where norms differ little, all scale alike.
    best, words = next((attempted for attempted in tried if attempted[0] >= best - AS_WELL), (best, ""))
    if best >= (_explained(sae, acts, wanted) or 0.0) + CLEARLY_MORE and best >= TOO_LOW:
        hedge = "" if best >= DOUBTFUL or "read it at" in words else ", or it is of another layer"
        return f"it explains {_percent(explained)} of the variance, but {_percent(best)} otherwise: {words}{hedge}"
    if explained < TOO_LOW:
        remedy = " (give --norm-scaling-factor then)" if sae.needs_scaling else ""
        return (
            f"it explains {_percent(explained)} of the variance: is it of another model or layer, or trained on inputs "
            f"that were normalised{remedy}?"
        )
    return None


def _percent(share: float) -> str:
    return f"{share:.0%}" if share > 0 else "none"
