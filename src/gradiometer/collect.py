"""Gather what observables need from a running loop: one collector per snapshot field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .collectors import Collector, Run
from .errors import SampleSkippedError, UnsupportedError
from .linalg import inner_products, squared_norms
from .snapshot import GroupSettings, Update, Weights, Work
from .sources import AutoSource, ExampleSource, NormLayerSource, SplitSource


class UpdateCollector(Collector):
    """The displacement of each parameter group.

    Under SGD it is rebuilt from what the optimizer leaves behind: torch's buffer ``b`` is the direction
    itself, and without momentum ``d (1 - lr wd) = grad + wd theta'``. Nesterov, whose multi-tensor form
    overwrites the gradient, and any other optimizer cost a copy of the weights on sampled steps.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._copies: list[list[Tensor]] | None = None

    def before_step(self) -> None:
        """Copy the weights where the update cannot be rebuilt."""
        if not is_rebuilt(self.run.optimizer):
            self._copies = [self._copy(group["params"]) for group in self.run.optimizer.param_groups]

    def _copy(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The weights of a group, in the scratch tensors."""
        trained = _trained(parameters)
        for parameter in trained:
            if parameter not in self.run.scratch:
                self.run.scratch[parameter] = torch.empty_like(parameter, requires_grad=False)
        copies = [self.run.scratch[parameter] for parameter in trained]
        if copies:
            torch._foreach_copy_(copies, [parameter.detach() for parameter in trained])
        return copies

    def result(self) -> Update:
        """Squared displacement, and its inner product with the buffer for Nesterov."""
        sections = self.run.sections
        squares, dots = [], []
        for g, group in enumerate(self.run.optimizer.param_groups):
            trained = _trained(group["params"])
            if self._copies is not None:
                moved = self._copies[g]
                if moved:
                    torch._foreach_sub_(moved, [p.detach() for p in trained])
                squares.append(sections.sums(squared_norms, trained, moved))
                velocities = _velocities(self.run.optimizer, trained)
                if group.get("nesterov") and velocities:
                    dots.append(sections.sums(inner_products, trained, moved, velocities))
            elif is_rebuilt(self.run.optimizer):
                directions = sgd_directions(self.run.optimizer, group)
                squares.append(sections.sums(squared_norms, trained, directions) * float(group["lr"]) ** 2)
            else:
                raise SampleSkippedError(
                    "the weights before the step were not seen", fix="Call monitor.before_step()."
                )
        total = _added(squares)
        return Update(total, _added(dots) if dots else total * 0)


class WorkCollector(Collector):
    """Inner products with the weights before the step; copies them, so for verification only."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._copies: list[list[Tensor]] | None = None

    def before_step(self) -> None:
        """Copy the weights."""
        self._copies = [_copies(group["params"]) for group in self.run.optimizer.param_groups]

    def result(self) -> Work:
        """Both inner products, in float64 throughout."""
        if self._copies is None:
            raise SampleSkippedError(
                "the weights before the step were not seen", fix="Call monitor.before_step()."
            )
        sections = self.run.sections
        gradient, displacement = [], []
        for old, group in zip(self._copies, self.run.optimizer.param_groups, strict=True):
            trained = _trained(group["params"])
            old64 = [tensor.double() for tensor in old]
            after = [p.detach() for p in trained]
            moved = [(a - b).double() for a, b in zip(old, after, strict=True)]
            displacement.append(sections.sums(inner_products, trained, old64, moved))
            if is_sgd(self.run.optimizer) and group["nesterov"]:  # d = g + mu b
                lr, momentum = float(group["lr"]), group["momentum"]
                velocities = _velocities(self.run.optimizer, trained)
                used = [d / lr - momentum * b.double() for d, b in zip(moved, velocities, strict=True)]
                gradient.append(sections.sums(inner_products, trained, old64, used))
            elif is_sgd(self.run.optimizer):
                sign = -1.0 if group["maximize"] else 1.0
                used = [
                    sign * _gradient(p).double() + group["weight_decay"] * before
                    for p, before in zip(trained, old64, strict=True)
                ]
                gradient.append(sections.sums(inner_products, trained, old64, used))
            else:
                gradient.append(displacement[-1] * math.nan)
        return Work(_added(gradient), _added(displacement))


class WeightCollector(Collector):
    """Norms of the weights after the step, and their inner products with the buffer."""

    def result(self) -> Weights:
        """Both, by section."""
        sections = self.run.sections
        parameters = sections.parameters  # idle ones count too
        squares = sections.sums(squared_norms, parameters, [p.detach() for p in parameters])
        held = [(p, _buffer(self.run.optimizer, p)) for p in parameters]
        moving = [(p, b) for p, b in held if b is not None]
        dots = squares * 0
        if moving:
            with_buffer, buffers = map(list, zip(*moving, strict=True))
            weights = [p.detach() for p in with_buffer]
            dots = sections.sums(inner_products, with_buffer, weights, buffers)
        return Weights(squares, dots, torch.tensor(self.run.updates, dtype=torch.float64))


class StepFactorCollector(Collector):
    """How far the optimizer moves each weight per unit of gradient, relative to the first group's rate."""

    def result(self) -> dict[str, float | Tensor]:
        """By parameter name."""
        optimizer = self.run.optimizer
        adaptive = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        if not adaptive and not is_sgd(optimizer):
            raise UnsupportedError(
                "the kernel under the optimizer's own steps is known for SGD, Adam and AdamW",
                got=type(optimizer).__name__,
                fix="Write NeuralTangentKernel(preconditioned=False).",
            )
        names = {id(p): name for name, p in self.run.model.named_parameters() if p.requires_grad}
        reference = float(optimizer.param_groups[0]["lr"])
        if reference == 0.0:
            raise SampleSkippedError(
                "the first group's learning rate is 0 at this step, and the others cannot be relative to it",
                fix="This step is left out; put a group that is trained first.",
            )
        factors: dict[str, float | Tensor] = dict.fromkeys(names.values(), 0.0)
        for group in optimizer.param_groups:
            rate = float(group["lr"]) / reference
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    continue
                state = optimizer.state.get(parameter, {})
                if not adaptive:
                    factors[name] = rate
                elif state:
                    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
                    corrected = second / (1 - group["betas"][1] ** float(state["step"]))
                    factors[name] = rate / (corrected.sqrt() + group["eps"])
        return factors


COLLECTORS: Mapping[str, type[Collector]] = {
    "chunks": AutoSource,
    "example_chunks": ExampleSource,
    "norm_layer_chunks": NormLayerSource,
    "split_chunks": SplitSource,
    "update": UpdateCollector,
    "work": WorkCollector,
    "weights": WeightCollector,
    "step_factors": StepFactorCollector,
}


def is_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update is exactly that of ``torch.optim.SGD``.

    Args:
        optimizer: Any optimizer.
    """
    return type(optimizer) is torch.optim.SGD


def is_rebuilt(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update can be read off after the step: SGD, but not Nesterov's.

    Args:
        optimizer: Any optimizer.
    """
    return is_sgd(optimizer) and not any(group["nesterov"] for group in optimizer.param_groups)


def group_settings(optimizer: torch.optim.Optimizer) -> tuple[GroupSettings, ...]:
    """The optimizer's settings by parameter group, with distinct names.

    Args:
        optimizer: Any optimizer.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> group_settings(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))[0].momentum
        0.9
    """
    sgd = is_sgd(optimizer)
    names: list[str] = []
    settings = []
    for index, group in enumerate(optimizer.param_groups):
        name = str(group.get("name", index)).replace("/", ".")
        names.append(name if name not in names else f"{name}.{index}")
        momentum = float(group.get("momentum", 0.0)) if sgd else 0.0
        settings.append(
            GroupSettings(
                name=names[-1],
                lr=float(group["lr"]),
                momentum=momentum,
                dampening=float(group.get("dampening", 0.0)) if momentum else 0.0,
                nesterov=bool(group.get("nesterov", False)) if sgd else False,
                weight_decay=float(group.get("weight_decay", 0.0)),
                is_sgd=sgd,
            )
        )
    return tuple(settings)


def sgd_directions(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> list[Tensor]:
    """Directions ``d = (theta_t - theta_{t+1}) / lr`` after a step of ``torch.optim.SGD`` without Nesterov.

    Args:
        optimizer: The optimizer, right after its step, gradients still in place.
        group: One of its parameter groups.

    Returns:
        Directions of the parameters that had a gradient; the buffers themselves under momentum.
    """
    lr, decay = float(group["lr"]), group["weight_decay"]
    sign = -1.0 if group["maximize"] else 1.0
    parameters = _trained(group["params"])
    if group["momentum"]:
        return _velocities(optimizer, parameters)
    directions = []
    for parameter in parameters:
        direction = sign * _gradient(parameter)
        if decay:
            direction = direction.add(parameter.detach(), alpha=decay) / (1.0 - lr * decay)
        directions.append(direction)
    return directions


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach()


def _trained(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.grad is not None]


def _buffer(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    return optimizer.state.get(parameter, {}).get("momentum_buffer") if is_sgd(optimizer) else None


def _velocities(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Tensor]:
    return [b for b in (_buffer(optimizer, p) for p in parameters) if b is not None]


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in _trained(parameters)]


def _added(values: Sequence[Tensor]) -> Tensor:
    """Sum of numbers per section, on the CPU if they are on several devices."""
    if len({value.device for value in values}) > 1:
        values = [value.cpu() for value in values]
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum(0)
