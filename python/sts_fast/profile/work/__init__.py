"""Reading sets with many processes, on one machine or several: a plan, its shards, and who works through them."""

from sts_fast.profile.work.local import run_local
from sts_fast.profile.work.plan import ProfilePlan
from sts_fast.profile.work.worker import run_rank

__all__ = ["ProfilePlan", "run_local", "run_rank"]
