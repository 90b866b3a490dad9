"""The two noise scales as formulas: that of the gradient from the parts of a batch, and SGD's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, check_choice, check_flag, shown
from .arguments import check_entries, check_finite

__all__ = [
    "check_population",
    "gradient_noise_scale",
    "moments_of_parts",
    "of_training_set",
    "sgd_noise_scale",
    "solve",
]

PARTS, BATCH, PARTS_NOISE, BATCH_NOISE = range(4)
"""The moments that are averaged: A and C of the formula, and what multiplies the trace in each."""


def gradient_noise_scale(
    sq_norms: Tensor,
    sizes: Tensor,
    batch_sq_norm: Tensor,
    *,
    loss_reduction: str = "mean",
    dataset_size: int | None = None,
) -> dict[str, Tensor]:
    r"""Unbiased noise trace and squared gradient norm from the parts of one batch.

    With part means ``g_j`` of ``b_j`` examples and weights ``w_j`` that add up to 1,

    .. math:: A = \sum_j w_j |g_j|^2 \to |G|^2 + S \sum_j \frac{w_j}{b_j}, \qquad
              C = \Big|\sum_j w_j g_j\Big|^2 \to |G|^2 + S \sum_j \frac{w_j^2}{b_j}

    and hence ``S = (A - C) / (sum w/b - sum w^2/b)``, ``|G|^2 = C - S sum w^2/b``. With equal parts these
    are the two estimators of the source. ``loss_reduction="mean"``: every part contributes the gradient
    of its mean loss with equal weight, so ``g_j`` is k times the contribution, and ``|G|^2`` is on the
    scale of the gradient that the optimizer sees. ``"sum"``: ``g_j`` is the contribution over ``b_j``.

    These are the moments of what the examples are independent draws of. Examples of a batch that is drawn
    without replacement from N repel each other; with ``dataset_size=`` the moments are those of the N
    examples themselves, see ``of_training_set``.

    Args:
        sq_norms: Squared norm of each part's contribution to the batch gradient.
        sizes: Examples in each part.
        batch_sq_norm: Squared norm of the batch gradient (the sum of the contributions), unclipped.
        loss_reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over examples.
        dataset_size: Examples in the training set, N, where the parts are drawn from it without
            replacement: no two of their examples are the same one.

    Returns:
        ``trace`` (S) and ``grad_sq_norm`` (:math:`|G|^2`). Average both over steps before dividing:
        the ratio is ``B_simple``. Either can be negative on one step.

    Shapes:
        sq_norms and sizes ``[k]``, batch_sq_norm scalar -> scalars.

    Units:
        (loss / parameter)^2, the trace times one example.

    Raises:
        InputError: Fewer than two parts, an empty part, an unknown reduction, or more examples in the
            parts than in the training set.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A; the weights for
        unequal parts and the correction for a finite population are ours.

    Example:
        >>> sq_norms = torch.tensor([0.75, 0.75])     # two contributions of squared norm 3/4: g_j^2 = 3
        >>> gradient_noise_scale(sq_norms, torch.ones(2), torch.tensor(2.0))
        {'trace': tensor(2., dtype=torch.float64), 'grad_sq_norm': tensor(1., dtype=torch.float64)}
    """
    check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
    if dataset_size is not None:
        check_entries("dataset_size", dataset_size, least=1, integer=True, scalar=True, example="50_000")
    check_finite(sq_norms=sq_norms, batch_sq_norm=batch_sq_norm)
    _check_parts(sq_norms, sizes, batch_sq_norm)
    k = len(sq_norms)
    if k < 2:
        raise InputError(
            "the noise scale needs at least two parts of a batch",
            got=k,
            fix="Accumulate over two or more micro-batches "
            "(Lightning: accumulate_grad_batches=2), or use batches of two or more examples.",
        )
    check_population(sizes, dataset_size)
    b = sizes.double()
    mean = loss_reduction == "mean"
    share = torch.full_like(b, 1.0 / k) if mean else b / b.sum()
    factor = torch.full_like(b, k) if mean else 1.0 / b
    batch_mean = batch_sq_norm.double() / (1.0 if mean else b.sum().square())
    means = sq_norms.double()[:, None] * factor.square()[:, None]
    trace, signal = solve(moments_of_parts(means, b, share, batch_mean[None]), torch.ones_like(b[0]))
    if dataset_size is not None:
        trace, signal = of_training_set(trace, signal, 1 / dataset_size)
    return {"trace": trace[0], "grad_sq_norm": signal[0]}


def _check_parts(sq_norms: Tensor, sizes: Tensor, batch_sq_norm: Tensor) -> None:
    """Refuse norms of parts and of their batch that do not go together."""
    for name, squares in (("sq_norms", sq_norms), ("batch_sq_norm", batch_sq_norm)):
        check_entries(name, squares, least=0, example="norms.square()")
    check_sizes(sizes)
    shapes = [list(value.shape) for value in (sq_norms, sizes, batch_sq_norm)]
    if len(shapes[0]) != 1 or shapes[1] != shapes[0] or shapes[2]:
        raise InputError(
            "sq_norms and sizes must have one entry per part, and batch_sq_norm must be one number",
            got=f"shapes {shapes[0]}, {shapes[1]} and {shapes[2]}",
            fix="Pass sq_norms [k], sizes [k] and batch_sq_norm [].",
        )


def check_sizes(sizes: Any) -> None:
    """Refuse what are no numbers of examples.

    Args:
        sizes: Examples in each part.

    Raises:
        InputError: A part without an example, or half of one.
    """
    if not isinstance(sizes, Tensor) or sizes.ndim != 1:
        got = shown(sizes) if not isinstance(sizes, Tensor) else f"shape {list(sizes.shape)}"
        raise InputError("sizes must be a tensor [k]", got=got, fix="Write torch.tensor([16, 16]).")
    if sizes.numel() and not sizes.is_meta and bool((sizes < 1).any()):
        raise InputError("every part must hold an example", got=sizes.tolist(), fix="Drop empty parts.")
    check_entries("sizes", sizes, least=1, integer=True, example="torch.tensor([16, 16])")


def check_population(sizes: Tensor, dataset_size: int | None) -> None:
    """Refuse parts that cannot have been drawn without replacement.

    Args:
        sizes: Examples in each part.
        dataset_size: Examples they are drawn from; not known when ``None``.

    Raises:
        InputError: More examples than there are.
    """
    if dataset_size is not None and int(sizes.sum()) > dataset_size:
        raise InputError(
            "parts drawn without replacement cannot hold more examples than the training set",
            got=f"{int(sizes.sum())} examples, dataset_size={dataset_size}",
            fix="Leave dataset_size= out where batches are drawn with replacement.",
        )


def of_training_set(trace: Tensor, signal: Tensor, share: Tensor | float) -> tuple[Tensor, Tensor]:
    r"""Moments of the training set itself, from those of parts of it that share no example.

    Two examples drawn without replacement from N have the covariance :math:`-\Sigma/(N-1)`, and so have
    means of distinct parts, whatever their sizes. Moments of independent parts are linear in this covariance:
    instead of S they find :math:`S N/(N-1)`, and instead of :math:`|G|^2` they find
    :math:`|G|^2 - S/(N-1)`. Hence

    .. math:: S = S_{est}\,(1 - \tfrac1N), \qquad |G|^2 = |G|^2_{est} + \frac{S_{est}}{N}

    Args:
        trace: Trace of the noise, as if the parts were independent.
        signal: Squared gradient norm, as if they were.
        share: 1 / N; 0 where they are independent.

    Returns:
        Both of the N examples.

    Shapes:
        Any that broadcast.

    Source:
        Covariance of samples without replacement: Cochran 1977, Sampling Techniques, section 2.9.

    Example:
        >>> of_training_set(torch.tensor(10.0), torch.tensor(-1.0), 1 / 5)
        (tensor(8.), tensor(1.))
    """
    return trace * (1 - share), signal + trace * share


def moments_of_parts(
    sq_norms: Tensor, sizes: Tensor, shares: Tensor, batch_sq_norm: Tensor, processes: int = 1
) -> Tensor:
    """The moments of one source at one step, ``[moment, U]``.

    All are sums over parts, so that those of several processes may be averaged too.
    """
    b, w = sizes.to(sq_norms), shares.to(sq_norms)
    parts_noise, batch_noise = (w / b).sum(), (w.square() / b).sum() / processes
    parts_sq_norm = (w[:, None] * sq_norms).sum(0)
    return torch.stack(
        [
            parts_sq_norm,
            batch_sq_norm,
            parts_noise.expand_as(batch_sq_norm),
            batch_noise.expand_as(batch_sq_norm),
        ]
    )


def solve(moments: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Trace and squared gradient of each section ``[..., U]`` from averages over steps.

    Args:
        moments: Averages ``[..., moment, U]``, with zeros for the steps without this source.
        weight: Share of the steps with it, ``[...]``.
    """
    parts, batch = moments[..., PARTS, :], moments[..., BATCH, :]
    parts_noise, batch_noise = moments[..., PARTS_NOISE, :], moments[..., BATCH_NOISE, :]
    trace = (parts - batch) / (parts_noise - batch_noise)
    return trace, (batch - trace * batch_noise) / weight[..., None]


