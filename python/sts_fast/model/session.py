"""A model, its tokenizer and the SAEs that it is read with, each opened once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from sts_fast.data.examples import Example
from sts_fast.data.options import Checked, Option
from sts_fast.data.prompts import Progress, PromptSet
from sts_fast.data.sets import Kind, Sampling, Strict, check_enough, common_template
from sts_fast.data.template import PromptTemplate
from sts_fast.errors import InputError
from sts_fast.files import NOTHING_KEPT, Kept
from sts_fast.model.checkpoint import Checkpoint
from sts_fast.model.hooks import Hook
from sts_fast.model.language_model import LanguageModel, load_decoder, load_language_model
from sts_fast.model.reader import Reader
from sts_fast.model.sae_check import Fit, check_names, check_width, measure_fit
from sts_fast.model.stored import MODEL_FOLDER, Activations, is_activations
from sts_fast.model.weights import DeviceMap, check_placement, model_sha256
from sts_fast.ops.verified import verdict
from sts_fast.places import layer_of, place_name, split_name
from sts_fast.sae import SAE, load_sae

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SAESource = str | Path | SAE
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SAEDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Loading(Checked):
    """Options of loading a model.

    dtype, device: see load_decoder
    device_map: spreads the model over devices, memory and disk; see weights.Placement
    trust_remote_code: see Checkpoint
    """

    TITLE = "Model"

    dtype: Annotated[Dtype, Option("Of the model; auto is float32 on the CPU.")] = "auto"
    device: Annotated[str, Option("cpu, cuda, cuda:1, xpu, mps; auto takes a GPU if present.")] = "auto"
    device_map: Annotated[
        DeviceMap | None,
        Option(
            "Spread the model: auto, balanced, balanced_low_0 or sequential (GPUs, then memory, then disk), cpu, or "
            "disk (layers stay there)."
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, Option("Run Python code that comes with the model's files; read that code first.")
    ] = False


class LoadingOptions(TypedDict, total=False):
    """`Loading` as keywords."""

    dtype: Dtype
    device: str
    device_map: DeviceMap | None
    trust_remote_code: bool


@dataclass(frozen=True)
class Running(Loading):
    """Options of running a model.

    batch_tokens: most tokens of one forward pass; None: as many as the free memory allows
    progress:  called with (stage, prompts done, prompts in all)
    say:       called with a line about how the run goes: how the model is run, what went wrong and was put right, or
               a warning that should not wait for its end
    kept:      what has been computed, from which an interrupted run goes on
    """

    TITLE = "Model"

    batch_tokens: Annotated[
        int | None, Option("Most tokens of one forward pass; default: what memory allows.", least=1)
    ] = None
    progress: Progress | None = None
    say: Callable[[str], None] | None = None
    kept: Kept = NOTHING_KEPT

    def tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def tell_line(self, line: str) -> None:
        if self.say is not None:
            self.say(line)


class RunningOptions(LoadingOptions, total=False):
    """`Running` as keywords."""

    batch_tokens: int | None
    progress: Progress | None
    say: Callable[[str], None] | None
    kept: Kept


@dataclass(frozen=True)
class Reading(Running):
    """Options of reading a model with its SAEs.

    layer:     reads the residual stream after this layer, whatever the SAE's files say; hook: the same by name. The
               command line says this of each SAE apart
    sae_dtype: of the SAEs; None as stored
    strict:    raises InputError at a bad row, a domain that cannot be used, or an SAE that does not seem to fit
    command:   recorded in the provenance
    """

    TITLE = "Model"

    layer: int | None = None
    hook: str | None = None
    strict: Strict = False
    sae_dtype: Annotated[SAEDtype | None, Option("Of the SAE; default: as stored.")] = None
    command: str | None = None

    def warn(self, *warnings: str | None) -> None:
        """Tells at once what is amiss, or stops there, as `strict` says."""
        for warning in filter(None, warnings):
            if self.strict:
                raise InputError(f"{warning} (--strict)")
            self.tell_line(f"warning: {warning}")


class ReadingOptions(RunningOptions, total=False):
    """`Reading` as keywords."""

    layer: int | None
    hook: str | None
    strict: bool
    sae_dtype: SAEDtype | None
    command: str | None


@dataclass(frozen=True)
class Purpose:
    """The purpose of a session, which decides what of it is opened at once.

    whole: reads in the whole model, head included, because that is needed anyway
    texts: prompts are written, for which a tokenizer is needed
    run:   something is run; if not, no weights are loaded
    needs: (what, why) that stored activations cannot give
    """

    whole: bool = False
    texts: bool = True
    run: bool = True
    needs: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, eq=False)
class Session:
    """A model, its tokenizer and the SAEs that it is read with. Use `open`; every part is loaded once.

    model:  as it was given: a folder or hub id, a model in memory, or a folder of activations
    saes:   read at the reader's hooks; places: further hooks
    reads_whole: the reader runs in the whole model, which is loaded for it
    given_tokenizer, given_tuned: as they were given
    """

    model: str | Path | PreTrainedModel
    saes: list[SAE]
    reading: Reading
    places: Sequence[str]
    reads_whole: bool
    given_tokenizer: PreTrainedTokenizerBase | None
    given_tuned: str | Path | PreTrainedModel | None

    @classmethod
    def open(
        cls,
        model: str | Path | PreTrainedModel,
        saes: Sequence[SAESource],
        reading: Reading = Reading(),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tuned: str | Path | PreTrainedModel | None = None,
        places: Sequence[str] = (),
        top_n: int = 0,
        purpose: Purpose = Purpose(),
    ) -> Session:
        """Opens a model and its SAEs, and checks them against each other.

        tokenizer: of a model in memory; tuned: the model after training
        places: hooks to read besides those of the SAEs
        top_n:  features that every SAE must have

        Raises InputError where model and SAEs do not go together, and warns where they only seem not to; ValueError
        where the tokenizer of a model in memory is missing.
        """
        if is_activations(model):
            for what, why in purpose.needs:
                raise InputError(
                    f"{what} needs {why}, but {model} holds activations: give a folder or hub id of a model with "
                    "--model"
                )
        check_placement(reading.device, reading.device_map)
        opened = [open_sae(sae, reading, top_n) for sae in saes]
        session = cls(model, opened, reading, places, purpose.whole, tokenizer, tuned)
        reading.warn(*session.names)
        if session.tuned_checkpoint is not None:
            reading.warn(session.tuned_checkpoint.base_warning, session.tuned_difference)
        # Whatever can be wrong is told now, and the smallest files are read first.
        for sae in opened:
            session.check_place(sae)
        parts = (("template",) if purpose.texts else ()) + (("reader", "tuned") if purpose.run else ())
        for part in parts:
            getattr(session, part)
        return session

    @cached_property
    def activations(self) -> Activations | None:
        if not is_activations(self.model):
            return None
        reading = self.reading
        return Activations(self.model, device=reading.device, trust_remote_code=reading.trust_remote_code)

    @property
    def name(self) -> str:
        """The model's name in errors."""
        if self.activations is not None:
            return self.activations.name
        return "the model" if self._files is None else str(self._files)

    @property
    def _files(self) -> str | Path | None:
        """The place of config and tokenizer; None for a model in memory."""
        if self.activations is not None:
            return self.activations.folder / MODEL_FOLDER
        return self.model if isinstance(self.model, (str, Path)) else None

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The model's files; None for a model in memory."""
        trusts = self.reading.trust_remote_code
        return None if self._files is None else Checkpoint(self._files, trust_remote_code=trusts)

    @cached_property
    def tuned_checkpoint(self) -> Checkpoint | None:
        """The files of the model after training, which may be an adapter of the model; None for one in memory."""
        if not isinstance(self.given_tuned, (str, Path)):
            return None
        base = self.model if isinstance(self.model, (str, Path)) and self.activations is None else None
        return Checkpoint(self.given_tuned, trust_remote_code=self.reading.trust_remote_code, base=base)

    @cached_property
    def tuned_difference(self) -> str | None:
        """A warning where the model after training is of another architecture.

        Raises InputError where more than 1% of the tokens have another id in its tokenizer.
        """
        tuned = self.tuned_checkpoint
        if tuned is None:
            return None
        if tuned.has_tokenizer and (self.given_tokenizer is not None or self.checkpoint is not None):
            own, others = self.tokenizer.get_vocab(), tuned.tokenizer.get_vocab()
            token_of = {index: token for token, index in others.items()}
            differing = [token for token, index in own.items() if token_of.get(index, token) != token]
            # Training may have renamed a few reserved tokens.
            if len(differing) > len(own) // 100:
                index = own[differing[0]]
                raise InputError(
                    f"--tuned {tuned} has another tokenizer than {self.name} ({len(differing)} tokens differ; id "
                    f"{index} is {token_of[index]!r}, not {differing[0]!r}): give a model trained from {self.name}"
                )
        kind, other = (config.get_text_config().model_type for config in (self.config, tuned.config))
        return None if kind == other else f"--tuned {tuned} is of the type {other}, but {self.name} of the type {kind}"

    @cached_property
    def config(self) -> PretrainedConfig:
        return self.model.config if self.checkpoint is None else self.checkpoint.config  # type: ignore[union-attr]

    @property
    def context_length(self) -> int | None:
        """Most tokens that a prompt may have; None where the model's config sets no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def check_place(self, sae: SAE) -> None:
        """Raises InputError where the model's config says that it has no such layer, or one of another width."""
        config = self.config.get_text_config()
        layer = layer_of(sae.hook_name, config.num_hidden_layers, name=self.name)
        if split_name(sae.hook_name)[0] in ("resid_pre", "resid_post"):
            check_width(sae, Hook(sae.hook_name, "", "output", layer, config.hidden_size), self.name)

    @cached_property
    def names(self) -> list[str | None]:
        """By SAE, a warning where its files name another model."""
        return [check_names(sae, self.config, self.name) for sae in self.saes]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        if self.checkpoint is None:
            raise ValueError("a model in memory needs its tokenizer: give tokenizer=...")
        return self.checkpoint.tokenizer

    @cached_property
    def template(self) -> PromptTemplate:
        """Template that prompts are written with: as all SAEs were trained, and with BOS where there is no SAE."""
        if not self.saes:
            return PromptTemplate(self.tokenizer, prepend_bos=True)
        return common_template(self.tokenizer, [(sae.source, sae.prepend_bos) for sae in self.saes])

    @cached_property
    def reader(self) -> Reader:
        if self.activations is not None:
            self.activations.check_template(self.template, self.saes[0])
            self.activations.read_at(self.saes)
            return self.activations
        decoder = self._decoder(
            self.whole if self.reads_whole else self.checkpoint or self.model, self.name, self.reading
        )
        if decoder.device.type == "cuda" and (found := verdict(decoder.device)).loop is None:
            self.reading.tell_line(f"on {decoder.device}, features are computed by torch: {found.why}")
        return decoder

    @cached_property
    def tuned(self) -> LanguageModel | None:
        """The model after training, read at the same hooks."""
        if self.given_tuned is None:
            return None
        reading = self.reading
        if self._files is None and reading.device == "auto" and reading.device_map is None:
            # One read from files joins the one in memory.
            reading = replace(reading, device=str(self.reader.device))  # type: ignore[attr-defined]
        return self._decoder(self.tuned_checkpoint or self.given_tuned, "the tuned model", reading)

    @cached_property
    def whole(self) -> Any:
        """The causal language model with its head."""
        if self.checkpoint is None:
            return self.model
        reading = self.reading
        return load_language_model(
            self.checkpoint, dtype=reading.dtype, device=reading.device, device_map=reading.device_map
        )

    @cached_property
    def kept(self) -> Kept:
        """What has been computed with the whole model; nothing where its weights are on disk, and not told apart."""
        if self.reading.kept.folder is None or (of_model := model_sha256(self.whole)) is None:
            return NOTHING_KEPT
        return self.reading.kept.of(of_model)

    @cached_property
    def outline(self) -> torch.nn.Module:
        """The decoder without its weights: modules and shapes only; the decoder itself of a model in memory."""
        import torch
        from transformers import AutoModel

        if self._files is None:
            return self.model.base_model  # type: ignore[union-attr]
        with torch.device("meta"):
            model: torch.nn.Module = AutoModel.from_config(  # type: ignore[no-untyped-call]
                self.config, trust_remote_code=self.reading.trust_remote_code
            )
        return model

    @property
    def has_head(self) -> bool:
        """True where the model can say how likely an answer is; one of files always can."""
        return isinstance(self.model, (str, Path)) or self.model.get_output_embeddings() is not None  # type: ignore[no-untyped-call]

    def prompts(
        self,
        kind: Kind,
        name: str,
        examples: Sequence[Example],
        demos: Sequence[Example] | None,
        sampling: Sampling,
        *,
        show: bool,
        enough: bool = True,
    ) -> PromptSet:
        """Prompts of a training set or domain. show: with demonstrations; enough: whether there must be enough of them.

        Raises InputError where prompts cannot be made of the set, or were not captured in this way; SetTooSmall where
        there are too few.
        """
        if self.activations is not None:
            made = self.activations.prompts(kind, name, examples, demos, sampling, show=show)
        else:
            made = sampling.prompts(name, examples, demos, self.template, self.context_length, kind=kind, show=show)
        if enough:
            check_enough(made, self.context_length, kind)
        return made

    def check_fit(self, prompt_set: PromptSet) -> list[Fit]:
        """Judges each SAE by the first tokens of a training set; see sae_check.Fit.

        Raises InputError or warns, as the session's reading has it, where one does not seem to belong.
        """
        measured = measure_fit(self.reader, self.saes, prompt_set)
        self.reading.warn(*(fit.warning for fit in measured))
        return [replace(fit, names=name) for fit, name in zip(measured, self.names, strict=True)]

    def _decoder(self, model: Any, name: str, reading: Reading) -> LanguageModel:
        """A model, read at the session's hooks; name: how errors call one in memory."""
        places = list(dict.fromkeys([*(sae.hook_name for sae in self.saes), *self.places]))
        if isinstance(model, Checkpoint):
            decoder = load_decoder(
                model, *places, dtype=reading.dtype, device=reading.device, device_map=reading.device_map
            )
        else:
            decoder = LanguageModel(model, *places, name=name)
        for sae in self.saes:
            check_width(sae, decoder.hook(sae), decoder.name)
        decoder.passes.batch_tokens = reading.batch_tokens
        decoder.passes.say = reading.say or decoder.passes.say
        return decoder


def open_sae(source: SAESource, reading: Reading, top_n: int = 0) -> SAE:
    """The SAE of a source, where and as it is to be read.

    Raises InputError where it has fewer than top_n features, or nothing says where it reads.
    """
    if reading.layer is not None and reading.hook is not None:
        raise InputError("--layer and --hook say the same thing: give one of them")
    if isinstance(source, SAE):
        hook = reading.hook if reading.layer is None else place_name("resid_post", reading.layer)
        sae = source if hook is None else replace(source, hook_name=hook)
    else:
        sae = load_sae(source, layer=reading.layer, hook=reading.hook, dtype=reading.sae_dtype)
    if reading.sae_dtype is not None:
        sae = sae.with_dtype(reading.sae_dtype)
    if top_n > sae.d_sae:
        raise InputError(f"--top-n is {top_n}, but the SAE {sae.source} has {sae.d_sae} features")
    if not sae.hook_name:
        raise InputError(f"the SAE {sae.source} does not say which layer it reads: give --layer, or --hook")
    return sae
