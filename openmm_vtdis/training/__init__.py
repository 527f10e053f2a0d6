"""Fitting networks to frames."""
