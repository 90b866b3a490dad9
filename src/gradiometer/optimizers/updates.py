"""Rebuild an optimizer's last update from what it leaves behind, without a copy of the weights before it.

Right after ``optimizer.step()`` the weights ``theta'``, the optimizer's state and the gradients are in place,
and the displacement ``u = theta - theta'`` follows from them:

* SGD: ``u = lr b`` with torch's momentum buffer ``b``, which holds the gradient's sign, L2 and dampening.
  Without momentum, or with Nesterov's, L2 acts on the weights before the step, hence
  ``u (1 - lr wd) = lr (g + mu b + wd theta')``.
* Adam, AdamW: ``u = s``, the step of the updated moments, or ``u (1 - lr wd) = s + lr wd theta'`` where the
  decay is decoupled.
* RMSprop: ``u = lr b``, or without momentum ``u (a - lr wd) = lr (g + wd theta')`` element by element, where
  ``a`` is the root of the updated mean square, plus ``eps``.

This is the update before the new weights are rounded; in half precision the rounding is as large as the
update itself, so such weights are not rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from ..errors import SampleSkippedError, UnsupportedError
from ..stats.linalg import accumulation_dtype, squared_norms

SMALLEST_SHRINKAGE = 1e-3
"""Dividing by less of ``1 - lr wd`` would raise float32 rounding above 1e-4 of the update."""


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
        >>> weights = [nn.Parameter(torch.ones(2))]
        >>> rebuilds(AdamW(weights)), rebuilds(torch.optim.Rprop(weights))
        (True, False)
    """
    return all(_refusal(optimizer, group) is None for group in optimizer.param_groups)


