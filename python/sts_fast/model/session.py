"""The model, the SAEs and the tokenizer that a forecast reads with, opened together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_fast.data.prompts import PromptTemplate
from sts_fast.data.sets import common_template
from sts_fast.errors import InputError
from sts_fast.model.language_model import LanguageModel, load_config, load_decoder, load_language_model, load_tokenizer
from sts_fast.model.reader import Reader
from sts_fast.model.sae_check import check_names, check_width
from sts_fast.model.stored import MODEL_FOLDER, Activations
from sts_fast.model.weights import DeviceMap
from sts_fast.ops import cuda
from sts_fast.places import place_name
from sts_fast.sae import SAE, load_sae

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAESource = str | Path | SAE


@dataclass(frozen=True)
class Reading:
    """How a model and its SAEs are read.

    layer:     reads the residual stream after this layer, whatever the SAE's files say
    dtype, device: of the model, see load_decoder; sae_dtype: 'float32' or 'bfloat16', None as stored
    device_map: spreads the model over devices, memory and disk; see weights.Placement
    batch_tokens: most tokens of one forward pass; None: as many as the free memory allows
    say:       called with a line about how the run goes
    strict:    raises InputError where an SAE does not seem to belong to the model, instead of a warning
    """

    layer: int | None = None
    dtype: str = "auto"
    sae_dtype: str | None = None
    device: str = "auto"
    device_map: DeviceMap | None = None
    batch_tokens: int | None = None
    say: Callable[[str], None] | None = None
    strict: bool = False

    def warn(self, *warnings: str | None) -> None:
        """Tells at once, or stops, where an SAE does not seem to belong."""
        for warning in filter(None, warnings):
            if self.strict:
                raise InputError(f"{warning} (--strict)")
            self.tell_line(f"warning: {warning}")

    def tell_line(self, line: str) -> None:
        if self.say is not None:
            self.say(line)


@dataclass(frozen=True)
class Session:
    """What a forecast reads with.

    source: the model as it was given; reader: it, read where the SAEs read; tuned: the model after training, likewise
    names:  by SAE, that its files name another model, if they do
    """

    source: str | Path | PreTrainedModel
    reader: Reader
    tuned: LanguageModel | None
    saes: list[SAE]
    names: list[str | None]
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate


def open_model(
    model: str | Path | PreTrainedModel,
    saes: list[SAE],
    tuned: str | Path | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reading: Reading,
    activations: Activations | None = None,
) -> Session:
    """Raises InputError where model and SAEs do not go together, and warns where they only seem not to."""
    source = model if activations is None else activations.folder / MODEL_FOLDER
    tokenizer = tokenizer or (load_tokenizer(source) if isinstance(source, (str, Path)) else None)
    if tokenizer is None:
        raise ValueError("a model in memory needs its tokenizer: give tokenizer=...")
    config = load_config(source) if isinstance(source, (str, Path)) else source.config
    model_name = str(model) if isinstance(model, (str, Path)) else "the model"
    model_name = model_name if activations is None else activations.name
    names = [check_names(sae, config, model_name) for sae in saes]
    reading.warn(*names)
    template = common_template(tokenizer, [(sae.source, sae.prepend_bos) for sae in saes])
    reader: Reader
    if activations is not None:
        activations.check_template(template, saes[0])
        activations.read_at(saes)
        reader = activations
    else:
        reader = decoder = _decoder(model, saes, reading, name="the model")
        if decoder.device.type == "cuda" and (reason := cuda.missing_reason()) is not None:
            reading.tell_line(f"the model runs on {decoder.device}, its features are computed on the CPU: {reason}")
    opened_tuned = None
    if tuned is not None:
        beside = reading
        anywhere = reading.device == "auto" and reading.device_map is None
        if anywhere and isinstance(reader, LanguageModel) and not isinstance(model, (str, Path)):
            beside = replace(reading, device=str(reader.device))  # one read from files joins the one in memory
        opened_tuned = _decoder(tuned, saes, beside, name="the tuned model")
    return Session(model, reader, opened_tuned, saes, names, tokenizer, template)


def loaded_sae(source: SAESource, reading: Reading, top_n: int) -> SAE:
    """The SAE of a source, where and as it is to be read; top_n: features of D_N, which it must have."""
    sae = source if isinstance(source, SAE) else load_sae(source, layer=reading.layer, dtype=reading.sae_dtype)
    if isinstance(source, SAE) and reading.layer is not None:
        sae = replace(sae, hook_name=place_name("resid_post", reading.layer))
    if reading.sae_dtype is not None:
        sae = sae.with_dtype(reading.sae_dtype)
    if top_n > sae.d_sae:
        raise InputError(f"--top-n is {top_n}, but the SAE {sae.source} has {sae.d_sae} features")
    if not sae.hook_name:
        raise InputError(f"the SAE {sae.source} does not say which layer it reads: give --layer, or --hook")
    return sae


def _decoder(model: str | Path | PreTrainedModel, saes: Sequence[SAE], reading: Reading, *, name: str) -> LanguageModel:
    """The model, to be read where the SAEs read."""
    places = list(dict.fromkeys(sae.hook_name for sae in saes))
    if isinstance(model, (str, Path)):
        decoder = load_decoder(
            model, *places, dtype=reading.dtype, device=reading.device, device_map=reading.device_map
        )
    else:
        decoder = LanguageModel(model, *places, name=name)
    for sae in saes:
        check_width(sae, decoder.hook(sae), decoder.name)
    decoder.passes.batch_tokens = reading.batch_tokens
    decoder.passes.say = reading.say or decoder.passes.say
    return decoder


def with_head(model: str | Path | PreTrainedModel, reading: Reading) -> Any:
    """The whole model."""
    if isinstance(model, (str, Path)):
        return load_language_model(model, dtype=reading.dtype, device=reading.device, device_map=reading.device_map)
    return model
