"""Configurations with which trainers read a mixed set.

| trainer       | files                                   | where the lines belong                               |
|---------------|-----------------------------------------|------------------------------------------------------|
| axolotl       | axolotl.yaml                            | the configuration of `axolotl train`                 |
| llama-factory | llama_factory.yaml, dataset_info.json   | that of `llamafactory-cli train`; its `dataset_dir`  |
| trl           | trl.yaml                                | that of `trl sft --config`                           |

The mixed set is one file of the examples that were chosen, already shuffled: no trainer has to sample from several.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

import yaml

from sts_fast import files
from sts_fast.data.examples import Example
from sts_fast.errors import InputError
from sts_fast.files import Document

Trainer = Literal["axolotl", "llama-factory", "trl"]
DATASET = "sts_fast_mix"  # its name in LLaMA-Factory


def check_trainer(trainer: Trainer, examples: Iterable[Example]) -> None:
    """Raises InputError where a trainer would misread the examples."""
    if trainer == "llama-factory" and any(
        turn.tool_calls or turn.role in ("tools", "tool")
        for example in examples
        for turn in (*example.turns, example.reply)
        if turn is not None
    ):
        raise InputError(
            "LLaMA-Factory reads tool calls in a layout of its own, in which the mixture is not written: omit "
            "--write-for llama-factory, or leave out the sets with tools"
        )


def write_configuration(folder: Path, trainer: Trainer, mixed_set: Path, columns: Collection[str]) -> None:
    """Writes the configuration of a trainer into a folder.

    mixed_set: where the set will lie, JSON lines; it is named by its absolute path
    columns:   those that are read: messages, and tools where a row declares some
    """
    for name, content in _configuration(trainer, mixed_set.absolute(), columns).items():
        with files.atomic_path(folder / name) as path:
            path.write_text(content, encoding="utf-8")


def _configuration(trainer: Trainer, mixed_set: Path, columns: Collection[str]) -> dict[str, str]:
    """By file name, the content of a trainer's files."""
    match trainer:
        case "axolotl":
            dataset = {
                "path": str(mixed_set),
                "ds_type": "json",
                "type": "chat_template",
                **{f"field_{column}": column for column in columns},
                "message_property_mappings": {"role": "role", "content": "content"},
            }
            return {"axolotl.yaml": _yaml({"datasets": [dataset]})}
        case "trl":
            dataset = {"path": "json", "data_files": str(mixed_set), "split": "train", "columns": sorted(columns)}
            return {"trl.yaml": _yaml({"datasets": [dataset]})}
        case "llama-factory":
            # Not its layout `openai`, which writes "detailed thinking off" into every system turn.
            entry = {
                "file_name": mixed_set.name,
                "formatting": "sharegpt",
                "columns": {"messages": "messages"},
                "tags": {"role_tag": "role", "content_tag": "content"}
                | {f"{role}_tag": role for role in ("user", "assistant", "system")},
            }
            return {
                "dataset_info.json": json.dumps({DATASET: entry}, indent=2) + "\n",
                "llama_factory.yaml": _yaml({"dataset_dir": str(mixed_set.parent), "dataset": DATASET}),
            }


def _yaml(content: Document) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text
