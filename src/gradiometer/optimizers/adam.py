"""Adam and AdamW: ``u = s``, the step of the updated moments.

Where the decay is decoupled, ``u (1 - lr wd) = s + lr wd theta'``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from ..stats.linalg import accumulation_dtype, in_reals
from .base import Family, Move, ParameterStep, Scratch, common_refusal, register, room_for, states_of

__all__ = ["AdamFamily", "Preconditioner"]


class AdamFamily(Family):
    """``torch.optim.Adam``."""

    classes: ClassVar[tuple[type[Optimizer], ...]] = (Adam,)
    decouples: ClassVar[bool] = False
    """Where the decay acts if the group does not say, as before torch 2.7."""
    adaptive = True
    steps_known = True

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        """As the group says: AdamW's constructor writes it there."""
        return bool(group.get("decoupled_weight_decay", self.decouples))

    def refusal(self, optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
        """A decay that leaves nothing of the weights, and what holds for all families."""
        del optimizer
        return common_refusal(group, self._shrinkage(group))

    def move(
        self, optimizer: Optimizer, group: Mapping[str, Any], trained: list[Tensor], scratch: Scratch
    ) -> Move:
        """From the updated moments."""
        lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), group["eps"]
        beta1, beta2 = (float(beta) for beta in group["betas"])
        means = states_of(optimizer, trained, "exp_avg")
        squares = states_of(optimizer, trained, "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
        decoupled = decay and self.decoupled(group)
        rates, directions = [], []
        for parameter, mean, square, step in zip(
            trained, means, squares, _steps(optimizer, trained), strict=True
        ):
            root_correction = (1.0 - beta2**step) ** 0.5
            factor = root_correction / (1.0 - beta1**step)  # s = lr factor mean / root
            out = room_for(parameter, scratch)
            root = torch.sqrt(square, out=out).add_(eps * root_correction)
            if decoupled:
                directions.append(torch.addcdiv(parameter, mean, root, value=factor / decay, out=out))
                rates.append(lr * decay / self._shrinkage(group))
            else:
                directions.append(torch.div(mean, root, out=out))
                rates.append(lr * factor)
        return rates, directions

    def _shrinkage(self, group: Mapping[str, Any]) -> float:
        """Factor that the step puts on the weights before it."""
        decay = float(group["lr"]) * float(group["weight_decay"])
        return 1.0 - decay if self.decoupled(group) else 1.0

    def metric(self, optimizer: Optimizer) -> Preconditioner:
        """The root of the second moment."""
        return Preconditioner(optimizer)

    def parameter_step(
        self, group: Mapping[str, Any], rate: float | Tensor, multiple: float
    ) -> ParameterStep:
        """Momentum beta1 with as much dampening; L2 in the gradient, or decoupled."""
        beta1, decay, decoupled = (
            float(group["betas"][0]),
            float(group["weight_decay"]),
            self.decoupled(group),
        )
        return ParameterStep(
            rate=rate * multiple,
            momentum=beta1,
            dampening=beta1,
            weight_decay=0.0 if decoupled else decay / multiple,
            shrinkage=float(group["lr"]) * decay if decoupled else 0.0,
        )


class AdamWFamily(AdamFamily):
    """``torch.optim.AdamW``."""

    classes = (AdamW,)
    decouples = True


class Preconditioner:
    """What Adam multiplies each gradient by: ``1 / (sqrt(v) + eps)`` with the bias of ``v`` corrected.

    It is read before the step, from a ``v`` that knows nothing of this step's batch.

    Args:
        optimizer: ``Adam`` or ``AdamW``.

    Example:
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> adam = torch.optim.Adam(net.parameters(), eps=0.0)
        >>> Preconditioner(adam).of(net.weight) is None       # no step yet
        True
        >>> (4 * net(torch.ones(1, 1))).sum().backward(); adam.step()
        >>> Preconditioner(adam).of(net.weight)
        tensor([[0.2500]])
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._state = optimizer.state
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._factors: dict[int, Tensor] = {}

    def of(self, parameter: Tensor) -> Tensor | None:
        """The factor on a parameter's gradient, at least float32; ``None`` before its first step.

        Args:
            parameter: One of the optimizer's.

        Shapes:
            The parameter's; of a complex one ``[..., 2]``, a factor for each of its two parts.
        """
        state = self._state.get(parameter)
        if not state:
            return None
        if id(parameter) not in self._factors:
            group = self._groups[id(parameter)]
            second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
            second = in_reals(second)
            wide = second.to(torch.promote_types(second.dtype, torch.float32))
            steps = torch.as_tensor(state["step"])  # on the device for some kinds: nobody waits for it
            corrected = wide / (1 - group["betas"][1] ** steps.to(accumulation_dtype(steps.device)))
            factor = corrected.sqrt().add_(group["eps"]).reciprocal_()
            # an element that never had a gradient has no scale yet, and 1/eps would drown all others
            self._factors[id(parameter)] = factor.masked_fill_(wide == 0, 0.0)
        return self._factors[id(parameter)]

    def apply(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The preconditioned gradient; ``nan`` where it is not known.

        Args:
            parameter: One of the optimizer's.
            gradient: Of its shape.
        """
        factor = self.of(parameter)
        if factor is None:
            return gradient * torch.nan
        scaled = in_reals(gradient) * factor
        return torch.view_as_complex(scaled) if gradient.is_complex() else scaled


def _steps(optimizer: Optimizer, trained: Sequence[Tensor]) -> list[float]:
    """Steps that each parameter has made, fetched from the device at once."""
    steps: list[float] = torch.stack(states_of(optimizer, trained, "step")).tolist() if trained else []
    return steps


register(AdamFamily())
register(AdamWFamily())
