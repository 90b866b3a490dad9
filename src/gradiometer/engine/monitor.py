"""The engine: knows when something is due, gathers it once, and never disturbs the run.

One optimizer step passes through four moments. ``micro_batch`` surrounds each forward and backward;
``before_step`` finds the full gradient in place and the weights as they were for this batch's loss; the
optimizer's own post-step hook sees the update that was really made; then everything due is averaged,
read and recorded. No observable is known here by name.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, field
from time import perf_counter
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import parallel
from ..autodiff.functional import (
    Forward,
    check_inputs,
    detached_copy,
    examples,
    matrix_forward,
    measuring,
    pure_function,
    take,
)
from ..autodiff.invariance import scale_invariant_weights
from ..collect.base import Collector, LossFunction, Run, no_micro_batch
from ..collect.call import split_batch
from ..collect.registry import COLLECTORS, group_settings
from ..collect.sections import Sections
from ..collect.snapshot import Probe, Snapshot
from ..control import Controller, ControlPanel, View, check_controllers, with_needed
from ..control.panel import CHANGES, GROUP, QUANTITIES
from ..errors import CostWarning, InputError, MeasurementWarning, SampleSkippedError, UnsupportedError
from ..observables import Observable, default_observables
from ..observables.base import Estimate
from ..optimizers.updates import step_was_made
from ..record.base import Recorder
from ..record.readings import Decision, Quantity, Reading, make_key, quantity_of
from ..record.table import table
from ..stats.estimators import Estimator
from ..stats.jackknife import correlated_jackknife, t_quantile
from .changes import Settings
from .checks import check_run, check_settings
from .cost import COST_GROUP, COST_QUANTITIES, CostLedger
from .crosschecks import disagreements
from .words import expected_words

STATE_VERSION = 3
_TRIES = 3
_UNREAD = 256
_EARLY = {"probe"} | {name for name, kind in COLLECTORS.items() if kind.moment == "before_step"}
_SEVERITY: Mapping[type[Exception], int] = {SampleSkippedError: 1, UnsupportedError: 3}  # any other error: 2


@dataclass
class _Slot:
    """One observable, its estimator, and what the engine remembers about the pair."""

    observable: Observable
    estimator: Estimator
    stretch: int = 1
    seen: int = 0
    owed: bool = False
    skips: int = 0
    failures: int = 0
    retired: bool = False
    # of this step only
    recording: bool = False
    sampling: bool = False
    needs: frozenset[str] = frozenset()
    failed: bool = False
    error: Exception | None = None
    sample: Mapping[str, Tensor] | None = None
    levels: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.observable.group

    def begin(self, step: int) -> None:
        """Decide whether anything is due at this step."""
        due = not self.retired and self.observable.samples(step)
        self.seen += due
        kept = due and (self.seen - 1) % self.stretch == 0
        self.sampling = (kept or self.owed) and not self.retired
        self.recording = self.owed or (kept and self.observable.due(step))
        self.needs = self.observable.required(self.recording) if self.sampling else frozenset()
        self.failed, self.sample, self.levels, self.note, self.seconds = False, None, {}, "", 0.0


class _Section:
    """A stretch of our own work inside the user's loop: timed, and its errors contained."""

    __slots__ = ("_before", "_began", "_moment", "_monitor")

    def __init__(self, monitor: Monitor, moment: str) -> None:
        self._monitor, self._moment = monitor, moment

    def __enter__(self) -> None:
        self._before, self._began = self._monitor._own_seconds, perf_counter()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        monitor = self._monitor
        monitor._own_seconds = self._before + perf_counter() - self._began  # right where calls nest
        if not isinstance(error, Exception) or monitor._on_error == "raise":
            return False
        text = f"{type(error).__name__}: {error}"
        monitor._warn(f"measuring failed {self._moment}: {text}. Training goes on.")
        return True


