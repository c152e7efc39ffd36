"""Residual streams as files: captured once, read again by every SAE. docs/activations.md describes the format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, get_args

import numpy as np

from sts_fast import cuda, files, results
from sts_fast._version import __version__
from sts_fast.capture import Decoder, PairedRows, capture, load_config, load_decoder, load_tokenizer
from sts_fast.errors import InputError
from sts_fast.examples import Example
from sts_fast.fit import N_TOKENS, check_names, check_width
from sts_fast.hooks import Hook, split_name
from sts_fast.prompts import Prompt, PromptSet, PromptTemplate, TokenClass, prompts_sha256
from sts_fast.sae import SAE
from sts_fast.sets import Fields, Kind, Sampling, Sets, Source, check_enough, common_template
from sts_fast.weights import DeviceMap

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT, VERSION = "sts-fast activations", 1
INDEX_FILE, MODEL_FOLDER, SETS_FOLDER, PROMPTS_FILE = "activations.json", "model", "sets", "prompts.parquet"
PROMPT_COLUMNS = ("base_ids", "demos_ids", "positions", "paired", "paired_demos")
STORED_DTYPES = ("bfloat16", "float32")
# A shard is closed behind the batch that brings it to so many prompts: what a killed run loses at most.
SHARD_PROMPTS = 32
# What a forecast from a folder records in the place of ForwardPasses.summary().
NO_PASSES: dict[str, Any] = {
    **{"strategy": None, "why": "activations were read from files", "batch_tokens": None},
    **{"n_passes": 0, "n_tokens": 0, "seconds": 0.0, "tokens_per_second": None},
}


def is_activations(source: object) -> TypeGuard[str | Path]:
    """Whether a --model is a folder of activations."""
    return isinstance(source, (str, Path)) and (Path(source) / INDEX_FILE).is_file()


@dataclass(frozen=True)
class _Shard:
    """A file of rows, and the prompts (by their row in prompts.parquet) that they are of, in the order of the rows.

    sha256: of the file; None where another tool wrote it without
    """

    file: str
    prompts: list[int]
    sha256: str | None = None

    def check(self, folder: Path) -> None:
        """Raises InputError where the file is missing or not what was written."""
        path = folder / self.file
        if not path.is_file():
            raise InputError(f"there is no shard {path}: run the same sts-fast capture again to write it")
        if self.sha256 is not None and files.sha256(path) != self.sha256:
            raise _damaged(path, f"its SHA-256 is not the one in {INDEX_FILE}")


@dataclass
class _Set:
    """A training set or domain as the index has it; the digests are None where another tool wrote it."""

    name: str
    kind: Kind
    folder: str
    n_prompts: int
    n_too_long: int = 0
    n_unanswered: int = 0
    warnings: tuple[str, ...] = ()
    examples_sha256: str | None = None
    demos_sha256: str | None = None
    prompts_sha256: str | None = None
    shards: list[_Shard] | None = None

    @property
    def n_captured(self) -> int:
        return sum(len(shard.prompts) for shard in self.shards or [])

    @property
    def title(self) -> str:
        return f"the training set '{self.name}'" if self.kind == "train" else f"the domain '{self.name}'"


@dataclass
class _Index:
    """What activations.json holds; settings are those of Sampling, and how the prompts start."""

    model: dict[str, Any]
    hooks: list[Hook]
    dtype: str
    settings: dict[str, Any]
    sets: list[_Set]

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "written_by": f"sts-fast {__version__}", **asdict(self)}

    def save(self, folder: Path) -> None:
        with files.atomic_path(folder / INDEX_FILE) as path:
            path.write_text(results.to_json(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> _Index:
        path = folder / INDEX_FILE
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            written = read["format"], read["version"]
            index = cls(
                model={"revision": None, "weights_sha256": None, **read["model"]},
                hooks=[_hook(one) for one in read["hooks"]],
                dtype=str(read.get("dtype")),
                settings=dict(read.get("settings", {})),
                sets=[_set(one) for one in read["sets"]],
            )
            if not index.hooks or not {"name", "dtype"} <= set(index.model):
                raise ValueError("it names no hook, or not the model's name and dtype")
        except KeyError as error:
            raise InputError(f"{path} lacks {error}: see docs/activations.md, or capture again") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}): see docs/activations.md, or capture again") from error
        if written != (FORMAT, VERSION):
            raise InputError(f"{path} is {written[0]} {written[1]}, but this reads {FORMAT} {VERSION}: capture again")
        return index


def _hook(one: Mapping[str, Any]) -> Hook:
    name = str(one["name"])
    layer = one.get("layer", split_name(name)[1])
    return Hook(
        name, one.get("path", name), one.get("side", "output"), layer, int(one["d_in"]), float(one.get("scale", 1))
    )


def _set(one: Mapping[str, Any]) -> _Set:
    if one["kind"] not in get_args(Kind):
        raise ValueError(f"a set is {' or '.join(get_args(Kind))}, not {one['kind']}")
    return _Set(
        name=str(one["name"]),
        kind=one["kind"],
        folder=str(one["folder"]),
        n_prompts=int(one["n_prompts"]),
        n_too_long=int(one.get("n_too_long", 0)),
        n_unanswered=int(one.get("n_unanswered", 0)),
        warnings=tuple(map(str, one.get("warnings", ()))),
        examples_sha256=one.get("examples_sha256"),
        demos_sha256=one.get("demos_sha256"),
        prompts_sha256=one.get("prompts_sha256"),
        shards=[
            _Shard(str(shard["file"]), [int(i) for i in shard["prompts"]], shard.get("sha256"))
            for shard in one["shards"]
        ],
    )


class Activations:
    """A folder of captured activations, which stands in for the model that they are of.

    name, dtype, revision, weights_sha256: of the model; context_length: most tokens of a prompt of it
    hooks: the places that are read, in the order of the SAEs given to `read_at`; before that, all that were captured
    device: where the rows go, as `load_decoder` has it

    Raises InputError where the folder is damaged, or was written by another version.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        self.folder = Path(folder)
        self._index = _Index.load(self.folder)
        self.hooks, self._stored = self._index.hooks, list(range(len(self._index.hooks)))
        self.name, self.dtype = str(self._index.model["name"]), str(self._index.model["dtype"])
        self.revision: str | None = self._index.model.get("revision")
        self.weights_sha256: str | None = self._index.model.get("weights_sha256")
        if not (self.folder / MODEL_FOLDER).is_dir():
            raise InputError(
                f"{self.folder} lacks the folder {MODEL_FOLDER} with the model's config and tokenizer: put them there, "
                "or capture again"
            )
        config = load_config(self.folder / MODEL_FOLDER)
        self.context_length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._device = device
        self._chosen: dict[tuple[Kind, str], tuple[_Set, PromptSet]] = {}

    def summary(self) -> str:
        """In words, what was captured."""
        n_prompts = sum(one.n_prompts for one in self._index.sets)
        n_bytes = sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))
        hooks = ", ".join(hook.name for hook in self._index.hooks)
        return f"{n_prompts:,} prompts of {len(self._index.sets)} sets at {hooks} ({n_bytes / 1e6:,.0f} MB)"

    def read_at(self, saes: Sequence[SAE]) -> None:
        """Reads where the SAEs read. Raises InputError where that was not captured, or has another width."""
        self.hooks, self._stored = [], []
        captured = self._index.hooks
        for sae in saes:
            same = (i for i, hook in enumerate(captured) if split_name(hook.name) == split_name(sae.hook_name))
            at = next(same, None)
            if at is None:
                raise InputError(
                    f"the SAE {sae.source} reads at {sae.hook_name}, but {self.folder} holds "
                    f"{', '.join(hook.name for hook in captured)}: capture again with --hook {sae.hook_name}"
                )
            check_width(sae, captured[at], self.name)
            if sae.hook_name not in [hook.name for hook in self.hooks]:
                self.hooks.append(replace(captured[at], name=sae.hook_name))
                self._stored.append(at)

    def check_sampling(self, sampling: Sampling, *, domain_shots: bool) -> None:
        """Raises InputError where prompts would be made in another way; domain_shots: whether those count."""
        for name, chosen in asdict(sampling).items():
            captured = self._index.settings.get(name, chosen)
            if chosen != captured and (domain_shots or name != "domain_shots"):
                option = "--" + name.replace("_", "-")
                captured = 0 if captured is None else captured
                raise InputError(
                    f"{self.folder} was captured with {option} {captured}, not {0 if chosen is None else chosen}: "
                    f"give {option} {captured}, or capture again"
                )

    def check_template(self, template: PromptTemplate, sae: SAE) -> None:
        """Raises InputError where the prompts start otherwise than those that an SAE was trained on."""
        starts = starts_with_bos(template)
        if self._index.settings.get("starts_with_bos", starts) != starts:
            raise InputError(
                f"the prompts in {self.folder} start {'without' if starts else 'with'} BOS, but the SAE {sae.source} "
                f"was trained on texts {'with' if starts else 'without'} it: capture again with --sae {sae.source}"
            )

    def prompts(
        self, kind: Kind, name: str, examples: Sequence[Example], demos: Sequence[Example] | None, *, show: bool
    ) -> PromptSet:
        """The prompts of a set as captured; a training set may bear another name now. show: with demonstrations.

        Raises InputError where the set was not captured, not whole, without the demonstrations, or of other examples.
        """
        of_kind = [one for one in self._index.sets if one.kind == kind]
        digest = examples_sha256(examples)
        found = next((one for one in of_kind if one.name == name), None)
        if found is None and kind == "train":
            found = next((one for one in of_kind if one.examples_sha256 == digest), None)
        if found is None:
            title = "training set" if kind == "train" else "domain"
            raise InputError(
                f"the {title} '{name}' was not captured in {self.folder}, which holds "
                f"{', '.join(one.name for one in of_kind) or 'none'}: capture again with it"
            )
        for what, captured, given in (
            ("examples", found.examples_sha256, digest),
            ("demonstrations", found.demos_sha256, "own" if demos is None else examples_sha256(demos)),
        ):
            if captured is not None and captured != given:
                raise InputError(
                    f"{found.title} was captured in {self.folder} with other {what}: give the same, or capture again"
                )
        if sorted(i for shard in found.shards or [] for i in shard.prompts) != list(range(found.n_prompts)):
            raise InputError(
                f"{self.folder} holds {found.n_captured} of the {found.n_prompts} prompts of {found.title}: run the "
                "same sts-fast capture again to finish it"
            )
        prompts = _read_prompts(self.folder / found.folder / PROMPTS_FILE, found)
        if show and not all(len(prompt.demos_ids) for prompt in prompts):
            remedy = "--dims active" if kind == "train" else "--estimators act"
            raise InputError(
                f"{found.title} was captured in {self.folder} without demonstrations: give {remedy}, or capture again "
                "with them"
            )
        if not show:
            prompts = [
                replace(p, demos_ids=p.demos_ids[:0], paired=p.paired[:0], paired_demos=p.paired_demos[:0])
                for p in prompts
            ]
        prompt_set = PromptSet(name, prompts, found.n_too_long, found.n_unanswered, tuple(found.warnings))
        self._chosen[kind, name] = found, prompt_set
        return prompt_set

    def rows(self, kind: Kind, prompt_set: PromptSet) -> Iterator[list[PairedRows]]:
        """What `capture` yielded of a set that `prompts` gave, a shard at a time, for each hook.

        Raises InputError where a shard is damaged.
        """
        found, _ = self._chosen[kind, prompt_set.name]
        for shard in found.shards or []:
            yield self._read_shard(shard, prompt_set, self._stored, self.hooks)

    def sample(self, prompt_set: PromptSet) -> dict[str, torch.Tensor]:
        """By place [n_tokens, d_in] float32: the first tokens of a training set, the same ones at each place."""
        import torch

        found, _ = self._chosen["train", prompt_set.name]
        captured = self._index.hooks
        parts: list[list[torch.Tensor]] = [[] for _ in captured]
        for shard in found.shards or []:
            if parts[0] and sum(map(len, parts[0])) >= N_TOKENS:
                break
            of_hooks = self._read_shard(shard, prompt_set, list(range(len(captured))), captured)
            kept = [np.concatenate(rows.kept) for rows in of_hooks]
            everywhere = np.logical_and.reduce(kept)
            for part, rows, of_hook in zip(parts, of_hooks, kept, strict=True):
                part.append(rows.base[torch.from_numpy(everywhere[of_hook]).to(rows.base.device)].float().cpu())
        by_place = {hook.name: torch.cat(part)[:N_TOKENS] for hook, part in zip(captured, parts, strict=True)}
        asked = zip(self.hooks, self._stored, strict=True)
        return {**by_place, **{hook.name: by_place[captured[at].name] for hook, at in asked}}

    def _read_shard(
        self, shard: _Shard, prompt_set: PromptSet, stored: Sequence[int], hooks: Sequence[Hook]
    ) -> list[PairedRows]:
        shard.check(self.folder)
        path = self.folder / shard.file
        prompts = [prompt_set.prompts[i] for i in shard.prompts]
        shows = bool(prompts) and all(len(prompt.demos_ids) for prompt in prompts)
        names = ["base", "kept", *(("demos", "kept_paired") if shows else ())]
        tensors = _load_tensors(path, [f"{name}.{i}" for i in stored for name in names])
        of_hooks = []
        for i, hook in zip(stored, hooks, strict=True):
            base, kept = tensors[f"base.{i}"], _mask(path, f"kept.{i}", tensors, [len(p.positions) for p in prompts])
            demos, kept_paired = base[:0], [np.zeros(0, bool)] * len(prompts)
            if shows:
                demos = tensors[f"demos.{i}"]
                kept_paired = _mask(path, f"kept_paired.{i}", tensors, [len(p.paired) for p in prompts])
            pairs = [
                np.isin(p.positions[of_prompt], p.paired[of_pairs])
                for p, of_prompt, of_pairs in zip(prompts, kept, kept_paired, strict=True)
            ]
            n_pairs = [int(of_pairs.sum()) for of_pairs in kept_paired]
            if n_pairs != [int(of_prompt.sum()) for of_prompt in pairs]:
                raise _damaged(path, f"kept_paired.{i} keeps tokens that kept.{i} leaves out")
            n_read = [int(of_prompt.sum()) for of_prompt in kept]
            for name, rows, n in (("base", base, sum(n_read)), ("demos", demos, sum(n_pairs))):
                _check_rows(path, f"{name}.{i}", rows, n, hook.d_in)
            base, demos = self._for_core(base), self._for_core(demos)
            in_pairs = np.flatnonzero(np.concatenate([np.zeros(0, bool), *pairs]))
            of_hooks.append(
                PairedRows(
                    prompts=shard.prompts,
                    base=base,
                    base_of=np.repeat(np.asarray(shard.prompts, np.int64), n_read),
                    paired=base[_at(in_pairs, base)],
                    demos=demos,
                    paired_of=np.repeat(np.asarray(shard.prompts, np.int64), n_pairs),
                    kept=kept,
                    kept_paired=kept_paired,
                )
            )
        return of_hooks

    def _for_core(self, rows: torch.Tensor) -> torch.Tensor:
        import torch

        device = self._device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device != "cpu" and cuda.missing_reason() is None:
            rows = rows.to(device)
        return rows if rows.dtype in (torch.float32, torch.bfloat16) else rows.float()


