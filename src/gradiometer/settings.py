"""Notice when a run becomes another one: a jump of the optimizer's settings or, lastingly, of the batch."""

from __future__ import annotations

from typing import Any

import torch

_JUMP = 0.01
_PATIENCE = 3
_NAMES = ("momentum", "dampening", "nesterov", "betas", "alpha", "weight_decay")


class Settings:
    """What one step of training looks like next to the step before.

    A learning rate that moves by less than 1 % per step drifts; more is a jump. A batch of another size
    counts once it has come three times in a row, since the last one of an epoch is often short.
    ``drifts`` counts the steps at which a rate moved.

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
        self._rates: list[Any] = []
        self._others: list[Any] = []
        self._batch = 0
        self._unusual = 0
        self.drifts = 0

    def jumped(self, optimizer: torch.optim.Optimizer, batch: int) -> bool:
        """Whether this step differs from the one before by more than a drift.

        Args:
            optimizer: The optimizer; rates that are tensors are taken to be steady.
            batch: Examples behind the step's gradient, 0 when unknown.
        """
        groups = optimizer.param_groups
        # a rate in a tensor lives on the device, and nobody waits for it at every step
        rates = [0.0 if isinstance(group["lr"], torch.Tensor) else group["lr"] for group in groups]
        others = [[group.get(name) for name in _NAMES] for group in groups]
        before = self._rates, self._others
        self._rates, self._others = rates, others
        batch_jumped = self._batch_jumped(batch)
        if not before[0] or (rates, others) == before:
            return batch_jumped
        if others != before[1] or len(rates) != len(before[0]):
            return True
        self.drifts += 1
        steps = zip(rates, before[0], strict=True)
        return batch_jumped or any(abs(new - old) > _JUMP * abs(old) for new, old in steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and tuples."""
        return {
            "rates": self._rates,
            "others": self._others,
            "batch": self._batch,
            "unusual": self._unusual,
            "drifts": self.drifts,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            saved: What it returned.
        """
        self._rates, self._others = saved["rates"], saved["others"]
        self._batch, self._unusual, self.drifts = saved["batch"], saved["unusual"], saved["drifts"]

    def _batch_jumped(self, batch: int) -> bool:
        if not batch or batch == self._batch:
            self._unusual = 0
            return False
        self._unusual += 1
        if self._batch and self._unusual < _PATIENCE:
            return False
        first, self._batch, self._unusual = not self._batch, batch, 0
        return not first
