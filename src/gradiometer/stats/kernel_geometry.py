"""How far a kernel has moved, how it lies to the targets, and how many directions share it."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from ..errors import InputError

__all__ = [
    "centred",
    "cosine",
    "effective_rank",
    "kernel_alignment",
    "kernel_angle",
    "kernel_distance",
    "projection_stderr",
    "relative_drift",
    "rescaled_parts",
    "target_kernel",
]


def projection_stderr(estimates: Tensor, width: int) -> Tensor:
    r"""Standard error of the mean over random orthonormal output projections.

    .. math:: \mathrm{se}^2 = \frac{s^2}{k}\Bigl(1 - \frac kO\Bigr)

    with the sample variance :math:`s^2`: exchangeable projections whose mean is exact at ``k = O`` are
    drawn without replacement in this sense.

    Args:
        estimates: One estimate per projection, along the last axis, at least two.
        width: Number of outputs O.

    Returns:
        The standard error.

    Shapes:
        ``[..., k]`` -> ``[...]``.

    Units:
        Those of the estimates.

    Raises:
        InputError: If there are fewer than two estimates.

    Source:
        The finite population correction (Cochran 1977, Sampling Techniques), for projections as those of
        arXiv:1908.02729.

    Example:
        >>> projection_stderr(torch.tensor([1.0, 3.0]), width=4)
        tensor(0.7071)
    """
    k = estimates.shape[-1]
    if k < 2:
        raise InputError("an error needs at least two projections", got=k, fix="Write num_projections=8.")
    return (estimates.var(-1) / k * (1 - k / width)).sqrt()


def kernel_distance(k1: Tensor, k2: Tensor) -> Tensor:
    r"""One minus the cosine between two kernels: 0 when they differ by a factor only.

    .. math:: S = 1 - \frac{\langle K_1, K_2\rangle_F}{|K_1|_F\,|K_2|_F}

    Computed as half the squared distance of the normalised kernels, which keeps its digits when the
    kernels are close.

    Args:
        k1: A kernel.
        k2: Another one of the same shape.

    Returns:
        A scalar in [0, 1] for positive kernels.

    Shapes:
        Any, twice the same -> scalar.

    Units:
        None.

    Raises:
        InputError: If the shapes differ.

    Source:
        Fort et al. 2020, arXiv:2010.15110.

    Example:
        >>> kernel_distance(torch.eye(2), 4 * torch.eye(2))
        tensor(0.)
    """
    _check_pair(k1, k2)
    return (k1 / k1.norm() - k2 / k2.norm()).square().sum() / 2


def kernel_angle(k1: Tensor, k2: Tensor) -> Tensor:
    r"""Angle between two kernels, accurate for small angles.

    .. math:: \alpha = \arccos(1 - S) = 2\arcsin\sqrt{S/2}

    Divided by the steps in between it is the angular velocity, which does not depend on the cadence for
    motion at constant speed (the distance itself grows with the square of the time).

    Args:
        k1: A kernel.
        k2: Another one of the same shape.

    Returns:
        A scalar.

    Shapes:
        Any, twice the same -> scalar.

    Units:
        Radians.

    Raises:
        InputError: If the shapes differ.

    Source:
        The distance of Fort et al. 2020, arXiv:2010.15110, turned into an angle.

    Example:
        >>> kernel_angle(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0])))
        tensor(1.5708)
    """
    return 2 * torch.asin((kernel_distance(k1, k2) / 2).sqrt().clamp(max=1.0))


def rescaled_parts(k: Tensor, parts: Tensor) -> Tensor:
    r"""The sum of rescaled parts whose direction comes nearest to a kernel's.

    .. math:: \sum_l w_l P_l \quad\text{with}\quad w = \arg\min_{w \ge 0} |K - \sum_l w_l P_l|_F

    When the weights of layers change in scale only, the share of each layer in the tangent kernel keeps its
    direction, and their sum may turn: the distance from this sum is blind to that.

    Args:
        k: The kernel now.
        parts: The shares of the layers in an earlier one.

    Returns:
        The sum.

    Shapes:
        ``[N, N]`` and ``[L, N, N]`` -> ``[N, N]``.

    Units:
        Those of the kernel.

    Raises:
        InputError: If the shapes do not go together.

    Source:
        Lawson and Hanson 1974, Solving Least Squares Problems, chapter 23, for the weights; their use here is
        new.

    Example:
        >>> parts = torch.stack([torch.eye(2), torch.ones(2, 2)]).double()
        >>> rescaled_parts(5 * parts[0] + 0.1 * parts[1], parts)
        tensor([[5.1000, 0.1000],
                [0.1000, 5.1000]], dtype=torch.float64)
    """
    if parts.ndim != k.ndim + 1:
        raise InputError(
            "parts must be one kernel per layer",
            got=f"{list(parts.shape)} beside a kernel {list(k.shape)}",
            fix="Stack what layer_ntks returns.",
        )
    _check_pair(k, parts[0])
    if not bool(k.isfinite().all() and parts.isfinite().all()):
        return torch.full_like(k, torch.nan)
    columns, goal = parts.flatten(1).double().cpu().numpy(), k.flatten().double().cpu().numpy()
    norms = np.linalg.norm(columns, axis=1)
    reached = norms > 0
    weights = np.zeros(len(parts))
    weights[reached] = nnls((columns[reached] / norms[reached, None]).T, goal)[0] / norms[reached]
    return torch.einsum("l,l...->...", torch.from_numpy(weights).to(parts), parts)


def relative_drift(k: Tensor, k0: Tensor) -> Tensor:
    r"""How far a kernel has moved, relative to where it began: sees scale and direction.

    .. math:: D = |K - K_0|_F / |K_0|_F

    Args:
        k: The kernel now.
        k0: The kernel at the beginning.

    Returns:
        A scalar.

    Shapes:
        Any, twice the same -> scalar.

    Units:
        None.

    Raises:
        InputError: If the shapes differ.

    Source:
        Lee et al. 2019, arXiv:1902.06720.

    Example:
        >>> relative_drift(2 * torch.eye(2), torch.eye(2))
        tensor(1.)
    """
    _check_pair(k, k0)
    return (k - k0).norm() / k0.norm()


def kernel_alignment(k: Tensor, y: Tensor) -> Tensor:
    r"""Centred alignment of a kernel over examples with the targets.

    .. math:: A = \frac{\langle HKH, HYY^\top H\rangle_F}{|HKH|_F\,|HYY^\top H|_F},
              \qquad H = 1 - \tfrac1N 11^\top

    Args:
        k: Kernel over examples.
        y: Targets: class indices (whole numbers) or vectors.

    Returns:
        A scalar in [-1, 1].

    Shapes:
        k ``[N, N]``, y ``[N]`` or ``[N, C]`` -> scalar.

    Units:
        None.

    Raises:
        InputError: If the shapes do not fit.

    Source:
        Cortes, Mohri, Rostamizadeh 2012, JMLR 13:795-828.

    Example:
        >>> y = torch.tensor([0, 0, 1, 1])
        >>> round(kernel_alignment(target_kernel(y), y).item(), 6)
        1.0
    """
    targets = target_kernel(y)
    if k.ndim != 2 or k.shape != targets.shape:
        raise InputError(
            "alignment needs a kernel [N, N] and N targets",
            got=f"a kernel {list(k.shape)} and targets {list(y.shape)}",
            fix='Use the trace kernel, empirical_ntk(model, x, outputs="trace").',
        )
    return cosine(centred(k.to(targets)), centred(targets))


def target_kernel(y: Tensor) -> Tensor:
    """``Y Y^T`` of targets; class indices count as one-hot vectors.

    Args:
        y: Targets.

    Returns:
        The kernel of the targets, float64.

    Shapes:
        y ``[N]`` or ``[N, C]`` -> ``[N, N]``.

    Example:
        >>> target_kernel(torch.tensor([3, 3, 5]))[0].tolist()
        [1.0, 1.0, 0.0]
    """
    if not y.is_floating_point():
        flat = y.reshape(len(y), -1)
        return (flat[:, None] == flat[None, :]).all(-1).double()
    flat = y.reshape(len(y), -1).double()
    return flat @ flat.mT


def effective_rank(eigenvalues: Tensor) -> Tensor:
    r"""Participation ratio of a spectrum: how many directions share it.

    .. math:: (\sum_i \lambda_i)^2 / \sum_i \lambda_i^2

    Args:
        eigenvalues: A spectrum.

    Returns:
        A scalar between 1 and ``n``.

    Shapes:
        ``[n]`` -> scalar.

    Example:
        >>> effective_rank(torch.ones(5))
        tensor(5.)
    """
    return eigenvalues.sum().square() / eigenvalues.square().sum()


def _check_pair(k1: Tensor, k2: Tensor) -> None:
    if k1.shape != k2.shape:
        raise InputError(
            "two kernels can be compared only on one probe",
            got=f"shapes {list(k1.shape)} and {list(k2.shape)}",
            fix="Evaluate both on the same inputs with the same outputs mode.",
        )


def centred(k: Tensor) -> Tensor:
    """A kernel with the means of its rows and columns taken out.

    Args:
        k: A kernel over examples.
    """
    return k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between two tensors of one shape.

    Args:
        a: A tensor.
        b: Another one.
    """
    return (a * b).sum() / (a.norm() * b.norm())
