"""Tuning of the reverse process: grid, covariance and mean coefficients."""
