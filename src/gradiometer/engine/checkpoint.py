"""What is saved of a measurement, in parts with seals, and how a run goes on from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from ..collect.base import Memory, Training
from ..collect.registry import COLLECTORS
from ..collect.snapshot import Probe
from ..errors import InputError
from ..observables import Observable
from .changes import Settings
from .division import Division
from .guard import Guard
from .instruments import Instruments
from .probe import probe_state, same_probe, saved_probe
from .ranks import Ranks
from .saved import Misfits, fingerprint, opened, sealed
from .steering import Steering

MODEL = "another model"


class Resumable(ABC):
    """A measurement that is saved and goes on, whatever the state is that it is given."""

    training: Training
    guard: Guard
    probe: Probe | None
    division: Division
    steering: Steering
    ranks: Ranks
    instruments: Instruments
    memories: dict[str, Memory]
    settings: Settings
    _dataset_size: int | None
    _replacement: bool | None
    _probe_is_given: bool
    _forgets_probe: bool
    _updates: int
    _micro_batches_before: int

    @abstractmethod
    def restart(self, reason: str) -> None:
        """Begin windows anew.

        Args:
            reason: Why.
        """

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
            "control": None if control is None else self._saved_control(control),
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

    def _saved_control(self, control: Mapping[str, Any]) -> dict[str, Any] | None:
        """What controllers have done under a seal, and beside it their memories, which each one checks."""
        name, controllers = "the controllers' memory", control["controllers"]
        rest = self._sealed(name, {key: part for key, part in control.items() if key != "controllers"})
        memories = self._sealed(name, controllers)
        if rest is None or memories is None:
            return None
        return {**rest, "controllers": {key: memories[key] for key in controllers}}

    def _saved_probe(self) -> dict[str, Any] | None:
        """The probe, where something rests on it and it may be kept."""
        rests = any(map(_on_probe, self.instruments.observables))
        if self.probe is None or self._forgets_probe or not rests:
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
        before, mapping = self.steering.state_dict(), isinstance(saved, Mapping)
        rest = opened({key: part for key, part in saved.items() if key != "controllers"}) if mapping else None
        try:
            if rest is None:
                raise ValueError(saved)
            self.steering.load_state_dict({**rest, "controllers": saved["controllers"]})
        except Exception:  # whatever may be in the memories
            self.steering.load_state_dict(before)
            misfits.add("that part of the checkpoint is damaged", "controllers")


def _rests_on(training: Training, dataset_size: int | None, replacement: bool | None) -> dict[str, str]:
    """What all readings rest on, each in a word or a fingerprint."""
    named = [(name.replace("_orig_mod.", ""), p) for name, p in training.model.named_parameters()]
    names = {id(parameter): name for name, parameter in named}
    groups = [[names.get(id(p), "") for p in group["params"]] for group in training.optimizer.param_groups]
    return {
        MODEL: fingerprint([[name, list(parameter.shape)] for name, parameter in named]),
        "other parameter groups": fingerprint(groups),
        "another optimizer": type(training.optimizer).__name__,
        "another loss_reduction": training.loss_reduction or "of the graph",
        "a data set of another size": str(dataset_size),
        "batches drawn in another way": str(replacement),
    }


def _fields(observable: Observable) -> frozenset[str]:
    """Snapshot fields that it needs at any step."""
    return observable.required(True) | observable.required(False) | observable.level_needs


def _on_probe(observable: Observable, *, alone: bool = False) -> bool:
    """Whether an observable is measured on the probe, or on the probe alone."""
    needs = _fields(observable)
    return needs == {"probe"} if alone else "probe" in needs
