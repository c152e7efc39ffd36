"""A profile: what one SAE makes of one set. Its folder: rows.parquet, residuals.safetensors and, last, profile.json."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast import files
from sts_fast.data.prompts import PromptSet, SetWarning
from sts_fast.errors import InputError, one_line
from sts_fast.files import Document
from sts_fast.model.log import PromptLog, prompts_of
from sts_fast.profile.identity import Identity, digests_of
from sts_fast.profile.residuals import SUMS, ResidualSums
from sts_fast.profile.rows import ENTRIES, PromptRows

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles, Indices

FORMAT, VERSION = "sts-fast profile", 1
INDEX_FILE, ROWS_FILE, RESIDUALS_FILE = "profile.json", "rows.parquet", "residuals.safetensors"
ROW_GROUP = 256  # prompts
KEY = "sts_fast key"  # the profile's, in the metadata of its rows
# Types of what profile.json must hold, and of what its blocks must.
INDEX_KINDS: dict[str, Any] = {
    **dict.fromkeys(("set", "kind", "key", "plain_key", "prompts_sha256"), str),
    **dict.fromkeys(("model", "sae", "sampling", "files"), dict),
    **dict.fromkeys(("n_prompts", "n_tokens", "n_pairs", "n_too_long", "n_unanswered"), int),
    "tuned": dict | None,
    "shown_sha256": str | None,
}
BLOCK_KINDS: dict[str, dict[str, Any]] = {
    "model": {
        **dict.fromkeys(("name", "dtype", "module", "side"), str),
        **dict.fromkeys(("revision", "weights_sha256"), str | None),
    },
    "sae": {
        **dict.fromkeys(("source", "architecture", "hook_name", "fingerprint"), str),
        **dict.fromkeys(("d_in", "d_sae"), int),
    },
    "sampling": {**dict.fromkeys(("shots", "demo_draws", "seed"), int), "tokens": str, "limit": int | None},
}
# Sums of few float32 end in zeros, which take no space byte by byte. Counts and places are few and small numbers.
SPLIT, COUNTED = ("sum_h", "sum_sq_h", "sum_shift", "sum_sq_shift", "strongest"), ("n_fired", "strongest_at")
ENCODINGS = {
    "features.list.element": "DELTA_BINARY_PACKED",
    **{f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in SPLIT},
}


class DamagedProfile(InputError):
    """Raised for a profile in `folder` that is not as it was written; made again, it is whole."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass(frozen=True, repr=False)
