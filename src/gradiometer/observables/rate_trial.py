"""Whether a learning rate trains: a few steps of SGD on a batch, made on copies of the parameters.

A limit from the curvature at initialisation says nothing of the weights a few steps later. A network whose
gradient is small at first, such as a deep, a narrow or a convolutional one, is flat there, and steep as soon
as it begins to learn: only steps that are made show that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autodiff.functional import call, examples, pure_function, take
from ..autodiff.products import LossFn
from ..errors import InputError

STEPS = 64
PARTS = 8
"""Into how many parts the batch is divided, each that of one step: a rate must bear the noise too."""
_FEWEST = 8
"""Examples in a part."""
_CHANGE = 0.1
"""Share of its first loss by which a part's loss must have fallen, and may never rise."""
HALVINGS = 3
"""Rates below an eighth of the first are not tried: there, those that pass a trial may fail in training."""


class Steps(NamedTuple):
    """The optimizer of a trial, ``torch.optim.SGD`` with a factor on each parameter's rate."""

    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    gains: Sequence[float | Tensor]


def rate_that_trains(model: nn.Module, loss_fn: LossFn, x: Any, y: Any, rate: float, steps: Steps) -> float:
    """This rate where it trains; else half of the first that does among the next three halves; else ``nan``.

    To be used in ``as_training``. Takes at most 36 passes of the batch, mostly 9.

    Args:
        model: Any module; it is not changed.
        loss_fn: Maps outputs and targets to the mean loss.
        x: Inputs, the examples first.
        y: Targets. Where they cannot be divided like the inputs, each step takes the whole batch.
        rate: The learning rate.
        steps: The optimizer.
    """
    for halvings in range(HALVINGS + 1):
        if _trains(model, loss_fn, x, y, rate / 2**halvings, steps):
            return rate / 2 ** (halvings + (halvings > 0))  # twice a rate that was found by halving fails
    return math.nan


def _trains(model: nn.Module, loss_fn: LossFn, x: Any, y: Any, rate: float, steps: Steps) -> bool:
    """Whether the loss of every part falls by a tenth in 64 steps, and that of none rises by one."""
    function, values = pure_function(model, call)
    parts = _parts(x, y)
    parameters = [value.clone() for value in values.values()]
    buffers: list[Tensor | None] = [None] * len(parameters)

    def loss_of(part: tuple[Any, Any]) -> Tensor:
        return loss_fn(function(dict(zip(values, parameters, strict=True)), part[0]), part[1])

    with torch.no_grad():
        first = [float(loss_of(part)) for part in parts]
    highest = max(loss + _CHANGE * abs(loss) for loss in first)
    losses = []
    for step in range(STEPS):
        parameters = [parameter.requires_grad_() for parameter in parameters]
        loss = loss_of(parts[step % len(parts)])
        losses.append(float(loss.detach()))
        if not losses[-1] <= highest:
            return False
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        parameters = _moved(parameters, gradients, buffers, rate, steps)
    last = range(STEPS - 2 * len(parts), STEPS)
    goals = [loss - _CHANGE * abs(loss) for loss in first]
    return all(losses[step] < goals[step % len(parts)] for step in last)


def _moved(
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    buffers: list[Tensor | None],
    rate: float,
    steps: Steps,
) -> list[Tensor]:
    """The parameters after one step."""
    moved = []
    for i, (leaf, gradient, gain) in enumerate(zip(leaves, gradients, steps.gains, strict=True)):
        value = leaf.detach()
        if gradient is None:
            moved.append(value)
            continue
        update = gradient.detach() + steps.weight_decay * value
        if steps.momentum:
            before = buffers[i]
            velocity = update if before is None else steps.momentum * before + (1 - steps.dampening) * update
            buffers[i] = velocity
            update = update + steps.momentum * velocity if steps.nesterov else velocity
        moved.append(value - rate * gain * update)
    return moved


def _parts(x: Any, y: Any) -> list[tuple[Any, Any]]:
    """Inputs and targets of each part, drawn once."""
    count = examples(x)
    parts = min(PARTS, count // _FEWEST)
    try:
        divisible = y is None or examples(y) == count
    except InputError:
        divisible = False
    if parts < 2 or not divisible:
        return [(x, y)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return [(take(x, rows), take(y, rows)) for rows in order.chunk(parts)]
