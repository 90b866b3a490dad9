"""Finds out that the watched optimizer is not the one that trains: then nothing would ever be recorded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..collect.base import Training
from ..optimizers import unwrapped

EVERY = 5
"""Micro-batches, or calls of ``before_step``, between two looks at the weights."""
_MOVES = 2
"""Looks at which the weights have moved without a step: one may be a state that was loaded."""
_WITHOUT_GRADIENT = 10
"""Calls of ``before_step`` without a gradient of any weight."""
_WITHOUT_STEP = 150
"""Calls of ``before_step`` with gradients: more than there are micro-batches in one step."""
_FEW = 8
"""Weights that are compared: the smallest, such as biases."""


class StepWatch:
    """Watches until the first step begins, and tells once if it never comes.

    A step that calls its closure several times moves the weights before it is made.

    Args:
        training: What is trained, and by which optimizer.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(2, 1)
        >>> watched, trains = (torch.optim.SGD(net.parameters(), lr=1.0) for _ in range(2))
        >>> watch = StepWatch(Training(net, watched))
        >>> for _ in range(11):
        ...     net(torch.ones(1, 2)).sum().backward()
        ...     if said := watch.batch_began() or watch.step_announced():
        ...         print(said[:40])
        ...     trains.step()
        optimizer.step() was never seen: this SG
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._over = False
        self._batches = self._announced = self._without_gradient = self._moves = 0
        self._before: list[Tensor] = []
        self._handle = unwrapped(training.optimizer).register_step_pre_hook(self._step_begins)

    def _step_begins(self, *_: object) -> None:
        self._over = True

    def end(self) -> None:
        """A step was made, or nothing is measured any more: there is nothing more to watch for."""
        self._over, self._before = True, []
        self._handle.remove()

    def batch_began(self) -> str:
        """Count a micro-batch.

        Returns:
            What the user must be told, once; mostly nothing.
        """
        if self._over:
            return ""
        self._batches += 1
        return self._look(self._batches) if self._batches > self._announced else ""

    def step_announced(self) -> str:
        """Count a call of ``before_step``.

        Returns:
            What the user must be told, once; mostly nothing.
        """
        if self._over:
            return ""
        self._announced += 1
        graspable = any(parameter.grad is not None for parameter in self._training.parameters())
        self._without_gradient = 0 if graspable else self._without_gradient + 1
        if self._without_gradient == _WITHOUT_GRADIENT and not self._moves:
            return self._told("None of its weights has a gradient: it may hold the weights of another model")
        if self._announced == _WITHOUT_STEP:
            return self._told("Its weights have not moved either")
        return self._look(self._announced) if self._announced > self._batches else ""

    def _look(self, count: int) -> str:
        """Whether the weights have moved again, at every fifth time."""
        if (count - 1) % EVERY:
            return ""
        now = self._weights()
        moved = len(now) == len(self._before) and not all(map(torch.equal, now, self._before))
        self._moves += moved
        self._before = now
        return self._told("Its weights move all the same") if self._moves == _MOVES else ""

    def _weights(self) -> list[Tensor]:
        """Copies of the smallest weights that the optimizer holds; where divided, of this process's part."""
        present = [
            getattr(parameter, "_local_tensor", parameter)
            for parameter in self._training.parameters()
            if parameter.requires_grad and not is_lazy(parameter)
        ]
        smallest = sorted(present, key=Tensor.numel)[:_FEW]
        return [tensor.detach().clone() for tensor in smallest if not tensor.is_meta]

    def _told(self, what: str) -> str:
        self.end()
        name = type(self._training.optimizer).__name__
        return (
            f"optimizer.step() was never seen: this {name} has not stepped, and nothing is recorded until it "
            f"does. {what}. {self._remedy()}"
        )

    def _remedy(self) -> str:
        """What to hand over."""
        optimizer = self._training.optimizer
        inside = [name for name, value in vars(optimizer).items() if isinstance(value, torch.optim.Optimizer)]
        if inside:
            kind = type(getattr(optimizer, inside[0])).__name__
            return f"Hand over the {kind} that it holds, optimizer.{inside[0]}, instead of it."
        if any(map(_acts_in_backward, self._training.parameters())):
            return (
                "There are optimizers that step inside the backward pass: hand over one of these, or one "
                "that steps after it."
            )
        return "Hand over the optimizer whose step() trains this model, not a copy of it or what wraps it."


def _acts_in_backward(parameter: Tensor) -> bool:
    """Whether something that is not ours runs as soon as this gradient is there."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    ours = __name__.partition(".")[0]
    return any(not getattr(hook, "__module__", "").startswith(ours) for hook in hooks.values())
