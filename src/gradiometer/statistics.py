"""Block statistics: sums over blocks of steps, and errors from leaving one block out."""

from __future__ import annotations

import torch
from torch import Tensor


def delete_block_jackknife(full: Tensor, left_out: Tensor, weights: Tensor) -> Tensor:
    r"""Standard error of a smooth function of averages, from estimates that each miss one block.

    .. math:: \tilde\theta_j = h_j\hat\theta - (h_j - 1)\hat\theta_{(j)},\qquad
              \mathrm{se}^2 = \frac1g \sum_j \frac{(\tilde\theta_j - \bar\theta)^2}{h_j - 1},
              \qquad h_j = \frac{\sum_i w_i}{w_j},\quad \bar\theta = \sum_j \tilde\theta_j / h_j

    For equal weights this is the delete-one jackknife.

    Args:
        full: The estimate from all blocks.
        left_out: Row ``j`` is the estimate without block ``j``.
        weights: Weight (number of samples) of each block.

    Returns:
        The standard error, ``nan`` with fewer than four blocks.

    Shapes:
        full ``[R]``, left_out ``[g, R]``, weights ``[g]`` -> ``[R]``.

    Units:
        Those of ``full``.

    Source:
        Busing, Meijer, van der Leeden 1999, Delete-m jackknife for unequal m, Statistics and
        Computing 9:3-8.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        >>> without = (x.sum() - x)[:, None] / 3
        >>> delete_block_jackknife(x.mean()[None], without, torch.ones(4))   # = std / sqrt(4)
        tensor([0.6455], dtype=torch.float64)
    """
    blocks = len(weights)
    if blocks < 4:
        return torch.full_like(full, torch.nan)
    h = (weights.sum() / weights).to(full.dtype)[:, None]
    pseudo = h * full - (h - 1) * left_out
    centre = (pseudo / h).sum(0)
    return ((pseudo - centre).square() / (h - 1)).mean(0).sqrt()


def detrended_variance(steps: Tensor, values: Tensor) -> Tensor:
    """Variance of a series about its straight-line trend.

    Args:
        steps: Positions, at least four.
        values: One series per column.

    Returns:
        Residual sum of squares over ``K - 2``; ``nan`` for fewer than four points.

    Shapes:
        steps ``[K]``, values ``[K, G]`` -> ``[G]``.

    Units:
        Square of the unit of ``values``.

    Example:
        >>> steps = torch.arange(5.0, dtype=torch.float64)
        >>> detrended_variance(steps, (3 + 2 * steps)[:, None]).abs() < 1e-12
        tensor([True])
    """
    if len(steps) < 4:
        return torch.full(values.shape[1:], torch.nan, dtype=values.dtype)
    x = (steps - steps.mean()).to(values.dtype)
    y = values - values.mean(0)
    slope = (x[:, None] * y).sum(0) / x.square().sum()
    return (y - x[:, None] * slope).square().sum(0) / (len(steps) - 2)
