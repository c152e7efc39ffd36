"""Holds a forecast against what really changed, and says how much that comparison can tell."""

from sts_fast.outcomes.validate.record import DomainResult
from sts_fast.outcomes.validate.statistics import outcome_limits
from sts_fast.outcomes.validate.validate import validate
from sts_fast.outcomes.validate.validation import Validation

__all__ = ["DomainResult", "Validation", "outcome_limits", "validate"]
