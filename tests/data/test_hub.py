"""Data sets by their name on the hub, out of real caches of datasets and huggingface_hub; there is no network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sts_fast.data.examples import load_domains, load_examples
from sts_fast.data.hub import hub_name, hub_origin
from sts_fast.data.sets import Fields, Sets
from sts_fast.errors import InputError

datasets = pytest.importorskip("datasets")
REVISION = "0123456789abcdef0123456789abcdef01234567"
SPLITS = {
    "train": [{"question": f"{i}+1?", "answer": str(i + 1), "subject": "sums"} for i in range(3)],
    "test": [{"question": q, "answer": "x", "subject": name} for q, name in (("Who?", "law"), ("Where?", "geo"))],
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that datasets itself has written, of acme/quiz with two configurations, and no network."""
    cache = tmp_path / "cache"
    for config in ("main", "other"):
        source = tmp_path / config / "quiz"
        source.mkdir(parents=True)
        for split, rows in SPLITS.items():
            (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        datasets.load_dataset(str(source), cache_dir=str(tmp_path / f"{config} cache"))
        [written] = (tmp_path / f"{config} cache" / "quiz" / "default" / "0.0.0").glob("*[0-9a-f]")
        description = cache / "acme___quiz" / config / "0.0.0" / REVISION / "dataset_info.json"
        shutil.copytree(written, description.parent)
        description.write_text(json.dumps(json.loads(description.read_text()) | {"config_name": config}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.usefixtures("cache")
def test_a_training_set_of_the_hub() -> None:
    for name in ("acme/quiz:main", "acme/quiz:main:train"):
        examples = load_examples(name)
        assert [(example.id, example.question, example.answer) for example in examples] == [
            ("1", "0+1?", "1"), ("2", "1+1?", "2"), ("3", "2+1?", "3"),
        ]  # fmt: skip
    assert [example.question for example in load_examples("acme/quiz:main:train[1:2]")] == ["1+1?"]
    assert [example.question for example in load_examples(["acme/quiz:main", "acme/quiz:other:test"])][2:] == [
        "2+1?", "Who?", "Where?",
    ]  # fmt: skip


@pytest.mark.usefixtures("cache")
def test_domains_of_the_hub() -> None:
    domains = load_domains(["acme/quiz:main", "all=acme/quiz:other", "quiz=acme/quiz:main:train"])
    assert {name: [example.question for example in of] for name, of in domains.items()} == {
        "law": ["Who?"],
        "geo": ["Where?"],
        "all": ["Who?", "Where?"],
        "quiz": ["0+1?", "1+1?", "2+1?"],
    }


@pytest.mark.usefixtures("cache")
def test_the_record_names_configuration_split_and_revision() -> None:
    [table] = hub_origin("acme/quiz:main", "domain").tables
    assert str(table) == f"acme/quiz:main:test@{REVISION}"
    assert hub_origin("acme/quiz:main", "domain").left_out == ["train"]
    sets = Sets.read({"train": "acme/quiz:main"}, {"d": "acme/quiz:other"}, None, Fields())
    assert [str(table) for table in sets.tables("train")] == [f"acme/quiz:main:train@{REVISION}"]
    assert [str(table) for table in sets.tables("domain")] == [f"acme/quiz:other:test@{REVISION}"]


@pytest.mark.usefixtures("cache")
def test_a_path_of_the_same_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "acme" / "quiz").mkdir(parents=True)
    (tmp_path / "acme" / "quiz" / "train.jsonl").write_text('{"question": "of the folder"}')
    assert [example.question for example in load_examples("acme/quiz")] == ["of the folder"]
    assert [*load_domains(["acme/quiz"])] == ["quiz"]


UNAVAILABLE = {
    "several configurations": ("acme/quiz", "multiple .* configurations .* main", "owner/name:config:split"),
    "no such configuration": ("acme/quiz:nothing", "config 'nothing'", "correct the path, or name it as"),
    "no such split": ("acme/quiz:main:dev", "Unknown split .dev.", "correct the path, or name it as"),
    "not in the cache": ("acme/other", "acme/other is no file or folder, and no such data set", "correct the path"),
    "under a name": ("law=acme/other:main", "acme/other:main is no file or folder, and no such", "correct the path"),
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("name", "reason", "remedy"), UNAVAILABLE.values(), ids=UNAVAILABLE.keys())
def test_what_cannot_be_loaded_is_one_sentence(name: str, reason: str, remedy: str) -> None:
    with pytest.raises(InputError, match=f"(?s){reason}.*{remedy}") as caught:
        load_domains([name])
    assert "\n" not in str(caught.value)


def test_texts_that_are_no_names() -> None:
    assert hub_name("acme/quiz") == hub_name("acme/quiz:main") == hub_name("acme/quiz:main:test[:5]") == "quiz"
    for text in (
        "quiz",
        "./acme/quiz",
        "../quiz",
        "/acme/quiz",
        "acme/quiz/deep",
        "acme/quiz.jsonl",
        "a/b.csv.gz",
        "a b/c",
    ):
        assert hub_name(text) is None
    for text in ("acme", "acme/quiz.jsonl", "./acme/quiz"):
        with pytest.raises(
            InputError, match=r"does not exist; give a .* or a data set of the hub as owner/name:config"
        ):
            load_examples(text)


def test_files_that_huggingface_hub_has_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    root = tmp_path / "hub" / "datasets--acme--tales"
    snapshot = root / "snapshots" / REVISION
    for name in ("all/test.jsonl", "all/dev.jsonl"):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(json.dumps({"question": name}))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(REVISION)
    download = huggingface_hub.snapshot_download

    def from_cache(*names: str, **options: Any) -> str:
        return download(*names, cache_dir=tmp_path / "hub", **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_cache)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "nothing")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    origin = hub_origin("acme/tales:all", "domain")
    assert [table.path for table in origin.tables] == [snapshot / "all" / "test.jsonl"]
    assert origin.left_out == ["dev"]
    for absent in ("acme/tales:none", "acme/tales:all:test", "acme/tales:.."):
        with pytest.raises(InputError, match=f"{absent} is no file or folder, and no such data set can be loaded"):
            hub_origin(absent, "domain")


def test_nothing_of_the_hub_needs_datasets_until_it_is_named() -> None:
    program = (
        "import sys; sys.modules['datasets'] = None\n"
        "from sts_fast.data.examples import load_examples\n"
        "from sts_fast.errors import InputError\n"
        "try: load_examples('acme/quiz')\n"
        "except InputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    remedy = "to load it from the hub, datasets is needed: pip install 'sts-fast[datasets]'"
    assert done.stdout == f"acme/quiz is no file or folder; {remedy}\n"


def test_versions_that_can_run_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(InputError, match=r"datasets 3.6.0 can run programs of the hub; .* pip install 'datasets>=4'"):
        hub_origin("acme/quiz", "train")
