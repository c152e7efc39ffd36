"""Forecast of the direction in which a training set pushes the answers of a domain."""
