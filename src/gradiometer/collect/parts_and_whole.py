"""Whether the parts of a step's gradient and the whole in ``.grad`` are one gradient.

Each part's gradient is known along one direction per parameter, and so is ``.grad``. Both are linear, so the
parts must add up to the whole, to rounding. Where they do not, something came between: a clip, gradients that
were left over, a backward pass that nobody showed us, a batch that was given up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import parallel
from ..autodiff.ride_along import ROUNDINGS
from ..errors import SampleSkippedError
from ..stats.directions import Directions
from ..stats.linalg import accumulation_dtype
from .base import Memory
from .parameter_hooks import Metric, ParameterHooks, Received, entries

TOLERANCE = 1e-3
"""Share of a gradient's norm from which a difference counts."""
_SAME_FACTOR = 1e-4
"""Relative distance within which two factors are one."""
_LEAST_LOSS_SCALE = 64.0


@dataclass(frozen=True)
class Balance:
    """How ``.grad`` is made of what the micro-batches gave.

    Args:
        micro_batches: Those whose gradients are in it.
        factor: ``.grad`` over their sum, apart from the factors that are known.
        weight: 1, or 0 where parts and whole are not one gradient.
        averaged: Whether micro-batches were averaged after their backward passes, not in their losses.
        note: What was undone, in words.
        sums: Of several processes, whose mean is ``.grad``: see :class:`GradientParts`.

    Shapes:
        factor and weight scalars, sums ``[4]``.
    """

    micro_batches: list[Received]
    factor: float | Tensor = 1.0
    weight: float | Tensor = 1.0
    averaged: bool = False
    note: str = ""
    sums: Tensor | None = None


class Accounts:
    """What the backward passes of one step give, and whether ``.grad`` is their sum.

    Args:
        parameters: The parameters that are trained, by name.
        memory: Keeps the directions from step to step, and whether gradients come in pieces.
    """

    def __init__(self, parameters: Mapping[str, Tensor], memory: Memory) -> None:
        self._parameters, self._memory = parameters, memory
        self.directions: Directions = memory.setdefault("directions", Directions())
        self.hooks = ParameterHooks(parameters, self.directions, add_up=memory.get("several", False))
        self._left_over: dict[str, Tensor] = {}

    def enter(self, size: int, metric: Metric | None) -> None:
        """A micro-batch begins.

        Args:
            size: Its examples.
            metric: For a second norm of each gradient.
        """
        before = self.hooks.micro_batches
        if not before:
            self._left_over = self._along_grad()
        elif all(parameter.grad is None for parameter in self._parameters.values()):
            _give_up(before)
        self.hooks.attach(size, metric)

    def exit(self) -> None:
        """Its backward pass is done."""
        self.hooks.detach()

    def _along_grad(self) -> dict[str, Tensor]:
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        return {name: self.directions.along(name, gradient) for name, gradient in gradients.items()}

    def settle(
        self, grad_scale: float, loss_scale: float, *, recording: bool, apart: bool = False
    ) -> Balance | SampleSkippedError:
        """Hold ``.grad`` against the sum of the parts, before the optimizer's step.

        Args:
            grad_scale: Factor still in ``.grad``.
            loss_scale: Factor on the loss in the backward pass.
            recording: Whether to wait for the device; else a difference only makes the weight 0.
            apart: Whether what other processes gave is out of reach.
        """
        if self.hooks.error is not None:
            raise self.hooks.error
        if self.hooks.pieces:
            self._memory["several"] = True
            return SampleSkippedError(
                "a parameter received the gradient of one micro-batch in several pieces (several backward "
                "passes, or a checkpointed part of the model)",
                fix="From the next sample on they are added up.",
            )
        micro_batches = [m for m in self.hooks.micro_batches if m.norms and not m.given_up]
        if not micro_batches:
            return Balance(micro_batches)
        several = parallel.world_size() > 1
        divided = any(hasattr(p.grad, "_local_tensor") for p in self._parameters.values())
        if several and (apart or divided):
            return Balance(micro_batches)
        table = _Table.of(micro_batches, self._parameters, self._along_grad(), self._left_over)
        if several:  # .grad is the mean over processes
            return Balance(micro_batches, sums=table.sums(grad_scale / loss_scale))
        if table.on_device and not recording:
            return _without_waiting(micro_batches, table, grad_scale / loss_scale)
        balance = _judged(micro_batches, table, grad_scale / loss_scale)
        if isinstance(balance, Balance):
            _give_up(micro_batches[: len(micro_batches) - len(balance.micro_batches)])
        return balance

    @property
    def sizes(self) -> list[int]:
        """Examples of each micro-batch that was not given up, 0 for one without a backward pass."""
        return [m.size if m.norms else 0 for m in self.hooks.micro_batches if not m.given_up]


