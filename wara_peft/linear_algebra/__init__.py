"""Singular values, norms of what follows in an order of components, and greedy choices of these; plain tensors."""
