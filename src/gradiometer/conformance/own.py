"""This package's own estimators as adapters: a real model, optimizer and loop under the monitor.

The cases are least squares, so the model is linear; its weight is split over two layers, since a gradient
has more than one tensor in practice. The optimizer makes every step itself: that it arrives at the weights
of the case is checked too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..engine.monitor import Monitor
from ..errors import MeasurementWarning
from ..observables import FluctuationDissipation, GradientNoiseScale
from ..observables.fluctuation_dissipation import LEFT, RATIO, RIGHT
from ..observables.gradient_noise_scale import GRAD_SQ_NORM, SCALE, TRACE
from ..observables.schedules import Schedule, at
from ..record.memory import MemoryRecorder
from ..record.readings import Reading
from ..record.table import sentence
from ..stats.estimators import Mean
from .noise_cases import noise_cases
from .relation_cases import relation_cases
from .steps import Array, NoiseStep, RelationStep
from .suite import Adapter, Case

_RECORDS = 16
_SUMMED = ("8 parts of 16", "unequal parts", "short last window", "loss scale", "non-finite steps")
_SINGLE = ("8 parts of 1", "loss scale", "large scale", "one part per step", "no finite step")
_VERDICTS = {"stationary": True, "transient": False}


class _TwoLayers(nn.Module):
    """``w . x`` with the two halves of w in layers of their own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cut = size // 2
        self.first = nn.Linear(self.cut, 1, bias=False, dtype=torch.float64)
        self.second = nn.Linear(size - self.cut, 1, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """One output per example, ``[N, P] -> [N, 1]``."""
        return self.first(x[:, : self.cut]) + self.second(x[:, self.cut :])

    def halves(self, vector: Array) -> list[Tensor]:
        """A vector in the shapes of the parameters."""
        full = torch.as_tensor(vector)[None]
        return [full[:, : self.cut].clone(), full[:, self.cut :].clone()]

    def load(self, weights: Array) -> None:
        """Put the weights in place, as a loop would that changes them beside the optimizer."""
        for parameter, half in zip(self.parameters(), self.halves(weights), strict=True):
            parameter.data.copy_(half)

    def weights(self) -> Tensor:
        """The weights as one vector."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters()])


def own_suites() -> dict[str, tuple[Adapter, tuple[Case, ...]]]:
    """Every way in which this package measures, and the cases for it, by name.

    The noise scale is measured from micro-batches; the reduction of the loss and the source only change how
    the parts of a step are read off, so the cases about that are enough for the other two.

    Returns:
        An adapter and its cases.

    Example:
        >>> list(own_suites())
        ['noise, micro-batches', 'noise, summed loss', 'noise, single examples', 'relation']
    """
    cases = noise_cases()
    return {
        "noise, micro-batches": (noise_adapter("mean"), cases),
        "noise, summed loss": (noise_adapter("sum"), _named(cases, _SUMMED)),
        "noise, single examples": (single_examples, _named(cases, _SINGLE)),
        "relation": (relation, relation_cases()),
    }


def _named(cases: Sequence[Case], names: Sequence[str]) -> tuple[Case, ...]:
    return tuple(case for case in cases if case.name in names)


def noise_adapter(loss_reduction: Literal["mean", "sum"]) -> Adapter:
    """``GradientNoiseScale`` on gradient accumulation, one micro-batch per part.

    Args:
        loss_reduction: Whether the loop takes the mean or the sum over the batch.

    Returns:
        The adapter.
    """

    def adapter(steps: Sequence[NoiseStep]) -> dict[str, Any]:
        return _measure_noise(steps, [step.sizes for step in steps], loss_reduction)

    return adapter


def single_examples(steps: Sequence[NoiseStep]) -> dict[str, Any]:
    """``GradientNoiseScale`` on one micro-batch per step, where every part is one example.

    Args:
        steps: The steps of one run.

    Returns:
        Readings; nothing where a part has several examples, since the scatter within it counts then too.
    """
    if any(size != 1 for step in steps for size in step.sizes):
        return {}
    return _measure_noise(steps, [(len(step.sizes),) for step in steps], "mean")


def _measure_noise(
    steps: Sequence[NoiseStep], sizes: Sequence[tuple[int, ...]], loss_reduction: Literal["mean", "sum"]
) -> dict[str, Any]:
    """Run the loop; the learning rate is 0, the weights are those of the case."""
    model = _TwoLayers(steps[0].inputs.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    observable = GradientNoiseScale(schedule=_spread(0, len(steps) - 1), sampling=1, estimator=Mean())
    memory = MemoryRecorder()
    complete = all(step.finite and len(step.sizes) > 1 for step in steps)
    monitor = Monitor(
        model,
        optimizer,
        [observable],
        recorders=[memory],
        loss_reduction=loss_reduction,
        on_error="raise" if complete else "warn",
    )
    with warnings.catch_warnings(), monitor:
        warnings.simplefilter("ignore", MeasurementWarning)
        for step, parts in zip(steps, sizes, strict=True):
            model.load(step.weights)
            optimizer.zero_grad()
            inputs, targets = torch.as_tensor(step.inputs), torch.as_tensor(step.targets)
            for x, y in zip(inputs.split(list(parts)), targets.split(list(parts)), strict=True):
                with monitor.micro_batch(x, y):
                    losses = (model(x)[:, 0] - y).square() / 2
                    loss = losses.sum() if loss_reduction == "sum" else losses.mean() / len(parts)
                    (loss * step.loss_scale).backward()
            monitor.before_step(grad_scale=step.loss_scale)
            if step.finite:  # as a gradient scaler decides
                optimizer.step()
    answer: dict[str, Any] = dict.fromkeys(("trace", "grad_sq_norm", "scale"), math.nan)
    names = {"trace": TRACE, "grad_sq_norm": GRAD_SQ_NORM, "scale": SCALE}
    return answer | _numbers(memory, {part: GradientNoiseScale.key(name) for part, name in names.items()})


def relation(steps: Sequence[RelationStep]) -> dict[str, Any]:
    """``FluctuationDissipation`` on a loop whose gradients are those of the case.

    Args:
        steps: The steps of one run.

    Returns:
        Readings over the counted steps, and the verdict that users see.

    Raises:
        RuntimeError: If the optimizer does not follow the steps of the case.
    """
    model = _TwoLayers(len(steps[0].weights))
    model.load(steps[0].weights)
    optimizer = _optimizer(model, steps[0])
    start = next(t for t, step in enumerate(steps) if step.counted) - 1
    observable = FluctuationDissipation(schedule=_spread(start, len(steps) - 1), sampling=1, estimator=Mean())
    memory = MemoryRecorder()
    with Monitor(model, optimizer, [observable], recorders=[memory], on_error="raise") as monitor:
        for step in steps:
            optimizer.param_groups[0]["lr"] = step.lr
            optimizer.zero_grad()
            x = torch.as_tensor(step.loss_gradient)[None]
            with monitor.micro_batch(x):
                model(x).sum().backward()
            monitor.before_step()
            optimizer.step()
    after = torch.as_tensor(steps[-1].weights_after)
    if not torch.allclose(model.weights(), after, rtol=1e-9, atol=1e-9):
        raise RuntimeError("the optimizer did not follow the steps of the case")
    latest = memory.latest()
    verdict = sentence(latest[f"dynamics/{FluctuationDissipation.key(RATIO)}"], latest).split(":")[0]
    names = {"left": LEFT, "right": RIGHT, "ratio": RATIO}
    answer = _numbers(memory, {part: FluctuationDissipation.key(name) for part, name in names.items()})
    return answer | {"stationary": _VERDICTS.get(verdict)}


def _optimizer(model: _TwoLayers, step: RelationStep) -> torch.optim.Optimizer:
    """The optimizer of a case, its buffer in place."""
    kind: Callable[..., torch.optim.Optimizer] = _DecoupledSGD if step.decoupled else torch.optim.SGD
    settings: dict[str, Any] = {
        "momentum": step.momentum,
        "dampening": step.dampening,
        "nesterov": step.nesterov,
        "weight_decay": step.weight_decay,
    }
    optimizer = kind(model.parameters(), lr=step.lr, **settings)
    if step.momentum:
        for parameter, half in zip(model.parameters(), model.halves(step.velocity), strict=True):
            optimizer.state[parameter]["momentum_buffer"] = half
    return optimizer


class _DecoupledSGD(torch.optim.Optimizer):
    """Momentum with decoupled weight decay, which torch has for Adam only."""

    def __init__(self, parameters: Any, **settings: Any) -> None:
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                buffer = self.state[parameter]["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(parameter.grad, alpha=1 - group["dampening"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(buffer, alpha=group["lr"])


def _spread(first: int, last: int) -> Schedule:
    """Records at both ends and at equal distances between them."""
    stride = max(1, -(-(last - first) // _RECORDS))
    return at(sorted({*range(first, last, stride), last}))


def _numbers(memory: MemoryRecorder, keys: Mapping[str, str]) -> dict[str, Any]:
    """The latest value for each part of the answer, ``nan`` where it is not resolved, and its interval."""
    latest = memory.latest()
    answer: dict[str, Any] = {}
    for name, key in keys.items():
        reading = latest.get(f"dynamics/{key}")
        if reading is None:
            continue
        interval = _interval(reading)
        if interval:
            answer[f"{name}_interval"] = interval
        answer[name] = reading.value if name != "scale" or _resolved(reading, latest) else math.nan
    return answer


def _interval(reading: Reading) -> tuple[float, float] | None:
    """A 95 % interval: the reading's own, or from its standard error."""
    low, high = getattr(reading, "low", math.nan), getattr(reading, "high", math.nan)
    if not math.isnan(low + high):
        return float(low), float(high)
    if not isinstance(reading.value, float) or math.isnan(reading.stderr):
        return None
    return reading.value - 1.96 * reading.stderr, reading.value + 1.96 * reading.stderr


def _resolved(reading: Reading, latest: Mapping[str, Reading]) -> bool:
    """Whether the reading stands as a number: by its own word, or in the words that users see."""
    resolved: bool | None = getattr(reading, "resolved", None)
    return not sentence(reading, latest).startswith("not resolved") if resolved is None else resolved
