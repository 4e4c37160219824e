"""Facts about a base model without adapters: kinds of layers, quantization, tied weights, layers never called."""
