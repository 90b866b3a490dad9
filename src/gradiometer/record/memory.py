"""Keep readings and decisions in memory, for notebooks and tests."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

from ..errors import check_number
from .readings import Decision, Reading, scalars


class MemoryRecorder:
    """Keeps the last ``max_records`` records.

    Args:
        max_records: Number of recording steps to keep, and of decisions; the oldest are dropped.

    Raises:
        InputError: If ``max_records`` is below 1.

    Example:
        >>> recorder = MemoryRecorder()
        >>> recorder(7, [Reading("dynamics/ntk/drift", 0.5)])
        >>> recorder.series("dynamics/ntk/drift")
        [(7, 0.5)]
    """

    def __init__(self, max_records: int = 10_000) -> None:
        check_number("max_records", max_records, least=1, below=sys.maxsize, integer=True, example="1000")
        self.records: deque[tuple[int, tuple[Reading, ...]]] = deque(maxlen=max_records)
        self.decisions: deque[Decision] = deque(maxlen=max_records)

    def __call__(self, step: int, readings: Sequence[Reading]) -> None:
        """Append one record."""
        self.records.append((step, tuple(readings)))

    def record_decisions(self, decisions: Sequence[Decision]) -> None:
        """Append what controllers decided at one step."""
        self.decisions.extend(decisions)

    def series(self, key: str) -> list[tuple[int, float]]:
        """Steps and values of one key, errors (``..._stderr``) included.

        Args:
            key: A full log key.
        """
        flat = ((step, scalars(readings)) for step, readings in self.records)
        return [(step, numbers[key]) for step, numbers in flat if key in numbers]

    def latest(self) -> dict[str, Reading]:
        """The last reading of every key."""
        return {r.key: r for _, readings in self.records for r in readings}
