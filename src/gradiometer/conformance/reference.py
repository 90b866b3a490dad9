"""A slow twin, written from the definitions: what an adapter looks like, and a check of the cases.

Nothing here is shared with the estimators that the package measures with. The noise comes from an analysis
of variance between parts, the relation from every displacement and the two ends of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from .steps import Array, NoiseStep, RelationStep

_BLOCKS = 16
_NEAR = 0.1


def reference(steps: Sequence[NoiseStep] | Sequence[RelationStep]) -> dict[str, Any]:
    """An adapter for both kinds of case.

    Args:
        steps: The steps of one run.

    Returns:
        Every quantity that can be had from them.

    Example:
        >>> x = np.array([[1.0, 0.0], [3.0, 0.0]])      # gradients 1 and 3: mean 2, variance 2
        >>> answer = reference([NoiseStep(x, -np.ones(2), np.zeros(2), (1, 1))])
        >>> float(answer["trace"]), float(answer["grad_sq_norm"])    # 2, and 2^2 less half of that
        (2.0, 3.0)
    """
    if isinstance(steps[0], RelationStep):
        return relation([step for step in steps if isinstance(step, RelationStep)])
    return noise([step for step in steps if isinstance(step, NoiseStep)])


def noise(steps: Sequence[NoiseStep]) -> dict[str, Any]:
    r"""Trace and signal by analysis of variance, averaged over the steps that offer them.

    .. math:: S = \frac1{k-1}\sum_j b_j |g_j - \bar g|^2, \qquad |G|^2 = |\bar g|^2 - S/B,
              \qquad \bar g = \sum_j b_j g_j / B

    Args:
        steps: The steps of one run.

    Returns:
        ``trace``, ``grad_sq_norm`` and ``scale``; intervals where there are enough steps.
    """
    usable = [step for step in steps if step.finite and len(step.sizes) > 1]
    if not usable:
        return dict.fromkeys(("trace", "grad_sq_norm", "scale"), np.nan)
    pairs = np.array([_both(step) for step in usable])
    trace, signal = pairs.mean(0)
    answer: dict[str, Any] = {"trace": trace, "grad_sq_norm": signal, "scale": trace / signal}
    if len(pairs) >= 2 * _BLOCKS:
        means = np.array([block.mean(0) for block in np.array_split(pairs, _BLOCKS)])
        quantile = float(stats.t.ppf(0.975, _BLOCKS - 1))
        covariance = np.cov(means.T) / _BLOCKS
        for i, name in enumerate(("trace", "grad_sq_norm")):
            half = quantile * np.sqrt(covariance[i, i])
            answer[f"{name}_interval"] = (pairs.mean(0)[i] - half, pairs.mean(0)[i] + half)
        answer["scale_interval"] = _ratio_interval(trace, signal, covariance, quantile)
    if signal <= 0:
        answer["scale"] = np.nan
    return answer


def _both(step: NoiseStep) -> tuple[float, float]:
    """Trace and signal of one step."""
    parts, sizes = step.gradients / step.loss_scale, np.array(step.sizes)
    mean = np.average(parts, axis=0, weights=sizes)
    trace = (sizes * ((parts - mean) ** 2).sum(1)).sum() / (len(sizes) - 1)
    return float(trace), float(mean @ mean - trace / sizes.sum())


def _ratio_interval(above: float, below: float, covariance: Array, quantile: float) -> tuple[float, float]:
    """All r for which ``above - r below`` is zero within its error; unbounded where ``below`` may be 0."""
    square = quantile**2
    a = below**2 - square * covariance[1, 1]
    b = above * below - square * covariance[0, 1]
    c = above**2 - square * covariance[0, 0]
    root = np.sqrt(max(b * b - a * c, 0.0))
    if a > 0:
        return (b - root) / a, (b + root) / a
    return (max(c / (b + root), 0.0) if b + root > 0 else 0.0), np.inf


def relation(steps: Sequence[RelationStep]) -> dict[str, Any]:
    r"""Both sides from the displacements u and the two ends of the window, and the verdict.

    Each side differs from the other by the change of a state function E of weights and buffer, so that
    ``left = right - (E_T - E_0) / T``. The error of the ratio is that of two ends: the scatter of E about
    its trend, times the square root of two.

    Args:
        steps: The steps of one run.

    Returns:
        ``left``, ``right``, ``ratio``, its interval and ``stationary``.
    """
    counted = [step for step in steps if step.counted]
    last = counted[-1]
    right = float(np.mean([_work(step) for step in counted]))
    path = np.array([_level(step, step.weights, step.velocity) for step in counted])
    path = np.append(path, _level(last, last.weights_after, last.velocity_after))
    left = right - float(path[-1] - path[0]) / len(counted)
    time = np.arange(len(path))
    trend = np.polyval(np.polyfit(time, path, 1), time)
    error = float(np.sqrt(2) * np.std(path - trend) / len(counted)) / right
    ratio = left / right
    return {
        "left": left,
        "right": right,
        "ratio": ratio,
        "ratio_interval": (ratio - 1.96 * error, ratio + 1.96 * error),
        "stationary": _verdict(abs(ratio - 1), error),
    }


def _work(step: RelationStep) -> float:
    """One step's term of the right side, from its displacement."""
    moved = step.weights - step.weights_after
    square, mu = float(moved @ moved) / step.lr, step.momentum
    if step.decoupled or not mu:
        return square / 2
    if step.nesterov:
        return (1 - mu) / 2 * square + mu**2 * float(moved @ step.velocity_after)
    return (1 + mu) / (2 * (1 - step.dampening)) * square


def _level(step: RelationStep, weights: Array, velocity: Array) -> float:
    """The state function E, in the form that belongs to the settings of a step."""
    mu = 0.0 if step.decoupled else step.momentum
    damping = 1.0 if step.decoupled or not mu else 1 - step.dampening
    coupling = mu**2 if step.nesterov else mu / damping
    square, product = float(weights @ weights), float(weights @ velocity)
    return (1 - mu) / (2 * step.lr * damping) * square - coupling * product


def _verdict(away: float, error: float) -> bool | None:
    if away - 2 * error > _NEAR:
        return False
    return True if away < _NEAR and error < _NEAR else None
