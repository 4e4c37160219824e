"""Models that train in low rank from the start."""
