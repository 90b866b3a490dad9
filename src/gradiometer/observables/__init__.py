"""The observables, one file each: pure functions, then the class that connects them."""

from .base import Estimate, Observable, Sample
from .fluctuation_dissipation import FluctuationDissipation, fluctuation_dissipation
from .gradient_noise_scale import (
    GradientNoiseScale,
    gradient_noise_scale,
    per_example_grad_norms,
    sgd_noise_scale,
)
from .jacobian_norm import JacobianNorm, jacobian_norms, jacobian_singular_values
from .learning_rate_limit import LearningRateLimit, stability_limit, suggest_learning_rate
from .neural_tangent_kernel import (
    NeuralTangentKernel,
    empirical_ntk,
    kernel_alignment,
    kernel_angle,
    kernel_distance,
    projection_stderr,
    relative_drift,
)
from .noise_curvature import NoiseCurvature, best_step, curvature_of_noise, noise_curvature
from .second_fluctuation_dissipation import (
    SecondFluctuationDissipation,
    harmonicity,
    second_fluctuation_dissipation,
    shuffling_factor,
)

DEFAULT_OBSERVABLES = (NeuralTangentKernel, JacobianNorm, GradientNoiseScale, FluctuationDissipation)
"""The default set."""
OBSERVABLES = (*DEFAULT_OBSERVABLES, NoiseCurvature, SecondFluctuationDissipation, LearningRateLimit)
"""Every observable that ships."""


def default_observables() -> tuple[Observable, ...]:
    """The default set, each at its default cadence.

    Example:
        >>> [observable.group for observable in default_observables()]
        ['ntk', 'jacobian', 'noise', 'fdr']
    """
    return tuple(observable() for observable in DEFAULT_OBSERVABLES)


__all__ = [
    "DEFAULT_OBSERVABLES",
    "OBSERVABLES",
    "Estimate",
    "FluctuationDissipation",
    "GradientNoiseScale",
    "JacobianNorm",
    "LearningRateLimit",
    "NeuralTangentKernel",
    "NoiseCurvature",
    "Observable",
    "Sample",
    "SecondFluctuationDissipation",
    "best_step",
    "curvature_of_noise",
    "default_observables",
    "empirical_ntk",
    "fluctuation_dissipation",
    "gradient_noise_scale",
    "harmonicity",
    "jacobian_norms",
    "jacobian_singular_values",
    "kernel_alignment",
    "kernel_angle",
    "kernel_distance",
    "noise_curvature",
    "per_example_grad_norms",
    "projection_stderr",
    "relative_drift",
    "second_fluctuation_dissipation",
    "sgd_noise_scale",
    "shuffling_factor",
    "stability_limit",
    "suggest_learning_rate",
]
