"""Relations between readings that come from different measurements: where two disagree, one is wrong.

Pure rules. A difference of more than four standard errors, and of more than a twentieth, is said once,
with the names of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..optimizers import GroupSettings
from ..record.readings import Reading

STANDARD_ERRORS = 4.0
SMALLEST = 0.05
"""Relative difference below which nothing is said, since two windows are never quite the same."""
SPARSER = 5.0
"""Updates that are sampled for one gradient, at the default cadences. Both averages are of the same squares,
which have heavy tails late in training: the fewer samples have at least the root of this times the other's
error."""


def disagreements(
    readings: Mapping[str, Reading], prefix: str, groups: Sequence[GroupSettings]
) -> dict[str, str]:
    """What two readings of one quantity say differently.

    Args:
        readings: The latest reading of every key.
        prefix: First part of every key.
        groups: The optimizer's settings by parameter group.

    Returns:
        One message per pair, by the name of the pair.

    Example:
        >>> ratio = Reading("d/noise/source_ratio", 2.0, stderr=0.1, note="per example; checked against: x")
        >>> list(disagreements({ratio.key: ratio}, "d", ()))
        ['noise/source_ratio']
    """
    found = {}
    sources = readings.get(f"{prefix}/noise/source_ratio")
    if sources is not None and _differ(sources, 1.0, 0.0):
        found["noise/source_ratio"] = (
            f"two sources of the noise scale disagree: the trace from the second is {_value(sources):.3g} +- "
            f"{sources.stderr:.2g} times that from the first ({sources.note}). One of them does not see the "
            "gradient that trains the model."
        )
    work = _work_of_noise(readings, prefix, groups)
    right = readings.get(f"{prefix}/fdr/right")
    if work is None or right is None:
        return found
    expected, error = work[0], max(work[1], math.sqrt(SPARSER) * right.stderr)
    if _differ(right, expected, error):
        found["fdr/right"] = (
            f"fdr/right, from the update, is {_value(right):.3g} +- {right.stderr:.2g}; "
            f"noise/batch_grad_sq_norm, from the gradient, gives {expected:.3g} +- {error:.2g} for the same "
            "at a stationary state. Something between the gradient and the update changes one of them: "
            "clipping after before_step(), or a scaled loss."
        )
    return found


def _work_of_noise(
    readings: Mapping[str, Reading], prefix: str, groups: Sequence[GroupSettings]
) -> tuple[float, float] | None:
    """FDR1's right side ``eta/2 (|G|^2 + S/B)`` and its error, where plain SGD makes that a relation.

    The windows of both readings differ, so it is one at a stationary state only. Weight decay acts on the
    update and not on the gradient measured: with F = G + lambda theta and <theta . F> = right,
    ``right (1 - eta lambda) = eta/2 (|G|^2 + S/B - lambda^2 |theta|^2)``.
    """
    names = ("noise/batch_grad_sq_norm", "fdr/weight_norm_sq", "fdr/stationary")
    found = [readings.get(f"{prefix}/{name}") for name in names]
    if not groups or any(reading is None for reading in found):
        return None
    first = groups[0]
    plain = first.is_sgd and not first.momentum
    if not plain or any((g.lr, g.weight_decay, g.momentum) != _settings(first) for g in groups):
        return None
    batch, weights, stationary = (reading for reading in found if reading is not None)
    if _value(stationary) != 1.0 or "over 100 %" not in batch.note or "loss_reduction=mean" not in batch.note:
        return None
    lr, decay = first.lr, first.weight_decay
    pulled = decay**2 * _value(weights)
    factor = lr / 2 / (1 - lr * decay)
    return factor * (_value(batch) - pulled), factor * _allowed(batch) / STANDARD_ERRORS


def _settings(group: GroupSettings) -> tuple[float, float, float]:
    return group.lr, group.weight_decay, group.momentum


def _differ(left: Reading, right: float, right_error: float) -> bool:
    """Whether a reading differs from a number by more than their errors allow."""
    error = math.hypot(_allowed(left), STANDARD_ERRORS * right_error)
    return abs(_value(left) - right) > max(error, SMALLEST * abs(right))


def _allowed(reading: Reading) -> float:
    """Four standard errors, or the width of the 95 % interval: more, where the error is from few blocks.

    ``nan``, with which nothing is compared, where the error is not known.
    """
    return max(STANDARD_ERRORS * reading.stderr, reading.high - reading.low)


def _value(reading: Reading) -> float:
    return reading.value if isinstance(reading.value, float) else math.nan
