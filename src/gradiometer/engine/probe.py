"""The fixed batch on which kernels and Jacobians are evaluated: given, or taken from the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..autodiff.functional import (
    Forward,
    check_inputs,
    detached_copy,
    examples,
    measuring,
    pure_function,
    take,
)
from ..collect.snapshot import Probe
from ..errors import InputError


def given_probe(model: nn.Module, forward: Forward, probe: Any) -> Probe:
    """A probe that the user gave, tried on the model.

    Args:
        model: The model being trained.
        forward: Maps model and inputs to outputs.
        probe: ``x``, ``(x, y)`` or a :class:`Probe`.

    Raises:
        InputError: If the model cannot be called with it.
    """
    if not isinstance(probe, Probe):
        pair = isinstance(probe, (tuple, list)) and len(probe) > 0
        probe = Probe(probe[0], probe[1] if len(probe) > 1 else None) if pair else Probe(probe)
    check_inputs(model, probe.inputs)
    try:
        with measuring(model), torch.no_grad():
            function, parameters = pure_function(model, forward)
            function(parameters, take(probe.inputs, slice(0, 1)))
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        shapes = [list(t.shape) for t in pytree.tree_leaves(probe.inputs) if isinstance(t, Tensor)]
        raise InputError(
            "the model cannot be called with the probe",
            got=f"inputs of shape {shapes}: {error}",
            fix="Pass probe=(x, y) with x as the model takes it, first dimension the examples.",
        ) from error
    return Probe(detached_copy(probe.inputs), detached_copy(probe.targets))


def first_examples(x: Any, y: Tensor | None, size: int) -> Probe:
    """The first examples of a batch.

    Args:
        x: The model's inputs.
        y: Their targets.
        size: How many examples.
    """
    first = slice(0, size)
    inputs = detached_copy(take(dict(x) if isinstance(x, Mapping) else x, first))
    same = isinstance(y, Tensor) and y.ndim > 0 and len(y) == examples(x)
    targets = y[first].detach().clone() if same and y is not None else None
    return Probe(inputs, targets)


def saved_probe(saved: Mapping[str, Any], device: torch.device) -> Probe:
    """A probe from a checkpoint.

    Args:
        saved: Its inputs and targets.
        device: Where the model is.
    """

    def moved(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    nest = pytree.tree_map(moved, dict(saved))
    return Probe(nest["inputs"], nest["targets"])
