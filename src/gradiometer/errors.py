"""Errors and warnings: each says what was wrong, what was got, and what to write instead.

Constructors and pure functions raise them. Inside a running loop the engine turns the same message
into one warning, reads ``nan`` and lets training go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class GradiometerError(Exception):
    """Base of every error raised here.

    Args:
        wrong: What was wrong, as the beginning of a sentence: ``"probe must hold an example"``.
        got: What was found instead; left out of the message when ``None``.
        fix: The line to write instead, as a full sentence.
    """

    def __init__(self, wrong: str, *, got: object = None, fix: str = "") -> None:
        shown = "" if got is None else f", got {got}"
        super().__init__(f"{wrong}{shown}." + (f" {fix}" if fix else ""))


class InputError(GradiometerError, ValueError):
    """An argument cannot be used."""


def check_list(name: str, values: object, of: str, fits: Callable[[Any], bool], example: str) -> None:
    """Refuse what is no list of things of one kind.

    Args:
        name: The argument.
        values: What was given for it.
        of: What it must hold, in the plural.
        fits: Whether one thing is of that kind.
        example: What to write instead, without the brackets.

    Raises:
        InputError: With the thing that does not fit.

    Example:
        >>> check_list("sizes", [8, "all"], "numbers", lambda size: isinstance(size, int), "8, 16")
        Traceback (most recent call last):
        gradiometer.errors.InputError: sizes must be numbers, got 'all'. Write sizes=[8, 16].
    """
    fix = f"Write {name}=[{example}]."
    if not isinstance(values, Sequence):
        raise InputError(f"{name} must be a list of {of}", got=repr(values), fix=fix)
    for value in values:
        if not fits(value):
            raise InputError(f"{name} must be {of}", got=repr(value), fix=fix)


class MissingFieldError(GradiometerError, LookupError):
    """A snapshot was asked for something that nobody supplied."""


class UnsupportedError(GradiometerError, RuntimeError):
    """A quantity cannot be measured on this run, now or later; the engine retires it."""


class SampleSkippedError(GradiometerError, RuntimeError):
    """This step gives no sample (non-finite gradient, no gradient); the next one may."""


class TooEarlyError(SampleSkippedError):
    """This step gives no sample, as is to be expected at the beginning; nothing is said about it."""


class GradiometerWarning(UserWarning):
    """Base of every warning issued here."""


class MeasurementWarning(GradiometerWarning):
    """A measurement failed or was left out; training is not affected."""


class CostWarning(GradiometerWarning):
    """Measuring costs more than was asked for."""
