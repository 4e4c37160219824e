"""Statistics of the inputs and gradients of layers, which solvers need."""
