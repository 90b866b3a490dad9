"""The gradient of a step, and that of the step before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import SampleSkippedError
from ..stats.linalg import inner_products
from .base import Collector, Memory, MomentName, Step, Training
from .sections import Sections

Gradients = dict[int, Tensor]
"""By the position of the parameter in the optimizer."""


@dataclass(frozen=True)
class Gradient:
    """The unclipped gradient that one step was made from, without the factor of a loss scale.

    Args:
        parameters: What the optimizer holds, in its own order.
        by_position: The gradient of each parameter that has one.
        sections: Which parameters are read together.

    Units:
        loss / parameter.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sections = Sections(torch.nn.Module(), torch.optim.SGD([weight]), ["0"])
        >>> one = Gradient([weight], {0: torch.ones(2)}, sections)
        >>> one.dot(one)
        tensor([2.], dtype=torch.float64)
    """

    parameters: Sequence[Tensor]
    by_position: Gradients
    sections: Sections

    def dot(self, other: Gradient) -> Tensor:
        """Inner product with another gradient, over the parameters that both have, by section.

        Args:
            other: A gradient of the same optimizer.

        Shapes:
            ``[U]``.
        """
        common = sorted(self.by_position.keys() & other.by_position.keys())
        left = [self.by_position[i] for i in common]
        right = [other.by_position[i].to(gradient.device) for i, gradient in zip(common, left, strict=True)]
        return self.sections.sums(inner_products, [self.parameters[i] for i in common], left, right)


class GradientCollector(Collector):
    """The full gradient before the step; a copy, since it may be clipped before an observable looks at it."""

    moment: ClassVar[MomentName] = "before_step"

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._gradients: Gradients | None = None

    def before_step(self) -> None:
        """Copy what stands in ``.grad``."""
        self._gradients = {
            i: _dense(parameter.grad) / self.step.grad_scale
            for i, parameter in enumerate(self.training.parameters())
            if parameter.grad is not None
        }

    def result(self) -> Gradient | None:
        """The gradient of this step."""
        return self._of(self._seen())

    def _seen(self) -> Gradients:
        if self._gradients is None:
            raise SampleSkippedError(
                "the gradient was not seen before the step", fix="Call monitor.before_step()."
            )
        if not self._gradients:
            raise SampleSkippedError("no parameter has a gradient at this step")
        return self._gradients

    def _of(self, gradients: Gradients) -> Gradient:
        return Gradient(self.training.parameters(), gradients, self.step.sections)


class PreviousGradientCollector(GradientCollector):
    """The gradient of the step before this one; it also runs at the step before one at which it is due.

    What it keeps goes into checkpoints, so that the step after a resumption has it, too.
    """

    ahead: ClassVar[bool] = True
    saved: ClassVar[frozenset[str]] = frozenset({"step", "gradients"})

    def before_step(self) -> None:
        """Take out what was kept at the step before, and keep this one's."""
        super().before_step()
        memory, number = self.memory, self.step.number
        if memory.get("step") != number:  # else the optimizer skipped this step, and it is made again
            memory["before"] = memory["gradients"] if memory.get("step") == number - 1 else None
        memory["step"], memory["gradients"] = number, self._gradients

    def result(self) -> Gradient | None:
        """The gradient of the previous step; ``None`` where that was not seen, as at the first step."""
        self._seen()
        before = self.memory["before"]
        return None if before is None else self._of(before)


def _dense(gradient: Tensor) -> Tensor:
    """A copy without holes, and without a graph."""
    return (gradient.to_dense() if gradient.layout != torch.strided else gradient).detach().clone()
