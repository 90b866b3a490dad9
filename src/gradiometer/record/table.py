"""What a number says and what to do about it: pure rules from readings to sentences.

Thresholds are rules of thumb and stand here by name; a reading that its own error does not resolve is
called so and gets no advice.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence

from .readings import Reading

STATIONARY = 0.1
"""The fdr ratio counts as 1 within this, if its error is below it too."""
LAZY, FEATURES = 0.1, 0.3
"""Relative kernel drift below the first is lazy training, above the second feature learning."""
SMALL_BATCH, LARGE_BATCH = 0.1, 0.9
"""Critical-batch fraction below the first is noise-limited, above the second wasteful."""
EDGE = 0.9
"""A learning rate above this share of its limit counts as at the edge of stability."""
DEAR = 0.05
"""Share of the loop's time above which measuring is called expensive."""

Rule = Callable[[Reading, Mapping[str, Reading]], str]


def sentence(reading: Reading, others: Mapping[str, Reading]) -> str:
    """What a reading says: a verdict where there is a rule, else what the number is.

    Args:
        reading: One reading.
        others: The latest reading of every key.

    Returns:
        One sentence.

    Example:
        >>> ratio = Reading("dynamics/fdr/ratio", 1.02, stderr=0.01)
        >>> sentence(ratio, {})[:10]
        'stationary'
    """
    name = "/".join(reading.key.split("/")[1:3])
    rule = RULES.get(name)
    if rule is None:
        return reading.sentence
    if not reading.is_finite and reading.resolved:
        return f"not resolved. {reading.sentence}"
    return rule(reading, others)


def _ratio(reading: Reading, others: Mapping[str, Reading]) -> str:
    away, error = abs(_value(reading) - 1), reading.stderr
    decided = others.get(reading.key.replace("/fdr/ratio", "/fdr/stationary"))
    decision = _value(decided) if decided is not None else math.nan
    if decision == 0.0 or away - 2 * error > STATIONARY:
        return "transient: the weights are still on their way. Keep the learning rate."
    if decision == 1.0 or (decided is None and away < STATIONARY and error < STATIONARY):
        return (
            "stationary: the norm of the weights has stopped drifting. More steps at this learning "
            "rate only average noise; lower it or stop."
        )
    return f"not resolved: {_reason(decided) or 'the window is still too short to tell'}."


def _stationary(reading: Reading, others: Mapping[str, Reading]) -> str:
    if not reading.resolved:
        return f"not decided: {_reason(reading)}."
    if _value(reading) == 1.0:
        return "the run has settled: lower the learning rate, raise the batch size, or stop."
    return "the run is still on its way."


def _reason(decided: Reading | None) -> str:
    """Why the run is called neither stationary nor transient."""
    return decided.note.rpartition("; ")[2] if decided is not None else ""


def _temperature(reading: Reading, others: Mapping[str, Reading]) -> str:
    if "without replacement" in reading.note:
        return (
            f"{reading.sentence} Batches are drawn without replacement, so directions that need longer than "
            "an epoch to relax are colder than this."
        )
    return reading.sentence


def _drift(reading: Reading, others: Mapping[str, Reading]) -> str:
    value = _value(reading)
    if value < LAZY:
        return "lazy so far: the kernel is close to its first value; the network acts like a linear model."
    if value > FEATURES:
        return "learning features: the kernel has changed a good part of itself."
    return "between lazy and feature learning."


def _scale(reading: Reading, others: Mapping[str, Reading]) -> str:
    if not reading.resolved:
        known = f" at least {reading.low:.3g}" if math.isfinite(reading.low) else ""
        return f"not resolved,{known}: the gradient is below its own noise; average longer."
    if "of the data set" in reading.note:
        return "about as large as the data set: the noise of the whole set is all that can be seen of it."
    key = reading.key.replace("/noise/scale", "/noise/critical_batch_fraction")
    fraction = _value(others[key]) if key in others else math.nan
    if fraction < SMALL_BATCH:
        return "noise-limited: a batch up to this size would save steps almost in proportion."
    if fraction > LARGE_BATCH:
        return "the batch is larger than the noise asks for: smaller ones would cost few extra steps."
    return "the batch is of the order of the noise scale: a balanced choice."


