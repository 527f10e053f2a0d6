"""From frames to a tuned reverse process."""
