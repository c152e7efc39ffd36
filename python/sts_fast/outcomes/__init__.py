"""What really changed, held against a forecast, and what is learned from it."""
