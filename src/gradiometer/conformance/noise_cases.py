"""Cases for estimators of the gradient noise scale: gradients whose covariance is known exactly.

Most are planted: with zero weights and targets of -1 the gradient of an example is its own input, so that
the inputs are drawn with the mean and the covariance that the truth is then stated in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .judges import (
    Judge,
    Run,
    Truth,
    close,
    constant,
    covers,
    from_steps,
    median,
    silent,
    spread,
    unbiased,
    unresolved,
    width,
)
from .steps import Array, NoiseStep
from .suite import Case

SPECTRUM: Array = np.linspace(0.2, 2.0, 50)
"""Eigenvalues of the planted covariance of one example's gradient."""
TRACE = float(SPECTRUM.sum())
SQUARES = float((SPECTRUM**2).sum())
LARGE_SCALE = 1e6
_SCALER = (1024.0, 2048.0, 512.0)

Make = Callable[[np.random.Generator], list[NoiseStep]]


def noise_cases() -> tuple[Case, ...]:
    """All cases about the gradient noise scale.

    Returns:
        The cases, in the order in which they are reported.

    Example:
        >>> [case.name for case in noise_cases()][:2]
        ['2 parts of 16', '8 parts of 1']
    """
    return (
        *(_two_batch_sizes(k, b, seed) for seed, (k, b) in enumerate(((2, 16), (8, 1), (8, 16), (32, 4)))),
        _plain("unequal parts", "Each part weighs by what it is worth.", [(1, 3, 4, 12)] * 32, seed=10),
        _plain(
            "short last window",
            "Steps with fewer parts count; a step with one part has no estimate and is left out.",
            [(4,) * 4, (4,) * 4, (4, 4), (4, 4, 2), (1,), (4,) * 4] * 5,
            seed=11,
        ),
        _loss_scale(),
        _not_finite(),
        _finite_population(),
        _drifting_weights(),
        _ratio(),
        _large_scale(),
        _no_signal(),
        _independent_steps(),
        _correlated_steps(),
        _nothing("one part per step", "A single gradient shows no noise.", [(1,)] * 8, np.ones, seed=20),
        _nothing(
            "no finite step",
            "Nothing is left to measure.",
            [(1,) * 4] * 4,
            lambda p: np.full(p, np.nan),
            seed=21,
        ),
    )


def planted(
    rng: np.random.Generator,
    sizes: tuple[int, ...],
    gradient: float | Array,
    *,
    spectrum: Array = SPECTRUM,
    loss_scale: float = 1.0,
) -> NoiseStep:
    """One step whose examples have normal gradients of given mean and covariance.

    Args:
        rng: Source of the noise.
        sizes: Examples in each part.
        gradient: Mean gradient, one entry or all of them.
        spectrum: Variance of each entry.
        loss_scale: Factor on the loss.

    Returns:
        The step.
    """
    noise = rng.standard_normal((sum(sizes), len(spectrum))) * np.sqrt(spectrum)
    return _as_step(gradient + noise, sizes, loss_scale)


def _as_step(rows: Array, sizes: tuple[int, ...], loss_scale: float = 1.0) -> NoiseStep:
    """A step in which each example's gradient is the given row."""
    return NoiseStep(rows, -np.ones(len(rows)), np.zeros(rows.shape[1]), sizes, loss_scale)


def _runs(make: Make, count: int, seed: int) -> Callable[[], Iterator[Sequence[NoiseStep]]]:
    """``count`` runs, each with a generator of its own."""
    return lambda: (make(np.random.default_rng([seed, run])) for run in range(count))


def _two_batch_sizes(k: int, b: int, seed: int) -> Case:
    """Both estimates are unbiased, and as sharp as all k parts allow: arXiv:1812.06162, appendix A."""
    gradient = 0.3
    steps = 8 if k < 32 else 4
    signal = gradient**2 * len(SPECTRUM)
    var_trace, var_signal = _variances(k, b, gradient)
    return Case(
        name=f"{k} parts of {b}",
        about="Mean and scatter of both estimates in closed form.",
        kind="noise",
        runs=_runs(lambda rng: [planted(rng, (b,) * k, gradient) for _ in range(steps)], 48, seed),
        judges=(
            unbiased("trace", truth=constant(TRACE)),
            unbiased("grad_sq_norm", truth=constant(signal)),
            spread("trace", least=from_steps(math.sqrt(var_trace))),
            spread("grad_sq_norm", least=from_steps(math.sqrt(var_signal))),
        ),
    )


