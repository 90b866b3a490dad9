"""What leaves the engine: readings and decisions, their keys and units, and the version of the record format.

Free of torch, so that a dashboard or a report can read records without importing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..errors import InputError, check_flag, check_kind, printable, shown

if TYPE_CHECKING:
    import numpy as np

RECORD_FORMAT = "gradiometer-records"
RECORD_FORMAT_VERSION = 2
"""2 adds lines with decisions."""


Verdict = Callable[["Reading", Mapping[str, "Reading"]], str]
"""What a reading says, from the reading and the latest one of every key: one sentence."""


@dataclass(frozen=True)
class Quantity:
    """The words for one reading name: what the number is, what it says, and where it is shown.

    Args:
        unit: The unit, in words that a plot can carry; ``"1"`` for a pure number.
        sentence: What the number is.
        verdict: What a number that was measured says and what to do about it; the sentence when ``None``.
        chart: Title of its chart on TensorBoard's custom-scalars page, shared with the readings of the same
            title; none when empty.
        formula: Its formula, for the documentation.
        cost: What measuring it takes, in backward passes of a named batch.
        source: Paper and equation.
        tells: What the number tells, in the documentation.
        act: What to do about it, in the documentation.

    Raises:
        InputError: If the unit or the sentence is empty.

    Example:
        >>> Quantity("samples", "Batch size at which noise and signal balance.").unit
        'samples'
    """

    unit: str
    sentence: str
    _: KW_ONLY
    verdict: Verdict | None = None
    chart: str = ""
    formula: str = ""
    cost: str = ""
    source: str = ""
    tells: str = ""
    act: str = ""

    def __post_init__(self) -> None:
        """Refuse a number without words."""
        for name in ("unit", "sentence", "chart", "formula", "cost", "source", "tells", "act"):
            check_kind(name, getattr(self, name), str, '"..."')
        if self.verdict is not None and not callable(self.verdict):
            raise InputError(
                "verdict must be a callable (reading, others) -> sentence",
                got=shown(self.verdict),
                fix='Write verdict=lambda reading, others: "...".',
            )
        if not (self.unit.strip() and self.sentence.strip()):
            raise InputError(
                "a quantity needs a unit and a sentence",
                got=f"Quantity({self.unit!r}, {self.sentence!r})",
                fix='Write Quantity("1", "What the number is."), with "1" as the unit of a pure number.',
            )


@dataclass(frozen=True)
class Reading:
    """One measured number, or array, with its error.

    Args:
        key: Full log key, ``dynamics/<group>/<name>`` and ``.../<parameter group>`` where there is one.
        value: A number, or an array (kernel, spectrum). ``nan`` when it could not be measured.
        stderr: Standard error of a number; ``nan`` when unknown, ``0`` when exact.
        unit: Unit of value and error.
        sentence: What the number is.
        note: How it came about: source, coverage, form.
        low: Lower end of the 95 % interval; ``nan`` when unknown.
        high: Upper end of the 95 % interval, infinite where there is only a lower bound.
        resolved: Whether the error allows an answer; where it does not, the value may be ``nan`` and the
            interval says what is known.
        quantity: The words for it, where the observable is at hand; not part of a record in a file.

    Example:
        >>> Reading("dynamics/ntk/drift", 0.25, stderr=0.01).is_finite
        True
    """

    key: str
    value: float | np.ndarray
    stderr: float = math.nan
    unit: str = "1"
    sentence: str = ""
    note: str = ""
    low: float = math.nan
    high: float = math.nan
    resolved: bool = True
    quantity: Quantity | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Take plain numbers for what they are, and refuse what is neither a number nor an array."""
        if not isinstance(self.key, str) or self.key.count("/") < 2:
            raise InputError(
                "the key of a reading has three parts", got=shown(self.key), fix='Write "prefix/group/name".'
            )
        if not hasattr(self.value, "tolist") or getattr(self.value, "ndim", None) == 0:
            object.__setattr__(self, "value", _number("value", self.value))
        for name in ("stderr", "low", "high"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in ("unit", "sentence", "note"):
            check_kind(name, getattr(self, name), str, '"..."')
        check_flag("resolved", self.resolved)
        check_kind("quantity", self.quantity, (Quantity, type(None)), 'Quantity("1", "What it is.")')

    @property
    def number(self) -> float:
        """The value; ``nan`` for an array."""
        return self.value if isinstance(self.value, float) else math.nan

    @property
    def why(self) -> str:
        """Why there is no answer, as the last part of the note says it; empty where there is one."""
        reason = self.note.rpartition("; ")[2]
        if self.resolved:
            missing = self.is_scalar and not self.is_finite
            return (reason if reason.startswith("not measured") else "not measured") if missing else ""
        if reason.startswith("not "):
            return reason
        return f"not resolved: {reason}" if reason else "not resolved"

    @property
    def is_scalar(self) -> bool:
        """Whether the value is a plain number."""
        return isinstance(self.value, float)

    @property
    def is_measured(self) -> bool:
        """Whether there is a number or an array, or the answer that the error does not allow one."""
        return not self.is_scalar or self.is_finite or not self.resolved

    @property
    def is_finite(self) -> bool:
        """Whether the value is a plain, finite number."""
        return isinstance(self.value, float) and math.isfinite(self.value)


@dataclass(frozen=True)
class Decision:
    """What a controller did at one check, or why it did nothing.

    Args:
        step: The optimizer step at which it was made; it takes effect at the next one.
        controller: Name of the controller's class.
        knob: ``"learning_rate"``, ``"batch_size"`` or ``"run"``, which is 1 while it goes on and 0 at its end.
        rule: What the readings were compared with, in words, with the thresholds.
        read: Value and standard error of each reading that went into it, by key without the prefix.
        before: The knob's setting, of the first parameter group it concerns.
        factor: What the setting is multiplied by from now on; 1 where nothing is done.
        reason: Why nothing is done, or why this much is.
        group: The parameter group, empty for all of them.
        dry_run: Whether it was only said, and the run not changed.

    Example:
        >>> decision = Decision(
        ...     step=4300, controller="EquilibriumLR", knob="learning_rate", rule="|fdr/ratio - 1| < 0.05",
        ...     read={"fdr/ratio": (1.013, 0.004)}, before=0.1, factor=0.1, reason="stationary at 2 checks",
        ... )
        >>> decision.acted, decision.after
        (True, 0.01)
        >>> print(decision.sentence())
        step 4300: learning_rate 0.1 -> 0.01: stationary at 2 checks (fdr/ratio 1.013 ± 0.004; rule: |fdr/ratio - 1| < 0.05)
    """  # noqa: E501

    step: int
    controller: str
    knob: str
    rule: str
    read: Mapping[str, tuple[float, float]]
    before: float
    factor: float = 1.0
    reason: str = ""
    group: str = ""
    dry_run: bool = False

    @property
    def wanted(self) -> bool:
        """Whether the readings call for a change."""
        return self.factor != 1.0

    @property
    def acted(self) -> bool:
        """Whether the run is changed."""
        return self.wanted and not self.dry_run

    @property
    def after(self) -> float:
        """The setting that was asked for, to the precision a person would write."""
        return float(f"{self.before * self.factor:.12g}")

    def sentence(self) -> str:
        """All of it in one line."""
        knob = f"{self.knob} of group {self.group}" if self.group else self.knob
        would = "would go " if self.dry_run and self.wanted else ""
        move = f"{would}{self.before:g} -> {self.after:g}" if self.wanted else f"stays at {self.before:g}"
        if self.knob == "run":  # 1 while it goes on, 0 at its end
            move = ("would end" if self.dry_run else "ends") if self.wanted else "goes on"
        seen = ", ".join(f"{key} {_with_error(*pair)}" for key, pair in self.read.items())
        facts = "; ".join([seen] * bool(seen) + [f"rule: {self.rule}"])
        return f"step {self.step}: {knob} {move}: {self.reason} ({facts})"

    def plain(self) -> dict[str, Any]:
        """Strings and numbers for JSON and checkpoints; what is not finite is ``None``."""
        read = {key: [_finite(value) for value in pair] for key, pair in self.read.items()}
        return {**asdict(self), "read": read}

    @classmethod
    def from_plain(cls, fields: Mapping[str, Any]) -> Decision:
        """The inverse of :meth:`plain`.

        Args:
            fields: What it returned, also after a round trip through JSON.
        """
        read = {
            key: tuple(math.nan if v is None else v for v in pair) for key, pair in fields["read"].items()
        }
        return cls(**{**fields, "read": read})


def _with_error(value: float, stderr: float) -> str:
    return f"{value:.4g} ± {stderr:.2g}" if math.isfinite(stderr) and stderr else f"{value:.4g}"


def _number(name: str, value: Any) -> float:
    """A plain number, from whatever kind of number it is; it may be ``nan`` or infinite."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real and getattr(value, "ndim", None) != 0:
        raise InputError(f"{name} must be a number", got=shown(value), fix=f"Write {name}=0.5, or math.nan.")
    return value if isinstance(value, float) else float(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def scalars(readings: tuple[Reading, ...] | list[Reading]) -> dict[str, float]:
    """Flatten number readings into ``{key: value}`` with ``<key>_stderr`` where an error is known.

    The error of a parameter group's reading ``a/b/name/group`` is ``a/b/name_stderr/group``.

    Args:
        readings: Readings of one step.

    Returns:
        A dictionary of plain floats, arrays left out.

    Example:
        >>> scalars([Reading("dynamics/ntk/drift", 0.25, stderr=0.01)])
        {'dynamics/ntk/drift': 0.25, 'dynamics/ntk/drift_stderr': 0.01}
    """
    flat: dict[str, float] = {}
    for reading in readings:
        if not isinstance(reading.value, float):
            continue
        flat[reading.key] = reading.value
        if math.isfinite(reading.stderr):
            flat[stderr_key(reading.key)] = reading.stderr
    return flat


def measured(readings: Sequence[Reading]) -> list[Reading]:
    """Those of one observable that were measured; none where nothing of it is a number or a bound.

    Args:
        readings: One record of one observable.

    Example:
        >>> lost = [Reading("d/fdr/ratio", math.nan, resolved=False), Reading("d/fdr/left", math.nan)]
        >>> measured(lost), len(measured([*lost, Reading("d/fdr/right", 0.5)]))
        ([], 2)
    """
    alive = any(not r.is_scalar or r.is_finite or math.isfinite(r.low) for r in readings)
    return [reading for reading in readings if alive and reading.is_measured]


def make_key(prefix: str, group: str, name: str) -> str:
    """Join prefix, observable group and reading name: ``dynamics/ntk/drift``.

    Args:
        prefix: First part of every key.
        group: The observable's group.
        name: Reading name, with ``/<parameter group>`` where it belongs to one.

    Example:
        >>> make_key("dynamics", "fdr", "ratio/head")
        'dynamics/fdr/ratio/head'
    """
    return f"{prefix}/{group}/{name}"


def last_part(name: object, otherwise: str = "") -> str:
    """A name that someone else gave, as the last part of a key: printable, without a slash, not empty.

    Args:
        name: What was given.
        otherwise: The name where nothing of it is left.

    Example:
        >>> last_part("head/bias"), last_part(" ", "0")
        ('head.bias', '0')
    """
    return printable(str(name)).replace("/", ".").strip() or otherwise


def stderr_key(key: str) -> str:
    """The key of a reading's standard error.

    Args:
        key: A full reading key with a prefix of one part.

    Example:
        >>> stderr_key("dynamics/fdr/ratio/head"), stderr_key("dynamics/fdr/ratio")
        ('dynamics/fdr/ratio_stderr/head', 'dynamics/fdr/ratio_stderr')
    """
    prefix, group, name, *rest = key.split("/")
    return "/".join([prefix, group, f"{name}_stderr", *rest])


def sibling(key: str, name: str) -> str:
    """The key of another reading of the same group and the same section.

    Args:
        key: A full reading key with a prefix of one part.
        name: Name of the other reading.

    Example:
        >>> sibling("dynamics/fdr/ratio/head", "stationary"), sibling("dynamics/fdr/ratio", "stationary")
        ('dynamics/fdr/stationary/head', 'dynamics/fdr/stationary')
    """
    prefix, group, _, *section = key.split("/", 3)
    return "/".join([prefix, group, name, *section])


def quantity_of(name: str, quantities: Mapping[str, Quantity], owner: str) -> Quantity:
    """The quantity behind a reading name that may carry a parameter group.

    Args:
        name: ``"ratio"`` or ``"ratio/head"``.
        quantities: An observable's table.
        owner: Who reads it, for the error.

    Raises:
        InputError: If the table has no words for the name.

    Example:
        >>> quantity_of("ratio/head", {"ratio": Quantity("1", "left over right")}, "Relation").unit
        '1'
    """
    base = name.split("/", 1)[0]
    if base not in quantities:
        raise InputError(
            f"{owner} has no words for its reading {base!r}",
            got=f"quantities for {sorted(quantities)}",
            fix=f'Add to its quantities: "{base}": Quantity("unit", "What the number is.").',
        )
    return quantities[base]
