"""What a recorder is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from .readings import Reading


@runtime_checkable
class Recorder(Protocol):
    """Takes the readings of one step.

    Three more methods are called where they are there: ``expect(quantities)`` before the first record, with
    the words for what the run may read by full key; ``record_decisions(decisions)`` with what controllers
    decided; and ``close()`` at the end.
    """

    def __call__(self, step: int, readings: Sequence[Reading]) -> None:
        """Keep or show the readings.

        Args:
            step: The optimizer step under which this batch's loss is logged.
            readings: All readings of that step.
        """
