"""What several processes must agree on; with one process every function returns its argument.

A collective that one process enters and another does not stops both for good. So processes first agree,
through the store they met at and never waiting without end, whether all of them measure the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

PATIENCE = 20.0
"""Seconds that the first process to measure waits for the others."""


def world_size() -> int:
    """Number of training processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def agree(name: str, plan: str) -> bool:
    """Whether every process is here with the same plan; all of them get the same answer.

    The first to know decides: once all have come, or once it has waited long enough. A process without a
    monitor, or with another one, costs one short wait and no deadlock.

    Args:
        name: What is agreed on; the n-th call of each process under one name belongs together.
        plan: What this process is about to do.
    """
    world, rank = world_size(), dist.get_rank()
    c10d = dist.distributed_c10d
    store = c10d.PrefixStore(f"gradiometer/{name}", c10d._get_default_store())
    turn = store.add(f"turn/{rank}", 1)
    store.set(f"{turn}/{rank}", plan)
    keys = [f"{turn}/{other}" for other in range(world)]
    try:
        store.wait(keys, timedelta(seconds=PATIENCE))
        same = all(store.get(key).decode() == plan for key in keys)
    except RuntimeError:  # torch's DistStoreError and its kin: not all came
        same = False
    return bool(store.compare_set(f"{turn}/same", "", "yes" if same else "no") == b"yes")


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


def share(nest: Any) -> Any:
    """Rank 0's nest on every rank, on the devices of this rank's own; shapes may differ.

    Args:
        nest: A nest of tensors.
    """
    if world_size() == 1:
        return nest
    device = next((leaf.device for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)), None)
    box = [pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, nest)]
    dist.broadcast_object_list(box, src=0)
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, box[0])


def mean(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Element-wise mean over processes by one flat all-reduce.

    Args:
        tensors: The same shapes on every rank.
        device: Where the backend communicates.
    """
    world = world_size()
    if world == 1 or not tensors:
        return tensors
    flat = torch.cat([t.reshape(-1).double().to(device) for t in tensors])
    dist.all_reduce(flat)
    parts = (flat / world).split([t.numel() for t in tensors])
    return [part.reshape(t.shape).to(t.device) for part, t in zip(parts, tensors, strict=True)]


def largest(numbers: Sequence[int], device: torch.device) -> list[int]:
    """The largest of each number over all processes.

    Args:
        numbers: As many on every rank.
        device: Where the backend communicates.
    """
    if world_size() == 1 or not numbers:
        return list(numbers)
    counts = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return [int(number) for number in counts.tolist()]
