"""Learning rates multiplied while the optimizer steps, and put back after it.

So a controller's factor composes with every scheduler, and with none: a scheduler finds the rates it
wrote, whether it computes the next ones from them or from the epoch. The multiplying is done in a pre-step
hook: a step that a gradient scaler skips calls no hook, and leaves nothing to put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Rates:
    """The learning rates of one optimizer, with a factor for each parameter group.

    Args:
        optimizer: The optimizer.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> rates = Rates(optimizer)
        >>> rates.factors = [0.5]
        >>> with rates.in_force():
        ...     optimizer.param_groups[0]["lr"]
        0.05
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.factors: Sequence[float] = ()
        self._kept: list[tuple[dict[str, Any], Any, Any]] = []

    def multiply(self) -> None:
        """Put the factors in force; rates left over from a step that broke are put back first."""
        self.restore()
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=False):
            if factor != 1.0:
                self._kept.append(self._multiplied(group, factor))

    def _multiplied(self, group: dict[str, Any], factor: float) -> tuple[dict[str, Any], Any, Any]:
        """The group, its own rate, and the one in force; a tensor stays the same object."""
        own = group["lr"]
        if isinstance(own, Tensor):
            kept = own.clone()
            own.mul_(factor)
            return group, kept, None
        group["lr"] = own * factor
        return group, own, group["lr"]

    def restore(self) -> None:
        """Put the rates back; one that was written in the meantime stays as written."""
        for group, own, in_force in self._kept:
            if isinstance(own, Tensor):
                group["lr"].copy_(own)
            elif group["lr"] == in_force:
                group["lr"] = own
        self._kept = []

    def refresh(self) -> None:
        """Multiply rates, too, that the script wrote while the factors were in force.

        Lightning runs the whole training step inside the optimizer's step.
        """
        if any(force is not None and group["lr"] != force for group, _, force in self._kept):
            self.multiply()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The rates as the step will see them, for looking at them before it."""
        if self._kept:
            self.refresh()
            yield
            return
        self.multiply()
        try:
            yield
        finally:
            self.restore()

    def written(self) -> list[float]:
        """The rates as the script wrote them, without the factors."""
        own = {id(group): rate for group, rate, _ in self._kept}
        return [float(own.get(id(group), group["lr"])) for group in self.optimizer.param_groups]
