"""What is measured of a run, step by step: found due, gathered, evaluated, averaged, read and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from .. import parallel
from ..collect.base import Memory, Training
from ..collect.compilation import CompilerWatch
from ..collect.registry import COLLECTORS
from ..collect.snapshot import Probe, Snapshot
from ..control import Controller, View
from ..observables import Observable
from ..record.base import Recorder
from ..record.readings import Decision, Reading
from .calls import Calls, Hints, Shown
from .changes import Settings
from .checkpoint import Resumable
from .cost import CostLedger
from .division import Division
from .guard import Guard
from .instruments import Instruments
from .output import Output
from .ranks import Ranks
from .steering import Steering
from .step import EARLY, StepUnderWay, Taking
from .step_watch import StepWatch

MODEL = "another model"


class Measurement(Resumable):
    """The rooms of the engine, and the way of one step through them.

    Args:
        training: What is being trained.
        observables: What is measured.
        controllers: What acts on readings.
        recorders: Where readings go.
        guard: Contains errors, and counts time.
        hints: What is said of the network's calls.
        probe: The fixed batch, where one was given, or ``"forget"``.
        probe_size: Examples in a probe that is taken from the first batch.
        dataset_size: Examples in the training set, where it is known.
        replacement: Whether batches are drawn with replacement, where it is known.
        fixed_order: Whether every epoch takes the same batches, where it is known.
        layers: Whether each layer is a section.
        prefix: First part of every key.
        budget: Largest share of the loop's time.
    """

    def __init__(
        self,
        training: Training,
        observables: Sequence[Observable],
        controllers: Sequence[Controller],
        recorders: Sequence[Recorder],
        guard: Guard,
        *,
        hints: Hints,
        probe: Probe | Literal["forget"] | None,
        probe_size: int,
        dataset_size: int | None,
        replacement: bool | None,
        fixed_order: bool | None,
        layers: bool,
        prefix: str,
        budget: float | None,
    ) -> None:
        model, optimizer = training.model, training.optimizer
        self.training, self.guard = training, guard
        self._forgets_probe = probe == "forget"
        self.probe = probe if isinstance(probe, Probe) else None
        self._probe_is_given, self._probe_is_taken = self.probe is not None, False
        self.cost = CostLedger()
        self.output = Output(prefix, recorders, guard, observables)
        self.compiler = CompilerWatch()
        self.calls = Calls(training, hints, self.compiler)
        self.division = Division(model, optimizer, self.calls, guard, layers=layers)
        self.steering = Steering(controllers, optimizer, self.division.names, guard, prefix)
        self.ranks = Ranks(model, prefix, guard)
        self.instruments = Instruments(observables, prefix, guard, self.ranks, self.steering.feeds)
        self.memories: dict[str, Memory] = {name: {} for name in COLLECTORS}
        self.settings = Settings()
        self.step_watch = StepWatch(training)
        self._probe_size, self._dataset_size, self._replacement = probe_size, dataset_size, replacement
        self._controllers, self._prefix, self._budget = tuple(controllers), prefix, budget
        self._fixed_order = fixed_order
        self._updates = self._micro_batches_before = 0
        self._idle = StepUnderWay(0, self.division.sections)

    def meet(self, step: int) -> None:
        """Other processes are told of this one, at the first batch.

        Args:
            step: The optimizer step.
        """
        if not self.ranks.announced:
            plan = (self.instruments.observables, self._budget, self._controllers, step, self.probe is None)
            self.ranks.announce(plan)

    def _agree(self) -> None:
        """Once, after a first backward pass: whether all processes measure the same, on rank 0's probe."""
        if self.ranks.together is None:
            probe = self.ranks.agree(self.probe if self._probe_is_taken else None)
            self.probe = probe or self.probe

    def enter(self, step: StepUnderWay, shown: Shown) -> None:
        """A micro-batch begins.

        Args:
            step: The step under way.
            shown: The micro-batch.
        """
        size = self.calls.size(shown.x)
        step.sizes.append(size)
        if step.takings:
            self.calls.listen(shown, needed=step.asks_for_batch)
            step.enter(size)

    def exit(self, step: StepUnderWay, shown: Shown, *, broken: bool) -> None:
        """Its backward pass is done, or an exception has ended it.

        Args:
            step: The step under way.
            shown: The micro-batch.
            broken: Whether it ended in an exception.
        """
        step.exit()
        step.broken = broken
        if broken:
            self.calls.stop()
        else:
            self._learn(step, shown)

    def _learn(self, step: StepUnderWay, shown: Shown) -> None:
        """Take the probe, at the first batch."""
        capture = self.calls.heard(step, shown)
        self._tell(self.calls.remark)
        step.refusal = self.calls.refusal
        if self.probe is None and step.refusal is None and self.instruments.measure:
            try:
                self.probe = Probe(*self.calls.probe(capture, shown, self._probe_size))
            except Exception as error:  # said by what needs the probe
                if not self.guard.contains:
                    raise
                step.no_probe = error
                return
            self._probe_is_taken = True
            self._divide(step.takings)
            step.sections = self.division.sections

    def begin(self, number: int) -> StepUnderWay:
        """Find out what is due and make the collectors for it, and for nothing else.

        Args:
            number: The optimizer step.
        """
        takings = self.instruments.begin(number)
        if not takings:
            self._idle.number, self._idle.ready = number, False
            self._idle.sizes.clear()
            return self._idle
        self._divide(takings)
        step = StepUnderWay(
            number,
            self.division.sections,
            micro_batches_before=self._micro_batches_before,
            updates=self._updates,
            drifts=self.settings.drifts,
            compiler=self.compiler,
            reduction=self.calls.reduction,
            loss=self.calls.loss,
            terms=self.calls.terms,
            axes=self.calls.axes,
            refusal=self.calls.refusal,
            recording=any(taking.recording or taking.thorough for taking in takings),
            takings=takings,
        )
        step.collect(self.training, self.memories)
        return step

    def joined(self, step: StepUnderWay | None) -> StepUnderWay | None:
        """The step that a new micro-batch belongs to; ``None`` where it begins one.

        Without any gradient in place, what came before was given up, or the optimizer skipped its step.

        Args:
            step: The step under way.
        """
        self._tell(self.step_watch.batch_began())
        if step is None or (not step.ready and not step.sizes):
            return step
        in_place = any(parameter.grad is not None for parameter in self.training.parameters())
        if step.ready and not (in_place and step.sizes):
            return None
        if step.ready:
            step.go_on()
        elif not in_place:
            step.sizes[:] = [0] * len(step.sizes)
        return step

    def _tell(self, message: str) -> None:
        if message:
            self.guard.warn(message)

    def _divide(self, takings: Sequence[Taking]) -> None:
        """Keep the sections of parameters right."""
        divided = self.instruments.affected(takings, "parameters")
        thorough = any(taking.recording for taking in takings)
        if self.division.follow(self.probe if divided else None, thorough=thorough):
            self.restart("parameters")

    def restart(self, reason: str) -> None:
        """Begin the windows anew of all that cannot look across a change.

        Args:
            reason: ``"settings"`` or ``"parameters"``.
        """
        self.output.restart(self.instruments.restart(reason))
        for name, memory in self.memories.items():
            if COLLECTORS[name].of_window:
                memory.clear()

    def evaluate(self, step: StepUnderWay, takings: Sequence[Taking]) -> None:
        """Run the observables whose fields are complete at this moment.

        Args:
            step: The step under way.
            takings: What is to be taken from it.
        """
        if takings:
            fields = step.fields({need for taking in takings for need in taking.needs})
            self.instruments.evaluate(step, takings, self._snapshot(step, fields))

    def _snapshot(self, step: StepUnderWay, fields: dict[str, Any]) -> Snapshot:
        """The gathered fields, and those that cost nothing."""
        if step.sizes:
            fields["batch_size"] = _examples(step)
        if self._replacement is not None:
            fields["replacement"] = self._replacement
        if self._fixed_order is not None:
            fields["fixed_order"] = self._fixed_order
        if self.probe is not None:
            fields["probe"] = self.probe
        if self._dataset_size is not None:
            fields["dataset_size"] = self._dataset_size
        return Snapshot(
            step=step.number,
            model=self.training.model,
            forward=self.calls.forward,
            groups=self.division.groups,
            sections=self.division.sections.sections,
            loss_reduction=step.reduction,
            loss_fn=self.training.loss_fn,
            **fields,
        )

    def look_at_gradient(self, step: StepUnderWay) -> None:
        """Evaluate what needs no update: the weights are still those of this batch's loss.

        Args:
            step: The step under way.
        """
        self._tell(self.step_watch.step_announced())
        self._agree()
        step.apart = self.ranks.apart
        self.calls.settle(step)
        with self.steering.rates_in_force():
            step.before_step()
            early = [taking for taking in step.takings if not taking.done and taking.needs <= EARLY]
            if early:
                self.division.read_settings()
                self.evaluate(step, early)

    def update_made(self, step: StepUnderWay | None) -> None:
        """Count the update; begin windows anew where it was made under other settings.

        Args:
            step: The step under way, where its batch was shown.
        """
        self._updates += 1
        self.step_watch.end()
        examples = 0 if step is None else sum(step.sizes)
        if self.settings.jumped(self.training.optimizer, examples) or self.steering.turned:
            self.restart("settings")
            self.steering.turned = False
        self.division.stale = self.division.stale or self.settings.changed

    def look_at_update(self, step: StepUnderWay) -> None:
        """Evaluate what needs the update, and record.

        Args:
            step: The step under way.
        """
        self._agree()
        step.updates, step.drifts = self._updates, self.settings.drifts
        late = [taking for taking in step.takings if not taking.done]
        try:
            if self.division.stale:
                self.division.read_settings()
                self.division.stale = False
            self.evaluate(step, late)
        except Exception as error:  # the other processes are waiting for this one's record
            if not self.guard.contains:
                raise
            for taking in late:
                if not taking.done:
                    self.instruments.keep(taking, error)
        self.record(step)

    def record(self, step: StepUnderWay) -> None:
        """Average what was sampled, read what is due, and hand it to the recorders.

        Args:
            step: The step under way.
        """
        recording = self.instruments.add(step, self.cost, self._budget)
        if not recording and not self.steering.due(step.number):
            return
        readings = self.instruments.read(step, recording, self.division.label, self.output.latest)
        controlled, decisions = self._control(step, {taking.name for taking in recording}, readings)
        readings += controlled
        if not readings:
            return
        step.share_costs()
        seconds = float(sum(taking.seconds for taking in step.takings))
        readings += self.cost.readings(self._prefix, seconds)
        if decisions:
            self.output.decide(decisions)
        self.output.add(step.logged, readings, self.division.groups)

    def _control(
        self, step: StepUnderWay, recorded: set[str], readings: list[Reading]
    ) -> tuple[list[Reading], list[Decision]]:
        """What controllers read and decide at this step."""
        examples_seen, usual = _examples(step), self.settings.batch * parallel.world_size()

        def view(rates: list[float]) -> View:
            return View(
                step=step.number,
                readings={reading.key.partition("/")[2]: reading for reading in readings},
                groups=self.division.groups,
                schedule=rates,
                sections=self.division.sections.sections,
                batch_size=usual,
                micro_batches=len(step.sizes) if examples_seen == usual else 0,
                processes=parallel.world_size(),
                dataset_size=self._dataset_size,
            )

        groups = self.division.groups
        return self.steering.follow(step.number, recorded, groups, examples_seen, view, self.ranks)

    def finish(self, step: StepUnderWay | None, loop_seconds: float | None) -> None:
        """Take everything off, and note the cost.

        Args:
            step: The step that has been made.
            loop_seconds: How long it took, our own work included; ``None`` at the first step.
        """
        self.compiler.step_made()
        measured = self.guard.seconds
        if step is not None:
            self._micro_batches_before = sum(size > 0 for size in step.sizes)
            if step.takings:
                measured += step.seconds_in_hooks()
                step.share_costs()
                for taking in step.takings:
                    self.cost.spent(taking.name, step.number, taking.seconds, event=taking.sampling)
                step.close()
        else:
            self._micro_batches_before = 0
        if loop_seconds is not None:
            self.cost.step_done(max(loop_seconds - measured, 0.0), measured)
        self.guard.seconds = 0.0

    def abandon(self, step: StepUnderWay) -> None:
        """The optimizer made no step after ``before_step`` (a scaler skipped it): measure the next.

        Args:
            step: The step that was not made.
        """
        self.instruments.owe(step.takings)
        step.close()


def _examples(step: StepUnderWay) -> int:
    """Examples behind a step, of all processes; 0 when unknown."""
    return sum(step.sizes) * parallel.world_size()
