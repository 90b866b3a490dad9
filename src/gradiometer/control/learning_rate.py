"""Lower the learning rate when the run has settled: more steps at this rate would only average noise.

The first fluctuation-dissipation relation (Yaida 2018) tells whether it has. A run that has not settled keeps
its rate, whatever its loss looks like; and every reason for doing nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from ..errors import check_choice, check_flag, check_number
from ..observables import FluctuationDissipation, Observable
from ..observables.fluctuation_dissipation import RATIO, STATIONARY, WEIGHT_NORM_SQ, why_undecided
from ..record.readings import Decision
from .base import Controller, Effect, State, View

__all__ = [
    "EquilibriumLR",
]

Policy = Literal["robust", "yaida", "sasa"]
FEWEST_STEPS = 200
"""Steps between two checks, at least."""
_MOVES = 3
"""Checks in a row before which the schedule has changed the rate: then it is told that it will not do."""
_ROUNDING = 1e-9
_PATIENCE = {"robust": 2, "yaida": 1, "sasa": 1}
_RATIO, _STATIONARY = (FluctuationDissipation.key(name) for name in (RATIO, STATIONARY))
_WEIGHT_NORM_SQ = FluctuationDissipation.key(WEIGHT_NORM_SQ)


class _Finding(NamedTuple):
    """Whether one target has settled, or why nobody can say; and what was looked at."""

    settled: bool
    reason: str
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EquilibriumLR(Controller):
    r"""Multiply the learning rate by ``factor`` each time the run has settled.

    * ``"robust"``, the default: ``fdr/stationary`` is 1 at two checks in a row. That is, the left side of the
      relation over the right is within ``tolerance`` of 1 over the second half of the run and over the window
      that ends a fifth earlier, and within three times that over each half of this window; and the window is
      long enough for the ratio to be known to ``tolerance``. A ratio that passes through 1 is not taken for
      one that rests there.
    * ``"yaida"``: the ratio is within ``tolerance`` of 1 at one check, as published (with
      ``factor = 1 - Y`` and ``tolerance = X``). It also fires where the ratio passes through 1 by chance.
    * ``"sasa"``: the test of SASA+ with the errors of end points, on the second half of the run where the
      authors keep the most recent eighth of their samples.

    The rate that the script or its scheduler sets is multiplied while the optimizer steps and put back
    afterwards, so schedulers, checkpoints and rate monitors see their own. Where a schedule keeps moving the
    rate there is no stationary state to find: nothing is done, and a warning says so. The same holds
    without weight decay, where the norm of the weights may grow for ever.

    Args:
        policy: How a stationary state is recognised.
        factor: What the rate is multiplied by at each drop.
        tolerance: How far from 1 the ratio of the two sides may be.
        patience: Checks in a row at which the run must have settled; by default 2 for ``"robust"``, else 1.
        check_every: Steps between checks; by default an epoch and at least 200 steps, or 1,000 steps where
            the length of an epoch is not known. A check is made at the first record from then on.
        warmup_steps: Steps before which nothing is decided. A warm-up that changes the rate at each step is
            waited for without it.
        min_lr: A rate is never brought below this.
        max_drops: Drops in a run, at most.
        per_group: Decide for each parameter group by itself, as Yaida's reference code does, instead of for
            all of them together. A group that is read in several sections has settled when all have.
        decay_in_loss: The loss itself holds an L2 term, so that the optimizer need not have a weight decay.
        dry_run: Say when the first drop would be made, and change nothing.

    Units:
        ``tolerance`` and ``factor`` are pure numbers, ``min_lr`` is a learning rate.

    Raises:
        InputError: If a setting cannot be used.

    Source:
        Yaida 2018, arXiv:1810.00004, section 4; SASA+: Zhang, Lang, Liu, Xiao 2020, arXiv:2002.10597. The
        robust policy is this project's own.

    Example:
        >>> import torch
        >>> from gradiometer import Monitor
        >>> net = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
        >>> monitor = Monitor(net, sgd, controllers=[EquilibriumLR()])
        >>> [decision.reason for decision in monitor.decisions]      # one for each check, later on
        []
    """

    knobs: ClassVar[tuple[str, ...]] = ("learning_rate",)

    policy: Policy = "robust"
    factor: float = 0.1
    tolerance: float = 0.05
    patience: int | None = None
    check_every: int | None = None
    warmup_steps: int = 0
    min_lr: float = 0.0
    max_drops: int = 5
    per_group: bool = False
    decay_in_loss: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that no run can use."""
        check_choice("policy", self.policy, get_args(Policy))
        check_number("factor", self.factor, above=0, below=1)
        check_number("tolerance", self.tolerance, above=0)
        check_number("min_lr", self.min_lr, least=0)
        check_number("warmup_steps", self.warmup_steps, least=0, integer=True)
        check_number("max_drops", self.max_drops, least=1, integer=True)
        for name in ("patience", "check_every"):
            check_number(name, getattr(self, name), least=1, integer=True, optional=True)
        for name in ("per_group", "decay_in_loss", "dry_run"):
            check_flag(name, getattr(self, name))

    def observables(self) -> tuple[Observable, ...]:
        """The fluctuation-dissipation relation, decided as this policy asks for."""
        test: Any = "sasa" if self.policy == "sasa" else "tolerance"
        return (FluctuationDissipation(tolerance=self.tolerance, test=test),)

    def accepts(self, observable: Observable) -> bool:
        """Any that decides by the same test; Yaida's policy needs the ratio only."""
        (needed,) = self.observables()
        assert isinstance(needed, FluctuationDissipation)
        return isinstance(observable, FluctuationDissipation) and (
            self.policy == "yaida"
            or (
                observable.test == needed.test
                and (needed.test == "sasa" or observable.tolerance == needed.tolerance)
            )
        )

    def start(self) -> State:
        """No drops yet."""
        first = max(self.warmup_steps, self.check_every or FEWEST_STEPS)
        return {"next": first, "schedule": [], "moves": 0, "targets": {}}

    def effect(self, state: State) -> Effect:
        """The factors reached so far."""
        return Effect({name: target["factor"] for name, target in state["targets"].items()})

    def decide(self, view: View, state: State) -> tuple[list[Decision], State, str]:
        """One check: a drop, or the reason for none, for each target."""
        moved = bool(state["schedule"]) and state["schedule"] != list(view.schedule)
        moves = state["moves"] + 1 if moved else 0
        targets = {"": list(range(len(view.groups)))}
        if self.per_group:
            targets = {group.name: [i] for i, group in enumerate(view.groups)}
        decisions, after = [], dict(state["targets"])  # also what was decided under other settings
        for name, members in targets.items():
            decision, after[name] = self._check(view, name, members, after.get(name), moved)
            decisions.append(decision)
        memory = {
            "next": view.step + (self.check_every or view.steps_per_epoch(FEWEST_STEPS)),
            "schedule": list(view.schedule),
            "moves": moves,
            "targets": after,
        }
        falling = moves >= _MOVES and sum(view.schedule) < sum(state["schedule"])
        return decisions, memory, _KEEPS_MOVING if falling else self._decay_missing(view, targets)

    def _check(
        self, view: View, name: str, members: Sequence[int], state: State | None, moved: bool
    ) -> tuple[Decision, State]:
        """The decision on some parameter groups, and what is remembered of them."""
        target = state or {"factor": 1.0, "drops": 0, "streak": 0}
        finding = self._finding(view, members, moved)
        streak = target["streak"] + 1 if finding.settled else 0
        rates = [view.groups[i].lr for i in members if view.groups[i].lr > 0]
        why_not = finding.reason or self._guard(rates, target, streak)
        factor = 1.0 if why_not else self.factor
        decision = Decision(
            step=view.step,
            controller=type(self).__name__,
            knob="learning_rate",
            rule=self._rule(),
            read=view.seen(*finding.keys),
            before=rates[0] if rates else 0.0,
            factor=factor,
            reason=why_not or f"settled at {streak} check{'s' * (streak > 1)} in a row",
            group=name,
            dry_run=self.dry_run,
        )
        return decision, {
            "factor": target["factor"] * factor,
            "drops": target["drops"] + (factor != 1.0),
            "streak": 0 if factor != 1.0 else streak,
        }

    def _finding(self, view: View, members: Sequence[int], moved: bool) -> _Finding:
        """Whether the parameter groups have settled."""
        ends = [""] if not self.per_group or len(view.sections) < 2 else []
        ends = ends or [f"/{section.name}" for section in view.sections if section.group in members]
        names = [f"{key}{end}" for end in ends for key in (_RATIO, _STATIONARY)]
        names += [f"{_WEIGHT_NORM_SQ}{end}" for end in ends]
        keys = tuple(names)
        if not ends:
            return _Finding(False, "its parameters are not trained", keys)
        if moved:
            return _Finding(False, "the schedule has changed the learning rate since the last check", keys)
        if not any(view.groups[i].weight_decay for i in members) and not self.decay_in_loss:
            return _Finding(False, "without weight decay there may be no stationary state", keys)
        if self.policy == "yaida":
            aways = [abs(view.number(f"{_RATIO}{end}") - 1) for end in ends]
            if any(math.isnan(away) for away in aways):
                return _Finding(False, f"{_RATIO} is not known yet", keys)
            settled = all(away < self.tolerance for away in aways)
        else:
            answers = [view.number(f"{_STATIONARY}{end}") for end in ends]
            if any(math.isnan(answer) for answer in answers):
                return _Finding(False, _undecided(view, ends), keys)
            settled = all(answer == 1.0 for answer in answers)
        return _Finding(settled, "" if settled else "the run is still on its way", keys)

    def _guard(self, rates: Sequence[float], target: Mapping[str, Any], streak: int) -> str:
        """Why a run that has settled keeps its rate; empty where it does not."""
        patience = self.patience or _PATIENCE[self.policy]
        if self.dry_run and target["drops"]:
            return "a drop was called for earlier and not made: this run is no longer the one it would be"
        if streak < patience:
            return f"settled at {streak} of the {patience} checks in a row that are asked for"
        if target["drops"] >= self.max_drops:
            return f"the rate has been lowered {self.max_drops} times, max_drops"
        if not rates:
            return "the rate is 0 already"
        if min(rates) * self.factor < self.min_lr * (1 - _ROUNDING):
            return f"the rate would fall below min_lr = {self.min_lr:g}"
        return ""

    def _rule(self) -> str:
        if self.policy == "yaida":
            return f"|{_RATIO} - 1| < {self.tolerance:g}"
        test = f", tolerance {self.tolerance:g}" if self.policy == "robust" else ", SASA+"
        return f"{_STATIONARY} = 1{test}, at {self.patience or _PATIENCE[self.policy]} checks in a row"

    def _decay_missing(self, view: View, targets: Mapping[str, Sequence[int]]) -> str:
        """What to tell about targets without weight decay."""
        without = [
            name or "all parameter groups"
            for name, members in targets.items()
            if not any(view.groups[i].weight_decay for i in members)
        ]
        if not without or self.decay_in_loss:
            return ""
        return (
            f"EquilibriumLR does not act on {', '.join(without)}: weight_decay is 0, so the norm of the "
            "weights may grow for ever and there may be no stationary state. Give the optimizer a "
            "weight_decay, or write EquilibriumLR(decay_in_loss=True) if the loss holds the L2 term."
        )


_KEEPS_MOVING = (
    "EquilibriumLR does not act: the schedule keeps changing the learning rate, so there is no stationary "
    "state to find. Use it with a rate that is constant after warm-up, or leave the decay to the schedule."
)


def _undecided(view: View, ends: Sequence[str]) -> str:
    """The reason that the reading itself gives."""
    for end in ends:
        reading = view.readings.get(f"{_STATIONARY}{end}")
        if reading is None:
            return f"{_STATIONARY} was not recorded at this step"
        if not reading.resolved:
            return why_undecided(reading)
    return f"{_STATIONARY} could not be measured"
