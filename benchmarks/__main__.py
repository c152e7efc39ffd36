"""Checks every op against float64, then times it beside its peers, in turn, and writes the tables.

    python -m benchmarks                 everything, half an hour; results/<machine>.json is written as it goes
    python -m benchmarks --quick         small sizes, a minute; nothing is written
    python -m benchmarks --ops shift --sizes 768x24576 --rows 4096 --threads 1     these alone, in the same file
    python -m benchmarks --write-tables  the tables of README.md and the headline of ../README.md, from results/
    python -m benchmarks peers           packages that answer the same questions, by name; see peers --help

A measurement that is made again replaces the one before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, records, tables, timing
from benchmarks.benches import OPS, make_bench
from benchmarks.cases import Size
from benchmarks.oracle import WrongResult
from benchmarks.peers import command as peers

# op: {(d_in, d_sae): rows}
Plan = dict[str, dict[tuple[int, int], list[int]]]
SMALL, MIDDLE, NARROW, WIDE = (256, 2048), (768, 24576), (2304, 16384), (3584, 65536)
ROWS = {SMALL: [4096], MIDDLE: [4096], NARROW: [2048], WIDE: [512]}
TOP_K_ROWS = {(768, 65536): [1024], (768, 131072): [1024], WIDE: [512], (3584, 131072): [512]}
PLAN: Plan = {
    "shift": {SMALL: [4096], MIDDLE: [512, 2048, 16384], NARROW: [2048], WIDE: [512, 2048]},
    **{op: ROWS for op in ("correlate", "encode", "subset")},
    "topk": TOP_K_ROWS,
    "topk subset": {(768, 65536): [1024], WIDE: [512]},
}
QUICK: Plan = {op: {SMALL: [512]} for op in OPS}
MEMORY_PLAN: Plan = {
    "shift": {SMALL: [4096], MIDDLE: [512, 2048, 16384], NARROW: [2048], WIDE: [512]},
    **{op: {MIDDLE: [4096], WIDE: [512]} for op in ("correlate", "encode", "subset")},
    "topk": {(768, 65536): [1024], (3584, 131072): [512]},
}


def chosen_cases(plan: Plan, options: argparse.Namespace) -> Iterator[tuple[str, Size]]:
    """What was chosen of a plan, one size after the other, so that its weights are made once."""
    chosen = {
        op: {size: plan[op].get(size, [4096]) for size in options.sizes} if options.sizes else plan[op]
        for op in options.ops
        if op in plan
    }
    for size in dict.fromkeys(size for sizes in chosen.values() for size in sizes):
        for op, sizes in chosen.items():
            for rows in (options.rows or sizes[size]) if size in sizes else []:
                yield op, Size(size[0], size[1], rows)


def size_named(text: str) -> tuple[int, int]:
    d_in, d_sae = text.split("x")
    return int(d_in), int(d_sae)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "peers":
        return peers.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--sizes", type=size_named, nargs="+", metavar="D_INxD_SAE")
    parser.add_argument("--rows", type=int, nargs="+", help="rows of activations; pairs of rows, for the shift")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=12.0, help="a case is repeated for so long, and three times")
    parser.add_argument("--measure", choices=("time", "memory"), nargs="+", default=["time", "memory"])
    parser.add_argument("--device", default="cpu", help="where SAE and activations lie, as torch names it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, metavar="PATH", help="instead of results/<machine>.json")
    parser.add_argument("--write-tables", action="store_true", help="only that")
    options = parser.parse_args(arguments)
    if options.write_tables:
        tables.write()
        return 0
    if options.quick:
        options.seconds, options.measure = 1.0, ["time"]
    about = records.machine(options.device)
    path = options.results or (None if options.quick else records.path_of(about))
    plan = QUICK if options.quick else PLAN
    try:
        with torch.no_grad():
            for kind, record in measurements(plan, options):
                print(tables.lines_of(kind, record), flush=True)
                if path:
                    records.add(path, about, kind, record)
    except (WrongResult, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measurements(plan: Plan, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """("timings" or "memory", record), one at a time."""
    if "time" in options.measure:
        for op, of_size in chosen_cases(plan, options):
            bench = make_bench(op, of_size, options.device)
            for threads in options.threads:
                yield "timings", timing.measure(bench, threads, options.seconds)
    if "memory" in options.measure:
        for op, of_size in chosen_cases(MEMORY_PLAN, options):
            yield "memory", memory.measure(op, of_size, options.device, max(options.threads))


if __name__ == "__main__":
    sys.exit(main())
