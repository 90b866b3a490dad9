"""The engine's side of control: asks the controllers, keeps their memories, carries out what they decide.

On several processes rank 0 decides and the others follow: they take its decisions and its controllers'
memories, whatever they have read themselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.hooks import RemovableHandle

from ..errors import InputError
from ..optimizers import GroupSettings
from ..record.readings import Decision, Quantity
from .base import Controller, Effect, State, View
from .rates import Rates

__all__ = [
    "ControlPanel",
]

GROUP = "control"
CHANGES = "changes"
QUANTITIES: Mapping[str, Quantity] = {
    "learning_rate": Quantity(
        "1",
        "Learning rate in force, of the first parameter group or the one named.",
        chart="learning rate",
        formula=(
            "the script's rate times the factor, of the first parameter group; `.../<group>` where "
            "factors differ"
        ),
        cost="none",
        tells="the rate this step was made with",
    ),
    "lr_factor": Quantity(
        "1",
        "Controllers' factor on the learning rate that the script sets.",
        formula="product of the controllers' factors",
        cost="none",
        source="arXiv:1810.00004 for `EquilibriumLR`",
        tells="1 until something was changed",
        act="the text beside the curves says why",
    ),
    "batch_size": Quantity(
        "samples",
        "Examples behind this step, of all processes.",
        chart="batch size",
        formula="examples of all processes and micro-batches behind this step",
        cost="none",
        tells="the true batch, whatever was asked for",
    ),
    CHANGES: Quantity(
        "1",
        "Changes that controllers have made since the beginning.",
        chart="changes made by controllers",
        formula="changes so far",
        cost="none",
        tells="steps where something was changed: a mark beside the loss curves",
    ),
}
Outcome: TypeAlias = tuple[list[dict[str, Any]], list[State], list[str]]
"""Decisions, memories and messages as plain values, which processes can send each other."""
_KEPT = 200
"""Changes, and refusals, of each controller that are kept in memory and in checkpoints."""
_SILENT = 5
"""Checks in a row without a decision and without a number after which a controller is said to be silent."""


class ControlPanel:
    """The controllers of one run.

    Args:
        controllers: The controllers.
        optimizer: The optimizer whose learning rates they change.
        names: Names of its parameter groups, at any time.
        contain: Whether a controller that fails decides nothing, instead of raising.

    Raises:
        InputError: If a controller begins with an impossible memory, or another monitor's controllers
            already turn this optimizer's learning rate.

    Example:
        >>> from gradiometer.control.learning_rate import EquilibriumLR
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> panel = ControlPanel([EquilibriumLR()], sgd, lambda: ["0"])
        >>> panel.feeds
        {'fdr'}
    """

    def __init__(
        self,
        controllers: Sequence[Controller],
        optimizer: torch.optim.Optimizer,
        names: Callable[[], Sequence[str]],
        *,
        contain: bool = True,
    ) -> None:
        self.rates = Rates(optimizer)
        self.decisions: list[Decision] = []
        self.off = False
        self._controllers = list(controllers)
        self._names = names
        self._contain = contain
        self._silent = [0] * len(controllers)
        self._states = [_checked(controller, controller.start()) for controller in controllers]
        self._effects = self._effects_of(self._states)
        self.changes = 0
        self._set_factors()
        for controller, state in zip(self._controllers, self._states, strict=True):
            if not controller.dry_run:
                controller.apply(state)
        self._hooks: list[RemovableHandle] = []
        if any("learning_rate" in acting.turns() and not acting.dry_run for acting in controllers):
            self._attach(optimizer)

    @property
    def feeds(self) -> set[str]:
        """Groups of readings that controllers decide by."""
        return {
            observable.group for controller in self._controllers for observable in controller.observables()
        }

    @property
    def accumulation(self) -> int | None:
        """Micro-batches to accumulate from the next step on; ``None`` where that is left to the script."""
        asked = [effect.accumulation for effect in self._effects]
        return next((number for number in asked if number is not None), None)

    @property
    def should_stop(self) -> bool:
        """Whether a controller has asked for the run to end."""
        return any(effect.stop for effect in self._effects)

    def _effects_of(self, states: Sequence[State]) -> list[Effect]:
        """What memories mean for the run, those of dry runs left out."""
        pairs = zip(self._controllers, states, strict=True)
        return [controller.effect(state) for controller, state in pairs if not controller.dry_run]

    def due(self, step: int, recorded: set[str]) -> bool:
        """Whether anything is to be decided now; the same on every process.

        Args:
            step: The optimizer step.
            recorded: Groups of readings recorded at this step, whether or not that went well.
        """
        return not self.off and any(self._is_due(i, step, recorded) for i in range(len(self._controllers)))

    def _is_due(self, index: int, step: int, recorded: set[str]) -> bool:
        feeds = {observable.group for observable in self._controllers[index].observables()}
        return step >= self._states[index]["next"] and (not feeds or bool(feeds & recorded))

    def decide(
        self, view: View, recorded: set[str], share: Callable[[int, Callable[[], Outcome]], Outcome | None]
    ) -> tuple[list[Decision], list[str]]:
        """One check of every controller that is due.

        Args:
            view: This step.
            recorded: As for :meth:`due`.
            share: What process 0 makes at a step, on every process; ``None`` where they do not agree.

        Returns:
            What was decided, and what the user must be told once.
        """
        outcome = share(view.step, lambda: self._outcome(view, recorded))
        if outcome is None:
            return [], []
        made, self._states, messages = outcome
        decisions = [Decision.from_plain(fields) for fields in made]
        self.changes += sum(decision.acted for decision in decisions)
        self.decisions = _bounded(self.decisions + decisions)
        if any(decision.acted for decision in decisions):
            messages += self._carry_out()
        return decisions, messages

    def _outcome(self, view: View, recorded: set[str]) -> Outcome:
        """Decisions, memories and messages as plain values; a controller that fails decides nothing."""
        made: list[dict[str, Any]] = []
        states, messages = [], []
        for index, (controller, state) in enumerate(zip(self._controllers, self._states, strict=True)):
            if self._is_due(index, view.step, recorded):
                view.missed.clear()
                view.given.clear()
                try:
                    decisions, after, message = controller.decide(view, state)
                    plain = [decision.plain() for decision in decisions]
                    messages += _without_effect(controller, decisions, state, _checked(controller, after))
                    messages += self._silence(index, view, decisions)
                    state = after
                    made += plain
                except Exception as error:
                    if not self._contain:
                        raise
                    state = {**state, "next": view.step + view.steps_per_epoch()}
                    message = f"{type(controller).__name__} could not decide: {type(error).__name__}: {error}"
                messages += [message] * bool(message)
            states.append(state)
        return made, states, messages

    def _silence(self, index: int, view: View, decisions: Sequence[Decision]) -> list[str]:
        """What to tell of a controller that decides nothing, check after check, for want of numbers."""
        silent = not decisions and bool(view.missed) and not view.given
        self._silent[index] = self._silent[index] + 1 if silent else 0
        if self._silent[index] != _SILENT:
            return []
        missed = ", ".join(f"{key} ({why})" for key, why in view.missed.items())
        name = type(self._controllers[index]).__name__
        return [f"{name} has decided nothing at {_SILENT} checks in a row, for want of {missed}."]

    def _carry_out(self) -> list[str]:
        """Bring the run to where the memories say it is; what could not be done."""
        self._effects = self._effects_of(self._states)
        self._set_factors()
        failed = []
        unknown = {name for effect in self._effects for name in effect.factors} - {"", *self._names()}
        if unknown:
            failed.append(
                f"controllers turn the learning rates of the parameter groups {sorted(unknown)}, which this "
                f"optimizer does not have: its groups are {list(self._names())}."
            )
        for controller, state in zip(self._controllers, self._states, strict=True):
            if not controller.dry_run:
                try:
                    controller.apply(state)
                except Exception as error:
                    if not self._contain:
                        raise
                    name = type(controller).__name__
                    failed.append(f"{name} could not act: {type(error).__name__}: {error}")
        return failed

    def _set_factors(self) -> None:
        factors = [effect.factors for effect in self._effects]
        self.rates.factors = [
            math.prod((factor.get("", 1.0) * factor.get(name, 1.0) for factor in factors), start=1.0)
            for name in self._names()
        ]

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Multiply the rates before each step and put them back after it."""
        first = optimizer.register_step_pre_hook(self._before_others)
        hooks = first.hooks_dict_ref()
        others = [*(hooks or {}).values()][:-1]
        if any(isinstance(getattr(hook, "__self__", None), ControlPanel) for hook in others):
            first.remove()
            raise InputError(
                "controllers of another monitor already turn this optimizer's learning rate",
                fix="Close that monitor first, or give all controllers to one.",
            )
        if hooks is not None:
            hooks.move_to_end(first.id, last=False)
        before = optimizer.register_step_pre_hook(self._before_step)
        after = optimizer.register_step_post_hook(self._after_step)
        # a step that is broken off runs no post-step hook, and a checkpoint must hold the script's own rates
        saving = optimizer.register_state_dict_pre_hook(lambda _: self.rates.restore())
        self._hooks = [first, before, after, saving]

    def _before_others(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer's first pre-step hook: whoever else looks at the step sees the rates in force."""
        del args, kwargs
        after = self._hooks[2]
        hooks = after.hooks_dict_ref()
        if hooks is not None:
            hooks.move_to_end(after.id)
        if len(self.rates.factors) != len(optimizer.param_groups):
            self._set_factors()  # a group that was added later
        self.rates.multiply()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """After other hooks, which may have written rates; the step's arguments, if they hold a closure."""
        del optimizer
        self.rates.multiply()
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self.rates.around(kwargs["closure"])}
        if len(args) > 1 and args[1] is not None:
            return (args[0], self.rates.around(args[1]), *args[2:]), kwargs
        return None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer's last post-step hook."""
        del optimizer, args, kwargs
        self.rates.restore()

    def numbers(self, groups: Sequence[GroupSettings], batch_size: int) -> dict[str, float]:
        """What was in force at this step; call it before anything is decided.

        Args:
            groups: The optimizer's settings, with the rates in force.
            batch_size: Examples behind this step, 0 when unknown.
        """
        factors = list(self.rates.factors) or [1.0] * len(groups)
        numbers = {"learning_rate": groups[0].lr, "lr_factor": factors[0]}
        if len(set(factors)) > 1:
            for group, factor in zip(groups, factors, strict=False):
                numbers |= {f"learning_rate/{group.name}": group.lr, f"lr_factor/{group.name}": factor}
        return numbers | ({"batch_size": float(batch_size)} if batch_size else {})

    def describe(self) -> list[str]:
        """The changes and the last refusal of each controller, for the closing table."""
        lines = [decision.sentence() for decision in self.decisions if decision.wanted]
        for controller in self._controllers:
            name = type(controller).__name__
            refusals = [d for d in self.decisions if d.controller == name and not d.wanted]
            if refusals:
                lines.append(f"{name}: the last refusal at {refusals[-1].sentence()}")
            elif not any(decision.controller == name for decision in self.decisions):
                lines.append(f"{name} has not come to its first check")
        return lines

    def close(self) -> None:
        """Take the hooks off and put the rates back."""
        for hook in self._hooks:
            hook.remove()
        self.rates.restore()

    def state_dict(self) -> dict[str, Any]:
        """Memories and decisions, as strings and numbers."""
        pairs = zip(self._controllers, self._states, strict=True)
        return {
            "controllers": {
                type(controller).__name__: {"memory": state, "dry_run": controller.dry_run}
                for controller, state in pairs
            },
            "decisions": [decision.plain() for decision in self.decisions],
            "changes": self.changes,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[str]:
        """Continue from :meth:`state_dict`.

        A controller that was a dry run and now acts, or the other way round, begins anew.

        Args:
            saved: What it returned.

        Returns:
            What the user must be told.
        """
        messages = []
        left = {name for name, memory in saved["controllers"].items() if not memory["dry_run"]}
        for index, controller in enumerate(self._controllers):
            name = type(controller).__name__
            memory = saved["controllers"].get(name)
            if memory is None:
                continue
            if memory["dry_run"] == controller.dry_run:
                try:
                    self._states[index] = _checked(controller, memory["memory"])
                    left.discard(name)
                except Exception as error:
                    messages.append(f"{name} cannot go on from the checkpoint, and begins anew: {error}")
            elif memory["dry_run"]:
                messages.append(f"{name} was a dry run in the checkpoint, and acts now: it begins anew.")
        if left and saved["changes"]:
            messages.append(
                f"the checkpoint holds changes made by controllers, and {', '.join(sorted(left))} does not "
                "act on this run: what it changed goes on as the script sets it."
            )
        self.decisions = [Decision.from_plain(fields) for fields in saved["decisions"]]
        self.changes = saved["changes"]
        return messages + self._carry_out()


def _without_effect(
    controller: Controller, decisions: Sequence[Decision], before: State, after: State
) -> list[str]:
    """What to tell where a change was decided, and the memory that carries it out is as before."""
    then, now = controller.effect(before), controller.effect(after)
    same = {
        "learning_rate": then.factors == now.factors,
        "batch_size": {**before, "next": 0} == {**after, "next": 0},
        "run": then.stop == now.stop,
    }
    name = type(controller).__name__
    return [
        f"{name} decided on another {knob}, and nothing turns it: the memory that it returned has the same "
        "effect as before."
        for knob in sorted({decision.knob for decision in decisions if decision.acted})
        if same.get(knob, True)
    ]


def _checked(controller: Controller, state: State) -> State:
    """A memory that can be kept and carried out; raises where it cannot."""
    effect = controller.effect(state)
    turns = controller.turns()
    number = effect.accumulation
    right = (
        isinstance(state.get("next"), int)
        and all(math.isfinite(factor) and factor > 0 for factor in effect.factors.values())
        and (number is None or (isinstance(number, int) and number >= 1))
        and ("learning_rate" in turns or all(factor == 1.0 for factor in effect.factors.values()))
        and ("batch_size" in turns or number is None)
        and ("run" in turns or not effect.stop)
    )
    if not right:
        raise InputError(
            f"the memory of {type(controller).__name__} cannot be carried out",
            got=f"{state}, with the effect {effect}, turning {sorted(turns)}",
            fix='It needs a whole number under "next"; factors that are positive and, unless they are 1, '
            '"learning_rate" among its knobs; micro-batches from 1 on, with "batch_size" among them; '
            'and a stop with "run".',
        )
    return state


def _bounded(decisions: list[Decision]) -> list[Decision]:
    """The latest changes and refusals of each controller."""
    latest: list[Decision] = []
    counts: Counter[tuple[str, bool]] = Counter()
    for decision in reversed(decisions):
        kind = decision.controller, decision.wanted
        counts[kind] += 1
        if counts[kind] <= _KEPT:
            latest.append(decision)
    return latest[::-1]
