"""What one step of an optimizer is: settings, displacement from its state, metric, step form.

A family is the kind of optimizers whose step is made in one way; each stands in a file of this folder.
Whatever the rest of the project wants to know of an optimizer, it asks its family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InputError, SampleSkippedError, UnsupportedError, check_kind

__all__ = [
    "Family",
    "GroupSettings",
    "Move",
    "ParameterStep",
    "Scratch",
    "family_of",
    "register",
    "unwrapped",
]

Scratch = dict[Tensor, Tensor]
"""One tensor of the shape of each parameter, to work in."""
Move = tuple[list[float], list[Tensor]]
"""A number and a tensor for each parameter; the displacement is their product."""

SMALLEST_SHRINKAGE = 1e-3
"""Dividing by less of ``1 - lr wd`` would raise float32 rounding above 1e-4 of the update."""


@dataclass(frozen=True)
class GroupSettings:
    """The optimizer's settings for one parameter group, as they stand at this step.

    Args:
        name: The group's ``name`` entry, or its index.
        lr: Learning rate.
        momentum: Heavy-ball or Nesterov coefficient; 0 where the optimizer has none.
        dampening: Dampening, 0 without momentum.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: L2 coefficient (SGD) or decoupled decay.
        is_sgd: Whether the update is exactly that of ``torch.optim.SGD``.
    """

    name: str
    lr: float
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    is_sgd: bool


@dataclass(frozen=True)
class ParameterStep:
    r"""How the optimizer makes a parameter's steps from gradients ``g`` of the mean loss.

    .. math:: b \leftarrow \mu\, b + (1 - \nu)\,(g + \lambda\theta), \qquad
              \theta \leftarrow (1 - s)\,\theta - r\, b

    Args:
        rate: r, the learning rate, for Adam over the root of the second moment; entry by entry.
        momentum: mu; for Adam beta1.
        dampening: nu; for Adam beta1.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: lambda, the L2 coefficient; 0 where the decay is decoupled.
        shrinkage: s, learning rate times decoupled decay.
    """

    rate: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    shrinkage: float = 0.0


class Family:
    """One way of making a step. It holds no state: every method is given the optimizer or one of its groups.

    What is not overridden is that of an optimizer of which nothing is known: its update is seen by copies of
    the weights, and it has neither momentum nor metric.
    """

    classes: ClassVar[tuple[type[Optimizer], ...]] = ()
    """The optimizers it is for; not their subclasses, which may do something else."""
    linear: ClassVar[bool] = False
    """Whether the step is linear in the gradient: then the relations have their form with momentum."""
    adaptive: ClassVar[bool] = False
    """Whether it divides by a root of the second moment: it has a metric."""
    steps_known: ClassVar[bool] = False
    """Whether :meth:`parameter_step` says how it makes its steps."""
    moves_once: ClassVar[bool] = True
    """Whether the weights move once in a step."""

    # -- settings ----------------------------------------------------------------------------------

    def momentum(self, group: Mapping[str, Any]) -> tuple[float, float, bool]:
        """Momentum, dampening, and whether the momentum is Nesterov's.

        Args:
            group: A parameter group.
        """
        del group
        return 0.0, 0.0, False

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        """Whether the decay acts on the weights, and not through the gradient.

        Args:
            group: A parameter group.
        """
        del group
        return False

    # -- the update, from what the optimizer leaves behind -----------------------------------------

    def refusal(self, optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
        """Why the update of a group cannot be rebuilt; ``None`` where it can.

        Args:
            optimizer: The optimizer, between the backward pass and its step.
            group: One of its parameter groups.
        """
        del group
        return f"no formula for {type(optimizer).__name__}"

    def move(
        self, optimizer: Optimizer, group: Mapping[str, Any], trained: list[Tensor], scratch: Scratch
    ) -> Move:
        """The displacement ``theta_t - theta_{t+1}`` of each trained parameter.

        Args:
            optimizer: The optimizer, right after its step, gradients still in place.
            group: One of its parameter groups.
            trained: Those of its parameters that have a gradient.
            scratch: Tensors to work in; missing ones are added.

        Raises:
            UnsupportedError: Where it cannot be rebuilt.
        """
        raise UnsupportedError(
            f"the update cannot be rebuilt: {self.refusal(optimizer, group)}",
            fix="Copy the weights before the step.",
        )

    def velocity(self, optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
        """The momentum buffer that the relations need; ``None`` without one.

        Args:
            optimizer: The optimizer.
            parameter: One of its parameters.
        """
        del optimizer, parameter
        return None

    def used_gradients(
        self, optimizer: Optimizer, group: Mapping[str, Any], before: list[Tensor], moved: list[Tensor]
    ) -> list[Tensor] | None:
        """The gradients the step used, L2 term included, in float64; ``None`` where that is not known.

        Complex ones are pairs of reals here, as are the weights and their displacements.

        Args:
            optimizer: The optimizer, right after its step.
            group: One of its parameter groups.
            before: Weights before the step of the parameters that have a gradient, float64.
            moved: Their displacements, float64.
        """
        del optimizer, group, before, moved
        return None

    # -- metric and step form ----------------------------------------------------------------------

    def metric(self, optimizer: Optimizer) -> Any:
        """What multiplies each gradient, with ``of(parameter)`` and ``apply(parameter, gradient)``.

        Args:
            optimizer: The optimizer, before its step.

        Raises:
            UnsupportedError: If it has none.
        """
        raise UnsupportedError(
            "the preconditioned noise scale is known for Adam and AdamW",
            got=type(optimizer).__name__,
            fix="Write GradientNoiseScale(preconditioned=False).",
        )

    def parameter_step(
        self, group: Mapping[str, Any], rate: float | Tensor, multiple: float
    ) -> ParameterStep:
        """How the optimizer makes a parameter's steps from gradients of the mean loss.

        Args:
            group: The parameter's group.
            rate: The learning rate in the metric, for the gradient that the optimizer sees.
            multiple: How often that gradient holds the one of the mean loss.
        """
        raise NotImplementedError


_FAMILIES: dict[type[Optimizer], Family] = {}
_OTHER = Family()
_WRAPPERS = frozenset({"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"})
"""Classes of frameworks that hand the step on to the optimizer inside; by name, so that none is imported."""


def register(family: Family) -> Family:
    """Make a family known; every file of this folder does so for its own.

    Args:
        family: What a step of its classes is.

    Raises:
        InputError: If one of its classes has a family.
    """
    check_kind("family", family, Family, "SignSGDFamily()")
    for kind in family.classes:
        if kind in _FAMILIES and type(_FAMILIES[kind]) is not type(family):
            raise InputError(
                f"{kind.__name__} has a family of optimizers already",
                got=f"{type(family).__name__} beside {type(_FAMILIES[kind]).__name__}",
                fix="Leave one of them out; a subclass of the optimizer may have a family of its own.",
            )
        _FAMILIES[kind] = family
    return family


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside the wrappers of Accelerate (and so of Hugging Face), Fabric and Lightning.

    Args:
        optimizer: Any optimizer. Another wrapper is looked through where it has no hooks of its own and shows
            the state of the optimizer inside; what is not wrapped is returned as it is.
    """
    if not hasattr(optimizer, "optimizer"):
        check_kind("optimizer", optimizer, Optimizer, "torch.optim.SGD(model.parameters(), lr=0.1)")
    while _hands_on(optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def _hands_on(optimizer: Optimizer) -> bool:
    """Whether an optimizer does nothing but call the one inside it."""
    if any(kind.__name__ in _WRAPPERS for kind in type(optimizer).__mro__):
        return True
    inner = getattr(optimizer, "optimizer", None)
    without_hooks = "_optimizer_step_post_hooks" not in getattr(optimizer, "__dict__", {})
    return without_hooks and isinstance(inner, Optimizer) and optimizer.state is inner.state


def family_of(optimizer: Optimizer) -> Family:
    """What one step of an optimizer is.

    Args:
        optimizer: Any optimizer, wrapped or not.

    Example:
        >>> weights = [nn.Parameter(torch.ones(2))]
        >>> type(family_of(torch.optim.SGD(weights))).__name__
        'SGDFamily'
    """
    family = _FAMILIES.get(type(optimizer))
    return _FAMILIES.get(type(unwrapped(optimizer)), _OTHER) if family is None else family


# -- what families share ---------------------------------------------------------------------------


def common_refusal(group: Mapping[str, Any], shrinkage: float) -> str | None:
    """Why no update can be rebuilt from numbers of these kinds; ``None`` where it can.

    Args:
        group: A parameter group.
        shrinkage: Factor that the step puts on the weights before it.
    """
    for parameter in group["params"]:
        if type(parameter) not in (Tensor, nn.Parameter):
            return f"{type(parameter).__name__} may have arithmetic of its own"
        if parameter.is_complex():
            return "complex weights"
        if parameter.dtype not in (torch.float32, torch.float64):
            return f"rounding of {parameter.dtype} weights is as large as their updates"
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            return "a gradient is sparse"
    if group["differentiable"]:
        return "differentiable=True"
    if abs(shrinkage) < SMALLEST_SHRINKAGE:
        return "lr * weight_decay is 1, so nothing is left of the weights before the step"
    return None


def gradients_of(trained: Sequence[Tensor]) -> list[Tensor]:
    """Unscaled ones also under a gradient scaler: a fused kernel writes them back.

    Args:
        trained: Parameters that have a gradient.
    """
    return [parameter.grad for parameter in trained if parameter.grad is not None]


def states_of(optimizer: Optimizer, trained: Sequence[Tensor], key: str) -> list[Tensor]:
    """One entry of the optimizer's state for each parameter.

    Args:
        optimizer: The optimizer.
        trained: Parameters that have a gradient.
        key: The entry.

    Raises:
        SampleSkippedError: If a parameter has none yet.
    """
    state = optimizer.state
    try:
        return [state.get(parameter, {})[key] for parameter in trained]
    except KeyError:
        raise SampleSkippedError(f"a parameter has a gradient but no {key!r}: it made no step yet") from None


def room_for(parameter: Tensor, scratch: Scratch) -> Tensor:
    """The tensor in which to work for a parameter.

    Args:
        parameter: A parameter.
        scratch: Where it is kept.
    """
    room = scratch.get(parameter)
    if room is None:
        room = scratch[parameter] = torch.empty_like(parameter, requires_grad=False)
    return room
