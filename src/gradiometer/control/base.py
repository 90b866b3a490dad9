"""What a controller is: a frozen value that turns readings and its own state into decisions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..collect.sections import Section
from ..errors import InputError, check_list
from ..observables import Observable
from ..optimizers import GroupSettings
from ..record.readings import Decision, Reading

__all__ = [
    "Controller",
    "Effect",
    "View",
    "check_controllers",
    "with_needed",
]

State = dict[str, Any]
"""A controller's memory: strings, numbers, lists and dictionaries, as a checkpoint takes them."""

_FAR = 20_000
"""Steps after a controller's first check within which there has to be a record."""
KNOBS = frozenset({"learning_rate", "batch_size", "run"})
"""What the engine carries out."""

STEPS_WITHOUT_EPOCH = 1000
"""Steps between checks where the length of an epoch is not known."""


@dataclass(frozen=True)
class View:
    """What a controller may look at.

    Args:
        step: The optimizer step that was just made.
        readings: What was recorded at this step, by key without the prefix.
        groups: The optimizer's settings by parameter group, with the rates in force.
        schedule: The rates of the groups without any controller's factor.
        sections: Which parameters are read together.
        batch_size: Examples behind a step of all processes, 0 when unknown.
        micro_batches: Micro-batches behind a step of one process; 0 where this step was not as usual.
        processes: Number of training processes.
        dataset_size: Examples in the training set, where it is known.
    """

    step: int
    readings: Mapping[str, Reading]
    groups: Sequence[GroupSettings]
    schedule: Sequence[float]
    sections: Sequence[Section] = ()
    batch_size: int = 0
    micro_batches: int = 1
    processes: int = 1
    dataset_size: int | None = None
    missed: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Keys whose number was asked for and is not there, each with the reason."""
    given: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Keys whose number was asked for and is there."""

    def number(self, key: str) -> float:
        """A reading's value; ``nan`` where there is none, or none that its error resolves.

        Args:
            key: ``<group>/<name>``.
        """
        reading = self.readings.get(key)
        if reading is None or not (reading.resolved and reading.is_finite):
            self.missed[key] = "not recorded" if reading is None else reading.why
            return math.nan
        self.given.add(key)
        return reading.number

    def seen(self, *keys: str) -> dict[str, tuple[float, float]]:
        """Value and standard error of these readings, for the record.

        Args:
            keys: As for :meth:`number`; those that were not recorded are left out.
        """
        readings = [(key, self.readings[key]) for key in keys if key in self.readings]
        return {
            key: (reading.value, reading.stderr)
            for key, reading in readings
            if isinstance(reading.value, float)
        }

    def steps_per_epoch(self, at_least: int = 1) -> int:
        """Optimizer steps in an epoch, 1,000 where that is not known.

        Args:
            at_least: Lower bound.
        """
        if self.dataset_size is None or not self.batch_size:
            return max(STEPS_WITHOUT_EPOCH, at_least)
        return max(math.ceil(self.dataset_size / self.batch_size), at_least)


class Effect(NamedTuple):
    """What a controller's state means for the run.

    Args:
        factors: Factor on the learning rate by name of parameter group; ``""`` for all of them.
        accumulation: Micro-batches to accumulate in a step; ``None`` to leave that to the script.
        stop: Whether the run is to end: a plain loop reads ``monitor.should_stop``, the Lightning callback
            sets ``trainer.should_stop``.
    """

    factors: Mapping[str, float]
    accumulation: int | None = None
    stop: bool = False


class Controller(ABC):
    """Readings in, a changed learning rate or batch size out; every check is a record.

    A controller holds settings only. Its memory is a dictionary that the engine keeps, saves and hands back:
    with the same readings and the same memory it decides the same, on any process and after any resumption.

    Args:
        dry_run: Say what would be done, and change nothing.
    """

    knobs: ClassVar[Collection[str]] = ()
    """What it turns: ``"learning_rate"``, ``"batch_size"``, ``"run"`` (whether it goes on)."""
    dry_run: bool = False

    @abstractmethod
    def observables(self) -> tuple[Observable, ...]:
        """What it has to have measured; the engine adds those that are not there.

        It is asked at steps where one of them is recorded, from the step under ``"next"`` in its memory on;
        where it needs none, at each step from there on.
        """

    def accepts(self, observable: Observable) -> bool:
        """Whether an observable that the user chose will do in the place of its own.

        Args:
            observable: One of the same group as one of :meth:`observables`.
        """
        del observable
        return True

    def turns(self) -> frozenset[str]:
        """The knobs it turns with these settings."""
        return frozenset(self.knobs)

    def check_run(self, dataset_size: int | None) -> None:
        """Refuse a run that it cannot act on.

        Args:
            dataset_size: Examples in the training set, where it is known.

        Raises:
            InputError: With what to write instead.
        """
        del dataset_size

    def check_loader(self, loader: Any) -> None:
        """Refuse a training loader that it cannot act on.

        Args:
            loader: The loader, where a framework has one.

        Raises:
            InputError: With what to write instead.
        """
        del loader

    @property
    def accumulates(self) -> bool:
        """Whether it changes the number of micro-batches in a step."""
        return False

    @abstractmethod
    def start(self) -> State:
        """The memory at the beginning of a run; ``"next"`` is the step of the first check."""

    @abstractmethod
    def decide(self, view: View, state: State) -> tuple[list[Decision], State, str]:
        """One check.

        Args:
            view: This step.
            state: The memory; not to be changed.

        Returns:
            Its decisions, refusals included; the memory from now on; and what the user must be told once.
        """

    @abstractmethod
    def effect(self, state: State) -> Effect:
        """What a memory means for the run.

        Args:
            state: The memory.
        """

    def apply(self, state: State) -> None:
        """Carry the memory's effect to what the engine does not reach, such as a sampler.

        Args:
            state: The memory, after a change or after resumption.
        """
        del state