def step_was_made(optimizer: Optimizer) -> bool:
    """Whether the step that is just ending moved the weights; to be asked in a post-step hook.

    A gradient scaler calls the step of a fused optimizer even when the gradient is not finite, and the
    fused kernel then does nothing. It does not call that of any other optimizer.

    Args:
        optimizer: Any optimizer.

    Example:
        >>> step_was_made(SGD([nn.Parameter(torch.ones(2))], lr=0.1))
        True
    """
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
        >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = SGD([weight], lr=0.5)
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
    optimizer: Optimizer, group: Mapping[str, Any], scratch: dict[Tensor, Tensor] | None = None
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

    Returns:
        One squared norm for each of ``group["params"]``, 0 where a parameter had no gradient.

    Shapes:
        ``[n]``.

    Raises:
        UnsupportedError: If this group cannot be rebuilt.
        SampleSkippedError: If the last step was not made.

    Example:
        >>> weights = [nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(3))]
        >>> optimizer = SGD(weights, lr=0.5)
        >>> weights[0].square().sum().backward()
        >>> optimizer.step()
        >>> squared_displacements(optimizer, optimizer.param_groups[0])
        tensor([25.,  0.], dtype=torch.float64)
    """
    parameters = group["params"]
    trained = _trained(group)
    with torch.no_grad():
        rates, directions = _move(optimizer, group, trained, {} if scratch is None else scratch)
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


_Scratch = dict[Tensor, Tensor]
_Move = tuple[list[float], list[Tensor]]
"""A number and a tensor for each parameter; the displacement is their product."""


def _move(optimizer: Optimizer, group: Mapping[str, Any], trained: list[Tensor], scratch: _Scratch) -> _Move:
    reason = _refusal(optimizer, group)
    if reason is not None:
        raise UnsupportedError(
            f"the update cannot be rebuilt: {reason}", fix="Copy the weights before the step."
        )
    if not step_was_made(optimizer):
        raise SampleSkippedError("the gradient scaler skipped this step, because a gradient was not finite")
    return _FORMULAS[type(optimizer)](optimizer, group, trained, scratch)


def _sgd(optimizer: Optimizer, group: Mapping[str, Any], trained: list[Tensor], scratch: _Scratch) -> _Move:
    lr, momentum, decay = float(group["lr"]), group["momentum"], float(group["weight_decay"])
    if momentum and not group["nesterov"]:
        return [lr] * len(trained), _states(optimizer, trained, "momentum_buffer")
    gradients = _gradients(trained)
    if momentum and _gradient_is_overwritten(group):
        return [lr] * len(trained), gradients
    sign = -1.0 if group["maximize"] else 1.0
    directions = gradients
    if momentum:
        buffers = _states(optimizer, trained, "momentum_buffer")
        directions = [
            torch.add(g, b, alpha=sign * momentum, out=_room(p, scratch))
            for p, g, b in zip(trained, gradients, buffers, strict=True)
        ]
    if decay:
        directions = [
            torch.add(d, p, alpha=sign * decay, out=_room(p, scratch))
            for p, d in zip(trained, directions, strict=True)
        ]
    return [sign * lr / _shrinkage(optimizer, group)] * len(trained), directions


def _adam(optimizer: Optimizer, group: Mapping[str, Any], trained: list[Tensor], scratch: _Scratch) -> _Move:
    lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), group["eps"]
    beta1, beta2 = (float(beta) for beta in group["betas"])
    means = _states(optimizer, trained, "exp_avg")
    squares = _states(optimizer, trained, "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    decoupled = decay and is_decoupled(optimizer, group)
    rates, directions = [], []
    for parameter, mean, square, step in zip(
        trained, means, squares, _steps(optimizer, trained), strict=True
    ):
        root_correction = (1.0 - beta2**step) ** 0.5
        factor = root_correction / (1.0 - beta1**step)  # s = lr factor mean / root
        out = _room(parameter, scratch)
        root = torch.sqrt(square, out=out).add_(eps * root_correction)
        if decoupled:
            directions.append(torch.addcdiv(parameter, mean, root, value=factor / decay, out=out))
            rates.append(lr * decay / _shrinkage(optimizer, group))
        else:
            directions.append(torch.div(mean, root, out=out))
            rates.append(lr * factor)
    return rates, directions


def _rmsprop(
    optimizer: Optimizer, group: Mapping[str, Any], trained: list[Tensor], scratch: _Scratch
) -> _Move:
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if group["momentum"]:
        return [lr] * len(trained), _states(optimizer, trained, "momentum_buffer")
    sign = -1.0 if group["maximize"] else 1.0
    squares = _states(optimizer, trained, "square_avg")
    means = _states(optimizer, trained, "grad_avg") if group["centered"] else [None] * len(trained)
    directions = []
    for parameter, gradient, square, mean in zip(trained, _gradients(trained), squares, means, strict=True):
        out = _room(parameter, scratch)
        if mean is None:
            torch.sqrt(square, out=out)
        else:
            torch.addcmul(square, mean, mean, value=-1.0, out=out).sqrt_()
        out.add_(group["eps"] - lr * decay)
        if decay:
            gradient = gradient.add(parameter, alpha=sign * decay)
        directions.append(torch.div(gradient, out, out=out))
    return [sign * lr] * len(trained), directions


_FORMULAS: Mapping[type[Optimizer], Callable[[Optimizer, Mapping[str, Any], list[Tensor], _Scratch], _Move]]
_FORMULAS = {SGD: _sgd, Adam: _adam, AdamW: _adam, RMSprop: _rmsprop}


def _refusal(optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
    """Why the update of a group cannot be rebuilt; ``None`` when it can."""
    if type(optimizer) not in _FORMULAS:
        return f"no formula for {type(optimizer).__name__}"
    for parameter in group["params"]:
        if type(parameter) not in (Tensor, nn.Parameter):
            return f"{type(parameter).__name__} may have arithmetic of its own"
        if parameter.dtype not in (torch.float32, torch.float64):
            return f"rounding of {parameter.dtype} weights is as large as their updates"
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            return "a gradient is sparse"
    if group["differentiable"]:
        return "differentiable=True"
    if abs(_shrinkage(optimizer, group)) < SMALLEST_SHRINKAGE:
        return "lr * weight_decay is 1, so nothing is left of the weights before the step"
    if type(optimizer) is SGD:
        if group["maximize"] and group["fused"]:
            return "releases of torch differ in where fused SGD puts the sign of maximize=True"
        if group["nesterov"] and _gradient_is_overwritten(group) is None:
            return "Nesterov's momentum may have overwritten the gradient; foreach=True or False would tell"
    return None


def _gradient_is_overwritten(group: Mapping[str, Any]) -> bool | None:
    """Whether Nesterov's SGD leaves its direction in ``.grad``; ``None`` where torch chooses the form.

    The multi-tensor form adds to the gradients in place, unless L2 or ``maximize`` made copies of them.
    """
    if group["weight_decay"] or group["maximize"] or group["fused"]:
        return False
    if group["foreach"] is None and group["fused"] is None:
        on_cpu = all(parameter.device.type == "cpu" for parameter in group["params"])
        return False if on_cpu else None  # torch has no multi-tensor kernels there, and does not choose them
    return bool(group["foreach"])


def is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether Adam's decay acts on the weights; torch before 2.7 has no entry for it."""
    return bool(group.get("decoupled_weight_decay", type(optimizer) is AdamW))


def _shrinkage(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Factor that the step puts on the weights before it."""
    if type(optimizer) is SGD:
        acts = not group["momentum"] or group["nesterov"]
    else:
        acts = type(optimizer) is not RMSprop and is_decoupled(optimizer, group)
    return 1.0 - float(group["lr"]) * float(group["weight_decay"]) if acts else 1.0


def _trained(group: Mapping[str, Any]) -> list[Tensor]:
    """Parameters that the optimizer moves."""
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _gradients(trained: Sequence[Tensor]) -> list[Tensor]:
    """Unscaled ones also under a gradient scaler: a fused kernel writes them back."""
    return [parameter.grad for parameter in trained if parameter.grad is not None]


def _states(optimizer: Optimizer, trained: Sequence[Tensor], key: str) -> list[Tensor]:
    try:
        return [optimizer.state.get(parameter, {})[key] for parameter in trained]
    except KeyError:
        raise SampleSkippedError(f"a parameter has a gradient but no {key!r}: it made no step yet") from None


def _steps(optimizer: Optimizer, trained: Sequence[Tensor]) -> list[float]:
    """Steps that each parameter has made, fetched from the device at once."""
    steps: list[float] = torch.stack(_states(optimizer, trained, "step")).tolist() if trained else []
    return steps


def _room(parameter: Tensor, scratch: _Scratch) -> Tensor:
    """The tensor in which to work for a parameter."""
    room = scratch.get(parameter)
    if room is None:
        room = scratch[parameter] = torch.empty_like(parameter, requires_grad=False)
    return room
