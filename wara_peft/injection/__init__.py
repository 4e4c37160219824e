"""What the model does when adapters go in and out: targets, tied weights, rollback, files."""
