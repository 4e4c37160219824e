"""Coefficients of which a process holds a part, as FSDP and DeepSpeed's stage 3 leave parameters between uses.

FSDP2 makes a parameter a `DTensor`, whose parts are gathered by asking for them. FSDP1 and ZeRO-3 leave a flat part,
or nothing, in the place of a parameter, and put the whole there for as long as a module runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_flat(rows: Tensor) -> bool:
    """Whether coefficients, which are a matrix or more, are a flat part of themselves."""
    return rows.ndim < 2


def is_whole(rows: Tensor) -> bool:
    """Whether all values are in this process."""
    return not (is_flat(rows) or isinstance(rows, DTensor))


def belongs_to_fsdp1(rows: Tensor) -> bool:
    """Whether coefficients are a view of one of FSDP1's flat parameters."""
    return getattr(rows, "_fsdp_flattened", False)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, all of which have to ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Under CPU offload parts lie on the CPU, between which the mesh's processes cannot communicate.
    on_mesh: Any = tensor if tensor.is_meta else tensor.to(tensor.device_mesh.device_type)
    whole: Tensor = on_mesh.full_tensor()
    return whole.to(tensor.device)


def placed_like(rows: Tensor, like: Tensor) -> Tensor:
    """Coefficients, or their gradients, sharded as the parameter is. All processes have the same whole `rows`."""
    if not isinstance(like, DTensor) or isinstance(rows, DTensor):
        return rows
    return distribute_tensor(rows, like.device_mesh, like.placements, src_data_rank=None).to(rows.device)


def sharded_weight(weight: Tensor, coefficients: Tensor) -> Tensor:
    """A whole weight, sharded as FSDP2 would shard it if it were a parameter beside these coefficients."""
    if not isinstance(coefficients, DTensor):
        return weight
    placements = [place if place.is_replicate() else Shard(0) for place in coefficients.placements]
    return distribute_tensor(weight, coefficients.device_mesh, placements, src_data_rank=None).to(weight.device)


def share_weights(state_dict: dict[str, Any], coefficients: Mapping[str, tuple[str, Tensor]]) -> None:
    """Let all processes have the weights that some of them load, as their coefficients are computed from the whole.

    `torch.distributed.checkpoint` with `broadcast_from_rank0` sends only what has the name of a parameter.

    Args:
        state_dict: what this process loads. Weights that only others have are added.
        coefficients: one parameter of each layer, with its key, by the key of the layer's weight.
    """
    together: dict[tuple[dist.ProcessGroup, ...], dict[str, torch.device]] = {}
    for key, (own_key, rows) in coefficients.items():
        if isinstance(rows, DTensor):
            groups, device = tuple(rows.device_mesh.get_all_groups()), torch.device(rows.device_mesh.device_type)
        elif state_dict.get(own_key) is rows and dist.is_initialized():  # only that module puts a parameter there
            groups, device = (dist.group.WORLD,), rows.device  # type: ignore[assignment]
        else:
            continue
        together.setdefault(groups, {})[key] = device
    for groups, devices in together.items():
        for group in groups:
            _share(state_dict, devices, group)


def _share(state_dict: dict[str, Any], devices: Mapping[str, torch.device], group: dist.ProcessGroup) -> None:
    """Send the tensors under these keys to those processes of a group that lack them, to this device of each."""
    own = {key: (state_dict[key].shape, state_dict[key].dtype) for key in devices if key in state_dict}
    of_all: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_all, own, group)
    for key, device in devices.items():
        holders = [rank for rank, held in enumerate(of_all) if key in held]
        if 0 < len(holders) < len(of_all):
            shape, dtype = of_all[holders[0]][key]
            weight = torch.empty(shape, dtype=dtype, device=device)
            if key in own:
                weight.copy_(gathered(state_dict[key]).detach())
            dist.broadcast(weight, dist.get_global_rank(group, holders[0]), group)
            state_dict[key] = weight
