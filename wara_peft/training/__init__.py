"""Helpers for training: first values from data, optimizer groups, a temporary scale, cutting of components."""
