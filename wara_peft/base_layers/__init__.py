"""What is known of a base model before any adapter: kinds of layers, quantization, layers that are never called."""
