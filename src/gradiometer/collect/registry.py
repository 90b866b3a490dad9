"""Gather what observables need from a running loop: one collector per snapshot field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import SampleSkippedError, UnsupportedError
from ..optimizers.updates import displacements, is_decoupled, rebuilds, squared_displacements
from ..stats.linalg import inner_products, squared_norms
from .base import Collector, Memory, Step, Training
from .curvature import CurvatureCollector, StepCurvatureCollector
from .gradient import GradientCollector, PreviousGradientCollector
from .gradient_parts import (
    AutoSource,
    ExampleSource,
    NormLayerSource,
    Preconditioner,
    PreconditionerCollector,
    SplitSource,
)
from .snapshot import GroupSettings, ParameterStep, Update, Weights, Work


class UpdateCollector(Collector):
    """The displacement of each section.

    It is rebuilt from what the optimizer leaves behind where that is exact; any other optimizer costs a
    copy of the weights on sampled steps.
    """

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._copies: list[list[Tensor]] | None = None
        self._asked = False
        # one tensor of the shape of each parameter: allocating them anew costs more than filling them
        self._scratch: dict[Tensor, Tensor] = memory.setdefault("scratch", {})

    def before_step(self) -> None:
        """Copy the weights where the update cannot be rebuilt."""
        self._asked = True
        if not rebuilds(self.training.optimizer):
            self._copies = [self._copy(group["params"]) for group in self.training.optimizer.param_groups]

    def _copy(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The weights of a group, in the scratch tensors."""
        trained = _trained(parameters)
        for parameter in trained:
            if parameter not in self._scratch:
                self._scratch[parameter] = torch.empty_like(parameter, requires_grad=False)
        copies = [self._scratch[parameter] for parameter in trained]
        if copies:
            torch._foreach_copy_(copies, [parameter.detach() for parameter in trained])
        return copies

    def result(self) -> Update:
        """Squared displacement, and its inner product with the buffer for Nesterov."""
        if isinstance(self.training.optimizer, torch.optim.LBFGS):
            raise UnsupportedError(
                "LBFGS moves the weights several times in a step, and only the last move is seen",
                fix="Use the other observables.",
            )
        if not self._asked and not rebuilds(self.training.optimizer):
            raise _weights_not_seen()
        squares, dots = [], []
        for g, group in enumerate(self.training.optimizer.param_groups):
            reduce = self.step.sections.reduce
            if self._copies is None:
                rows = squared_displacements(self.training.optimizer, group, self._scratch)
                squares.append(reduce(group["params"], rows))
            else:
                trained, moved = _trained(group["params"]), self._copies[g]
                if moved:
                    torch._foreach_sub_(moved, [p.detach() for p in trained])
                squares.append(self.step.sections.sums(squared_norms, trained, moved))
            if is_sgd(self.training.optimizer) and group["nesterov"]:
                dots.append(self._along_buffer(g, group))
        return Update(_added(squares), _added(dots) if dots else None)

    def _along_buffer(self, index: int, group: Mapping[str, Any]) -> Tensor:
        """Inner product of the displacement with the buffer."""
        trained = _trained(group["params"])
        if self._copies is not None:
            moved = self._copies[index]
        else:
            every = displacements(self.training.optimizer, group)
            moved = [u for u, p in zip(every, group["params"], strict=True) if p.grad is not None]
        buffers = _velocities(self.training.optimizer, trained)
        return self.step.sections.sums(inner_products, trained, moved, buffers)


