"""Has the run settled? Decisions from the drift of a level over a window.

Measured on the fly, the first fluctuation-dissipation relation telescopes: left over right side differs
from 1 by the drift of a state function E (the squared norm of the weights, plus a term for momentum)
between the two ends of the window, and by nothing else. So everything here is made from the path of
E, and the errors are those of its two end points. Errors from blocks are several times too wide for a
telescoping series: its increments are anti-correlated.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri

from ..errors import InputError
from .jackknife import correlated_jackknife, t_quantile

Floats = NDArray[np.float64]

FEWEST_KNOTS = 10
"""With fewer records in the window nothing is decided."""

_LENGTHS = np.geomspace(0.02, 3000.0, 150)  # of the window, in correlation times
_DOUBT = 8.0  # correlation times in the window at which their number is known to about half of it
_HALVES = 3.0  # tolerance of the two halves, in that of the whole window
_EARLIER = 0.8  # share of the window at which the check before this one ends


class Answer(NamedTuple):
    """1.0 for stationary, 0.0 for not, ``nan`` with a reason for undecided."""

    value: float
    reason: str = ""


def end_point_deviation(steps: Floats, path: Floats) -> Floats:
    r"""Standard deviation of the difference between the ends of a path, as if it were stationary.

    A stationary series with exponential correlation, seen through a window of :math:`x` correlation
    times, has

    .. math:: \mathrm{Var}(E_T - E_0) = 2 \sigma^2 (1 - e^{-x})

    The straight-line trend is taken out, so that a drift does not count as fluctuation. In a short
    window that removes most of the variance, too, and both :math:`x` and :math:`\sigma^2` come from
    comparing the increments of the residuals with the residuals: expectations of both are known for
    every x. Since x is poorly known when it is small, a window that looks like x correlation times is
    taken as :math:`x^2 / (x + 8)`. In simulations twice the result covers the true difference in 91 to
    97 % of the windows of four correlation times or more, in 82 to 90 % of those of one or two, and in
    about 80 % of those of a third of one; the plain scatter about the trend in 80 to 95 % and in 65 %.

    Args:
        steps: Positions of the knots, about equally spaced.
        path: The series at the knots, one per column where there are several.

    Returns:
        The standard deviation; ``nan`` for fewer than ten knots.

    Shapes:
        steps ``[K]``, path ``[K, ...]`` -> ``[...]``.

    Units:
        Those of ``path``.

    Example:
        >>> path = np.random.default_rng(0).normal(size=(100, 1000))   # no correlation: sqrt(2)
        >>> round(float(end_point_deviation(np.arange(100.0), path).mean()), 1)
        1.4
    """
    knots = len(steps)
    if knots < FEWEST_KNOTS:
        return np.full(path.shape[1:], np.nan)
    x = (steps - steps.mean()) / np.linalg.norm(steps - steps.mean())
    centred = path - path.mean(0)
    residuals = centred - np.multiply.outer(x, np.tensordot(x, centred, 1))
    scatter = np.square(residuals).sum(0)
    increments = np.square(np.diff(residuals, axis=0)).sum(0)
    ratios, expected_increments = _expected(knots)
    seen = np.interp(increments / np.where(scatter > 0, scatter, 1.0), ratios, _LENGTHS)
    length = np.maximum(seen**2 / (seen + _DOUBT), _LENGTHS[0])
    sigma_sq = increments / np.interp(length, _LENGTHS, expected_increments)
    return np.asarray(np.sqrt(2 * sigma_sq * -np.expm1(-length)))


@lru_cache(maxsize=256)
def _expected(knots: int) -> tuple[Floats, Floats]:
    """For a series of variance 1 about its trend, by length of the window in correlation times.

    Sum of squared increments over sum of squares, which rises with the length; and the former alone.
    """
    x = np.arange(knots) - (knots - 1) / 2
    detrend = np.eye(knots) - 1 / knots - np.outer(x, x) / (x @ x)
    steps = np.diff(detrend, axis=0)
    correlation = np.exp(np.multiply.outer(np.arange(knots) / -(knots - 1), _LENGTHS))
    squares, increments = (
        np.array([np.trace(form, lag) * (2 if lag else 1) for lag in range(knots)]) @ correlation
        for form in (detrend, steps.T @ steps)
    )
    return increments / squares, increments


def stationary(
    steps: Floats,
    level: Floats,
    right: Floats,
    weights: Floats,
    tolerance: float,
    *,
    deviation: float | None = None,
    constant_lr: bool = True,
) -> Answer:
    r"""Whether both sides of the fluctuation-dissipation relation agree within a tolerance.

    With :math:`r = -(E_T - E_0) / (T R)`, left over right side less 1, a run is stationary when

    * :math:`|r| < X` over the window and :math:`|r| < 3X` over each of its halves, so that a level which
      passes through a maximum is not taken for one that rests;
    * :math:`s < X`, where :math:`s` is the standard deviation that :math:`r` has at a stationary state;
    * the same holds for the window that ends a fifth earlier, in place of the check before this one: far
      enough back for a level to have moved that only passes by.

    It is not stationary when :math:`|r| - 2 s > X`, however short the window, or when :math:`s < X` and one
    of the others fails. Otherwise the window is too short to tell.

    On a quadratic with gradient noise, P modes and softest curvature h, the standard deviation is
    :math:`2 / (\eta h t \sqrt P)` for the second half of t steps. When that has come down to X / 2,
    stationary runs are declared at the first check in 50 to 99 % of the cases, and at one of the checks
    until a time half as long again in 95 % or more. Runs with a true excess over 3X are declared at a
    single check in 2 % at most, and at any of 20 checks in 1 to 5 % (7 % when they start near
    equilibrium and are checked from half a correlation time on).

    Args:
        steps: Positions of the knots along the window, in optimizer steps.
        level: The state function E at the knots, whose drift is right less left side.
        right: Mean right side between neighbouring knots.
        weights: Number of samples behind each of these means.
        tolerance: X.
        deviation: What :func:`end_point_deviation` gives for the level; found here when ``None``.
        constant_lr: Whether the learning rate is constant in the window.

    Returns:
        The decision, ``nan`` with a reason where there is none.

    Shapes:
        steps and level ``[K]``, right and weights ``[K - 1]``.

    Units:
        Loss, of level and right side alike.

    Raises:
        InputError: If the tolerance is not positive.

    Source:
        Yaida 2018, arXiv:1810.00004, for the whole window; the halves, the second check and the
        resolution are added here.

    Example:
        >>> steps = np.arange(0.0, 2000.0, 100.0)
        >>> still = np.random.default_rng(0).normal(size=20)
        >>> stationary(steps, still, np.ones(19), np.ones(19), tolerance=0.05)
        Answer(value=1.0, reason='')
        >>> stationary(steps, still - 0.2 * steps, np.ones(19), np.ones(19), tolerance=0.05).value
        0.0
    """
    if not tolerance > 0:
        raise InputError("tolerance must be positive", got=tolerance, fix="Write tolerance=0.05.")
    undecided = _undecided(steps, level, constant_lr)
    if undecided:
        return Answer(float("nan"), undecided)
    sums, samples = _running(np.where(weights > 0, weights * right, 0.0)), _running(weights)
    if not sums[-1] > 0:
        return Answer(float("nan"), "the weights do not move")
    mean_right = sums[-1] / samples[-1]

    def excess(first: int, last: int) -> float:
        """Left over right side less 1 between two knots, in size."""
        if first == last:
            return 0.0
        part = sums[last] - sums[first]
        rate = part / (samples[last] - samples[first]) if part > 0 else mean_right
        return abs(float(level[last] - level[first])) / float((steps[last] - steps[first]) * rate)

    def settled(last: int) -> bool:
        middle = _nearest(steps, last, 0.5)
        halves = max(excess(0, middle), excess(middle, last))
        return excess(0, last) < tolerance and halves < _HALVES * tolerance

    end = len(steps) - 1
    earlier = _nearest(steps, end, _EARLIER)
    scatter = float(end_point_deviation(steps, level)) if deviation is None else deviation

    def resolution(last: int) -> float:
        return scatter / float((steps[last] - steps[0]) * mean_right)

    if excess(0, end) - 2 * resolution(end) > tolerance:
        return Answer(0.0)
    if not resolution(earlier) < tolerance:
        return Answer(float("nan"), f"the window is too short to resolve a tolerance of {tolerance:g}")
    return Answer(float(settled(end) and settled(earlier)))


def sasa_plus(
    steps: Floats,
    level: Floats,
    *,
    errors: str,
    confidence: float = 0.95,
    constant_lr: bool = True,
) -> Answer:
    r"""The test of SASA+: the mean drift agrees with 0, and both halves drift the same way.

    The statistic :math:`z_k = -(E_{k+1} - E_k)` telescopes, which has two consequences at a stationary
    state. Its increments are anti-correlated, so that errors from blocks are several times too wide
    and the interval holds 0 in practically every window: with them the test asks whether a drift can
    be detected, not whether it is small. And the means of the two halves have a correlation of -1/2, so
    that they share a sign in only one window out of three: the decision comes about three checks late.

    Args:
        steps: Positions of the knots along the window, in optimizer steps.
        level: The state function at the knots, for plain SGD ``|theta|^2 / (2 eta)``.
        errors: ``"blocks"``, as published, or ``"end_points"``, as the series requires.
        confidence: Probability of the interval of the mean drift.
        constant_lr: Whether the learning rate is constant in the window.

    Returns:
        The decision, ``nan`` with a reason where there is none.

    Shapes:
        steps and level ``[K]``.

    Raises:
        InputError: If ``errors`` is neither of the two.

    Source:
        Zhang, Lang, Liu, Xiao 2020, arXiv:2002.10597. The interval of a first drop, for which each half
        must contain 0, is not part of it.

    Example:
        >>> steps = np.arange(0.0, 2000.0, 100.0)
        >>> zigzag = np.array([0.0, 1.0] * 10) + 1e-5 * steps
        >>> sasa_plus(steps, zigzag, errors="end_points")
        Answer(value=1.0, reason='')
    """
    if errors not in _HALF_WIDTHS:
        raise InputError(
            'errors must be "blocks" or "end_points"', got=repr(errors), fix='Write errors="end_points".'
        )
    undecided = _undecided(steps, level, constant_lr)
    if undecided:
        return Answer(float("nan"), undecided)
    drift = (level[-1] - level[0]) / (steps[-1] - steps[0])
    half_width = _HALF_WIDTHS[errors](steps, level, confidence)
    middle = _nearest(steps, len(steps) - 1, 0.5)
    same_way = (level[middle] - level[0]) * (level[-1] - level[middle]) > 0
    return Answer(float(abs(drift) < half_width and same_way))


def _end_point_half_width(steps: Floats, level: Floats, confidence: float) -> float:
    """Half an interval of the mean drift, from the scatter of its end points."""
    deviation = end_point_deviation(steps, level) / (steps[-1] - steps[0])
    return float(ndtri((1 + confidence) / 2) * deviation)


def _block_half_width(steps: Floats, level: Floats, confidence: float) -> float:
    """Half an interval of the mean drift, from the scatter of the drift between knots."""
    weights, rises = np.diff(steps), np.diff(level)
    without = (rises.sum() - rises) / (weights.sum() - weights)
    error = correlated_jackknife(
        torch.from_numpy(rises.sum(keepdims=True) / weights.sum()),
        torch.from_numpy(without)[:, None],
        torch.from_numpy(weights),
    )
    return t_quantile(int(error.groups), confidence) * float(error.stderr)


_HALF_WIDTHS = {"blocks": _block_half_width, "end_points": _end_point_half_width}


def _undecided(steps: Floats, level: Floats, constant_lr: bool) -> str:
    """Why there can be no decision; empty where there can."""
    if not constant_lr:
        return "the learning rate changes"
    if len(steps) < FEWEST_KNOTS:
        return f"the window holds fewer than {FEWEST_KNOTS} records"
    if not np.isfinite(level).all():
        return "the level of the weights is not finite"
    return ""


def _running(values: Floats) -> list[float]:
    """Sums up to every knot, the first of which is 0."""
    return [0.0, *np.cumsum(values).tolist()]


def _nearest(steps: Floats, last: int, share: float) -> int:
    """The knot nearest to this share of the way from the first to this one."""
    target = steps[0] + share * (steps[last] - steps[0])
    return int(np.abs(steps - target).argmin())
