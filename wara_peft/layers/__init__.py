"""Adapter layers, with a file for each kind of base layer, and merging into the base weight."""

# Importing a file sets the adapter layer of its kinds.
from . import conv, embedding, factorized, linear

__all__ = ["conv", "embedding", "factorized", "linear"]