class WorkCollector(Collector):
    """Inner products with the weights before the step; copies them, so for verification only."""

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._copies: list[list[Tensor]] | None = None

    def before_step(self) -> None:
        """Copy the weights."""
        self._copies = [_copies(group["params"]) for group in self.training.optimizer.param_groups]

    def result(self) -> Work:
        """Both inner products, in float64 throughout."""
        if self._copies is None:
            raise _weights_not_seen()
        sections = self.step.sections
        gradient, displacement = [], []
        for old, group in zip(self._copies, self.training.optimizer.param_groups, strict=True):
            trained = _trained(group["params"])
            old64 = [tensor.double() for tensor in old]
            after = [p.detach() for p in trained]
            moved = [(a - b).double() for a, b in zip(old, after, strict=True)]
            displacement.append(sections.sums(inner_products, trained, old64, moved))
            if is_sgd(self.training.optimizer) and group["nesterov"]:  # d = g + mu b
                lr, momentum = float(group["lr"]), group["momentum"]
                velocities = _velocities(self.training.optimizer, trained)
                used = [d / lr - momentum * b.double() for d, b in zip(moved, velocities, strict=True)]
                gradient.append(sections.sums(inner_products, trained, old64, used))
            elif is_sgd(self.training.optimizer):
                sign = -1.0 if group["maximize"] else 1.0
                used = [  # in this order, since a gradient may be sparse
                    group["weight_decay"] * before + sign * _gradient(p).double()
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
        return self._of([p.detach() for p in self.step.sections.parameters])

    def _of(self, weights: list[Tensor]) -> Weights:
        sections = self.step.sections
        parameters = sections.parameters  # idle ones count too
        squares = sections.sums(squared_norms, parameters, weights)
        held = [(p, w, _buffer(self.training.optimizer, p)) for p, w in zip(parameters, weights, strict=True)]
        moving = [(p, w, b) for p, w, b in held if b is not None]
        dots = squares * 0
        if moving:
            dots = sections.sums(inner_products, *map(list, zip(*moving, strict=True)))
        updates = torch.tensor(self.step.updates, dtype=torch.float64)
        return Weights(squares, dots, updates, self.step.drifts)


class CentredWeightCollector(WeightCollector):
    """The same for the weights less what they were at the window's first record."""

    saved: ClassVar[frozenset[str]] = frozenset({"centre"})
    of_window: ClassVar[bool] = True

    def result(self) -> Weights:
        """Both, by section; 0 where the window begins."""
        centre: dict[int, Tensor] = self.memory.setdefault("centre", {})
        position = {parameter: i for i, parameter in enumerate(self.training.parameters())}
        moved = []
        for parameter in self.step.sections.parameters:
            weights, i = parameter.detach(), position[parameter]
            if i not in centre:
                centre[i] = weights.clone()
            moved.append(weights - centre[i].to(weights.device))
        return self._of(moved)


class StepFactorCollector(Collector):
    """How far the optimizer moves each weight per unit of gradient, relative to the first group's rate."""

    def result(self) -> dict[str, float | Tensor]:
        """By parameter name."""
        optimizer = self.training.optimizer
        adaptive = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        if not adaptive and not is_sgd(optimizer):
            raise UnsupportedError(
                "how the optimizer makes its steps is known for SGD, Adam and AdamW",
                got=type(optimizer).__name__,
                fix="Leave LearningRateLimit out; write NeuralTangentKernel(preconditioned=False).",
            )
        names = {id(p): name for name, p in self.training.model.named_parameters() if p.requires_grad}
        reference = float(optimizer.param_groups[0]["lr"])
        if reference == 0.0:
            raise SampleSkippedError(
                "the first group's learning rate is 0 at this step, and the others cannot be relative to it",
                fix="This step is left out; put a group that is trained first.",
            )
        metric = Preconditioner(optimizer) if adaptive else None
        factors: dict[str, float | Tensor] = dict.fromkeys(names.values(), 0.0)
        for group in optimizer.param_groups:
            rate = float(group["lr"]) / reference
            for parameter in group["params"]:
                factor = metric.of(parameter) if metric is not None else 1.0
                if id(parameter) in names and factor is not None:
                    factors[names[id(parameter)]] = rate * factor
        return factors


class ParameterStepCollector(Collector):
    """How the optimizer makes each parameter's steps; one that it does not move has rate 0.

    A gradient that holds the mean loss c times is that of the mean loss with c times the learning rate and
    1/c of the L2 coefficient.
    """

    def result(self) -> dict[str, ParameterStep]:
        """By parameter name."""
        optimizer = self.training.optimizer
        if any(group["maximize"] for group in optimizer.param_groups if "maximize" in group):
            raise UnsupportedError(
                "a stable learning rate is known where the optimizer minimises",
                got="maximize=True",
                fix="Leave maximize=True out, and train on the negative of the objective.",
            )
        names = {id(p): name for name, p in self.training.model.named_parameters()}
        reference, multiple = (
            float(optimizer.param_groups[0]["lr"]),
            self.step.loss_multiple(self.training.loss_reduction),
        )
        factors = StepFactorCollector(self.training, self.step, self.memory).result()
        steps = {name: ParameterStep(rate=0.0) for name in factors}
        for group in optimizer.param_groups:
            decay = float(group["weight_decay"])
            if is_sgd(optimizer):
                momentum, nesterov = float(group["momentum"]), bool(group["nesterov"])
                dampening = float(group["dampening"])
            else:
                momentum = dampening = float(group["betas"][0])
                nesterov = False
            decoupled = not is_sgd(optimizer) and is_decoupled(optimizer, group)
            for parameter in group["params"]:
                name = names.get(id(parameter), "")
                factor = factors.get(name, 0.0)
                if isinstance(factor, float) and factor == 0.0:  # not the model's, or not moved
                    continue
                steps[name] = ParameterStep(
                    rate=factor * reference * multiple,
                    momentum=momentum,
                    dampening=dampening,
                    nesterov=nesterov,
                    weight_decay=0.0 if decoupled else decay / multiple,
                    shrinkage=float(group["lr"]) * decay if decoupled else 0.0,
                )
        return steps


COLLECTORS: Mapping[str, type[Collector]] = {
    "chunks": AutoSource,
    "example_chunks": ExampleSource,
    "norm_layer_chunks": NormLayerSource,
    "split_chunks": SplitSource,
    "gradient": GradientCollector,
    "previous_gradient": PreviousGradientCollector,
    "preconditioner": PreconditionerCollector,
    "curvature": CurvatureCollector,
    "step_curvature": StepCurvatureCollector,
    "update": UpdateCollector,
    "work": WorkCollector,
    "weights": WeightCollector,
    "centred_weights": CentredWeightCollector,
    "step_factors": StepFactorCollector,
    "parameter_steps": ParameterStepCollector,
}


def is_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update is exactly that of ``torch.optim.SGD``.

    Args:
        optimizer: Any optimizer.
    """
    return type(optimizer) is torch.optim.SGD


def group_settings(optimizer: torch.optim.Optimizer) -> tuple[GroupSettings, ...]:
    """The optimizer's settings by parameter group, with distinct names.

    Args:
        optimizer: Any optimizer.

    Example:
        >>> net = torch.nn.Linear(2, 1)
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


def _weights_not_seen() -> SampleSkippedError:
    return SampleSkippedError("the weights before the step were not seen", fix="Call monitor.before_step().")


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach()


def _trained(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.grad is not None]


def _buffer(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    buffer = optimizer.state.get(parameter, {}).get("momentum_buffer") if is_sgd(optimizer) else None
    return buffer.to_dense() if buffer is not None and buffer.is_sparse else buffer


def _velocities(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Tensor]:
    return [b for b in (_buffer(optimizer, p) for p in parameters) if b is not None]


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in _trained(parameters)]


def _added(values: Sequence[Tensor]) -> Tensor:
    """Sum of numbers per section, on the CPU if they are on several devices."""
    if len({value.device for value in values}) > 1:
        values = [value.cpu() for value in values]
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum(0)
