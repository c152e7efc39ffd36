"""Tasks of lm-eval as sets, against the requests that lm-eval builds itself, of data in a temporary folder."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sts_fast.cli.arguments import named_trains
from sts_fast.data import lm_eval as tasks
from sts_fast.data.examples import Example, load_domains, load_examples
from sts_fast.data.sets import Fields, Sets
from sts_fast.errors import InputError

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval and of what it imports

ROWS = [
    {"question": f"What is {i} + {i}?", "options": [str(2 * i), str(i), "none"], "gold": 0, "right": f"{2 * i}"}
    for i in range(1, 4)
]
Write = Callable[..., str]

GENERATES = """
task: sums
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{right}}"
description: "Answer the {{question.split()[0]}} questions.\\n\\n"
num_fewshot: 0
filter_list: [{name: number, filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]}]
metadata: {version: 2.0}
"""
CHOOSES = """
task: choices
output_type: multiple_choice
doc_to_text: "{{question}}\\n{% for option in options %}{{'ABC'[loop.index0]}}. {{option}}\\n{% endfor %}Answer:"
doc_to_choice: ["A", "B", "C"]
doc_to_target: gold
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a task over ROWS (its last for training); returns its path."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split, rows in (("test", ROWS[:2]), ("train", ROWS[2:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("test", "train")}

    def write(name: str, text: str, splits: str = "test_split: test\ntraining_split: train") -> str:
        data = f"dataset_path: json\ndataset_kwargs: {json.dumps({'data_files': files})}\n{splits}\n"
        (tmp_path / f"{name}.yaml").write_text(text + data)
        return f"lm-eval:{tmp_path / name}.yaml"

    return write


def contexts(place: str) -> dict[str, list[str]]:
    """By role, the texts of the messages that lm-eval itself asks a chat model with, document by document."""
    from lm_eval.tasks import TaskManager

    [task] = TaskManager(include_defaults=False).load([place.removeprefix("lm-eval:")])["tasks"].values()
    task.set_config("num_fewshot", 0)
    task.build_all_requests(apply_chat_template=True, chat_template=lambda messages, **_: json.dumps(messages))
    asked = {instance.doc_id: json.loads(instance.args[0]) for instance in task.instances}
    roles = ("system", "user", "assistant")
    return {
        role: ["".join(m["content"] for m in messages if m["role"] == role) for messages in asked.values()]
        for role in roles
    }


def ours(examples: list[Example]) -> dict[str, list[str]]:
    return {
        "system": ["".join(turn.content for turn in example.context if turn.role == "system") for example in examples],
        "user": [example.question for example in examples],
    }


@pytest.mark.parametrize("text", [GENERATES, CHOOSES])
def test_the_questions_are_those_that_lm_eval_asks(write: Write, text: str) -> None:
    place = write("task", text)
    [(name, examples)] = load_domains([place]).items()
    asked = contexts(place)
    assert name == ("sums" if text is GENERATES else "choices")
    assert {role: [t.strip() for t in texts] for role, texts in ours(examples).items()} == {
        role: [t.strip() for t in asked[role]] for role in ("system", "user")
    }
    assert [example.answer for example in examples] == (["2", "4"] if text is GENERATES else ["A", "A"])


def test_a_target_follows_the_start_that_the_task_gives_the_reply(write: Write) -> None:
    place = write("task", GENERATES + 'gen_prefix: "The sum is"\n')
    [examples] = load_domains([place]).values()
    assert [example.answer for example in examples] == ["The sum is 2", "The sum is 4"]
    assert contexts(place)["assistant"] == ["The sum is", "The sum is"]


def test_domains_training_and_demonstrations_read_their_splits(write: Write) -> None:
    shown = GENERATES.replace("num_fewshot", 'fewshot_config: {doc_to_text: "Shown: {{question}}"}\nnum_fewshot')
    first, second = write("first", shown), write("second", CHOOSES)
    assert [*load_domains([f"{first},{second.removeprefix(tasks.PREFIX)}"])] == ["sums", "choices"]
    [(name, both)] = load_domains([f"all={first},{second.removeprefix(tasks.PREFIX)}"]).items()
    assert (name, len(both)) == ("all", 4)
    assert [example.question for example in load_examples(first)] == ["Q: What is 3 + 3?\nA:"]
    sets = Sets.read({"train": first}, [first], [f"sums={first}"], Fields())
    assert [example.question for example in sets.demos["sums"]] == ["Shown: What is 3 + 3?"]
    assert [str(table) for table in sets.tables("domain")] == ["lm-eval:sums:test@2.0"]
    assert [str(table) for table in Sets.read({}, [second], None, Fields()).tables("domain")] == [
        "lm-eval:choices:test"
    ]
    assert named_trains([first, f"b={second}"]) == {"first": [first], "b": [second]}


