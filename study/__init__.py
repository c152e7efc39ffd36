"""Studies of what forecasts are worth: their plans, programs and results."""
