"""Measured changes: compared with a forecast, and learned from."""
