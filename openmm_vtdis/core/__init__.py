"""What everything else stands on: spaces, units, checks, random numbers, derivatives."""
