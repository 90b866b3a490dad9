"""Gradiometer: see the physics of a training run while it happens.

Names are loaded when they are first used: ``import gradiometer`` imports neither torch nor Lightning. What
most scripts use stands here; everything else is in its folder (``gradiometer.observables``,
``gradiometer.control``, ``gradiometer.record`` ...).
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

_WHERE = {
    "Controller": "control",
    "Ema": "stats.estimators",
    "EquilibriumLR": "control",
    "FluctuationDissipation": "observables",
    "GradientCosine": "observables",
    "GradientNoiseScale": "observables",
    "GrowingBatchSampler": "control",
    "HalfRun": "stats.estimators",
    "JSONLinesRecorder": "record",
    "JacobianNorm": "observables",
    "JacobianRegularizer": "control",
    "LearningRateLimit": "observables",
    "Mean": "stats.estimators",
    "MemoryRecorder": "record",
    "Monitor": "engine.monitor",
    "NeuralTangentKernel": "observables",
    "NoiseCurvature": "observables",
    "NoiseScaleBatchSize": "control",
    "Observable": "observables",
    "Quantity": "record.readings",
    "Reading": "record.readings",
    "Schedule": "observables",
    "SecondFluctuationDissipation": "observables",
    "Snapshot": "collect.snapshot",
    "StopWhenSettled": "control",
    "TensorBoardRecorder": "record",
    "Window": "stats.estimators",
    "at": "observables",
    "empirical_ntk": "autodiff.empirical_ntk",
    "every": "observables",
    "fluctuation_dissipation": "observables",
    "gradient_noise_scale": "observables",
    "jacobian_norms": "observables",
    "kernel_distance": "observables",
    "layer_ntks": "autodiff.empirical_ntk",
    "log_spaced": "observables",
    "per_example_grad_norms": "observables",
    "register_rule": "autodiff.rules",
    "suggest_learning_rate": "observables",
}

_MOVED = {
    "Decision": "record.readings",
    "Estimate": "observables",
    "Estimator": "stats.estimators",
    "Last": "stats.estimators",
    "Probe": "collect.snapshot",
    "Recorder": "record",
    "Reference": "stats.estimators",
    "best_step": "observables",
    "curvature_of_noise": "observables.noise_curvature",
    "default_observables": "observables",
    "harmonicity": "observables",
    "jacobian_singular_values": "observables",
    "kernel_alignment": "observables",
    "kernel_angle": "observables",
    "projection_stderr": "observables",
    "read_decisions": "record",
    "read_json_lines": "record",
    "relative_drift": "observables",
    "second_fluctuation_dissipation": "observables",
    "sgd_noise_scale": "observables",
    "shuffling_factor": "observables",
    "stability_limit": "observables",
}
"""Names that stood here up to version 0.1.0; they go with the next one."""

if TYPE_CHECKING:
    from .autodiff.empirical_ntk import empirical_ntk as empirical_ntk
    from .autodiff.empirical_ntk import layer_ntks as layer_ntks
    from .autodiff.rules import register_rule as register_rule
    from .collect.snapshot import Snapshot as Snapshot
    from .control import Controller as Controller
    from .control import EquilibriumLR as EquilibriumLR
    from .control import GrowingBatchSampler as GrowingBatchSampler
    from .control import JacobianRegularizer as JacobianRegularizer
    from .control import NoiseScaleBatchSize as NoiseScaleBatchSize
    from .control import StopWhenSettled as StopWhenSettled
    from .engine.monitor import Monitor as Monitor
    from .observables import FluctuationDissipation as FluctuationDissipation
    from .observables import GradientCosine as GradientCosine
    from .observables import GradientNoiseScale as GradientNoiseScale
    from .observables import JacobianNorm as JacobianNorm
    from .observables import LearningRateLimit as LearningRateLimit
    from .observables import NeuralTangentKernel as NeuralTangentKernel
    from .observables import NoiseCurvature as NoiseCurvature
    from .observables import Observable as Observable
    from .observables import Schedule as Schedule
    from .observables import SecondFluctuationDissipation as SecondFluctuationDissipation
    from .observables import at as at
    from .observables import every as every
    from .observables import fluctuation_dissipation as fluctuation_dissipation
    from .observables import gradient_noise_scale as gradient_noise_scale
    from .observables import jacobian_norms as jacobian_norms
    from .observables import kernel_distance as kernel_distance
    from .observables import log_spaced as log_spaced
    from .observables import per_example_grad_norms as per_example_grad_norms
    from .observables import suggest_learning_rate as suggest_learning_rate
    from .record import JSONLinesRecorder as JSONLinesRecorder
    from .record import MemoryRecorder as MemoryRecorder
    from .record import TensorBoardRecorder as TensorBoardRecorder
    from .record.readings import Quantity as Quantity
    from .record.readings import Reading as Reading
    from .stats.estimators import Ema as Ema
    from .stats.estimators import HalfRun as HalfRun
    from .stats.estimators import Mean as Mean
    from .stats.estimators import Window as Window

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        home = f"{__name__}.{_MOVED[name]}"
        warnings.warn(
            f"gradiometer.{name} has moved: write from {home} import {name}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(home), name)
    if name not in _WHERE:
        raise AttributeError(f"module 'gradiometer' has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
