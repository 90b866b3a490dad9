"""The closing table: every number with its error, its unit and what it says."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ..errors import printable
from .readings import Reading

_MOST = (80, 30, 40)
"""Columns of a name, of a number and of a unit at the most."""


def sentence(reading: Reading, others: Mapping[str, Reading]) -> str:
    """What a reading says: its own verdict where it has one, else what the number is.

    Args:
        reading: One reading.
        others: The latest reading of every key.

    Returns:
        One sentence.

    Example:
        >>> from gradiometer import Quantity
        >>> size = Quantity("1", "Size.", verdict=lambda reading, others: f"{reading.number / 2:g} pairs.")
        >>> sentence(Reading("d/g/size", 6.0, quantity=size), {})
        '3 pairs.'
        >>> sentence(Reading("d/g/size", math.nan, sentence="Size.", quantity=size), {})
        'not measured. Size.'
    """
    verdict = reading.quantity.verdict if reading.quantity is not None else None
    why = reading.why
    if verdict is not None:
        return (
            verdict(reading, others)
            if reading.is_finite or not reading.resolved
            else f"{why}. {reading.sentence}"
        )
    return f"{why}. {reading.sentence}" if ": " in why else reading.sentence


def table(
    readings: Mapping[str, Reading],
    costs: Mapping[str, str],
    decisions: Sequence[str] = (),
    *,
    past: Mapping[str, tuple[int, Reading]] = MappingProxyType({}),
    reasons: Mapping[str, str] = MappingProxyType({}),
    width: int = 118,
) -> str:
    """The closing table: reading, value and error, unit, sentence, cost; then what controllers decided.

    Where the last record could not be read, it shows the last one that could, with its step.

    Args:
        readings: The latest reading of every key; arrays are left out.
        costs: Cost of each group, in words.
        decisions: What controllers decided, a sentence each.
        past: The last reading of every key that was measured, with its step.
        reasons: Why nothing was read of a group, or not lately; a group without any reading is one row.
        width: Columns of the terminal.

    Returns:
        Text of several lines.

    Example:
        >>> drift = Reading("d/ntk/drift", 0.25, 0.01, sentence="How far the kernel has moved.")
        >>> print(table({drift.key: drift}, {"ntk": "2 ms"}, width=80))
        reading        value ± error      unit  what it says
        -------------  -----------------  ----  ----------------------------------------
        ntk                                     cost: 2 ms
          drift        0.25 ± 0.01        1     How far the kernel has moved.
    """
    rows: list[tuple[str, str, str, str]] = []
    groups = {key.split("/", 2)[1] for key in (*readings, *past)} | reasons.keys()
    for group in sorted(groups):
        rows += _rows_of(group, readings, past, costs.get(group, ""), reasons.get(group, ""))
    lines = _laid_out(rows, width)
    if decisions:
        lines += ["", "decisions"]
        for decision in decisions:
            text = printable(decision)
            lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _rows_of(
    group: str,
    readings: Mapping[str, Reading],
    past: Mapping[str, tuple[int, Reading]],
    cost: str,
    reason: str,
) -> list[tuple[str, str, str, str]]:
    """The rows of one group: its facts, then its readings; of a group without any, the reason alone."""
    stale = {key for key, (_, reading) in past.items() if readings.get(key) is not reading}
    keys = [key for key in sorted(readings.keys() | past.keys()) if key.split("/", 2)[1] == group]
    members = {key: past[key] if key in stale else (0, readings[key]) for key in keys}
    members = {key: (step, reading) for key, (step, reading) in members.items() if reading.is_scalar}
    facts = [f"cost: {cost}"] if cost else []
    whys = {reading.why for _, reading in members.values()}
    shared = whys.pop() if len(whys) == 1 else ""
    if not members or (": " in shared and shared.startswith("not measured")):
        what, _, cause = (shared or reason).partition(": ")
        return [(group, what, "", " ".join([f"{cause or what}.", *facts]))]
    note = next(iter(members.values()))[1].note
    facts += [note] * bool(note)
    if reason and stale & members.keys():
        facts.append(f"not read lately: {reason.removeprefix('not measured: ').rstrip('.')}.")
    rows = [(group, "", "", "; ".join(facts))]
    for key, (step, reading) in members.items():
        text = f"last read at step {step}. {reading.sentence}" if key in stale else _said(reading, readings)
        rows.append((f"  {key.split('/', 2)[2]}", _number(reading), reading.unit, text))
    return rows


def _laid_out(rows: Sequence[tuple[str, str, str, str]], width: int) -> list[str]:
    """Lines of the table; what is too long for its column is cut, and the last one is wrapped."""
    header = ("reading", "value ± error", "unit", "what it says")
    cut = [(*(_cut(cell, most) for cell, most in zip(row, _MOST, strict=False)), row[3]) for row in rows]
    sizes = [max(len(row[i]) for row in [header, *cut]) for i in range(3)]
    sizes[0], sizes[1], sizes[2] = max(sizes[0], 13), max(sizes[1], 17), max(sizes[2], 4 if rows else 8)
    rest = max(40, width - sum(sizes) - 6)
    lines = [
        _line(header, sizes),
        _line(("-" * sizes[0], "-" * sizes[1], "-" * sizes[2], "-" * rest), sizes),
    ]
    for *cells, said in cut:
        text = textwrap.wrap(printable(said), rest) or [""]
        lines.append(_line((*cells, text[0]), sizes))
        lines.extend(_line(("", "", "", more), sizes) for more in text[1:])
    return lines


def _cut(cell: str, most: int) -> str:
    """A cell that the terminal shows as it is, cut short at its end."""
    text = printable(cell)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _said(reading: Reading, others: Mapping[str, Reading]) -> str:
    """What it says; a verdict that fails must not end the run that prints a table."""
    try:
        return sentence(reading, others)
    except Exception as error:
        return f"{reading.sentence} (Its verdict failed: {type(error).__name__}: {error})"


def _line(cells: tuple[str, ...], sizes: list[int]) -> str:
    padded = [cell.ljust(size) for cell, size in zip(cells, sizes, strict=False)]
    return "  ".join([*padded, cells[3]]).rstrip()


def _number(reading: Reading) -> str:
    value = reading.number
    if not math.isfinite(value):
        bounded = not reading.resolved and math.isfinite(reading.low) and reading.low > 0
        return (
            f">= {reading.low:.4g}" if bounded else "not resolved" if not reading.resolved else "not measured"
        )
    if not math.isfinite(reading.stderr) or reading.stderr == 0:
        return f"{value:.4g}"
    return f"{value:.4g} ± {reading.stderr:.2g}"
