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

from .._types import Forward
from .functional import matrix_forward, pure_function
from .products import as_training

NORMALISING = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_FACTOR = 2.0
_TOLERANCE = 0.01
"""The normalisation's own epsilon breaks the invariance a little; scaling any other weight does not pass."""


def scale_invariant_weights(
    model: nn.Module, x: Any, forward: Forward = matrix_forward, *, tolerance: float = _TOLERANCE
) -> list[str]:
    """Names of the weights whose scale does not change the outputs, by doubling each of them.

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
    with as_training(model), torch.no_grad():
        function, parameters = pure_function(model, forward)

        def outputs(values: dict[str, Tensor]) -> Tensor:
            torch.manual_seed(0)  # the same masks every time; as_training restores the random state
            return function(values, x)

        plain = outputs(parameters)
        scale = plain.norm()
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return [
            name
            for name, (key, value) in zip(trainable, parameters.items(), strict=True)
            if value.ndim > 1
            and value.any()
            and (outputs({**parameters, key: _FACTOR * value}) - plain).norm() <= tolerance * scale
        ]
