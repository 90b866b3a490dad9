"""What the noise scale takes from the parts of a batch, and whether those of several processes make it up."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collect.snapshot import GradientParts
from ..errors import SampleSkippedError
from ..stats.noise_scale import moments_of_parts

_TOLERANCE = 0.01
"""Share of the gradient's norm from which a difference counts: gradients may be sent in half precision."""


def comparable(first: GradientParts, second: GradientParts) -> bool:
    """Whether two sources look at the same numbers of parameters in every section.

    Args:
        first: Parts of a batch.
        second: Parts from another source.
    """
    return torch.equal(first.parameters, second.parameters)


def moments_like(parts: GradientParts, like: GradientParts) -> Tensor:
    """Moments of one source, in the form of the first one's.

    Args:
        parts: Parts of a batch.
        like: Those of the first source.
    """
    moments = moments_of_parts(
        parts.sq_norms, parts.sizes, parts.shares, parts.batch_sq_norm, parts.processes
    )
    return moments.to(like.sq_norms)


def check_one_gradient(sums: Tensor) -> None:
    """Refuse gradients of processes whose mean is not the gradient that they train with.

    Args:
        sums: Means over steps and processes of :attr:`GradientParts.sums`.

    Shapes:
        ``[4]``.

    Raises:
        SampleSkippedError: With what may have come between.
    """
    parts, batch, sq_norm, slack = sums.tolist()
    if abs(parts - batch) > _TOLERANCE * sq_norm**0.5 + slack:
        raise SampleSkippedError(
            "the gradient in .grad is not the mean over the processes of what their backward passes gave: it "
            "was changed (clipped, or summed instead of averaged), or a backward pass was made outside "
            "monitor.micro_batch",
            fix="Call monitor.before_step() right after the last backward pass.",
        )
