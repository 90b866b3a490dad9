r"""Cases for estimators of the fluctuation-dissipation relation: runs of SGD whose statistics are known.

The two sides, averaged over the counted steps, with g the gradient that the optimizer uses, b its buffer
after the step and d its direction (eta, mu and nu are learning rate, momentum and dampening):

.. math::
    \text{left} = \langle\theta\cdot g\rangle,\qquad
    \text{right} = \tfrac{1+\mu}{2(1-\nu)}\,\eta\,\langle|b|^2\rangle
    \quad\text{or, Nesterov,}\quad
    \eta\,\langle\tfrac{1-\mu}{2}|d|^2 + \mu^2\, d\cdot b\rangle

Without momentum b is g. Decoupled decay is part of no gradient, so there both sides are those of the update
itself: :math:`\langle\theta\cdot d\rangle` and :math:`\tfrac12\eta\langle|d|^2\rangle`, d the whole
displacement over eta. Source: arXiv:1810.00004; the last two forms follow by summing the squared norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .judges import Judge, Run, Truth, close, constant, covers, spread, unbiased, verdict, width
from .steps import Array, RelationStep
from .suite import Case

CURVATURES: Array = np.array([0.1, 0.3, 1.0, 3.0])
VARIANCES: Array = np.array([1.0, 0.5, 2.0, 1.5])
_COPIES = 48

Gradient = Callable[[int, Array], Array]


@dataclass(frozen=True)
class Descent:
    """Settings of the optimizer; the names are those of ``torch.optim.SGD``."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled: bool = False


OPTIMIZERS: dict[str, Descent] = {
    "plain": Descent(0.1),
    "L2": Descent(0.1, weight_decay=0.3),
    "momentum": Descent(0.05, momentum=0.9),
    "dampening, L2": Descent(0.2, momentum=0.5, dampening=0.2, weight_decay=0.3),
    "Nesterov, L2": Descent(0.05, momentum=0.9, nesterov=True, weight_decay=0.3),
    "decoupled decay": Descent(0.05, momentum=0.9, weight_decay=0.5, decoupled=True),
}


def relation_cases() -> tuple[Case, ...]:
    """All cases about the fluctuation-dissipation relation.

    Returns:
        The cases, in the order in which they are reported.

    Example:
        >>> [case.name for case in relation_cases()][:2]
        ['identity: plain', 'identity: L2']
    """
    return (
        *(_identity(name, settings, seed) for seed, (name, settings) in enumerate(OPTIMIZERS.items(), 100)),
        *(_quadratic(name, settings, seed) for seed, (name, settings) in enumerate(OPTIMIZERS.items(), 110)),
        _shuffled(),
        _scale_invariant(),
        _lr_jump(),
        _stationary(),
        _short_window(),
        _transient(),
        _turning_point(),
        _no_stationary_state(),
        _intervals(),
    )


# -- the optimizer and its statistics --------------------------------------------------------------


def descend(
    weights: Array,
    gradient: Gradient,
    settings: Sequence[Descent],
    *,
    velocity: Array | None = None,
    counted_from: int = 1,
) -> list[RelationStep]:
    """Run the optimizer, one entry of the settings per step.

    Args:
        weights: Where it starts.
        gradient: Gradient of the loss at a step and its weights.
        settings: Settings of each step.
        velocity: The buffer it starts with; zero when ``None``.
        counted_from: The first step of the window.

    Returns:
        The steps.
    """
    buffer = np.zeros_like(weights) if velocity is None else velocity
    steps = []
    for t, s in enumerate(settings):
        loss_gradient = gradient(t, weights)
        used = loss_gradient + (0.0 if s.decoupled else s.weight_decay) * weights
        buffer_after = s.momentum * buffer + (1 - s.dampening) * used if s.momentum else buffer
        direction = used + s.momentum * buffer_after if s.nesterov else buffer_after if s.momentum else used
        shrinkage = 1 - s.lr * s.weight_decay if s.decoupled else 1.0
        after = shrinkage * weights - s.lr * direction
        steps.append(
            RelationStep(
                weights=weights,
                velocity=buffer,
                loss_gradient=loss_gradient,
                weights_after=after,
                velocity_after=buffer_after,
                lr=s.lr,
                momentum=s.momentum,
                dampening=s.dampening,
                nesterov=s.nesterov,
                weight_decay=s.weight_decay,
                decoupled=s.decoupled,
                counted=t >= counted_from,
            )
        )
        weights, buffer = after, buffer_after
    return steps


