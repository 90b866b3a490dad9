"""How far a kernel has moved, how it lies to the targets, and how many directions share it."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from ..errors import InputError, shown
from .arguments import check_entries, check_finite

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
    check_finite(estimates=estimates)
    check_entries("width", width, least=1, integer=True, scalar=True, example="10")
    k = estimates.shape[-1] if estimates.ndim else 1
    if k < 2:
        raise InputError("an error needs at least two projections", got=k, fix="Write num_projections=8.")
    if k > width:
        raise InputError(
            "there are no more orthonormal projections than outputs",
            got=f"{k} estimates, width={width}",
            fix="Pass the number of outputs as width=.",
        )
    return spread_of_projections(estimates, width)


def spread_of_projections(estimates: Tensor, width: int) -> Tensor:
    """The formula of :func:`projection_stderr`.

    Args:
        estimates: As there.
        width: As there.
    """
    k = estimates.shape[-1]
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
        InputError: If the shapes differ, or a kernel is not finite or all 0.

    Source:
        Fort et al. 2020, arXiv:2010.15110.

    Example:
        >>> kernel_distance(torch.eye(2), 4 * torch.eye(2))
        tensor(0.)
    """
    _check_pair(k1, k2)
    _check_direction(k1=k1, k2=k2)
    return distance_between(k1, k2)


def distance_between(k1: Tensor, k2: Tensor) -> Tensor:
    """The formula of :func:`kernel_distance`: ``nan`` where a kernel is 0 or not finite.

    Args:
        k1: A kernel.
        k2: Another one of the same shape.
    """
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
        InputError: If the shapes differ, or a kernel is not finite or all 0.

    Source:
        The distance of Fort et al. 2020, arXiv:2010.15110, turned into an angle.

    Example:
        >>> kernel_angle(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0])))
        tensor(1.5708)
    """
    _check_pair(k1, k2)
    _check_direction(k1=k1, k2=k2)
    return angle_between(k1, k2)


def angle_between(k1: Tensor, k2: Tensor) -> Tensor:
    """The formula of :func:`kernel_angle`: ``nan`` where a kernel is 0 or not finite.

    Args:
        k1: A kernel.
        k2: Another one of the same shape.
    """
    return 2 * torch.asin((distance_between(k1, k2) / 2).sqrt().clamp(max=1.0))


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
    if k.shape != parts[0].shape:
        raise _of_two_probes(k, parts[0])
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
        InputError: If the shapes differ, a kernel is not finite, or the first one is all 0.

    Source:
        Lee et al. 2019, arXiv:1902.06720.

    Example:
        >>> relative_drift(2 * torch.eye(2), torch.eye(2))
        tensor(1.)
    """
    _check_pair(k, k0)
    _check_direction(k0=k0)
    return drift_between(k, k0)


def drift_between(k: Tensor, k0: Tensor) -> Tensor:
    """The formula of :func:`relative_drift`: ``nan`` or infinite where the first kernel is 0.

    Args:
        k: The kernel now.
        k0: The kernel at the beginning.
    """
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
        InputError: If the shapes do not fit, or the kernel or the targets have no direction: all 0, or the
            same for all examples.

    Source:
        Cortes, Mohri, Rostamizadeh 2012, JMLR 13:795-828.

    Example:
        >>> y = torch.tensor([0, 0, 1, 1])
        >>> round(kernel_alignment(target_kernel(y), y).item(), 6)
        1.0
    """
    check_finite(k=k)
    check_entries("y", y, example="the targets")
    if not isinstance(y, Tensor) or not y.ndim:
        raise InputError("y must be a tensor that begins with the examples", got=shown(y), fix="Pass y [N].")
    targets = target_kernel(y).to(k.device)
    if k.ndim != 2 or k.shape != targets.shape:
        raise InputError(
            "alignment needs a kernel [N, N] and N targets",
            got=f"a kernel {list(k.shape)} and targets {list(y.shape)}",
            fix='Use the trace kernel, empirical_ntk(model, x, outputs="trace").',
        )
    moved = {"k": centred(k.to(targets)), "y": centred(targets)}
    for name, kernel in moved.items():
        if not bool(kernel.norm() > 1e-12 * (k if name == "k" else targets).norm()):
            raise InputError(
                f"alignment needs {name} to tell examples apart",
                got="the same for all examples",
                fix="Pass examples of several classes, or of different inputs.",
            )
    return cosine(*moved.values())


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
    check_finite(k1=k1, k2=k2)
    if k1.shape != k2.shape:
        raise _of_two_probes(k1, k2)


def _of_two_probes(k1: Tensor, k2: Tensor) -> InputError:
    return InputError(
        "two kernels can be compared only on one probe",
        got=f"shapes {list(k1.shape)} and {list(k2.shape)}",
        fix="Evaluate both on the same inputs with the same outputs mode.",
    )


def _check_direction(**kernels: Tensor) -> None:
    for name, kernel in kernels.items():
        if not bool(kernel.norm() > 0):
            raise InputError(
                f"{name} is 0 and has no direction to compare with",
                fix="Look for parameters that are frozen or that no output depends on.",
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
