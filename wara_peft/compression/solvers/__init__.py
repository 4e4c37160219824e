"""A file for each way to factorise a weight."""