def _give_up(micro_batches: Sequence[Received]) -> None:
    """Their gradients are gone; one that never had a gradient was not given up but left out."""
    for received in micro_batches:
        received.given_up = bool(received.norms)


@dataclass(frozen=True)
class _Table:
    """Gradients along their directions, by parameter: of the micro-batches, of ``.grad``, and left over.

    ``slack`` is what rounding may make of the sum.

    Shapes:
        parts and slack ``[k, P]``, the others ``[P]``.
    """

    parts: Tensor
    slack: Tensor
    grad: Tensor
    grad_norms: Tensor
    left_over: Tensor

    @classmethod
    def of(
        cls,
        micro_batches: Sequence[Received],
        parameters: Mapping[str, Tensor],
        grad: Mapping[str, Tensor],
        left_over: Mapping[str, Tensor],
    ) -> _Table:
        """Put numbers by name into columns, with zeros where a parameter has no gradient."""
        device = next(iter(micro_batches[0].along.values())).device
        zero = torch.zeros((), dtype=accumulation_dtype(device), device=device)

        def row(numbers: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([numbers[name].to(zero) if name in numbers else zero for name in parameters])

        norms = {name: _norm(p.grad) for name, p in parameters.items() if name in grad}
        # the precision of .grad: in the backward pass itself all is the same on both sides
        rounding = [torch.finfo(p.dtype).eps for p in parameters.values()]
        received = [{name: norm[0] for name, norm in m.norms.items()} for m in micro_batches]
        return cls(
            parts=torch.stack([row(m.along) for m in micro_batches]),
            slack=torch.stack([row(norms) for norms in received]) * zero.new_tensor(rounding) * ROUNDINGS,
            grad=row(grad),
            grad_norms=row(norms),
            left_over=row(left_over),
        )

    def sums(self, factor: float) -> Tensor:
        """The parts and the whole along one direction for all parameters, and how far apart they may be."""
        parts, slack = factor * self.parts.sum(), factor * self.slack.sum()
        return torch.stack([parts, self.grad.sum(), self.grad_norms.square().sum(), slack])

    @property
    def on_device(self) -> bool:
        """Whether looking at a number means waiting for a device."""
        return self.grad.device.type != "cpu"

    def since(self, first: int, factor: float | Tensor) -> Tensor:
        """Whether ``.grad`` is this many times the sum of the micro-batches from this one on, as a scalar."""
        difference = (self.grad - factor * self.parts[first:].sum(0)).abs()
        return (difference <= TOLERANCE * self.grad_norms + factor * self.slack[first:].sum(0)).all()

    def factor(self, first: int) -> Tensor:
        """The factor that fits best."""
        total = self.parts[first:].sum(0)
        return (self.grad @ total) / (total @ total)


def _norm(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    gradient = entries(getattr(gradient, "_local_tensor", gradient))
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))


