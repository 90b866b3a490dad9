"""End the run once it has settled: more steps at this learning rate would only average noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import check_flag, check_number
from ..observables import FluctuationDissipation, Observable
from ..observables.fluctuation_dissipation import RATIO, STATIONARY
from ..record.readings import Decision
from .base import Controller, Effect, State, View

__all__ = ["StopWhenSettled"]

_RATIO, _STATIONARY = FluctuationDissipation.key(RATIO), FluctuationDissipation.key(STATIONARY)
FEWEST_STEPS = 200
"""Steps between two checks, at least."""


@dataclass(frozen=True, kw_only=True)
class StopWhenSettled(Controller):
    """Ask for the end of the run when it has settled at several checks in a row.

    A plain loop reads ``monitor.should_stop`` after each step; the Lightning callback sets
    ``trainer.should_stop``, which ends the run after ``min_steps`` and ``min_epochs``.

    Args:
        tolerance: How far from 1 the ratio of the two sides of the relation may be.
        patience: Checks in a row at which the run must have settled.
        check_every: Steps between checks; by default an epoch and at least 200 steps.
        dry_run: Say when the run would end, and change nothing.

    Units:
        Pure numbers and steps.

    Raises:
        InputError: If a setting cannot be used.

    Source:
        Yaida 2018, arXiv:1810.00004: the stationary state is recognised by the first relation.

    Example:
        >>> import torch
        >>> from gradiometer import Monitor
        >>> net = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
        >>> Monitor(net, sgd, controllers=[StopWhenSettled()]).should_stop
        False
    """

    knobs: ClassVar[tuple[str, ...]] = ("run",)

    tolerance: float = 0.05
    patience: int = 3
    check_every: int | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that no run can use."""
        check_number("tolerance", self.tolerance, above=0)
        check_number("patience", self.patience, least=1, integer=True)
        check_number("check_every", self.check_every, least=1, integer=True, optional=True)
        check_flag("dry_run", self.dry_run)

    def observables(self) -> tuple[Observable, ...]:
        """The fluctuation-dissipation relation."""
        return (FluctuationDissipation(tolerance=self.tolerance),)

    def accepts(self, observable: Observable) -> bool:
        """Any relation that decides with the same tolerance.

        Args:
            observable: What the user chose.
        """
        return isinstance(observable, FluctuationDissipation) and observable.tolerance == self.tolerance

    def start(self) -> State:
        """Not settled at any check yet."""
        return {"next": self.check_every or FEWEST_STEPS, "settled": 0}

    def effect(self, state: State) -> Effect:
        """The end, once it has settled often enough in a row.

        Args:
            state: The memory.
        """
        return Effect({}, stop=state["settled"] >= self.patience)

    def decide(self, view: View, state: State) -> tuple[list[Decision], State, str]:
        """One check.

        Args:
            view: This step.
            state: The memory.
        """
        answer = view.number(_STATIONARY)
        if state["settled"] >= self.patience:  # the loop goes on all the same
            return [], {**state, "next": view.step + 10**9}, ""
        settled = state["settled"] + 1 if answer == 1.0 else 0
        reason = f"settled at {settled} of the {self.patience} checks in a row that are asked for"
        if math.isnan(answer):
            reason = "whether it has settled is not known yet"
        elif answer != 1.0:
            reason = "the run is still on its way"
        decision = Decision(
            step=view.step,
            controller=type(self).__name__,
            knob="run",
            rule=f"{_STATIONARY} = 1, tolerance {self.tolerance:g}, at {self.patience} checks in a row",
            read=view.seen(_RATIO, _STATIONARY),
            before=1.0,
            factor=0.0 if settled >= self.patience else 1.0,
            reason=reason,
            dry_run=self.dry_run,
        )
        following = view.step + (self.check_every or view.steps_per_epoch(FEWEST_STEPS))
        return [decision], {"next": following, "settled": settled}, ""
