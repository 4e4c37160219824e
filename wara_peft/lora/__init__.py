"""Converts WaRA to LoRA and back: export, loading, LoRA in the wavelet domain, checkpoints, diffusers' files."""
