"""The fields of `WaRAConfig`: types, checks, help, patterns of module names, values converted from LoRA's fields."""
