"""What several processes must agree on; with one process every function returns its argument."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree


def world_size() -> int:
    """Number of training processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcast(nest: Any) -> Any:
    """Rank 0's tensors on every rank; shapes must agree.

    Args:
        nest: A nest of tensors.
    """
    if world_size() == 1:
        return nest

    def send(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            dist.broadcast(leaf, src=0)
        return leaf

    return pytree.tree_map(send, nest)


def mean(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Element-wise mean over processes by one flat all-reduce.

    Args:
        tensors: The same shapes on every rank.
        device: Where the backend communicates.
    """
    world = world_size()
    if world == 1 or not tensors:
        return tensors
    flat = torch.cat([t.reshape(-1).double() for t in tensors]).to(device)
    dist.all_reduce(flat)
    parts = (flat / world).split([t.numel() for t in tensors])
    return [part.reshape(t.shape).to(t.device) for part, t in zip(parts, tensors, strict=True)]


def everywhere(flags: list[bool], device: torch.device) -> list[bool]:
    """Which flags hold on every process.

    Args:
        flags: As many on every rank.
        device: Where the backend communicates.
    """
    if world_size() == 1 or not flags:
        return flags
    agreed = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return [bool(flag) for flag in agreed.tolist()]
