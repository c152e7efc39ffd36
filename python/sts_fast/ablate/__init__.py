"""Zeroes features in the running model: does the trained ability disappear with them, and do the others stay?"""

from sts_fast.ablate.ablate import ablate
from sts_fast.ablate.record import Ablation

__all__ = ["Ablation", "ablate"]
