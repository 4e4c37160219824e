"""The fields of `WaRAConfig`: types, checks, help, patterns of module names, what comes of LoRA's fields."""
