"""Runs the cross-checks of the observables that are measured; what they are stands with the observables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..observables import Observable
from ..optimizers import GroupSettings
from ..record.readings import Reading


def disagreements(
    readings: Mapping[str, Reading], groups: Sequence[GroupSettings], observables: Sequence[Observable]
) -> dict[str, str]:
    """What two readings of one quantity say differently.

    Args:
        readings: The latest reading of every full key.
        groups: The optimizer's settings by parameter group.
        observables: What is measured.

    Returns:
        One message per reading that another one contradicts, by its key without the prefix.

    Example:
        >>> from gradiometer import GradientNoiseScale
        >>> ratio = Reading("d/noise/source_ratio", 2.0, stderr=0.1, note="per example; checked against: x")
        >>> list(disagreements({ratio.key: ratio}, (), [GradientNoiseScale()]))
        ['noise/source_ratio']
    """
    by_name = {key.partition("/")[2]: reading for key, reading in readings.items()}
    messages = {
        observable.key(name): check(by_name, groups)
        for observable in observables
        for name, check in observable.checks.items()
    }
    return {key: message for key, message in messages.items() if message}
