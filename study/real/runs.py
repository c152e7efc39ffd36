"""The trainings of the study, one file of results each: what is there already is not run again."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from study.real.measure import MEASURES, Asking, measure
from study.real.model import keep_freed_memory, load_model
from study.real.sets import DEMONSTRATIONS, N_DOMAIN, read_rows
from study.real.sources import Row
from study.real.training import N_HELD_OUT, WAYS, Way, held_out_loss, products, train, with_lora

RESULTS = Path(__file__).parent / "results"
OUTCOMES = RESULTS / "outcomes"
BASE = "untrained"
KEPT = ("gsm8k", "tinystories", "mmlu", "rg algorithms")  # training sets whose light model is kept in the work folder
DECOY = 5  # the base model is also asked with the answer of the row so many further on

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One training, or the base model alone where `way` is None."""

    train: str = BASE
    way: Way | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        return BASE if self.way is None else f"{self.way.name} {self.train} {self.seed}"

    @property
    def path(self) -> Path:
        return OUTCOMES / f"{self.name}.json"


def jobs(work: Path, ways: list[str]) -> Iterator[Job]:
    """The base model, then the trainings in the order in which they are run: the first seeds of each way first."""
    yield Job()
    trains = sorted(path.stem for path in (work / "train").glob("*.jsonl"))
    listed = [(seed, way, name) for way in ways for seed in WAYS[way].seeds for name in trains]
    for seed, way, name in sorted(listed, key=lambda job: job[0]):
        yield Job(name, WAYS[way], seed)


def run(work: Path, ways: list[str], tell: Tell) -> None:
    """Runs the jobs that have no results yet, each in a process of its own, which gives all its memory back."""
    for job in jobs(work, ways):
        if not job.path.exists():
            process = multiprocessing.get_context("fork").Process(target=run_and_write, args=(work, job, tell))
            process.start()
            process.join()
            if process.exitcode != 0:
                raise SystemExit(f"{job.name!r} ended with exit code {process.exitcode}; run again to go on from there")


def run_and_write(work: Path, job: Job, tell: Tell) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    start = time.process_time()
    write_json(job.path, run_job(work, job, lambda text: tell(f"{job.name}: {text}")))
    tell(f"{job.name}: done in {time.process_time() - start:.0f} s of processor time")


def run_job(work: Path, job: Job, tell: Tell) -> dict[str, Any]:
    """Trains as the job says, measures every domain, and returns both as one record."""
    model, tokenizer = load_model(work / "model")
    asking = Asking(tokenizer)
    record: dict[str, Any] = {"train": job.train, "way": job.way and job.way.name, "seed": job.seed}
    if job.way is not None:
        rows = read_rows(work / "train" / f"{job.train}.jsonl")
        record |= {"rows": len(rows) - N_HELD_OUT}
        record |= {"held_out_before": round(held_out_loss(model, asking, rows[-N_HELD_OUT:]), 4)}
        del model  # a training has room for one model beside its own
        model, about = trained(work, asking, rows, job, tell)
        record |= about
    start = time.process_time()
    with products() as precision:
        record["domains"] = measure_domains(work, model, asking, decoys=job.way is None)
    record["precision"] = precision
    record["measure_seconds"] = round(time.process_time() - start, 1)
    record["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return record


def trained(work: Path, asking: Asking, rows: list[Row], job: Job, tell: Tell) -> tuple[Any, dict[str, Any]]:
    """(the trained model, its record); of several learning rates, the one with the least loss on held-out rows."""
    assert job.way is not None
    learned, held_out = rows[:-N_HELD_OUT], rows[-N_HELD_OUT:]
    tried: dict[str, float] = {}
    best: Any = None
    about: dict[str, Any] = {}
    seconds = 0.0
    for rate in _rates(job):
        model = load_model(work / "model")[0]
        if job.way.lora:
            torch.manual_seed(job.seed)
            model = with_lora(model)
        record = train(model, asking, learned, job.way, rate=rate, seed=job.seed, tell=tell)
        seconds += record["train_seconds"]
        loss = held_out_loss(model, asking, held_out)
        tell(f"rate {rate:g}: held-out loss {loss:.3f}")
        if best is None or loss < min(tried.values()):
            best, about = model, record
        tried[f"{rate:g}"] = round(loss, 4)
    _keep(work, best, job)
    if job.way.lora:
        best = best.merge_and_unload()
    return best, {**about, "held_out_after": tried, "all_rates_seconds": round(seconds, 1)}


def _rates(job: Job) -> tuple[float, ...]:
    """The learning rates to try; those chosen by an earlier job are taken from its results."""
    assert job.way is not None
    chosen_by = Job(job.train, job.way if job.way.rates else WAYS["light"], 0)
    if chosen_by == job:
        return job.way.rates
    if not chosen_by.path.exists():
        raise SystemExit(f"{job.name!r} takes its learning rate from {chosen_by.name!r}, which has not been run yet")
    return (float(read_json(chosen_by.path)["rate"]),)


def _keep(work: Path, model: Any, job: Job) -> None:
    assert job.way is not None
    if job.way.lora or (job.way.name == "light" and job.seed == 0 and job.train in KEPT):
        model.save_pretrained(work / "tuned" / job.name)


def measure_domains(work: Path, model: Any, asking: Asking, *, decoys: bool) -> dict[str, dict[str, list[Any]]]:
    """Domain -> measure -> value of every row; with `decoys` also the loss of another row's answer, if it is free."""
    rows_of = {
        path.stem: read_rows(path)[DEMONSTRATIONS:][:N_DOMAIN] for path in sorted((work / "domains").glob("*.jsonl"))
    }
    # Rows of all domains share batches, so that rows of like length meet.
    found = parted(measure(model, asking, [row for rows in rows_of.values() for row in rows]), rows_of)
    if decoys:
        free = {domain: _with_decoys(rows) for domain, rows in rows_of.items() if "options" not in rows[0]}
        asked = measure(model, asking, [row for rows in free.values() for row in rows])
        for domain, values in parted(asked, free).items():
            found[domain]["decoy"] = values["loss"]
    return found


def _with_decoys(rows: list[Row]) -> list[Row]:
    moved = rows[DECOY:] + rows[:DECOY]
    return [{**row, "answer": other["answer"]} for row, other in zip(rows, moved, strict=True)]


def parted(values: dict[str, list[float]], rows_of: dict[str, list[Row]]) -> dict[str, dict[str, list[Any]]]:
    """The values of all rows, by the domain of the row."""
    found, start = {}, 0
    for domain, rows in rows_of.items():
        stop = start + len(rows)
        found[domain] = {name: [_rounded(value) for value in some[start:stop]] for name, some in values.items()}
        start = stop
    return found


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)


def outcomes() -> dict[str, dict[str, Any]]:
    """Name of a job -> its record, of all jobs that have been run; a missing value is NaN."""
    found = {}
    for path in sorted(OUTCOMES.glob("*.json")):
        record = read_json(path)
        for values in record["domains"].values():
            for name in MEASURES:
                values[name] = np.array([np.nan if value is None else value for value in values[name]])
        found[path.stem] = record
    return found


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Puts the file in place as a whole; lists of numbers on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_lines(value) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _lines(value: Any, depth: int = 0) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    margin = " " * (depth + 1)
    inner = ",\n".join(f"{margin}{json.dumps(key)}: {_lines(item, depth + 1)}" for key, item in value.items())
    return f"{{\n{inner}\n{' ' * depth}}}"