def sides(step: RelationStep) -> tuple[float, float]:
    """One step's terms of the two sides, as defined above.

    Args:
        step: One step.
    """
    direction, buffer, mu = step.direction, step.velocity_after, step.momentum
    if step.decoupled:
        return float(step.weights @ direction), float(0.5 * step.lr * direction @ direction)
    left = float(step.weights @ step.gradient)
    if step.nesterov:
        right = 0.5 * (1 - mu) * direction @ direction + mu**2 * direction @ buffer
        return left, float(step.lr * right)
    moved = buffer if mu else step.gradient
    return left, float((1 + mu) / (2 * (1 - step.dampening)) * step.lr * moved @ moved)


def stationary_covariance(curvature: float, variance: float, settings: Descent) -> Array:
    r"""Covariance of a weight and its buffer on a noisy quadratic, from the linear recursion of the two.

    Weight and buffer obey ``s <- A s + c xi``, so that the covariance solves
    :math:`V = A V A^T + \sigma^2 c c^T`.

    Args:
        curvature: Second derivative of the loss.
        variance: Variance of the gradient noise.
        settings: The optimizer.

    Returns:
        ``[2, 2]``, rows weight and buffer.

    Example:
        >>> covariance = stationary_covariance(0.1, 1.0, Descent(0.1))
        >>> round(float(covariance[0, 0]), 6)                       # eta C / (h (2 - eta h))
        0.502513
    """
    recursion, noise = _recursion(curvature, settings)
    flat = np.linalg.solve(
        np.eye(4) - np.kron(recursion, recursion), variance * np.outer(noise, noise).reshape(-1)
    )
    return np.asarray(flat.reshape(2, 2))


def expected_side(curvature: float, variance: float, settings: Descent) -> float:
    """Either side of the relation in the stationary state of one mode.

    Args:
        curvature: Second derivative of the loss.
        variance: Variance of the gradient noise.
        settings: The optimizer.
    """
    covariance = stationary_covariance(curvature, variance, settings)
    if settings.decoupled:
        recursion, _ = _recursion(curvature, settings)
        return float((covariance[0, 0] - (recursion @ covariance)[0, 0]) / settings.lr)
    return float((curvature + settings.weight_decay) * covariance[0, 0])


def _recursion(curvature: float, s: Descent) -> tuple[Array, Array]:
    """The matrix and the noise vector of one step of (weight, buffer)."""
    pull = curvature + (0.0 if s.decoupled else s.weight_decay)
    keep = 1 - s.lr * s.weight_decay if s.decoupled else 1.0
    buffer = np.array([(1 - s.dampening) * pull, s.momentum])
    noise = 1 - s.dampening
    direction = s.momentum * buffer + [pull, 0.0] if s.nesterov else buffer
    heading = 1 + s.momentum if s.nesterov else noise
    recursion = np.stack([np.array([keep, 0.0]) - s.lr * direction, buffer])
    return recursion, np.array([-s.lr * heading, noise])


def _start(
    rng: np.random.Generator, curvatures: Array, variances: Array, settings: Descent
) -> tuple[Array, Array]:
    """Weights and buffer drawn from the stationary state."""
    pairs = []
    for h, c in zip(curvatures, variances, strict=True):
        covariance = stationary_covariance(float(h), float(c), settings)
        pairs.append(rng.multivariate_normal(np.zeros(2), covariance, method="eigh"))
    weights, velocity = np.array(pairs).T
    return weights, velocity * bool(settings.momentum)


def _quadratic_run(
    rng: np.random.Generator, curvatures: Array, variances: Array, settings: Sequence[Descent]
) -> list[RelationStep]:
    """Independent noise on a quadratic, from the stationary state of the first step's settings on."""
    weights, velocity = _start(rng, curvatures, variances, settings[0])
    scale = np.sqrt(variances)

    def gradient(step: int, weights: Array) -> Array:
        return curvatures * weights + scale * rng.standard_normal(len(weights))

    return descend(weights, gradient, settings, velocity=velocity)


