"""A monitor whose model and optimizer come later: what callbacks of training frameworks drive.

A framework builds its callback before it has an optimizer, loads its state before training starts, and
may never start. The session bridges that; a callback only translates hooks into its calls.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..control import check_controllers
from ..engine.checks import check_batches, check_settings
from ..engine.monitor import Monitor
from ..errors import GradiometerError, MeasurementWarning, check_kind
from ..observables import FluctuationDissipation, GradientNoiseScale
from ..observables.fluctuation_dissipation import RATIO
from ..observables.gradient_noise_scale import SCALE
from ..optimizers import unwrapped
from ..record.base import Recorder
from ..record.readings import scalars
from .batches import batch_size_of, check_part, dataset_size_of, fixed_order_of, loss_scales, replacement_of

IN_PROGRESS_BAR = (GradientNoiseScale.key(SCALE), FluctuationDissipation.key(RATIO))
"""Keys of the readings that a progress bar shows, unless the user names others."""


ARGUMENTS = (
    *("observables", "controllers", "model", "input_key", "target_key", "output", "batch_dim", "forward"),
    *("probe", "probe_size", "dataset_size", "replacement", "loss_reduction", "loss_fn", "layers", "prefix"),
    *("on_error", "budget"),
)
"""What a callback passes on to its session."""


class Session:
    """Builds a :class:`Monitor` when training starts, and passes hooks to it while it is there.

    Args:
        model: Dotted attribute of the module that holds the network; the module itself when ``None``.
        input_key: Key of the inputs where batches are mappings.
        target_key: Key of the targets where batches are mappings.
        vocabulary: What to say in place of a phrase that speaks of a plain loop.
        arguments: Further arguments of :class:`Monitor`; what the loader says serves where they say nothing.

    Raises:
        InputError: If an argument cannot be used.

    Example:
        >>> session = Session(probe_size=4, observables=[])
        >>> net = nn.Linear(2, 1)
        >>> session.start(net, [torch.optim.SGD(net.parameters(), lr=0.1)])
        >>> session.monitor.step
        0
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
        vocabulary: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        for name, text in (("model", model), ("input_key", input_key), ("target_key", target_key)):
            check_kind(name, text, (str, type(None)), '"backbone"' if name == "model" else '"x"')
        self.controllers = arguments.get("controllers", ())
        check_controllers(self.controllers)
        settings = {name: value for name, value in arguments.items() if value is not None}
        settings.pop("controllers", None)
        of_batches = inspect.signature(check_batches).parameters
        check_batches(**{name: settings.pop(name) for name in of_batches if name in settings})
        check_settings(settings.pop("observables", ()), **settings)
        self.arguments = arguments
        self.monitor: Monitor | None = None
        self._model = model
        self._vocabulary = vocabulary or {}
        self._keys = (input_key, target_key)
        self._saved: dict[str, Any] = {}
        self._batches = 0
        self._batch: Any = None
        self._handle: Any = None
        self._steps = self._steps_of_last_batch = 0

    def start(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        recorders: Sequence[Recorder] = (),
        loader: Any = None,
        step: int = 0,
        batches: float | None = None,
    ) -> None:
        """Build the monitor, and continue from a state that was loaded or left by an earlier run.

        Args:
            module: The module that is trained.
            optimizers: Its optimizers; with several nothing is measured, and a warning says so.
            recorders: Where readings go.
            loader: The training loader, for the size of the data set and how batches are drawn.
            step: The optimizer step at which training begins; controllers go on from an earlier run only
                where that is not before its end.
            batches: How many of the loader's batches an epoch takes; all of them when ``None``.

        Raises:
            InputError: If a controller cannot act on this run.
        """
        if len(optimizers) != 1:
            off = "the monitor and its controllers are" if self.controllers else "the monitor is"
            message = f"one optimizer can be measured, got {len(optimizers)}: {off} off."
            warnings.warn(message, MeasurementWarning, stacklevel=2)
            return
        for controller in self.controllers:
            controller.check_loader(loader)
        if self.monitor is not None:
            self._handle.remove()
            self.monitor.close()
            if self.monitor.model is module and not self._saved:
                self._saved = self.state_dict()
                if step < self.monitor.step:  # a run of its own
                    self._saved["monitor"]["control"] = None
        check_part(module, self._model)
        of_loader = {
            "dataset_size": dataset_size_of(loader, batches),
            "replacement": replacement_of(loader),
            "fixed_order": fixed_order_of(loader),
            "batch_size": batch_size_of(loader),
        }
        said = {name: value for name, value in self.arguments.items() if value is not None}
        self.monitor = Monitor(
            module, optimizers[0], recorders=recorders, network=self._model, **{**of_loader, **said}
        )
        self.monitor.guard.vocabulary = self._vocabulary
        if self._saved:
            self._resume(self.monitor, loader)
        self._handle = unwrapped(optimizers[0]).register_step_post_hook(self._stepped)

    def _resume(self, monitor: Monitor, loader: Any) -> None:
        """Continue from the state that was loaded; one that is no state does not end the run."""
        saved, self._saved = self._saved, {}
        try:
            monitor.load_state_dict(saved["monitor"])
        except GradiometerError as error:
            monitor.guard.warn(f"everything that is measured begins anew: {error}")
            return
        if saved.get("batches") and not hasattr(loader, "state_dict"):
            monitor.guard.warn(
                f"the checkpoint was saved {saved['batches']} batches into an epoch, and this loader can "
                "only begin at the first batch: the epoch's batches are replayed, and readings go on from "
                "the saved state."
            )

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After a step within a batch, where another one will follow: it is made from the same batch."""
        del optimizer, args, kwargs
        self._steps += 1
        if self.monitor is not None and self._steps < self._steps_of_last_batch:
            self.monitor.begin_batch(self._batch, *self._keys)

    @property
    def accumulates(self) -> bool:
        """Whether a controller may change the number of micro-batches in a step."""
        return any(controller.accumulates for controller in self.controllers if not controller.dry_run)

    @property
    def resizes(self) -> bool:
        """Whether a controller may change the batches of the loader."""
        acting = [
            controller
            for controller in self.controllers
            if not controller.dry_run and "batch_size" in controller.turns()
        ]
        return any(not controller.accumulates for controller in acting)

    @property
    def accumulation(self) -> int | None:
        """Micro-batches to accumulate from the next step on; ``None`` where no controller has asked."""
        return None if self.monitor is None else self.monitor.accumulation

    @property
    def should_stop(self) -> bool:
        """Whether a controller has asked for the run to end."""
        return self.monitor is not None and self.monitor.should_stop

    def begin(self, batch: Any, *, step: int | None, logged: int, index: int) -> None:
        """A micro-batch begins.

        Args:
            batch: What the loader gave.
            step: Optimizer steps made so far; ``None`` where the monitor counts them itself.
            logged: The step under which its loss is logged.
            index: Its position in the epoch.
        """
        if self.monitor is not None:
            self.monitor.skip_step()  # frameworks that call before_step() know that a step is due
            self.monitor.step = self.monitor.step if step is None else step
            self.monitor.logged_step, self._batches = logged, index + 1
            self._batch, self._steps_of_last_batch, self._steps = batch, self._steps, 0
            self.monitor.begin_batch(batch, *self._keys)

    def end(self) -> None:
        """Its backward pass is done."""
        if self.monitor is not None:
            self.monitor.end_micro_batch()

    def before_step(
        self, optimizer: torch.optim.Optimizer, scaler: Any = None, loss_divisor: float | None = None
    ) -> None:
        """The full, unclipped gradient is in place.

        Args:
            optimizer: The optimizer about to step.
            scaler: The gradient scaler, already unscaled, or ``None``.
            loss_divisor: What the loss of each micro-batch was divided by, where it is known.
        """
        if self.monitor is not None:
            self.monitor.before_step(**loss_scales(scaler, optimizer), loss_divisor=loss_divisor)

    def epoch_ended(self) -> None:
        """A checkpoint from here on belongs to the end of an epoch."""
        self._batches = 0

    def new_numbers(self) -> dict[str, float]:
        """Finite numbers recorded since the last call, by log key."""
        new = {} if self.monitor is None else scalars(self.monitor.take_new())
        return {key: value for key, value in new.items() if math.isfinite(value)}

    def close(self) -> str:
        """Take everything off.

        Returns:
            The closing table; empty if nothing was measured.
        """
        if self.monitor is None:
            return ""
        self._handle.remove()
        self.monitor.close()
        self._batch = None
        return self.monitor.table()

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state, or the loaded one while there is no monitor."""
        if self.monitor is None:
            return self._saved
        return {"monitor": self.monitor.state_dict(), "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until the monitor is built.

        Controllers carry theirs out at once: a loader may be asked for batches before there is a monitor.

        Args:
            state: What :meth:`state_dict` returned.
        """
        inside = state.get("monitor") if isinstance(state, Mapping) else None
        self._saved = dict(state) if inside is not None else {}
        if state and inside is None:
            message = "what was loaded is no state of this callback: everything that is measured begins anew."
            warnings.warn(message, MeasurementWarning, stacklevel=2)
        control = inside.get("control") if isinstance(inside, Mapping) else None
        memories = control.get("controllers") if isinstance(control, Mapping) else None
        for controller in self.controllers:
            with suppress(Exception):  # the monitor carries it out again, and says it if it cannot
                memory = (memories or {}).get(type(controller).__name__)
                if memory is not None and not memory["dry_run"] and not controller.dry_run:
                    controller.apply(memory["memory"])
