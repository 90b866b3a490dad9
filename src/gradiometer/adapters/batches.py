"""What a framework hands over: the network inside a module, loaders, and gradient scalers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..errors import InputError


def check_part(model: nn.Module, part: str | None) -> None:
    """Refuse a part that a model does not have.

    Args:
        model: The module.
        part: Dotted attribute path of the network; the module itself when ``None``.

    Raises:
        InputError: If there is no such attribute.

    Example:
        >>> check_part(nn.ModuleDict({"body": nn.Linear(3, 2)}), "head")
        Traceback (most recent call last):
        gradiometer.errors.InputError: ModuleDict has no submodule 'head', got submodules ['body']. ...
    """
    if part is not None and part not in dict(model.named_modules()):
        children = [name for name, _ in model.named_children()]
        raise InputError(
            f"{type(model).__name__} has no submodule {part!r}",
            got=f"submodules {children}",
            fix='Name one of them: model="...".',
        )


def loss_scales(scaler: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What ``Monitor.before_step`` takes under a gradient scaler that has already unscaled.

    Fused optimizers unscale inside their step, so their gradients still carry the factor.

    Args:
        scaler: A ``GradScaler``, or ``None``.
        optimizer: The optimizer about to step.
    """
    if scaler is None:
        return {"grad_scale": 1.0, "loss_scale": 1.0}
    scale = float(scaler.get_scale())
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return {"grad_scale": scale if fused else 1.0, "loss_scale": scale}


def dataset_size_of(loader: Any, batches: float | None = None) -> int | None:
    """Examples that a run trains on, ``None`` where the loader has no length.

    Args:
        loader: A data loader.
        batches: How many of its batches an epoch takes; all of them when ``None``. Where the order is fixed,
            the others are never seen.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.zeros(20))
        >>> dataset_size_of(torch.utils.data.DataLoader(data, 4), batches=2)
        8
        >>> dataset_size_of(torch.utils.data.DataLoader(data, 4, shuffle=True), batches=2)
        20
    """
    sampler = _sampler_of(loader)
    if isinstance(sampler, SubsetRandomSampler):
        return len(sampler)
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return None
    try:
        size = len(dataset)
    except (TypeError, NotImplementedError):  # how a stream says that it has no length
        return None
    batch_size = batch_size_of(loader)
    processes = _processes_in_order(sampler)
    if batches is None or batch_size is None or not processes:
        return size
    return int(min(size, batches * batch_size * processes))


def batch_size_of(loader: Any) -> int | None:
    """Examples in a batch of one process, ``None`` where the loader does not say.

    Args:
        loader: A data loader.
    """
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _processes_in_order(sampler: Any) -> int:
    """How many processes draw the examples in a fixed order; 0 where the order changes or is not known."""
    if isinstance(sampler, DistributedSampler):
        return 0 if sampler.shuffle else sampler.num_replicas
    return int(isinstance(sampler, SequentialSampler))


def _sampler_of(loader: Any) -> Any:
    """What draws the examples: a batch sampler's own sampler, where one was given."""
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return getattr(loader, "sampler", None) if inner is None else inner


def fixed_order_of(loader: Any) -> bool:
    """Whether a data loader gives the same batches in every epoch, as far as its sampler says.

    Args:
        loader: A data loader.
    """
    return _processes_in_order(_sampler_of(loader)) > 0


def replacement_of(loader: Any) -> bool | None:
    """Whether a data loader draws with replacement, ``None`` where its sampler does not say.

    Args:
        loader: A data loader.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.zeros(4))
        >>> replacement_of(torch.utils.data.DataLoader(data, shuffle=True))
        False
    """
    sampler = _sampler_of(loader)
    if isinstance(sampler, (RandomSampler, WeightedRandomSampler)):
        return bool(sampler.replacement)
    if isinstance(sampler, (SequentialSampler, SubsetRandomSampler, DistributedSampler)):
        return False
    return None
