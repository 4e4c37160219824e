"""What solvers need to know of a layer's inputs and gradients."""
