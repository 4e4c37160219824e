"""Adds adapters to a model and takes them out: targets, tied weights, merging, rollback, checks of saved adapters."""