class Profile:
    """One set as one SAE sees it: a sparse row a prompt, and sums over the residual stream itself.

    identity:   what it was made of
    prompt_set: the prompts that were read; log: which of their tokens
    rows:       the sums of each prompt, in the order of the set
    residuals:  sums over all tokens that were read
    """

    identity: Identity
    prompt_set: PromptSet
    log: PromptLog
    rows: PromptRows
    residuals: ResidualSums

    @classmethod
    def load(cls, folder: str | Path) -> Profile:
        """The profile that `save` wrote.

        Raises InputError where a file is missing, damaged, of another version, or not the one that profile.json names.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = Path(folder)
        index = read_index(folder)
        check_files(folder, index)
        try:
            with pq.ParquetFile(folder / ROWS_FILE) as file:  # read_table would import pandas
                table = file.read()
            identity = identity_in(index)
            prompt_set, log = _prompts(table, index, identity)
            d_sae = int(identity.sae["d_sae"])
            indptr, entries = read_entries(table, tuple(ENTRIES), d_sae)
            rows = PromptRows(d_sae, indptr, **entries)
            if (rows.strongest_at >= log.n_read[rows.prompt_of]).any():
                raise ValueError("strongest_at lies beyond the tokens that were read")
            arrays, _ = files.load_arrays(folder / RESIDUALS_FILE, "residuals")
            residuals = ResidualSums.zero(int(identity.sae["d_in"]))
            for name in SUMS:
                parts = getattr(residuals, name).parts
                if arrays[name].shape != parts.shape:
                    raise ValueError(f"{name} of {RESIDUALS_FILE} has another shape than {parts.shape}")
                parts[...] = arrays[name]
            residuals.counts[...] = log.n_read.sum(), log.n_pairs.sum()
            if arrays["counts"].tolist() != residuals.counts.tolist():
                raise ValueError(f"counts of {RESIDUALS_FILE} are not those of the rows")
            if identity.key != index["key"]:
                raise ValueError("its key is not that of what it was made of")
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise DamagedProfile(f"{folder} is no whole profile ({one_line(error)}): make it again", folder) from error
        return cls(identity, prompt_set, log, rows, residuals)

    def save(self, folder: str | Path) -> None:
        """Writes it as a folder, whole or not at all; raises InputError where it cannot be written."""
        import pyarrow.parquet as pq

        with files.atomic_folder(folder) as temporary:
            pq.write_table(
                _table(self), temporary / ROWS_FILE,
                compression="zstd", row_group_size=ROW_GROUP, column_encoding=ENCODINGS,
                use_dictionary=[f"{name}.list.element" for name in COUNTED], write_page_checksum=True,
            )  # fmt: skip
            residuals = self.residuals
            arrays = {name: getattr(residuals, name).settled() for name in SUMS} | {"counts": residuals.counts}
            files.save_arrays(temporary / RESIDUALS_FILE, arrays, {"kind": "residuals"})
            prompt_set = self.prompt_set
            index: Document = {
                "format": FORMAT,
                "version": VERSION,
                "key": self.identity.key,
                "plain_key": self.identity.plain_key,
                **asdict(self.identity),
                "n_prompts": len(prompt_set.prompts),
                "n_tokens": self.n_tokens,
                "n_pairs": self.n_pairs,
                "n_too_long": prompt_set.n_too_long,
                "n_unanswered": prompt_set.n_unanswered,
                "warnings": [asdict(warning) for warning in prompt_set.warnings],
                "shown": [list(draw) for draw in prompt_set.shown],
                "files": {name: files.sha256(temporary / name) for name in (ROWS_FILE, RESIDUALS_FILE)},
            }
            (temporary / INDEX_FILE).write_text(files.to_json(index), encoding="utf-8")

    @classmethod
    def joined(cls, parts: Sequence[Profile], whole: PromptSet) -> Profile:
        """The profile of a set, from those of consecutive parts of its prompts; one reading would give the same rows.

        Raises InputError where parts were read with different models or SAEs.
        """
        for part in parts[1:]:
            if (part.identity.model, part.identity.sae) != (parts[0].identity.model, parts[0].identity.sae):
                raise InputError(
                    f"parts of '{whole.name}' were read with different weights, or at different places: "
                    f"{_difference(parts[0].identity, part.identity)}"
                )
        prompts_sha256, shown_sha256 = digests_of(whole)
        identity = replace(parts[0].identity, prompts_sha256=prompts_sha256, shown_sha256=shown_sha256)
        prompt_set = replace(whole, prompts=[prompt for part in parts for prompt in part.prompt_set.prompts])
        log = PromptLog.joined([part.log for part in parts], prompt_set)
        residuals = ResidualSums.zero(int(identity.sae["d_in"]))
        for part in parts:
            residuals.merge(part.residuals)
        return cls(identity, prompt_set, log, PromptRows.joined([part.rows for part in parts]), residuals)

    @property
    def name(self) -> str:
        return self.prompt_set.name

    def __repr__(self) -> str:
        kind, n = self.identity.kind, len(self.prompt_set.prompts)
        return f"Profile('{self.name}', {kind}, {n:,} prompts, {self.n_tokens:,} tokens, {self.identity.sae['source']})"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"

    def of(self, identity: Identity, prompt_set: PromptSet) -> Profile:
        """The same of a set with the same prompts, as reading that one would make it."""
        prompts = [
            replace(own, positions=read.positions, paired=read.paired, paired_demos=read.paired_demos)
            for own, read in zip(prompt_set.prompts, self.prompt_set.prompts, strict=True)
        ]
        prompt_set = replace(prompt_set, prompts=prompts)
        log = PromptLog.of_all(prompt_set)
        log.n_sinks = self.log.n_sinks
        return replace(self, identity=identity, prompt_set=prompt_set, log=log)

    def plain(self) -> Profile:
        """The same without what was read behind demonstrations, or in a model after training."""
        prompt_set = without_demonstrations(self.prompt_set)
        log = PromptLog(prompt_set)
        log.kept, log.n_read, log.n_sinks = self.log.kept, self.log.n_read, self.log.n_sinks
        identity = replace(self.identity, tuned=None, shown_sha256=None)
        return Profile(identity, prompt_set, log, self.rows.plain(), self.residuals.plain())

    @property
    def n_tokens(self) -> int:
        """Tokens read without demonstrations."""
        return self.residuals.n_tokens

    @property
    def n_pairs(self) -> int:
        """Of these, those that were read with demonstrations too."""
        return self.residuals.n_pairs

    def mean_activation(self) -> Doubles:
        """[d_sae] E_x h_j(x); zeros where no token was read."""
        return self.rows.totals("sum_h") / max(self.n_tokens, 1)

    def mean_squared_shift(self) -> Doubles:
        """[d_sae] E_x ||h_j(demos, x) - h_j(x)||^2 (STS paper, eq. of D_N); zeros where there were no pairs."""
        return self.rows.totals("sum_sq_shift") / max(self.n_pairs, 1)


def _difference(one: Identity, other: Identity) -> str:
    """The entries in which model and SAE of two profiles differ."""
    pairs = ((block, getattr(one, block), getattr(other, block)) for block in ("model", "sae"))
    return ", ".join(
        f"{block}.{name} is {mine[name]} and {theirs[name]}"
        for block, mine, theirs in pairs
        for name in mine
        if mine[name] != theirs[name]
    )


def without_demonstrations(prompt_set: PromptSet) -> PromptSet:
    """The same prompts, asked alone."""
    none = np.zeros(0, np.int32)
    prompts = [replace(prompt, demos_ids=none, paired=none, paired_demos=none, draw=0) for prompt in prompt_set.prompts]
    return replace(prompt_set, prompts=prompts, shown=())


def check_files(folder: Path, index: Document) -> None:
    """Raises DamagedProfile where a file of a profile is not the one that its index names."""
    for name in (ROWS_FILE, RESIDUALS_FILE):
        path = folder / name
        if not is_whole(path, index):
            raise DamagedProfile(f"{path} is missing or damaged: make the profile again", folder)


def read_index(folder: Path) -> Document:
    """profile.json; raises InputError where it is missing, damaged, or of something else."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {INDEX_FILE}: give a folder of sts-fast profile")
    try:
        index = files.read_json(path)
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise DamagedProfile(f"{error}: make the profile again", folder) from error
    if index.get("format") != FORMAT:
        raise InputError(f"{path} is of no profile: give a folder of sts-fast profile")
    if index.get("version") != VERSION:
        raise InputError(
            f"{path} is of version {index.get('version')}, and this sts-fast reads {VERSION}: make the profile again"
        )
    damaged = [name for name, kind in INDEX_KINDS.items() if not isinstance(index.get(name, ...), kind)]
    for block, kinds in () if damaged else BLOCK_KINDS.items():
        values = index[block]
        damaged += [f"{block}.{name}" for name, kind in kinds.items() if not isinstance(values.get(name, ...), kind)]
    if damaged:
        raise DamagedProfile(f"{path} is damaged ({', '.join(damaged)}): make the profile again", folder)
    return index


