"""The demo on a small, fully known world: forecasts beside real fine-tuning."""
