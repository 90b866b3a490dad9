"""Which collector supplies which snapshot field; a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Collector
from .curvature import CurvatureCollector, StepCurvatureCollector
from .gradient import GradientCollector, PreviousGradientCollector
from .gradient_parts import (
    AutoSource,
    ExampleSource,
    NormLayerSource,
    PreconditionerCollector,
    SplitSource,
)
from .step_form import ParameterStepCollector, StepFactorCollector
from .update import UpdateCollector, WorkCollector
from .weights import CentredWeightCollector, WeightCollector

COLLECTORS: Mapping[str, type[Collector]] = {
    "gradient_parts": AutoSource,
    "example_parts": ExampleSource,
    "norm_layer_parts": NormLayerSource,
    "split_parts": SplitSource,
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
