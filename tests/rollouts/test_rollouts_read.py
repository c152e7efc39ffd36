"""Rollouts as TRL and verl write them, and what is malformed about others."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sts_fast.data.turns import Turn
from sts_fast.errors import InputError
from sts_fast.rollouts.read import Columns, Rollouts, load_rollouts

SHARED = Path(__file__).parents[3] / "shared" / "assets" / "data"


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(rollouts: Rollouts) -> list[tuple[int, str, float]]:
    return [(row.group, row.completion, row.reward) for row in rollouts.rows]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_trl_logs_completions_with_a_column_for_each_reward_function_and_the_advantage(tmp_path: Path) -> None:
    rows = [
        {
            "step": step, "prompt": user(f"Q{i // 2}"), "completion": reply(f"A{i}"),
            "accuracy_reward": float(i % 2), "think_format_reward": 0.5 if i else None, "advantage": i - 1.5,
        }
        for step in (5, 10)
        for i in range(4)
    ]  # fmt: skip
    for step in (5, 10):
        write(tmp_path / "completions" / f"completions_{step:05}.parquet", [row for row in rows if row["step"] == step])
    found = load_rollouts(tmp_path / "completions")
    # The same prompt at another step was answered by another policy.
    assert plain(found)[:4] == [(0, "A0", 0.0), (0, "A1", 1.5), (1, "A2", 0.5), (1, "A3", 1.5)]
    assert [row.group for row in found.rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.rows[0].prompt == (Turn("user", "Q0"),)
    assert found.advantages.tolist() == [-1.5, -0.5, 0.5, 1.5] * 2
    assert found.read_as["reward"] == "accuracy_reward + think_format_reward"
    named = load_rollouts(tmp_path / "completions", Columns(rewards=["accuracy_reward"]))
    assert named.rewards.tolist() == [0.0, 1.0] * 4
    # Then advantages are made of these: (r - mean) / (std + 1e-4), std unbiased.
    assert np.allclose(named.advantages, np.tile([-0.5, 0.5], 4) / (np.std([0, 1], ddof=1) + 1e-4))


def test_trl_reward_functions_of_any_name_stand_between_completion_and_advantage(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "prompt": "Q", "completion": f"A{i}", "is_short": i, "note": "x", "advantage": float(i)}
        for i in range(2)
    ]
    found = load_rollouts(write(tmp_path / "c.parquet", rows))
    assert found.read_as["reward"] == "is_short"
    assert found.rewards.tolist() == [0.0, 1.0]


def test_verl_dumps_a_file_for_each_step(tmp_path: Path) -> None:
    for step in (2, 10):
        rows = [
            {"input": f"user\nQ{i // 2}\nassistant\n", "output": f"A{step}.{i}", "gts": "7", "score": i % 2 == 1,
             "step": step, "acc": True, "uid": f"u{i // 2}"}
            for i in (0, 2, 1, 3)
        ]  # fmt: skip
        write(tmp_path / f"{step}.jsonl", rows)
    found = load_rollouts(tmp_path)
    assert plain(found)[:4] == [(0, "A2.0", 0.0), (0, "A2.1", 1.0), (1, "A2.2", 0.0), (1, "A2.3", 1.0)]
    assert found.rows[4].completion == "A10.0"  # step 10 after step 2
    assert found.read_as == {
        "prompt": "input", "completion": "output", "reward": "score", "group": "uid", "step": "step"
    }  # fmt: skip


def test_a_row_may_hold_all_completions_of_its_prompt(tmp_path: Path) -> None:
    rows = [{"question": "Q", "responses": ["a", "b", ""], "rewards": [1, None, 0], "finish_reason": "length"}]
    found = load_rollouts(write(tmp_path / "r.jsonl", rows))
    assert plain(found) == [(0, "a", 1.0), (0, "", 0.0)]
    assert found.n_unrewarded == 1
    assert [row.truncated for row in found.rows] == [True, True]


def test_rollouts_in_memory_are_those_of_a_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": user(f"Q{i // 2}"), "completion": reply(f"A{i}"), "reward": float(i % 2)} for i in range(4)]
    of_file = load_rollouts(write(tmp_path / "a.jsonl", rows))
    assert [str(table) for table in of_file.origin.tables] == [str(tmp_path / "a.jsonl")]
    for in_memory in (rows, datasets.Dataset.from_list(rows), pa.Table.from_pylist(rows)):
        found = load_rollouts(in_memory)
        assert found.rows == of_file.rows
        assert [str(table) for table in found.origin.tables] == ["'rollouts' in memory"]
    with pytest.raises(InputError, match="'rollouts' in memory: row 2 has no field 'completion'"):
        load_rollouts([rows[0], {"prompt": "Q"}])


def test_rollouts_of_several_places(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "completion": f"A{i}", "reward": float(i)} for i in range(3)]
    of_step = write(tmp_path / "steps" / "2.jsonl", rows[:1])
    write(tmp_path / "steps" / "10.jsonl", rows[1:2])
    more = tmp_path / "more.tsv"
    more.write_text("prompt\tcompletion\treward\nQ\tA2\t2\n")
    found = load_rollouts([tmp_path / "steps", str(more)])
    assert plain(found) == [(0, "A0", 0.0), (1, "A1", 1.0), (2, "A2", 2.0)]
    assert [table.path for table in found.origin.tables] == [of_step, tmp_path / "steps" / "10.jsonl", more]


def test_groups_and_what_tells_nothing_are_counted(tmp_path: Path) -> None:
    rewards = {"apart": [0, 1, 1], "settled": [1, 1], "lone": [0], "unrewarded": [None, float("nan")]}
    rows = [
        {"prompt": name, "completion": f"{name} {i}" if i else " ", "reward": reward, "truncated": i == 1}
        for name, of_prompt in rewards.items()
        for i, reward in enumerate(of_prompt)
    ]
    found = load_rollouts(write(tmp_path / "r.jsonl", rows))
    assert found.counts() == {
        "n_completions": 6, "n_unrewarded": 2, "n_groups": 3, "n_lone": 1, "n_settled": 1, "n_empty": 3,
        "n_truncated": 2,
    }  # fmt: skip
    assert [bool(advantage) for advantage in found.advantages] == [True, True, True, False, False, False]


def test_conversations_end_with_the_reply_that_is_the_completion(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be short."}
    tool = [*reply("calling"), {"role": "tool", "content": "42"}, *reply("It is 42.")]
    rows = [
        {"prompt": [system, *user("Q")], "completion": tool, "reward": 1},
        {"prompt": [system, *user("Q")], "completion": reply("No."), "reward": 0},
        {"prompt": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>so", "completion": " x", "reward": 0},
    ]
    found = load_rollouts(write(tmp_path / "r.jsonl", rows))
    asked = (Turn("system", "Be short."), Turn("user", "Q"))
    assert found.rows[0].prompt == (*asked, Turn("assistant", "calling"), Turn("tool", "42"))
    assert found.rows[0].completion == "It is 42."
    assert found.rows[1].prompt == asked
    assert found.rows[1].group == found.rows[0].group
    assert (found.rows[2].prompt, found.rows[2].completion) == ((Turn("user", "Q"),), "<think>so x")


def test_columns_can_be_named(tmp_path: Path) -> None:
    rows = [{"x": {"ask": "Q"}, "y": f"A{i}", "extra": {"r": str(i), "s": "true"}, "who": 3} for i in range(2)]
    columns = Columns(prompt="x.ask", completion="y", rewards=["extra.r", "extra.s"], group="who")
    found = load_rollouts(write(tmp_path / "r.jsonl", rows), columns)
    assert plain(found) == [(0, "A0", 1.0), (0, "A1", 2.0)]


GOOD = {"prompt": "Q", "completion": "A", "reward": 1}


def bad_gzip(path: Path) -> Path:
    path = path.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode() + b"\n" * 100)[:-12])
    return path


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path = path.with_name(name)
        path.write_bytes(data)
        return path

    return make


def rows(*given: Any) -> Callable[[Path], Path]:
    return lambda path: write(path, list(given))


MALFORMED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such file": (lambda path: path.with_name("none.jsonl"), "does not exist"),
    "an unknown suffix": (content("r.txt", b"x"), "suffix"),
    "a folder without files": (lambda path: path.parent, "contains no example files"),
    "an empty file": (content("r.jsonl", b"\n"), "contains no rollouts"),
    "no JSON": (content("r.jsonl", b'{"prompt": "Q",\n'), "line 1 has text that is not JSON"),
    "not UTF-8": (content("r.jsonl", b'{"prompt": "\xff"}\n'), "not UTF-8"),
    "a damaged gzip": (bad_gzip, "cannot be read"),
    "a damaged parquet": (content("r.parquet", b"PAR1 and no more"), "cannot be read"),
    "a row that is a list": (rows(GOOD, ["Q", "A", 1]), "row 2 is a list"),
    "no prompt column": (rows({"completion": "A", "reward": 1}), "contain prompts, .* --prompt-field"),
    "no completion column": (rows({"prompt": "Q", "reward": 1}), "contain completions, .* --completion-field"),
    "no reward column": (rows({"prompt": "Q", "completion": "A", "gts": "7"}), "contain rewards, .* --reward-field"),
    "a column that ends": (rows(GOOD, {"prompt": "Q", "completion": "A"}), "row 2 has no field 'reward'"),
    "an empty prompt": (rows({**GOOD, "prompt": " "}), "row 1 has no prompt"),
    "a prompt that is a number": (rows({**GOOD, "prompt": 7}), "row 1 contains a number in 'prompt'"),
    "a conversation without its user": (
        rows({**GOOD, "prompt": [{"role": "system", "content": "S"}]}), "without a user turn, or an empty one",
    ),
    "a turn of an unknown role": (rows({**GOOD, "prompt": [{"role": "me", "content": "Q"}]}), "unknown role 'me'"),
    "a prompt that ends with the reply": (rows({**GOOD, "prompt": user("Q") + reply("A")}), "ends with a reply"),
    "reasoning apart from the completion": (
        rows({**GOOD, "completion": [{"role": "assistant", "content": "A", "reasoning_content": "hm"}]}),
        "reasoning is apart from its text; give the completion as it was sampled",
    ),
    "a completion that ends with the user": (rows({**GOOD, "completion": user("A")}), "turn of the user"),
    "a completion that is an object": (rows({**GOOD, "completion": {"text": "A"}}), "an object in 'completion'"),
    "a reward in words": (rows(GOOD, {**GOOD, "reward": "good"}), "row 2 contains 'good' in 'reward'"),
    "a reward that is infinite": (rows({**GOOD, "reward": float("inf")}), "row 1 contains inf"),
    "a reward that is an object": (rows({**GOOD, "reward": {"accuracy": 1}}), "an object in 'reward'"),
    "rewards that do not match": (rows({**GOOD, "completion": ["a", "b"], "reward": [1]}), "2 completions but 1"),
    "no reward in any row": (rows({**GOOD, "reward": None}, {**GOOD, "reward": None}), "no reward in any row"),
    "an advantage in some rows": (
        rows({**GOOD, "advantage": 1.0}, {**GOOD, "advantage": None}), "an advantage in some rows but not in all",
    ),
    "a group of two prompts": (
        rows({**GOOD, "uid": "a"}, {**GOOD, "uid": "a", "prompt": "R"}),
        "row 2 has a different prompt from earlier rows of its group 'a'",
    ),
    "a group that is a list": (rows({**GOOD, "group": [1]}), "row 1 contains a list in 'group'"),
    "half a character": (content("r.jsonl", b'{"prompt": "\\ud800", "completion": "A", "reward": 1}'), "half a char"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_rollouts_are_answered_by_one_clear_line(kind: str, tmp_path: Path) -> None:
    make, message = MALFORMED[kind]
    (tmp_path / "of").mkdir()
    path = make(tmp_path / "of" / "r.jsonl")
    with pytest.raises(InputError, match=message) as caught:
        load_rollouts(path)
    said = str(caught.value)
    assert str(tmp_path) in said
    assert "\n" not in said
    assert len(said) < 400


@pytest.mark.skipif(not SHARED.is_dir(), reason="real material is not there")
def test_prompts_of_a_real_rl_model_that_were_logged_as_rendered(tmp_path: Path) -> None:
    lines = (SHARED / "unireason" / "UniReason-RL_math500.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    scored = [{**json.loads(line), "score": i % 2} for i, line in enumerate(lines)]
    found = load_rollouts(write(tmp_path / "r.jsonl", scored))
    for row in found.rows:
        [turn] = row.prompt
        role, question = turn.role, turn.content
        assert role == "user"
        assert question.startswith("Solve the following math problem.")
        assert "<|" not in question
