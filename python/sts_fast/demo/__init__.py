"""The whole way on a world that is known to the last letter: forecasts beside real fine-tuning."""
