"""Learns from past trainings to forecast the change itself, in the outcome's own unit, with prediction intervals."""

from sts_fast.outcomes.calibration.calibration import Calibration, fit_calibration

__all__ = ["Calibration", "fit_calibration"]
