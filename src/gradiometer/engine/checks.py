"""What a monitor refuses to be built with, and what to write instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..collect.registry import COLLECTORS
from ..collect.snapshot import Snapshot, present_name
from ..errors import InputError, check_list
from ..observables import Observable


def check_run(
    model: Any,
    optimizer: Any,
    recorders: Any,
    forward: Any,
    dataset_size: Any,
    replacement: Any,
) -> None:
    """Refuse what the settings are to be used on.

    Args:
        model: As for :class:`~gradiometer.engine.monitor.Monitor`.
        optimizer: As there.
        recorders: As there.
        forward: As there.
        dataset_size: As there.
        replacement: As there.

    Raises:
        InputError: With what to write instead.
    """
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            "Monitor takes a module and its optimizer",
            got=f"{type(model).__name__} and {type(optimizer).__name__}",
            fix="Write Monitor(model, optimizer).",
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"{type(model).__name__} has no trainable parameter",
            fix="Call model.requires_grad_(True) on the part that is trained.",
        )
    of = "callables (step, readings) -> None"
    check_list("recorders", recorders, of, callable, 'TensorBoardRecorder("runs/a")')
    if forward is not None and not callable(forward):
        raise InputError(
            "forward must be a callable (model, x) -> outputs [N, O]",
            got=repr(forward),
            fix="Write forward=lambda model, x: model(x).",
        )
    if replacement not in (None, True, False):
        raise InputError(
            "replacement says whether batches are drawn with replacement",
            got=repr(replacement),
            fix="Write replacement=False for a loader that shuffles, or leave it out.",
        )
    if dataset_size is not None and (not isinstance(dataset_size, int) or dataset_size < 1):
        raise InputError(
            "dataset_size must be a whole number of examples, at least 1",
            got=repr(dataset_size),
            fix="Write dataset_size=len(dataset).",
        )


def check_settings(
    observables: Any,
    loss_reduction: str = "mean",
    probe_size: int = 32,
    prefix: str = "dynamics",
    on_error: str = "warn",
    budget: float | None = None,
    loss_fn: Any = None,
    layers: bool = False,
) -> None:
    """Refuse settings that no run can use.

    Args:
        observables: As for :class:`~gradiometer.engine.monitor.Monitor`.
        loss_reduction: As for :class:`~gradiometer.engine.monitor.Monitor`.
        probe_size: As for :class:`~gradiometer.engine.monitor.Monitor`.
        prefix: As for :class:`~gradiometer.engine.monitor.Monitor`.
        on_error: As for :class:`~gradiometer.engine.monitor.Monitor`.
        budget: As for :class:`~gradiometer.engine.monitor.Monitor`.
        loss_fn: As for :class:`~gradiometer.engine.monitor.Monitor`.
        layers: As for :class:`~gradiometer.engine.monitor.Monitor`.

    Raises:
        InputError: With what to write instead.
    """
    example = "NeuralTangentKernel(), GradientNoiseScale()"
    check_list("observables", observables, "Observable values", lambda v: isinstance(v, Observable), example)
    for observable in observables:
        observable.check_words(observable.checks)
        _check_needs(observable)
    groups = [observable.group for observable in observables]
    twice = {group for group in groups if groups.count(group) > 1}
    if twice:
        raise InputError(
            "two observables would write under the same keys",
            got=sorted(twice),
            fix="Give each kind once, or use two monitors with different prefix=.",
        )
    if loss_fn is not None and not callable(loss_fn):
        raise InputError(
            "loss_fn must be a callable (outputs, targets) -> loss",
            got=repr(loss_fn),
            fix="Write loss_fn=torch.nn.functional.cross_entropy.",
        )
    if not isinstance(layers, bool):
        raise InputError("layers must be True or False", got=repr(layers), fix="Write layers=True.")
    if loss_reduction not in ("mean", "sum"):
        raise InputError("unknown loss_reduction", got=repr(loss_reduction), fix='Write "mean" or "sum".')
    if not isinstance(probe_size, int) or probe_size < 1:
        raise InputError("probe_size must be at least 1", got=repr(probe_size), fix="Write probe_size=32.")
    if not isinstance(prefix, str) or not prefix or "/" in prefix:
        raise InputError(
            "prefix must be one word without a slash",
            got=repr(prefix),
            fix='Write prefix="dynamics".',
        )
    if on_error not in ("warn", "raise"):
        raise InputError("unknown on_error", got=repr(on_error), fix='Write "warn" or "raise".')
    if budget is not None and (not isinstance(budget, (int, float)) or not 0 < budget < 1):
        raise InputError("budget is a share between 0 and 1", got=repr(budget), fix="Write budget=0.05.")


def _check_needs(observable: Observable) -> None:
    """Refuse an observable that asks for a field nobody supplies."""
    for name in sorted(observable.required(True) | observable.level_needs | observable.optional):
        if present_name(name) not in Snapshot.__annotations__:
            raise InputError(
                f"{type(observable).__name__} needs the field {name!r}, and nobody supplies it",
                fix=f"Write one of {', '.join(sorted(COLLECTORS))}, or register a collector for it.",
            )
