"""All instruments of a monitor: what is due, what fails, and what is read from one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

from ..collect.base import no_micro_batch
from ..collect.snapshot import Snapshot
from ..errors import CostWarning, SampleSkippedError, TooEarlyError
from ..observables import Observable
from ..record.readings import Reading
from .causes import description_of
from .cost import CostLedger
from .guard import Guard
from .instrument import TRIES, Instrument
from .ranks import Ranks
from .saved import Misfits
from .step import StepUnderWay, Taking

_AHEAD = 16
"""Steps that are looked through for the next one on which something is due: most are idle."""
_OF_ALL = frozenset({"gradient_parts", "example_parts", "norm_layer_parts"})
"""Fields that compare this process's gradient with the average over all of them."""


class Instruments:
    """The instruments of one monitor, by the group of their observable.

    Args:
        observables: What is measured.
        prefix: First part of every key.
        guard: Contains what observables raise.
        ranks: The processes of the run.
        feeds: Groups that controllers decide by; a budget does not thin them out.
    """

    def __init__(
        self, observables: Sequence[Observable], prefix: str, guard: Guard, ranks: Ranks, feeds: set[str]
    ) -> None:
        self._instruments = {observable.group: Instrument(observable, prefix) for observable in observables}
        self._prefix = prefix
        self._idle = range(0)
        """Steps on which nothing is due."""
        self._guard, self._ranks, self._feeds = guard, ranks, feeds
        ranks.parted = self._leave_out

    def __getitem__(self, group: str) -> Instrument:
        """The instrument of one group."""
        return self._instruments[group]

    @property
    def observables(self) -> list[Observable]:
        """What is measured."""
        return [instrument.observable for instrument in self._instruments.values()]

    @property
    def measure(self) -> bool:
        """Whether any of them still measures."""
        return any(not instrument.retired for instrument in self._instruments.values())

    def reasons(self) -> dict[str, str]:
        """Why nothing was read last, or not of late, by group."""
        named = {name: instrument.why or instrument.reason for name, instrument in self._instruments.items()}
        return {name: reason for name, reason in named.items() if reason}

    def begin(self, step: int) -> list[Taking]:
        """What is due at a step.

        Args:
            step: The optimizer step.
        """
        takings: list[Taking] = []
        if step in self._idle:
            return takings
        for instrument in self._instruments.values():
            try:
                taking = instrument.begin(step)
            except Exception as error:
                if not self._guard.contains:
                    raise
                self._settle(
                    instrument, Taking(instrument.name, False, frozenset()), error, step, ready=False
                )
                continue
            if taking is not None:
                takings.append(taking)
        self._idle = range(step, step if takings else self._next(step))
        return takings

    def _next(self, step: int) -> int:
        """The first step after this one on which something may be due, or where the look ahead ends."""
        for later in range(step + 1, step + 1 + _AHEAD):
            try:
                if not all(instrument.idle(later) for instrument in self._instruments.values()):
                    return later
            except Exception:  # of a schedule; it is said when that step begins
                return later
        return step + 1 + _AHEAD

    def affected(self, takings: Sequence[Taking], reason: str) -> bool:
        """Whether one of those due begins its window anew for this reason.

        Args:
            takings: What is due.
            reason: ``"settings"`` or ``"parameters"``.
        """
        return any(reason in self._instruments[taking.name].observable.restarts for taking in takings)

    def restart(self, reason: str) -> list[str]:
        """Begin the windows anew of all that cannot look across a change; their groups.

        Args:
            reason: ``"settings"`` or ``"parameters"``.
        """
        return [name for name, instrument in self._instruments.items() if instrument.restart(reason)]

    def evaluate(self, step: StepUnderWay, takings: Sequence[Taking], snapshot: Snapshot) -> None:
        """Run observables whose fields are complete.

        Args:
            step: The step under way.
            takings: What is to be taken from it.
            snapshot: All that observables may look at.
        """
        for taking in takings:
            taking.done, began = True, perf_counter()
            instrument = self._instruments[taking.name]
            try:
                if not snapshot.has("probe") and "probe" in taking.needs:
                    raise step.refusal or step.no_probe or no_micro_batch()
                missing = self._missing(step, taking) if step.errors else ()
                instrument.take(taking, snapshot)
                for error in missing:
                    what = f"{type(instrument.observable).__name__} at step {step.number}"
                    text = f"{what}: {description_of(error)} What rests on it is left out; the rest is read."
                    self._guard.warn(text, str(error))
            except Exception as error:
                self.keep(taking, error)
            taking.seconds += perf_counter() - began

    def _missing(self, step: StepUnderWay, taking: Taking) -> list[Exception]:
        """Errors behind fields the observable can do without; raises the first that it cannot."""
        optional = self._instruments[taking.name].observable.optional if self._guard.contains else frozenset()
        names = sorted(taking.needs & step.errors.keys())
        for name in names:
            if name not in optional:
                raise step.errors[name]
        return [step.errors[name] for name in names]

    def add(self, step: StepUnderWay, cost: CostLedger, budget: float | None) -> list[Taking]:
        """Average what was sampled; where something is recorded over processes too, and the budget is kept.

        Args:
            step: The step under way.
            cost: What measuring has cost so far.
            budget: Largest share of the loop's time; no limit when ``None``.

        Returns:
            What records at this step.
        """
        for taking in step.takings:
            error = taking.error
            if error is not None and not self._ranks.together:
                taking.error = None
                self._settle(self._instruments[taking.name], taking, error, step.number, ready=step.ready)
            try:
                self._instruments[taking.name].add(taking)
            except Exception as error:
                self.fail(step, taking, error)
        recording = [taking for taking in step.takings if taking.recording]
        if not recording:
            return []
        dearest = -1 if budget is None else cost.dearest(budget, self._instruments, self._feeds)
        if self._ranks.together:
            dearest = self._reduce(step, recording, dearest)
        if dearest >= 0:
            self._stretch(list(self._instruments.values())[dearest], cost, budget)
        return recording

    def _reduce(self, step: StepUnderWay, recording: Sequence[Taking], dearest: int) -> int:
        """Average over processes; the position of what is to be measured less often."""

        def settle(instrument: Instrument, taking: Taking, error: Exception) -> None:
            self._settle(instrument, taking, error, step.number, ready=step.ready)

        pairs = [(self._instruments[taking.name], taking) for taking in recording]
        return self._ranks.reduce(step.number, pairs, settle, dearest)

    def _leave_out(self) -> None:
        """What needs every process at the same step, and cannot know any more whether it is."""
        for instrument in self._instruments.values():
            instrument.retired = instrument.retired or bool(instrument.needs & _OF_ALL)

    def read(
        self,
        step: StepUnderWay,
        recording: Sequence[Taking],
        label: Callable[[str], str],
        latest: Mapping[str, Reading],
    ) -> list[Reading]:
        """Readings of those that record; ``nan`` where they cannot be had.

        Args:
            step: The step under way.
            recording: What records.
            label: Puts a section's name in the place of its index.
            latest: The latest reading of every key.
        """
        readings = []
        for taking in recording:
            began = perf_counter()
            instrument = self._instruments[taking.name]
            if not taking.failed:
                skips = instrument.skips
                if self._ranks.together:  # before what one process alone may fail in
                    instrument.settled()
                try:
                    readings += instrument.read(taking, step.number, label)
                except SampleSkippedError as error:  # by what was averaged: on all processes, if on one
                    if not self._guard.contains:
                        raise
                    instrument.skips = skips
                    self._settle(instrument, taking, error, step.number, ready=step.ready)
                except Exception as error:
                    self.fail(step, taking, error)
            if taking.failed and not instrument.owed:
                readings += instrument.unknown(latest)
            taking.seconds += perf_counter() - began
        return readings

    def keep(self, taking: Taking, error: Exception) -> None:
        """Contain an error until the step has been made, since one that is not made is measured again.

        Args:
            taking: What was to be taken.
            error: Why it could not be.
        """
        if not self._guard.contains and not isinstance(error, TooEarlyError):
            raise error
        self._ranks.keep(taking, error)

    def fail(self, step: StepUnderWay, taking: Taking, error: Exception) -> None:
        """Contain an error; on several processes all settle it at their next record.

        A thorough sample that fails before its record is tried again there, and fails for good there.

        Args:
            step: The step under way.
            taking: What was to be taken from it.
            error: Why it could not be.
        """
        if not self._guard.contains:
            raise error
        if self._ranks.together:
            self._ranks.keep(taking, error)
        elif taking.thorough and not taking.recording and not isinstance(error, SampleSkippedError):
            taking.drop()
        else:
            self._settle(self._instruments[taking.name], taking, error, step.number, ready=step.ready)

    def _settle(
        self, instrument: Instrument, taking: Taking, error: Exception, step: int, *, ready: bool
    ) -> None:
        """Say it once, and let the instrument try again or retire."""
        what = f"{type(instrument.observable).__name__} at step {step}"
        instrument.reason = description_of(error)
        if isinstance(error, SampleSkippedError):
            instrument.skip(taking, error)
            # where before_step() is missing, one warning has said so
            if ready and not isinstance(error, TooEarlyError):
                text = f"{what}: {description_of(error)} The sample is left out; the next steps are tried."
                self._guard.warn(text, str(error))
            return
        instrument.fail(taking, error)
        taking.recording = taking.recording or instrument.retired  # what was read last is no longer true
        fate = f"It reads nan, and is left out after {TRIES} failures in a row."
        if instrument.retired:
            fate = "It is left out from here on."
            if instrument.name in self._feeds:
                fate += " Controllers that decide by it do nothing from here on."
        text = instrument.reason
        self._guard.warn(f"{what}: {text} {fate} Training goes on.", f"{instrument.name}:{text}")

    def owe(self, takings: Sequence[Taking]) -> None:
        """The step was not made: its records are taken from the next one.

        Args:
            takings: What was to be taken from it.
        """
        for taking in takings:
            instrument = self._instruments[taking.name]
            instrument.owed = instrument.owed or taking.recording

    def _stretch(self, instrument: Instrument, cost: CostLedger, budget: float | None) -> None:
        """Double the cadence of the dearest observable."""
        instrument.stretch *= 2
        cost.stretched(instrument.name)
        message = f"measuring is above budget={budget}: {instrument.name} is measured half as often"
        self._guard.warn(message, instrument.name, CostWarning)

    def state_dict(self) -> dict[str, Any]:
        """States by group; one that cannot be had is left out, and that is said."""
        states = {}
        for name, instrument in self._instruments.items():
            try:
                states[name] = instrument.state_dict()
            except Exception as error:
                if not self._guard.contains:
                    raise
                text = f"the checkpoint is made without {name}: {description_of(error)}"
                self._guard.warn(f"{text} After resuming from it, {name} begins anew.", f"saving {name}")
        return states

    def resume(
        self, saved: Mapping[str, Any], unfit: Callable[[Observable], str], misfits: Misfits
    ) -> list[str]:
        """Continue from :meth:`state_dict`; each goes on as a whole, or begins anew.

        Args:
            saved: What it returned.
            unfit: Why an observable cannot go on, empty where it can.
            misfits: Where it is noted that one begins anew.

        Returns:
            Groups that are not measured here.
        """
        self._idle = range(0)
        for name, instrument in self._instruments.items():
            observable = instrument.observable
            self._instruments[name] = Instrument(observable, self._prefix)
            reason = unfit(observable)
            if not reason and name in saved:
                try:
                    self._instruments[name] = instrument.resumed(saved[name])
                except Exception as error:
                    reason = description_of(error).removesuffix(".")
            if reason:
                misfits.add(reason, name)
        return [name for name in saved if name not in self._instruments]
