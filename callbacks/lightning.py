"""The Lightning callback: translates hooks, and nothing else.

Every hook hands its arguments to the engine; when to measure, what, and how stands in
``gradiometer.engine.monitor``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gradiometer.adapters.session import ARGUMENTS, IN_PROGRESS_BAR, Session
from gradiometer.control import Controller
from gradiometer.engine.monitor import Monitor
from gradiometer.errors import check_flag, check_list
from gradiometer.observables import Observable
from gradiometer.record.loggers import LoggersRecorder

from .lightning_trainer import check_accumulation, follow_controllers, pass_on, position
from .lightning_words import LIGHTNING


def _is_key(key: object) -> bool:
    return isinstance(key, str)


class DynamicsMonitor(Callback):
    """Measure the dynamics of a Lightning run and log them beside its loss curves.

    Readings go to every logger on the step axis of the losses, at their own cadence, and to
    ``trainer.callback_metrics`` once they are finite, so that ``EarlyStopping(..., strict=False)`` and
    ``ModelCheckpoint`` can watch them.
    Weights after training are bit-identical with and without this callback, as long as it has no
    controllers.

    Args:
        observables: What to measure; the default set when left out.
        controllers: What acts on the readings, such as ``EquilibriumLR()``; what they need is measured, too.
        model: Attribute of the LightningModule that holds the network, such as ``backbone``; found by its
            calls when left out.
        input_key: Key of the inputs where batches are mappings.
        target_key: Key of the targets where batches are mappings.
        output: Which part of what the network returns holds its outputs: an index, a key or an attribute.
        output_key: The same, as it was called before.
        batch_dim: Dimension of the network's inputs that counts the examples; found by trying when left out.
        forward: Maps the module and a whole batch to outputs ``[N, O]``, where calls cannot be noted.
        probe: Fixed inputs for kernels and Jacobians, ``x`` or ``(x, y)``; ``"forget"`` keeps the first
            training examples, which are taken when left out, out of checkpoints.
        dataset_size: Examples in the training set; the loader's when left out.
        replacement: Whether batches are drawn with replacement; as the loader's sampler says when left out.
        loss_reduction: Whether the loss is a mean or a sum over the examples of a batch; read off its graph
            when left out.
        loss_fn: Maps outputs and targets to the loss of a batch; only what makes passes of its own needs it.
        layers: Whether noise and fluctuation-dissipation are also read for every layer.
        probe_size: Number of examples of the first batch on which kernels and Jacobians are evaluated.
        prefix: First part of every log key.
        on_error: Turn failures into a warning, or raise them.
        budget: Largest share of the loop's time that measuring may take; no limit when left out.
        progress_bar: Keys, without the prefix, that are also shown in the progress bar.
        layout: Whether to write a custom-scalars layout into TensorBoard.
        print_table: Whether to print the closing table.

    Units:
        See the reading table in ``docs/observables.md``.

    Shapes:
        Batches are ``(x, y)`` or mappings, with the examples in the first dimension.

    Source:
        The observables name theirs.

    Raises:
        InputError: If an argument cannot be used; at the start of training for what needs the model.

    Example:
        >>> trainer = Trainer(callbacks=[DynamicsMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        observables: Sequence[Observable] | None = None,
        *,
        controllers: Sequence[Controller] = (),
        model: str | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
        output: int | str | None = None,
        output_key: str | None = None,
        batch_dim: int | None = None,
        forward: Callable[[Any, Any], torch.Tensor] | None = None,
        probe: Any = None,
        dataset_size: int | None = None,
        replacement: bool | None = None,
        loss_reduction: Literal["mean", "sum"] | None = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        layers: bool = False,
        probe_size: int = 32,
        prefix: str = "dynamics",
        on_error: Literal["warn", "raise"] = "warn",
        budget: float | None = None,
        progress_bar: Sequence[str] = IN_PROGRESS_BAR,
        layout: bool = False,
        print_table: bool = True,
    ) -> None:
        arguments = dict(locals())
        check_list("progress_bar", progress_bar, "keys", _is_key, f'"{IN_PROGRESS_BAR[0]}"')
        check_flag("layout", layout)
        check_flag("print_table", print_table)
        arguments["output"] = output_key if output is None else output
        self.session = Session(vocabulary=LIGHTNING, **{name: arguments[name] for name in ARGUMENTS})
        self._prefix, self._layout, self._print_table = prefix, layout, print_table
        self._progress_bar = {f"{prefix}/{key}" for key in progress_bar}

    @property
    def monitor(self) -> Monitor | None:
        """The engine, once training has started."""
        return self.session.monitor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the engine on the optimizer that trains."""
        check_accumulation(trainer, self.session)
        settings = {"layout": self._layout, "prefix": self._prefix, "step": trainer.global_step}
        logs = LoggersRecorder.apart(trainer.loggers, **settings)
        loader, batches = trainer.train_dataloader, trainer.num_training_batches
        self.session.start(pl_module, trainer.optimizers, logs, loader, trainer.global_step, batches)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch begins; before the first one of a step is when their number may change."""
        follow_controllers(trainer, self.session, batch_idx)
        self.session.begin(batch, **position(trainer, pl_module), index=batch_idx)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The full, unclipped gradient is in place."""
        self.session.end()
        # Lightning divides by this also in a last window that is shorter
        divisor = float(trainer.accumulate_grad_batches) if pl_module.automatic_optimization else None
        self.session.before_step(optimizer, getattr(trainer.precision_plugin, "scaler", None), divisor)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Its backward passes are done; pass new readings, and a controller's wish to end, to the trainer."""
        self.session.end()
        pass_on(trainer, self.session, self._progress_bar)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A checkpoint from here on belongs to the end of an epoch."""
        self.session.epoch_ended()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take everything off and print the closing table."""
        table = self.session.close()
        if table and self._print_table and trainer.is_global_zero:
            print(table)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take everything off when training breaks."""
        self.session.close()

    @property
    def state_key(self) -> str:
        """Several monitors may run side by side under different prefixes."""
        return self._generate_state_key(prefix=self._prefix)

    def state_dict(self) -> dict[str, Any]:
        """The engine's state."""
        return self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the engine is built."""
        self.session.load_state_dict(state_dict)
