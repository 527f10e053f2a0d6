"""Foundations of the package: spaces, units, checks, random numbers, derivatives."""
