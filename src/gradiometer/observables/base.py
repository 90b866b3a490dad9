"""What an observable is: a frozen value with two or three short methods and no state."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor

from ..collect.snapshot import RENAMED, Snapshot, present_name
from ..errors import check_kind
from ..record.readings import Quantity, quantity_of
from ..stats.estimators import Estimator, Last, Reference
from .relations import CrossCheck
from .schedules import Draws, Schedule, as_schedule, every

__all__ = [
    "Estimate",
    "Numbers",
    "Observable",
    "Sample",
]

Numbers = Mapping[str, Any]


class Estimate(NamedTuple):
    """A number with an error or an answer of its own, where the engine's jackknife does not do.

    Args:
        value: The number.
        stderr: Its standard error; 0 when exact on the probe, ``nan`` when unknown; the engine's own
            when ``None``.
        low: Lower end of the 95 % interval; the engine's own when ``None``.
        high: Upper end of it.
        resolved: Whether the error allows an answer.
        note: What this number alone has to say.
    """

    value: Any
    stderr: Any = None
    low: float | None = None
    high: float | None = None
    resolved: bool = True
    note: str = ""


class Sample(NamedTuple):
    """Statistics of one step, and how much this step counts.

    Args:
        statistics: Tensors that are averaged over sampling steps and processes.
        weight: 1 for a step that counts and 0 for one that must not, such as a step whose gradient is not
            finite. A tensor on the device of the statistics where only the device knows.

    Example:
        >>> import torch
        >>> loss = torch.tensor(torch.inf)
        >>> Sample({"loss": loss}, weight=loss.isfinite()).weight
        tensor(False)
    """

    statistics: Mapping[str, Tensor]
    weight: float | Tensor = 1.0


def as_sample(answer: Mapping[str, Tensor] | Sample) -> Sample:
    """What ``statistics`` returned, with its weight.

    Args:
        answer: Plain statistics count once.
    """
    statistics, weight = answer if isinstance(answer, Sample) else (answer, 1.0)
    return Sample({name: value.detach() for name, value in statistics.items()}, weight)


@dataclass(frozen=True, kw_only=True)
class Observable(ABC):
    """One quantity of the training run: which data it needs, what it averages, what it reads.

    A subclass sets the class attributes and writes ``readings`` and at least one of ``statistics``
    (averaged over sampling steps, and over processes) and ``levels`` (state functions, taken at
    recording steps and compared with earlier ones).

    Neither of these two is a failure, also under ``Monitor(on_error="raise")``:

    * *This step does not count*: ``statistics`` returns ``Sample(statistics, weight=0)``, and the averages,
      the number of samples and the errors stay as if the step had not been.
    * *Not yet*: ``statistics`` returns ``None`` where it has nothing to go by, such as a step before this
      one; nothing is added. ``readings`` is not asked before the first sample, and may itself return
      ``{}`` while there is nothing to read.

    Args:
        schedule: When a reading is recorded; a number of steps is read as a cadence.
        sampling: How often statistics are sampled: one step in so many, drawn anew each time, since steps at
            a fixed distance may keep to one place in the epoch. At the records when ``None``; an observable
            of the step's batch then draws one step for each record. A schedule other than ``every(...)`` is
            kept to, beside the records.
        estimator: How statistics are averaged over steps; ``default_estimator()`` when ``None``. A
            template: the engine copies it.

    Example:
        >>> from gradiometer import Monitor, MemoryRecorder
        >>> @dataclass(frozen=True, kw_only=True)
        ... class LearningRate(Observable):
        ...     group = "settings"
        ...     quantities = {"lr": Quantity("1", "Learning rate of the first group.")}
        ...     def statistics(self, snapshot):
        ...         return {"lr": torch.tensor(snapshot.groups[0].lr)}
        ...     def readings(self, now, reference):
        ...         return {"lr": now["lr"]}
        >>> LearningRate(schedule=10).due(20)
        True
    """

    group: ClassVar[str] = ""
    quantities: ClassVar[Mapping[str, Quantity]] = {}
    """The words for every reading name: unit, sentence, verdict, chart and the row in the documentation."""
    checks: ClassVar[Mapping[str, CrossCheck]] = {}
    """By reading name, what other measurements say of it."""
    needs: ClassVar[frozenset[str]] = frozenset()
    level_needs: ClassVar[frozenset[str]] = frozenset()
    arrays: ClassVar[frozenset[str]] = frozenset()
    """Names of readings that are arrays rather than numbers."""
    restarts: ClassVar[frozenset[str]] = frozenset()
    """What begins its window anew: ``"settings"`` (a jump of the learning rate, the momentum, the decay
    or the batch size), ``"parameters"`` (others are trained from now on)."""
    not_averaged: ClassVar[frozenset[str]] = frozenset({"schedule", "sampling", "estimator"})
    """Settings that may change from a checkpoint to the run that goes on from it: averages do not rest on
    them. The estimator's own settings are looked at apart."""
    of_batch: ClassVar[bool] = False
    """Whether statistics are those of the step's batch or update, which depend on its place in the epoch."""
    draws: ClassVar[Draws | None] = None
    """What draws the steps to sample, for each observable by its cadences; ``None`` where they are fixed."""
    default_estimator: ClassVar[type[Estimator]] = Last
    """Not the default of the field itself, so that a configuration file can hold every default."""

    schedule: Schedule | int = 100
    sampling: Schedule | int | None = None
    estimator: Estimator | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("needs", "level_needs"):
            if not RENAMED.keys().isdisjoint(getattr(cls, name)):
                present = partial(present_name, stacklevel=4)  # below are this class, and how Python makes it
                setattr(cls, name, frozenset(map(present, getattr(cls, name))))

    def __post_init__(self) -> None:
        """Read numbers as cadences, and choose the estimator.

        Raises:
            InputError: If one of them is of another kind.
        """
        if self.estimator is None:
            object.__setattr__(self, "estimator", self.default_estimator())
        check_kind("estimator", self.estimator, Estimator, f"{self.default_estimator.__name__}()")
        object.__setattr__(self, "schedule", as_schedule(self.schedule))
        if self.sampling is not None:
            object.__setattr__(self, "sampling", as_schedule(self.sampling))
        object.__setattr__(self, "draws", self._draws())

    def _draws(self) -> Draws | None:
        """What draws the steps to sample: every record has one; ``None`` where they are fixed."""
        sampling = self.schedule if self.sampling is None and self.of_batch else self.sampling
        if not isinstance(sampling, every):
            return None
        if not isinstance(self.schedule, every):
            return Draws(sampling.steps)
        return Draws(self.schedule.steps, -(-self.schedule.steps // sampling.steps))

    @classmethod
    def key(cls, name: str) -> str:
        """``<group>/<name>``, the key without the prefix.

        Args:
            name: A reading name, with ``/<section>`` where it belongs to one.

        Raises:
            InputError: If there are no words for it.

        Example:
            >>> from gradiometer import FluctuationDissipation
            >>> FluctuationDissipation.key("ratio")
            'fdr/ratio'
        """
        quantity_of(name, cls.quantities, cls.__name__)
        return f"{cls.group}/{name}"

    def rests_on(self) -> str:
        """The settings behind its averages and levels, in words that are the same in every process.

        Example:
            >>> from gradiometer import JacobianNorm
            >>> JacobianNorm(seed=3).rests_on()
            'JacobianNorm(num_projections=None, seed=3), Last()'
        """
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.not_averaged}
        average = {name: value for name, value in vars(self.estimator).items() if not name.startswith("_")}
        words = [
            f"{type(owner).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"
            for owner, settings in ((self, chosen), (self.estimator, average))
        ]
        return re.sub(r" at 0x[0-9a-f]+", "", ", ".join(words))

    def check_words(self, names: Iterable[str]) -> None:
        """Refuse a reading without words.

        Args:
            names: Names of what was read.

        Raises:
            InputError: With the line to write.
        """
        for name in names:
            quantity_of(name, self.quantities, type(self).__name__)

    def due(self, step: int) -> bool:
        """Whether a reading is recorded at this step."""
        return cast("Schedule", self.schedule)(step)

    def samples(self, step: int, stretch: int = 1) -> bool:
        """Whether statistics are sampled at this step.

        A record for which none was drawn, as where a run is joined half-way, takes one at its own step too.

        Args:
            step: The optimizer step.
            stretch: Only one in so many of the drawn steps is taken.
        """
        if self.draws is not None:
            return self.draws.part(step, stretch) is not None
        return self.due(step) or (self.sampling is not None and cast("Schedule", self.sampling)(step))

    def required(self, thorough: bool) -> frozenset[str]:
        """Snapshot fields that statistics need; ``level_needs`` are needed at recording steps besides.

        Args:
            thorough: Whether this is the sample of each record that may cost more: the first, or one that is
                drawn from several.
        """
        del thorough
        return self.needs

    @property
    def optional(self) -> frozenset[str]:
        """Required fields that it can do without: where one cannot be had, what rests on it is ``nan``."""
        return frozenset()

    @property
    def names(self) -> frozenset[str]:
        """Names of the quantities it reads with its present settings; ``nan`` where it fails."""
        return frozenset(self.quantities)

    def statistics(self, snapshot: Snapshot) -> Mapping[str, Tensor] | Sample | None:
        """Tensors that are averaged over sampling steps and processes; ``None`` for "not yet"."""
        del snapshot
        return {}

    def levels(self, snapshot: Snapshot) -> Mapping[str, Tensor]:
        """State functions at a recording step, kept for comparison and never averaged."""
        del snapshot
        return {}

    def note(self, snapshot: Snapshot) -> str:
        """How the reading came about (source, coverage, form), for its sentence; from a thorough sample."""
        del snapshot
        return ""

    @abstractmethod
    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Numbers, arrays or :class:`Estimate` by reading name.

        Averages come with a leading axis of replicates, for the errors: row 0 is the average over the
        window, each further row leaves a block of steps out. Formulas that work element by element need
        not know of it; index other axes as ``now[name][..., i]``. Levels have no such axis.

        The reading of one parameter group is named ``name/<index>``; the engine puts the group's own
        name in the place of the index.

        Args:
            now: Averages over the estimator's window, and the levels of this step.
            reference: Levels at the first, the previous and the window's recordings.
        """
