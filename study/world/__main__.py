"""Runs the study on one base model, prints the table of all that have been run, or calibrates their forecasts.

python -m study.world run package                   # the model that comes with the package
python -m study.world run base-3 --train-seed 3     # one that is trained first, into build/study/base-3
python -m study.world run long-1 --train-seed 1     # one of the world with long answers
python -m study.world again base-3                  # from build/study/base-3.json, with forecasts made of others
python -m study.world table
python -m study.world analyses base-3               # the paper's analyses, beside the outcomes of a run
python -m study.world calibrate                     # intervals of the change, from the runs in build/study

python -m study.world rl package                    # reinforcement learning in the place of fine-tuning
python -m study.world rl                            # its tables

python -m study.world mix base-3                    # data mixing: really trained with, after `run` of the same
python -m study.world mix                           # its tables

python -m study.world trace                         # single training examples: harmful ones named, subsets foretold
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sts_fast.demo import organism
from study.world import mixing, rl, rl_table, tracing
from study.world.analyses import analyse, analyse_saes
from study.world.analyses_table import analyses_table, write
from study.world.calibrate import TABLES, calibrate
from study.world.correlations import compact
from study.world.grounds import LONG, SHORT, Ground
from study.world.predictors import N_PROMPTS, predict, together
from study.world.table import RESULTS, table
from study.world.trials import REGIMES, run_trials

WORK = Path("build") / "study"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "again", "table", "calibrate", "rl", "analyses", "mix", "trace"))
    parser.add_argument("base", nargs="?")
    parser.add_argument("--train-seed", type=int, help="train this base model first")
    arguments = parser.parse_args()
    if arguments.what == "calibrate":
        calibrate(WORK)
        sys.stdout.write(TABLES.read_text(encoding="utf-8"))
        return
    if arguments.what == "rl":
        if arguments.base is not None:
            tell = teller(arguments.base)
            rl.run(arguments.base, base_folder(arguments.base, arguments.train_seed, tell), WORK, tell)
        for page, text in rl_table.pages():
            page.write_text(text, encoding="utf-8")
        sys.stdout.write(rl_table.PAGE.read_text(encoding="utf-8"))
        return
    if arguments.what == "mix":
        if arguments.base is not None:
            tell = teller(arguments.base)
            mixing.run(arguments.base, base_folder(arguments.base, arguments.train_seed, tell), WORK, tell)
        sys.stdout.write(mixing.table(mixing.results()))
        return
    if arguments.what == "trace":
        tracing.run(base_folder("package", None, teller("package")), teller("package"))
        sys.stdout.write(tracing.TABLES.read_text(encoding="utf-8"))
        return
    if arguments.what == "run":
        run(arguments.base or "package", arguments.train_seed)
    if arguments.what == "again":
        again(arguments.base or "package")
    if arguments.what == "analyses":
        sys.stdout.write(analyses(arguments.base or "package"))
        return
    sys.stdout.write(table(json.loads(RESULTS.read_text(encoding="utf-8"))))


def analyses(base: str) -> str:
    raw, tell = json.loads((WORK / f"{base}.json").read_text(encoding="utf-8")), teller(base)
    ground, folder = ground_of(base), base_folder(base, None, tell)
    with organism.one_thread():
        found = analyse(ground, folder, raw, tell)
        write(base, found)
        more = analyse_saes(ground, folder, raw, tell)
    for regime, of_regime in more["r_with_size_of_dP"].items():
        found["r_with_size_of_dP"][regime] |= of_regime
    return analyses_table(write(base, {**found, "saes": more["saes"]}))


def teller(base: str) -> Callable[[str], None]:
    start = time.process_time()

    def tell(stage: str) -> None:
        sys.stderr.write(f"{time.process_time() - start:7.0f} s  {base}: {stage}\n")
        sys.stderr.flush()

    return tell


def ground_of(base: str) -> Ground:
    return LONG if base.startswith("long") else SHORT


def base_folder(base: str, train_seed: int | None, tell: Callable[[str], None]) -> Path:
    WORK.mkdir(parents=True, exist_ok=True)
    folder = organism.weights_folder() if base == "package" else WORK / base
    if train_seed is not None and not folder.exists():
        organism.train(train_seed, folder, world=ground_of(base).world)
        tell("trained")
    return folder


def run(base: str, train_seed: int | None) -> None:
    start, tell = time.process_time(), teller(base)
    ground, folder = ground_of(base), base_folder(base, train_seed, tell)
    figures = json.loads((folder / organism.FIGURES_FILE).read_text(encoding="utf-8"))
    with organism.one_thread():
        predicted = predict(ground, folder, tell)
        model, tokenizer = organism.load_model(folder / "model")
        trials: dict[str, Any] = {}
        for regime in REGIMES:
            trials[regime] = run_trials(ground, model, tokenizer, regime, tell)
            keep(base, predicted, trials, figures, time.process_time() - start)


def again(base: str) -> None:
    """Forecasts that are made of others, for a run in which they were not thought of yet."""
    ground, raw = ground_of(base), json.loads((WORK / f"{base}.json").read_text(encoding="utf-8"))
    model, tokenizer = organism.load_model(base_folder(base, None, teller(base)) / "model")
    asked = organism.measure(model, tokenizer, ground.domains, n=N_PROMPTS, seed=1, world=ground.world)
    predicted = {**raw["predicted"], "P": asked.p_correct}
    predicted |= together(predicted)
    keep(base, predicted, raw["trials"], raw["organism"], raw["cpu_seconds"])


def keep(base: str, predicted: Any, trials: Any, figures: Any, cpu_seconds: float) -> None:
    raw = {"organism": figures, "cpu_seconds": cpu_seconds, "predicted": predicted, "trials": trials}
    (WORK / f"{base}.json").write_text(json.dumps(raw, default=lambda array: array.tolist()), encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[base] = {"cpu_seconds": round(cpu_seconds), **compact(ground_of(base), predicted, trials, figures)}
    RESULTS.write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
