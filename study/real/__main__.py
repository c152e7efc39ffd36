"""The study on a real model.

python -m study.real prepare          # the model, the sets and the SAEs, into build/study/real
python -m study.real run              # all trainings that have no results yet; may be stopped and started again
python -m study.real run light        # those of one way of training
python -m study.real forecast         # the forecasts of the design part; `forecast ntk`: that one alone
python -m study.real forecast --part judged   # those that are frozen, of the judged part
python -m study.real design           # what is tried on the design part before forecasts are frozen
python -m study.real points --part judged   # forecasts in nats, by what --fit learns of the other sets
python -m study.real table            # what came out, into results/
python -m study.real demo             # a forecast for a messages.jsonl, a minute of fine-tuning, both compared
python -m study.real status           # what is done and what is left
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORK = Path("build") / "study" / "real"


def main() -> None:
    from study.real import runs
    from study.real.demo import demo
    from study.real.design import explore
    from study.real.forecasts import FORECASTS, PARTS, forecast
    from study.real.points import points
    from study.real.sources import ASSETS
    from study.real.table import write_tables
    from study.real.training import WAYS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "forecast", "design", "points", "table", "demo", "status"))
    parser.add_argument("names", nargs="*", help="ways of training, or forecasts: all of them unless named")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the model, the sets and the weights")
    parser.add_argument("--train", type=Path, help="of demo: the training set; by default grade-school mathematics")
    parser.add_argument("--output", type=Path, default=Path("demo-run"), help="of demo: the folder of its run")
    parser.add_argument("--part", choices=PARTS, default=PARTS[0], help="of the split, for which forecasts are made")
    arguments = parser.parse_args()
    known = {"run": {*WAYS}, "points": {*WAYS}, "forecast": {asked.name for asked in FORECASTS}}.get(
        arguments.what, set()
    )
    if unknown := {*arguments.names} - known:
        parser.error(f"{arguments.what} knows no {', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}")
    if arguments.what in ("run", "forecast", "design") and not (arguments.work / "texts.jsonl").exists():
        parser.error(f"{arguments.work} has no model and sets yet: python -m study.real prepare makes them")
    if arguments.what == "prepare":
        if not ASSETS.is_dir():
            parser.error("the sets are made of ../shared/assets, which is not beside this checkout")
        prepare(arguments.work)
    if arguments.what == "run":
        runs.run(arguments.work, arguments.names or [*WAYS], tell)
    if arguments.what == "forecast":
        forecast(arguments.work, arguments.names, arguments.part, tell)
    if arguments.what == "design":
        explore(arguments.work, tell)
    if arguments.what == "points":
        for way in arguments.names or [*WAYS]:
            points(arguments.work, arguments.part, way, tell)
    if arguments.what == "demo":
        demo(arguments.work, arguments.train, arguments.output, tell)
    if arguments.what == "table":
        sys.stdout.write(write_tables())
    if arguments.what == "status":
        for job in runs.jobs(arguments.work, [*WAYS]):
            sys.stdout.write(f"{'done' if job.path.exists() else 'to do'}  {job.name}\n")


def prepare(work: Path) -> None:
    """Makes what is not there yet."""
    from study.real import runs
    from study.real.model import load_model, make_model
    from study.real.saes import LAYERS, make_saes
    from study.real.sets import make_sets
    from study.real.split import draw

    made: dict[str, object] = {}
    if not (work / "model" / "config.json").exists():
        made["model"] = make_model(work / "model")
        runs.write_json(runs.RESULTS / "model.json", made["model"])
        tell("the model is written")
    if not (work / "texts.jsonl").exists():
        about = make_sets(work, load_model(work / "model")[1])
        runs.write_json(runs.RESULTS / "sets.json", about)
        runs.write_json(runs.RESULTS / "split.json", draw(about["train"], about["domains"]))
        tell("the sets are written")
    if not (runs.RESULTS / "saes.json").exists() or not (work / "sae" / str(LAYERS[-1])).exists():
        runs.write_json(runs.RESULTS / "saes.json", make_saes(work, tell))


def tell(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
