"""Completions sampled from the model and rewarded, and the command that forecasts from them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from reward import by_length
from tiny import Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sts_fast.cli import main
from sts_fast.data.examples import Example, load_examples
from sts_fast.data.template import PromptTemplate
from sts_fast.data.turns import Turn
from sts_fast.errors import InputError
from sts_fast.files import Kept
from sts_fast.rollouts import Rollout, load_checker, load_rollouts, sample_rollouts

QUESTIONS = [Example(str(i), f"What is {i} + {i}?", str(2 * i)) for i in range(3)]


def fails(question: str, completion: str, answer: str | None) -> float:
    raise KeyError("no such reward")


def test_completions_are_samples_of_the_models_distribution(tiny: Tiny) -> None:
    """First tokens of many completions, against the probabilities that one forward pass gives."""
    n, temperature = 2000, 0.7
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    sampled = sample_rollouts(
        model=model, tokenizer=tokenizer, questions=QUESTIONS[:1], check=by_length, n_samples=n,
        temperature=temperature, max_new_tokens=1,
    )  # fmt: skip
    ids = torch.tensor([tokenizer("Question: What is 0 + 0?\nAnswer:").input_ids])
    with torch.no_grad():
        p = torch.softmax(model(ids).logits[0, -1].double() / temperature, -1).numpy()
    texts = [row.completion for row in sampled.rows]
    for token in np.argsort(-p)[:5]:
        text = tokenizer.decode([token], skip_special_tokens=True)
        same = [i for i in range(len(p)) if tokenizer.decode([i], skip_special_tokens=True) == text]
        expected = p[same].sum()
        assert abs(texts.count(text) / n - expected) < 5 * math.sqrt(expected / n)


def test_a_questions_completions_depend_on_it_and_the_seed_alone(tiny: Tiny, tmp_path: Path) -> None:
    def sampled(questions: list[Example], seed: int = 0) -> list[tuple[str, str, bool | None]]:
        found = sample_rollouts(
            model=tiny.model, questions=questions, check=by_length, n_samples=3, max_new_tokens=5, seed=seed
        )
        found.save(tmp_path / "r.jsonl")
        again = load_rollouts(tmp_path / "r.jsonl")
        assert [row.completion for row in again.rows] == [row.completion for row in found.rows]
        assert again.rewards.tolist() == found.rewards.tolist()
        assert again.group_of.tolist() == found.group_of.tolist()
        assert [row.truncated for row in again.rows] == [row.truncated for row in found.rows]
        assert all(row.reward == len(row.completion) / 10 for row in found.rows)
        return [(row.prompt[-1].content, row.completion, row.truncated) for row in found.rows]

    state = torch.get_rng_state()
    all_three = sampled(QUESTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled(QUESTIONS[1:2]) == all_three[3:6]
    assert sampled(QUESTIONS, seed=1) != all_three
    assert any(truncated for _, _, truncated in all_three)


def test_sampling_goes_on_from_what_was_kept(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.model), AutoTokenizer.from_pretrained(tiny.model)
    given = {"model": model, "tokenizer": tokenizer, "check": by_length, "n_samples": 2, "max_new_tokens": 3}
    kept = Kept(tmp_path)
    first = sample_rollouts(questions=QUESTIONS[:2], kept=kept, **given).rows
    assert kept.counts() == {"completions": 2}
    every = sample_rollouts(questions=QUESTIONS, kept=kept, **given).rows
    assert kept.counts() == {"completions": 3}
    assert every[:4] == first
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", None)  # nothing is sampled; rewards are given anew
        again = sample_rollouts(questions=QUESTIONS, kept=kept, **{**given, "check": lambda *of: 7.0}).rows
    assert [(row.completion, row.truncated, row.reward) for row in again] == [
        (row.completion, row.truncated, 7.0) for row in every
    ]
    assert every == sample_rollouts(questions=QUESTIONS, **given).rows
    for n, other in enumerate(({"seed": 1}, {"temperature": 0.9}, {"n_samples": 3}, {"max_new_tokens": 2}), 4):
        sample_rollouts(questions=QUESTIONS[:1], kept=kept, **{**given, **other})
        assert kept.counts() == {"completions": n}
    model.generation_config.repetition_penalty = 1.5
    sample_rollouts(questions=QUESTIONS[:1], kept=kept, **given)
    assert kept.counts() == {"completions": 8}
    with torch.no_grad():
        model.lm_head.weight += 1
    sample_rollouts(questions=QUESTIONS[:1], kept=kept, **given)
    assert kept.counts() == {"completions": 9}


def test_completions_end_with_the_context(tiny: Tiny) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.model), AutoTokenizer.from_pretrained(tiny.model)

    def sampled(max_new_tokens: int) -> list[Rollout]:
        asked = {"model": model, "tokenizer": tokenizer, "questions": QUESTIONS[:1], "check": by_length}
        return sample_rollouts(**asked, n_samples=4, max_new_tokens=max_new_tokens).rows

    two, nine = sampled(2), sampled(9)
    model.config.max_position_embeddings = 2 + len(
        PromptTemplate(tokenizer).token_ids([Turn("user", "What is 0 + 0?")])
    )
    assert sampled(9) == two != nine
    model.resize_token_embeddings(3)
    with pytest.raises(InputError, match="belongs to another model"):
        sampled(2)


def test_checkers() -> None:
    exact = load_checker("exact")
    assert (exact("q", " 4\n", "4"), exact("q", "4.", "4")) == (1.0, 0.0)
    assert load_checker("reward:by_length")("q", "four", None) == 0.4


def test_math_is_compared_by_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    math = load_checker("math")
    for answer, right, wrong in (
        ("48/2 = <<48/2=24>>24\n#### 72", "So she sold $72$ clips.", "She sold 71."),
        (r"\frac{1}{2}", r"The answer is \boxed{0.5}", r"\boxed{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", r"\boxed{(\pi/2, 3)}"),
    ):
        assert math("q", right, answer) == 1
        assert math("q", wrong, answer) == 0


def test_what_cannot_check_is_told(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    for name, message in (
        ("reward", "must be exact, math, or package.module:function"),
        ("no_such_module:f", "no_such_module cannot be imported"),
        ("math:no_such", "math has no function no_such"),
    ):
        with pytest.raises(InputError, match=message):
            load_checker(name)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"pip install 'sts-fast\[math\]'"):
        load_checker("math")
    broken = ModuleType("broken_checker")
    broken.gives_none = lambda question, completion, answer: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_checker", broken)
    options = {"model": tiny.model, "questions": QUESTIONS, "n_samples": 1, "max_new_tokens": 1}
    for more, message in (
        ({"check": "broken_checker:gives_none"}, "failed on question 0"),
        ({"check": fails}, "failed on question 0 .*no such reward"),
        ({"check": lambda *given: math.nan}, "returned nan for question 0"),
        ({"check": "exact", "questions": [Example("7", "What?", None)]}, "question 7 has none"),
        ({"check": "exact", "questions": [Example("8", "word " * 5000, "4")]}, "question 8 has .* leaves no room"),
        ({"check": "exact", "n_samples": 0}, "--sample must be at least 1"),
        ({"check": "exact", "temperature": 0.0}, "--temperature must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            sample_rollouts(**{**options, **more})


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sts_fast", "rollouts", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])


def test_the_command_samples_forecasts_and_writes_every_way(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shared = ["--model", tiny.model, "--sae", tiny.saes["topk"], "--top-n", 10, "--domain-shots", 1]
    shared += [word for name, path in tiny.domains.items() for word in ("--domains", f"{name}={path}")]
    asked = ["--train", tiny.train, "--check", "reward:by_length", "--sample", 4, "--limit", 10]
    ran = run(*shared, *asked, "--max-new-tokens", 6, "--estimators", "act,ntk", "--output", output)
    assert ran.returncode == 0, ran.stderr
    assert "completions of 10 prompts" in ran.stdout
    assert ran.stdout.startswith("Training is forecast to ")
    assert "are among those of the policy gradient" in " ".join(ran.stdout.split())
    for way in ("verified", "correlation", "gradient", "step"):
        scores = json.loads((output / way / "scores.json").read_text())
        assert scores["rollouts"]["n_completions"] == 40
        assert scores["signed"] is not None
        [entry] = [entry for entry in scores["provenance"]["inputs"] if entry["role"] == "train"]
        assert entry["path"] == str(output / "rollouts.jsonl")
        assert (output / way / "report.html").is_file()
    assert (output / "report.html").is_file()
    assert len(load_rollouts(output / "rollouts.jsonl").rows) == 40
    # What was sampled can be forecast from again, to the same numbers.
    again = run(*shared, "--rollouts", output / "rollouts.jsonl", "--limit", 10, "--ways", "correlation",
                "--estimators", "act", "--json", "--output", tmp_path / "again")  # fmt: skip
    assert again.returncode == 0, again.stderr
    first = json.loads((output / "compare.json").read_text())["scores"]["act"]["correlation"]
    assert json.loads(again.stdout)["scores"]["act"]["correlation"] == first
    assert len(load_examples(tiny.train)) > 10

    for arguments, message in (
        ([], "give either --rollouts, or --train"),
        (["--train", tiny.train], "--train needs --check"),
        (["--rollouts", tiny.train], "contain completions"),
        (["--rollouts", tmp_path / "none.jsonl"], "does not exist"),
    ):
        words = ["sts-fast", "rollouts", *shared, *arguments, "--output", tmp_path / "failed"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as ended:
            main()
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert error.count("\n") == 1
        assert error.startswith("error: ")
        assert message in error
