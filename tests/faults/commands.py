"""The commands that write, in a small setting: their words, and what lies in their folder before."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process import Words
from tiny import Tiny
from written_run import write_past

REPLACE = ("--overwrite",)


@dataclass(frozen=True)
class Command:
    """A command that writes `out` below the folder that it runs in.

    words:   of the command line; overwrite: those with which it replaces earlier results
    before:  command lines that make what it needs
    earlier: command lines that then make earlier results of it, other ones
    kind:    'whole': out is put in place as a whole; 'parts': file by file; 'sets': folder by folder, in a library
    """

    words: Words
    overwrite: Words = ()
    before: Sequence[Words] = ()
    earlier: Sequence[Words] = ()
    kind: str = "whole"


def commands(material: Path, tiny: Tiny) -> dict[str, Command]:
    """All of them by name; further files that they read are written to `material`."""
    sae, sums, spelling = str(tiny.saes["topk"]), str(tiny.train), str(tiny.domains["spelling"])
    rollouts = _write_rollouts(material / "rollouts.jsonl", tiny.train)
    domains = _write_domains(material / "domains", tiny)
    first, second = (_write_changes(material / f"changes-{i}.csv", i, domains) for i in (0, 1))
    model = ("--model", str(tiny.model), "--sae", sae)
    one, every = ("--domains", str(domains / "days-0.jsonl")), ("--domains", str(domains))
    few = ("--shots", "1", "--limit", "8")
    shown = (*few, "--domain-shots", "1", "--demo-draws", "2")
    out, train = ("--output", "out"), ("--train", sums)
    score = ("score", *model, *train, *every, *shown, "--estimators", "act,ntk", *out)
    compare = ("compare", *model, "--train", f"a={sums}", "--train", f"b={spelling}", *one, *shown, *out)
    rolled = ("rollouts", *model, "--rollouts", str(rollouts), *one, *shown, *out)
    sampling = ("--check", "reward:by_length", "--sample", "4", "--max-new-tokens", "4")
    sampled = ("rollouts", *model, *train, *sampling, *one, *shown, *out)
    mix = ("mix", *model, *train, "--pool", str(domains), "--budget", "6", *out)
    library = ("profile", *model, *train, *every, *shown, "--library", "out")
    ablation = ("--draws", "2", "--top-n", "12")
    ablate = ("ablate", *model, *train, *one, *few, *ablation, *out)
    capture = ("capture", *model, *train, *every, *few, *out)
    of_run = ("ablate", "out", *ablation)
    shift = ("shift", *model, *train, *few, *out)
    validate, other = (("validate", "out", "--before", str(table)) for table in (first, second))
    fit = ("validate", str(write_past(material / "past")), "--fit", "--output", "out.json")
    return {
        "capture": Command(capture, earlier=[capture], kind="parts"),
        "profile": Command(library, earlier=[(*library, "--seed", "1")], kind="sets"),
        "score": Command(score, REPLACE, earlier=[(*score, "--top-n", "7")]),
        "compare": Command(compare, REPLACE, earlier=[(*compare, "--top-n", "7")]),
        "shift": Command(shift, REPLACE, earlier=[(*shift, "--seed", "1")]),
        "rollouts": Command(rolled, REPLACE, earlier=[(*rolled, "--top-n", "7")]),
        "rollouts --train": Command(sampled, REPLACE, earlier=[(*sampled, "--top-n", "7")]),
        "mix": Command(mix, REPLACE, earlier=[(*mix, "--seed", "1")]),
        "ablate": Command(ablate, REPLACE, earlier=[(*ablate, "--seed", "1")]),
        "ablate RUN": Command(of_run, before=[score], earlier=[(*of_run, "--seed", "1")], kind="parts"),
        "validate": Command(validate, before=[score], earlier=[other], kind="parts"),
        "validate --fit": Command(fit, earlier=[(*fit, "--estimator", "icl")]),
        "trace": Command(
            ("trace", "out", "--drop", "20%"), before=[score], earlier=[("trace", "out", "--keep", "50%")], kind="parts"
        ),
        "report": Command(("report", "out"), before=[score, validate], earlier=[other], kind="parts"),
        "report LIBRARY": Command(("report", "out"), before=[library], kind="parts"),
    }  # fmt: skip


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _write_rollouts(path: Path, questions: Path) -> Path:
    """Four completions each of some questions."""
    rng = random.Random(0)
    asked = [f"Question: {row['question']}\nAnswer:" for row in _rows(questions)[:8]]
    return _write(
        path,
        [
            {"prompt": prompt, "completion": f" {rng.randrange(100)}.", "reward": i % 2}
            for prompt in asked
            for i in range(4)
        ],
    )


def _write_domains(folder: Path, tiny: Tiny) -> Path:
    """Halves of each domain, because four domains are the fewest that are validated."""
    for name, path in tiny.domains.items():
        rows = [row for row in _rows(path) if row["answer"] and len(row["question"]) < 500]
        for half in (0, 1):
            _write(folder / f"{name}-{half}.jsonl", rows[half::2])
    return folder


def _write_changes(path: Path, seed: int, domains: Path) -> Path:
    rng = random.Random(seed)
    rows = [f"{domain.stem},{rng.uniform(-0.1, 0.1):.3f}\n" for domain in sorted(domains.iterdir())]
    path.write_text("".join(["domain,change\n", *rows]), encoding="utf-8")
    return path
