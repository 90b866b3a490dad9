"""The closing table: every number with its error, its unit and what it says."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from .readings import Reading


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
    reasons: Mapping[str, str] | None = None,
    width: int = 118,
) -> str:
    """The closing table: reading, value and error, unit, sentence, cost; then what controllers decided.

    Args:
        readings: The latest reading of every key; arrays are left out.
        costs: Cost of each group, in words.
        decisions: What controllers decided, a sentence each.
        reasons: Why nothing was read, by group; such a group is one row.
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
    groups: dict[str, list[Reading]] = {}
    for key in sorted(readings):
        if readings[key].is_scalar:
            groups.setdefault(key.split("/", 2)[1], []).append(readings[key])
    for group in sorted({*groups, *(reasons or {})}):
        members = groups.get(group, [])
        facts = [f"cost: {costs[group]}"] if group in costs else []
        whys = {reading.why for reading in members}
        if not members or (len(whys) == 1 and ": " in (why := whys.pop()) and why.startswith("not measured")):
            why = why if members else (reasons or {})[group]
            rows.append((group, why.partition(": ")[0], "", " ".join([f"{why.partition(': ')[2]}.", *facts])))
            continue
        note = members[0].note
        rows.append((group, "", "", "; ".join(facts + [note] * bool(note))))
        rows += [
            (f"  {reading.key.split('/', 2)[2]}", _number(reading), reading.unit, _said(reading, readings))
            for reading in members
        ]
    header = ("reading", "value ± error", "unit", "what it says")
    sizes = [max(len(header[i]), *(len(row[i]) for row in rows)) if rows else 8 for i in range(3)]
    sizes[0], sizes[1] = max(sizes[0], 13), max(sizes[1], 17)
    rest = max(40, width - sum(sizes) - 6)
    lines = [
        _line(header, sizes),
        _line(("-" * sizes[0], "-" * sizes[1], "-" * sizes[2], "-" * rest), sizes),
    ]
    for row in rows:
        text = textwrap.wrap(row[3], rest) or [""]
        lines.append(_line((*row[:3], text[0]), sizes))
        lines.extend(_line(("", "", "", more), sizes) for more in text[1:])
    if decisions:
        lines += ["", "decisions"]
        for decision in decisions:
            lines += textwrap.wrap(decision, width, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


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
