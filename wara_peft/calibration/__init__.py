"""Runs batches through a model, in one process or several, and sums up moments of what its layers are given."""
