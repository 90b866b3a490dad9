"""What measuring costs: medians of observed times, as a share of the user's own loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from statistics import median

from ..record.readings import Quantity, Reading, make_key

_KEPT = 64
DEAR = 0.05
"""Share of the loop's time above which measuring is called expensive."""


def _fraction_says(reading: Reading, others: Mapping[str, Reading]) -> str:
    if reading.number > DEAR:
        return "measuring is a noticeable share of the loop: use longer cadences or budget=0.05."
    return "measuring is a small share of the loop."


COST_GROUP = "cost"
FRACTION, SECONDS = "fraction", "seconds"
COST_QUANTITIES: Mapping[str, Quantity] = {
    FRACTION: Quantity(
        "1",
        "Time spent measuring over the loop's own time, since the beginning.",
        verdict=_fraction_says,
        chart="cost",
        formula="time spent measuring / time of the loop without it",
        tells="since the beginning of the process",
        act="too much: longer cadences, or `budget=0.05`",
    ),
    SECONDS: Quantity(
        "s",
        "Host time the observables took at this step.",
        formula="host time of the observables due at this step",
        tells="what one record takes",
    ),
}


class CostLedger:
    """Seconds spent by each observable, the distance between its events, and the user's step time.

    Host time: on an accelerator it includes waiting for the device at recording steps only. Holds a
    bounded number of timings and is not part of a checkpoint.

    Example:
        >>> ledger = CostLedger()
        >>> for step in range(20):
        ...     if step % 5 == 0:
        ...         ledger.spent("ntk", step, 0.1)
        ...     ledger.step_done(1.0, 0.1 if step % 5 == 0 else 0.0)
        >>> round(ledger.shares()["ntk"], 3), round(ledger.fraction(), 3)
        (0.02, 0.02)
    """

    def __init__(self) -> None:
        self._costs: dict[str, deque[float]] = {}
        self._gaps: dict[str, deque[int]] = {}
        self._last: dict[str, int] = {}
        self._at: dict[str, int] = {}
        self._done = 0
        self._steps: deque[float] = deque(maxlen=_KEPT)
        self._user_seconds = 0.0
        self._own_seconds = 0.0

    def spent(self, name: str, step: int, seconds: float, *, event: bool = True) -> None:
        """Note one event of an observable.

        Args:
            name: The observable's group.
            step: The step it happened at.
            seconds: Host time.
            event: Whether it was sampled; what else is done for it belongs to the sample before.
        """
        if not event:
            if name in self._costs:
                self._costs[name][-1] += seconds
            return
        last = self._last.get(name)
        if last is None:
            self._costs[name] = deque(maxlen=_KEPT)
        elif step > last:
            if name not in self._gaps:
                self._gaps[name] = deque(maxlen=8)
            self._gaps[name].append(step - last)
        self._costs[name].append(seconds)
        self._last[name], self._at[name] = step, self._done

    def step_done(self, user_seconds: float, own_seconds: float) -> None:
        """Note one optimizer step.

        Args:
            user_seconds: The loop's time without measuring.
            own_seconds: Time spent measuring.
        """
        self._done += 1
        self._steps.append(user_seconds)
        self._user_seconds += user_seconds
        self._own_seconds += own_seconds

    def fraction(self) -> float | None:
        """All time spent measuring over all time of the loop without it; unknown at the first step."""
        return self._own_seconds / self._user_seconds if self._user_seconds > 0 else None

    def shares(self) -> dict[str, float]:
        """Median cost times cadence over the median step, by observable; after its second event.

        A schedule that thins out, as log-spaced ones do, counts with the distance it has reached.
        """
        if not self._steps or median(self._steps) <= 0:
            return {}
        step = median(self._steps)
        return {
            name: median(self._costs[name]) / (max(median(gaps), gaps[-1]) * step)
            for name, gaps in self._gaps.items()
        }

    def readings(self, prefix: str, seconds: float) -> list[Reading]:
        """What measuring costs, as readings.

        Args:
            prefix: First part of every key.
            seconds: Host time the observables took at this step.
        """
        costs, fraction = {SECONDS: seconds}, self.fraction()
        if fraction is not None:
            costs[FRACTION] = fraction
        return [
            Reading(
                make_key(prefix, COST_GROUP, name),
                value,
                unit=COST_QUANTITIES[name].unit,
                sentence=COST_QUANTITIES[name].sentence,
                quantity=COST_QUANTITIES[name],
            )
            for name, value in costs.items()
        ]

    def dearest(self, budget: float, names: Iterable[str], fixed: Collection[str]) -> int:
        """Position of the dearest observable where all of them together are above the budget, else -1.

        Args:
            budget: Largest share of the loop's time.
            names: The observables' groups, in order.
            fixed: Those whose cadence is not to be changed.
        """
        shares = {name: share for name, share in self.shares().items() if name not in fixed}
        if sum(shares.values()) <= budget:
            return -1
        return list(names).index(max(shares, key=lambda name: shares[name]))

    def stretched(self, name: str) -> None:
        """Expect an observable's events at twice the distance from now on.

        Args:
            name: The observable's group.
        """
        if name not in self._gaps:  # on another process it may have had no second event
            return
        gaps = self._gaps[name]
        self._gaps[name] = deque([round(2 * median(gaps))], maxlen=gaps.maxlen)

    def describe(self) -> dict[str, str]:
        """Median cost per event and share, in words, by observable; one that was left out fades away."""
        shares, words = self.shares(), {}
        for name, costs in self._costs.items():
            words[name] = f"{1000 * median(costs):.2g} ms each time"
            if name in shares:
                since = (self._done - self._at[name]) / max(median(self._gaps[name]), self._gaps[name][-1])
                words[name] += f", {100 * shares[name] / max(since, 1.0):.2g} % of the loop"
        return words
