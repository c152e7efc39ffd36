"""Reading sets with many processes, on one machine or several: a plan, its shards, and who works through them."""

from sts_fast.profile.work.local import run_local
from sts_fast.profile.work.merge import merge
from sts_fast.profile.work.plan import ProfilePlan
from sts_fast.profile.work.ray import RayCluster, run_ray
from sts_fast.profile.work.slurm import Array
from sts_fast.profile.work.worker import run_rank

__all__ = ["Array", "ProfilePlan", "RayCluster", "merge", "run_local", "run_rank", "run_ray"]
