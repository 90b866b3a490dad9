"""How an answer is held against the truth: one small rule per question.

A rule sees every run of a case with the answer it got, and measures a deviation in units that its limit
is given in: standard errors over the runs, relative size, or the share of runs that went wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


Rule = Callable[[Sequence[Run]], Finding]
"""From all runs, each of which has answered, to what was found."""


@dataclass(frozen=True)
class Judge:
    """One question about one quantity; each function below asks one.

    Args:
        quantity: The key of the answer that is looked at.
        limit: Largest deviation that passes.
        unit: Unit of the deviation.
        find: The deviation over all runs.
        aspect: What of the quantity is looked at, for the table.
        interval: Whether the answer's 95 % interval is needed.
        accepts_refusal: Whether an error, or no answer, is right.
    """

    quantity: str
    limit: float
    unit: str
    find: Rule
    aspect: str = ""
    interval: bool = False
    accepts_refusal: bool = False

    @property
    def key(self) -> str:
        """The key of the answer that is needed."""
        return self.quantity + INTERVAL * self.interval

    @property
    def label(self) -> str:
        """What is looked at, for the table."""
        return f"{self.quantity} {self.aspect}".strip()


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


def unbiased(quantity: str, truth: Truth, limit: float = 5.0) -> Judge:
    """The mean over runs is the truth, in standard errors of that mean.

    Args:
        quantity: The key of the answer.
        truth: What is right, run by run.
        limit: Standard errors.
    """

    def find(runs: Sequence[Run]) -> Finding:
        truths = np.array([truth(run) for run in runs])
        values = np.array([run.answer[quantity] for run in runs])
        errors = values - truths
        deviation = _in_errors(errors.mean(), errors.std(ddof=1), runs)
        return Finding(_text(truths.mean()), _text(values.mean()), deviation)

    return Judge(quantity, limit, "s.e.", find)


def median(quantity: str, truth: Truth, limit: float = 5.0) -> Judge:
    """The median over runs is the truth: for ratios, whose mean may not exist.

    Args:
        quantity: The key of the answer.
        truth: What is right, run by run.
        limit: Standard errors, which follow from the quartiles as for a normal distribution.
    """

    def find(runs: Sequence[Run]) -> Finding:
        values = np.array([run.answer[quantity] for run in runs])
        expected = float(np.mean([truth(run) for run in runs]))
        if not np.isfinite(values).all():
            return Finding(_text(expected), "nan", math.inf)
        low, high = np.quantile(values, [0.25, 0.75])
        middle = float(np.median(values))
        deviation = _in_errors(middle - expected, 1.2533 * (high - low) / 1.349, runs)
        return Finding(_text(expected), _text(middle), deviation)

    return Judge(quantity, limit, "s.e.", find, "median")


def spread(quantity: str, least: Truth, limit: float = 1.5) -> Judge:
    """Single answers scatter no more than those of an estimator that uses all there is.

    Args:
        quantity: The key of the answer.
        least: The least standard deviation possible.
        limit: In units of the least.
    """

    def find(runs: Sequence[Run]) -> Finding:
        smallest = least(runs[0])
        scatter = float(np.std([run.answer[quantity] for run in runs], ddof=1))
        return Finding(_text(smallest), _text(scatter), scatter / smallest)

    return Judge(quantity, limit, "x s.d.", find, "spread")


def close(quantity: str, truth: Truth, limit: float = 1e-9) -> Judge:
    """Every run gives the truth to a relative tolerance.

    Args:
        quantity: The key of the answer.
        truth: What is right, run by run.
        limit: Relative, of the worst run.
    """

    def find(runs: Sequence[Run]) -> Finding:
        pairs = [(truth(run), float(run.answer[quantity])) for run in runs]
        deviations = [abs(value - expected) / abs(expected) for expected, value in pairs]
        worst = next((i for i, d in enumerate(deviations) if math.isnan(d)), int(np.argmax(deviations)))
        expected, value = pairs[worst]
        return Finding(_text(expected), _text(value), deviations[worst])

    return Judge(quantity, limit, "relative", find)


def covers(quantity: str, truth: Truth, limit: float = 0.15) -> Judge:
    """A 95 % interval holds the truth about that often.

    Args:
        quantity: The key of the answer.
        truth: What is right, run by run.
        limit: The share of runs that may be missing.
    """

    def find(runs: Sequence[Run]) -> Finding:
        pairs = [(truth(run), run.answer[quantity + INTERVAL]) for run in runs]
        share = float(np.mean([low <= expected <= high for expected, (low, high) in pairs]))
        return Finding("0.95", f"{share:.2f}", max(0.0, 0.95 - share))

    return Judge(quantity, limit, "missing", find, "coverage", interval=True)


def width(quantity: str, limit: float = 3.0) -> Judge:
    """A 95 % interval is not wider than the scatter of the answers calls for.

    Args:
        quantity: The key of the answer.
        limit: Median width over 3.92 standard deviations.
    """

    def find(runs: Sequence[Run]) -> Finding:
        needed = 3.92 * float(np.std([run.answer[quantity] for run in runs], ddof=1))
        ends = (run.answer[quantity + INTERVAL] for run in runs)
        usual = float(np.median([high - low for low, high in ends]))
        return Finding(_text(needed), _text(usual), usual / needed)

    return Judge(quantity, limit, "x needed", find, "width", interval=True)


def unresolved(quantity: str, truth: float, limit: float = 0.15) -> Judge:
    """Nothing can be known, or only a bound: a number needs an interval that holds the truth.

    Args:
        quantity: The key of the answer.
        truth: What is right.
        limit: Share of runs that may name a number and be wrong about it.
    """

    def is_wrong(run: Run) -> bool:
        value = float(run.answer[quantity])
        if not math.isfinite(value) or value <= 0:
            return False
        low, high = run.answer.get(quantity + INTERVAL, (value, value))
        return not low <= truth <= high

    def find(runs: Sequence[Run]) -> Finding:
        wrong = float(np.mean([is_wrong(run) for run in runs]))
        return Finding(_text(truth), f"{wrong:.2f}", wrong)

    return Judge(quantity, limit, "wrong", find, "not resolved")


def silent(quantity: str, limit: float = 0.0) -> Judge:
    """Nothing can be measured: ``nan``, no answer or an error, but no number.

    Args:
        quantity: The key of the answer.
        limit: Share of runs that may name a number.
    """

    def find(runs: Sequence[Run]) -> Finding:
        numbers = [float(run.answer[quantity]) for run in runs if quantity in run.answer]
        named = [number for number in numbers if math.isfinite(number)]
        return Finding("nan", _text(named[0]) if named else "nan", len(named) / len(runs))

    return Judge(quantity, limit, "wrong", find, accepts_refusal=True)


def verdict(quantity: str, allowed: tuple[bool | None, ...] = (), limit: float = 0.15) -> Judge:
    """``True`` for a stationary window, ``False`` for a transient one, ``None`` where it cannot be told.

    Args:
        quantity: The key of the answer.
        allowed: Answers that are right.
        limit: Share of runs that may be wrong.
    """

    def find(runs: Sequence[Run]) -> Finding:
        words = {True: "yes", False: "no", None: "open"}
        answers = [run.answer[quantity] for run in runs]
        wrong = [answer for answer in answers if answer not in allowed]
        said = Counter(words.get(answer, str(answer)) for answer in answers)
        shown = ", ".join(f"{count} {word}" for word, count in said.most_common())
        return Finding(" or ".join(words[answer] for answer in allowed), shown, len(wrong) / len(answers))

    return Judge(quantity, limit, "wrong", find)


def _in_errors(difference: float, sd: float, runs: Sequence[Run]) -> float:
    """A difference in standard errors of the mean over the runs."""
    error = float(sd) / math.sqrt(len(runs))
    if error > 0:
        return abs(float(difference)) / error
    return 0.0 if difference == 0 else math.inf  # also for nan


def _text(number: float) -> str:
    return f"{number:.5g}"
