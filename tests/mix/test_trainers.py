"""What trainers read of a mixed set: TRL with its own parser and loader, the others' documented fields.

axolotl and LLaMA-Factory are not installed here. Where they are, their own schemas read what was written.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import sts_fast
from sts_fast.data.examples import Example
from sts_fast.data.turns import Turn
from sts_fast.errors import InputError
from sts_fast.mix.mix import MixedSet
from sts_fast.mix.trainers import Trainer

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
PLAIN = [Example("1", "1 + 1?", "2"), Example("2", "2 + 2?", "4", context=(Turn("system", "Add."),))]
WITH_TOOLS = [Example("3", "Add 1 and 1.", "2", context=(Turn("tools", json.dumps([TOOL])),))]


def saved(folder: Path, trainer: Trainer, examples: list[Example], **options: Any) -> list[Any]:
    """Writes a mixture for a trainer; returns the rows of its file."""
    mixture = sts_fast.Mixture(
        rule="uniform",
        budget=1,
        train=MixedSet("train", 0.0, 1, 1),
        domains=[MixedSet("sums", 1.0, 1, 1)],
        mean_change=None,
        settings={
            "loss_left": 0.01, "weights": {"train": 1.0, "sums": 1.0}, "limit": 64, "seed": 0, "confidence": 0.95,
            "command": None,
        },
        warnings=[],
        examples=[("train", example) for example in examples],
    )  # fmt: skip
    mixture.save(folder, write_for=trainer, **options)
    return [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("examples", "columns"), [(PLAIN, ["messages"]), (PLAIN + WITH_TOOLS, ["messages", "tools"])])
@pytest.mark.filterwarnings("default")
def test_trl_loads_the_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: list[Example], columns: list[str]
) -> None:
    trl = pytest.importorskip("trl")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = saved(tmp_path / "mix", "trl", examples)
    parser = trl.TrlParser(trl.DatasetMixtureConfig)
    [mixture] = parser.parse_args_and_config(["--config", str(tmp_path / "mix" / "trl.yaml")])
    loaded = trl.get_dataset(mixture)["train"]
    assert sorted(loaded.column_names) == columns
    assert [[(m["role"], m["content"]) for m in row["messages"]] for row in loaded] == [
        [(m["role"], m["content"]) for m in row["messages"]] for row in rows
    ]


def test_axolotl_is_given_the_fields_that_it_documents(tmp_path: Path) -> None:
    saved(tmp_path, "axolotl", PLAIN, place=tmp_path / "later")
    [dataset] = yaml.safe_load((tmp_path / "axolotl.yaml").read_text())["datasets"]
    assert dataset == {
        "path": str(tmp_path / "later" / "mixed.jsonl"),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
    }
    if find_spec("axolotl"):
        from axolotl.utils.schemas.datasets import SFTDataset

        assert SFTDataset(**dataset).field_messages == "messages"


def test_llama_factory_finds_the_set_in_its_folder(tmp_path: Path) -> None:
    rows = saved(tmp_path, "llama-factory", PLAIN)
    given = yaml.safe_load((tmp_path / "llama_factory.yaml").read_text())
    [(name, entry)] = json.loads((Path(given["dataset_dir"]) / "dataset_info.json").read_text()).items()
    assert name == given["dataset"]
    assert (Path(given["dataset_dir"]) / entry["file_name"]).samefile(tmp_path / "mixed.jsonl")
    assert (entry["formatting"], entry["columns"]) == ("sharegpt", {"messages": "messages"})
    tags = entry["tags"]
    roles = {message[tags["role_tag"]] for row in rows for message in row[entry["columns"]["messages"]]}
    assert roles <= {tags[f"{role}_tag"] for role in ("user", "assistant", "system")}
    if find_spec("llamafactory"):
        from llamafactory.data.parser import get_dataset_list

        [read] = get_dataset_list([name], given["dataset_dir"])
        assert (read.load_from, read.messages, read.role_tag) == ("file", "messages", "role")


def test_llama_factory_is_not_given_tool_calls_that_it_would_misread(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"LLaMA-Factory reads tool calls in a layout of its own.*--write-for"):
        saved(tmp_path, "llama-factory", PLAIN + WITH_TOOLS)
    assert not (tmp_path / "mixed.jsonl").exists()
