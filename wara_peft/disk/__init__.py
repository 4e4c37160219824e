"""Reads saved adapters and checkpoints, merges them shard by shard, writes directories; trusts nothing it reads."""
