"""What concerns the training of an adapter: first values, optimizer groups, scale, components."""
