"""README and docs/: the links, the generated pages, and every block of code."""
