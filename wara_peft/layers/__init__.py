"""Adapter layers, a file for each kind of base layer, and how they merge."""
