"""Damages files of every kind that is read, and reads them: each must be read, or be refused in one sentence.

    make fuzz                                 5,000 damaged files
    python tests/fuzz.py --files 20000 --seed 7

What is found is written to build/fuzz, one folder for each: the damaged material and the traceback.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

LONGEST_MESSAGE = 2000
FOUND = Path("build") / "fuzz"
# What JSON may hold in the place of anything.
VALUES: list[Any] = [
    None, True, "", "x", "\ud800", "\x1b[2J", 0, -1, 1.5, 10**400, 1e308, [], [[]], [None], {}, {"a": 1}, [1, "a"],
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of material: make writes it into a folder and returns its place; read reads it from there."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def _lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _rows() -> dict[str, dict[str, Any]]:
    """A row of each shape of training data."""
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    return {
        "questions": {"id": "a", "question": "What is 1 + 1?", "answer": "2", "context": "Sums."},
        "messages": {"id": "b", "messages": chat},
        "choices": {"id": "c", "question": "Which?", "choices": ["yes", "no"], "answer": 1},
        "instructions": {"id": "d", "instruction": "Add", "input": "1 and 2", "output": "3"},
        "preferences": {"prompt": chat[:1], "chosen": chat[1:], "rejected": [{"role": "assistant", "content": "5"}]},
    }


def _csv(folder: Path) -> Path:
    path = folder / "rows.csv"
    path.write_text("id,question,answer\n" + "".join(f'{i},"What, {i}?",{i}\n' for i in range(12)), encoding="utf-8")
    return path


def _parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": f"What {i}?", "answer": str(i)} for i in range(12)]), path)
    return path


def _rollouts(folder: Path) -> Path:
    rows = [
        {"prompt": f"Q{i // 4}?", "completion": f"A{i}", "reward": float(i % 2), "group": i // 4} for i in range(16)
    ]
    return _lines(folder, rows)


def _changes(folder: Path) -> Path:
    path = folder / "changes.csv"
    path.write_text("domain,change,stderr\nlaw,0.1,0.01\nart,-0.2,0.02\n", encoding="utf-8")
    return path


def _lm_eval(folder: Path) -> Path:
    results = {"law": {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "law"}}
    document = {"results": results, "versions": {"law": 1}, "n-samples": {"law": {"original": 100, "effective": 100}},
                "configs": {"law": {"task": "law", "num_fewshot": 0}}, "config": {"model": "hf"}}  # fmt: skip
    (folder / "results_2026-01-01T00-00-00.000000.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def _sae(folder: Path) -> Path:
    from sts_fast.demo import organism

    shutil.copytree(organism.sae_folder(), folder / "sae")
    return folder / "sae"


def _tokenizer(folder: Path) -> Path:
    from sts_fast.demo import organism

    kept = folder / "model"
    kept.mkdir()
    for path in organism.model_folder().iterdir():
        if path.suffix == ".json":
            shutil.copy(path, kept)
    return kept


def _run(folder: Path) -> Path:
    import sts_fast
    from sts_fast.demo import organism

    examples = organism.examples("T1.swap.a", 16, seed=1)
    place = _MADE.get("run")
    if place is None:
        place = _MADE["run"] = Path(tempfile.mkdtemp()) / "run"
        sts_fast.score(
            model=organism.model_folder(), sae=organism.sae_folder(), train=examples, domains={"law": examples},
            shots=1, domain_shots=1, top_n=8, limit=8, estimators=("act", "ntk"), library=place.parent / "library",
        ).save(place)  # fmt: skip
    shutil.copytree(place, folder / "run")
    return folder / "run"


def _library(folder: Path) -> Path:
    _run(folder)
    shutil.copytree(_MADE["run"].parent / "library", folder / "library")
    return folder / "library"


def _activations(folder: Path) -> Path:
    import sts_fast
    from sts_fast.demo import organism

    place = _MADE.get("activations")
    if place is None:
        place = _MADE["activations"] = Path(tempfile.mkdtemp()) / "activations"
        examples = organism.examples("T1.swap.a", 12, seed=1)
        sts_fast.capture_activations(
            model=organism.model_folder(), saes=[sts_fast.load_sae(organism.sae_folder())], trains={"train": examples},
            domains={"law": examples}, output=place, shots=1, domain_shots=1,
        )  # fmt: skip
    shutil.copytree(place, folder / "activations")
    return folder / "activations"


def _labels(folder: Path) -> Path:
    rows = [{"modelId": "m", "layer": "1-res", "index": str(i), "description": f"label {i}"} for i in range(8)]
    return _lines(folder, rows)


def _calibration(folder: Path) -> Path:
    from written_run import write_past

    import sts_fast

    place = _MADE.get("calibration")
    if place is None:
        place = _MADE["calibration"] = Path(tempfile.mkdtemp()) / "calibration.json"
        write_past(place.parent)
        sts_fast.fit_calibration(place.parent).save(place)
    shutil.copy(place, folder)
    return folder / place.name


def _config(folder: Path) -> Path:
    (folder / "run.yaml").write_text("# sts-fast\nmodel: m\ntop-n: 50\ndomains:\n- a=b\n- c=d\n", encoding="utf-8")
    return folder / "run.yaml"


_MADE: dict[str, Path] = {}


def kinds() -> dict[str, Kind]:
    import sts_fast
    from sts_fast.cli.output import with_config
    from sts_fast.data.template import PromptTemplate
    from sts_fast.forecast.stored_prompts import answered_sets
    from sts_fast.model.checkpoint import Checkpoint
    from sts_fast.model.labels import Labels
    from sts_fast.report import build_report

    def read_run(folder: Path) -> None:
        forecast = sts_fast.Forecast.load(folder)
        repr(forecast), forecast.settled
        answered_sets(forecast.prompts)
        build_report(folder)

    def read_library(folder: Path) -> None:
        for place in sts_fast.Library(folder):
            repr(sts_fast.Profile.load(place))
        sts_fast.compare_stored(folder, ["train"], estimators=("act",), top_n=4)

    def read_activations(folder: Path) -> None:
        from sts_fast.demo import organism

        examples = organism.examples("T1.swap.a", 12, seed=1)
        sts_fast.score(
            model=folder, sae=organism.sae_folder(), train=examples, domains={"law": examples}, shots=1, domain_shots=1,
            top_n=4,
        )  # fmt: skip

    def read_sae(folder: Path) -> None:
        sae = sts_fast.load_sae(folder)
        sts_fast.encode(sae, np.ones((2, sae.d_in), np.float32))

    def read_tokenizer(folder: Path) -> None:
        template = PromptTemplate(Checkpoint(folder).tokenizer)
        from sts_fast.data.prompts import build_prompts
        from sts_fast.demo import organism

        build_prompts("law", organism.examples("T1.swap.a", 3, seed=1), template, tokens="all")

    return {
        **{name: Kind(partial(_lines, rows=[row] * 6), sts_fast.load_examples) for name, row in _rows().items()},
        "domains": Kind(
            partial(_lines, rows=[{"subject": name, "question": "Who?", "answer": "He"} for name in "aabb"]),
            lambda path: sts_fast.load_domains([str(path)]),
        ),
        "csv": Kind(_csv, sts_fast.load_examples),
        "parquet": Kind(_parquet, sts_fast.load_examples),
        "rollouts": Kind(_rollouts, sts_fast.load_rollouts),
        "changes": Kind(_changes, sts_fast.read_outcomes),
        "lm-eval": Kind(_lm_eval, lambda path: sts_fast.read_outcomes(path, path)),
        "sae": Kind(_sae, read_sae),
        "tokenizer": Kind(_tokenizer, read_tokenizer),
        "run": Kind(_run, read_run),
        "library": Kind(_library, read_library),
        "activations": Kind(_activations, read_activations),
        "labels": Kind(_labels, Labels.read),
        "calibration": Kind(_calibration, sts_fast.Calibration.load),
        "config": Kind(_config, lambda path: with_config(["score", "--config", str(path)])),
    }


def damage(rng: random.Random, path: Path) -> None:
    """One file, damaged in one of many ways."""
    data = path.read_bytes()
    ways: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: data[: rng.randrange(len(data) + 1)],
        lambda: _flipped(rng, data),
        lambda: data[: (at := rng.randrange(len(data) + 1))] + rng.randbytes(rng.randrange(1, 40)) + data[at:],
        lambda: data + data,
    ]
    if path.suffix in (".json", ".jsonl") and data:
        ways += [lambda: _changed_json(rng, data)] * 8
    path.write_bytes(rng.choice(ways)())


def _flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 64)) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _changed_json(rng: random.Random, data: bytes) -> bytes:
    """One value of the document, or of one of its lines, becomes another, or goes, or gets a sister."""
    lines = data.decode("utf-8", "replace").splitlines()
    try:
        document, line = json.loads(data), None
    except ValueError:
        line = rng.randrange(len(lines))
        document = json.loads(lines[line])
    holders: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in list(entries):
            holders.append((value, key))
            walk(inner)

    walk(document)
    if holders:
        holder, key = rng.choice(holders)
        choice = rng.randrange(4)
        if choice == 0:
            del holder[key]
        elif choice == 1 and isinstance(holder, dict):
            holder[str(rng.choice(VALUES))] = rng.choice(VALUES)
        else:
            holder[key] = rng.choice(VALUES)
    text = json.dumps(document)
    if line is not None:
        lines[line] = text
        text = "\n".join(lines) + "\n"
    return text.encode()


def fuzz(n_files: int, seed: int, only: str | None = None, tell: Callable[[str], None] | None = None) -> list[str]:
    """Reads so many damaged files; returns what went wrong, a line each."""
    from sts_fast.errors import InputError

    every, wrong = kinds(), []
    names = [name for name in every if only in (None, name)]
    for number in range(n_files):
        rng, name = random.Random(f"{seed} {number}"), names[number % len(names)]
        kind = every[name]
        with tempfile.TemporaryDirectory() as folder:
            place = kind.make(Path(folder))
            files = sorted(path for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file())
            damaged = rng.choice(files)
            damage(rng, damaged)
            problem = None
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    kind.read(place)
            except InputError as error:
                if "\n" in str(error) or len(str(error)) > LONGEST_MESSAGE:
                    problem = f"a message of {len(str(error))} characters or several lines: {str(error)[:200]!r}"
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                problem = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:150]!r}"
                details = traceback.format_exc()
            if problem is not None:
                wrong.append(f"{name}, {damaged.name}, file {number}: {problem}")
                kept = FOUND / f"{seed}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(folder, kept)
                (kept / "traceback.txt").write_text(locals().get("details", problem), encoding="utf-8")
                if tell is not None:
                    tell(wrong[-1])
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of material")
    options = parser.parse_args()
    wrong = fuzz(options.files, options.seed, options.only, lambda line: print(line, flush=True))
    print(f"{options.files} damaged files, {len(wrong)} neither read nor refused in one sentence")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
