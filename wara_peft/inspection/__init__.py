"""Shows what a saved adapter is, in a table and in pictures."""
