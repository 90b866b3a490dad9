"""The update of a step: its squared norm by section, and its products with the weights for verification."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SampleSkippedError, UnsupportedError
from ..optimizers import displacements, family_of, rebuilds, squared_displacements
from ..stats.linalg import in_reals, inner_products, squared_norms
from .base import Collector, Memory, Step, Training
from .snapshot import Update, Work


class UpdateCollector(Collector):
    """The displacement of each section.

    It is rebuilt from what the optimizer leaves behind where that is exact; any other optimizer costs a
    copy of the weights on sampled steps.
    """

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._copies: list[list[Tensor]] | None = None
        self._asked = False
        # one tensor of the shape of each parameter: allocating them anew costs more than filling them
        self._scratch: dict[Tensor, Tensor] = memory.setdefault("scratch", {})

    def before_step(self) -> None:
        """Copy the weights where the update cannot be rebuilt."""
        self._asked = True
        if not rebuilds(self.training.optimizer):
            self._copies = [self._copy(group["params"]) for group in self.training.optimizer.param_groups]

    def _copy(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The weights of a group, in the scratch tensors."""
        trained = _trained(parameters)
        for parameter in trained:
            if parameter not in self._scratch:
                self._scratch[parameter] = torch.empty_like(parameter, requires_grad=False)
        copies = [self._scratch[parameter] for parameter in trained]
        if copies:
            torch._foreach_copy_(copies, [parameter.detach() for parameter in trained])
        return copies

    def result(self) -> Update:
        """Squared displacement, and its inner product with the buffer for Nesterov."""
        if not family_of(self.training.optimizer).moves_once:
            name = type(self.training.optimizer).__name__
            raise UnsupportedError(
                f"{name} moves the weights several times in a step, and only the last move is seen",
                fix="Use the other observables.",
            )
        if not self._asked and not rebuilds(self.training.optimizer):
            raise _weights_not_seen()
        family = family_of(self.training.optimizer)
        squares, dots = [], []
        for g, group in enumerate(self.training.optimizer.param_groups):
            reduce = self.step.sections.reduce
            if self._copies is None:
                rows = squared_displacements(
                    self.training.optimizer, group, self._scratch, checked=self._asked
                )
                squares.append(reduce(group["params"], rows))
            else:
                trained, moved = _trained(group["params"]), self._copies[g]
                if moved:
                    torch._foreach_sub_(moved, [p.detach() for p in trained])
                squares.append(self.step.sections.sums(squared_norms, trained, moved))
            if family.momentum(group)[2]:
                dots.append(self._along_buffer(g, group))
        return Update(_added(squares), _added(dots) if dots else None)

    def _along_buffer(self, index: int, group: Mapping[str, Any]) -> Tensor:
        """Inner product of the displacement with the buffer."""
        trained = _trained(group["params"])
        if self._copies is not None:
            moved = self._copies[index]
        else:
            every = displacements(self.training.optimizer, group)
            moved = [u for u, p in zip(every, group["params"], strict=True) if p.grad is not None]
        buffers = velocities_of(self.training.optimizer, trained)
        return self.step.sections.sums(inner_products, trained, moved, buffers)


class WorkCollector(Collector):
    """Inner products with the weights before the step; copies them, so for verification only."""

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._copies: list[list[Tensor]] | None = None

    def before_step(self) -> None:
        """Copy the weights."""
        self._copies = [_copies(group["params"]) for group in self.training.optimizer.param_groups]

    def result(self) -> Work:
        """Both inner products, in float64 throughout, complex weights as pairs of reals."""
        if self._copies is None:
            raise _weights_not_seen()
        sections, family = self.step.sections, family_of(self.training.optimizer)
        gradient, displacement = [], []
        for old, group in zip(self._copies, self.training.optimizer.param_groups, strict=True):
            trained = _trained(group["params"])
            old64 = [in_reals(tensor).double() for tensor in old]
            after = [p.detach() for p in trained]
            moved = [in_reals(a - b).double() for a, b in zip(old, after, strict=True)]
            displacement.append(sections.sums(inner_products, trained, old64, moved))
            used = family.used_gradients(self.training.optimizer, group, old64, moved)
            if used is None:
                gradient.append(displacement[-1] * math.nan)
            else:
                gradient.append(sections.sums(inner_products, trained, old64, used))
        return Work(_added(gradient), _added(displacement))


def velocities_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The momentum buffers of those parameters that have one.

    Args:
        optimizer: The optimizer.
        parameters: Some of its parameters.
    """
    family = family_of(optimizer)
    return [b for b in (family.velocity(optimizer, p) for p in parameters) if b is not None]


def _weights_not_seen() -> SampleSkippedError:
    return SampleSkippedError("the weights before the step were not seen", fix="Call monitor.before_step().")


def _trained(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.grad is not None]


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in _trained(parameters)]


def _added(values: Sequence[Tensor]) -> Tensor:
    """Sum of numbers per section, on the CPU if they are on several devices."""
    if len({value.device for value in values}) > 1:
        values = [value.cpu() for value in values]
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum(0)
