"""Holds a forecast against what really changed, and says how much that comparison can tell."""

from sts_fast.outcomes.validate.record import DomainResult
from sts_fast.outcomes.validate.statistics import outcome_limits
from sts_fast.outcomes.validate.validate import validate
from sts_fast.outcomes.validate.validation import Validation, load_outcomes

__all__ = ["DomainResult", "Validation", "load_outcomes", "outcome_limits", "validate"]
