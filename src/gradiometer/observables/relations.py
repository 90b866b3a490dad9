"""Relations between readings of different measurements: where two disagree, one of them is wrong.

Pure rules. Each stands beside the observable whose reading it checks, in ``Observable.checks``; the engine
runs those of the observables that are measured and says each disagreement once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ..optimizers import GroupSettings
from ..record.readings import Reading

CrossCheck = Callable[[Mapping[str, Reading], Sequence[GroupSettings]], str]
"""What two readings of one quantity say differently, with the names of both; empty where they agree, or where
nothing can be compared. From the latest readings by key without the prefix, and the optimizer's settings by
parameter group."""

STANDARD_ERRORS = 4.0
SMALLEST = 0.05
"""Relative difference below which nothing is said, since two windows are never quite the same."""


def differs(reading: Reading, expected: float, error: float) -> bool:
    """Whether a reading differs from a number by more than the errors of both and a twentieth allow.

    Args:
        reading: One reading; where its error is not known nothing is compared.
        expected: What it should be.
        error: Standard error of that.

    Example:
        >>> differs(Reading("d/fdr/right", 1.3, stderr=0.05), 1.0, 0.0)
        True
    """
    allowed = math.hypot(widest(reading), STANDARD_ERRORS * error)
    return abs(reading.number - expected) > max(allowed, SMALLEST * abs(expected))


def widest(reading: Reading) -> float:
    """Four standard errors, or the width of the 95 % interval: more, where the error is from few blocks.

    Args:
        reading: One reading.

    Returns:
        ``nan``, with which nothing is compared, where the error is not known.
    """
    return max(STANDARD_ERRORS * reading.stderr, reading.high - reading.low)
