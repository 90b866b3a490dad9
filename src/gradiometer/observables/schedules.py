"""When to measure: ``step -> bool``, small frozen values that combine with ``|``.

Records fall where they are expected. Samples in between are drawn: at a fixed distance they would fall on the
same places of every epoch, evaluation or period of the learning rate whose length shares a factor with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from ..errors import InputError, check_kind, check_list, check_number, shown

__all__ = [
    "Schedule",
    "as_schedule",
    "at",
    "either",
    "every",
    "log_spaced",
]


class Schedule(ABC):
    """A rule that says at which optimizer steps something is due. It has no state."""

    @abstractmethod
    def __call__(self, step: int) -> bool:
        """Whether the step is due."""

    def __or__(self, other: Schedule) -> Schedule:
        """Due when either is due."""
        return either(self, other)


@dataclass(frozen=True)
class every(Schedule):  # noqa: N801 - reads as a verb where it is used: every(100)
    """Due at every ``steps``-th optimizer step, beginning with step 0.

    Args:
        steps: Distance between due steps, at least 1.

    Raises:
        InputError: If ``steps`` is not a positive whole number.

    Example:
        >>> [step for step in range(10) if every(4)(step)]
        [0, 4, 8]
    """

    steps: int

    def __post_init__(self) -> None:
        """Check the cadence."""
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise InputError(
                "a cadence must be a whole number of steps, at least 1",
                got=shown(self.steps),
                fix="Write every(50) for every 50th step.",
            )

    def __call__(self, step: int) -> bool:
        """Whether ``step`` is a multiple."""
        return step % self.steps == 0


@dataclass(frozen=True)
class log_spaced(Schedule):  # noqa: N801
    """Due at steps 0, 1, 2, 5, 10, 20, 50, ... up to ``until``.

    Args:
        until: Last step that can be due; ``None`` for no end.

    Raises:
        InputError: If ``until`` is not positive.

    Example:
        >>> [step for step in range(60) if log_spaced()(step)]
        [0, 1, 2, 5, 10, 20, 50]
    """

    until: int | None = None

    def __post_init__(self) -> None:
        """Check the end."""
        check_number("until", self.until, least=1, integer=True, optional=True, example="1000")

    def __call__(self, step: int) -> bool:
        """Whether ``step`` is 0 or one of 1, 2, 5 times a power of ten."""
        if self.until is not None and step > self.until:
            return False
        digits = str(step).rstrip("0")
        return digits in ("", "1", "2", "5")


@dataclass(frozen=True)
class at(Schedule):  # noqa: N801
    """Due at the listed steps.

    Args:
        steps: Optimizer steps, none negative.

    Raises:
        InputError: If the list is empty or holds a negative step.

    Example:
        >>> [step for step in range(10) if at([0, 7])(step)]
        [0, 7]
    """

    steps: Sequence[int]

    def __post_init__(self) -> None:
        """Check the steps."""
        check_list("steps", self.steps, "whole numbers", lambda step: type(step) is int, "0, 100, 1000")
        if not len(self.steps) or min(self.steps) < 0:
            raise InputError(
                "at(steps) needs at least one step and none below 0",
                got=list(self.steps),
                fix="Write at([0, 100, 1000]).",
            )

    def __call__(self, step: int) -> bool:
        """Whether ``step`` is listed."""
        return step in self.steps


@dataclass(frozen=True)
class either(Schedule):  # noqa: N801
    """Due when one of two schedules is; what ``|`` builds.

    Args:
        first: A schedule.
        second: Another one.

    Example:
        >>> [step for step in range(10) if (every(6) | at([1]))(step)]
        [0, 1, 6]
    """

    first: Schedule
    second: Schedule

    def __post_init__(self) -> None:
        """Check both."""
        for schedule in (self.first, self.second):
            check_kind("schedule", schedule, Schedule, "every(100) | at([10, 30])")

    def __call__(self, step: int) -> bool:
        """Whether one of the two is due."""
        return self.first(step) or self.second(step)


def as_schedule(schedule: Schedule | int) -> Schedule:
    """Read a whole number as a cadence.

    Args:
        schedule: A schedule, or a number of steps.

    Raises:
        InputError: If it is neither.

    Example:
        >>> as_schedule(50)
        every(steps=50)
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, int) and not isinstance(schedule, bool):
        return every(schedule)
    raise InputError(
        "a schedule must be a Schedule or a number of steps",
        got=shown(schedule),
        fix="Write schedule=every(50) or schedule=50.",
    )


@dataclass(frozen=True)
class Draws:
    """Some of every so many steps: one drawn from each of as many equal parts, all steps equally likely.

    A draw depends on the step number alone, so that it is the same on all processes and after a resume.

    Args:
        steps: Length of a period; the first one is steps 1 to ``steps``, and step 0 stands alone.
        count: Steps that are drawn from each period, at most ``steps``.

    Example:
        >>> [step for step in range(21) if Draws(10, 2).part(step) is not None]
        [0, 5, 6, 15, 17]
    """

    steps: int
    count: int = 1

    def part(self, step: int, stretch: int = 1) -> int | None:
        """The part of its period that a step is drawn for, ``None`` where it is not drawn.

        Args:
            step: The optimizer step.
            stretch: Factor on the length of periods.
        """
        if step == 0:
            return 0
        period, place = divmod(step - 1, self.steps * stretch)
        places, _ = _drawn(self.steps * stretch, self.count, period)
        return places.index(place) if place in places else None

    def chosen(self, step: int, stretch: int = 1) -> bool:
        """Whether a step is the one that is chosen of those drawn in its period, each as likely.

        Args:
            step: The optimizer step.
            stretch: Factor on the length of periods.
        """
        if step == 0:
            return True
        _, chosen = _drawn(self.steps * stretch, self.count, (step - 1) // (self.steps * stretch))
        return self.part(step, stretch) == chosen


@lru_cache(maxsize=256)
def _drawn(steps: int, count: int, period: int) -> tuple[tuple[int, ...], int]:
    """Places in a period, from 0, one of each part; and the part that is chosen."""

    def uniform(part: int, below: int) -> int:
        """A whole number at random."""
        seed = blake2b(f"{steps} {count} {period} {part}".encode(), digest_size=8)
        return int.from_bytes(seed.digest(), "big") * below >> 64

    fine = 1 << 32  # parts need not hold a whole number of steps
    places = tuple((part * fine + uniform(part, fine)) * steps // (count * fine) for part in range(count))
    return places, uniform(count, count)