def _variances(k: int, b: int, gradient: float) -> tuple[float, float]:
    """Variances of both estimates from one step of k parts of b normal gradients; all entries equal."""
    of_trace = 2 * SQUARES / (k - 1)
    return of_trace, 4 * gradient**2 * TRACE / (k * b) + of_trace / (k * b**2)


def _mean_judges(signal: float, trace: float = TRACE) -> tuple[Judge, ...]:
    return (
        unbiased("trace", truth=constant(trace)),
        unbiased("grad_sq_norm", truth=constant(signal)),
        unbiased("scale", truth=constant(trace / signal)),
    )


def _plain(name: str, about: str, sizes: Sequence[tuple[int, ...]], seed: int) -> Case:
    """Planted gradients with a strong signal, in parts of the given sizes, one entry per step."""
    make: Make = lambda rng: [planted(rng, size, 1.0) for size in sizes]  # noqa: E731
    return Case(name, about, "noise", _runs(make, 24, seed), _mean_judges(float(len(SPECTRUM))))


def _loss_scale() -> Case:
    """The factor on the loss changes during the run, as a gradient scaler makes it."""

    def make(rng: np.random.Generator) -> list[NoiseStep]:
        return [planted(rng, (1,) * 4, 1.0, loss_scale=_SCALER[t % 3]) for t in range(33)]

    about = "The factor of the loss scaler is not part of the gradient."
    return Case("loss scale", about, "noise", _runs(make, 24, 12), _mean_judges(float(len(SPECTRUM))))


def _not_finite() -> Case:
    """One step in three overflows: it is skipped, and says nothing about the others."""

    def make(rng: np.random.Generator) -> list[NoiseStep]:
        steps = [planted(rng, (2,) * 4, 1.0) for _ in range(32)]
        for t in range(0, 30, 6):
            steps[t].inputs[3, 5] = np.nan
            steps[t + 1].inputs[0] = np.inf
        return steps

    about = "Steps with a gradient that is not finite are left out, alone."
    return Case("non-finite steps", about, "noise", _runs(make, 24, 13), _mean_judges(float(len(SPECTRUM))))


def _finite_population() -> Case:
    """Batches without replacement from N examples: S is S_pop N/(N - 1), |G|^2 less S_pop/(N - 1)."""
    count = 12
    population = 1.0 + np.random.default_rng(14).standard_normal((count, len(SPECTRUM)))
    mean = population.mean(0)
    spread = float(((population - mean) ** 2).sum(1).mean())
    signal = float(mean @ mean) - spread / (count - 1)

    def make(rng: np.random.Generator) -> list[NoiseStep]:
        return [_as_step(population[rng.permutation(count)[:8]], (2,) * 4) for _ in range(32)]

    about = "Parts that share no example are anticorrelated, by exactly as much as the formula says."
    judges = _mean_judges(signal, spread * count / (count - 1))
    return Case("finite population", about, "noise", _runs(make, 24, 14), judges)


def _drifting_weights() -> Case:
    r"""Linear regression while the weights move: each step has its own gradient and covariance.

    For ``y = noise`` of variance s^2 and standard normal inputs the gradient at w is ``G = w`` and
    ``S = P (|w|^2 + s^2) + |w|^2``.
    """
    size, steps, noise = 8, 24, 0.5
    angle, radius = 2.4 * np.arange(steps), 2.0 + np.cos(1.3 * np.arange(steps))
    path = np.zeros((steps, size))
    path[:, 0], path[:, 1] = radius * np.cos(angle), radius * np.sin(angle)
    signals = (path**2).sum(1)
    traces = size * (signals + noise**2) + signals

    def make(rng: np.random.Generator) -> list[NoiseStep]:
        return [
            NoiseStep(rng.standard_normal((32, size)), noise * rng.standard_normal(32), weights, (16, 16))
            for weights in path
        ]

    def averaged(values: Array) -> Truth:
        return lambda run: float(run.weights @ values)

    def ratio(run: Run) -> float:
        return float((run.weights @ traces) / (run.weights @ signals))

    return Case(
        name="drifting weights",
        about="Gradients of successive steps differ: parts belong to one step, and each step counts once.",
        kind="noise",
        runs=_runs(make, 64, 15),
        judges=(
            unbiased("trace", truth=averaged(traces)),
            unbiased("grad_sq_norm", truth=averaged(signals)),
            median("scale", truth=ratio),
        ),
    )


