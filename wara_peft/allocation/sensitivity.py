"""Measures how much the loss depends on each parameter, averaged over training steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Sensitivity:
    """Smoothed sensitivity of the loss to every number w in some parameters, by AdaLoRA's two moving averages.

        I = |w · ∂L/∂w|,   Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|,   score = Ī · Ū

    Ī says how much the loss would change without w, to first order, and Ū how uncertain that is from step to step.

    Args:
        parameters: the parameters, by name.
        beta1, beta2: β₁ and β₂.

    Attributes:
        average, deviation: Ī and Ū of each parameter, in float32.

    Source: AdaLoRA, arXiv 2303.10512, section 3.2.
    """

    def __init__(self, parameters: Mapping[str, Tensor], beta1: float, beta2: float) -> None:
        self.parameters = dict(parameters)
        self.beta1, self.beta2 = beta1, beta2
        self.average = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
        # Averages are float32 also for parameters in 16 bits, where rounding would swallow small changes of them.
        self.deviation = {name: value.clone() for name, value in self.average.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages from the parameters' present gradients.

        If any gradient is not finite, none is used: mixed precision's scaled loss overflows at times, and then the
        optimizer skips the step too.

        Raises:
            ValueError: no parameter has a gradient.
        """
        gradients = {name: value.grad for name, value in self.parameters.items() if value.grad is not None}
        if not gradients:
            raise ValueError("No parameter of the adapter has a gradient. Call this between `backward` and the step.")
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            return
        for name, gradient in gradients.items():
            product = (self.parameters[name] * gradient).abs().float()
            self.average[name].lerp_(product, 1 - self.beta1)
            self.deviation[name].lerp_((product - self.average[name]).abs(), 1 - self.beta2)

    def score(self, name: str) -> Tensor:
        """Give Ī · Ū of a parameter, in its shape."""
        return self.average[name] * self.deviation[name]
