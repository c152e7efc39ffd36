"""Folders with the results of one model in several files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_results import CASES, accuracies, write_results, write_samples

from sts_fast.errors import InputError
from sts_fast.outcomes.outcomes import read_outcomes
from sts_fast.outcomes.read import read_evaluation

needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the situations from reports are not on this machine")

CHANGES = {"law": 0.02, "math": 0.28, "physics": 0.17, "history": -0.05}
LATER = "2025-05-02T10-00-00.000000"


def values(folder: Path) -> dict[str, float]:
    return {name: task.results["acc,none"].value for name, task in read_evaluation(folder).tasks.items()}


@needs_cases
@pytest.mark.parametrize("case", ["08_lmeval_one_file_per_task", "08b_lmeval_folder_per_task"])
def test_files_and_folders_of_one_task_each_are_one_evaluation(case: str) -> None:
    outcomes = read_outcomes(CASES / case / "b", CASES / case / "a")
    assert {name: outcome.change for name, outcome in outcomes.domains.items()} == pytest.approx(CHANGES)
    assert outcomes.warnings == []


def test_the_newest_result_of_every_task_is_taken(tmp_path: Path) -> None:
    write_results(tmp_path / "org__base", accuracies(law=0.1, math=0.2))
    write_results(tmp_path / "org__base", accuracies(law=0.3, art=0.4), time=LATER)
    assert values(tmp_path) == {"law": 0.3, "art": 0.4, "math": 0.2}
    assert read_evaluation(tmp_path).warnings == [f"{tmp_path}: the newest of 2 results is taken of law"]
    # In other folders too, where the files name one model.
    write_results(tmp_path / "again" / "org__base", accuracies(math=0.9), time="2026-01-01T00-00-00.000000")
    assert values(tmp_path)["math"] == 0.9


def test_samples_belong_to_the_file_that_is_taken(tmp_path: Path) -> None:
    right = [1.0, 0.0, 1.0, 1.0]
    for time, name in (("2025-05-01T10-00-00.000000", "law"), (LATER, "math")):
        entry = {name: {"alias": name, "acc,none": 0.75}}
        write_results(tmp_path / name, entry, time=time)
        write_samples(tmp_path / name, name, right, time=time)
    evaluation = read_evaluation(tmp_path)
    assert [len(task.results["acc,none"].correct) for task in evaluation.tasks.values()] == [4, 4]


def test_results_of_several_models_are_refused(tmp_path: Path) -> None:
    write_results(tmp_path / "a", accuracies(law=0.1))
    write_results(tmp_path / "b", accuracies(math=0.2), model="org/tuned")
    with pytest.raises(InputError, match=r"contains results of several models \(org/base, org/tuned\)"):
        read_evaluation(tmp_path)
    # A revision and an adapter make another model of the same name.
    for arguments in ("pretrained=org/base,revision=step1000", "pretrained=org/base,peft=out/lora"):
        write_results(tmp_path / "b", accuracies(math=0.2), config={"model_args": arguments})
        with pytest.raises(InputError, match=r"several models \(org/base, org/base \("):
            read_evaluation(tmp_path)
    # Files that name no model are of one only if no task is in two folders.
    for name in "ab":
        write_results(tmp_path / name, accuracies(law=0.1), model=None)
    with pytest.raises(InputError, match=r"contains results of several models \(a, b\)"):
        read_evaluation(tmp_path)
    write_results(tmp_path / "b", accuracies(math=0.2), model=None)
    assert values(tmp_path) == {"law": 0.1, "math": 0.2}


def test_two_results_of_one_time_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_results(tmp_path / name, accuracies(law=0.1))
    with pytest.raises(InputError, match="have results of 'law' of the same time: remove one of them"):
        read_evaluation(tmp_path)


def test_tasks_that_are_shown_by_one_name_keep_their_own(tmp_path: Path) -> None:
    folder, other = tmp_path / "a", write_results(tmp_path / "b", accuracies(law=0.3))
    write_results(folder, {"mmlu_law": {"alias": " - law", "acc,none": 0.1}})
    write_results(folder, {"mmlu_pro_law": {"alias": "law", "acc,none": 0.2}}, time=LATER)
    assert values(folder) == {"mmlu_law": 0.1, "mmlu_pro_law": 0.2}
    with pytest.raises(InputError, match=r"'mmlu_law' and 'mmlu_pro_law' in .* both match 'law'"):
        read_outcomes(folder, other)


def test_other_json_in_a_folder_is_named(tmp_path: Path) -> None:
    path = write_results(tmp_path, accuracies(law=0.1)) / "results_2025-05-01T10-00-00.000000.json"
    path.rename(tmp_path / "base_2025-05-01T10-00-00.json")
    assert values(tmp_path) == {"law": 0.1}
    (tmp_path / "notes.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match=r"notes\.json is neither a results file"):
        read_evaluation(tmp_path)
