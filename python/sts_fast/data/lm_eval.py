"""Tasks of the LM Evaluation Harness as sets: `lm-eval:gsm8k,mmlu_pro_law`, with the questions that lm-eval asks.

A name is what lm-eval's `--tasks` takes: that of a task, a group or a tag, a pattern, or the path of a YAML file. A
group or a tag is all its tasks. lm-eval loads the data, from the caches of `datasets`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.data.folders import Origin, Use
from sts_fast.data.tables import NumberedRow, Row, Table, exists
from sts_fast.errors import InputError, UnusableRow, listed, one_line

PREFIX = "lm-eval:"
# The seeds that lm-eval starts with. Some tasks shuffle their options.
PYTHON_SEED, NUMPY_SEED = 0, 1234


def is_tasks(text: str) -> bool:
    """True for a place that names tasks."""
    return text.startswith(PREFIX)


def task_origins(text: str, use: Use) -> Iterator[tuple[str, Origin]]:
    """Yields (name, rows) of each task of a place: of its evaluated documents, or of those for another use.

    Raises InputError where lm-eval is not installed, does not know a name or cannot load a task, or where a task asks
    in a way that is no question with one answer.
    """
    names = [name.strip() for name in text.removeprefix(PREFIX).split(",") if name.strip()]
    if not names:
        raise InputError(f"{text} names no task; write it as {PREFIX}gsm8k, several separated by commas")
    found: set[str] = set()
    for given in names:
        with _seeded():
            tables = {name: _table(name, task, use) for name, task in _load(given).items()}
        for name, table in tables.items():
            if name in found:
                raise InputError(f"{text} names the task {name} twice; name it once")
            found.add(name)
            yield name, Origin([table])


@contextmanager
def _seeded() -> Iterator[None]:
    """Python's and numpy's random numbers as lm-eval starts with them; afterwards they go on as before."""
    states = random.getstate(), np.random.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@cache
def _manager(include_defaults: bool) -> Any:
    """lm-eval's own registry; the path of a YAML file needs none of the names that it would search for."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"for tasks of lm-eval, lm-eval is needed ({one_line(error)}): pip install 'sts-fast[lm-eval]'"
        ) from error
    return TaskManager(include_defaults=include_defaults)


def _load(given: str) -> dict[str, Any]:
    """By name, the tasks that a name stands for."""
    is_path = exists(Path(given)) and Path(given).is_file()
    manager = _manager(not is_path)
    names = [given] if is_path else manager.match_tasks([given])
    if not names:
        raise InputError(
            f"lm-eval knows no task {given!r}; `lm-eval ls tasks` lists them, and the path of a YAML file is one too"
        )
    try:
        tasks: dict[str, Any] = manager.load(names)["tasks"]
    except Exception as error:  # a task is a program: it can raise anything, as can loading its data
        raise InputError(
            f"lm-eval cannot load the task {given} ({one_line(error)}); where its data are not in the cache, run "
            "lm-eval on it once, or name another task"
        ) from error
    return tasks


def _table(name: str, task: Any, use: Use) -> Table:
    """The rows of a task for a use."""
    from lm_eval.api.task import ConfigurableTask

    def refused(why: str) -> InputError:
        return InputError(
            f"the task {name} of lm-eval {why}; name another task, or give its questions and answers as a file"
        )

    if type(task) is not ConfigurableTask:
        raise refused(f"is a program of its own ({type(task).__name__})")
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise refused("measures whole texts, and asks no question")
    if getattr(task, "MULTIMODAL", False):
        raise refused("shows images or plays sounds")
    if task.multiple_input:
        raise refused("puts each option into a question of its own")
    if task.prompt is not None:
        raise refused("takes its prompts from promptsource")
    # Made once: a task may draw its words anew each time.
    docs = enumerate(_docs(name, task, use), start=1)
    rows: list[NumberedRow] = [(number, None, _row(name, number, task, doc, use)) for number, doc in docs]
    version = (task.config.metadata or {}).get("version")
    place = f"{PREFIX}{name}:{_split(task, use)}"
    return Table(place if version is None else f"{place}@{version}", lambda: iter(rows))


def _docs(name: str, task: Any, use: Use) -> list[Any]:
    if use == "train" and not task.has_training_docs():
        raise InputError(f"the task {name} of lm-eval has no training split; name another task, or give a file")
    try:
        docs = {"train": task.training_docs, "domain": lambda: task.eval_docs, "demos": task.fewshot_docs}[use]()
        return list(docs)
    except Exception as error:  # functions of the task
        raise InputError(
            f"lm-eval cannot prepare the documents of the task {name} ({one_line(error)}); name another task"
        ) from error


def _split(task: Any, use: Use) -> str:
    config = task.config
    tested: str = config.test_split or config.validation_split
    if use == "demos":
        return str(task.fewshot_cfg.split or config.training_split or config.validation_split or tested)
    return str(config.training_split) if use == "train" else tested


def _row(name: str, number: int, task: Any, doc: Any, use: Use) -> Row | UnusableRow:
    """A document as a conversation: the task's description, its question, and the first right answer, if any."""
    from lm_eval.api.utils import maybe_delimit

    where = f"{PREFIX}{name}: row {number}"
    # lm-eval may write a demonstration in another way than a question.
    shown = task.fewshot_cfg if use == "demos" else None
    try:
        question = task.doc_to_text(doc, shown and shown.doc_to_text)
        target = task.doc_to_target(doc, shown and shown.doc_to_target)
        if isinstance(target, list):
            target = target[0] if target else ""
        if isinstance(target, int) and task.config.doc_to_choice is not None:
            choices = task.doc_to_choice(doc, shown and shown.doc_to_choice)
            target = choices[target] if 0 <= target < len(choices) else ""
        description = task.resolve_field(doc, task.config.description) or ""
        start = task.resolve_field(doc, shown.gen_prefix) if shown else task.doc_to_prefix(doc)
    except Exception as error:  # templates and functions of the task
        return UnusableRow(where, f"a document that its task fails to write ({one_line(error)})", "correct the task")
    if not isinstance(question, str):
        return UnusableRow(where, "several questions, one for each option", "give one question a row")
    answer = maybe_delimit(start, str(target)) if target != "" else ""
    turns = {"system": description, "user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items() if text]}


def tasks_name(text: str) -> str:
    """The names in a place, as the name of one set."""
    return listed(Path(name.strip()).name.partition(".")[0] for name in text.removeprefix(PREFIX).split(","))
