"""Notice when a run becomes another one: a jump of the optimizer's settings or, lastingly, of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

_JUMP = 0.01
_PATIENCE = 3
_NAMES = ("lr", "weight_decay", "momentum", "dampening", "alpha", "nesterov", "betas")


class Settings:
    """What one step of training looks like next to the step before.

    A learning rate or a weight decay that moves by less than 1 % per step drifts, and so does a momentum
    whose distance from 1 does; more is a jump. A batch of another size counts once it has come three times
    in a row, since the last one of an epoch is often short. ``drifts`` counts the steps at which something
    drifted; ``changed`` says whether this step's settings may differ from those of the one before in
    anything; ``batch`` is the usual number of examples, 0 when unknown.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> settings = Settings()
        >>> settings.jumped(optimizer, 8)
        False
        >>> optimizer.param_groups[0]["lr"] = 0.01
        >>> settings.jumped(optimizer, 8), settings.jumped(optimizer, 8)
        (True, False)
    """

    def __init__(self) -> None:
        self._values: list[tuple[Any, ...]] = []
        self._in_tensors = False
        self._given: list[list[Any]] = []
        self._numbers: list[list[float]] = []
        self._other_batch = 0
        self._times = 0
        self.batch = 0
        self.drifts = 0
        self.changed = True

    def jumped(self, optimizer: torch.optim.Optimizer, batch: int) -> bool:
        """Whether this step differs from the one before by more than a drift.

        Args:
            optimizer: The optimizer; a rate in a tensor off the CPU is taken to be steady, since nobody waits
                for a device at every step.
            batch: Examples behind the step's gradient, 0 when unknown.
        """
        batch_jumped = self._batch_jumped(batch)
        values = [tuple(map(group.get, _NAMES)) for group in optimizer.param_groups]
        if not self._in_tensors and values == self._values:
            self.changed = False
            return batch_jumped
        self._values = values
        self._in_tensors = any(isinstance(value, torch.Tensor) for value in chain(*values))  # written to
        given = [[_rate(rate), *others] for rate, *others in values]
        moved = given != self._given
        self.changed = moved or any(settings[0] is None for settings in given)
        if not moved:
            return batch_jumped
        before, self._given, self._numbers = self._numbers, given, [_numbers(*settings) for settings in given]
        if not before or self._numbers == before:
            return batch_jumped
        if [len(numbers) for numbers in self._numbers] != [len(numbers) for numbers in before]:
            return True
        self.drifts += 1
        steps = zip(chain(*self._numbers), chain(*before), strict=True)
        return batch_jumped or any(abs(new - old) > _JUMP * abs(old) for new, old in steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "numbers": self._numbers,
            "batch": self.batch,
            "other_batch": self._other_batch,
            "times": self._times,
            "drifts": self.drifts,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            saved: What it returned.
        """
        self._values, self._given = [], []
        self._numbers, self.drifts = saved["numbers"], saved["drifts"]
        self.batch, self._other_batch, self._times = saved["batch"], saved["other_batch"], saved["times"]

    def _batch_jumped(self, batch: int) -> bool:
        if not batch or batch == self.batch:
            self._times = 0
            return False
        self._times = self._times + 1 if batch == self._other_batch else 1
        self._other_batch = batch
        if self.batch and self._times < _PATIENCE:
            return False
        first, self.batch, self._times = not self.batch, batch, 0
        return not first


def _rate(rate: Any) -> float | None:
    """A group's learning rate; ``None`` where reading it would wait for a device."""
    return None if isinstance(rate, torch.Tensor) and rate.device.type != "cpu" else float(rate)


def _numbers(rate: float | None, decay: Any, *memories: Any) -> list[float]:
    """A group's settings, each so that its relative change is what counts: of a momentum, that of 1 - mu."""
    *single, betas = memories
    flat = [value for value in (*single, *(betas or ())) if value is not None]
    return [rate or 0.0, float(decay or 0.0), *(1.0 - float(value) for value in flat)]
