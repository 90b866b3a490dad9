"""What a monitor refuses to be built with, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..autodiff.functional import check_forward, check_materialised
from ..collect.registry import COLLECTORS
from ..collect.snapshot import Snapshot, present_name
from ..errors import InputError, check_callable, check_choice, check_flag, check_list, check_number, shown
from ..observables import Observable

STATE_VERSION = 5
"""Of the form of a monitor's state."""
_PARTS = {"run", "settings", "probe", "control", "memories", "observables"}


def check_run(
    model: Any,
    optimizer: Any,
    recorders: Any,
) -> None:
    """Refuse what the settings are to be used on.

    Args:
        model: As for :class:`~gradiometer.engine.monitor.Monitor`.
        optimizer: As there.
        recorders: As there.

    Raises:
        InputError: With what to write instead.
    """
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            "Monitor takes a module and its optimizer",
            got=f"{type(model).__name__} and {type(optimizer).__name__}",
            fix="Write Monitor(model, optimizer).",
        )
    check_materialised(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"{type(model).__name__} has no trainable parameter",
            fix="Call model.requires_grad_(True) on the part that is trained.",
        )
    of = "callables (step, readings) -> None"
    check_list("recorders", recorders, of, callable, 'TensorBoardRecorder("runs/a")')


def check_batches(
    forward: Any = None,
    dataset_size: Any = None,
    replacement: Any = None,
    batch_dim: Any = None,
    batch_size: Any = None,
    output: Any = None,
    probe: Any = None,
) -> None:
    """Refuse what cannot be said of batches and of what the network makes of them.

    Args:
        forward: As for :class:`~gradiometer.engine.monitor.Monitor`.
        dataset_size: As for :class:`~gradiometer.engine.monitor.Monitor`.
        replacement: As for :class:`~gradiometer.engine.monitor.Monitor`.
        batch_dim: As for :class:`~gradiometer.engine.monitor.Monitor`.
        batch_size: As for :class:`~gradiometer.engine.monitor.Monitor`.
        output: As for :class:`~gradiometer.engine.monitor.Monitor`.
        probe: As for :class:`~gradiometer.engine.monitor.Monitor`; a batch is tried when there is a model.

    Raises:
        InputError: With what to write instead.
    """
    check_forward(forward)
    if isinstance(probe, str) and probe != "forget":
        raise InputError(
            "the probe is a batch, or the word that it is not kept in checkpoints",
            got=shown(probe),
            fix='Write probe=(x, y) or probe="forget".',
        )
    if replacement is not None and not isinstance(replacement, bool):
        raise InputError(
            "replacement says whether batches are drawn with replacement",
            got=shown(replacement),
            fix="Write replacement=False for a loader that shuffles, or leave it out.",
        )
    check_number("dataset_size", dataset_size, least=1, integer=True, optional=True, example="len(dataset)")
    check_number("batch_dim", batch_dim, least=0, integer=True, optional=True, example="0")
    check_number("batch_size", batch_size, least=1, integer=True, optional=True, example="32")
    if output is not None and (not isinstance(output, (int, str)) or isinstance(output, bool)):
        raise InputError(
            "output names a part of what the network returns: an index, a key or an attribute",
            got=shown(output),
            fix='Write output=0 or output="logits".',
        )


def check_settings(
    observables: Any,
    loss_reduction: str | None = None,
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
    example = "torch.nn.functional.cross_entropy"
    check_callable("loss_fn", loss_fn, "(outputs, targets) -> loss", example, optional=True)
    check_flag("layers", layers)
    if loss_reduction is not None:
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
    check_number("probe_size", probe_size, least=1, integer=True, example="32")
    if not isinstance(prefix, str) or not prefix.isprintable() or not prefix or "/" in prefix:
        raise InputError(
            "prefix must be one word without a slash",
            got=shown(prefix),
            fix='Write prefix="dynamics".',
        )
    check_choice("on_error", on_error, ("warn", "raise"))
    check_number("budget", budget, above=0, below=1, optional=True, example="0.05")


def check_state(state: Any) -> None:
    """Refuse what is no state of a monitor, or lacks one of its parts.

    Args:
        state: As for :meth:`~gradiometer.engine.monitor.Monitor.load_state_dict`.

    Raises:
        InputError: With what to write instead.
    """
    fix = "Pass what monitor.state_dict() returned."
    numbers = ("version", "step")
    if not isinstance(state, Mapping) or not all(type(state.get(name)) is int for name in numbers):
        kind = f"a {type(state).__name__}"
        got = f"{kind} of {sorted(map(str, state))}" if isinstance(state, Mapping) else kind
        raise InputError("this is no state of a monitor", got=got, fix=fix)
    if state["step"] < 0:
        raise InputError("the step of a monitor's state is not negative", got=state["step"], fix=fix)
    mappings = [isinstance(state.get(name), Mapping) for name in ("memories", "observables")]
    if state["version"] == STATE_VERSION and not (state.keys() >= _PARTS and all(mappings)):
        raise InputError(
            "this state of a monitor is not whole", got=f"the parts {sorted(map(str, state))}", fix=fix
        )


def _check_needs(observable: Observable) -> None:
    """Refuse an observable that asks for a field nobody supplies."""
    for name in sorted(observable.required(True) | observable.level_needs | observable.optional):
        if present_name(name) not in Snapshot.__annotations__:
            raise InputError(
                f"{type(observable).__name__} needs the field {name!r}, and nobody supplies it",
                fix=f"Write one of {', '.join(sorted(COLLECTORS))}, or register a collector for it.",
            )
