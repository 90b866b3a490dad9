"""What a run may read, in words, for recorders that lay out a page before the first number is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..observables import Observable, default_observables
from ..record.readings import Quantity, make_key
from .cost import COST_GROUP, COST_QUANTITIES


def expected_words(prefix: str, observables: Sequence[Observable]) -> dict[str, Quantity]:
    """The words for every reading that may come, by full key.

    The default set is there whether it is measured or not, since a page in TensorBoard serves all runs of a
    folder; then the costs, then whatever else is measured.

    Args:
        prefix: First part of every key.
        observables: What is measured.

    Example:
        >>> list(expected_words("d", []))[0]
        'd/ntk/drift'
    """
    default = _by_key(prefix, default_observables())
    costs = {make_key(prefix, COST_GROUP, name): quantity for name, quantity in COST_QUANTITIES.items()}
    return {**default, **costs, **_by_key(prefix, observables)}


def _by_key(prefix: str, observables: Iterable[Observable]) -> dict[str, Quantity]:
    return {
        make_key(prefix, observable.group, name): quantity
        for observable in observables
        for name, quantity in observable.quantities.items()
    }
