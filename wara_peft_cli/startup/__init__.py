"""`wara-peft run` puts this folder on PYTHONPATH, so that each Python below it runs the `sitecustomize` here."""
