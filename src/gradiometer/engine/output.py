"""What has been read: the latest reading of every key, checks between them, and the recorders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..observables import Observable
from ..optimizers import GroupSettings
from ..record.base import Recorder
from ..record.readings import Reading
from .crosschecks import disagreements
from .guard import Guard
from .words import expected_words

_UNREAD = 256
"""Readings kept for a loop that logs at a moment of its own."""


def ignore(news: object) -> None:
    """A recorder that takes no decisions, or no words beforehand."""


class Output:
    """Readings on their way out.

    Args:
        prefix: First part of every key.
        recorders: Where readings go.
        guard: Contains what recorders raise.
        observables: What is measured; recorders are told the words for it.
    """

    def __init__(
        self, prefix: str, recorders: Sequence[Recorder], guard: Guard, observables: Sequence[Observable]
    ) -> None:
        self.latest: dict[str, Reading] = {}
        self._prefix = prefix
        self._recorders: list[Any] = list(recorders)
        self._guard = guard
        self._comparable: dict[str, Reading] = {}
        self._new: list[Reading] = []
        self._observables = observables
        words = expected_words(prefix, observables)
        self.hand_on(lambda recorder: getattr(recorder, "expect", ignore)(words))

    def add(self, step: int, readings: list[Reading], groups: Sequence[GroupSettings]) -> None:
        """Keep one record, compare it with what is known, and hand it to the recorders.

        Args:
            step: The optimizer step.
            readings: All readings of that step.
            groups: The optimizer's settings by parameter group.
        """
        by_key = {reading.key: reading for reading in readings}
        self.latest.update(by_key)
        self._comparable.update(by_key)
        self._new = (self._new + readings)[-_UNREAD:]
        self.hand_on(lambda recorder: recorder(step, readings))
        for key, message in disagreements(self._comparable, groups, self._observables).items():
            self._guard.warn(message, key)

    def hand_on(self, call: Callable[[Any], None]) -> None:
        """Give every recorder something; one that fails is left out.

        Args:
            call: What to do with a recorder.
        """
        for recorder in list(self._recorders):
            try:
                call(recorder)
            except Exception as error:
                if not self._guard.contains:
                    raise
                self._recorders.remove(recorder)
                self._guard.warn(f"{type(recorder).__name__} failed and is left out: {error}")

    def restart(self, groups: Sequence[str]) -> None:
        """Windows begin anew: what was read before belongs to another run.

        Args:
            groups: The observables whose windows do.
        """
        old = tuple(f"{self._prefix}/{group}/" for group in groups)
        self.latest = {key: r for key, r in self.latest.items() if not key.startswith(old)}
        self._comparable.clear()

    def take_new(self) -> list[Reading]:
        """Readings since the last call."""
        new, self._new = self._new, []
        return new

    def close(self) -> None:
        """Close the recorders."""
        for recorder in self._recorders:
            finish = getattr(recorder, "close", None)
            if finish is not None:
                self._finish(recorder, finish)
        self._recorders = []

    def _finish(self, recorder: Any, finish: Callable[[], None]) -> None:
        try:
            finish()
        except Exception as error:
            if not self._guard.contains:
                raise
            what = f"measuring failed closing {type(recorder).__name__}"
            self._guard.warn(f"{what}: {type(error).__name__}: {error}. Training goes on.")
