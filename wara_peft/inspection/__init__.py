"""Describes a saved adapter, as a report and as pictures, without its base model."""