def _ratio() -> Case:
    """A weak signal over many steps: only the ratio of averages is near the truth, and steady.

    Its error is that of a ratio to first order; trace and signal have the covariance ``-Var(S) / B``.
    """
    k, b, signal = 4, 2, 3.5
    gradient = math.sqrt(signal / len(SPECTRUM))
    var_trace, var_signal = _variances(k, b, gradient)
    variance = var_trace / TRACE**2 + var_signal / signal**2 + 2 * var_trace / (k * b) / (TRACE * signal)

    def make(rng: np.random.Generator) -> list[NoiseStep]:
        return [planted(rng, (b,) * k, gradient) for _ in range(120)]

    scale = TRACE / signal
    judges = (
        median("scale", truth=constant(scale)),
        spread("scale", least=from_steps(scale * math.sqrt(variance)), limit=3.0),
    )
    return Case("ratio of averages", "Averages first, ratio last.", "noise", _runs(make, 16, 16), judges)


def _large_scale() -> Case:
    """Gradients without chance: opposite deviations in every pair give both estimates exactly."""
    size = 4
    deviation = np.full(size, 0.5)  # parts G + d and G - d: S = 2 |d|^2 = 2, |G|^2_est = |G|^2 - 1
    gradient = np.zeros(size)
    gradient[0] = math.sqrt(1.0 + 2.0 / LARGE_SCALE)
    step = _as_step(np.stack([gradient + deviation, gradient - deviation]), (1, 1))
    return Case(
        name="large scale",
        about="A scale of a million is no error: nothing caps it.",
        kind="noise",
        runs=lambda: iter([[step] * 40]),
        judges=(
            close("trace", truth=constant(2.0)),
            close("grad_sq_norm", truth=constant(2.0 / LARGE_SCALE), limit=1e-6),
            close("scale", truth=constant(LARGE_SCALE), limit=1e-6),
        ),
    )


def _no_signal() -> Case:
    """The mean gradient is zero and the scale infinite: any finite number needs an unbounded interval."""

    def make(rng: np.random.Generator) -> list[NoiseStep]:
        return [planted(rng, (1, 1), 0.0) for _ in range(32)]

    return Case(
        name="no signal",
        about="Where the gradient is below its own noise, no finite scale is stated with confidence.",
        kind="noise",
        runs=_runs(make, 32, 17),
        judges=(
            unbiased("trace", truth=constant(TRACE)),
            unbiased("grad_sq_norm", truth=constant(0.0)),
            unresolved("scale", truth=math.inf),
        ),
    )


def _independent_steps() -> Case:
    """Intervals from independent steps."""

    def make(rng: np.random.Generator) -> list[NoiseStep]:
        return [planted(rng, (2, 2), 1.0) for _ in range(40)]

    signal = float(len(SPECTRUM))
    return Case(
        name="intervals",
        about="95 % intervals hold the truth as often as they say, and are no wider than they need be.",
        kind="noise",
        runs=_runs(make, 40, 18),
        judges=(
            covers("trace", truth=constant(TRACE)),
            width("trace"),
            covers("grad_sq_norm", truth=constant(signal)),
            width("grad_sq_norm"),
            covers("scale", truth=constant(TRACE / signal)),
            width("scale"),
        ),
    )


def _correlated_steps() -> Case:
    """The noise keeps its strength for a while: steps are not independent draws of its trace."""
    flat = np.ones(16)

    def make(rng: np.random.Generator) -> list[NoiseStep]:
        sign = rng.choice([-1.0, 1.0])
        steps = []
        for _ in range(128):
            sign *= 1.0 if rng.random() < 0.85 else -1.0
            steps.append(planted(rng, (1, 1), 1.0, spectrum=(1 + 0.9 * sign) * flat))
        return steps

    judges = (covers("trace", truth=constant(16.0)), width("trace"))
    about = "Intervals know that successive steps are correlated."
    return Case("correlated steps", about, "noise", _runs(make, 24, 19), judges)


def _nothing(
    name: str, about: str, sizes: Sequence[tuple[int, ...]], row: Callable[[int], Array], seed: int
) -> Case:
    """Runs of which no step can be measured."""

    def make(rng: np.random.Generator) -> list[NoiseStep]:
        return [_as_step(planted(rng, size, 1.0).inputs * row(len(SPECTRUM)), size) for size in sizes]

    judges = (silent("trace"), silent("grad_sq_norm"), silent("scale"))
    return Case(name, about, "noise", _runs(make, 4, seed), judges)