def capture_activations(
    *,
    model: str | Path | PreTrainedModel,
    output: str | Path,
    trains: Mapping[str, Source],
    domains: Mapping[str, Source] | Sequence[str],
    demos: Mapping[str, Source] | Sequence[str] | None = None,
    saes: Sequence[SAE] = (),
    hooks: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_demos: bool = True,
    domain_demos: bool = True,
    shots: int = 2,
    domain_shots: int = 5,
    tokens: TokenClass = "query",
    limit: int | None = 256,
    seed: int = 0,
    dtype: str = "auto",
    activation_dtype: str = "bfloat16",
    device: str = "auto",
    device_map: DeviceMap | None = None,
    batch_tokens: int | None = None,
    question_fields: Mapping[str, str] | None = None,
    answer_fields: Mapping[str, str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Activations:
    """Writes what `score` and `compare` would read of a model to a folder, which stands in for the model afterwards.

    model, domains, demos, tokenizer, shots, ..., batch_tokens: as for `score`; trains: training sets by name
    output: the folder; where it holds a part of the same already, the rest is added
    saes, hooks: the places to read: those of the SAEs, and those named
    train_demos, domain_demos: also with demonstrations (what dims='icl', and the estimator 'icl', read)
    activation_dtype: 'bfloat16', or 'float32' for twice the size and no rounding

    Raises InputError for whatever in the input cannot be used, and where `output` holds other activations.
    """
    if activation_dtype not in STORED_DTYPES:
        raise InputError(f"--activation-dtype must be one of {', '.join(STORED_DTYPES)}, not '{activation_dtype}'")
    output = Path(output)
    say = say or (lambda line: None)
    places = list(dict.fromkeys([*(sae.hook_name for sae in saes), *hooks]))
    if not places or not all(places):
        raise InputError("there is no place to read the model at: name one or more with --hook, --layer or --sae")
    sets = Sets.read(trains, domains, demos, Fields(question_fields or {}, answer_fields or {}))
    tokenizer = tokenizer or (load_tokenizer(model) if isinstance(model, (str, Path)) else None)
    if tokenizer is None:
        raise ValueError("a model in memory needs its tokenizer: capture_activations(..., tokenizer=...)")
    config = load_config(model) if isinstance(model, (str, Path)) else model.config
    for warning in (check_names(sae, config, str(model)) for sae in saes if isinstance(model, (str, Path))):
        if warning is not None:
            say(f"warning: {warning}")
    template = common_template(tokenizer, saes) if saes else PromptTemplate(tokenizer, prepend_bos=True)
    decoder = (
        load_decoder(model, *places, dtype=dtype, device=device, device_map=device_map)
        if isinstance(model, (str, Path))
        else Decoder(model, *places)
    )
    decoder.passes.batch_tokens, decoder.passes.say = batch_tokens, say
    for sae in saes:
        check_width(sae, next(hook for hook in decoder.hooks if hook.name == sae.hook_name), decoder.name)

    sampling = Sampling(shots, domain_shots, tokens, limit, seed)
    prompt_sets: list[PromptSet] = []
    described: list[_Set] = []
    kinds: tuple[tuple[Kind, dict[str, list[Example]], bool], ...] = (
        ("train", sets.trains, train_demos),
        ("domain", sets.domains, domain_demos),
    )
    for kind, of_kind, show in kinds:
        for name, examples in of_kind.items():
            own_demos = sets.demos.get(name)
            prompt_set = sampling.prompts(
                name, examples, own_demos, template, decoder.context_length, kind=kind, show=show
            )
            check_enough(prompt_set, decoder.context_length, kind)
            described.append(
                _Set(
                    name=name,
                    kind=kind,
                    folder=f"{SETS_FOLDER}/{len(described)}",
                    n_prompts=len(prompt_set.prompts),
                    n_too_long=prompt_set.n_too_long,
                    n_unanswered=prompt_set.n_unanswered,
                    warnings=prompt_set.warnings,
                    examples_sha256=examples_sha256(examples),
                    demos_sha256="own" if own_demos is None else examples_sha256(own_demos),
                    prompts_sha256=prompts_sha256([prompt_set]),
                    shards=[],
                )
            )
            prompt_sets.append(prompt_set)
    index = _Index(
        model={
            **{"name": decoder.name, "dtype": decoder.dtype, "revision": decoder.revision},
            "weights_sha256": decoder.weights_sha256,
        },
        hooks=decoder.hooks,
        dtype=activation_dtype,
        settings={**asdict(sampling), "starts_with_bos": starts_with_bos(template)},
        sets=described,
    )
    _begin(output, index, prompt_sets, config, tokenizer)
    for one, prompt_set in zip(index.sets, prompt_sets, strict=True):
        _capture_set(output, index, one, prompt_set, decoder, progress or (lambda stage, done, total: None))
    decoder.passes.say_summary()
    return Activations(output, device=device)


def _begin(
    output: Path, index: _Index, prompt_sets: Sequence[PromptSet], config: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes all but the rows, and takes over the whole shards of an earlier run with the same settings."""
    if is_activations(output):
        before = _Index.load(output)
        for one, earlier in zip(index.sets, before.sets, strict=False):
            one.shards = earlier.shards
        differs = [name for name, value in index.to_dict().items() if before.to_dict()[name] != value]
        if differs:
            raise InputError(
                f"{output} holds other activations (not the same {', '.join(differs)}): choose another --output, or "
                "delete it"
            )
        for one in index.sets:
            one.shards = list(_whole(output, one.shards or []))
    else:
        for name in (MODEL_FOLDER, SETS_FOLDER):
            if (output / name).exists():
                raise InputError(f"{output} holds a '{name}' that is not of activations: choose another --output")
    results.prepare_folder(output)
    index.save(output)  # first of all: what lies beside an index may be written again
    for one, prompt_set in zip(index.sets, prompt_sets, strict=True):
        (output / one.folder).mkdir(parents=True, exist_ok=True)
        _write_prompts(output / one.folder / PROMPTS_FILE, prompt_set.prompts)
    with files.atomic_folder(output / MODEL_FOLDER) as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _whole(folder: Path, shards: Sequence[_Shard]) -> Iterator[_Shard]:
    """The shards up to the first whose file is missing or cut: the ones behind it are captured again."""
    for shard in shards:
        try:
            shard.check(folder)
            _load_tensors(folder / shard.file, [])
        except InputError:
            return
        yield shard


def _capture_set(
    output: Path,
    index: _Index,
    one: _Set,
    prompt_set: PromptSet,
    decoder: Decoder,
    tell: Callable[[str, int, int], None],
) -> None:
    shards = one.shards = one.shards or []
    n_prompts = len(prompt_set.prompts)
    if one.n_captured == n_prompts:
        return
    pending: list[list[PairedRows]] = []
    n_pending = 0
    for of_hooks in capture(decoder, prompt_set.prompts, n_done=one.n_captured):
        pending.append(of_hooks)
        n_pending += len(of_hooks[0].prompts)
        if n_pending >= SHARD_PROMPTS or one.n_captured + n_pending == n_prompts:
            file = f"{one.folder}/{len(shards):05d}.safetensors"
            digest = _write_shard(output / file, pending, index.dtype)
            shards.append(_Shard(file, [int(i) for batch in pending for i in batch[0].prompts], digest))
            index.save(output)
            pending, n_pending = [], 0
            tell(prompt_set.name, one.n_captured, n_prompts)


def _write_shard(path: Path, batches: Sequence[Sequence[PairedRows]], dtype: str) -> str:
    """Returns the SHA-256 of the file."""
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for i, of_hook in enumerate(zip(*batches, strict=True)):
        for name, rows in (("base", [one.base for one in of_hook]), ("demos", [one.demos for one in of_hook])):
            tensors[f"{name}.{i}"] = torch.cat([some.cpu().to(getattr(torch, dtype)) for some in rows])
        for name, kept in (
            ("kept", [some for one in of_hook for some in one.kept]),
            ("kept_paired", [some for one in of_hook for some in one.kept_paired]),
        ):
            tensors[f"{name}.{i}"] = torch.from_numpy(np.concatenate(kept))
    content = save(tensors)
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _load_tensors(path: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise InputError(f"there is no shard {path}: run the same sts-fast capture again to write it") from error
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error


def _mask(
    path: Path, name: str, tensors: Mapping[str, torch.Tensor], lengths: Sequence[int]
) -> list[NDArray[np.bool_]]:
    """A stored [sum(lengths)] bool tensor, cut into one mask per prompt."""
    import torch

    mask = tensors[name]
    if mask.dtype != torch.bool or mask.shape != (sum(lengths),):
        raise _damaged(path, f"{name} is {_form(mask)}, not [{sum(lengths)}] bool")
    return np.split(mask.numpy(), np.cumsum(lengths)[:-1])


def _check_rows(path: Path, name: str, rows: torch.Tensor, n_tokens: int, d_in: int) -> None:
    import torch

    if not rows.is_floating_point() or rows.shape != (n_tokens, d_in):
        raise _damaged(path, f"{name} is {_form(rows)}, not [{n_tokens}, {d_in}] of float32, bfloat16 or float16")
    if not bool(torch.isfinite(rows).all()):
        raise _damaged(path, f"{name} holds NaN or infinity")


def _form(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"the shard {path} is damaged: {reason}; delete it and run the same sts-fast capture again")


def _at(indices: NDArray[np.int64], rows: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(indices).to(rows.device)


def _write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {
        "id": pa.array([prompt.id for prompt in prompts]),
        **{
            name: pa.array([getattr(prompt, name) for prompt in prompts], pa.list_(pa.int32()))
            for name in PROMPT_COLUMNS
        },
        "n_special": pa.array([prompt.n_special for prompt in prompts], pa.int64()),
    }
    with files.atomic_path(path) as temporary:
        pq.write_table(pa.table(table), temporary, compression="zstd")


def _read_prompts(path: Path, one: _Set) -> list[Prompt]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
        prompts = [
            Prompt(
                id=str(row["id"]),
                n_special=int(row["n_special"]),
                **{name: np.asarray(row[name], np.int32) for name in PROMPT_COLUMNS},
            )
            for row in rows
        ]
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}: capture again") from error
    except KeyError as error:
        raise InputError(f"{path} has no column {error}: see docs/activations.md") from error
    except (pa.ArrowException, OSError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is damaged ({error}): capture again") from error
    digest = prompts_sha256([PromptSet(one.name, prompts, 0, 0)])
    if len(prompts) != one.n_prompts or (one.prompts_sha256 or digest) != digest:
        raise InputError(f"{path} does not hold the prompts that {INDEX_FILE} speaks of: capture again")
    for prompt in prompts:
        within = np.isin(prompt.positions, np.arange(len(prompt.base_ids))).all()
        if not within or not np.isin(prompt.paired, prompt.positions).all():
            raise InputError(
                f"{path} pairs or reads positions of example {prompt.id} that are not there: see docs/activations.md"
            )
    return prompts


def examples_sha256(examples: Sequence[Example]) -> str:
    """SHA-256 of what examples say, whatever file they come from."""
    said = [[example.id, example.context, example.question, example.answer] for example in examples]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def starts_with_bos(template: PromptTemplate) -> bool:
    """Whether prompts start with the tokenizer's BOS."""
    bos = template.tokenizer.bos_token_id
    return bos is not None and template.token_ids([("user", "?")])[:1].tolist() == [bos]
