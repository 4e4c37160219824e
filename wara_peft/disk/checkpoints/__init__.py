"""Checkpoints on disk: tensors, shards, directories."""
