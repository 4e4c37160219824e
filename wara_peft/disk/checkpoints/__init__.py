"""Reads and writes checkpoints: files of tensors, their shards, and directories that appear whole."""