class Monitor:
    """Measures a training run from inside, without changing it.

    Args:
        model: The model being trained, not wrapped for data parallelism.
        optimizer: Its optimizer. A post-step hook is registered here and removed by :meth:`close`.
        observables: What to measure; the default set when ``None``.
        controllers: What acts on readings; the observables they need are added.
        recorders: Where readings go: callables ``(step, readings) -> None``.
        forward: Maps ``(model, x)`` to outputs ``[N, O]``. By default ``model(x)``; logits of a mapping,
            the last position of a sequence.
        loss_reduction: Whether the loss is the ``"mean"`` or the ``"sum"`` over a batch's examples.
        probe: Fixed batch for kernels and Jacobians, ``x`` or ``(x, y)``; by default the first
            ``probe_size`` examples of the first batch. It is kept in the checkpoint.
        probe_size: Examples in the default probe.
        dataset_size: Examples in the training set, for SGD's noise scale.
        replacement: Whether batches are drawn with replacement; unknown when ``None``. A loader that
            shuffles draws without.
        loss_fn: Maps the model's outputs and targets to the loss of a batch. Only what makes passes of its
            own needs it: a noise scale from a batch that is split, curvature.
        layers: Whether noise and fluctuation-dissipation are also read for every layer.
        prefix: First part of every log key; no slash.
        on_error: ``"warn"`` turns failures into one warning and ``nan``; ``"raise"`` is for tests.
        budget: Largest share of the loop's time that measuring may take. When it is exceeded at a
            recording step, the cadence of the dearest observable is doubled.

    Raises:
        InputError: If an argument cannot be used, with what to write instead.

    Example:
        >>> from gradiometer import MemoryRecorder
        >>> torch.manual_seed(0); net = nn.Linear(3, 2)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> memory = MemoryRecorder()
        >>> with Monitor(net, optimizer, recorders=[memory], dataset_size=100) as monitor:
        ...     for _ in range(3):
        ...         x, y = torch.randn(8, 3), torch.randint(2, (8,))
        ...         with monitor.micro_batch(x, y):
        ...             nn.functional.cross_entropy(net(x), y).backward()
        ...         monitor.before_step()
        ...         optimizer.step(); optimizer.zero_grad()
        >>> [step for step, _ in memory.series("dynamics/ntk/drift")]
        [0, 1, 2]
        >>> [step for step, _ in memory.series("dynamics/jacobian/frobenius_norm")]
        [0]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        observables: Sequence[Observable] | None = None,
        *,
        controllers: Sequence[Controller] = (),
        recorders: Sequence[Recorder] = (),
        forward: Forward | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        probe: Any = None,
        probe_size: int = 32,
        dataset_size: int | None = None,
        replacement: bool | None = None,
        loss_fn: LossFunction | None = None,
        layers: bool = False,
        prefix: str = "dynamics",
        on_error: Literal["warn", "raise"] = "warn",
        budget: float | None = None,
    ) -> None:
        check_controllers(controllers)
        wanted = default_observables() if observables is None else observables
        check_settings(wanted, loss_reduction, probe_size, prefix, on_error, budget, loss_fn, layers)
        check_run(model, optimizer, recorders, forward, dataset_size, replacement)
        for controller in controllers:
            controller.check_run(dataset_size)
        chosen = with_needed(observables, wanted, controllers)
        self.model = model
        self.optimizer = optimizer
        self.step = 0
        self.dataset_size = dataset_size
        self.latest: dict[str, Reading] = {}
        self._comparable: dict[str, Reading] = {}
        self._new: list[Reading] = []
        self._slots = [_Slot(each, copy.deepcopy(cast("Estimator", each.estimator))) for each in chosen]
        self._recorders: list[Any] = list(recorders)
        self._forward = forward or matrix_forward
        self._loss_reduction = loss_reduction
        self._probe_size = probe_size
        self._prefix = prefix
        self._on_error = on_error
        self._budget = budget
        self._controllers = tuple(controllers)
        self._replacement = replacement
        self._layers = layers
        self._invariant: list[str] | None = None
        self._groups = group_settings(optimizer)
        self._run = Run(model, optimizer, self._sections(), loss_reduction, loss_fn)
        self._collectors: dict[str, Collector] = {}
        self._errors: dict[str, Exception] = {}
        self._spent: dict[str, float] = {}
        self._warned: set[str] = set()
        self._begun = self._ready = False
        self._due: list[_Slot] = []
        self._settings = Settings()
        self._stale = True
        self._together: bool | None = None
        self.cost = CostLedger()
        self._own_seconds = 0.0
        self._step_began: float | None = None
        self._probe: Probe | None = None if probe is None else self._given_probe(probe)
        self._probe_is_given = probe is not None
        self._turned = False
        self._panel: ControlPanel | None = None
        if controllers:
            contain = on_error == "warn"
            self._panel = ControlPanel(controllers, optimizer, self._group_names, contain=contain)
        words = expected_words(prefix, chosen)
        self._hand_on(lambda recorder: getattr(recorder, "expect", _ignore)(words))
        self._handle = optimizer.register_step_post_hook(self._after_step)

    # -- the four moments --------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, x: Any, y: Tensor | None = None) -> Iterator[None]:
        """Surround one forward and backward; once per accumulated micro-batch.

        Args:
            x: The model's inputs, first dimension the examples.
            y: Their targets, for the alignment of the kernel.
        """
        self.begin_micro_batch(x, y)
        try:
            yield
        finally:
            self.end_micro_batch()

    def begin_micro_batch(self, x: Any, y: Tensor | None = None) -> None:
        """As entering :meth:`micro_batch`, for loops made of callbacks."""
        with self._timed("starting a micro-batch"):
            if self._ready:
                self._abandon_step()
            if self._together is None:
                self._agree()
            if self._probe is None and any(not slot.retired for slot in self._slots):
                self._probe = self._probe_from(x, y)
            if not self._begun:
                self._begin_step()
            size = examples(x)
            self._run.sizes.append(size)
            self._run.batch = x, y
            for name, collector in self._collectors.items():
                if "enter" in collector.stages:
                    self._attempt(name, collector.enter, size)

    def begin_batch(self, batch: Any, input_key: str | None = None, target_key: str | None = None) -> None:
        """As :meth:`begin_micro_batch`, with a whole batch: a pair, or a mapping with these keys.

        Args:
            batch: What the loader gives.
            input_key: Key of the inputs in a mapping.
            target_key: Key of the targets in a mapping.
        """
        with self._timed("reading the batch"):
            x, y = split_batch(batch, input_key, target_key)
            self.begin_micro_batch(x, y)

    def end_micro_batch(self) -> None:
        """As leaving :meth:`micro_batch`."""
        if not self._collectors:
            return
        with self._timed("ending a micro-batch"):
            for name, collector in self._collectors.items():
                if "exit" in collector.stages:
                    self._attempt(name, collector.exit)

    def before_step(
        self, *, grad_scale: float = 1.0, loss_scale: float | None = None, loss_divisor: float | None = None
    ) -> None:
        """The full gradient is in place and not yet clipped; call once before ``optimizer.step()``.

        Args:
            grad_scale: Factor still in ``.grad``: ``scaler.get_scale()`` before unscaling, else 1.
            loss_scale: Factor on the loss in the backward pass; ``grad_scale`` when ``None``. After
                ``scaler.unscale_(optimizer)`` write ``loss_scale=scaler.get_scale()``.
            loss_divisor: What each micro-batch's loss was divided by. When ``None``: the number of
                micro-batches for a mean loss, 1 for a summed one.
        """
        if self._begun and not self._due:
            self._ready = True
            return
        with self._timed("before the step"), self._rates_in_force():
            if not self._begun:
                self._begin_step()
            self._ready = True
            self._run.grad_scale = grad_scale
            self._run.loss_scale = grad_scale if loss_scale is None else loss_scale
            self._run.loss_divisor = loss_divisor
            for name, collector in self._collectors.items():
                if "before_step" in collector.stages:
                    self._attempt(name, collector.before_step)
            early = [slot for slot in self._due if slot.needs <= _EARLY]
            if early:
                self._groups = group_settings(self.optimizer)
            self._evaluate(early)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer's post-step hook: the update has been made."""
        del args, kwargs
        try:
            self._look_at_update(optimizer)
        except BaseException:  # under on_error="raise", before the hook that would do it
            if self._panel is not None:
                self._panel.rates.restore()
            raise

    def _look_at_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure and record, if a step was made."""
        with self._timed("looking at the optimizer"):
            if not step_was_made(optimizer):  # a fused optimizer is called even where its scaler skips
                self._abandon_step()
                return
            self._run.updates += 1
            if self._settings.jumped(optimizer, sum(self._run.sizes)) or self._turned:
                self._restart("settings")
                self._turned = False
            self._run.drifts = self._settings.drifts
            self._stale = self._stale or self._settings.changed
        if not (self._begun and not self._due):
            self._measure_update()
        self._finish_step()
        self.step += 1

    def _restart(self, reason: str) -> None:
        """Begin the windows anew of all that cannot look across this."""
        for slot in self._slots:
            if reason in slot.observable.restarts:
                slot.estimator.reset(everything=reason == "parameters")
                old = f"{self._prefix}/{slot.name}/"  # what was read before belongs to another run
                self.latest = {key: r for key, r in self.latest.items() if not key.startswith(old)}
        self._run.centre.clear()
        self._comparable.clear()

    def _measure_update(self) -> None:
        """Evaluate what needs the update, and record."""
        with self._timed("after the step"):
            if not self._begun:
                self._begin_step()
            if not self._ready and self._due:
                self._warn(
                    "monitor.before_step() was not called before optimizer.step(): what needs the "
                    "gradient or the weights before the update is left out at such steps, and kernels "
                    "and Jacobians are those of the weights after it."
                )
            try:
                if self._stale:
                    self._groups, self._stale = group_settings(self.optimizer), False
                self._evaluate([slot for slot in self._due if slot.sample is None and not slot.failed])
            except Exception as error:  # the other processes are waiting for this one's record
                for slot in self._due:
                    if slot.sample is None and not slot.failed:
                        self._fail(slot, error)
            self._record()

    # -- one step ----------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        """Find out what is due and make the collectors for it, and for nothing else."""
        self._begun = True
        self._run.sizes = []
        self._errors = {}
        if self._step_began is None:
            self._step_began = perf_counter()
        for slot in self._slots:
            try:
                slot.begin(self.step)
            except Exception as error:
                slot.sampling = slot.recording = False
                self._fail(slot, error)
        self._due = [slot for slot in self._slots if slot.sampling]
        self._run.recording = any(slot.recording for slot in self._due)
        if self._due:
            self._divide()
        needed = {need for slot in self._due for need in slot.needs}
        for name in COLLECTORS.keys() & needed:
            collector = self._attempt(name, COLLECTORS[name], self._run)
            if collector is not None:
                self._collectors[name] = collector

    def _divide(self) -> None:
        """Keep the sections of parameters right: as groups come, and once for scale-invariant weights."""
        divided = any("parameters" in slot.observable.restarts for slot in self._due)
        known = self._invariant is not None or not divided or self._probe is None
        if known and self._run.sections.cover(self.optimizer):
            return
        if divided and self._probe is not None:
            self._invariant = self._find_invariant()
        self._groups = group_settings(self.optimizer)
        before = self._run.sections.sections
        self._run.sections = self._sections()
        if known or self._run.sections.sections != before:
            self._restart("parameters")

    def _find_invariant(self) -> list[str]:
        """Names of the scale-invariant weights; none where the model cannot be run on the probe."""
        assert self._probe is not None
        try:
            return scale_invariant_weights(self.model, self._probe.inputs, self._forward)
        except Exception as error:
            if self._on_error == "raise":
                raise
            self._warn(f"scale-invariant weights are not told apart: {type(error).__name__}: {error}")
            return []

    def _evaluate(self, due: Sequence[_Slot]) -> None:
        """Run the observables whose fields are complete at this moment."""
        if not due:
            return
        needed = {need for slot in due for need in slot.needs}
        fields: dict[str, Any] = {}
        for name in needed & set(self._collectors):
            if name not in self._errors:
                result = self._attempt(name, self._collectors[name].result)
                if name not in self._errors:
                    fields[name] = result
        snapshot = self._snapshot(fields)
        for slot in due:
            began = perf_counter()
            missing = {n: self._errors[n] for n in sorted(slot.needs) if n in self._errors}
            extras = slot.observable.optional if self._on_error == "warn" else frozenset()
            broken = next((error for n, error in missing.items() if n not in extras), None)
            try:
                if broken is not None:
                    raise broken
                if self._probe is None and "probe" in slot.needs:
                    raise no_micro_batch()
                slot.sample = {k: v.detach() for k, v in slot.observable.statistics(snapshot).items()}
                if slot.recording:
                    slot.levels = slot.observable.levels(snapshot)
                    slot.note = slot.observable.note(snapshot)
                for error in missing.values():
                    what = f"{type(slot.observable).__name__} at step {self.step}"
                    self._warn(f"{what}: {error} What rests on it is left out; the rest is read.", str(error))
            except Exception as error:
                self._fail(slot, error)
            slot.seconds += perf_counter() - began

    def _snapshot(self, fields: dict[str, Any]) -> Snapshot:
        """The gathered fields, and those that cost nothing."""
        if self._run.sizes:
            fields["batch_size"] = self._examples()
        if self._replacement is not None:
            fields["replacement"] = self._replacement
        if self._probe is not None:
            fields["probe"] = self._probe
        if self.dataset_size is not None:
            fields["dataset_size"] = self.dataset_size
        return Snapshot(
            step=self.step,
            model=self.model,
            forward=self._forward,
            groups=self._groups,
            sections=self._run.sections.sections,
            loss_reduction=self._loss_reduction,
            loss_fn=self._run.loss_fn,
            **fields,
        )

    def _record(self) -> None:
        """Average what was sampled, read what is due, and hand it to the recorders."""
        for slot in self._due:
            if slot.sample is not None and not slot.failed:
                try:
                    slot.estimator.add(slot.sample)
                except Exception as error:
                    self._fail(slot, error)
        recording = [slot for slot in self._due if slot.recording]
        if not recording:
            return
        self._reduce(recording)
        self._keep_budget()
        readings: list[Reading] = []
        for slot in recording:
            began = perf_counter()
            if self._together and not slot.failed:  # before what one process alone may fail in
                slot.owed, slot.skips, slot.failures = False, 0, 0
            if not slot.failed:
                try:
                    readings += self._read(slot)
                    slot.owed, slot.skips, slot.failures = False, 0, 0
                except Exception as error:
                    self._fail(slot, error)
            if slot.failed and not slot.owed:
                readings += self._unknown(slot)
            slot.seconds += perf_counter() - began
        if self._panel is not None:
            readings += self._control(self._panel, recording, readings)
        if not readings:
            return
        self._share_costs()
        costs = self.cost.numbers(float(sum(slot.seconds for slot in self._due)))
        readings += [
            self._reading(COST_GROUP, COST_QUANTITIES, n, value, math.nan, "") for n, value in costs.items()
        ]
        self.latest.update({reading.key: reading for reading in readings})
        self._comparable.update({reading.key: reading for reading in readings})
        self._new = (self._new + readings)[-_UNREAD:]
        self._hand_on(lambda recorder: recorder(self.step, readings))
        measured = [slot.observable for slot in self._slots]
        for key, message in disagreements(self._comparable, self._groups, measured).items():
            self._warn(message, key)

    def _hand_on(self, call: Callable[[Any], None]) -> None:
        """Give every recorder something; one that fails is left out."""
        for recorder in list(self._recorders):
            try:
                call(recorder)
            except Exception as error:
                if self._on_error == "raise":
                    raise
                self._recorders.remove(recorder)
                self._warn(f"{type(recorder).__name__} failed and is left out: {error}")

    def _control(
        self, panel: ControlPanel, recording: Sequence[_Slot], readings: Sequence[Reading]
    ) -> list[Reading]:
        """Let controllers decide, on all processes at the same steps; what was in force at this one."""
        numbers = panel.numbers(self._groups, self._examples())
        recorded = {slot.name for slot in recording}
        if panel.due(self.step, recorded):
            self._decide(panel, recorded, readings)
        numbers[CHANGES] = float(panel.changes)
        return [self._reading(GROUP, QUANTITIES, n, v, 0.0, "") for n, v in numbers.items()]

    def _decide(self, panel: ControlPanel, recorded: set[str], readings: Sequence[Reading]) -> None:
        """One check of the controllers that are due."""
        if parallel.world_size() > 1 and not self._together:
            panel.off = True
            self._warn("controllers are off: they act on all processes or on none.")
            return
        usual = self._settings.batch * parallel.world_size()
        view = View(
            step=self.step,
            readings={reading.key.partition("/")[2]: reading for reading in readings},
            groups=self._groups,
            schedule=panel.rates.written(),
            sections=self._run.sections.sections,
            batch_size=usual,
            micro_batches=len(self._run.sizes) if self._examples() == usual else 0,
            processes=parallel.world_size(),
            dataset_size=self.dataset_size,
        )
        decisions, messages = panel.decide(view, recorded, bool(self._together))
        # Settings does not read a rate on a device at every step, and would not see the jump
        self._turned = any(each.acted and each.knob == "learning_rate" for each in decisions)
        for message in messages:
            self._warn(message)
        self._hand_on(lambda recorder: getattr(recorder, "record_decisions", _ignore)(decisions))

    def _rates_in_force(self) -> AbstractContextManager[None]:
        """The learning rates as the optimizer will see them."""
        return nullcontext() if self._panel is None else self._panel.rates.in_force()

    def _group_names(self) -> list[str]:
        return [group.name for group in group_settings(self.optimizer)]

    def _examples(self) -> int:
        """Examples behind this step, of all processes; 0 when unknown."""
        return sum(self._run.sizes) * parallel.world_size()

    def _read(self, slot: _Slot) -> list[Reading]:
        """Close the block, read the averages, and add errors from leaving blocks out."""
        slot.estimator.close(self.step, slot.levels)
        reference = slot.estimator.reference()
        rows, weights = slot.estimator.replicates()
        values = slot.observable.readings(rows | slot.estimator.levels(), reference)
        slot.observable.check_words(values)
        quantities, arrays = slot.observable.quantities, slot.observable.arrays
        numbers = {name: _as_rows(value) for name, value in values.items() if name not in arrays}
        errors = _errors({n: row for n, row in numbers.items() if len(row) > 1}, weights)
        readings = []
        for name, value in values.items():
            own = value if isinstance(value, Estimate) else Estimate(value)
            stderr, groups = errors.get(name, (math.nan, 0))
            if own.stderr is not None:
                stderr = float(_as_rows(own.stderr)[0])
            scalar = name in numbers
            shown = float(numbers[name][0]) if scalar else value
            half = t_quantile(groups) * stderr if scalar else math.nan
            interval = {
                "low": shown - half if own.low is None else own.low,
                "high": shown + half if own.high is None else own.high,
                "resolved": own.resolved,
            }
            note = f"{slot.note}; {own.note}" if slot.note and own.note else slot.note or own.note
            label = self._label(name)
            readings.append(self._reading(slot.name, quantities, label, shown, stderr, note, **interval))
        return readings

    def _label(self, name: str) -> str:
        """``ratio/1`` with the second section's own name in the place of its index."""
        base, _, index = name.partition("/")
        return f"{base}/{self._run.sections.sections[int(index)].name}" if index else name

    def _reading(
        self,
        group: str,
        quantities: Mapping[str, Quantity],
        name: str,
        value: Any,
        stderr: float,
        note: str,
        **interval: Any,
    ) -> Reading:
        quantity = quantity_of(name, quantities, group)
        number: Any = value if isinstance(value, float) else value.detach().cpu().numpy()
        return Reading(
            key=make_key(self._prefix, group, name),
            value=number,
            stderr=stderr,
            unit=quantity.unit,
            sentence=quantity.sentence,
            note=note,
            quantity=quantity,
            **interval,
        )

    def _unknown(self, slot: _Slot) -> list[Reading]:
        """``nan`` under every name the observable reads, arrays aside."""
        held = {key for key, reading in self.latest.items() if not isinstance(reading.value, float)}
        return [
            self._reading(slot.name, slot.observable.quantities, name, math.nan, math.nan, "")
            for name in slot.observable.quantities
            if name in slot.observable.names - slot.observable.arrays
            and make_key(self._prefix, slot.name, name) not in held
        ]

    def _reduce(self, recording: Sequence[_Slot]) -> None:
        """Average open blocks over processes; what failed on one has failed on all.

        Every process gets here at the same steps: schedules are those all have agreed on, and nothing is
        retired, owed or retried but by what is exchanged here.
        """
        if not self._together:
            return
        device = next(self.model.parameters()).device
        pending = [slot.estimator.pending for slot in recording]
        sizes = [sum(t.numel() for t in sums.values()) for sums, _ in pending]
        states = [_SEVERITY.get(type(slot.error), 2) if slot.error else 0 for slot in recording]
        found = parallel.largest([*states, *sizes, *(-size for size in sizes)], device)
        count = len(recording)
        kept = []
        for i, slot in enumerate(recording):
            state = found[i]
            if state == 0 and found[count + i] != -found[2 * count + i]:
                state = 2
            error, slot.error = slot.error, None
            if state:
                kind = {1: SampleSkippedError, 2: InputError, 3: UnsupportedError}[state]
                same = error is not None and _SEVERITY.get(type(error), 2) == state
                self._settle(slot, error if same and error else kind("another process could not measure"))
            else:
                kept.append(slot)
        flat = [
            tensor
            for slot in kept
            for tensor in (*slot.estimator.pending[0].values(), torch.tensor(slot.estimator.pending[1]))
        ]
        means = iter(parallel.mean(flat, device))
        for slot in kept:
            sums = {name: next(means) for name in slot.estimator.pending[0]}
            slot.estimator.pending = (sums, float(next(means)))

    def _agree(self) -> None:
        """Find out whether all processes measure the same; else each one's readings are its own."""
        self._together = False
        if parallel.world_size() == 1:
            return
        plan = repr(([slot.observable for slot in self._slots], self._budget, self._controllers, self.step))
        self._together = parallel.agree(self._prefix, re.sub(r" at 0x[0-9a-f]+", "", plan))
        if not self._together:
            self._warn(
                f"not all of the {parallel.world_size()} processes have a monitor with the same "
                "observables, controllers and budget: readings are this process's own. "
                "Build the same Monitor on every rank, and give recorders to rank 0 only."
            )

    def _finish_step(self) -> None:
        """Take everything off, note the cost, and get ready for the next step."""
        now = perf_counter()
        own = self._own_seconds
        for name, collector in self._collectors.items():
            own += collector.seconds_in_hooks
            self._spent[name] = self._spent.get(name, 0.0) + collector.seconds_in_hooks
        self._share_costs()
        for slot in self._due:
            self.cost.spent(slot.name, self.step, slot.seconds)
        if self._step_began is not None:
            self.cost.step_done(max(now - self._step_began - own, 0.0), own)
        self._close_collectors()
        self._run.micro_batches_before = len(self._run.sizes)
        self._run.batch = None
        self._own_seconds = 0.0
        self._step_began = now
        self._begun = self._ready = False

    def _share_costs(self) -> None:
        """Divide what collectors took among the observables that asked for them."""
        for name, seconds in self._spent.items():
            users = [slot for slot in self._due if name in slot.needs]
            for slot in users:
                slot.seconds += seconds / len(users)
        self._spent = {}

    def _abandon_step(self) -> None:
        """The optimizer made no step after ``before_step`` (a scaler skipped it): measure the next."""
        for slot in self._slots:
            slot.owed = slot.owed or slot.recording
        self._close_collectors()
        self._begun = self._ready = False

    def _close_collectors(self) -> None:
        for name, collector in self._collectors.items():
            if "close" in collector.stages:
                self._attempt(name, collector.close)
        self._collectors = {}

    # -- failure is contained ----------------------------------------------------------------------

    def _attempt(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run one stage of a collector; an error stays with the observables that need its field."""
        began = perf_counter()
        try:
            return function(*arguments)
        except Exception as error:
            self._errors.setdefault(name, error)
            return None
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + perf_counter() - began

    def _fail(self, slot: _Slot, error: Exception) -> None:
        """One warning for each message; retire what can never work, retry the rest."""
        if self._on_error == "raise":
            raise error
        slot.failed, slot.sample, slot.levels = True, None, {}
        if self._together:  # all processes settle it at their next record
            known = _SEVERITY.get(type(slot.error), 2) if slot.error else 0
            slot.error = error if _SEVERITY.get(type(error), 2) > known else slot.error
            return
        self._settle(slot, error)

    def _settle(self, slot: _Slot, error: Exception) -> None:
        """Say it, and decide whether to retry or retire."""
        slot.failed, slot.sample, slot.levels = True, None, {}
        what = f"{type(slot.observable).__name__} at step {self.step}"
        if isinstance(error, SampleSkippedError):
            slot.skips += 1
            slot.owed = slot.recording and slot.skips % (_TRIES + 1) != 0
            if self._ready:  # else one warning has said that before_step() is missing
                self._warn(f"{what}: {error} The sample is left out; the next steps are tried.", str(error))
            return
        slot.failures += 1
        slot.owed = False
        slot.retired = isinstance(error, UnsupportedError) or slot.failures >= _TRIES
        fate = f"It reads nan, and is left out after {_TRIES} failures in a row."
        fate = "It is left out from here on." if slot.retired else fate
        if slot.retired and self._panel is not None and slot.name in self._panel.feeds:
            fate += " Controllers that decide by it do nothing from here on."
        text = str(error) or type(error).__name__
        text += "" if text.endswith((".", "!", "?")) else "."
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            text += " Pass a smaller probe_size= or max_memory=."
        if not isinstance(error, (InputError, UnsupportedError)):
            text = f"{type(error).__name__}: {text}"
        self._warn(f"{what}: {text} {fate} Training goes on.", f"{slot.name}:{text}")

    def _warn(self, message: str, key: str | None = None) -> None:
        """Say each thing once; where warnings are errors it is logged, since the run must go on."""
        if (key or message) in self._warned:
            return
        self._warned.add(key or message)
        try:
            warnings.warn(message, MeasurementWarning, stacklevel=2)
        except MeasurementWarning:
            logging.getLogger(__name__).warning(message)

    def _timed(self, moment: str) -> _Section:
        """Count the time and let no error of ours reach the loop."""
        return _Section(self, moment)

    # -- budget ------------------------------------------------------------------------------------

    def _keep_budget(self) -> None:
        """Double the cadence of the dearest observable while the sum of shares is above the budget."""
        if self._budget is None:
            return
        fixed = self._panel.feeds if self._panel is not None else set()
        shares = {name: share for name, share in self.cost.shares().items() if name not in fixed}
        names = [slot.name for slot in self._slots]
        over = sum(shares.values()) > self._budget
        dearest = names.index(max(shares, key=lambda name: shares[name])) if over else -1
        decision = torch.tensor(dearest, device=next(self.model.parameters()).device)
        decision = parallel.broadcast(decision) if self._together else decision
        if int(decision) >= 0:
            slot = self._slots[int(decision)]
            slot.stretch *= 2
            if slot.name in shares:
                self.cost.stretched(slot.name)
            message = f"measuring is above budget={self._budget}: {slot.name} is measured half as often"
            if slot.name not in self._warned:
                self._warned.add(slot.name)
                warnings.warn(message, CostWarning, stacklevel=2)

    # -- the probe ---------------------------------------------------------------------------------

    def _given_probe(self, probe: Any) -> Probe:
        if not isinstance(probe, Probe):
            pair = isinstance(probe, (tuple, list)) and len(probe) > 0
            probe = Probe(probe[0], probe[1] if len(probe) > 1 else None) if pair else Probe(probe)
        check_inputs(self.model, probe.inputs)
        try:
            with measuring(self.model), torch.no_grad():
                function, parameters = pure_function(self.model, self._forward)
                function(parameters, take(probe.inputs, slice(0, 1)))
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            shapes = [list(t.shape) for t in pytree.tree_leaves(probe.inputs) if isinstance(t, Tensor)]
            raise InputError(
                "the model cannot be called with the probe",
                got=f"inputs of shape {shapes}: {error}",
                fix="Pass probe=(x, y) with x as the model takes it, first dimension the examples.",
            ) from error
        return Probe(detached_copy(probe.inputs), detached_copy(probe.targets))

    def _probe_from(self, x: Any, y: Tensor | None) -> Probe:
        """The first examples of rank 0's first batch."""
        first = slice(0, self._probe_size)
        inputs = detached_copy(take(dict(x) if isinstance(x, Mapping) else x, first))
        same = isinstance(y, Tensor) and y.ndim > 0 and len(y) == examples(x)
        targets = y[first].detach().clone() if same and y is not None else None
        return Probe(*parallel.share((inputs, targets))) if self._together else Probe(inputs, targets)

    def _sections(self) -> Sections:
        """Which parameters are read together."""
        names = [group.name for group in self._groups]
        invariant = self._invariant or ()
        return Sections(self.model, self.optimizer, names, layers=self._layers, invariant=invariant)

    def take_new(self) -> list[Reading]:
        """Readings recorded since the last call, for loops that log at a moment of their own."""
        new, self._new = self._new, []
        return new

    # -- life --------------------------------------------------------------------------------------

    def table(self) -> str:
        """The closing table: reading, error, unit, sentence, cost."""
        decided = () if self._panel is None else self._panel.describe()
        return table(self.latest, self.cost.describe(), decided)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What controllers have decided: the latest 200 changes and 200 refusals of each."""
        return () if self._panel is None else tuple(self._panel.decisions)

    @property
    def accumulation(self) -> int | None:
        """Micro-batches to accumulate from the next step on; ``None`` where no controller has asked."""
        return None if self._panel is None else self._panel.accumulation

    def close(self) -> None:
        """Remove the hooks and close the recorders; may be called twice."""
        self._handle.remove()
        if self._panel is not None:
            self._panel.close()
        self._close_collectors()
        for recorder in self._recorders:
            finish = getattr(recorder, "close", None)
            if finish is not None:
                with self._timed(f"closing {type(recorder).__name__}"):
                    finish()
        self._recorders = []

    def __enter__(self) -> Monitor:
        """The monitor itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that readings depend on, as tensors and numbers.

        The probe is part of it: a checkpoint then holds training examples.
        """
        probe = None
        if self._probe is not None:
            probe = {"inputs": self._probe.inputs, "targets": self._probe.targets}
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "updates": self._run.updates,
            "micro_batches": self._run.micro_batches_before,
            "probe": probe,
            "scale_invariant": self._invariant,
            "settings": self._settings.state_dict(),
            "turned": self._turned,
            "control": None if self._panel is None else self._panel.state_dict(),
            "sections": [astuple(section) for section in self._run.sections.sections],
            "centre": {
                i: self._run.centre[p] for i, p in enumerate(self._parameters()) if p in self._run.centre
            },
            "observables": {
                slot.name: {
                    "estimator": slot.estimator.state_dict(),
                    "stretch": slot.stretch,
                    "seen": slot.seen,
                    "owed": slot.owed,
                    "skips": slot.skips,
                    "failures": slot.failures,
                    "retired": slot.retired,
                }
                for slot in self._slots
            },
        }

    def _parameters(self) -> list[Tensor]:
        """What the optimizer holds, in its own order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            state: What ``state_dict`` returned, also after a round trip through ``torch.save``.

        Raises:
            InputError: If it was written by a version with another form of state.
        """
        if state["version"] != STATE_VERSION:
            raise InputError(
                f"this version reads monitor states of version {STATE_VERSION}",
                got=state["version"],
                fix="Install the version of gradiometer that wrote the checkpoint.",
            )
        self.step = state["step"]
        self._run.updates = state["updates"]
        self._run.micro_batches_before = state["micro_batches"]
        self._settings.load_state_dict(state["settings"])
        self._invariant = state["scale_invariant"]
        self._run.sections = self._sections()
        centre = state["centre"]
        self._run.centre = {
            p: centre[i].to(p.device) for i, p in enumerate(self._parameters()) if i in centre
        }
        if state["probe"] is not None and self._probe_is_given:
            self._warn(
                "the probe given to Monitor is used, not the one in the checkpoint: kernels before "
                "and after cannot be compared unless they are the same."
            )
        elif state["probe"] is not None:
            device = next(self.model.parameters()).device
            moved = pytree.tree_map(
                lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, state["probe"]
            )
            self._probe = Probe(moved["inputs"], moved["targets"])
        saved = dict(state["observables"])
        for slot in self._slots:
            own = saved.pop(slot.name, None)
            if own is None:
                continue
            slot.estimator.load_state_dict(own["estimator"])
            slot.stretch, slot.seen, slot.owed = own["stretch"], own["seen"], own["owed"]
            slot.skips, slot.failures, slot.retired = own["skips"], own["failures"], own["retired"]
        if [astuple(section) for section in self._run.sections.sections] != state["sections"]:
            self._restart("parameters")
        if saved:
            self._warn(f"the checkpoint also holds {sorted(saved)}, which this monitor does not measure.")
        self._turned = state["turned"]
        if state["control"] is not None:
            self._load_control(state["control"])

    def _load_control(self, saved: Mapping[str, Any]) -> None:
        """Continue with the controllers' memories; say it where a change they made is dropped."""
        if self._panel is not None:
            for message in self._panel.load_state_dict(saved):
                self._warn(message)
        elif saved["changes"]:
            self._warn(
                f"the checkpoint holds changes made by {', '.join(saved['controllers'])}, which this monitor "
                "does not have: what they changed goes on as the script sets it."
            )


def _ignore(news: object) -> None:
    """A recorder that takes no decisions, or no words beforehand."""


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
