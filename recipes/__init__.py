"""Recipes of the shipped generators: data, training, tuning. Not part of the wheel."""
