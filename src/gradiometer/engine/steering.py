"""Controllers in a running monitor: what they are shown, and what becomes of their decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..control import Controller, ControlPanel, View
from ..control.panel import CHANGES, GROUP, QUANTITIES
from ..optimizers import GroupSettings
from ..record.readings import Decision, Reading, make_key, quantity_of
from .guard import Guard
from .ranks import Ranks


class Steering:
    """The controllers of a run; does nothing where there are none.

    Args:
        controllers: What acts on readings.
        optimizer: The optimizer whose rates they change.
        names: Names of its parameter groups, at any time.
        guard: Says what controllers have to say.
        prefix: First part of every key.
    """

    def __init__(
        self,
        controllers: Sequence[Controller],
        optimizer: torch.optim.Optimizer,
        names: Callable[[], Sequence[str]],
        guard: Guard,
        prefix: str,
    ) -> None:
        self._guard, self._prefix = guard, prefix
        self.turned = False
        """Whether a learning rate was changed after the last step: the next one begins windows anew."""
        self.panel: ControlPanel | None = None
        if controllers:
            self.panel = ControlPanel(controllers, optimizer, names, contain=guard.contains)

    def due(self, step: int) -> bool:
        """Whether a controller that needs no reading is to be asked at this step.

        Args:
            step: The optimizer step.
        """
        return self.panel is not None and self.panel.due(step, set())

    @property
    def feeds(self) -> set[str]:
        """Groups of readings that controllers decide by."""
        return set() if self.panel is None else self.panel.feeds

    def rates_in_force(self) -> AbstractContextManager[None]:
        """The learning rates as the optimizer will see them."""
        return nullcontext() if self.panel is None else self.panel.rates.in_force()

    def restore_rates(self) -> None:
        """The script's own rates, where a step was broken off."""
        if self.panel is not None:
            self.panel.rates.restore()

    def follow(
        self,
        step: int,
        recorded: set[str],
        groups: Sequence[GroupSettings],
        examples: int,
        view: Callable[[list[float]], View],
        ranks: Ranks,
    ) -> tuple[list[Reading], list[Decision]]:
        """Let controllers decide, on all processes at the same steps.

        Args:
            step: The optimizer step.
            recorded: Groups of readings recorded at this step.
            groups: The optimizer's settings, with the rates in force.
            examples: Examples behind this step, 0 when unknown.
            view: What controllers may look at, from the rates as the script wrote them.
            ranks: The processes of the run.

        Returns:
            What was in force at this step, and what was decided.
        """
        if self.panel is None:
            return [], []
        numbers = self.panel.numbers(groups, examples)
        decisions: list[Decision] = []
        if self.panel.due(step, recorded):
            decisions = self._decide(self.panel, view, recorded, ranks)
        numbers[CHANGES] = float(self.panel.changes)
        return [self._reading(name, value) for name, value in numbers.items()], decisions

    def _decide(
        self,
        panel: ControlPanel,
        view: Callable[[list[float]], View],
        recorded: set[str],
        ranks: Ranks,
    ) -> list[Decision]:
        """One check of the controllers that are due."""
        decisions: list[Decision] = []
        messages: list[str] = []
        if not ranks.apart:
            decisions, messages = panel.decide(view(panel.rates.written()), recorded, ranks.share)
        if ranks.apart:
            panel.off = True
            self._guard.warn("controllers are off, because the processes do not measure together.")
        # Settings does not read a rate on a device at every step, and would not see the jump
        self.turned = any(decision.acted and decision.knob == "learning_rate" for decision in decisions)
        for message in messages:
            self._guard.warn(message)
        return decisions

    def _reading(self, name: str, value: float) -> Reading:
        quantity = quantity_of(name, QUANTITIES, GROUP)
        key = make_key(self._prefix, GROUP, name)
        return Reading(key, value, 0.0, quantity.unit, quantity.sentence, quantity=quantity)

    def describe(self) -> list[str]:
        """What was decided, for the closing table."""
        return [] if self.panel is None else self.panel.describe()

    def close(self) -> None:
        """Take the hooks off and put the rates back."""
        if self.panel is not None:
            self.panel.close()

    def state_dict(self) -> dict[str, Any] | None:
        """The controllers' memories; ``None`` where there are no controllers."""
        return None if self.panel is None else self.panel.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Continue with the controllers' memories; say it where a change they made is dropped.

        Args:
            saved: What :meth:`state_dict` returned.
        """
        if saved is None:
            return
        if self.panel is not None:
            for message in self.panel.load_state_dict(saved):
                self._guard.warn(message)
        elif saved["changes"]:
            self._guard.warn(
                f"the checkpoint holds changes made by {', '.join(saved['controllers'])}, and this monitor "
                "has no such controller: learning rate and batch size are those of the script again."
            )
