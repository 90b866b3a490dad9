"""What leaves the engine: readings, their keys and units, and the version of the record format.

Free of torch, so that a dashboard or a report can read records without importing it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RECORD_FORMAT = "gradiometer-records"
RECORD_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Quantity:
    """What one reading name stands for: its unit and one sentence.

    Args:
        unit: The unit, in words that a plot can carry; ``"1"`` for a pure number.
        sentence: What the number is.

    Example:
        >>> Quantity("samples", "Batch size at which noise and signal balance.").unit
        'samples'
    """

    unit: str
    sentence: str


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

    @property
    def is_scalar(self) -> bool:
        """Whether the value is a plain number."""
        return isinstance(self.value, float)

    @property
    def is_finite(self) -> bool:
        """Whether the value is a plain, finite number."""
        return isinstance(self.value, float) and math.isfinite(self.value)


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


def quantity_of(name: str, quantities: Mapping[str, Quantity]) -> Quantity:
    """The quantity behind a reading name that may carry a parameter group.

    Args:
        name: ``"ratio"`` or ``"ratio/head"``.
        quantities: An observable's table.

    Raises:
        KeyError: If the observable did not declare the name.

    Example:
        >>> quantity_of("ratio/head", {"ratio": Quantity("1", "left over right")}).unit
        '1'
    """
    return quantities[name.split("/", 1)[0]]
