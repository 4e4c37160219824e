"""Training of models in low rank, or towards low rank."""
