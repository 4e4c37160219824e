"""Saving, loading and making compressed models on disk."""
