"""Solvers: the ways to factorise a weight."""
