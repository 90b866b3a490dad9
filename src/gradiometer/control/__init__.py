"""Acting on readings: controllers, what they decide, and how it reaches the run."""

from .base import Controller, Effect, View, check_controllers, with_needed
from .batch_size import NoiseScaleBatchSize
from .jacobian_regularizer import JacobianRegularizer
from .learning_rate import EquilibriumLR
from .panel import ControlPanel
from .sampler import GrowingBatchSampler
from .stop_when_settled import StopWhenSettled

__all__ = [
    "ControlPanel",
    "Controller",
    "Effect",
    "EquilibriumLR",
    "GrowingBatchSampler",
    "JacobianRegularizer",
    "NoiseScaleBatchSize",
    "StopWhenSettled",
    "View",
    "check_controllers",
    "with_needed",
]
