"""What the formulas refuse to be given: one line in each public function.

A formula turns a wrong number into ``nan`` or into another wrong number, and a wrong kind of thing into an
error of torch's. These checks come first and name the argument. They read values, so they wait for a device
and stand outside of ``vmap``: the engine uses the bare formulas.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, check_kind, check_number, shown

_TOO_LARGE = 2**63


def check_tensors(**tensors: Any) -> None:
    """Refuse what are no dense tensors of floating-point numbers on one device.

    Args:
        **tensors: What was given for each argument, by its name.

    Raises:
        InputError: With the argument and what it is.

    Example:
        >>> check_tensors(k=torch.eye(2).long())
        Traceback (most recent call last):
        gradiometer.errors.InputError: k must hold floating-point numbers, got torch.int64. Write k.double().
    """
    for name, value in tensors.items():
        _check_stored(name, value)
        if not value.is_floating_point():
            fix = f"Write {name}.{'real' if value.is_complex() else 'double()'}."
            raise InputError(f"{name} must hold floating-point numbers", got=value.dtype, fix=fix)
    _check_devices(tensors)


def check_finite(**tensors: Any) -> None:
    """Refuse what :func:`check_tensors` does, and what is not finite.

    Args:
        **tensors: What was given for each argument, by its name.

    Raises:
        InputError: With the argument and what it is.

    Example:
        >>> check_finite(k=torch.tensor([1.0, torch.nan]))
        Traceback (most recent call last):
        gradiometer.errors.InputError: k must be finite, got NaN or infinity. Look for where it began.
    """
    check_tensors(**tensors)
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"{name} must be finite", got="NaN or infinity", fix="Look for where it began.")


def _check_stored(name: str, value: Any) -> None:
    """Refuse what is no tensor whose numbers are there to be read."""
    if not isinstance(value, Tensor):
        fits = isinstance(value, (int, float, list, tuple, np.ndarray)) and not isinstance(value, bool)
        fix = f"Write torch.as_tensor({name})." if fits else f"Pass {name}= as a tensor."
        raise InputError(f"{name} must be a tensor", got=shown(value), fix=fix)
    if value.layout != torch.strided or value.is_nested:
        fix = f"Write {name}.to_dense()."
        raise InputError(f"{name} must be a dense tensor", got=value.layout, fix=fix)
    if value.is_meta:
        raise InputError(f"{name} holds no numbers", got="one on the device meta", fix="Compute it first.")
    if not value.numel():
        raise InputError(f"{name} is empty", got=f"shape {list(value.shape)}", fix="Leave no axis at 0.")


def _check_devices(values: dict[str, Any]) -> None:
    """Refuse tensors that lie apart; numbers of one entry go anywhere."""
    devices = {name: str(v.device) for name, v in values.items() if isinstance(v, Tensor) and v.ndim}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise InputError("tensors must lie on one device", got=got, fix="Move them with .to(device).")


def check_entries(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    integer: bool = False,
    scalar: bool = False,
    example: str = "",
) -> None:
    """Refuse what is neither a number nor a tensor of numbers, or out of its range.

    Args:
        name: The argument.
        value: What was given for it: one number for all parameter groups, or a tensor with one for each.
        least: The smallest that will do.
        above: What it has to be above.
        below: What it has to be below.
        integer: Whether it has to be whole.
        scalar: Whether it has to be one number.
        example: What to write instead.

    Raises:
        InputError: If it, or one entry, will not do.

    Example:
        >>> check_entries("lr", torch.tensor([0.1, -0.5]), above=0)
        Traceback (most recent call last):
        gradiometer.errors.InputError: lr must be a number above 0, got -0.5. Leave lr= out, or write such a number.
    """  # noqa: E501
    if isinstance(value, Tensor):
        _check_stored(name, value)
        if value.is_complex() or value.dtype == torch.bool:
            raise InputError(f"{name} must hold real numbers", got=value.dtype, fix=f"Write {name}.double().")
        if scalar and value.ndim:
            raise InputError(
                f"{name} must be one number", got=f"shape {list(value.shape)}", fix="Pass a float."
            )
        entries = value.detach().double()
        fits = entries.isfinite() & (entries >= least) & (entries > above) & (entries < below)
        wrong = entries[~(fits & (entries == entries.round()) if integer else fits)]
        if not wrong.numel():
            return
        value = wrong.reshape(-1)[0].item()
    elif isinstance(value, np.generic):
        value = value.item()
    if integer and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        fix = f"Write {name}={example}." if example else "Write a smaller one."
        raise InputError(f"{name} is larger than torch can count", got=shown(value), fix=fix)
    limits = {"least": least, "above": above, "below": below}
    check_number(name, value, **limits, integer=integer, example=example)  # type: ignore[arg-type]


def check_flags(name: str, value: Any) -> None:
    """Refuse what is neither ``True`` nor ``False``, nor a tensor of these.

    Args:
        name: The argument.
        value: What was given for it.

    Raises:
        InputError: If it is something else.
    """
    if isinstance(value, Tensor) and value.dtype == torch.bool and not value.is_meta:
        return
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False", got=shown(value), fix=f"Write {name}=True.")


def check_together(**values: Any) -> None:
    """Refuse numbers and tensors whose shapes do not broadcast, or that lie on several devices.

    Args:
        **values: What was given for each argument, by its name; numbers go with everything.

    Raises:
        InputError: With the shapes.

    Example:
        >>> check_together(lr=torch.ones(2), momentum=0.9, weight_sq=torch.ones(3))
        Traceback (most recent call last):
        gradiometer.errors.InputError: shapes must go together, got lr [2], weight_sq [3]. Pass one number for all, or one entry per parameter group.
    """  # noqa: E501
    _check_devices(values)
    shapes = {name: list(value.shape) for name, value in values.items() if isinstance(value, Tensor)}
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError as error:
        raise InputError(
            "shapes must go together",
            got=", ".join(f"{name} {shape}" for name, shape in shapes.items()),
            fix="Pass one number for all, or one entry per parameter group.",
        ) from error


def check_sgd(lr: Any, momentum: Any, dampening: Any, nesterov: Any) -> None:
    """Refuse settings that no step of ``torch.optim.SGD`` has.

    Args:
        lr: Learning rate.
        momentum: Momentum coefficient.
        dampening: Dampening.
        nesterov: Whether the momentum is Nesterov's.

    Raises:
        InputError: A rate that is not positive, a coefficient outside [0, 1), or Nesterov with dampening.
    """
    check_entries("lr", lr, above=0, example="0.1")
    check_entries("momentum", momentum, least=0, below=1, example="0.9")
    check_entries("dampening", dampening, least=0, below=1, example="0.0")
    check_flags("nesterov", nesterov)
    check_together(lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)
    if bool((torch.as_tensor(nesterov) & torch.as_tensor(dampening).ne(0)).any()):
        raise InputError("Nesterov momentum has no dampening", got=dampening, fix="Write dampening=0.")


def check_pair(name: str, value: Any) -> None:
    """Refuse what is no pair.

    Args:
        name: The argument.
        value: What was given for it.

    Raises:
        InputError: If it is no tuple or list of two.
    """
    check_kind(name, value, (tuple, list), "(at_the_start, at_the_end)")
    if len(value) != 2:
        raise InputError(
            f"{name} must be a pair", got=shown(value), fix=f"Write {name}=(at_the_start, at_the_end)."
        )


def number_sequence(name: str, values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A sequence of finite numbers as an array.

    Args:
        name: The argument.
        values: A list, an array or a tensor.

    Returns:
        Its numbers, float64.

    Raises:
        InputError: If it is something else.

    Example:
        >>> number_sequence("lrs", [0.1, 0.2])
        array([0.1, 0.2])
    """
    fix = f"Write {name}=[0.01, 0.02]."
    if isinstance(values, Tensor):
        _check_stored(name, values)
        values = values.detach().cpu().numpy() if values.dtype != torch.bfloat16 else values.tolist()
    array = values if isinstance(values, np.ndarray) else None
    if array is None and isinstance(values, (list, tuple, range)):
        real = [isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values]
        array = np.array([float(v) for v in values]) if all(real) else None
    if array is None or array.dtype.kind not in "iuf" or array.ndim != 1 or not np.isfinite(array).all():
        raise InputError(f"{name} must be a sequence of finite numbers", got=shown(values), fix=fix)
    return array.astype(np.float64)
