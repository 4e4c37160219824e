"""Singular values, and the norms of what follows in an order of components; plain tensors."""
