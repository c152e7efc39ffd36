"""The forecast before RL, from completions of the model and their rewards."""

from sts_fast.rollouts.read import Columns, Rollout, Rollouts, load_rollouts
from sts_fast.rollouts.rollouts import WAYS, rollouts
from sts_fast.rollouts.sample import load_checker, sample_rollouts

__all__ = ["WAYS", "Columns", "Rollout", "Rollouts", "load_checker", "load_rollouts", "rollouts", "sample_rollouts"]
