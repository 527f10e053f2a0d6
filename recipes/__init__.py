"""How the shipped generators are made: data, training, tuning. Not part of the wheel."""
