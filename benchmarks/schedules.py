"""Six schedules on the demos' own models: what each run ends at, and what it takes.

    python benchmarks/schedules.py [--quick]

A constant rate, cosine, OneCycle, ReduceLROnPlateau, ``EquilibriumLR()`` and
``NoiseScaleBatchSize(sampler=...)``, the last two with their defaults and measuring only what they need. All
begin with the demo's optimizer, rate and batch. For one seed all have the same initial weights and the same
examples in the same order: the shuffled epochs end to end, cut into batches that run across their ends, so
that every batch but the last is full, whatever its size.

Cosine falls at each step, to zero at the end of the run. OneCycle's highest rate is three times the demo's,
the rest torch's defaults, the cycle of the momentum included. ReduceLROnPlateau has torch's defaults and a
patience of a tenth of the run's epochs, at least one; it alone looks at the validation loss before the end.
No setting was chosen by its result, nor was the length of the runs; which schedule does best depends on it.

Two processes of one thread each share the runs, seed by seed. Time is processor time of training alone,
with whatever the schedule has to measure and without any evaluation.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import product
from multiprocessing import get_context
from statistics import mean, stdev
from time import process_time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import keep
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, RandomSampler

from gradiometer import Controller, EquilibriumLR, GrowingBatchSampler, Monitor, NoiseScaleBatchSize

SEEDS = 5
PEAK = 3  # OneCycle's highest rate over the demo's


class Setup(NamedTuple):
    """A demo's model and data, and how long it is trained."""

    make_model: Callable[[], Any]
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    batch_size: int
    epochs: int
    l2: bool  # whether the weight decay belongs to the loss


def convnet() -> Setup:
    from gradiometer.demo.digits import DigitsConvNet, digits_loaders  # Lightning is slow to import

    train, val = map(tensors, digits_loaders())
    return Setup(DigitsConvNet, train, val, batch_size=16, epochs=60, l2=True)


def transformer() -> Setup:
    from gradiometer.demo.characters import CharacterTransformer, topics_loaders

    train, val = map(tensors, topics_loaders())
    return Setup(CharacterTransformer, train, val, batch_size=32, epochs=6, l2=False)


def tensors(loader: DataLoader[Any]) -> Any:
    return loader.dataset.tensors


MODELS = {"convnet": cache(convnet), "transformer": cache(transformer)}