def _without_waiting(micro_batches: list[Received], table: _Table, expected: float) -> Balance:
    """What can be said without waiting for a device."""
    factor = table.factor(0)
    as_known, as_found = table.since(0, expected), table.since(0, factor) & (factor > 0)
    weight = (as_known | as_found).to(factor)
    return Balance(micro_batches, torch.where(as_known, torch.ones_like(factor), factor / expected), weight)


def _judged(micro_batches: list[Received], table: _Table, expected: float) -> Balance | SampleSkippedError:
    """Which micro-batches the gradient is made of, or what is wrong with it."""
    if not bool(table.grad.isfinite().all() & table.parts.isfinite().all()):
        return Balance(micro_batches)  # said elsewhere
    count = len(micro_batches)
    for first in range(count):
        if bool(table.since(first, expected)):
            return Balance(micro_batches[first:])
    for first in range(count):
        factor = float(table.factor(first))
        if math.isfinite(factor) and factor > 0 and bool(table.since(first, factor)):
            return _rescaled(micro_batches[first:], factor / expected)
    with_rest = table.grad - expected * table.parts.sum(0) - table.left_over
    if bool((with_rest.abs() <= TOLERANCE * table.grad_norms + expected * table.slack.sum(0)).all()):
        return SampleSkippedError(
            "gradients of an earlier step were still in .grad when this step began",
            fix="Call zero_grad() before the first backward pass of a step, and put every backward pass "
            "inside monitor.micro_batch.",
        )
    return SampleSkippedError(
        "the gradient in .grad is not the sum of what this step's backward passes gave: it was changed "
        "(clipped by value, noise added), or a backward pass was made outside monitor.micro_batch",
        fix="Call monitor.before_step() right after the last backward pass.",
    )


def _rescaled(micro_batches: list[Received], factor: float) -> Balance | SampleSkippedError:
    """The gradient was multiplied by something between its backward pass and ``before_step``."""
    if len(micro_batches) > 1 and abs(factor * len(micro_batches) - 1) < _SAME_FACTOR:
        return Balance(micro_batches, factor, averaged=True)
    nearest = 2.0 ** round(math.log2(factor))
    if abs(factor / nearest - 1) < _SAME_FACTOR and max(nearest, 1 / nearest) >= _LEAST_LOSS_SCALE:
        return SampleSkippedError(
            "the gradient in .grad is not on the scale of its backward pass, as after unscaling",
            got=f"a factor of {nearest:g}",
            fix="Under a gradient scaler write monitor.before_step(loss_scale=scaler.get_scale()) after "
            "unscaling, or monitor.before_step(grad_scale=scaler.get_scale()) before it.",
        )
    note = f"the gradient was multiplied by {factor:.3g} before before_step(), which is undone"
    return Balance(micro_batches, factor, note=note)


def foreign(
    expected: Mapping[str, tuple[Tensor, Tensor, float]], received: Received
) -> tuple[list[str], Tensor, Tensor]:
    """Which parameters' gradients are something else than the sums over the examples.

    A gradient that is zero or not finite says nothing. Losses that couple examples, whose contributions
    still add up, are not noticed.

    Args:
        expected: The sum over the examples along each parameter's direction, what rounding may make of it,
            and the relative error of one term.
        received: The gradient itself.

    Returns:
        Names of the parameters, whether each one's gradient is something else, and whether it says anything.

    Shapes:
        Both ``[n]``, on the parameters' device.
    """
    names = [name for name in expected if name in received.along]
    if not names:
        return [], torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
    device = received.along[names[0]].device
    both = [(*expected[name][:2], received.along[name], received.norms[name][0]) for name in names]
    kind = accumulation_dtype(device)
    rows = torch.stack([torch.stack([number.to(device, kind) for number in row]) for row in both])
    relative = TOLERANCE + rows.new_tensor([expected[name][2] for name in names])
    difference, bound = (rows[:, 0] - rows[:, 2]).abs(), rows[:, 1] + relative * rows[:, 3]
    judged = rows.isfinite().all(1) & (bound > 0)
    return names, judged & (difference > bound), judged
