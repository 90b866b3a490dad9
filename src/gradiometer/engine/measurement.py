"""What is measured of a run, step by step: found due, gathered, evaluated, averaged, read and recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from torch import Tensor

from .. import parallel
from ..autodiff.functional import Forward
from ..collect.base import Memory, Training
from ..collect.registry import COLLECTORS
from ..collect.snapshot import Probe, Snapshot
from ..control import Controller, View
from ..observables import Observable
from ..record.base import Recorder
from ..record.readings import Decision, Reading
from .changes import Settings
from .cost import CostLedger
from .division import Division
from .guard import Guard
from .instruments import Instruments
from .output import Output, ignore
from .probe import first_examples, saved_probe
from .ranks import Ranks
from .steering import Steering
from .step import EARLY, StepUnderWay, Taking


class Measurement:
    """The rooms of the engine, and the way of one step through them.

    Args:
        training: What is being trained.
        observables: What is measured.
        controllers: What acts on readings.
        recorders: Where readings go.
        guard: Contains errors, and counts time.
        forward: Maps model and inputs to outputs.
        probe: The fixed batch, where one was given.
        dataset_size: Examples in the training set, where it is known.
        replacement: Whether batches are drawn with replacement, where it is known.
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
        forward: Forward,
        probe: Probe | None,
        dataset_size: int | None,
        replacement: bool | None,
        layers: bool,
        prefix: str,
        budget: float | None,
    ) -> None:
        model, optimizer = training.model, training.optimizer
        self.training, self.guard = training, guard
        self.probe, self._probe_is_given = probe, probe is not None
        self.cost = CostLedger()
        self.output = Output(prefix, recorders, guard, observables)
        self.division = Division(model, optimizer, forward, guard, layers=layers)
        self.steering = Steering(controllers, optimizer, self.division.names, guard, prefix)
        self.ranks = Ranks(model)
        self.instruments = Instruments(observables, prefix, guard, self.ranks, self.steering.feeds)
        self.memories: dict[str, Memory] = {name: {} for name in COLLECTORS}
        self.settings = Settings()
        self._forward, self._dataset_size, self._replacement = forward, dataset_size, replacement
        self._controllers, self._prefix, self._budget = tuple(controllers), prefix, budget
        self._updates = self._micro_batches_before = 0
        self._idle = StepUnderWay(0, self.division.sections)

    @property
    def met(self) -> bool:
        """Whether nothing more is needed of a first batch."""
        return self.ranks.together is not None and self.probe is not None

    def meet(self, step: int, x: Any, y: Tensor | None, probe_size: int) -> None:
        """What the first batch is needed for: processes agree, and the probe is taken.

        Args:
            step: The optimizer step.
            x: The model's inputs.
            y: Their targets.
            probe_size: Examples in the probe.
        """
        if self.ranks.together is None:
            plan = (self.instruments.observables, self._budget, self._controllers, step)
            self.ranks.agree(self._prefix, plan, self.guard)
        if self.probe is None and self.instruments.measure:
            self.probe = first_examples(x, y, probe_size, together=bool(self.ranks.together))

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
            recording=any(taking.recording or taking.thorough for taking in takings),
            takings=takings,
        )
        step.collect(self.training, self.memories)
        return step

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
        if self.probe is not None:
            fields["probe"] = self.probe
        if self._dataset_size is not None:
            fields["dataset_size"] = self._dataset_size
        return Snapshot(
            step=step.number,
            model=self.training.model,
            forward=self._forward,
            groups=self.division.groups,
            sections=self.division.sections.sections,
            loss_reduction=self.training.loss_reduction,
            loss_fn=self.training.loss_fn,
            **fields,
        )

    def look_at_gradient(self, step: StepUnderWay) -> None:
        """Evaluate what needs no update: the weights are still those of this batch's loss.

        Args:
            step: The step under way.
        """
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
        step.updates, step.drifts = self._updates, self.settings.drifts
        late = [taking for taking in step.takings if not taking.done]
        try:
            if self.division.stale:
                self.division.read_settings()
                self.division.stale = False
            self.evaluate(step, late)
        except Exception as error:  # the other processes are waiting for this one's record
            for taking in late:
                if not taking.done:
                    self.instruments.fail(step, taking, error)
        self.record(step)

    def record(self, step: StepUnderWay) -> None:
        """Average what was sampled, read what is due, and hand it to the recorders.

        Args:
            step: The step under way.
        """
        recording = self.instruments.add(step)
        if not recording:
            return
        self.instruments.keep_budget(self.cost, self._budget)
        readings = self.instruments.read(step, recording, self.division.label, self.output.latest)
        controlled, decisions = self._control(step, {taking.name for taking in recording}, readings)
        readings += controlled
        if not readings:
            return
        step.share_costs()
        seconds = float(sum(taking.seconds for taking in step.takings))
        readings += self.cost.readings(self._prefix, seconds)
        if decisions:
            self.output.hand_on(lambda recorder: getattr(recorder, "record_decisions", ignore)(decisions))
        self.output.add(step.number, readings, self.division.groups)

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

        groups, together = self.division.groups, self.ranks.together
        return self.steering.follow(step.number, recorded, groups, examples_seen, view, together)

    def finish(self, step: StepUnderWay | None, loop_seconds: float | None) -> None:
        """Take everything off, and note the cost.

        Args:
            step: The step that has been made.
            loop_seconds: How long it took, our own work included; ``None`` at the first step.
        """
        measured = self.guard.seconds
        if step is not None:
            self._micro_batches_before = len(step.sizes)
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

    def state_dict(self) -> dict[str, Any]:
        """Everything that readings depend on, as tensors and numbers."""
        probe = self.probe
        memories = {
            name: {part: memory[part] for part in COLLECTORS[name].saved if part in memory}
            for name, memory in self.memories.items()
        }
        return {
            "updates": self._updates,
            "micro_batches": self._micro_batches_before,
            "probe": None if probe is None else {"inputs": probe.inputs, "targets": probe.targets},
            "scale_invariant": self.division.invariant,
            "settings": self.settings.state_dict(),
            "turned": self.steering.turned,
            "control": self.steering.state_dict(),
            "sections": [astuple(section) for section in self.division.sections.sections],
            "memories": {name: memory for name, memory in memories.items() if memory},
            "observables": self.instruments.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            state: What it returned.
        """
        self._updates = state["updates"]
        self._micro_batches_before = state["micro_batches"]
        self.settings.load_state_dict(state["settings"])
        self.division.invariant = state["scale_invariant"]
        self.division.divide()
        for name, memory in state["memories"].items():
            self.memories[name].update(memory)
        self._load_probe(state["probe"])
        unknown = self.instruments.load_state_dict(state["observables"])
        if [astuple(section) for section in self.division.sections.sections] != state["sections"]:
            self.restart("parameters")
        if unknown:
            self.guard.warn(
                f"the checkpoint also holds {sorted(unknown)}, which this monitor does not measure."
            )
        self.steering.turned = state["turned"]
        self.steering.load_state_dict(state["control"])

    def _load_probe(self, saved: Mapping[str, Any] | None) -> None:
        """The probe of the checkpoint, unless another one was given."""
        if saved is not None and self._probe_is_given:
            self.guard.warn(
                "the probe given to Monitor is used, not the one in the checkpoint: kernels before "
                "and after cannot be compared unless they are the same."
            )
        elif saved is not None:
            self.probe = saved_probe(saved, self.ranks.device)


def _examples(step: StepUnderWay) -> int:
    """Examples behind a step, of all processes; 0 when unknown."""
    return sum(step.sizes) * parallel.world_size()