def is_undamaged(folder: Path) -> bool:
    """Whether a profile is there, and its files are those that its index names."""
    try:
        check_files(folder, read_index(folder))
    except InputError:
        return False
    return True


def identity_in(index: Document) -> Identity:
    """The identity that profile.json tells; raises TypeError or KeyError where it is damaged."""
    return Identity(**{field.name: index[field.name] for field in fields(Identity)})


def is_whole(path: Path, index: Document) -> bool:
    """Whether a file of a profile is the one that profile.json names, by its SHA-256."""
    return path.is_file() and files.sha256(path) == index["files"].get(path.name)


def _table(profile: Profile) -> pa.Table:
    """One row a prompt: what was sent and read, and its features as lists."""
    import pyarrow as pa

    rows, log = profile.rows, profile.log
    table = log.table("", {}).drop_columns(["stage", "domain"])
    offsets = pa.array(rows.indptr.astype(np.int64), pa.int64())
    for name, counts in (("n_tokens", log.n_read), ("n_pairs", log.n_pairs)):
        table = table.append_column(name, pa.array(counts))
    for name in ENTRIES:
        values = pa.array(getattr(rows, name))
        of = pa.large_list(pa.field("element", values.type, nullable=False))
        field = pa.field("features" if name == "indices" else name, of, nullable=False)
        table = table.append_column(field, pa.LargeListArray.from_arrays(offsets, values, type=of))
    return table.replace_schema_metadata({KEY: profile.identity.key})


def read_entries(table: pa.Table, names: Sequence[str], d_sae: int) -> tuple[Indices, dict[str, NDArray[Any]]]:
    """indptr of the lists of all prompts, and the entries of some of them, `indices` among these.

    Raises ValueError where they are not rows of an SAE so wide.
    """
    sizes, entries = [], {}
    for name in names:
        column = table.column("features" if name == "indices" else name).combine_chunks()
        values = column.flatten()
        if column.null_count or values.null_count:
            raise ValueError(f"{name} has a null")
        sizes.append(np.diff(np.asarray(column.offsets, np.int64)))
        entries[name] = values.to_numpy(zero_copy_only=False).astype(ENTRIES[name], copy=False)
    if any(not np.array_equal(of_list, sizes[0]) for of_list in sizes):
        raise ValueError("the lists of a prompt differ in length")
    indptr, features = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[0])]), entries["indices"]
    ascends = np.diff(features) > 0
    ascends[indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < len(features))] - 1] = True
    if len(features) and not (ascends.all() and features.min() >= 0 and features.max() < d_sae):
        raise ValueError(f"features do not ascend within a prompt, below {d_sae}")
    if not all(np.isfinite(values).all() for values in entries.values()):
        raise ValueError("a sum is not finite")
    return indptr, entries


def _prompts(table: pa.Table, index: Mapping[str, Any], identity: Identity) -> tuple[PromptSet, PromptLog]:
    """The prompts with the tokens that were read as their positions, and the log that says so."""
    prompt_set = PromptSet(
        identity.set, prompts_of(table), index["n_too_long"], index["n_unanswered"],
        tuple(SetWarning(**warning) for warning in index["warnings"]), tuple(map(tuple, index["shown"])),
    )  # fmt: skip
    log = PromptLog.of_all(prompt_set)
    log.n_sinks = np.asarray(table.column("n_sinks"), np.int64)
    return prompt_set, log
