"""What a Lightning trainer takes over: growing batches, new readings, the end of the run."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from gradiometer.adapters.session import Session
from gradiometer.errors import InputError


def check_accumulation(trainer: Trainer, session: Session) -> None:
    """Refuse a run in which a controller and something else say how many batches are accumulated.

    Args:
        trainer: The trainer.
        session: What holds the controllers.

    Raises:
        InputError: If a scheduler of accumulation or the strategy does, too.
    """
    everyone = cast("Any", trainer).callbacks  # set by one of its connectors
    rivals: list[Any] = [
        callback for callback in everyone if isinstance(callback, GradientAccumulationScheduler)
    ]
    if trainer.strategy.handles_gradient_accumulation:
        rivals.append(trainer.strategy)
    if rivals and session.accumulates:
        raise InputError(
            "NoiseScaleBatchSize cannot change how many batches are accumulated where something else does",
            got=type(rivals[-1]).__name__,
            fix="Give it a sampler= instead, or leave the other out.",
        )


def follow_controllers(trainer: Trainer, session: Session, batch_idx: int) -> None:
    """Take up what controllers have decided about batches, before one begins.

    Args:
        trainer: The trainer.
        session: What holds the controllers.
        batch_idx: The batch that is about to begin.
    """
    if session.accumulates and trainer.lightning_module.automatic_optimization:
        _accumulate(trainer, session.accumulation, batch_idx)
    if session.resizes:
        _count_batches(trainer, batch_idx)


def pass_on(trainer: Trainer, session: Session, progress_bar: set[str]) -> None:
    """Give the trainer what is new after a batch: readings, and a controller's wish to end the run.

    Args:
        trainer: The trainer; its ``log()`` would compute every key again after each batch.
        session: What holds the monitor.
        progress_bar: Keys that are also shown in the progress bar.
    """
    numbers = session.new_numbers()
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in numbers.items()})
    trainer.progress_bar_metrics.update({key: numbers[key] for key in progress_bar & set(numbers)})
    trainer.should_stop |= session.should_stop


def position(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Where a run stands: the optimizer steps made, and the step under which this batch is logged.

    Args:
        trainer: The trainer. Its ``global_step`` counts every step of every optimizer.
        module: What it trains; under manual optimization the monitor counts the steps of its own optimizer.
    """
    made = trainer.global_step if module.automatic_optimization else None
    return {"step": made, "logged": trainer.fit_loop.epoch_loop._batches_that_stepped}


def _accumulate(trainer: Trainer, wanted: int | None, batch_idx: int) -> None:
    """Change the number that is accumulated, where no window is open under the old one or the new."""
    if wanted and batch_idx % wanted == 0 and batch_idx % trainer.accumulate_grad_batches == 0:
        trainer.accumulate_grad_batches = wanted


def _count_batches(trainer: Trainer, batch_idx: int) -> None:
    """Bring the trainer's count of an epoch's batches up to date.

    It is made once, and validation waits for a batch of that number: after the batch has grown it would
    never come.
    """
    batches = sized_len(trainer.train_dataloader)
    if batches is None:
        return
    limit, interval = trainer.limit_train_batches, trainer.val_check_interval
    if isinstance(limit, int):
        batches = min(batches, limit)
    elif limit is not None:
        batches = int(batches * limit)
    batches = max(batches, batch_idx + 1)
    trainer.fit_loop.max_batches = batches
    if isinstance(interval, float):
        trainer.val_check_batch = max(1, int(batches * interval))
    elif isinstance(interval, int) and trainer.check_val_every_n_epoch is not None:
        trainer.val_check_batch = min(interval, batches)