def check_controllers(controllers: Any) -> None:
    """Refuse controllers that cannot work together.

    Args:
        controllers: As for :class:`~gradiometer.engine.monitor.Monitor`.

    Raises:
        InputError: If one is no controller, two are of one class, or two that act turn one knob.
    """
    check_list(
        "controllers",
        controllers,
        "Controller values",
        lambda v: isinstance(v, Controller),
        "EquilibriumLR()",
    )
    acting = [controller for controller in controllers if not controller.dry_run]
    knobs = [knob for controller in acting for knob in sorted(controller.turns())]
    for knob in knobs:
        if knobs.count(knob) > 1:
            names = [type(rival).__name__ for rival in acting if knob in rival.turns()]
            raise InputError(
                f"two controllers would turn one knob, the {knob.replace('_', ' ')}",
                got=" and ".join(names),
                fix='Leave one of them out, or write NoiseScaleBatchSize(learning_rate="keep").',
            )
    for controller in controllers:
        _check_knobs(controller)
    kinds = [type(controller).__name__ for controller in controllers]
    if len(set(kinds)) < len(kinds):
        raise InputError(
            "two controllers of one class share a name in logs and checkpoints",
            got=" and ".join(kinds),
            fix="Leave one of them out.",
        )


def _check_knobs(controller: Controller) -> None:
    """Refuse a controller that turns nothing, or what nothing carries out."""
    turns = controller.turns()
    if not turns <= KNOBS or not (turns or controller.dry_run):
        raise InputError(
            f"{type(controller).__name__} must turn what there is to turn",
            got=f"knobs {sorted(turns)}",
            fix=f"Name in its knobs some of {sorted(KNOBS)}, or write dry_run=True.",
        )


def with_needed(
    chosen: Sequence[Observable] | None, default: Sequence[Observable], controllers: Sequence[Controller]
) -> list[Observable]:
    """The observables a run measures: those chosen, and those its controllers need.

    Args:
        chosen: What the user asked for; ``None`` for the default set.
        default: The default set, where a controller's own take the place of those that will not do.
        controllers: The controllers.

    Raises:
        InputError: If one that the user chose will not do.
    """
    observables = list(default if chosen is None else chosen)
    for controller in controllers:
        for need in controller.observables():
            groups = [observable.group for observable in observables]
            if need.group not in groups:
                observables.append(need)
                continue
            at = groups.index(need.group)
            if controller.accepts(observables[at]):
                continue
            if chosen is not None:
                raise InputError(
                    f"{type(controller).__name__} cannot decide by this {type(need).__name__}",
                    got=repr(observables[at]),
                    fix=f"Leave it out of observables=, or write {_written(need)}.",
                )
            observables[at] = need
        _check_cadence(controller, observables)
    return observables


def _check_cadence(controller: Controller, observables: Sequence[Observable]) -> None:
    """Refuse a controller whose readings are never recorded once it may act."""
    groups = {need.group for need in controller.observables()}
    feeds = [observable for observable in observables if observable.group in groups]
    first = controller.start().get("next", 0)
    if feeds and not any(feed.due(step) for step in range(first, first + _FAR) for feed in feeds):
        raise InputError(
            f"{type(controller).__name__} is never asked: its first check is at step {first}, and after that "
            f"none of {sorted(groups)} is recorded",
            fix=f"Write {type(feeds[0]).__name__}(schedule=100).",
        )


def _written(observable: Observable) -> str:
    """The call that makes an observable, without what is left at its default."""
    plain = type(observable)()
    chosen = {
        name: value
        for name, value in vars(observable).items()
        if name not in ("schedule", "sampling", "estimator") and value != getattr(plain, name)
    }
    settings = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    return f"{type(observable).__name__}({settings})"
