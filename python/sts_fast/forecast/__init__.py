"""The forecast: shifted features, estimators and their controls, the run and its files."""
