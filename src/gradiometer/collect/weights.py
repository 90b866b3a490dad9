"""State functions of the weights after a step."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..optimizers import family_of
from ..stats.linalg import inner_products, squared_norms
from .base import Collector
from .snapshot import Weights


class WeightCollector(Collector):
    """Norms of the weights after the step, and their inner products with the buffer."""

    def result(self) -> Weights:
        """Both, by section."""
        return self._of([p.detach() for p in self.step.sections.parameters])

    def _of(self, weights: list[Tensor]) -> Weights:
        sections = self.step.sections
        parameters = sections.parameters  # idle ones count too
        squares = sections.sums(squared_norms, parameters, weights)
        optimizer = self.training.optimizer
        family = family_of(optimizer)
        buffers = [family.velocity(optimizer, parameter) for parameter in parameters]
        triples = zip(parameters, weights, buffers, strict=True)
        moving = [(p, w, b) for p, w, b in triples if b is not None]
        dots = squares * 0
        if moving:
            dots = sections.sums(inner_products, *map(list, zip(*moving, strict=True)))
        updates = torch.tensor(self.step.updates, dtype=torch.float64)
        return Weights(squares, dots, updates, self.step.drifts)


class CentredWeightCollector(WeightCollector):
    """The same for the weights less what they were at the window's first record."""

    saved: ClassVar[frozenset[str]] = frozenset({"centre"})
    of_window: ClassVar[bool] = True

    def result(self) -> Weights:
        """Both, by section; 0 where the window begins."""
        centre: dict[int, Tensor] = self.memory.setdefault("centre", {})
        position = {parameter: i for i, parameter in enumerate(self.training.parameters())}
        moved = []
        for parameter in self.step.sections.parameters:
            weights, i = parameter.detach(), position[parameter]
            if i not in centre:
                centre[i] = weights.clone()
            moved.append(weights - centre[i].to(weights.device))
        return self._of(moved)
