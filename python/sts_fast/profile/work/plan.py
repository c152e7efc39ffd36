"""A plan of profiles: which prompts of which sets are read together, with what. Its folder is in the library.

plan.json     model, SAEs, options, sets, shards, digests of every input
prompts.parquet  the prompts of every set as token ids, so that workers need neither the sets nor a tokenizer
pieces/       the profiles of pieces of sets that are cut, until their set is whole
done/N.json   of each shard that is read, its profiles with the SHA-256 of their profile.json
merged.json   the same of all sets, once they are whole
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sts_fast import files
from sts_fast._version import __version__
from sts_fast.data.prompts import PromptSet, SetWarning
from sts_fast.data.sets import Kind, Sampling
from sts_fast.errors import InputError, listed, one_line
from sts_fast.files import Document, InputFile
from sts_fast.model.checkpoint import TOKENIZER_FILES, Checkpoint
from sts_fast.model.log import PromptLog, prompts_of
from sts_fast.model.session import Loading, SAEDtype
from sts_fast.profile.library import Library
from sts_fast.profile.pieces import PIECES_FOLDER, Piece, Shard, n_tokens
from sts_fast.profile.profile import INDEX_FILE, is_undamaged
from sts_fast.sae import SAE, load_sae

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, VERSION = "sts-fast plan", 1
PLAN_FILE, PROMPTS_FILE, MERGED_FILE, DONE_FOLDER = "plan.json", "prompts.parquet", "merged.json", "done"
PLANS_FOLDER = "plans"  # in the library
SAMPLES = 64  # of a file of weights
SHOWN_DIGITS = 12  # of a plan's key, in the name of its folder


@dataclass(frozen=True)
class PlannedSAE:
    """An SAE that workers open.

    source: as it was given, which its profiles say; path: where it lies; fingerprint: of what must be found there
    """

    source: str
    path: str
    hook_name: str
    norm_scaling_factor: float | None
    fingerprint: str

    @classmethod
    def of(cls, sae: SAE, dtype: str | None) -> PlannedSAE:
        """Raises InputError where the SAE cannot be opened again from its source."""
        again = load_sae(sae.source, hook=sae.hook_name, dtype=dtype)
        factor = None
        if again.fingerprint != sae.fingerprint:
            factor = sae.input_scale / again.input_scale
            again = again.scaled(factor)
        if again.fingerprint != sae.fingerprint:
            raise InputError(
                f"the SAE {sae.source} is not what its files hold, and workers open those: give a folder or an id"
            )
        return cls(sae.source, _absolute(sae.source), sae.hook_name, factor, sae.fingerprint)

    def open(self, dtype: str | None, roots: Mapping[str, str]) -> SAE:
        """Raises InputError where another SAE lies there."""
        path = moved(self.path, roots)
        sae = load_sae(path, hook=self.hook_name, norm_scaling_factor=self.norm_scaling_factor, dtype=dtype)
        if sae.fingerprint != self.fingerprint:
            raise InputError(f"{path} is another SAE than the plan was made with: make the plan again, or copy the SAE")
        return replace(sae, source=self.source)


@dataclass(frozen=True)
class PlannedModel:
    """A model that workers load.

    source: as it was given, which its profiles say; path: where it lies
    files:  SHA-256 of its config and tokenizer, and of samples of its weights, by file; of a hub id, its commit
    """

    source: str
    path: str
    files: Document

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PlannedModel:
        return cls(str(checkpoint), _absolute(str(checkpoint)), _files_of(checkpoint))

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises InputError where another model lies there."""
        found = _files_of(checkpoint)
        differing = sorted(name for name in {*found, *self.files} if found.get(name) != self.files.get(name))
        if differing:
            raise InputError(
                f"{checkpoint} is not the model that the plan was made with: {listed(differing, 3)} differ; copy that "
                "model, or make the plan again"
            )


@dataclass(frozen=True)
class Work:
    """How prompts are read, whoever reads them: what decides a bit of the results beside model, SAEs and prompts.

    batch_tokens: most tokens of a forward pass; threads: of torch, in each process; precision: of CUDA products
    """

    batch_tokens: int
    threads: int
    precision: str | None
    sae_dtype: SAEDtype | None


