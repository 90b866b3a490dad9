"""What an estimator is shown: the facts of one optimizer step, for each of the two kinds of case."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NoiseStep:
    """One step of gradient accumulation on a least-squares model.

    The loss of an example is ``(w . x - y)^2 / 2``, that of a part the mean over its examples, and the
    step's gradient the mean over parts. Most estimators need ``gradients``, ``sizes`` and ``loss_scale``
    alone; one that hooks a training loop can build the model from the other fields.

    Args:
        inputs: Examples of the whole batch, parts one after the other.
        targets: Their targets.
        weights: The weights at which the gradients are taken.
        sizes: Examples in each part.
        loss_scale: Factor on the loss, and so on every gradient of this step.

    Shapes:
        inputs ``[B, P]``, targets ``[B]``, weights ``[P]``; ``k`` sizes.

    Example:
        >>> step = NoiseStep(np.array([[1.0, 0.0], [3.0, 0.0]]), -np.ones(2), np.zeros(2), (1, 1), 2.0)
        >>> step.gradients              # residual 1, so each gradient is its input, times the loss scale
        array([[2., 0.],
               [6., 0.]])
    """

    inputs: Array
    targets: Array
    weights: Array
    sizes: tuple[int, ...]
    loss_scale: float = 1.0

    @cached_property
    def gradients(self) -> Array:
        """Gradient of the mean loss of each part, still times ``loss_scale``, ``[k, P]``."""
        residual = self.inputs @ self.weights - self.targets
        starts = np.cumsum((0, *self.sizes[:-1]))
        sums = np.add.reduceat(residual[:, None] * self.inputs, starts)
        return self.loss_scale * sums / np.array(self.sizes)[:, None]

    @cached_property
    def finite(self) -> bool:
        """Whether every gradient is finite; a gradient scaler skips a step that is not."""
        return bool(np.isfinite(self.inputs).all())


@dataclass(frozen=True, eq=False)
class RelationStep:
    """One step of stochastic gradient descent, as ``torch.optim.SGD`` makes it.

    With the gradient g of the loss, coupled decay adds ``weight_decay * weights`` to it; then
    ``b <- momentum b + (1 - dampening) g``, the direction is ``b``, or ``g + momentum b`` for Nesterov,
    and ``weights <- weights - lr * direction``. Decoupled decay takes ``lr * weight_decay * weights`` off
    beside that and leaves g alone.

    Args:
        weights: Before the step.
        velocity: The buffer b before the step; zero without momentum.
        loss_gradient: Gradient of the loss on the batch, without decay.
        weights_after: After the step.
        velocity_after: b after the step.
        lr: Learning rate of this step.
        momentum: Momentum coefficient.
        dampening: Dampening.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: Coefficient of the decay.
        decoupled: Whether the decay is decoupled.
        counted: Whether the step belongs to the window that is averaged. The first step never does.

    Shapes:
        Vectors ``[P]``.

    Example:
        >>> one, zero = np.ones(1), np.zeros(1)
        >>> RelationStep(one, zero, 3 * one, 0.6 * one, zero, 0.1, weight_decay=1.0).gradient
        array([4.])
    """

    weights: Array
    velocity: Array
    loss_gradient: Array
    weights_after: Array
    velocity_after: Array
    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled: bool = False
    counted: bool = True

    @property
    def gradient(self) -> Array:
        """The gradient that the optimizer uses, with coupled decay, ``[P]``."""
        if self.decoupled or not self.weight_decay:
            return self.loss_gradient
        return self.loss_gradient + self.weight_decay * self.weights

    @property
    def direction(self) -> Array:
        """``(weights - weights_after) / lr``, ``[P]``."""
        return (self.weights - self.weights_after) / self.lr
