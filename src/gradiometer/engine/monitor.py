"""The engine: knows when something is due, gathers it once, and never disturbs the run.

One optimizer step passes through four moments. ``micro_batch`` surrounds each forward and backward;
``before_step`` finds the full gradient in place and the weights as they were for this batch's loss; the
optimizer's own post-step hook sees the update that was really made; then everything due is averaged,
read and recorded. No observable is known here by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..autodiff.functional import Forward, matrix_forward
from ..autodiff.untouched import original
from ..collect.base import LossFunction, Training
from ..collect.batch import split_batch
from ..collect.snapshot import Probe
from ..control import Controller, check_controllers, with_needed
from ..errors import InputError
from ..observables import Observable, default_observables
from ..optimizers import step_was_made, unwrapped
from ..record.base import Recorder
from ..record.readings import Decision, Reading
from ..record.table import table
from .calls import Hints, Shown
from .checks import STATE_VERSION, check_batches, check_run, check_settings, check_state
from .cost import CostLedger
from .guard import Guard, contained
from .measurement import Measurement
from .probe import given_probe
from .step import StepUnderWay

_OLDER = {3: "0.1.0"}


class Monitor:
    """Measures a training run from inside, without changing it.

    Args:
        model: The model being trained, not wrapped for data parallelism; compiled or not.
        optimizer: Its optimizer. A post-step hook is registered here and removed by :meth:`close`.
        observables: What to measure; the default set when ``None``.
        controllers: What acts on readings; the observables they need are added.
        recorders: Where readings go: callables ``(step, readings) -> None``.
        forward: Maps ``(model, x)`` to outputs ``[N, O]``, with what ``micro_batch`` was given. By default
            what the network is really called with and returns: its first tensor that holds the examples,
            the logits of a mapping, the last position of a sequence.
        loss_reduction: Whether the loss is the ``"mean"`` or the ``"sum"`` over a batch's examples; read off
            the graph of the loss, else a mean, when ``None``.
        network: Path of the network within the model; found by its calls when ``None``.
        probe: Fixed batch for kernels and Jacobians, ``x`` or ``(x, y)``; by default the first
            ``probe_size`` examples of the first batch. It is kept in the checkpoint; ``"forget"`` takes
            it from the first batch too, and keeps training examples out of checkpoints: after resuming,
            what is measured on it begins anew.
        probe_size: Examples in the default probe.
        batch_dim: Dimension of the inputs that counts the examples; found by trying when ``None``.
        batch_size: Examples in a batch, which decides where two dimensions might count them.
        output: Which part of what the network returns holds its outputs: an index, a key or an attribute.
        dataset_size: Examples in the training set, for SGD's noise scale.
        replacement: Whether batches are drawn with replacement; unknown when ``None``. A loader that
            shuffles draws without.
        fixed_order: Whether every epoch takes the same batches in the same order, which are then no draws.
        loss_fn: Maps the model's outputs and targets to the loss of a batch. Only what makes passes of its
            own needs it: a noise scale from a batch that is split, curvature. Many losses are read off their
            graph.
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
        loss_reduction: Literal["mean", "sum"] | None = None,
        network: str | None = None,
        probe: Any = None,
        probe_size: int = 32,
        batch_dim: int | None = None,
        batch_size: int | None = None,
        output: int | str | None = None,
        dataset_size: int | None = None,
        replacement: bool | None = None,
        fixed_order: bool | None = None,
        loss_fn: LossFunction | None = None,
        layers: bool = False,
        prefix: str = "dynamics",
        on_error: Literal["warn", "raise"] = "warn",
        budget: float | None = None,
    ) -> None:
        model = original(model) if isinstance(model, nn.Module) else model
        check_controllers(controllers)
        wanted = default_observables() if observables is None else observables
        check_settings(wanted, loss_reduction, probe_size, prefix, on_error, budget, loss_fn, layers)
        check_run(model, optimizer, recorders)
        check_batches(forward, dataset_size, replacement, batch_dim, batch_size, output, probe)
        for controller in controllers:
            controller.check_run(dataset_size)
        self.model, self.optimizer = model, optimizer
        self.step = 0
        self.logged_step: int | None = None
        """The step under which this batch's loss is logged, where that is not the number of steps made."""
        self.dataset_size = dataset_size
        self.guard = Guard(on_error)
        fixed = None if probe is None else given_probe(model, forward or matrix_forward, probe)
        self._measurement = Measurement(
            Training(model, unwrapped(optimizer), loss_reduction, loss_fn),
            with_needed(observables, wanted, controllers),
            controllers,
            recorders,
            self.guard,
            hints=Hints(forward, network, batch_dim, output, batch_size, isinstance(fixed, Probe)),
            probe=fixed,
            probe_size=probe_size,
            dataset_size=dataset_size,
            replacement=replacement,
            fixed_order=fixed_order,
            layers=layers,
            prefix=prefix,
            budget=budget,
        )
        self._step: StepUnderWay | None = None
        self._shown: Shown | None = None
        """The micro-batch that has begun and not ended."""
        self._takes_batches = forward is not None
        self._closed = False
        self._step_began: float | None = None
        self._handle = unwrapped(optimizer).register_step_post_hook(self._after_step)

    # -- the four moments --------------------------------------------------------------------------

    def micro_batch(self, x: Any, y: Tensor | None = None) -> AbstractContextManager[None]:
        """Surround one forward and backward; once per accumulated micro-batch.

        Args:
            x: The model's inputs, first dimension the examples.
            y: Their targets, for the alignment of the kernel.
        """
        return _MicroBatch(self, x, y)

    def begin_micro_batch(self, x: Any, y: Tensor | None = None) -> None:
        """As entering :meth:`micro_batch`, for loops made of callbacks."""
        self._enter(Shown(x, y))

    @contained("starting a micro-batch")
    def _enter(self, shown: Shown) -> None:
        if self._closed:
            return
        step = self._measurement.joined(self._step)
        if step is None and self._step is not None:
            self._abandon_step()
        self._measurement.meet(self.step)
        if step is None:
            step = self._begin_step()
        self._shown = shown
        self._measurement.enter(step, shown)

    def begin_batch(self, batch: Any, input_key: str | None = None, target_key: str | None = None) -> None:
        """As :meth:`begin_micro_batch`, with what the loader gives.

        A ``forward`` that was given is called with all of it. Else the first entry of a pair, or a mapping's
        entry of a usual name, are the inputs; what the network is really called with goes before.

        Args:
            batch: What the loader gives.
            input_key: Key of the inputs in a mapping.
            target_key: Key of the targets in a mapping.
        """
        shown = self._split(batch, input_key, target_key)
        if shown is not None:
            self._enter(shown)

    @contained("reading the batch")
    def _split(self, batch: Any, input_key: str | None, target_key: str | None) -> Shown:
        named = input_key is not None or target_key is not None
        try:
            x, y = split_batch(batch, input_key, target_key)
        except InputError:
            if named:
                raise
            return Shown(batch, None, named=False)
        return Shown(batch if self._takes_batches else x, y, named=target_key is not None)

    def end_micro_batch(self, *, broken: bool = False) -> None:
        """As leaving :meth:`micro_batch`.

        Args:
            broken: Whether an exception ended it.
        """
        if self._shown is not None and self._step is not None and self._step.takings:
            self._leave(broken)
        self._shown = None

    @contained("ending a micro-batch")
    def _leave(self, broken: bool) -> None:
        if self._step is not None and self._shown is not None:
            self._measurement.exit(self._step, self._shown, broken=broken)

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
        self.end_micro_batch()
        step = self._step
        if step is not None and not step.takings:
            step.ready = True
        elif not self._closed:
            self._look_at_gradient(grad_scale, grad_scale if loss_scale is None else loss_scale, loss_divisor)

    @contained("before the step")
    def _look_at_gradient(self, grad_scale: float, loss_scale: float, loss_divisor: float | None) -> None:
        """Measure what is there before the update."""
        step = self._step or self._begin_step()
        step.ready = True
        step.grad_scale, step.loss_scale, step.loss_divisor = grad_scale, loss_scale, loss_divisor
        self._measurement.look_at_gradient(step)

    @contained("leaving a step out")
    def skip_step(self) -> None:
        """The optimizer made no step after ``before_step``, and its gradients are thrown away.

        Without this call it is seen by the gradients, if they are gone when the next micro-batch begins. Does
        nothing where the step was made.
        """
        if self._step is not None and self._step.ready:
            self._abandon_step()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer's post-step hook: the update has been made."""
        del args, kwargs
        try:
            if self._see_update(optimizer) is False:
                self._abandon_step()
                return
            if self._step is None or self._step.takings or self._measurement.steering.due(self.step):
                self._look_at_update()
        except BaseException:  # under on_error="raise", before the hook that would do it
            self._measurement.steering.restore_rates()
            raise
        now, before = perf_counter(), self._step_began
        self._measurement.finish(self._step, None if before is None else now - before)
        self._step, self._step_began = None, now
        self.step += 1

    @contained("looking at the optimizer")
    def _see_update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an update was made: a fused optimizer is called even where its scaler skips."""
        if not step_was_made(optimizer):
            return False
        self._measurement.update_made(self._step)
        return True

    @contained("after the step")
    def _look_at_update(self) -> None:
        """Evaluate what needs the update, and record."""
        step = self._step or self._begin_step()
        if not step.ready and step.takings:
            self.guard.warn(
                "monitor.before_step() was not called before optimizer.step(): readings that need the "
                "unclipped gradient or the weights before the update are left out at such steps, and "
                "kernels and Jacobians are taken on the weights after it."
            )
        self._measurement.look_at_update(step)

    def _begin_step(self) -> StepUnderWay:
        """Find out what is due."""
        if self._step_began is None:
            self._step_began = perf_counter()
        self._step = self._measurement.begin(self.step)
        self._step.logged = self.step if self.logged_step is None else self.logged_step
        return self._step

    def _abandon_step(self) -> None:
        """The optimizer made no step (a scaler skipped it): measure the next."""
        if self._step is not None:
            self._measurement.abandon(self._step)
            self._step = None

    def interrupted(self) -> None:
        """An interrupt came in the middle of our own work: this step is not measured, and no hook stands."""
        self._shown = None
        self._measurement.calls.stop()
        self._abandon_step()

    # -- life --------------------------------------------------------------------------------------

    @property
    def latest(self) -> dict[str, Reading]:
        """The latest reading of every key."""
        return self._measurement.output.latest

    @property
    def cost(self) -> CostLedger:
        """What measuring has cost so far."""
        return self._measurement.cost

    def take_new(self) -> list[Reading]:
        """Readings recorded since the last call, for loops that log at a moment of their own."""
        return self._measurement.output.take_new()

    def table(self) -> str:
        """The closing table: reading, error, unit, sentence, cost."""
        measured = self._measurement
        rows = table(
            self.latest,
            self.cost.describe(),
            measured.steering.describe(),
            past=measured.output.past,
            reasons=measured.instruments.reasons(),
        )
        return self.guard.translated(rows)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What controllers have decided: the latest 200 changes and 200 refusals of each."""
        panel = self._measurement.steering.panel
        return () if panel is None else tuple(panel.decisions)

    @property
    def accumulation(self) -> int | None:
        """Micro-batches to accumulate from the next step on; ``None`` where no controller has asked."""
        panel = self._measurement.steering.panel
        return None if panel is None else panel.accumulation

    @property
    def should_stop(self) -> bool:
        """Whether a controller has asked for the run to end; the loop decides what becomes of it."""
        panel = self._measurement.steering.panel
        return panel is not None and panel.should_stop

    def close(self) -> None:
        """Remove the hooks, close the recorders and end all measuring; may be called twice."""
        self._closed = True
        self._handle.remove()
        self._measurement.step_watch.end()
        self._measurement.ranks.leave()
        self._measurement.steering.close()
        self._measurement.calls.stop()
        if self._step is not None:
            self._step.close()
            self._step = None
        self._measurement.output.close()

    def __enter__(self) -> Monitor:
        """The monitor itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that readings depend on, as tensors and numbers.

        The probe is part of it, where kernels or Jacobians are measured: a checkpoint then holds training
        examples. ``probe="forget"`` keeps them out.
        """
        return {"version": STATE_VERSION, "step": self.step, **self._measurement.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        What does not fit this run begins anew, and a warning says so: what was measured on another model,
        with other settings, by another version, and whatever was damaged.

        Args:
            state: What ``state_dict`` returned, also after a round trip through ``torch.save``.

        Raises:
            InputError: If it is no state of a monitor; then nothing has changed.
        """
        check_state(state)
        self.step = state["step"]
        version = state["version"]
        if version == STATE_VERSION:
            self._measurement.load_state_dict(state)
            return
        self.guard.warn(
            f"the checkpoint holds a monitor's state of version {version}, and this version of gradiometer "
            f"goes on from version {STATE_VERSION} only: everything that is measured begins anew. Where that "
            f"must not be, install the version of gradiometer {_OLDER.get(version, 'that wrote it')}."
        )


class _MicroBatch:
    """One forward and backward, as a context."""

    __slots__ = ("_batch", "_monitor")

    def __init__(self, monitor: Monitor, x: Any, y: Tensor | None) -> None:
        self._monitor, self._batch = monitor, (x, y)

    def __enter__(self) -> None:
        self._monitor.begin_micro_batch(*self._batch)

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._monitor.end_micro_batch(broken=kind is not None)
