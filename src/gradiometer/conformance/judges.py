"""How an answer is held against the truth: one small rule per question.

A rule sees every run of a case with the answer it got, and measures a deviation in units that its limit
is given in: standard errors over the runs, relative size, or the share of runs that went wrong.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .steps import Array

Interval = tuple[float, float]
INTERVAL = "_interval"


class Run(NamedTuple):
    """The steps that an adapter was shown, and its answer."""

    steps: Sequence[Any]
    answer: Mapping[str, Any]

    @property
    def weights(self) -> Array:
        """How much each step weighs in the averages behind the answer; equal unless the adapter says."""
        given = self.answer.get("weights")
        if given is None:
            return np.full(len(self.steps), 1 / len(self.steps))
        return np.asarray(given, dtype=np.float64) / np.sum(given)


Truth = Callable[[Run], float]


class Finding(NamedTuple):
    """What a rule found: truth and measurement in words a table can carry, and the deviation."""

    truth: str
    measured: str
    deviation: float


@dataclass(frozen=True)
class Judge(ABC):
    """One rule about one quantity.

    Args:
        quantity: The key of the answer that is looked at.
        limit: Largest deviation that passes.
    """

    quantity: str
    limit: float = field(kw_only=True)
    unit: ClassVar[str] = ""
    aspect: ClassVar[str] = ""
    accepts_refusal: ClassVar[bool] = False
    interval: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """The key of the answer that is needed."""
        return self.quantity + INTERVAL * self.interval

    @property
    def label(self) -> str:
        """What is looked at, for the table."""
        return f"{self.quantity} {self.aspect}".strip()

    @abstractmethod
    def find(self, runs: Sequence[Run]) -> Finding:
        """The deviation over all runs, each of which has answered."""


def constant(value: float) -> Truth:
    """A truth that is the same in every run.

    Args:
        value: The number.
    """
    return lambda run: value


def from_steps(deviation: float) -> Truth:
    """The standard deviation of a mean over independent steps.

    Args:
        deviation: That of one step.
    """
    return lambda run: deviation * float(np.sqrt((run.weights**2).sum()))


@dataclass(frozen=True, kw_only=True)
class Unbiased(Judge):
    """The mean over runs is the truth, in standard errors of that mean."""

    truth: Truth
    limit: float = 5.0
    unit: ClassVar[str] = "s.e."

    def find(self, runs: Sequence[Run]) -> Finding:
        """Deviation of the mean."""
        truths = np.array([self.truth(run) for run in runs])
        values = np.array([run.answer[self.quantity] for run in runs])
        errors = values - truths
        return Finding(
            _text(truths.mean()), _text(values.mean()), _in_errors(errors.mean(), errors.std(ddof=1), runs)
        )


@dataclass(frozen=True, kw_only=True)
class Median(Judge):
    """The median over runs is the truth: for ratios, whose mean may not exist."""

    truth: Truth
    limit: float = 5.0
    unit: ClassVar[str] = "s.e."
    aspect: ClassVar[str] = "median"

    def find(self, runs: Sequence[Run]) -> Finding:
        """Deviation of the median, its error from the quartiles as for a normal distribution."""
        values = np.array([run.answer[self.quantity] for run in runs])
        truth = float(np.mean([self.truth(run) for run in runs]))
        if not np.isfinite(values).all():
            return Finding(_text(truth), "nan", math.inf)
        low, high = np.quantile(values, [0.25, 0.75])
        middle = float(np.median(values))
        return Finding(
            _text(truth), _text(middle), _in_errors(middle - truth, 1.2533 * (high - low) / 1.349, runs)
        )


@dataclass(frozen=True, kw_only=True)
class Spread(Judge):
    """Single answers scatter no more than those of an estimator that uses all there is."""

    least: Truth
    limit: float = 1.5
    unit: ClassVar[str] = "x s.d."
    aspect: ClassVar[str] = "spread"

    def find(self, runs: Sequence[Run]) -> Finding:
        """Scatter over runs in units of the least possible."""
        least = self.least(runs[0])
        found = float(np.std([run.answer[self.quantity] for run in runs], ddof=1))
        return Finding(_text(least), _text(found), found / least)


@dataclass(frozen=True, kw_only=True)
class Close(Judge):
    """Every run gives the truth to a relative tolerance."""

    truth: Truth
    limit: float = 1e-9
    unit: ClassVar[str] = "relative"

    def find(self, runs: Sequence[Run]) -> Finding:
        """The worst run."""
        pairs = [(self.truth(run), float(run.answer[self.quantity])) for run in runs]
        deviations = [abs(value - truth) / abs(truth) for truth, value in pairs]
        worst = next((i for i, d in enumerate(deviations) if math.isnan(d)), int(np.argmax(deviations)))
        truth, value = pairs[worst]
        return Finding(_text(truth), _text(value), deviations[worst])


@dataclass(frozen=True, kw_only=True)
class Covers(Judge):
    """A 95 % interval holds the truth about that often; the limit is what may be missing."""

    truth: Truth
    limit: float = 0.15
    unit: ClassVar[str] = "missing"
    aspect: ClassVar[str] = "coverage"
    interval: ClassVar[bool] = True

    def find(self, runs: Sequence[Run]) -> Finding:
        """How far the share of runs stays below 95 %."""
        inside = [low <= self.truth(run) <= high for run in runs for low, high in [run.answer[self.key]]]
        share = float(np.mean(inside))
        return Finding("0.95", f"{share:.2f}", max(0.0, 0.95 - share))


@dataclass(frozen=True, kw_only=True)
class Width(Judge):
    """A 95 % interval is not wider than the scatter of the answers calls for."""

    limit: float = 3.0
    unit: ClassVar[str] = "x needed"
    aspect: ClassVar[str] = "width"
    interval: ClassVar[bool] = True

    def find(self, runs: Sequence[Run]) -> Finding:
        """The median width over that of 3.92 standard deviations."""
        needed = 3.92 * float(np.std([run.answer[self.quantity] for run in runs], ddof=1))
        width = float(np.median([high - low for low, high in (run.answer[self.key] for run in runs)]))
        return Finding(_text(needed), _text(width), width / needed)


@dataclass(frozen=True, kw_only=True)
class Unresolved(Judge):
    """Nothing can be known, or only a bound: a number needs an interval that holds the truth."""

    truth: float
    limit: float = 0.15
    unit: ClassVar[str] = "wrong"
    aspect: ClassVar[str] = "not resolved"

    def find(self, runs: Sequence[Run]) -> Finding:
        """Share of runs that name a number and are wrong about it."""
        wrong = np.mean([self._is_wrong(run) for run in runs])
        return Finding(_text(self.truth), f"{wrong:.2f}", float(wrong))

    def _is_wrong(self, run: Run) -> bool:
        value = float(run.answer[self.quantity])
        if not math.isfinite(value) or value <= 0:
            return False
        low, high = run.answer.get(self.quantity + INTERVAL, (value, value))
        return not low <= self.truth <= high


@dataclass(frozen=True, kw_only=True)
class Silent(Judge):
    """Nothing can be measured: ``nan``, no answer or an error, but no number."""

    limit: float = 0.0
    unit: ClassVar[str] = "wrong"
    accepts_refusal: ClassVar[bool] = True

    def find(self, runs: Sequence[Run]) -> Finding:
        """Share of runs that name a number."""
        numbers = [float(run.answer[self.quantity]) for run in runs if self.quantity in run.answer]
        named = [number for number in numbers if math.isfinite(number)]
        return Finding("nan", _text(named[0]) if named else "nan", len(named) / len(runs))


@dataclass(frozen=True, kw_only=True)
class Verdict(Judge):
    """``True`` for a stationary window, ``False`` for a transient one, ``None`` where it cannot be told.

    Args:
        allowed: Answers that are right.
    """

    allowed: tuple[bool | None, ...] = ()
    limit: float = 0.15
    unit: ClassVar[str] = "wrong"

    def find(self, runs: Sequence[Run]) -> Finding:
        """Share of runs with a wrong verdict."""
        words = {True: "yes", False: "no", None: "open"}
        answers = [run.answer[self.quantity] for run in runs]
        wrong = [answer for answer in answers if answer not in self.allowed]
        said = Counter(words.get(answer, str(answer)) for answer in answers)
        shown = ", ".join(f"{count} {word}" for word, count in said.most_common())
        return Finding(" or ".join(words[each] for each in self.allowed), shown, len(wrong) / len(answers))


def _in_errors(difference: float, sd: float, runs: Sequence[Run]) -> float:
    """A difference in standard errors of the mean over the runs."""
    error = float(sd) / math.sqrt(len(runs))
    if error > 0:
        return abs(float(difference)) / error
    return 0.0 if difference == 0 else math.inf  # also for nan


def _text(number: float) -> str:
    return f"{number:.5g}"
