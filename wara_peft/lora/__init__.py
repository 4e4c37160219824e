"""To LoRA and from LoRA: export, loading, live views, combinations, files of diffusers."""