def _jacobian(reading: Reading, others: Mapping[str, Reading]) -> str:
    return (
        "mean change of the logits per unit change of the input; a steady rise means growing "
        "sensitivity to input noise."
    )


def _over_limit(reading: Reading, others: Mapping[str, Reading]) -> str:
    value, error = _value(reading), reading.stderr if math.isfinite(reading.stderr) else 0.0
    if not reading.resolved:
        return f"not resolved, at least {reading.low:.3g}: the largest curvature was not found."
    if value <= 0:
        return "no curvature is positive on the probe, so nothing limits the learning rate there."
    if value - 2 * error > 1:
        return (
            f"beyond the edge of stability: unless the loss falls all the same, divide the learning rate by "
            f"{value / EDGE:.2g}."
        )
    if value + 2 * error < EDGE:
        return f"stable: full-batch descent would bear {1 / value:.2g} times the learning rate."
    return "at the edge of stability: the learning rate sets the curvature. Lower it if the loss swings."


def _cost(reading: Reading, others: Mapping[str, Reading]) -> str:
    if _value(reading) > DEAR:
        return "measuring is a noticeable share of the loop: use longer cadences or budget=0.05."
    return "measuring is a small share of the loop."


def _value(reading: Reading) -> float:
    return reading.value if isinstance(reading.value, float) else math.nan


RULES: Mapping[str, Rule] = {
    "fdr/ratio": _ratio,
    "fdr/stationary": _stationary,
    "noise/temperature": _temperature,
    "noise/sgd_scale": _temperature,
    "ntk/drift": _drift,
    "noise/scale": _scale,
    "jacobian/frobenius_norm": _jacobian,
    "control/lr_over_limit": _over_limit,
    "cost/fraction": _cost,
}


def table(
    readings: Mapping[str, Reading],
    costs: Mapping[str, str],
    decisions: Sequence[str] = (),
    *,
    width: int = 118,
) -> str:
    """The closing table: reading, value and error, unit, sentence, cost; then what controllers decided.

    Args:
        readings: The latest reading of every key; arrays are left out.
        costs: Cost of each group, in words.
        decisions: What controllers decided, a sentence each.
        width: Columns of the terminal.

    Returns:
        Text of several lines.

    Example:
        >>> print(table({"d/ntk/drift": Reading("d/ntk/drift", 0.25, 0.01)}, {"ntk": "2 ms"}, width=80))
        reading        value ± error      unit  what it says
        -------------  -----------------  ----  ----------------------------------------
        ntk                                     cost: 2 ms
          drift        0.25 ± 0.01        1     between lazy and feature learning.
    """
    rows: list[tuple[str, str, str, str]] = []
    group = ""
    for key in sorted(readings):
        reading = readings[key]
        if not isinstance(reading.value, float):
            continue
        _, owner, name = key.split("/", 2)
        if owner != group:
            group = owner
            facts = [f"cost: {costs[group]}"] if group in costs else []
            rows.append((group, "", "", "; ".join(facts + [reading.note] * bool(reading.note))))
        rows.append((f"  {name}", _number(reading), reading.unit, sentence(reading, readings)))
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


def _line(cells: tuple[str, ...], sizes: list[int]) -> str:
    padded = [cell.ljust(size) for cell, size in zip(cells, sizes, strict=False)]
    return "  ".join([*padded, cells[3]]).rstrip()


def _number(reading: Reading) -> str:
    value = _value(reading)
    if not math.isfinite(value):
        bounded = not reading.resolved and math.isfinite(reading.low) and reading.low > 0
        return (
            f">= {reading.low:.4g}" if bounded else "not resolved" if not reading.resolved else "not measured"
        )
    if not math.isfinite(reading.stderr) or reading.stderr == 0:
        return f"{value:.4g}"
    return f"{value:.4g} ± {reading.stderr:.2g}"
