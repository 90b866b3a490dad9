"""Errors and warnings: each says what was wrong, what was got, and what to write instead.

Constructors and pure functions raise them. Inside a running loop the engine turns the same message
into one warning, reads ``nan`` and lets training go on.
"""

from __future__ import annotations


class GradiometerError(Exception):
    """Base of every error raised here.

    Args:
        wrong: What was wrong, as the beginning of a sentence: ``"probe must hold an example"``.
        got: What was found instead; left out of the message when ``None``.
        fix: The line to write instead, as a full sentence.
    """

    def __init__(self, wrong: str, *, got: object = None, fix: str = "") -> None:
        found = "" if got is None else f", got {got}"
        super().__init__(f"{wrong}{found}." + (f" {fix}" if fix else ""))


class InputError(GradiometerError, ValueError):
    """An argument cannot be used."""


class MissingFieldError(GradiometerError, LookupError):
    """A snapshot was asked for something that nobody supplied."""


class UnsupportedError(GradiometerError, RuntimeError):
    """A quantity cannot be measured on this run, now or later; the engine retires it."""


class SampleSkippedError(GradiometerError, RuntimeError):
    """This step gives no sample (non-finite gradient, no gradient); the next one may."""


class GradiometerWarning(UserWarning):
    """Base of every warning issued here."""


class MeasurementWarning(GradiometerWarning):
    """A measurement failed or was left out; training is not affected."""


class CostWarning(GradiometerWarning):
    """Measuring costs more than was asked for."""
