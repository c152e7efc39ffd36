"""The model, the SAEs and the tokenizer that a forecast reads with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_fast.activations import MODEL_FOLDER, Activations
from sts_fast.capture import Decoder, load_config, load_decoder, load_language_model, load_tokenizer
from sts_fast.data.prompts import PromptTemplate
from sts_fast.data.sets import common_template
from sts_fast.errors import InputError
from sts_fast.fit import check_names, check_width
from sts_fast.ops import cuda
from sts_fast.places import place_name
from sts_fast.sae import SAE, load_sae
from sts_fast.settings import Settings
from sts_fast.shifted import hook_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAESource = str | Path | SAE


@dataclass(frozen=True)
class Opened:
    """What a forecast reads with.

    source: the model as it was given; reader: it, read where the SAEs read; tuned: the model after training, likewise
    names:  by SAE, that its files name another model, if they do
    """

    source: str | Path | PreTrainedModel
    reader: Decoder | Activations
    tuned: Decoder | None
    saes: list[SAE]
    names: list[str | None]
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate


def open_model(
    model: str | Path | PreTrainedModel,
    saes: list[SAE],
    tuned: str | Path | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Settings,
    activations: Activations | None = None,
) -> Opened:
    """Raises InputError where model and SAEs do not go together, and warns where they only seem not to."""
    source = model if activations is None else activations.folder / MODEL_FOLDER
    tokenizer = tokenizer or (load_tokenizer(source) if isinstance(source, (str, Path)) else None)
    if tokenizer is None:
        raise ValueError("a model in memory needs its tokenizer: give tokenizer=...")
    config = load_config(source) if isinstance(source, (str, Path)) else source.config
    model_name = str(model) if isinstance(model, (str, Path)) else "the model"
    model_name = model_name if activations is None else activations.name
    names = [check_names(sae, config, model_name) for sae in saes]
    settings.warn(*names)
    template = common_template(tokenizer, [(sae.source, sae.prepend_bos) for sae in saes])
    reader: Decoder | Activations
    if activations is not None:
        activations.check_template(template, saes[0])
        activations.read_at(saes)
        reader = activations
    else:
        reader = _decoder(model, saes, settings, name="the model")
        if reader.device.type == "cuda" and (reason := cuda.missing_reason()) is not None:
            settings.tell_line(f"the model runs on {reader.device}, its features are computed on the CPU: {reason}")
    opened_tuned = None
    if tuned is not None:
        beside = settings
        anywhere = settings.device == "auto" and settings.device_map is None
        if anywhere and isinstance(reader, Decoder) and not isinstance(model, (str, Path)):
            beside = replace(settings, device=str(reader.device))  # one read from files joins the one in memory
        opened_tuned = _decoder(tuned, saes, beside, name="the tuned model")
    return Opened(model, reader, opened_tuned, saes, names, tokenizer, template)


def loaded_sae(source: SAESource, settings: Settings) -> SAE:
    sae = source if isinstance(source, SAE) else load_sae(source, layer=settings.layer, dtype=settings.sae_dtype)
    if isinstance(source, SAE) and settings.layer is not None:
        sae = replace(sae, hook_name=place_name("resid_post", settings.layer))
    if settings.sae_dtype is not None:
        sae = sae.with_dtype(settings.sae_dtype)
    if settings.top_n > sae.d_sae:
        raise InputError(f"--top-n is {settings.top_n}, but the SAE {sae.source} has {sae.d_sae} features")
    if not sae.hook_name:
        raise InputError(f"the SAE {sae.source} does not say which layer it reads: give --layer, or --hook")
    return sae


def _decoder(model: str | Path | PreTrainedModel, saes: Sequence[SAE], settings: Settings, *, name: str) -> Decoder:
    """The model, to be read where the SAEs read."""
    places = list(dict.fromkeys(sae.hook_name for sae in saes))
    if isinstance(model, (str, Path)):
        decoder = load_decoder(
            model, *places, dtype=settings.dtype, device=settings.device, device_map=settings.device_map
        )
    else:
        decoder = Decoder(model, *places, name=name)
    for sae in saes:
        check_width(sae, hook_of(decoder, sae), decoder.name)
    decoder.passes.batch_tokens = settings.batch_tokens
    decoder.passes.say = settings.say or decoder.passes.say
    return decoder


def with_head(model: str | Path | PreTrainedModel, settings: Settings) -> Any:
    """The whole model."""
    if isinstance(model, (str, Path)):
        return load_language_model(model, dtype=settings.dtype, device=settings.device, device_map=settings.device_map)
    return model
