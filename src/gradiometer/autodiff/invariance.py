"""Which weights may be scaled without changing the outputs: those in front of a normalisation.

Their gradient is orthogonal to them, so that only weight decay pulls on their norm: they reach
stationarity on a time scale of their own (van Laarhoven 2017, arXiv:1706.05350).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .functional import Forward, matrix_forward, pure_function
from .untouched import as_training

NORMALISING = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_FACTOR = 2.0
_TOLERANCE = 0.01
"""The normalisation's own epsilon breaks the invariance a little; scaling any other weight does not pass."""
_SPREAD = 0.5


def scale_invariant_weights(
    model: nn.Module, x: Any, forward: Forward = matrix_forward, *, tolerance: float = _TOLERANCE
) -> list[str]:
    """Names of the weights whose scale does not change the outputs, by doubling each of them.

    This is tried where biases, gains and what is 0 are moved a little at random, since a bias that begins at
    0 hides that it is not scaled along, and a head that does hides everything. A weight that changes nothing
    whatever it is has no part in the outputs and is none of these.

    Each module is in the mode it is in: batch norm normalises with the batch only in train mode. Dropout
    draws the same masks every time. A model without any normalisation is not run.

    Args:
        model: Any module.
        x: Inputs, the first dimension the examples; two or more under batch norm.
        forward: Maps model and inputs to outputs.
        tolerance: Largest change of the outputs, relative to their norm, that counts as none.

    Returns:
        Names of trainable parameters of two or more dimensions.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> scale_invariant_weights(net, torch.randn(5, 3))
        []
        >>> net[0].bias = None      # a bias is not scaled along
        >>> scale_invariant_weights(net, torch.randn(5, 3))
        ['0.weight']
    """
    if not any(isinstance(module, NORMALISING) for module in model.modules()):
        return []
    function, parameters = pure_function(model, forward)

    def outputs(values: dict[str, Tensor]) -> Tensor:
        with as_training(model), torch.no_grad():  # each time from the same random state: the same masks
            return function(values, x)

    generator = torch.Generator().manual_seed(0)
    point = {key: _moved(value, generator) for key, value in parameters.items()}
    plain = outputs(point)

    def unchanged(key: str, value: Tensor) -> bool:
        return bool((outputs({**point, key: value}) - plain).norm() <= tolerance * plain.norm())

    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        name
        for name, (key, value) in zip(trainable, point.items(), strict=True)
        if value.ndim > 1
        and unchanged(key, _FACTOR * value)
        and not unchanged(key, _noise(value, generator) * value.std())
    ]


def _moved(value: Tensor, generator: torch.Generator) -> Tensor:
    """A bias or a gain with noise added, a matrix of zeros filled with noise, any other as it is."""
    if value.ndim < 2:
        return value + _SPREAD * _noise(value, generator)
    return value if value.any() else _noise(value, generator) * (len(value) / value.numel()) ** 0.5


def _noise(value: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers that depend neither on the device nor on the global generators."""
    return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