@dataclass(frozen=True)
class ProfilePlan:
    """Sets that are to be read with SAEs of a model, cut into shards. Made by `sts_fast.plan_profiles`.

    folder: of its files, in the library of the profiles
    loading: of the model; sampling: the options that the prompts were made with
    sets:   with their kinds; shards: each some pieces of sets, read by one process
    inputs: files that the sets were read from
    """

    folder: Path
    model: PlannedModel
    saes: tuple[PlannedSAE, ...]
    loading: Loading
    sampling: Sampling
    work: Work
    kinds: tuple[Kind, ...]
    sets: tuple[PromptSet, ...]
    shards: tuple[Shard, ...]
    inputs: tuple[InputFile, ...]

    @property
    def library(self) -> Library:
        """Of the profiles."""
        return Library(self.folder.parent.parent)

    @property
    def pieces(self) -> Library:
        """Of the pieces of sets that are cut, until they are put together."""
        return Library(self.folder / PIECES_FOLDER)

    @cached_property
    def key(self) -> str:
        """Hexadecimal digest of everything but the folder and the files that sets were read from."""
        document = self._document()
        del document["inputs"], document["model"]["path"]
        for sae in document["saes"]:
            del sae["path"]
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
        for prompt_set in self.sets:
            for prompt in prompt_set.prompts:
                digest.update(json.dumps([prompt.id, prompt.question, prompt.draw]).encode())  # profiles say these, too
                for ids in (prompt.base_ids, prompt.demos_ids, prompt.positions, prompt.paired, prompt.paired_demos):
                    digest.update(f"{len(ids)} ".encode() + ids.astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def n_tokens(self) -> list[int]:
        """Of each set, the tokens that reading it runs, but for demonstrations."""
        return [sum(map(n_tokens, prompt_set.prompts)) for prompt_set in self.sets]

    def saved(self, library: Path) -> ProfilePlan:
        """The plan with its folder in a library, where its two files are written unless they are there as they are."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        plan = replace(self, folder=library / PLANS_FOLDER / self.key[:SHOWN_DIGITS])
        tables = [
            PromptLog.of_all(prompt_set).table(kind, {}) for kind, prompt_set in zip(plan.kinds, plan.sets, strict=True)
        ]
        prompts = io.BytesIO()
        pq.write_table(pa.concat_tables(tables), prompts, compression="zstd")
        digest = hashlib.sha256(prompts.getvalue()).hexdigest()
        document = {**plan._document(), "key": plan.key, "prompts_sha256": digest}
        files.prepare_folder(plan.folder)
        for name, content in ((PROMPTS_FILE, prompts.getvalue()), (PLAN_FILE, files.to_json(document).encode())):
            path = plan.folder / name
            if not path.is_file() or path.read_bytes() != content:
                with files.atomic_path(path) as temporary:
                    temporary.write_bytes(content)
        return plan

    @classmethod
    def load(cls, path: str | Path) -> ProfilePlan:
        """The plan of a plan.json, or of its folder. Raises InputError where it is damaged, or of another version."""
        path = Path(path)
        folder = (path if path.is_dir() else path.parent).absolute()
        if not (folder / PLAN_FILE).is_file():
            raise InputError(f"there is no plan at {path}: give the {PLAN_FILE} of sts-fast profile --plan-only")
        document = files.read_json(folder / PLAN_FILE)
        if document.get("format") != FORMAT:
            raise InputError(f"{folder / PLAN_FILE} is no plan: give one of sts-fast profile --plan-only")
        if (document.get("version"), document.get("sts_fast")) != (VERSION, __version__):
            raise InputError(
                f"{folder / PLAN_FILE} was made by sts-fast {document.get('sts_fast')}, and this is {__version__}: use "
                "one version for the plan and all of its workers"
            )
        prompts = folder / PROMPTS_FILE
        if not prompts.is_file() or files.sha256(prompts) != document.get("prompts_sha256"):
            raise InputError(f"{prompts} is missing or damaged: make the plan again")
        try:
            plan = cls._read(folder, document)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder / PLAN_FILE} is damaged ({one_line(error)}): make the plan again") from error
        if plan.key != document.get("key"):
            raise InputError(f"{folder / PLAN_FILE} was changed by hand: make the plan again")
        return plan

    @classmethod
    def _read(cls, folder: Path, document: Document) -> ProfilePlan:
        import pyarrow.parquet as pq

        with pq.ParquetFile(folder / PROMPTS_FILE) as file:
            table = file.read()
        sets, start = [], 0
        for of_set in document["sets"]:
            rows = table.slice(start, of_set["n_prompts"])
            start += of_set["n_prompts"]
            sets.append(_prompt_set(of_set, rows))
        return cls(
            folder,
            PlannedModel(**document["model"]),
            tuple(PlannedSAE(**sae) for sae in document["saes"]),
            Loading(**document["loading"]),
            Sampling(**document["sampling"]),
            Work(**document["work"]),
            tuple(cast(Kind, of_set["kind"]) for of_set in document["sets"]),
            tuple(sets),
            tuple(tuple(Piece(*piece) for piece in shard) for shard in document["shards"]),
            tuple(document["inputs"]),
        )

    def _document(self) -> Document:
        return {
            "format": FORMAT,
            "version": VERSION,
            "sts_fast": __version__,
            "model": asdict(self.model),
            "saes": [asdict(sae) for sae in self.saes],
            "loading": asdict(self.loading),
            "sampling": {field.name: getattr(self.sampling, field.name) for field in fields(Sampling)},
            "work": asdict(self.work),
            "sets": [
                {
                    "kind": kind,
                    "name": prompt_set.name,
                    "n_prompts": len(prompt_set.prompts),
                    "n_tokens": n,
                    "n_too_long": prompt_set.n_too_long,
                    "n_unanswered": prompt_set.n_unanswered,
                    "warnings": [asdict(warning) for warning in prompt_set.warnings],
                    "shown": [list(draw) for draw in prompt_set.shown],
                }
                for kind, prompt_set, n in zip(self.kinds, self.sets, self.n_tokens, strict=True)
            ],
            "shards": [[[piece.set, piece.start, piece.stop] for piece in shard] for shard in self.shards],
            "inputs": list(self.inputs),
        }

    # Progress ---------------------------------------------------------------------------------------------------------

    def finish(self, shard: int, profiles: Sequence[Path]) -> None:
        """Writes down that a shard is read. profiles: the folders of each piece's, one for each SAE."""
        (self.folder / DONE_FOLDER).mkdir(exist_ok=True)
        self.write_record(_done_file(shard), profiles)

    def write_record(self, name: str, profiles: Sequence[Path]) -> None:
        """Writes a file of the plan's folder that names profiles, with the SHA-256 of their profile.json."""
        record = [[str(path.relative_to(self.library.folder)), files.sha256(path / INDEX_FILE)] for path in profiles]
        with files.atomic_path(self.folder / name) as temporary:
            temporary.write_text(files.to_json({"profiles": record}), encoding="utf-8")

    def is_merged(self) -> bool:
        """True once every set is whole, and while it stays so."""
        return self._recorded(MERGED_FILE) is not None

    def missing(self) -> list[int]:
        """The shards that are still to be read, or whose profiles are gone, damaged, or others than were written."""
        if self.is_merged():
            return []
        return [shard for shard in range(len(self.shards)) if self._recorded(_done_file(shard)) is None]

    def done_profiles(self) -> list[tuple[Piece, list[Path]]]:
        """Of every piece the folders of its profiles, one for each SAE. Raises InputError where a shard is missing."""
        found = []
        for shard, pieces in enumerate(self.shards):
            folders = self._recorded(_done_file(shard))
            if folders is None or len(folders) != len(pieces) * len(self.saes):
                raise InputError(f"shard {shard} of {self.folder} is not read yet: start its workers again")
            n = len(self.saes)
            found += [(piece, folders[i * n : (i + 1) * n]) for i, piece in enumerate(pieces)]
        return found

    def _recorded(self, name: str) -> list[Path] | None:
        """The profiles that a file names; None where it is not there, or they are not as they were written."""
        try:
            record = files.read_json(self.folder / name)["profiles"]
            found = [(self.library.folder / folder, digest) for folder, digest in record]
            for folder, digest in found:
                if files.sha256(folder / INDEX_FILE) != digest or not is_undamaged(folder):
                    return None
        except (InputError, OSError, KeyError, TypeError, ValueError):
            return None
        return [folder for folder, _ in found]


def _done_file(shard: int) -> str:
    return f"{DONE_FOLDER}/{shard}.json"


def moved(path: str, roots: Mapping[str, str]) -> str:
    """A path on another machine; roots: the beginning of paths there by that here."""
    for old, new in roots.items():
        beginning = old.rstrip("/")
        if path == beginning or path.startswith(f"{beginning}/"):
            return new.rstrip("/") + path[len(beginning) :]
    return path


def _absolute(source: str) -> str:
    path = Path(source)
    return str(path.absolute()) if path.exists() else source


def _files_of(checkpoint: Checkpoint) -> Document:
    commit = getattr(checkpoint.config, "_commit_hash", None)
    if commit is not None:
        return {"commit": commit}
    folder = Path(checkpoint.folder)
    small = [folder / name for name in ("config.json", "adapter_config.json", *TOKENIZER_FILES)]
    weights = (path for pattern in ("*.safetensors", "*.bin", "*.gguf") for path in folder.glob(pattern))
    return {path.name: files.sha256(path) for path in small if path.is_file()} | {
        path.name: _sampled(path) for path in sorted(weights)
    }


def _sampled(path: Path) -> str:
    """SHA-256 of a file's size, and of 4 KiB at each of SAMPLES places spread evenly over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(i * size // SAMPLES)
            digest.update(file.read(4096))
    return digest.hexdigest()


def _prompt_set(of_set: Document, rows: pa.Table) -> PromptSet:
    if rows.num_rows != of_set["n_prompts"] or {*rows.column("domain").to_pylist()} - {of_set["name"]}:
        raise ValueError(f"{PROMPTS_FILE} has other prompts")
    return PromptSet(
        of_set["name"], prompts_of(rows), of_set["n_too_long"], of_set["n_unanswered"],
        tuple(SetWarning(**warning) for warning in of_set["warnings"]), tuple(map(tuple, of_set["shown"])),
    )  # fmt: skip
