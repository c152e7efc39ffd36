"""The embedded toy world: forecasts of many kinds beside real fine-tuning, over models, training sets and seeds."""
