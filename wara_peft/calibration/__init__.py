"""Runs batches through a model and sums up moments of what its layers are given."""
