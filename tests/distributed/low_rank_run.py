"""Training low-rank from the start on one or several processes on the CPU, for the tests of distributed training.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.low_rank_run OUTPUT_DIR

Every process takes its share of the same batches; the first writes the trained weights to OUTPUT_DIR/METHOD.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.compression.models import TwoLayers
from wara_peft.compression import (
    OrderedRankTraining,
    StraightThroughFactorizer,
    TrainedRankPruning,
    low_rank_plus_sparse,
    ordered_low_rank,
    share_bases,
    straight_through,
)

METHODS = ("sparse", "ordered", "pruning", "straight-through", "shared")


def train(method: str) -> dict[str, Tensor]:
    """Eight steps on twelve samples, of which each process takes its share."""
    torch.manual_seed(0)
    model: nn.Module = TwoLayers(12, 20).double()
    data = torch.randn(8, 12, 12, dtype=torch.float64)
    training: object = None
    if method == "sparse":
        low_rank_plus_sparse(model, 3, 0.1)
    elif method == "ordered":
        ordered_low_rank(model)
        training = OrderedRankTraining(penalty=1e-2, threshold=1.2)
    elif method == "pruning":
        training = TrainedRankPruning(energy=0.7, penalty=1e-2, period=2)
    elif method == "straight-through":
        straight_through(model, 10, 4, 2, ["first"])
        training = StraightThroughFactorizer()
    else:
        share_bases(model, [["first", "second"]], 0.6)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if training is not None:
        training.start(model)
    for step, batch in enumerate(data):
        own = batch.chunk(world)[rank]
        if method in ("ordered", "pruning"):
            training.before_forward(step)
        (wrapped(own) - own.flip(1)).square().mean().backward()
        if method in ("ordered", "pruning"):
            training.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        if method == "ordered" and step in (3, 6):
            training.shrink(optimizer)
    if training is not None:
        training.finish()
    return model.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for method in METHODS:
        state = train(method)
        if dist.get_rank() == 0:
            torch.save(state, Path(sys.argv[1], f"{method}.pt"))
    dist.destroy_process_group()
