"""What keeps the run safe from us: time is counted, errors are contained, each thing is said once."""

from __future__ import annotations

import logging
import warnings
from time import perf_counter
from typing import Any, Literal

from ..errors import MeasurementWarning


class Guard:
    """Says each thing once, and lets no error of ours reach the loop.

    Args:
        on_error: ``"warn"`` contains errors; ``"raise"`` lets them through, for tests.
        step: Names the step under way, for messages.
    """

    def __init__(self, on_error: Literal["warn", "raise"]) -> None:
        self.contains = on_error == "warn"
        self.seconds = 0.0
        """Host time of our own work since the beginning of this step."""
        self._said: set[str] = set()

    def timed(self, moment: str) -> Stretch:
        """Count the time of our own work, and contain its errors.

        Args:
            moment: When it is done, for the warning: "measuring failed <moment>".
        """
        return Stretch(self, moment)

    def warn(self, message: str, key: str | None = None, kind: type[Warning] = MeasurementWarning) -> None:
        """Say a thing once; where warnings are errors it is logged, since the run must go on.

        Args:
            message: What the user reads.
            key: What makes it the same thing; the message itself when ``None``.
            kind: The class of the warning.
        """
        if (key or message) in self._said:
            return
        self._said.add(key or message)
        try:
            warnings.warn(message, kind, stacklevel=2)
        except kind:
            logging.getLogger(__name__).warning(message)


class Stretch:
    """A stretch of our own work inside the user's loop: a context."""

    __slots__ = ("_before", "_began", "_guard", "_moment")

    def __init__(self, guard: Guard, moment: str) -> None:
        self._guard, self._moment = guard, moment

    def __enter__(self) -> None:
        self._before, self._began = self._guard.seconds, perf_counter()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        guard = self._guard
        guard.seconds = self._before + perf_counter() - self._began  # right where calls nest
        if not isinstance(error, Exception) or not guard.contains:
            return False
        guard.warn(f"measuring failed {self._moment}: {type(error).__name__}: {error}. Training goes on.")
        return True