def _defined(side: int) -> Truth:
    """The mean of a side over the counted steps."""

    def truth(run: Run) -> float:
        return float(np.mean([sides(step)[side] for step in run.steps if step.counted]))

    return truth


def _defined_ratio(run: Run) -> float:
    return _defined(0)(run) / _defined(1)(run)


def _case(
    name: str,
    about: str,
    make: Callable[[np.random.Generator], list[RelationStep]],
    judges: Sequence[Judge],
    *,
    runs: int,
    seed: int,
) -> Case:
    def all_runs() -> Iterator[Sequence[RelationStep]]:
        return (make(np.random.default_rng([seed, run])) for run in range(runs))

    return Case(name, about, "relation", all_runs, tuple(judges))


# -- the cases -------------------------------------------------------------------------------------


def _identity(name: str, settings: Descent, seed: int) -> Case:
    """A transient: the sides differ, and each must be its own definition to rounding."""
    curvatures = np.linspace(0.2, 2.0, 12)

    def make(rng: np.random.Generator) -> list[RelationStep]:
        def gradient(step: int, weights: Array) -> Array:
            return curvatures * weights + rng.standard_normal(12)

        return descend(np.full(12, 3.0), gradient, [settings] * 50, counted_from=10)

    about = "Both sides of a window, to rounding; end points and sums must agree."
    judges = (close("left", truth=_defined(0)), close("right", truth=_defined(1)))
    return _case(f"identity: {name}", about, make, judges, runs=2, seed=seed)


def _quadratic(name: str, settings: Descent, seed: int) -> Case:
    """The stationary state of a noisy quadratic in closed form."""
    curvatures, variances = np.tile(CURVATURES, _COPIES), np.tile(VARIANCES, _COPIES)
    pairs = zip(CURVATURES, VARIANCES, strict=True)
    side = constant(_COPIES * sum(expected_side(float(h), float(c), settings) for h, c in pairs))

    def make(rng: np.random.Generator) -> list[RelationStep]:
        return _quadratic_run(rng, curvatures, variances, [settings] * 600)

    judges = (
        close("left", truth=side, limit=0.04),
        close("right", truth=side, limit=0.04),
        close("ratio", truth=constant(1.0), limit=0.02),
    )
    return _case(f"quadratic: {name}", "Both sides in closed form.", make, judges, runs=1, seed=seed)


def _shuffled() -> Case:
    """Ten noise vectors that add up to zero, reshuffled every epoch: anticorrelated gradients."""
    batches, size, curvature = 10, 64, 0.3

    def make(rng: np.random.Generator) -> list[RelationStep]:
        noise = rng.standard_normal((batches, size))
        noise -= noise.mean(0)
        order = np.concatenate([rng.permutation(batches) for _ in range(90)])

        def gradient(step: int, weights: Array) -> Array:
            return curvature * weights + noise[order[step]]

        return descend(np.zeros(size), gradient, [Descent(0.1)] * len(order), counted_from=300)

    judges = (
        close("left", truth=_defined(0)),
        close("right", truth=_defined(1)),
        close("ratio", truth=constant(1.0), limit=0.02),
        verdict("stationary", allowed=(True,)),
    )
    about = "Batches without replacement: the relation holds with the gradient that made the step."
    return _case("shuffled epochs", about, make, judges, runs=2, seed=120)


def _scale_invariant() -> Case:
    """Weights before a normalisation: the norm settles at |w|^4 = eta |g|^2 / (2 lambda - eta lambda^2)."""
    settings = Descent(0.1, weight_decay=0.05)
    length = (settings.lr / (2 * settings.weight_decay - settings.lr * settings.weight_decay**2)) ** 0.25

    def make(rng: np.random.Generator) -> list[RelationStep]:
        def gradient(step: int, weights: Array) -> Array:
            noise = rng.standard_normal(20)
            noise -= weights * (noise @ weights) / (weights @ weights)
            return np.asarray(noise / np.linalg.norm(noise) / np.linalg.norm(weights))

        start = rng.standard_normal(20)
        return descend(length * start / np.linalg.norm(start), gradient, [settings] * 60)

    side = constant(settings.weight_decay * length**2)
    judges = (
        close("left", truth=side),
        close("right", truth=side),
        close("ratio", truth=constant(1.0)),
    )
    return _case("scale-invariant weights", "Left side: L2 alone.", make, judges, runs=2, seed=121)


