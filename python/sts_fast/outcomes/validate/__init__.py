"""Compares a forecast with the measured changes, and shows how much the comparison proves."""

from sts_fast.outcomes.validate.record import DomainResult
from sts_fast.outcomes.validate.statistics import outcome_limits
from sts_fast.outcomes.validate.validate import validate
from sts_fast.outcomes.validate.validation import Validation, load_outcomes

__all__ = ["DomainResult", "Validation", "load_outcomes", "outcome_limits", "validate"]
