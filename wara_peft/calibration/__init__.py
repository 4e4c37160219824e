"""Runs batches through a model, in one process or several, and sums up moments XᵀX of the inputs of its layers."""
