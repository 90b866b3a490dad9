"""The last update of an optimizer, without a copy of the weights before it.

Right after ``optimizer.step()`` the weights ``theta'``, the optimizer's state and the gradients are in place,
and the displacement ``u = theta - theta'`` follows from them; the formulas stand with their families. This
is the update before the new weights are rounded; in half precision the rounding is as large as the update
itself, so such weights are not rebuilt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import SampleSkippedError, UnsupportedError, check_kind
from ..record.readings import last_part
from ..stats.linalg import accumulation_dtype, squared_norms
from .base import GroupSettings, Move, Scratch, family_of

__all__ = ["displacements", "group_settings", "rebuilds", "squared_displacements", "step_was_made"]


def rebuilds(optimizer: Optimizer) -> bool:
    """Whether the updates of all parameter groups can be rebuilt.

    The answer is for the settings and gradients of this moment; ask between the backward pass and the step.

    Args:
        optimizer: Any optimizer; subclasses of those that can be rebuilt may do something else, so they
            are not.

    Returns:
        ``False`` also for some settings of SGD, Adam, AdamW and RMSprop: a decay that leaves nothing of the
        weights, Nesterov's momentum where it cannot be told whether torch overwrote the gradient, fused SGD
        that maximizes, weights in half precision, complex or of a class of their own, sparse gradients.

    Example:
        >>> weights = [torch.nn.Parameter(torch.ones(2))]
        >>> rebuilds(torch.optim.AdamW(weights)), rebuilds(torch.optim.Rprop(weights))
        (True, False)
    """
    family = family_of(optimizer)
    return all(family.refusal(optimizer, group) is None for group in optimizer.param_groups)


def step_was_made(optimizer: Optimizer) -> bool:
    """Whether the step that is just ending moved the weights; to be asked in a post-step hook.

    A gradient scaler calls the step of a fused optimizer even when the gradient is not finite, and the
    fused kernel then does nothing. It does not call that of any other optimizer.

    Args:
        optimizer: Any optimizer.

    Example:
        >>> step_was_made(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
        True
    """
    if not hasattr(optimizer, "param_groups"):
        check_kind("optimizer", optimizer, Optimizer, "torch.optim.SGD(model.parameters(), lr=0.1)")
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is None or float(found_inf) == 0.0


def displacements(optimizer: Optimizer, group: Mapping[str, Any]) -> list[Tensor]:
    """The displacement ``theta_t - theta_{t+1}`` of each parameter.

    Args:
        optimizer: The optimizer, right after its step, gradients still in place.
        group: One of its parameter groups.

    Returns:
        One new tensor for each of ``group["params"]``; zeros where a parameter had no gradient.

    Raises:
        UnsupportedError: If this group cannot be rebuilt.
        SampleSkippedError: If the last step was not made.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> displacements(optimizer, optimizer.param_groups[0])
        [tensor([1., 2.])]
    """
    trained = _trained(group)
    with torch.no_grad():
        rates, directions = _move(optimizer, group, trained, {})
        moved = {
            parameter: rate * direction
            for parameter, rate, direction in zip(trained, rates, directions, strict=True)
        }
        return [moved[p] if p in moved else torch.zeros_like(p) for p in group["params"]]


def squared_displacements(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    scratch: Scratch | None = None,
    *,
    checked: bool = False,
) -> Tensor:
    """Squared norm of the displacement ``theta_t - theta_{t+1}`` of each parameter.

    SGD and RMSprop with momentum cost one pass over their buffers, SGD without momentum and L2 one over the
    gradients. The others need a tensor of each parameter's shape to work in, and Adam takes longer than
    subtracting a copy of the weights would: what it saves is the call before the step.

    Args:
        optimizer: The optimizer, right after its step, gradients still in place.
        group: One of its parameter groups.
        scratch: One tensor of the shape of each parameter, to be kept between calls; missing ones are added
            where they are needed. Allocating them anew, as is done for ``None``, takes longer than the rest.
        checked: Whether :func:`rebuilds` has said for this step that it can be rebuilt.

    Returns:
        One squared norm for each of ``group["params"]``, 0 where a parameter had no gradient.

    Shapes:
        ``[n]``.

    Raises:
        UnsupportedError: If this group cannot be rebuilt.
        SampleSkippedError: If the last step was not made.

    Example:
        >>> weights = [torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.nn.Parameter(torch.ones(3))]
        >>> optimizer = torch.optim.SGD(weights, lr=0.5)
        >>> weights[0].square().sum().backward()
        >>> optimizer.step()
        >>> squared_displacements(optimizer, optimizer.param_groups[0])
        tensor([25.,  0.], dtype=torch.float64)
    """
    parameters = group["params"]
    trained = _trained(group)
    with torch.no_grad():
        rates, directions = _move(
            optimizer, group, trained, {} if scratch is None else scratch, checked=checked
        )
        if not trained:
            device = parameters[0].device if parameters else torch.device("cpu")
            return torch.zeros(len(parameters), dtype=accumulation_dtype(device), device=device)
        squares = squared_norms(directions)
        alike = len(set(rates)) == 1  # one number needs no tensor
        squares *= rates[0] ** 2 if alike else squares.new_tensor(rates).square_()
        if len(trained) == len(parameters):
            return squares
        had_gradient = torch.tensor([p.grad is not None for p in parameters], device=squares.device)
        return squares.new_zeros(len(parameters)).masked_scatter_(had_gradient, squares)


def _move(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    trained: list[Tensor],
    scratch: Scratch,
    *,
    checked: bool = False,
) -> Move:
    family = family_of(optimizer)
    reason = None if checked else family.refusal(optimizer, group)
    if reason is not None:
        raise UnsupportedError(
            f"the update cannot be rebuilt: {reason}", fix="Copy the weights before the step."
        )
    if not step_was_made(optimizer):
        raise SampleSkippedError("the gradient scaler skipped this step, because a gradient was not finite")
    return family.move(optimizer, group, trained, scratch)


def _trained(group: Mapping[str, Any]) -> list[Tensor]:
    """Parameters that the optimizer moves."""
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def group_settings(optimizer: torch.optim.Optimizer) -> tuple[GroupSettings, ...]:
    """The optimizer's settings by parameter group, with distinct names.

    Args:
        optimizer: Any optimizer.

    Example:
        >>> net = torch.torch.nn.Linear(2, 1)
        >>> group_settings(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))[0].momentum
        0.9
    """
    family = family_of(optimizer)
    names: list[str] = []
    settings = []
    for index, group in enumerate(optimizer.param_groups):
        name = last_part(group.get("name", index), str(index))
        while name in names:
            name = f"{name}.{index}"
        names.append(name)
        momentum, dampening, nesterov = family.momentum(group)
        settings.append(
            GroupSettings(
                name=names[-1],
                lr=float(group["lr"]),
                momentum=momentum,
                dampening=dampening,
                nesterov=nesterov,
                weight_decay=float(group.get("weight_decay", 0.0)),
                is_sgd=family.linear,
            )
        )
    return tuple(settings)
