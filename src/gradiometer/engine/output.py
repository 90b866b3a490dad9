"""What has been read: the latest reading of every key, checks between them, and the recorders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..observables import Observable
from ..optimizers import GroupSettings
from ..record.base import Recorder
from ..record.readings import Decision, Reading, measured
from .crosschecks import disagreements
from .guard import Guard
from .words import expected_words

_UNREAD = 256
"""Readings kept for a loop that logs at a moment of its own."""
_LONGEST_WAIT = 64
"""Records after which a recorder that keeps failing is tried once more."""


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
        self._outlets = [_Outlet(recorder) for recorder in recorders]
        self._guard = guard
        self.past: dict[str, tuple[int, Reading]] = {}
        """The last reading of every key that was measured, with its step."""
        self._comparable: dict[str, Reading] = {}
        self._new: list[Reading] = []
        self._observables = observables
        self._words = expected_words(prefix, observables)
        for outlet in self._outlets:
            self._tell(outlet)

    def add(self, step: int, readings: list[Reading], groups: Sequence[GroupSettings]) -> None:
        """Keep one record, compare it with what is known, and hand it to the recorders.

        Args:
            step: The optimizer step.
            readings: All readings of that step.
            groups: The optimizer's settings by parameter group.
        """
        by_key = {reading.key: reading for reading in readings}
        self.latest.update(by_key)
        for _, group in groupby(readings, lambda reading: reading.key.split("/")[1]):
            self.past.update({reading.key: (step, reading) for reading in measured([*group])})
        self._comparable.update(by_key)
        self._new = (self._new + readings)[-_UNREAD:]
        for outlet in self._outlets:
            if outlet.asked_again():
                self._tell(outlet)
                self._give(outlet, lambda recorder: recorder(step, readings))
        for key, message in disagreements(self._comparable, groups, self._observables).items():
            self._guard.warn(message, key)

    def decide(self, decisions: Sequence[Decision]) -> None:
        """Hand decisions to the recorders that take them; the record of their step follows.

        Args:
            decisions: What controllers decided at one step.
        """
        for outlet in self._outlets:
            if not outlet.wait:
                self._give(outlet, lambda recorder: getattr(recorder, "record_decisions", ignore)(decisions))

    def _tell(self, outlet: _Outlet) -> None:
        """Tell a recorder once what to expect."""
        if not outlet.told:
            outlet.told = self._give(
                outlet, lambda recorder: getattr(recorder, "expect", ignore)(self._words)
            )

    def _give(self, outlet: _Outlet, call: Callable[[Any], None]) -> bool:
        """Give a recorder something, and say whether it took it; one that fails is asked again later."""
        try:
            call(outlet.recorder)
            outlet.wait = outlet.failures = 0
        except Exception as error:
            if not self._guard.contains:
                raise
            name = type(outlet.recorder).__name__
            outlet.failed()
            self._guard.warn(
                f"{name} failed: {type(error).__name__}: {error}. It is asked again at later records; what "
                "it was to take in between is missing there. Training goes on.",
                f"recorder {id(outlet.recorder)}",
            )
            return False
        return True

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
        """Close the recorders, also those that have failed."""
        for outlet in self._outlets:
            try:
                getattr(outlet.recorder, "close", _nothing)()
            except Exception as error:
                if not self._guard.contains:
                    raise
                what = f"measuring failed closing {type(outlet.recorder).__name__}"
                self._guard.warn(f"{what}: {type(error).__name__}: {error}. Training goes on.")
        self._outlets = []


@dataclass
class _Outlet:
    """A recorder, and how long it is left in peace after it has failed.

    Args:
        recorder: Where readings go.
    """

    recorder: Any
    wait: int = 0
    """Records until it is asked again."""
    failures: int = 0
    """In a row."""
    told: bool = False
    """Whether it knows what to expect."""

    def failed(self) -> None:
        """After the first failure the next record is tried, then the second next, the fourth, ..."""
        self.wait, self.failures = min(2**self.failures, _LONGEST_WAIT), self.failures + 1

    def asked_again(self) -> bool:
        """Whether it takes the record that is there now."""
        self.wait = max(self.wait - 1, 0)
        return self.wait == 0


def _nothing() -> None:
    """A recorder that has nothing to close."""
