"""RMSprop: ``u = lr b`` with momentum, or without ``u (a - lr wd) = lr (g + wd theta')`` element by element.

Here ``a`` is the root of the updated mean square, plus ``eps``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, RMSprop

from .base import Family, Move, Scratch, common_refusal, gradients_of, register, room_for, states_of

__all__ = ["RMSpropFamily"]


class RMSpropFamily(Family):
    """``torch.optim.RMSprop``."""

    classes = (RMSprop,)

    def refusal(self, optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
        """What holds for all families."""
        del optimizer
        return common_refusal(group, 1.0)

    def move(
        self, optimizer: Optimizer, group: Mapping[str, Any], trained: list[Tensor], scratch: Scratch
    ) -> Move:
        """From the buffer, or the mean square and the gradient."""
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if group["momentum"]:
            return [lr] * len(trained), states_of(optimizer, trained, "momentum_buffer")
        sign = -1.0 if group["maximize"] else 1.0
        squares = states_of(optimizer, trained, "square_avg")
        means = states_of(optimizer, trained, "grad_avg") if group["centered"] else [None] * len(trained)
        directions = []
        for parameter, gradient, square, mean in zip(
            trained, gradients_of(trained), squares, means, strict=True
        ):
            out = room_for(parameter, scratch)
            if mean is None:
                torch.sqrt(square, out=out)
            else:
                torch.addcmul(square, mean, mean, value=-1.0, out=out).sqrt_()
            out.add_(group["eps"] - lr * decay)
            if decay:
                gradient = gradient.add(parameter, alpha=sign * decay)
            directions.append(torch.div(gradient, out, out=out))
        return [sign * lr] * len(trained), directions


register(RMSpropFamily())
