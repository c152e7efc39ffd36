"""Forecasts which abilities fine-tuning will move, before any training.

Importing this loads neither torch nor transformers: they are imported where they are used.
"""

from sts_fast._version import __version__
from sts_fast.ablate import Ablation, ablate
from sts_fast.data.examples import Example, load_domains, load_examples
from sts_fast.data.turns import ToolCall, Turn
from sts_fast.errors import InputError
from sts_fast.forecast.cross import Cross, cross
from sts_fast.forecast.from_library import compare_stored
from sts_fast.forecast.overlap import Overlap, overlap
from sts_fast.forecast.run import Forecast
from sts_fast.forecast.score import compare, plan, score, shift
from sts_fast.forecast.search import Candidate, search
from sts_fast.forecast.trace import Trace, trace
from sts_fast.mix.mix import Mixture, mix
from sts_fast.model.stored import Activations
from sts_fast.model.stored.writing import capture_activations, export_requests
from sts_fast.ops._cpu import get_num_threads, set_num_threads
from sts_fast.ops.backend import set_precision
from sts_fast.ops.correlate import CorrelationStats
from sts_fast.ops.encode import encode
from sts_fast.ops.shift import ShiftStats
from sts_fast.ops.torch_ops import torch_handle
from sts_fast.outcomes.calibration import Calibration, fit_calibration
from sts_fast.outcomes.outcomes import read_outcomes
from sts_fast.outcomes.validate import validate
from sts_fast.profile.library import Library
from sts_fast.profile.make import plan_profiles, profile
from sts_fast.profile.profile import Profile
from sts_fast.profile.work import ProfilePlan, RayCluster, run_local, run_rank, run_ray
from sts_fast.report.trackers import log_run
from sts_fast.rollouts import load_rollouts, rollouts, sample_rollouts
from sts_fast.sae import SAE, load_sae
from sts_fast.sae.features import SparseFeatures

__all__ = [
    "SAE",
    "Ablation",
    "Activations",
    "Calibration",
    "Candidate",
    "CorrelationStats",
    "Cross",
    "Example",
    "Forecast",
    "InputError",
    "Library",
    "Mixture",
    "Overlap",
    "Profile",
    "ProfilePlan",
    "RayCluster",
    "ShiftStats",
    "SparseFeatures",
    "ToolCall",
    "Trace",
    "Turn",
    "__version__",
    "ablate",
    "capture_activations",
    "compare",
    "compare_stored",
    "cross",
    "encode",
    "export_requests",
    "fit_calibration",
    "get_num_threads",
    "load_domains",
    "load_examples",
    "load_rollouts",
    "load_sae",
    "log_run",
    "mix",
    "overlap",
    "plan",
    "plan_profiles",
    "profile",
    "read_outcomes",
    "rollouts",
    "run_local",
    "run_rank",
    "run_ray",
    "sample_rollouts",
    "score",
    "search",
    "set_num_threads",
    "set_precision",
    "shift",
    "torch_handle",
    "trace",
    "validate",
]


def __dir__() -> list[str]:
    return sorted(__all__)
