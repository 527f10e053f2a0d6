"""Estimates of p(x_0 | x_n)."""
