"""Converts WaRA adapters to LoRA, and LoRA to WaRA: export, live views, checkpoints, diffusers' files, loading."""