def sgd_noise_scale(
    lr: float,
    dataset_size: int,
    batch_size: int,
    momentum: float = 0.0,
    *,
    replacement: bool = True,
) -> float:
    r"""SGD's noise scale, the temperature of its stationary distribution for the summed loss.

    .. math:: g = \frac{\epsilon N}{2B(1-\mu)} \qquad\text{or, without replacement,}\qquad
              g = \frac{\epsilon}{2(1-\mu)}\,\frac{N-B}{B}\,\frac{N}{N-1}

    Args:
        lr: Learning rate for the mean loss.
        dataset_size: Examples in the training set, N.
        batch_size: Examples per step, B.
        momentum: Heavy-ball coefficient.
        replacement: Whether batches are drawn with replacement.

    Returns:
        The noise scale, in the convention ``E[dxi dxi^T] = 2 g F dt``; twice this in the papers that
        write ``g F dt``.

    Shapes:
        Plain numbers.

    Units:
        parameter^2 / loss * samples.

    Raises:
        InputError: Sizes below 1, a batch larger than the data set, or momentum outside [0, 1).

    Source:
        Smith & Le 2017, arXiv:1710.06451; momentum from Smith et al. 2017,
        arXiv:1711.00489.

    Example:
        >>> sgd_noise_scale(0.1, dataset_size=1000, batch_size=10)
        5.0
    """
    check_entries("lr", lr, least=0, scalar=True, example="0.1")
    check_entries("momentum", momentum, scalar=True, example="0.9")
    check_flag("replacement", replacement)
    for name, size in (("batch_size", batch_size), ("dataset_size", dataset_size)):
        check_entries(name, size, scalar=True, integer=name == "dataset_size", example="32")
    if dataset_size < 1 or batch_size < 1 or batch_size > dataset_size:
        raise InputError(
            "the batch must hold between 1 and dataset_size examples",
            got=f"batch_size={batch_size}, dataset_size={dataset_size}",
            fix="Pass the number of examples in the training set as dataset_size=.",
        )
    if not 0.0 <= momentum < 1.0:
        raise InputError("momentum must lie in [0, 1)", got=momentum, fix="Write momentum=0.9.")
    if replacement:
        ratio = dataset_size / batch_size
    elif dataset_size == 1:
        ratio = 0.0
    else:
        ratio = (dataset_size - batch_size) / batch_size * dataset_size / (dataset_size - 1)
    scale = lr * ratio / (2.0 * (1.0 - momentum))
    check_entries("the noise scale", scale)
    return scale
