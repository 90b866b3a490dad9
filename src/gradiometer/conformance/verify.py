"""The command ``gradiometer verify``: print what the cases say about an estimator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from ..errors import InputError
from .noise_cases import noise_cases
from .relation_cases import relation_cases
from .suite import Adapter, Case, Kind, Report, check

Suite = tuple[str, Adapter, tuple[Case, ...]]


def verify(
    adapter: str | None = None, kind: Kind | None = None, *, write: Callable[[str], object] = print
) -> bool:
    """Check this package's own estimators, or another one, and print a table for each.

    Args:
        adapter: Where to find another one, ``"package.module:function"``; our own when ``None``.
        kind: The kind of cases; both when ``None``.
        write: What takes the text.

    Returns:
        Whether all of them passed.

    Raises:
        InputError: If there is no such function, or it returns names that mean nothing here.

    Example:
        >>> verify("gradiometer.conformance.reference:reference", "relation", write=lambda text: None)
        True
    """
    passed = True
    for name, function, cases in _suites(adapter, kind):
        write(f"\n{name}\n{'=' * len(name)}")
        report = check(function, cases)
        write(report.table())
        passed = passed and report.passed
        if not report.passed:
            write(_reasons(report, cases))
    write("\nall passed" if passed else "\nFAILED")
    return passed


def _suites(adapter: str | None, kind: Kind | None) -> Iterator[Suite]:
    """Name, adapter and cases of everything to be checked."""
    if adapter is not None:
        cases = tuple(case for case in (*noise_cases(), *relation_cases()) if kind in (None, case.kind))
        yield adapter, load_adapter(adapter), cases
        return
    from .own import own_suites

    for name, (function, own_cases) in own_suites().items():
        if kind in (None, own_cases[0].kind):
            yield name, function, own_cases


def _reasons(report: Report, cases: tuple[Case, ...]) -> str:
    """What the cases that failed are about."""
    failed = {check.case for check in report.failures}
    return (
        "\n".join(f"{case.name}: {case.about}" for case in cases if case.name in failed)
        or "nothing was checked"
    )


def load_adapter(path: str) -> Adapter:
    """The function behind ``"package.module:function"``; the current folder is searched too.

    Args:
        path: Module and function.

    Returns:
        The function.

    Raises:
        InputError: If it cannot be found.

    Example:
        >>> load_adapter("gradiometer.conformance.reference:reference").__name__
        'reference'
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise InputError("an adapter is a module and a function", got=repr(path), fix='Write "mine:adapter".')
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function: Adapter = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError("the adapter was not found", got=str(error), fix="Check the name.") from error
    if not callable(function):
        raise InputError("the adapter is not a function", got=repr(function), fix="Name a function.")
    return function
