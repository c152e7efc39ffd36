"""Works through a plan of profiles with datatrove, whose executors run on one machine, SLURM, Ray or HF Jobs.

sts-fast profile --model M --sae S --train a.jsonl --domains evals/ --library lib --plan-only
python examples/datatrove_profiles.py lib/plans/KEY/plan.json 4
"""

from __future__ import annotations

import sys
from functools import partial

from datatrove.executor import LocalPipelineExecutor

import sts_fast

if __name__ == "__main__":
    plan, tasks = sys.argv[1], int(sys.argv[2])
    step = partial(sts_fast.run_rank, plan)
    # Tasks that ended are not started again: start the program a second time after a failure.
    LocalPipelineExecutor([step], tasks=tasks, workers=2, logging_dir="datatrove-logs").run()