def one_cycle(optimizer: torch.optim.Optimizer, steps: int, epochs: int) -> OneCycleLR:
    return OneCycleLR(optimizer, PEAK * optimizer.param_groups[0]["lr"], total_steps=steps)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer, int, int], Any]] = {
    "cosine": lambda optimizer, steps, epochs: CosineAnnealingLR(optimizer, steps),
    "OneCycle": one_cycle,
    "ReduceLROnPlateau": lambda optimizer, steps, epochs: ReduceLROnPlateau(
        optimizer, patience=max(1, epochs // 10)
    ),
}
CONTROLLERS: dict[str, Callable[[GrowingBatchSampler], Controller]] = {
    "EquilibriumLR": lambda sampler: EquilibriumLR(),
    "NoiseScaleBatchSize": lambda sampler: NoiseScaleBatchSize(sampler=sampler),
}
SCHEDULES = ("constant", *SCHEDULERS, *CONTROLLERS)
DECIDES = ("ReduceLROnPlateau", *CONTROLLERS)


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss in nats, and the share of digits or characters named right."""
    model.eval()
    loss, right = 0.0, 0
    for some, targets in zip(x.split(256), y.split(256), strict=True):
        out = model(some)
        loss += loss_of(out, targets).item() * targets.numel()
        right += int((out.argmax(-1) == targets).sum())
    model.train()
    return loss / y.numel(), right / y.numel()


def l2_term(optimizer: torch.optim.Optimizer) -> float:
    """Half the weight decay times the squared norm of the weights."""
    return sum(
        group["weight_decay"] / 2 * parameter.double().square().sum().item()
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def train(name: str, schedule: str, seed: int, quick: bool = False) -> dict[str, Any]:
    """One run: its columns of the table, and after how many updates what was changed by which factor."""
    make_model, (x, y), val, batch_size, epochs, l2 = MODELS[name]()
    if quick:
        x, y, epochs = x[: 4 * batch_size], y[: 4 * batch_size], 2
    torch.manual_seed(seed)
    model = make_model()
    optimizer = model.configure_optimizers()
    order = RandomSampler(x, num_samples=epochs * len(x), generator=torch.Generator().manual_seed(seed))
    sampler = GrowingBatchSampler(order, batch_size)
    scheduler = SCHEDULERS[schedule](optimizer, len(sampler), epochs) if schedule in SCHEDULERS else None
    monitor = None
    if schedule in CONTROLLERS:
        controllers = [CONTROLLERS[schedule](sampler)]
        monitor = Monitor(
            model,
            optimizer,
            [],
            controllers=controllers,
            dataset_size=len(x),
            loss_fn=loss_of,
            on_error="raise",
        )
    updates = seen = 0
    seconds = 0.0
    changes: list[tuple[int, float]] = []
    for batch in sampler:
        began = process_time()
        some, targets = x[batch], y[batch]
        with monitor.micro_batch(some, targets) if monitor else nullcontext():
            loss_of(model(some), targets).backward()
        if monitor:
            monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
        on_plateau = isinstance(scheduler, ReduceLROnPlateau)
        if scheduler and not on_plateau:
            scheduler.step()
        seconds += process_time() - began
        updates, before, seen = updates + 1, seen, seen + len(batch)
        if on_plateau and seen // len(x) > before // len(x):
            rate = optimizer.param_groups[0]["lr"]
            scheduler.step(evaluate(model, *val)[0])
            if optimizer.param_groups[0]["lr"] != rate:
                changes.append((updates, optimizer.param_groups[0]["lr"] / rate))
    last = ""
    if monitor:
        monitor.close()
        changes = [(each.step + 1, each.factor) for each in monitor.decisions if each.acted]
        last = monitor.decisions[-1].sentence() if monitor.decisions else ""
    train_loss, _ = evaluate(model, x, y)
    val_loss, accuracy = evaluate(model, *val)
    return {
        "training loss": train_loss + (l2_term(optimizer) if l2 else 0.0),
        "validation loss": val_loss,
        "accuracy, %": 100 * accuracy,
        "updates": updates,
        "examples": seen,
        "time, s": seconds,
        "changes": changes,
        "last decision": last,
    }


def prepare() -> None:
    """Of each process: one thread, and the first steps, which take longer."""
    torch.set_num_threads(1)
    for name in MODELS:
        train(name, "EquilibriumLR", 0, quick=True)
        train(name, "NoiseScaleBatchSize", 0, quick=True)


COLUMNS = {
    "training loss": 4,
    "validation loss": 4,
    "accuracy, %": 2,
    "updates": 0,
    "examples": 0,
    "time, s": 1,
}


def cell(values: list[float], digits: int) -> str:
    """Mean and its standard error, where the runs differ."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{mean(values):,.{digits}f}" + (f" ± {error:,.{digits}f}" if error else "")


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """One row per schedule: mean and standard error over the seeds."""
    head = ["schedule", *COLUMNS, "changes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, runs in rows.items():
        cells = [cell([run[column] for run in runs], digits) for column, digits in COLUMNS.items()]
        changes = cell([len(run["changes"]) for run in runs], 1) if name in DECIDES else "–"
        lines.append("| " + " | ".join([name, *cells, changes]) + " |")
    return "\n".join(lines)


def when(rows: dict[str, list[dict[str, Any]]]) -> str:
    """After how many updates each run of a schedule that decides for itself was changed."""
    lines = []
    for name in DECIDES:
        each = [", ".join(str(updates) for updates, _ in run["changes"]) or "never" for run in rows[name]]
        lines.append(f"- {name} changed after updates, by seed: {'; '.join(each)}")
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    return "\n\n".join(f"{name}:\n\n{table(rows)}\n\n{when(rows)}" for name, rows in results.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, for the tests; nothing is saved")
    quick = parser.parse_args().quick
    runs = list(product(MODELS, range(1 if quick else SEEDS), SCHEDULES))
    results: dict[str, dict[str, list[Any]]] = {name: {each: [] for each in SCHEDULES} for name in MODELS}
    with ProcessPoolExecutor(2, get_context("spawn"), prepare) as pool:
        names, seeds, schedules = zip(*runs, strict=True)
        done = pool.map(train, names, schedules, seeds, [quick] * len(runs))
        for (name, seed, schedule), run in zip(runs, done, strict=True):
            results[name][schedule].append(run)
            print(f"{name}, seed {seed}, {schedule}: {run}", flush=True)
    print("\n" + markdown(results))
    if not quick:
        keep("schedules", results, markdown)


if __name__ == "__main__":
    main()
