"""The study: forecasts of many kinds beside real fine-tuning, over base models, training sets and seeds."""