def test_names_of_the_registry(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    write("first", GENERATES)
    write("second", CHOOSES)
    (tmp_path / "all.yaml").write_text("group: quiz\ntask: [sums, choices]\n")
    registry = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(tasks, "_manager", lambda include_defaults: registry)
    assert [*load_domains(["lm-eval:choices, sums"])] == ["choices", "sums"]
    assert {*load_domains(["lm-eval:quiz"])} == {*load_domains(["lm-eval:*s"])} == {"sums", "choices"}
    for place, trouble in (
        ("lm-eval:nothing", "lm-eval knows no task 'nothing'; `lm-eval ls tasks` lists them"),
        ("lm-eval:", "names no task; write it as lm-eval:gsm8k"),
        ("lm-eval:sums,quiz", "names the task sums twice"),
    ):
        with pytest.raises(InputError, match=trouble):
            load_domains([place])


def test_a_task_that_shuffles_is_the_same_each_time(write: Write, tmp_path: Path) -> None:
    (tmp_path / "shuffle.py").write_text(
        "import random\n\ndef text(doc):\n    return doc['question'] + ' ' + str(random.random())\n\n"
        "def docs(dataset):\n    return dataset.select(random.sample(range(len(dataset)), len(dataset)))\n"
    )
    place = write("shuffled", CHOOSES + "process_docs: !function shuffle.docs\ndoc_to_text: !function shuffle.text\n")
    random.seed(7)
    state = random.getstate()
    first = load_domains([place])
    assert random.getstate() == state
    random.seed(8)
    assert load_domains([place]) == first


FUNCTIONS = "def docs(dataset):\n    raise KeyError('no such column')\n\ndef text(doc):\n    return doc['nothing']\n"
REFUSED: dict[str, tuple[str, str, str]] = {
    "an option in each question": (
        CHOOSES.replace("doc_to_target: gold", "doc_to_target: right") + "doc_to_text: 0\n",
        "test_split: test",
        "puts each option into a question of its own",
    ),
    "whole texts": (
        "task: t\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: question\n",
        "test_split: test",
        "measures whole texts",
    ),
    "images": (GENERATES + "doc_to_image: question\n", "test_split: test", "shows images"),
    "functions that fail": (
        GENERATES + "process_docs: !function broken.docs\n",
        "test_split: test",
        "cannot load the task .*no such column",
    ),
    "no split": (GENERATES, "training_split: train", "cannot load the task .*must have valid or test docs"),
}


@pytest.mark.parametrize(("text", "splits", "trouble"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_question_is_named(write: Write, tmp_path: Path, text: str, splits: str, trouble: str) -> None:
    (tmp_path / "broken.py").write_text(FUNCTIONS)
    with pytest.raises(InputError, match=f"{trouble}.*name another task") as caught:
        load_domains([write("task", text, splits)])
    assert "\n" not in str(caught.value)


def test_a_training_set_needs_a_training_split(write: Write) -> None:
    with pytest.raises(InputError, match="the task sums of lm-eval has no training split"):
        load_examples(write("task", GENERATES, "test_split: test"))


def test_without_lm_eval_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match="pip install 'sts-fast\\[lm-eval\\]'"):
        load_domains(["lm-eval:gsm8k"])


def test_a_document_that_cannot_be_written_is_left_out(write: Write, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "def text(doc):\n    return doc['question'] if doc['right'] != '4' else doc['nothing']\n"
    )
    text = GENERATES.replace('"Q: {{question}}\\nA:"', "!function odd.text")
    with pytest.warns(UserWarning, match="1 with a document that its task fails to write .'nothing'."):
        [examples] = load_domains([write("odd", text)]).values()
    assert [example.question for example in examples] == ["What is 1 + 1?"]


def test_seeds_are_those_of_lm_eval() -> None:
    import inspect

    from lm_eval.evaluator import simple_evaluate

    given: Any = inspect.signature(simple_evaluate).parameters
    assert (given["random_seed"].default, given["numpy_random_seed"].default) == (
        tasks.PYTHON_SEED,
        tasks.NUMPY_SEED,
    )
