"""What keeps the run safe from us: time is counted, errors are contained, each thing is said once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from time import perf_counter
from typing import Literal, ParamSpec, TypeVar

from ..errors import MeasurementWarning, printable
from .causes import description_of

P = ParamSpec("P")
T = TypeVar("T")


class Guard:
    """Says each thing once, and lets no error of ours reach the loop.

    Args:
        on_error: ``"warn"`` contains errors; ``"raise"`` lets them through, for tests.
    """

    def __init__(self, on_error: Literal["warn", "raise"]) -> None:
        self.contains = on_error == "warn"
        self.seconds = 0.0
        """Host time of our own work since the beginning of this step."""
        self.vocabulary: Mapping[str, str] = {}
        """What to say in place of a phrase, where a framework drives the loop."""
        self._said: set[str] = set()

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
        message = "\n".join(map(printable, self.translated(message).splitlines()))
        try:
            warnings.warn(message, kind, stacklevel=2)
        except kind:
            logging.getLogger(__name__).warning(message)

    def translated(self, text: str) -> str:
        """A message in the words of the framework at hand.

        Args:
            text: What is said in a plain loop.
        """
        for phrase, other in self.vocabulary.items():
            text = text.replace(phrase, other)
        return text


def contained(moment: str) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
    """Mark a method of our own work inside the user's loop: timed, and its errors contained.

    An interrupt goes through, once ``interrupted()`` has taken everything off.

    Such methods do not call each other, so that no time counts twice. A decorator, since a context made at
    each call would be an object on every step.

    Args:
        moment: When it is called, for the warning: "measuring failed <moment>".
    """

    def mark(method: Callable[P, T]) -> Callable[P, T | None]:
        @wraps(method)
        def inside(*arguments: P.args, **options: P.kwargs) -> T | None:
            guard: Guard = arguments[0].guard  # type: ignore[attr-defined]
            began = perf_counter()
            try:
                return method(*arguments, **options)
            except Exception as error:
                if not guard.contains:
                    raise
                guard.warn(f"measuring failed {moment}: {description_of(error)} Training goes on.")
                return None
            except BaseException:
                arguments[0].interrupted()  # type: ignore[attr-defined]
                raise
            finally:
                guard.seconds += perf_counter() - began

        return inside

    return mark
