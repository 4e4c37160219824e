"""A folder that `wara-peft run` puts on PYTHONPATH, so that every Python below it starts with its `sitecustomize`."""
