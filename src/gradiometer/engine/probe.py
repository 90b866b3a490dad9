"""The fixed batch on which kernels and Jacobians are evaluated: given, or taken from the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..autodiff.functional import (
    Forward,
    check_inputs,
    detached_copy,
    pure_function,
    take,
)
from ..autodiff.untouched import measuring
from ..collect.snapshot import Probe
from ..errors import InputError
from .saved import opened, plain, sealed


def given_probe(model: nn.Module, forward: Forward, probe: Any) -> Probe | Literal["forget"]:
    """A probe that the user gave, tried on the model; or the word that the one to be taken is not kept.

    Args:
        model: The model being trained.
        forward: Maps model and inputs to outputs.
        probe: ``x``, ``(x, y)``, a :class:`Probe` or ``"forget"``.

    Raises:
        InputError: If the model cannot be called with it.
    """
    if isinstance(probe, str):
        return "forget"
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


def probe_state(probe: Probe) -> dict[str, Any]:
    """A probe for a checkpoint: tensors in a nest of lists and dictionaries.

    Args:
        probe: Inputs and targets.

    Raises:
        InputError: If something in it is of a class that a checkpoint cannot hold.
    """
    return sealed({"inputs": _packed(probe.inputs), "targets": _packed(probe.targets)})


def saved_probe(saved: Any, device: torch.device) -> Probe | None:
    """A probe from a checkpoint; ``None`` where there is none, or a damaged one.

    Args:
        saved: What :func:`probe_state` returned.
        device: Where the model is.
    """
    content = opened(saved)
    if content is None:
        return None
    return Probe(_unpacked(content["inputs"], device), _unpacked(content["targets"], device))


def same_probe(left: Probe, right: Probe) -> bool:
    """Whether two probes hold the same numbers.

    Args:
        left: A probe.
        right: Another one.
    """
    first, second = (pytree.tree_flatten((probe.inputs, probe.targets)) for probe in (left, right))
    return first[1] == second[1] and all(map(_equal, first[0], second[0]))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left.cpu(), right.cpu())
    return type(left) is type(right) and bool(np.all(left == right))


def _packed(nest: Any) -> Any:
    """A nest with each of its tuples, dictionaries and arrays in a dictionary that says what it is."""
    if type(nest) is list:
        return [_packed(part) for part in nest]
    if type(nest) is tuple:
        return {"tuple": [_packed(part) for part in nest]}
    if type(nest) is dict:
        return {"dict": {key: _packed(part) for key, part in nest.items()}}
    if isinstance(nest, np.ndarray) and nest.dtype.kind in "biufc":
        return {"array": torch.from_numpy(nest.copy())}
    if isinstance(nest, Mapping):
        raise InputError("a checkpoint does not hold this mapping", got=type(nest).__name__)
    return plain(nest)


def _unpacked(packed: Any, device: torch.device) -> Any:
    """The inverse, with tensors where the model is."""
    if isinstance(packed, Tensor):
        return packed.to(device)
    if isinstance(packed, list):
        return [_unpacked(part, device) for part in packed]
    if not isinstance(packed, Mapping):
        return packed
    ((kind, content),) = packed.items()
    if kind == "array":
        return content.numpy()
    if kind == "tuple":
        return tuple(_unpacked(part, device) for part in content)
    return {key: _unpacked(part, device) for key, part in content.items()}
