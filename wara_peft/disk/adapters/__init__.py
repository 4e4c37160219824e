"""Saved adapters: reads, checks and merges them."""
