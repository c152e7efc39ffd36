"""The index of a folder of activations: activations.json and the prompts.parquet of each set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import numpy as np

from sts_fast import files
from sts_fast._version import __version__
from sts_fast.data.examples import Example
from sts_fast.data.prompts import Prompt, PromptSet, SetWarning, prompts_sha256
from sts_fast.data.sets import Kind
from sts_fast.data.template import PromptTemplate
from sts_fast.data.turns import Turn
from sts_fast.errors import InputError, one_line
from sts_fast.model.hooks import Hook
from sts_fast.places import split_name

FORMAT, VERSION = "sts-fast activations", 1
INDEX_FILE, MODEL_FOLDER, SETS_FOLDER, PROMPTS_FILE = "activations.json", "model", "sets", "prompts.parquet"
PROMPT_COLUMNS = ("base_ids", "demos_ids", "positions", "paired", "paired_demos")
StoredDtype = Literal["float32", "bfloat16"]


def is_activations(source: object) -> TypeGuard[str | Path]:
    """True if a --model is a folder of activations."""
    return isinstance(source, (str, Path)) and (Path(source) / INDEX_FILE).is_file()


@dataclass(frozen=True)
class Shard:
    """A file of rows.

    prompts: the rows' prompts, as indices into prompts.parquet, in the order of the rows
    sha256:  of the file; None where another tool wrote it without
    """

    file: str
    prompts: list[int]
    sha256: str | None = None

    def check(self, folder: Path) -> None:
        """Raises InputError where the file is missing or was changed."""
        path = folder / self.file
        if not path.is_file():
            raise InputError(f"there is no shard {path}: run the same sts-fast capture again to write it")
        if self.sha256 is not None and files.sha256(path) != self.sha256:
            raise damaged(path, f"its SHA-256 is not the one in {INDEX_FILE}")


@dataclass
class StoredSet:
    """A training set or domain in the index; the digests are None where another tool wrote it."""

    name: str
    kind: Kind
    folder: str
    n_prompts: int
    n_too_long: int = 0
    n_unanswered: int = 0
    warnings: tuple[SetWarning, ...] = ()
    shown: tuple[tuple[str, ...], ...] = ()
    examples_sha256: str | None = None
    demos_sha256: str | None = None
    prompts_sha256: str | None = None
    shards: list[Shard] | None = None

    @property
    def n_captured(self) -> int:
        return sum(len(shard.prompts) for shard in self.shards or [])

    @property
    def title(self) -> str:
        return f"the training set '{self.name}'" if self.kind == "train" else f"the domain '{self.name}'"


@dataclass
class Index:
    """Contents of activations.json; `settings` are those of Sampling, and whether prompts start with BOS."""

    model: dict[str, Any]
    hooks: list[Hook]
    dtype: str
    settings: dict[str, Any]
    sets: list[StoredSet]

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "written_by": f"sts-fast {__version__}", **asdict(self)}

    def save(self, folder: Path) -> None:
        with files.atomic_path(folder / INDEX_FILE) as path:
            path.write_text(files.to_json(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Index:
        path = folder / INDEX_FILE
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            written = read["format"], read["version"]
            index = cls(
                model={"revision": None, "weights_sha256": None, **read["model"]},
                hooks=[_hook(entry) for entry in read["hooks"]],
                dtype=str(read.get("dtype")),
                settings=dict(read.get("settings", {})),
                sets=[_set(entry) for entry in read["sets"]],
            )
            if not index.hooks or not {"name", "dtype"} <= set(index.model):
                raise ValueError("it lacks hooks, or the model's name or dtype")
        except KeyError as error:
            raise InputError(f"{path} lacks {error}: see docs/activations.md, or capture again") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({one_line(error)}): see docs/activations.md, or capture again"
            ) from error
        if written != (FORMAT, VERSION):
            raise InputError(f"{path} is {written[0]} {written[1]}, but this reads {FORMAT} {VERSION}: capture again")
        return index


def _hook(entry: Mapping[str, Any]) -> Hook:
    name = str(entry["name"])
    layer = entry.get("layer", split_name(name)[1])
    return Hook(
        name,
        entry.get("path", name),
        entry.get("side", "output"),
        layer,
        int(entry["d_in"]),
        float(entry.get("scale", 1)),
    )


def _set(entry: Mapping[str, Any]) -> StoredSet:
    if entry["kind"] not in get_args(Kind):
        raise ValueError(f"a set is {' or '.join(get_args(Kind))}, not {entry['kind']}")
    return StoredSet(
        name=str(entry["name"]),
        kind=entry["kind"],
        folder=str(entry["folder"]),
        n_prompts=int(entry["n_prompts"]),
        n_too_long=int(entry.get("n_too_long", 0)),
        n_unanswered=int(entry.get("n_unanswered", 0)),
        warnings=tuple(SetWarning(**warning) for warning in entry.get("warnings", ())),
        shown=tuple(tuple(map(str, of_draw)) for of_draw in entry.get("shown", ())),
        examples_sha256=entry.get("examples_sha256"),
        demos_sha256=entry.get("demos_sha256"),
        prompts_sha256=entry.get("prompts_sha256"),
        shards=[
            Shard(str(shard["file"]), [int(i) for i in shard["prompts"]], shard.get("sha256"))
            for shard in entry["shards"]
        ],
    )


def damaged(path: Path, reason: str) -> InputError:
    return InputError(f"the shard {path} is damaged: {reason}; delete it and run the same sts-fast capture again")


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {
        "id": pa.array([prompt.id for prompt in prompts]),
        **{
            name: pa.array([getattr(prompt, name) for prompt in prompts], pa.list_(pa.int32()))
            for name in PROMPT_COLUMNS
        },
        "draw": pa.array([prompt.draw for prompt in prompts], pa.int64()),
        "n_special": pa.array([prompt.n_special for prompt in prompts], pa.int64()),
        "n_straddling": pa.array([prompt.n_straddling for prompt in prompts], pa.int64()),
        "question": pa.array([prompt.question for prompt in prompts], pa.string()),
    }
    with files.atomic_path(path) as temporary:
        pq.write_table(pa.table(table), temporary, compression="zstd")


def read_prompts(path: Path, stored_set: StoredSet) -> list[Prompt]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
        prompts = [
            Prompt(
                id=str(row["id"]),
                n_special=int(row["n_special"]),
                n_straddling=int(row["n_straddling"]),
                question=None if row.get("question") is None else str(row["question"]),
                draw=int(row.get("draw") or 0),
                **{name: np.asarray(row[name], np.int32) for name in PROMPT_COLUMNS},
            )
            for row in rows
        ]
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}: capture again") from error
    except KeyError as error:
        raise InputError(f"{path} has no column {error}: see docs/activations.md") from error
    except (pa.ArrowException, OSError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is damaged ({one_line(error)}): capture again") from error
    digest = prompts_sha256([PromptSet(stored_set.name, prompts, 0, 0)])
    if len(prompts) != stored_set.n_prompts or (stored_set.prompts_sha256 or digest) != digest:
        raise InputError(f"{path} does not contain the prompts that {INDEX_FILE} describes: capture again")
    for prompt in prompts:
        within = np.isin(prompt.positions, np.arange(len(prompt.base_ids))).all()
        if not within or not np.isin(prompt.paired, prompt.positions).all():
            raise InputError(
                f"{path} pairs or reads positions of example {prompt.id} that do not exist: see docs/activations.md"
            )
    return prompts


def examples_sha256(examples: Sequence[Example]) -> str:
    """SHA-256 of the contents of examples, regardless of their files."""
    contents = [
        [
            *(example.id, [*map(_known, example.context)], example.question, example.answer),
            *map(_known, example.steps),
            *filter(None, (example.reasoning, [*map(str, example.tool_calls)])),
        ]
        for example in examples
    ]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _known(turn: Turn) -> list[Any]:
    return [turn.role, turn.content, *(value for value in astuple(turn)[2:] if value)]


def starts_with_bos(template: PromptTemplate) -> bool:
    """True if prompts start with the tokenizer's BOS."""
    bos = template.tokenizer.bos_token_id
    return bos is not None and template.token_ids([Turn("user", "?")])[:1].tolist() == [bos]
