"""What is measured of a run, step by step: found due, gathered, evaluated, averaged, read and recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import parallel
from ..autodiff.functional import Forward
from ..collect.base import Memory, Training
from ..collect.registry import COLLECTORS
from ..collect.snapshot import Probe, Snapshot
from ..control import Controller, View
from ..errors import InputError
from ..observables import Observable
from ..record.base import Recorder
from ..record.readings import Decision, Reading
from .changes import Settings
from .cost import CostLedger
from .division import Division
from .guard import Guard
from .instruments import Instruments
from .output import Output
from .probe import first_examples, probe_state, same_probe, saved_probe
from .ranks import Ranks
from .saved import Misfits, fingerprint, opened, sealed
from .steering import Steering
from .step import EARLY, StepUnderWay, Taking

MODEL = "another model"


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
            recording=any(taking.recording for taking in takings),
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
            self.output.decide(decisions)
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
                    self.cost.spent(taking.name, step.number, taking.seconds)
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
        """Everything that readings depend on, as tensors and plain values, in parts with seals."""
        memories = {
            name: {part: memory[part] for part in COLLECTORS[name].saved if part in memory}
            for name, memory in self.memories.items()
        }
        parts = {name: self._sealed(name, memory) for name, memory in memories.items() if memory}
        observables = self.instruments.state_dict()
        run = {
            "rests_on": _rests_on(self.training, self._dataset_size, self._replacement),
            "updates": self._updates,
            "micro_batches": self._micro_batches_before,
            "scale_invariant": self.division.invariant,
            "sections": self._sections(),
            "turned": self.steering.turned,
            "memories": list(parts),
            "observables": list(observables),
        }
        control = self.steering.state_dict()
        return {
            "run": sealed(run),
            "settings": sealed(self.settings.state_dict()),
            "probe": self._saved_probe(),
            "control": None if control is None else self._sealed("the controllers' memory", control),
            "memories": parts,
            "observables": observables,
        }

    def _sealed(self, name: str, part: Mapping[str, Any]) -> dict[str, Any] | None:
        """A part with things in it that are not ours; ``None`` where it cannot be saved, which is said."""
        try:
            return sealed(part)
        except InputError as error:
            self.guard.warn(f"the checkpoint is made without {name}: {error}", f"saving {name}")
            return None

    def _saved_probe(self) -> dict[str, Any] | None:
        """The probe, where something rests on it."""
        if self.probe is None or not any(map(_on_probe, self.instruments.observables)):
            return None
        try:
            return probe_state(self.probe)
        except InputError as error:
            self.guard.warn(
                f"the checkpoint is made without the probe: {error} After resuming from it, what is measured "
                "on the probe begins anew on another one.",
                "saving the probe",
            )
            return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; what does not fit this run begins anew, and one warning says so.

        Args:
            state: What it returned, with all of its parts.
        """
        misfits, run = Misfits(), opened(state["run"])
        present, saved = (
            _rests_on(self.training, self._dataset_size, self._replacement),
            {} if run is None else run["rests_on"],
        )
        others = [what for what, value in present.items() if saved.get(what) != value]
        self._updates = self._micro_batches_before = 0
        if run is not None and MODEL not in others:
            self._updates, self._micro_batches_before = run["updates"], run["micro_batches"]
            self.division.invariant = run["scale_invariant"]
        self.division.divide()
        self.settings, settings = Settings(), opened(state["settings"])
        if settings is not None and not others:
            self.settings.load_state_dict(settings)
        lost = self._load_memories({} if others or run is None else state["memories"], run)
        lost |= self._load_probe(state["probe"], of_this_model=MODEL not in others)
        missing = set(run["observables"]) - set(state["observables"]) if run is not None else set()

        def unfit(observable: Observable) -> str:
            if run is None or settings is None or observable.group in missing:
                return "that part of the checkpoint is damaged"
            if others and (MODEL in others or not _on_probe(observable, alone=True)):
                return f"the checkpoint is of {' and '.join(others)}"
            return next((why for field, why in lost.items() if field in _fields(observable)), "")

        unknown = self.instruments.resume(state["observables"], unfit, misfits)
        self._load_control(state["control"], run, misfits)
        if run is not None and not others and self._sections() != run["sections"]:
            self.restart("parameters")
            windows = [o.group for o in self.instruments.observables if "parameters" in o.restarts]
            if windows:
                misfits.add("other parameters are read together", *windows)
        if unknown:
            self.guard.warn(
                f"the checkpoint also holds {sorted(unknown)}, which this monitor does not measure."
            )
        if misfits.message():
            self.guard.warn(misfits.message())

    def _sections(self) -> list[list[int]]:
        """How parameters are divided, whatever the parts are called."""
        return [[section.group, section.parameters] for section in self.division.sections.sections]

    def _load_memories(self, saved: Mapping[str, Any], run: Mapping[str, Any] | None) -> dict[str, str]:
        """The collectors' memories; fields whose memory is lost, with the reason."""
        memories = {name: opened(part) for name, part in saved.items()}
        for name, memory in self.memories.items():
            memory.clear()
            memory.update(memories.get(name) or {})
        gone = [name for name in (run or {}).get("memories", ()) if memories.get(name) is None]
        return dict.fromkeys(gone, "what it keeps from step to step is damaged")

    def _load_probe(self, saved: Any, *, of_this_model: bool) -> dict[str, str]:
        """The probe of the checkpoint, unless another one was given; why it is not that one."""
        read = saved_probe(saved, self.ranks.device)
        if self._probe_is_given:
            assert self.probe is not None
            if read is None or not same_probe(read, self.probe):
                return {"probe": "the probe given to Monitor is used, not the one in the checkpoint"}
            return {}
        self.probe = read if of_this_model else None
        if self.probe is None:
            return {
                "probe": "the probe is not in the checkpoint" if saved is None else "the probe is damaged"
            }
        return {}

    def _load_control(self, saved: Any, run: Mapping[str, Any] | None, misfits: Misfits) -> None:
        """The controllers' memories."""
        self.steering.turned = bool(run and run["turned"])
        if saved is None:
            return
        control = opened(saved)
        if control is None:
            misfits.add("that part of the checkpoint is damaged", "controllers")
        else:
            self.steering.load_state_dict(control)


def _rests_on(training: Training, dataset_size: int | None, replacement: bool | None) -> dict[str, str]:
    """What all readings rest on, each in a word or a fingerprint."""
    named = [(name.replace("_orig_mod.", ""), p) for name, p in training.model.named_parameters()]
    names = {id(parameter): name for name, parameter in named}
    groups = [[names.get(id(p), "") for p in group["params"]] for group in training.optimizer.param_groups]
    return {
        MODEL: fingerprint([[name, list(parameter.shape)] for name, parameter in named]),
        "other parameter groups": fingerprint(groups),
        "another optimizer": type(training.optimizer).__name__,
        "another loss_reduction": training.loss_reduction,
        "a data set of another size": str(dataset_size),
        "batches drawn in another way": str(replacement),
    }


def _fields(observable: Observable) -> frozenset[str]:
    """Snapshot fields that it needs at any step."""
    return observable.required(recording=True) | observable.required(recording=False)


def _on_probe(observable: Observable, *, alone: bool = False) -> bool:
    """Whether an observable is measured on the probe, or on the probe alone."""
    needs = _fields(observable)
    return needs == {"probe"} if alone else "probe" in needs


def _examples(step: StepUnderWay) -> int:
    """Examples behind a step, of all processes; 0 when unknown."""
    return sum(step.sizes) * parallel.world_size()
