"""Learning rates multiplied while the optimizer makes its step, and put back after it.

So a controller's factor composes with every scheduler, and with none: a scheduler finds the rates it
wrote, whether it computes the next ones from them or from the epoch. The multiplying is done in a pre-step
hook: a step that a gradient scaler skips calls no hook, and leaves nothing to put back. A closure runs with
the script's own rates: Lightning runs the whole training step in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    "Rates",
]

Closure = Callable[[], Any]


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
        """Put the factors in force."""
        self.restore()
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=False):
            if factor != 1.0:
                written = group["lr"]
                group["lr"] = written * factor  # a new one: several groups may share a tensor
                self._kept.append((group, written, group["lr"]))

    def restore(self) -> None:
        """Put the rates back; one that the optimizer wrote itself stays as written."""
        for group, written, in_force in self._kept:
            if group["lr"] is in_force:
                group["lr"] = written
        self._kept = []

    def around(self, closure: Closure) -> Closure:
        """A closure that runs with the script's own rates, and may write them.

        Args:
            closure: What the script passes to ``optimizer.step``.
        """

        def with_own_rates() -> Any:
            self.restore()
            loss = closure()
            self.multiply()
            return loss

        return with_own_rates

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The rates as the step will see them, for looking at them before it."""
        self.multiply()
        try:
            yield
        finally:
            self.restore()

    def written(self) -> list[float]:
        """The rates as the script wrote them, without the factors."""
        rates = {id(group): rate for group, rate, _ in self._kept}
        return [float(rates.get(id(group), group["lr"])) for group in self.optimizer.param_groups]
