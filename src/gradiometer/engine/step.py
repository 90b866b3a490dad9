"""The step under way: its collectors, and what observables take from it; made anew each step, and dropped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from torch import Tensor

from ..collect.base import Collector, Memory, Step, Training
from ..collect.registry import COLLECTORS

EARLY = {"probe"} | {name for name, kind in COLLECTORS.items() if kind.moment == "before_step"}
"""Fields that are there before the optimizer's step; the others need the update."""


@dataclass(slots=True)
class Taking:
    """What one observable takes from one step.

    Args:
        name: The observable's group.
        recording: Whether it records.
        needs: The snapshot fields it needs.
        ahead: Fields whose collectors run for the next step's sake.
        sampling: Whether it takes a sample.
        thorough: Whether this sample may cost more, as one of each record may.
    """

    name: str
    recording: bool
    needs: frozenset[str]
    ahead: frozenset[str] = frozenset()
    sampling: bool = False
    thorough: bool = False
    done: bool = False
    failed: bool = False
    error: Exception | None = None
    sample: Mapping[str, Tensor] | None = None
    weight: float | Tensor = 1.0
    levels: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    def again(self) -> None:
        """It is taken anew."""
        self.done, self.failed, self.error, self.sample, self.levels = False, False, None, None, {}

    def drop(self) -> None:
        """Nothing of this step is averaged or read."""
        self.failed, self.sample, self.levels = True, None, {}


@dataclass
class StepUnderWay(Step):
    """A step on which something is due: runs its collectors, and keeps their errors where they belong.

    An error of a collector stays with the observables that need its field.
    """

    takings: list[Taking] = field(default_factory=list)
    ready: bool = False
    """Whether ``before_step`` has been called."""
    no_probe: Exception | None = None
    """Why no probe could be taken from the first micro-batch."""
    logged: int = 0
    """The step under which readings are recorded."""

    def __post_init__(self) -> None:
        """No collector yet."""
        self.errors: dict[str, Exception] = {}
        self._collectors: dict[str, Collector] = {}
        self._spent: dict[str, float] = {}

    def collect(self, training: Training, memories: Mapping[str, Memory]) -> None:
        """Make the collectors of all fields that are needed.

        Args:
            training: What is being trained.
            memories: What the collectors of each field keep from step to step.
        """
        for name in sorted(
            {need for taking in self.takings for need in taking.needs | taking.ahead} & COLLECTORS.keys()
        ):
            made = self._attempt(name, COLLECTORS[name], training, self, memories[name])
            if made is not None:
                self._collectors[name] = made

    @property
    def metric(self) -> Any:
        """The optimizer's own metric before this step, where norms in it are asked for; else ``None``."""
        collector = self._collectors.get("preconditioner")
        return None if collector is None else collector.result()

    @property
    def asks_for_batch(self) -> bool:
        """Whether a collector makes passes of its own on the batch."""
        return any(collector.keeps_batch for collector in self._collectors.values())

    def enter(self, size: int) -> None:
        """A micro-batch begins.

        Args:
            size: Its examples.
        """
        for name, collector in self._collectors.items():
            if "enter" in collector.stages:
                self._attempt(name, collector.enter, size)

    def resize(self, size: int) -> None:
        """The micro-batch under way turns out to have another number of examples.

        Args:
            size: How many.
        """
        if self.sizes and self.sizes[-1] != size:
            self.sizes[-1] = size
            for name, collector in self._collectors.items():
                if "resize" in collector.stages:
                    self._attempt(name, collector.resize, size)

    def exit(self) -> None:
        """Its backward pass is done."""
        for name, collector in self._collectors.items():
            if "exit" in collector.stages:
                self._attempt(name, collector.exit)

    def before_step(self) -> None:
        """The full gradient is in place."""
        for name, collector in self._collectors.items():
            if "before_step" in collector.stages:
                self._attempt(name, collector.before_step)

    def go_on(self) -> None:
        """The optimizer made no step after ``before_step``, and gradients go on adding up.

        What rests on this step's batches is measured again; kernels and Jacobians at these weights stand.
        """
        self.ready = False
        self.errors.clear()
        for taking in self.takings:
            if taking.done and taking.needs - {"probe"}:
                taking.again()

    def fields(self, needed: Collection[str]) -> dict[str, Any]:
        """Results of the collectors; those that fail are left out, and their errors kept.

        Args:
            needed: Names of fields, also of those no collector supplies.
        """
        fields = {}
        for name, collector in self._collectors.items():
            if name in needed and name not in self.errors:
                result = self._attempt(name, collector.result)
                if name not in self.errors:
                    fields[name] = result
        return fields

    def close(self) -> None:
        """Take every hook off."""
        for name, collector in self._collectors.items():
            if "close" in collector.stages:
                self._attempt(name, collector.close)
        self._collectors = {}

    def seconds_in_hooks(self) -> float:
        """Time that collectors took inside the user's own passes; counted once."""
        total = 0.0
        for name, collector in self._collectors.items():
            if collector.seconds_in_hooks:
                total += collector.seconds_in_hooks
                self._spent[name] = self._spent.get(name, 0.0) + collector.seconds_in_hooks
                collector.seconds_in_hooks = 0.0
        return total

    def share_costs(self) -> None:
        """Divide what collectors took among the observables that asked for them."""
        for name, seconds in self._spent.items():
            users = [taking for taking in self.takings if name in taking.needs]
            for taking in users:
                taking.seconds += seconds / len(users)
        self._spent = {}

    def _attempt(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run one stage of a collector."""
        began = perf_counter()
        try:
            return function(*arguments)
        except Exception as error:
            self.errors.setdefault(name, error)
            return None
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + perf_counter() - began
