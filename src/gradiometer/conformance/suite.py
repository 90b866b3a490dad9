"""Run an estimator through cases with known answers and report what passed, failed or was not offered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import InputError
from .judges import INTERVAL, Judge, Run

Adapter = Callable[[Sequence[Any]], Mapping[str, Any]]
"""Takes the steps of one run, returns the quantities it measures; see :func:`check`."""

Kind = Literal["noise", "relation"]
QUANTITIES: Mapping[Kind, tuple[str, ...]] = {
    "noise": ("trace", "grad_sq_norm", "scale"),
    "relation": ("left", "right", "ratio", "stationary"),
}


@dataclass(frozen=True)
class Case:
    """Runs with a known answer, and the rules that hold an adapter's answers against it.

    Args:
        name: A few words, for the table.
        about: One sentence: what is true here, and which mistake it brings to light.
        kind: What its steps are: :class:`NoiseStep` or :class:`RelationStep`.
        runs: Makes the runs anew, the same ones on every call.
        judges: The rules.
    """

    name: str
    about: str
    kind: Kind
    runs: Callable[[], Iterator[Sequence[Any]]]
    judges: tuple[Judge, ...]


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        case: Name of the case.
        quantity: What was looked at.
        truth: What it should be.
        measured: What the adapter said, or the error it raised.
        deviation: Distance between the two in ``unit``.
        limit: Largest deviation that passes.
        unit: Unit of deviation and limit.
        status: The outcome.
    """

    case: str
    quantity: str
    truth: str
    measured: str
    deviation: float
    limit: float
    unit: str
    status: Literal["passed", "FAILED", "not offered"]


@dataclass(frozen=True)
class Report:
    """The outcome of a suite.

    Args:
        checks: One entry per case and rule.
    """

    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        """What failed."""
        return tuple(check for check in self.checks if check.status == "FAILED")

    @property
    def passed(self) -> bool:
        """Whether something was checked and nothing failed."""
        return not self.failures and any(check.status == "passed" for check in self.checks)

    def table(self) -> str:
        """Every check as one line of text, and a closing count.

        Example:
            >>> line = Check("drift", "trace", "55", "54.9", 0.7, 5.0, "s.e.", "passed")
            >>> print(Report((line,)).table())
            case   quantity  truth  measured  deviation (limit)  status
            drift  trace     55     54.9      0.7 (5) s.e.       passed
            1 passed, 0 failed, 0 not offered
        """
        header = ("case", "quantity", "truth", "measured", "deviation (limit)", "status")
        rows = [header, *(_cells(check) for check in self.checks)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        counts = [
            sum(c.status == status for c in self.checks) for status in ("passed", "FAILED", "not offered")
        ]
        return "\n".join([*lines, "{} passed, {} failed, {} not offered".format(*counts)])


def check(adapter: Adapter, cases: Sequence[Case]) -> Report:
    """Hold an estimator against cases with known answers.

    The adapter is called once per run with all steps of it, in order, and returns any of these, averaged
    over the run with every step weighing the same:

    * for :class:`NoiseStep`: ``trace``, the trace of the covariance of the gradient of one example;
      ``grad_sq_norm``, the squared norm of its mean; ``scale``, the first over the second, ``nan`` where
      it is not resolved. An estimator that forgets, such as a moving average, adds ``weights``, how much
      each step weighs in its averages; the truth is then averaged with them;
    * for :class:`RelationStep`, over the counted steps: ``left`` and ``right``, the two sides of the
      relation in the form that belongs to the optimizer (see :mod:`.relation_cases`), their ``ratio``, and
      ``stationary``: ``True``, ``False``, or ``None`` where it cannot be told;
    * ``<name>_interval``, a pair: a 95 % interval for it.

    What it does not return is listed as not offered. An adapter that raises fails that case.

    Args:
        adapter: The estimator, made callable on the steps of one run.
        cases: What to check: ``noise_cases()``, ``relation_cases()``, or some of them.

    Returns:
        The report.

    Raises:
        InputError: If there is no case, or the adapter returns a name that means nothing here.

    Example:
        >>> from gradiometer.conformance import noise_cases
        >>> def two_parts(steps):                       # a mistake: the noise of the mean is left in
        ...     return {"grad_sq_norm": sum((s.gradients.mean(0) ** 2).sum() for s in steps) / len(steps)}
        >>> report = check(two_parts, noise_cases()[:1])
        >>> report.passed
        False
        >>> [check.status for check in report.checks if check.quantity == "grad_sq_norm"]
        ['FAILED']
    """
    if not cases:
        raise InputError("there is nothing to check", got="no case", fix="Pass cases=noise_cases().")
    return Report(tuple(line for case in cases for line in _check_case(adapter, case)))


def _check_case(adapter: Adapter, case: Case) -> Iterator[Check]:
    """Every rule of one case."""
    runs: list[Run] = []
    error = ""
    for steps in case.runs():
        try:
            answer = {name: _plain(name, value) for name, value in adapter(steps).items()}
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}".partition("\n")[0]
            break
        _check_names(answer, case.kind)
        runs.append(Run(steps, answer))
    for judge in case.judges:
        yield _refused(case, judge, error) if error else _judged(case, judge, runs)


def _plain(name: str, value: Any) -> Any:
    """A verdict, weights or an interval as they are, any other quantity as a number."""
    if name in ("stationary", "weights"):
        return value
    if name.endswith(INTERVAL):
        low, high = value
        return float(low), float(high)
    return float(value)


def _check_names(answer: Mapping[str, Any], kind: Kind) -> None:
    """A misspelt name must not pass for a quantity that is not offered."""
    names = QUANTITIES[kind]
    unknown = answer.keys() - {*names, *(name + INTERVAL for name in names), "weights"}
    if unknown:
        raise InputError(
            f"the adapter returned a name that means nothing in a {kind} case",
            got=repr(min(unknown)),
            fix=f"Use {', '.join(names)}, or one of them with {INTERVAL}.",
        )


def _judged(case: Case, judge: Judge, runs: Sequence[Run]) -> Check:
    if any(judge.key not in run.answer for run in runs):
        return Check(case.name, judge.label, "", "", math.nan, judge.limit, judge.unit, "not offered")
    with np.errstate(all="ignore"):  # an answer may be infinite or nan
        finding = judge.find(runs)
    good = finding.deviation <= judge.limit
    status: Literal["passed", "FAILED"] = "passed" if good else "FAILED"
    return Check(case.name, judge.label, *finding, judge.limit, judge.unit, status)


def _refused(case: Case, judge: Judge, error: str) -> Check:
    """The adapter raised: what is asked for where nothing can be measured, a failure elsewhere."""
    status: Literal["passed", "FAILED"] = "passed" if judge.accepts_refusal else "FAILED"
    return Check(case.name, judge.label, "", error, math.nan, judge.limit, judge.unit, status)


def _cells(check: Check) -> tuple[str, ...]:
    measured = not math.isnan(check.deviation)
    deviation = f"{check.deviation:.2g} ({check.limit:g}) {check.unit}" if measured else ""
    return check.case, check.quantity, check.truth, check.measured, deviation, check.status
