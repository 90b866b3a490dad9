"""Whether a network can be run in passes of our own without a trace: it is tried once, before anything else.

What a forward pass writes to is put back, as far as it can be found. A network that gives something else when
it is called again has advanced what could not be found, and one that writes to its own weights changes what
is trained.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autodiff.untouched import as_training, measuring

TOLERANCE = 1e-3
"""Of two outputs: some kernels add up in another order each time."""


def trace_of_a_pass(model: nn.Module, run: Callable[[], list[Any]]) -> str:
    """What a pass of our own would leave behind; empty where it leaves nothing.

    Weights that were written to are put back here. The network is run twice in evaluation mode and twice in
    the modes it is in; what it raises is left to those who have a use for its outputs.

    Args:
        model: The model, with the weights that are trained.
        run: Runs its network on the same inputs, and gives the leaves of what it returns.

    Example:
        >>> count = iter(range(10))
        >>> net = nn.Linear(2, 1)
        >>> trace_of_a_pass(net, lambda: [net(torch.ones(1, 2))])
        ''
        >>> trace_of_a_pass(net, lambda: [net(torch.ones(1, 2)) + next(count)])[:44]
        'it gives another output when it is called ag'
    """
    weights = [
        _Weight(name, part, part.data, part.detach().clone())
        for name, parameter in model.named_parameters()
        if not (part := getattr(parameter, "_local_tensor", parameter)).is_meta
    ]
    for evaluate in (measuring, as_training):
        outputs: list[list[Any]] = []
        for _ in range(2):
            try:
                with evaluate(model), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the user's own pass has given them
                    outputs.append([out.detach() for out in run() if isinstance(out, Tensor)])
            except Exception:  # of the user's own module
                outputs.clear()
            finally:
                written = _put_back(weights)
            if written:
                return f"its forward pass writes to the weight {written!r}"
            if not outputs:
                break
        if outputs and not all(itertools.starmap(_same, zip(*outputs, strict=False))):
            return (
                "it gives another output when it is called again with the same input: it draws random "
                "numbers, or counts its calls, where that cannot be put back"
            )
    return ""


class _Weight(NamedTuple):
    """A weight, the memory it is in, and its value."""

    name: str
    tensor: Tensor
    memory: Tensor
    value: Tensor


def _put_back(weights: Sequence[_Weight]) -> str:
    """Restore weights that have changed; the name of one of them."""
    changed = ""
    for weight in weights:
        now = weight.tensor.data
        if now.shape == weight.value.shape and (
            torch.equal(now, weight.value) or _equal_with_nan(now, weight.value)
        ):
            continue
        changed = changed or weight.name
        weight.tensor.data = weight.memory
        weight.memory.copy_(weight.value)
    return changed


def _equal_with_nan(first: Tensor, second: Tensor) -> bool:
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two outputs are the same up to rounding."""
    if first.shape != second.shape:
        return False
    if not (first.is_floating_point() or first.is_complex()):
        return torch.equal(first, second)
    wide = torch.complex128 if first.is_complex() else torch.float64
    a, b = first.nan_to_num().to(wide), second.nan_to_num().to(wide)
    return bool((a - b).norm() <= TOLERANCE * (a.norm() + b.norm()))
