"""Singular values, norms of the tails of ordered components, and a greedy choice of steps, on plain tensors."""
