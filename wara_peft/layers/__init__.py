"""Adapter layers, a file for each kind of base layer, and how they merge."""

from . import conv, embedding, factorized, linear

__all__ = ["conv", "embedding", "factorized", "linear"]