def _lr_jump() -> Case:
    """The learning rate falls to a quarter some time before the window."""
    early, late, size = Descent(0.2), Descent(0.05), 64

    def make(rng: np.random.Generator) -> list[RelationStep]:
        steps = _quadratic_run(rng, np.ones(size), np.ones(size), [early] * 40 + [late] * 300)
        return [replace(step, counted=t >= 80) for t, step in enumerate(steps)]

    judges = (close("left", truth=_defined(0)), close("right", truth=_defined(1)))
    about = "The learning rate that counts is that of the window."
    return _case("jump of the learning rate", about, make, judges, runs=2, seed=122)


def _stationary() -> Case:
    """A long window in the stationary state: this can be told."""
    size = 64

    def make(rng: np.random.Generator) -> list[RelationStep]:
        return _quadratic_run(rng, np.ones(size), np.ones(size), [Descent(0.2)] * 300)

    judges = (verdict("stationary", allowed=(True,)),)
    about = "A long stationary window is recognised."
    return _case("stationary", about, make, judges, runs=6, seed=123)


def _short_window() -> Case:
    """Stationary, and so short that the ratio scatters by a third: not a transient."""

    def make(rng: np.random.Generator) -> list[RelationStep]:
        return _quadratic_run(rng, np.ones(4), np.ones(4), [Descent(0.2)] * 31)

    judges = (verdict("stationary", allowed=(True, None)),)
    about = "A ratio away from 1 means nothing while its own error is as large."
    return _case("short window", about, make, judges, runs=24, seed=124)


def _transient() -> Case:
    """Far from the minimum: the ratio is far above 1."""
    size = 64

    def make(rng: np.random.Generator) -> list[RelationStep]:
        def gradient(step: int, weights: Array) -> Array:
            return weights + rng.standard_normal(size)

        return descend(np.full(size, 5.0), gradient, [Descent(0.02)] * 120)

    judges = (close("ratio", truth=_defined_ratio), verdict("stationary", allowed=(False,)))
    return _case("transient", "The ratio is what it is, and not near 1.", make, judges, runs=6, seed=125)


def _turning_point() -> Case:
    """The norm rises and comes back: the ratio is 1 and nothing is stationary."""
    size, length, lr = 32, 160, 0.05
    rise = 1 + 4 * np.sin(np.pi * np.clip(np.arange(-1, length + 1), 0, None) / length)

    def make(rng: np.random.Generator) -> list[RelationStep]:
        heading = np.ones(size) / math.sqrt(size)
        path = rise[:, None] * heading + 0.05 * rng.standard_normal((len(rise), size))

        def gradient(step: int, weights: Array) -> Array:
            return (weights - path[step + 1]) / lr

        return descend(path[0], gradient, [Descent(lr)] * (len(path) - 1))

    judges = (verdict("stationary", allowed=(False, None)),)
    about = "Ends of equal norm make the ratio 1; the way between them was no stationary state."
    return _case("turning point", about, make, judges, runs=6, seed=126)


def _no_stationary_state() -> Case:
    """No curvature and no decay: the norm grows without end."""
    size = 64

    def make(rng: np.random.Generator) -> list[RelationStep]:
        return descend(np.ones(size), lambda step, weights: rng.standard_normal(size), [Descent(0.1)] * 240)

    judges = (verdict("stationary", allowed=(False,)),)
    about = "Without decay there is nothing to settle into."
    return _case("no stationary state", about, make, judges, runs=6, seed=127)


def _intervals() -> Case:
    """The error of the ratio follows from the two ends; errors from single steps are many times too wide.

    For P modes of curvature h the standard deviation of the ratio is ``1 / (eta h T sqrt(P))``.
    """
    size, length, settings = 8, 128, Descent(0.2)

    def make(rng: np.random.Generator) -> list[RelationStep]:
        return _quadratic_run(rng, np.ones(size), np.ones(size), [settings] * (length + 1))

    judges = (
        unbiased("ratio", truth=constant(1.0)),
        spread("ratio", least=constant(1 / (settings.lr * length * math.sqrt(size)))),
        covers("ratio", truth=constant(1.0)),
        width("ratio"),
    )
    about = "The ratio of averages and its 95 % interval in a stationary window."
    return _case("ratio intervals", about, make, judges, runs=32, seed=128)
