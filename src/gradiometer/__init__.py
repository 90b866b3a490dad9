"""Gradiometer: see the physics of a training run while it happens.

Names are loaded when they are first used: ``import gradiometer`` imports neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

_WHERE = {
    "Controller": "control",
    "Decision": "record.readings",
    "Ema": "stats.estimators",
    "EquilibriumLR": "control",
    "Estimate": "observables",
    "Estimator": "stats.estimators",
    "FluctuationDissipation": "observables",
    "GradientNoiseScale": "observables",
    "GrowingBatchSampler": "control",
    "HalfRun": "stats.estimators",
    "JSONLinesRecorder": "record",
    "JacobianNorm": "observables",
    "JacobianRegularizer": "control",
    "Last": "stats.estimators",
    "LearningRateLimit": "observables",
    "Mean": "stats.estimators",
    "MemoryRecorder": "record",
    "Monitor": "engine.monitor",
    "NeuralTangentKernel": "observables",
    "NoiseCurvature": "observables",
    "NoiseScaleBatchSize": "control",
    "Observable": "observables",
    "Probe": "collect.snapshot",
    "Quantity": "record.readings",
    "Reading": "record.readings",
    "Recorder": "record",
    "Reference": "stats.estimators",
    "Sample": "observables",
    "Schedule": "observables.schedules",
    "SecondFluctuationDissipation": "observables",
    "Snapshot": "collect.snapshot",
    "TensorBoardRecorder": "record",
    "Window": "stats.estimators",
    "at": "observables.schedules",
    "best_step": "observables",
    "curvature_of_noise": "observables.noise_curvature",
    "default_observables": "observables",
    "empirical_ntk": "observables",
    "every": "observables.schedules",
    "fluctuation_dissipation": "observables",
    "gradient_noise_scale": "observables",
    "harmonicity": "observables",
    "jacobian_norms": "observables",
    "jacobian_singular_values": "observables",
    "kernel_alignment": "observables",
    "kernel_angle": "observables",
    "kernel_distance": "observables",
    "log_spaced": "observables.schedules",
    "noise_curvature": "observables",
    "per_example_grad_norms": "observables",
    "projection_stderr": "observables",
    "read_decisions": "record",
    "read_json_lines": "record",
    "relative_drift": "observables",
    "second_fluctuation_dissipation": "observables",
    "sgd_noise_scale": "observables",
    "shuffling_factor": "observables",
    "stability_limit": "observables",
    "suggest_learning_rate": "observables",
}

if TYPE_CHECKING:
    from .collect.snapshot import Probe as Probe
    from .collect.snapshot import Snapshot as Snapshot
    from .control import Controller as Controller
    from .control import EquilibriumLR as EquilibriumLR
    from .control import GrowingBatchSampler as GrowingBatchSampler
    from .control import JacobianRegularizer as JacobianRegularizer
    from .control import NoiseScaleBatchSize as NoiseScaleBatchSize
    from .engine.monitor import Monitor as Monitor
    from .observables import Estimate as Estimate
    from .observables import FluctuationDissipation as FluctuationDissipation
    from .observables import GradientNoiseScale as GradientNoiseScale
    from .observables import JacobianNorm as JacobianNorm
    from .observables import LearningRateLimit as LearningRateLimit
    from .observables import NeuralTangentKernel as NeuralTangentKernel
    from .observables import NoiseCurvature as NoiseCurvature
    from .observables import Observable as Observable
    from .observables import Sample as Sample
    from .observables import SecondFluctuationDissipation as SecondFluctuationDissipation
    from .observables import best_step as best_step
    from .observables import curvature_of_noise as curvature_of_noise
    from .observables import default_observables as default_observables
    from .observables import empirical_ntk as empirical_ntk
    from .observables import fluctuation_dissipation as fluctuation_dissipation
    from .observables import gradient_noise_scale as gradient_noise_scale
    from .observables import harmonicity as harmonicity
    from .observables import jacobian_norms as jacobian_norms
    from .observables import jacobian_singular_values as jacobian_singular_values
    from .observables import kernel_alignment as kernel_alignment
    from .observables import kernel_angle as kernel_angle
    from .observables import kernel_distance as kernel_distance
    from .observables import noise_curvature as noise_curvature
    from .observables import per_example_grad_norms as per_example_grad_norms
    from .observables import projection_stderr as projection_stderr
    from .observables import relative_drift as relative_drift
    from .observables import second_fluctuation_dissipation as second_fluctuation_dissipation
    from .observables import sgd_noise_scale as sgd_noise_scale
    from .observables import shuffling_factor as shuffling_factor
    from .observables import stability_limit as stability_limit
    from .observables import suggest_learning_rate as suggest_learning_rate
    from .observables.schedules import Schedule as Schedule
    from .observables.schedules import at as at
    from .observables.schedules import every as every
    from .observables.schedules import log_spaced as log_spaced
    from .record import JSONLinesRecorder as JSONLinesRecorder
    from .record import MemoryRecorder as MemoryRecorder
    from .record import Recorder as Recorder
    from .record import TensorBoardRecorder as TensorBoardRecorder
    from .record import read_decisions as read_decisions
    from .record import read_json_lines as read_json_lines
    from .record.readings import Decision as Decision
    from .record.readings import Quantity as Quantity
    from .record.readings import Reading as Reading
    from .stats.estimators import Ema as Ema
    from .stats.estimators import Estimator as Estimator
    from .stats.estimators import HalfRun as HalfRun
    from .stats.estimators import Last as Last
    from .stats.estimators import Mean as Mean
    from .stats.estimators import Reference as Reference
    from .stats.estimators import Window as Window

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'gradiometer' has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
