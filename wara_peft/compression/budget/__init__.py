"""Spending a budget of parameters, bytes or another cost on ranks of layers."""
