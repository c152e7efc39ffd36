"""The forecast before RL, from completions of the model and their rewards."""
