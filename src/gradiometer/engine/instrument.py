"""One observable with its estimator in a running monitor: when it is due, what it reads, when it gives up."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..collect.registry import COLLECTORS
from ..collect.snapshot import Snapshot
from ..errors import InputError, TooEarlyError, UnsupportedError
from ..observables.base import Estimate, Observable, as_sample
from ..record.readings import Reading, make_key, measured, quantity_of
from ..stats.estimators import Estimator
from ..stats.jackknife import correlated_jackknife, t_quantile
from .causes import description_of
from .saved import opened, sealed
from .step import Taking

TRIES = 3
"""Failures in a row after which an observable is left out; skipped samples after which its record is."""

_BEGUN_ANEW = {
    "settings": "its window began anew, because the optimizer's settings or the batch size jumped.",
    "parameters": "its window began anew, because other parameters are trained.",
}

_REMEMBERED = ("stretch", "seen", "fresh", "note", "owed", "skips", "failures", "retired")


class _Plan(NamedTuple):
    """Whether a step counts as due, records, is sampled, and whether the sample is thorough."""

    counted: bool
    recording: bool
    sampling: bool
    thorough: bool

    def with_record(self, *, fresh: bool) -> _Plan:
        """The same with a record, which takes a sample itself unless there is a fresh one."""
        return self._replace(
            recording=True, sampling=self.sampling or not fresh, thorough=self.thorough or not fresh
        )


class Instrument:
    """One observable, its estimator, and what is remembered about the pair.

    Args:
        observable: What is measured.
        prefix: First part of every key.
    """

    def __init__(self, observable: Observable, prefix: str) -> None:
        self.observable = observable
        self.estimator = copy.deepcopy(cast("Estimator", observable.estimator))
        self._prefix = prefix
        self.needs = observable.required(True) | observable.required(False) | observable.level_needs
        self._ahead = frozenset(name for name in self.needs & COLLECTORS.keys() if COLLECTORS[name].ahead)
        self.stretch = 1
        """Only one of so many due steps is measured, to keep a budget."""
        self.seen = 0
        """Due steps so far."""
        self.fresh = False
        """Whether a thorough sample was taken since the last record; a record without one takes it itself."""
        self.note = ""
        """What the last thorough sample had to say."""
        self.owed = False
        """Whether a record is outstanding, because its step could not be measured."""
        self.skips = self.failures = 0
        """Records skipped, and failures, since the last reading."""
        self.retired = False
        self.why = ""
        """Why nothing was read last, as a clause that begins with "not "; empty where something was."""
        self.reason = ""
        """Why something that was read before is not read of late."""
        self._keys_read: set[str] = set()

    @property
    def name(self) -> str:
        """The observable's group."""
        return self.observable.group

    def begin(self, step: int) -> Taking | None:
        """What is to be taken from this step, ``None`` where nothing is due.

        Args:
            step: The optimizer step.
        """
        if self.retired:
            return None
        observable = self.observable
        plan = self._plan(step, fresh=self.fresh)
        if self.owed and not plan.recording:
            plan = plan.with_record(fresh=self.fresh and observable.draws is not None)
        self.seen += plan.counted
        ahead: frozenset[str] = frozenset()
        if self._ahead and self._plan(step + 1, fresh=self.fresh or plan.thorough).sampling:
            ahead = self._ahead
        if not (plan.recording or plan.sampling or ahead):
            return None
        needs = observable.required(plan.thorough) if plan.sampling else frozenset()
        if plan.recording:
            needs |= observable.level_needs
        return Taking(
            observable.group,
            plan.recording,
            needs,
            ahead,
            plan.sampling,
            plan.thorough,
            done=not (plan.recording or plan.sampling),  # nothing is evaluated at this step
        )

    def idle(self, step: int) -> bool:
        """Whether nothing will come of a step, as far as is known now.

        Args:
            step: A later optimizer step.
        """
        if self.retired or self.owed:
            return self.retired
        observable = self.observable

        def counts(at: int) -> bool:
            return observable.samples(at, self.stretch) or observable.due(at)

        return not counts(step) and not (self._ahead and counts(step + 1))

    def _plan(self, step: int, *, fresh: bool) -> _Plan:
        """What is due at a step, were it the next."""
        observable, stretch = self.observable, self.stretch
        counted = observable.samples(step) if observable.draws is None else observable.due(step)
        chosen = counted and self.seen % stretch == 0
        if observable.draws is None:
            recording = chosen and observable.due(step)
            return _Plan(counted, recording, chosen, recording)
        sampling = observable.samples(step, stretch)
        thorough = not fresh and (chosen or (sampling and observable.draws.chosen(step, stretch)))
        return _Plan(counted, chosen, sampling or thorough, thorough)

    def take(self, taking: Taking, snapshot: Snapshot) -> None:
        """Evaluate the observable.

        Args:
            taking: Where the sample goes.
            snapshot: All that the observable may look at.
        """
        answer = self.observable.statistics(snapshot) if taking.sampling else None
        if answer is not None:  # else it is not there yet
            taking.sample, taking.weight = as_sample(answer)
        if taking.thorough:
            self.note = self.observable.note(snapshot)
        if taking.recording:
            taking.levels = self.observable.levels(snapshot)

    def add(self, taking: Taking) -> None:
        """Average what was sampled.

        Args:
            taking: What was taken from this step.
        """
        if taking.sample is not None and not taking.failed:
            self.estimator.add(taking.sample, taking.weight)
            self.fresh = self.fresh or taking.thorough

    def read(self, taking: Taking, step: int, label: Callable[[str], str]) -> list[Reading]:
        """Close the block, read the averages, and add errors from leaving blocks out.

        Args:
            taking: What was taken from this step.
            step: The optimizer step.
            label: Puts a section's name in the place of its index.
        """
        if taking.sample is None and not self.estimator.pending[0] and not self.estimator.replicates()[0]:
            self.settled()
            return []  # not yet
        self.estimator.close(step, taking.levels)
        reference = self.estimator.reference()
        rows, weights = self.estimator.replicates()
        now = rows | self.estimator.levels()
        values = self.observable.readings(now, reference) if now or reference.samples else {}
        self.observable.check_words(values)
        numbers = {
            name: _as_rows(value) for name, value in values.items() if name not in self.observable.arrays
        }
        errors = _errors({name: row for name, row in numbers.items() if len(row) > 1}, weights)
        readings = []
        for name, value in values.items():
            estimate = value if isinstance(value, Estimate) else Estimate(value)
            own_note = estimate.note or "not resolved" * (not estimate.resolved)
            note = "; ".join(filter(None, (self.note, own_note)))
            if name in numbers:
                readings.append(self._number(label(name), numbers[name], estimate, errors.get(name), note))
            else:
                array = value.detach().cpu().numpy()
                readings.append(self._reading(label(name), array, note=note, resolved=estimate.resolved))
        self.settled()
        self._compare(readings)
        return readings

    def _compare(self, readings: list[Reading]) -> None:
        """Whether all is read that was ever read."""
        keys = {reading.key for reading in measured(readings)}
        if keys >= self._keys_read:
            self.reason = ""
        elif len(keys) < len(readings):
            self.reason = "it is not a finite number."
        self._keys_read |= keys

    def _number(
        self, name: str, row: Tensor, estimate: Estimate, jackknife: tuple[float, int] | None, note: str
    ) -> Reading:
        """A reading with its 95 % interval, the engine's where the observable gives none."""
        value = float(row[0])
        stderr, groups = jackknife or (math.nan, 0)
        if estimate.stderr is not None:
            stderr = float(_as_rows(estimate.stderr)[0])
        half = t_quantile(groups) * stderr
        return self._reading(
            name,
            value,
            stderr=stderr,
            note=note,
            low=value - half if estimate.low is None else estimate.low,
            high=value + half if estimate.high is None else estimate.high,
            resolved=estimate.resolved,
        )

    def unknown(self, latest: Mapping[str, Reading]) -> list[Reading]:
        """``nan`` under every name the observable reads, arrays aside.

        Args:
            latest: The latest reading of every key.
        """
        arrays = {key for key, reading in latest.items() if not isinstance(reading.value, float)}
        return [
            self._reading(name, math.nan, note=self.why)
            for name in self.observable.quantities
            if name in self.observable.names - self.observable.arrays
            and make_key(self._prefix, self.name, name) not in arrays
        ]

    def _reading(self, name: str, value: Any, **facts: Any) -> Reading:
        quantity = quantity_of(name, self.observable.quantities, type(self.observable).__name__)
        key = make_key(self._prefix, self.name, name)
        return Reading(key, value, unit=quantity.unit, sentence=quantity.sentence, quantity=quantity, **facts)

    def settled(self) -> None:
        """A reading is there: nothing is owed, and failures are counted anew."""
        self.owed, self.fresh, self.skips, self.failures, self.why = False, False, 0, 0, ""

    def skip(self, taking: Taking, error: Exception) -> None:
        """A sample could not be had at this step; the next ones are tried, for a record a few times.

        Args:
            taking: What was to be taken.
            error: Why it could not be.
        """
        taking.drop()
        early = isinstance(error, TooEarlyError)
        self.why = f"{'not yet' if early else 'not measured'}: {description_of(error).rstrip('.')}"
        if taking.recording:
            self.skips += 1
            self.owed = self.skips % (TRIES + 1) != 0

    def fail(self, taking: Taking, error: Exception) -> None:
        """Retire what can never work, or has failed too often; the rest is tried again when it is due.

        Args:
            taking: What was to be taken.
            error: Why it failed.
        """
        taking.drop()
        self.why = f"not measured: {description_of(error).rstrip('.')}"
        self.failures += 1
        self.owed = False
        self.retired = isinstance(error, UnsupportedError) or self.failures >= TRIES

    def restart(self, reason: str) -> bool:
        """Begin the window anew if this observable cannot look across the change.

        Args:
            reason: What has changed: ``"settings"`` or ``"parameters"``.

        Returns:
            Whether it began anew.
        """
        if reason not in self.observable.restarts:
            return False
        self.estimator.reset(everything=reason == "parameters")
        self.reason = _BEGUN_ANEW[reason]
        self.fresh = False
        return True

    def state_dict(self) -> dict[str, Any]:
        """The estimator's state, what is remembered, and what both rest on; tensors and plain values."""
        remembered = {name: getattr(self, name) for name in _REMEMBERED}
        state = {"estimator": self.estimator.state_dict(), "rests_on": self.observable.rests_on()}
        return sealed(state | remembered)

    def resumed(self, saved: Any) -> Instrument:
        """One for the same observable that goes on from :meth:`state_dict`.

        Args:
            saved: What it returned.

        Raises:
            InputError: If that is damaged, or of other settings.
        """
        content = opened(saved)
        if content is None:
            raise InputError("its part of the checkpoint is damaged")
        if content["rests_on"] != self.observable.rests_on():
            raise InputError("it was measured with other settings")
        fresh = Instrument(self.observable, self._prefix)
        fresh.estimator.load_state_dict(content["estimator"])
        for name in _REMEMBERED:
            setattr(fresh, name, content[name])
        return fresh


def _as_rows(value: Any) -> Tensor:
    """A number, or a number and its replicates, as ``[R]``."""
    number = value.value if isinstance(value, Estimate) else value
    if isinstance(number, float):
        return torch.tensor([number], dtype=torch.float64)
    return torch.as_tensor(number, dtype=torch.float64).detach().cpu().reshape(-1)


def _errors(rows: Mapping[str, Tensor], weights: Tensor) -> dict[str, tuple[float, int]]:
    """Standard errors from the replicates that each leave a block out, and the groups behind each."""
    if not rows:
        return {}
    stacked = torch.stack(list(rows.values()), 1)
    stacked = stacked.where(stacked.isfinite(), math.nan)
    error = correlated_jackknife(stacked[0], stacked[1:], weights)
    return dict(zip(rows, zip(error.stderr.tolist(), error.groups.tolist(), strict=True), strict=True))
