"""Wording that error messages share."""

from __future__ import annotations


def first_few(items: list[str], count: int = 3) -> str:
    """List the first few items for a message, and say how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
