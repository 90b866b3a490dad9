"""Stochastic gradient descent: ``u = lr b`` with torch's momentum buffer ``b``.

The buffer holds the gradient's sign, L2 and dampening. Without momentum, or with Nesterov's, L2 acts on the
weights before the step, hence ``u (1 - lr wd) = lr (g + mu b + wd theta')``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ..stats.linalg import in_reals
from .base import (
    Family,
    Move,
    ParameterStep,
    Scratch,
    common_refusal,
    gradients_of,
    register,
    room_for,
    states_of,
)

__all__ = ["SGDFamily"]


class SGDFamily(Family):
    """``torch.optim.SGD``: its steps are linear in the gradient."""

    classes = (SGD,)
    linear = True
    steps_known = True

    def momentum(self, group: Mapping[str, Any]) -> tuple[float, float, bool]:
        """As the group says; dampening means nothing without momentum."""
        momentum = float(group["momentum"])
        return momentum, float(group["dampening"]) if momentum else 0.0, bool(group["nesterov"])

    def refusal(self, optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
        """Nesterov's momentum where torch may have overwritten the gradient, fused SGD that maximizes."""
        reason = common_refusal(group, self._shrinkage(group))
        if reason is None and group["maximize"] and group["fused"]:
            return "releases of torch differ in where fused SGD puts the sign of maximize=True"
        if reason is None and group["nesterov"] and _gradient_is_overwritten(group) is None:
            return "Nesterov's momentum may have overwritten the gradient; foreach=True or False would tell"
        return reason

    def move(
        self, optimizer: Optimizer, group: Mapping[str, Any], trained: list[Tensor], scratch: Scratch
    ) -> Move:
        """From the buffer, or the gradient and the new weights."""
        lr, momentum, decay = float(group["lr"]), group["momentum"], float(group["weight_decay"])
        if momentum and not group["nesterov"]:
            return [lr] * len(trained), states_of(optimizer, trained, "momentum_buffer")
        gradients = gradients_of(trained)
        if momentum and _gradient_is_overwritten(group):
            return [lr] * len(trained), gradients
        sign = -1.0 if group["maximize"] else 1.0
        directions = gradients
        if momentum:
            buffers = states_of(optimizer, trained, "momentum_buffer")
            directions = [
                torch.add(g, b, alpha=sign * momentum, out=room_for(p, scratch))
                for p, g, b in zip(trained, gradients, buffers, strict=True)
            ]
        if decay:
            directions = [
                torch.add(d, p, alpha=sign * decay, out=room_for(p, scratch))
                for p, d in zip(trained, directions, strict=True)
            ]
        return [sign * lr / self._shrinkage(group)] * len(trained), directions

    @staticmethod
    def _shrinkage(group: Mapping[str, Any]) -> float:
        """Factor that the step puts on the weights before it."""
        acts = not group["momentum"] or group["nesterov"]
        return 1.0 - float(group["lr"]) * float(group["weight_decay"]) if acts else 1.0

    def velocity(self, optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
        """Torch's momentum buffer, without holes."""
        buffer: Tensor | None = optimizer.state.get(parameter, {}).get("momentum_buffer")
        return buffer.to_dense() if buffer is not None and buffer.is_sparse else buffer

    def used_gradients(
        self, optimizer: Optimizer, group: Mapping[str, Any], before: list[Tensor], moved: list[Tensor]
    ) -> list[Tensor] | None:
        """From ``.grad``; under Nesterov's momentum, which may overwrite it, from ``d = g + mu b``."""
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        if group["nesterov"]:
            lr, momentum = float(group["lr"]), group["momentum"]
            velocities = states_of(optimizer, trained, "momentum_buffer")
            return [d / lr - momentum * in_reals(b).double() for d, b in zip(moved, velocities, strict=True)]
        sign = -1.0 if group["maximize"] else 1.0
        return [  # in this order, since a gradient may be sparse
            group["weight_decay"] * weights + sign * in_reals(gradient.detach()).double()
            for gradient, weights in zip(gradients_of(trained), before, strict=True)
        ]

    def parameter_step(
        self, group: Mapping[str, Any], rate: float | Tensor, multiple: float
    ) -> ParameterStep:
        """Momentum and L2 as the group says."""
        return ParameterStep(
            rate=rate * multiple,
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            weight_decay=float(group["weight_decay"]) / multiple,
        )


def _gradient_is_overwritten(group: Mapping[str, Any]) -> bool | None:
    """Whether Nesterov's SGD leaves its direction in ``.grad``; ``None`` where torch chooses the form.

    The multi-tensor form adds to the gradients in place, unless L2 or ``maximize`` made copies of them.
    """
    if group["weight_decay"] or group["maximize"] or group["fused"]:
        return False
    if group["foreach"] is None and group["fused"] is None:
        on_cpu = all(parameter.device.type == "cpu" for parameter in group["params"])
        return False if on_cpu else None  # torch has no multi-tensor kernels there, and does not choose them
    return bool(group["foreach"])


register(SGDFamily())
