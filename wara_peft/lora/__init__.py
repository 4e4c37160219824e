"""Converts WaRA adapters to LoRA, and LoRA to WaRA: export, checkpoints, diffusers' files, loading."""
