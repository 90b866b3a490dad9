"""Errors and warnings: each says what was wrong, what was got, and what to write instead.

Constructors and pure functions raise them. Inside a running loop the engine turns the same message
into one warning, reads ``nan`` and lets training go on.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

_SHOWN = 200
"""Characters of a wrong value in a message."""


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


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    integer: bool = False,
    optional: bool = False,
    example: str = "",
) -> None:
    """Refuse a setting that is no number, or out of its range.

    Args:
        name: The argument.
        value: What was given for it.
        least: The smallest that will do.
        above: What it has to be above.
        below: What it has to be below.
        integer: Whether it has to be a whole number.
        optional: Whether it may be ``None``.
        example: What to write instead; to leave it out when empty.

    Raises:
        InputError: If it will not do.

    Example:
        >>> check_number("patience", 1.5, least=1, integer=True)
        Traceback (most recent call last):
        gradiometer.errors.InputError: patience must be a whole number at least 1, got 1.5. Leave patience= out, or write such a number.
    """  # noqa: E501
    if optional and value is None:
        return
    number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if number and value >= least and above < value < below:  # type: ignore[operator]
        return
    limits = {"at least": least, "above": above, "below": below}
    wants = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
    kind = ("a whole number" if integer else "a number") + " " * bool(wants)
    fix = f"Write {name}={example}." if example else f"Leave {name}= out, or write such a number."
    raise InputError(f"{name} must be {kind}{wants}", got=shown(value), fix=fix)


def check_flag(name: str, value: object) -> None:
    """Refuse what might be taken for the opposite.

    Args:
        name: The argument.
        value: What was given for it.

    Raises:
        InputError: If it is neither ``True`` nor ``False``.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False", got=shown(value), fix=f"Write {name}=True.")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse what is none of a few words.

    Args:
        name: The argument.
        value: What was given for it.
        choices: What it may be.

    Raises:
        InputError: With the choices.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        *rest, last = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices]
        raise InputError(f"unknown {name}", got=shown(value), fix=f"Write {', '.join(rest)} or {last}.")


def check_kind(name: str, value: object, kind: type | tuple[type, ...], example: str) -> None:
    """Refuse what is not of a kind.

    Args:
        name: The argument.
        value: What was given for it.
        kind: What it must be an instance of.
        example: What to write instead.

    Raises:
        InputError: With the example.

    Example:
        >>> check_kind("estimator", 1000, list, "Window(1000)")
        Traceback (most recent call last):
        gradiometer.errors.InputError: estimator must be a list, got 1000. Write estimator=Window(1000).
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join("None" if k is type(None) else f"a {k.__name__}" for k in kinds)
        forgotten = " (the parentheses are missing)" if isinstance(value, type) else ""
        fix = f"Write {name}={example}."
        raise InputError(f"{name} must be {names}", got=shown(value) + forgotten, fix=fix)


def check_callable(name: str, value: object, form: str, example: str, *, optional: bool = False) -> None:
    """Refuse what is no function of two arguments; a class makes an object instead of an answer.

    Args:
        name: The argument.
        value: What was given for it.
        form: What it takes and returns.
        example: What to write instead.
        optional: Whether it may be ``None``.

    Raises:
        InputError: With the form and the example.

    Example:
        >>> check_callable("loss_fn", int, "(outputs, targets) -> loss", "F.cross_entropy")
        Traceback (most recent call last):
        gradiometer.errors.InputError: loss_fn must be a callable (outputs, targets) -> loss, got <class 'int'> (the parentheses are missing). Write loss_fn=F.cross_entropy.
    """  # noqa: E501
    if optional and value is None:
        return
    wrong = " (the parentheses are missing)" if isinstance(value, type) else ""
    if callable(value) and not wrong:
        with suppress(TypeError, ValueError):  # some say nothing of what they take
            signature = inspect.signature(value)
            wrong = _does_not_take_two(signature)
        if not wrong:
            return
    raise InputError(
        f"{name} must be a callable {form}", got=shown(value) + wrong, fix=f"Write {name}={example}."
    )


def _does_not_take_two(signature: inspect.Signature) -> str:
    """Why a callable cannot be given two arguments; empty where it can."""
    try:
        signature.bind(None, None)
    except TypeError as error:
        return f" ({error})"
    return ""


def shown(value: object) -> str:
    """A wrong value for a message, on one line and cut short.

    Args:
        value: Anything.
    """
    text = " ".join(line.strip() for line in repr(value).splitlines())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def printable(text: str) -> str:
    r"""A text of someone else's with every character escaped that does something to a terminal.

    Args:
        text: Any text: a name, a message.

    Example:
        >>> printable("\x1b[2Jhead")
        '\\x1b[2Jhead'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise InputError(f"{name} must be a list of {of}", got=shown(values), fix=fix)
    for value in values:
        if not fits(value):
            raise InputError(f"{name} must be {of}", got=shown(value), fix=fix)


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
