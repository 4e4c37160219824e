"""Would one product for the adapters of all projections that see the same input (q, k, v) be faster than three?

    python benchmarks/joint_projections.py

Forward and backward of three frozen projections of 512 tokens, 768 wide, each with a pair of rank 16: x Âᵀ for each,
and for the three Â stacked. The library keeps them apart.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

RANK = 16

if __name__ == "__main__":
    options = harness.parser(__doc__, "joint_projections", rounds=101).parse_args()
    tokens, width = (4, 32) if options.smoke else (512, 768)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=options.device)

    x = random(tokens, width).requires_grad_()
    weights, gradients = ([random(rows, width) for _ in range(3)] for rows in (width, tokens))
    pairs = [(random(RANK, width).requires_grad_(), random(width, RANK).requires_grad_()) for _ in range(3)]

    def step(hidden: Callable[[], list[Tensor]]) -> Callable[[], None]:
        def run() -> None:
            results = [
                torch.addmm(F.linear(x, weight), part, factor_b.T)
                for weight, part, (_, factor_b) in zip(weights, hidden(), pairs, strict=True)
            ]
            torch.autograd.backward(results, gradients)
            for tensor in (x, *(factor for pair in pairs for factor in pair)):
                tensor.grad = None

        return run

    variants = {
        "three products": step(lambda: [F.linear(x, factor_a) for factor_a, _ in pairs]),
        "one product": step(lambda: list(F.linear(x, torch.cat([a for a, _ in pairs])).split(RANK, 1))),
    }
    seconds = harness.interleaved(variants, options.rounds, warmup=5, device=options.device)
    harness.save(options, {"projections": harness.summary(seconds, "three products")})
