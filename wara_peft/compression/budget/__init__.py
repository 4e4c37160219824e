"""Spends a budget of parameters, bytes or another cost on ranks."""
