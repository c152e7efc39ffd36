"""Times the profiles of a forecast beside the bare forward passes that they cannot do without, at a 7B model's shape.

    python -m benchmarks.bench_profile [--layers 20] [--threads 1] [--json benchmarks/results/profile.json]

The same passes in turns (see bench_forecast): those of a forecast, each batch of which becomes rows of profiles, and
the bare ones, up to the hook. The model has two layers of the full shape, for 20 do not fit into 16 GB; what a profile
adds to a token does not depend on their number, so that

    over the floor with L layers = 1 + (ours - floor) / (floor L / 2),

where `ours` is everything from the first pass of a set to its finished profile, and the SAE is 65,536 wide. Processor
time counts. The results themselves are checked by bench_forecast, and by the tests.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import sts_fast
from benchmarks.bench_forecast import MEAN_L0, SHIFT, Workload, World, run_floor, run_ours
from benchmarks.records import machine

WORK = Workload(
    d_model=3584, n_layers=2, layer=1, d_sae=65_536, n_domains=1, shift_queries=16, domain_queries=16, query_tokens=100,
    demo_tokens=400, domain_demo_tokens=100, d_mlp=18_944, n_keys=4,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20, help="up to the hook, of the model that is meant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sts_fast.set_num_threads(options.threads)
    world, recorded = World(WORK), {}
    run_ours(world, recorded)
    turns = [(run_ours(world)[1].cpu, run_floor(world, recorded).cpu) for _ in range(options.rounds)]
    layers, sae = WORK.arithmetic()
    found: dict[str, Any] = {
        "machine": machine("cpu"), "threads": options.threads, "d_in": WORK.d_model, "d_sae": WORK.d_sae,
        "mean_l0": MEAN_L0, "layers": options.layers, "sae_share_of_arithmetic": sae / (layers / 2 * options.layers),
    }  # fmt: skip
    for stage, of_stage in (("shift", [SHIFT]), ("score", [name for name in turns[0][0] if name != SHIFT])):
        ours, floor = (
            min(sum(times[part] for part in of_stage) for times in side) for side in zip(*turns, strict=True)
        )
        found[stage] = {
            "ours_seconds": ours, "floor_seconds": floor,
            "over_floor": 1 + (ours - floor) / (floor * options.layers / WORK.n_layers),
        }  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
