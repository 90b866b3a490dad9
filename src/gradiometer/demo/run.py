"""Train one of the demonstration networks with every default observable on."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from gradiometer.callbacks import DynamicsMonitor
from gradiometer.errors import InputError
from gradiometer.observables import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    NeuralTangentKernel,
    Observable,
)
from gradiometer.observables.schedules import every, log_spaced
from gradiometer.stats.estimators import Window

STEPS = {"convnet": 3000, "gpt": 1500}


def demo_observables(model: str) -> list[Observable]:
    """The default set at cadences that give full curves on a short run.

    Args:
        model: ``"convnet"`` or ``"gpt"``.
    """
    kernel = every(50) if model == "convnet" else every(250)
    return [
        NeuralTangentKernel(schedule=log_spaced(until=100) | kernel),
        JacobianNorm(schedule=50 if model == "convnet" else 100),
        GradientNoiseScale(schedule=10, estimator=Window(1000)),
        FluctuationDissipation(schedule=25, sampling=5),
    ]


def run_demo(
    model: str, *, steps: int | None = None, log_dir: Path = Path("runs"), quiet: bool = False
) -> Path:
    """Train, log to TensorBoard, print the closing table and where to look.

    Args:
        model: ``"convnet"`` (digits) or ``"gpt"`` (characters).
        steps: Optimizer steps; the demo's own number when ``None``.
        log_dir: Folder for the run.
        quiet: Leave out the progress bar.

    Returns:
        The run's folder.

    Raises:
        InputError: If the model is unknown.
    """
    if model not in STEPS:
        raise InputError("unknown demo model", got=repr(model), fix=f"Write one of {sorted(STEPS)}.")
    L.seed_everything(0, verbose=False)
    network: L.LightningModule
    if model == "convnet":
        from .digits import DigitsConvNet, digits_loaders

        network, loaders = DigitsConvNet(), digits_loaders()
    else:
        from .characters import CharacterTransformer, topics_loaders

        network, loaders = CharacterTransformer(), topics_loaders()
    logger = TensorBoardLogger(log_dir, name=model)
    monitor = DynamicsMonitor(demo_observables(model), layout=True)
    trainer = L.Trainer(
        max_steps=steps or STEPS[model],
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        logger=logger,
        callbacks=[monitor],
        log_every_n_steps=10,
        enable_progress_bar=not quiet,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # inside Lightning
        trainer.fit(network, *loaders)
    print(f"\nThe curves are in {logger.log_dir}. Look at them with:\n")
    print(f"    tensorboard --logdir {log_dir}      (in a checkout: make dashboard)\n")
    return Path(logger.log_dir)
