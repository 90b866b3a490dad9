"""Gradient noise as the curvature sees it: what it costs one step, and the batch that makes up for it.

``B_simple`` counts the noise of every direction alike. A step suffers from noise in stiff directions and
hardly in flat ones: with the Hessian H as the metric, ``B_noise = Tr(H Sigma) / (G^T H G)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..collect.snapshot import Curvature, Snapshot
from ..errors import InputError
from ..record.readings import Quantity
from ..stats.arguments import check_entries, check_finite, check_tensors, check_together
from ..stats.estimators import Estimator, Reference, Window
from ..stats.noise_scale import check_population, check_sizes, of_training_set
from .base import Numbers, Observable, Sample
from .noise_resolution import population, positive, resolved_scale

__all__ = [
    "NoiseCurvature",
    "best_step",
    "noise_curvature",
]


def noise_curvature(
    gram: Tensor, forms: Tensor, sizes: Tensor, *, dataset_size: int | None = None
) -> dict[str, Tensor]:
    r"""Unbiased noise and signal from the parts of one batch, plain and weighted with the curvature.

    Parts are independent, so a product of distinct parts has the product of the means as its mean. With
    the Hessian from a part other than both gradients,

    .. math::
        U = \langle g_i^T H_j\, g_i \rangle_{i \ne j} &\to G^T H G + \beta\,\mathrm{Tr}(H\Sigma) \\
        V = \langle g_i^T H_j\, g_l \rangle_{i,j,l\ \text{distinct}} &\to G^T H G, \qquad
        \beta = \frac1k \sum_i \frac1{b_i}

    and hence ``Tr(H Sigma) = (U - V) / beta``; without the Hessians the same gives ``Tr Sigma`` and
    ``|G|^2``. A Hessian from the same part would add the correlation of curvature and gradient.

    Examples that are drawn without replacement from N repel each other. With a third product, in which the
    Hessian and one gradient are of the same part,

    .. math::
        W = \langle g_j^T H_j\, g_l \rangle_{j \ne l}, \qquad
        \mathrm{Tr}(H\Sigma) = \Big(1 - \frac1N\Big) \frac{U - V}{\beta}, \qquad
        G^T H G = V + \frac{(U - V) + 2 (W - V)}{\beta N}

    are those of the N examples, up to third central moments of gradients and Hessian over N, and over
    :math:`N^2`; the plain ones are corrected as by ``of_training_set``, exactly.

    Args:
        gram: ``g_i . g_l`` of the gradients of the parts' mean losses.
        forms: ``g_i^T H_j g_l`` at ``[j, i, l]``; entries with ``l = j`` are not used, and those with
            ``i = j`` with ``dataset_size`` only.
        sizes: Examples in each part.
        dataset_size: Examples in the training set, N, where the parts are drawn from it without replacement:
            no two of their examples are the same one.

    Returns:
        ``noise_curvature`` (:math:`\mathrm{Tr}(H\Sigma)`), ``gradient_curvature`` (:math:`G^T H G`),
        ``trace`` (:math:`\mathrm{Tr}\Sigma`), ``grad_sq_norm`` (:math:`|G|^2`). Average each over steps
        before dividing: ``noise_curvature / gradient_curvature`` is ``B_noise``, ``trace / grad_sq_norm``
        is ``B_simple``, ``noise_curvature / trace`` the curvature ``h_eff`` that the noise feels. Any of
        them can be negative on one step.

    Shapes:
        gram ``[..., k, k]``, forms ``[..., k, k, k]``, sizes ``[k]`` -> ``[...]``.

    Units:
        loss^3 / parameter^4 with the curvature, loss^2 / parameter^2 without; the noise times one example.

    Raises:
        InputError: Fewer than three parts, an empty part, shapes that do not fit, or more examples in the
            parts than in the training set.

    Source:
        B_noise: McCandlish et al. 2018, arXiv:1812.06162, section 2.2; the estimator from distinct parts and
        its correction are derived here and tested against populations whose Hessians vary.

    Example:
        >>> g, h = torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 2.0)  # one parameter, parts of one
        >>> gram = torch.outer(g, g)
        >>> moments = noise_curvature(gram, h[:, None, None] * gram, torch.ones(3))
        >>> round(moments["noise_curvature"].item(), 6), round(moments["trace"].item(), 6)
        (2.0, 1.0)
    """
    if dataset_size is not None:
        check_entries("dataset_size", dataset_size, least=1, integer=True, scalar=True, example="50_000")
    check_tensors(gram=gram, forms=forms)
    check_sizes(sizes)
    moments = noise_of_parts(gram, forms, sizes, dataset_size)
    check_finite(**moments)  # entries of forms that are not used may be anything
    return moments


def noise_of_parts(
    gram: Tensor, forms: Tensor, sizes: Tensor, dataset_size: int | None = None
) -> dict[str, Tensor]:
    """The formula of :func:`noise_curvature`.

    Args:
        gram: As there.
        forms: As there.
        sizes: As there.
        dataset_size: As there.

    Raises:
        InputError: As there, without a look at the numbers.
    """
    k = len(sizes)
    if k < 3:
        raise InputError(
            "Hessians and gradients of distinct parts need at least three parts",
            got=k,
            fix="Write parts=3 or more.",
        )
    if bool((sizes < 1).any()):
        raise InputError("every part must hold an example", got=sizes.tolist(), fix="Drop empty parts.")
    if gram.shape[-2:] != (k, k) or forms.shape[-3:] != (k, k, k):
        raise InputError(
            f"products of {k} parts must have shapes [{k}, {k}] and [{k}, {k}, {k}]",
            got=f"{list(gram.shape)} and {list(forms.shape)}",
            fix="Pass what split_curvature returns.",
        )
    check_population(sizes, dataset_size)
    same = torch.eye(k, dtype=torch.bool, device=gram.device)
    other = ~same[:, :, None] & ~same[:, None, :]  # j != i and j != l
    beta = sizes.double().reciprocal().mean().item()
    plain, signal = gram[..., same].mean(-1), gram[..., ~same].mean(-1)
    curved, curved_signal = forms[..., other & same].mean(-1), forms[..., other & ~same].mean(-1)
    noise, trace = (curved - curved_signal) / beta, (plain - signal) / beta
    if dataset_size is not None:
        same_part = forms[..., same[:, :, None] & ~same[:, None, :]].mean(-1)  # j = i and j != l
        correlated = 2 * (same_part - curved_signal) / beta / dataset_size
        noise, curved_signal = of_training_set(noise, curved_signal + correlated, 1 / dataset_size)
        trace, signal = of_training_set(trace, signal, 1 / dataset_size)
    return {
        "noise_curvature": noise,
        "gradient_curvature": curved_signal,
        "trace": trace,
        "grad_sq_norm": signal,
    }


def moments_of(parts: Curvature, gram: Tensor, snapshot: Snapshot) -> dict[str, Tensor]:
    """Moments of the training set, where its size and how batches are drawn from it are known.

    Args:
        parts: Products of the parts of a batch.
        gram: Those without a Hessian.
        snapshot: The moment they were taken at.
    """
    shared_out = bool(population(snapshot)[0])
    size = snapshot.dataset_size if shared_out else None
    return noise_of_parts(gram, parts.forms, parts.sizes, size)


def curvature_of_noise(gram: Tensor, forms: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """The name that :func:`noise_curvature` had; it goes with the next release."""
    message = "curvature_of_noise(...) is now called noise_curvature(...)"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return noise_curvature(gram, forms, sizes)


class BestStep(NamedTuple):
    """The learning rate that lowers the expected loss most in one step, and by how much."""

    lr: Tensor
    decrease: Tensor


def best_step(
    grad_sq_norm: Tensor, gradient_curvature: Tensor, noise_curvature: Tensor, batch_size: float
) -> BestStep:
    r"""The best single step of SGD in a quadratic expansion of the loss.

    One step lowers the mean loss by :math:`\epsilon|G|^2 - \frac{\epsilon^2}{2}\,(G^THG +
    \mathrm{Tr}(H\Sigma)/B)`, which is largest at

    .. math:: \epsilon = \frac{|G|^2}{G^THG + \mathrm{Tr}(H\Sigma)/B} = \frac{\epsilon_\max}{1 + B_{noise}/B},
              \qquad \text{decrease} = \frac{\epsilon}{2}\,|G|^2

    Args:
        grad_sq_norm: :math:`|G|^2`.
        gradient_curvature: :math:`G^THG`.
        noise_curvature: :math:`\mathrm{Tr}(H\Sigma)`.
        batch_size: Examples per step, B.

    Returns:
        ``lr`` and ``decrease``; ``nan`` where the curvature along the step is not positive.

    Shapes:
        Any, element by element.

    Units:
        parameter^2 / loss; loss.

    Raises:
        InputError: A batch size that is not positive.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, section 2.2.

    Example:
        >>> unit = torch.tensor(1.0)          # B_noise = B: half of the step, half of the gain
        >>> best_step(unit, unit, 8 * unit, batch_size=8)
        BestStep(lr=tensor(0.5000), decrease=tensor(0.2500))
    """
    check_entries("batch_size", batch_size, above=0, scalar=True, example="32")
    moments = {
        "grad_sq_norm": grad_sq_norm,
        "gradient_curvature": gradient_curvature,
        "noise_curvature": noise_curvature,
    }
    check_finite(**moments)
    check_together(**moments)
    return step_of_moments(grad_sq_norm, gradient_curvature, noise_curvature, batch_size)


def step_of_moments(
    grad_sq_norm: Tensor, gradient_curvature: Tensor, noise_curvature: Tensor, batch_size: float
) -> BestStep:
    """The formula of :func:`best_step`.

    Args:
        grad_sq_norm: As there.
        gradient_curvature: As there.
        noise_curvature: As there.
        batch_size: As there.
    """
    curvature = gradient_curvature + noise_curvature / batch_size
    lr = torch.where(curvature > 0, grad_sq_norm / curvature, torch.nan)
    return BestStep(lr, lr * grad_sq_norm / 2)


@dataclass(frozen=True, kw_only=True)
class NoiseCurvature(Observable):
    """B_noise, the curvature that the gradient noise feels, and the best learning rate for one step.

    From three parts of the step's last micro-batch, each with a gradient and a Hessian of its own, so that
    every product is one of independent parts. Needs the loss, read off its graph or given as
    ``Monitor(loss_fn=...)``. The loss alone: neither the weight decay of the optimizer nor its momentum or
    preconditioner is part of it, and so it works under every optimizer. Batch norm normalises within each
    part.

    B_noise is a ratio of averages with Fieller's interval. Where the curvature along the gradient is within
    two standard errors of zero it is not resolved: the reading is ``nan``, and its lower bound stands.

    Args:
        schedule: When it is sampled and recorded; every 100 steps by default.
        sampling: When it is sampled in between.
        estimator: Average over steps; the last 1,000 steps by default.

    Units:
        See ``quantities``. All are those of the mean loss.

    Source:
        B_noise and the best step: McCandlish et al. 2018, arXiv:1812.06162, section 2.2.

    Shapes:
        Scalars.

    Example:
        >>> NoiseCurvature(schedule=20, estimator=Window(500)).group
        'noise_curvature'
    """

    group: ClassVar[str] = "noise_curvature"
    needs: ClassVar[frozenset[str]] = frozenset({"curvature"})
    default_estimator: ClassVar[type[Estimator]] = Window
    of_batch: ClassVar[bool] = True
    restarts: ClassVar[frozenset[str]] = frozenset({"parameters"})
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "scale": Quantity(
            "samples",
            "B_noise, the batch at which noise and signal cost one step alike.",
            formula=(
                "`B_noise = Tr(H Sigma) / (G^T H G)`, ratio of averages from distinct parts of the batch"
            ),
            cost="about 8 training steps: 3 gradients and 6 Hessian products of a third of the batch each",
            source="arXiv:1812.06162, section 2.2",
            tells="the batch at which noise costs one step as much as the curvature along the gradient",
            act="as `B_simple`, which counts flat directions alike",
        ),
        "scale_lower_bound": Quantity(
            "samples",
            "Lower end of the 95 % interval of B_noise.",
            formula="lower end of Fieller's 95 % interval",
            cost="with scale",
            source="Fieller 1954",
            tells="what is known of `B_noise` where it is not resolved",
        ),
        "curvature": Quantity(
            "loss/parameter^2",
            "Mean curvature in the directions of the noise.",
            formula="`Tr(H Sigma) / Tr(Sigma)`",
            cost="with scale",
            source="arXiv:1812.06162, section 2.2",
            tells="mean curvature in the directions of the noise",
            act="grows with the learning rate held: the run moves into a sharper region",
        ),
        "best_lr": Quantity(
            "parameter^2/loss",
            "Learning rate that lowers the loss most in one step of SGD.",
            formula="`‖G‖² / (G^T H G + Tr(H Sigma) / B)`, mean loss",
            cost="with scale",
            source="arXiv:1812.06162, section 2.2",
            tells=(
                "the learning rate of the best single step of plain SGD; half of its own rate where "
                "plain SGD is stationary"
            ),
            act="far above the rate: raise it; at half of it: settled, lower it to go on",
        ),
    }

    def statistics(self, snapshot: Snapshot) -> Sample:
        """Noise and signal of this step, plain and weighted with the curvature."""
        parts = snapshot.curvature
        moments = moments_of(parts, parts.gram, snapshot)
        moments["batch_size"] = parts.weight.new_full((), snapshot.batch_size)
        return Sample(moments, parts.weight)

    def note(self, snapshot: Snapshot) -> str:
        """The parts, the loss, and whose noise it is."""
        sizes = snapshot.curvature.sizes
        return (
            f"{len(sizes)} parts of {int(sizes.min())} or more examples, "
            f"loss_reduction={snapshot.loss_reduction}; {population(snapshot)[1]}"
        )

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Ratios of the averages."""
        noise, signal = now["noise_curvature"], now["gradient_curvature"]
        batch = float(now["batch_size"][0])
        best = step_of_moments(now["grad_sq_norm"], signal, noise, batch).lr
        of = "the curvature along the gradient"
        return {
            **resolved_scale(noise, signal, reference.weights, batch, of=of),
            "curvature": positive(noise / now["trace"], now["trace"], "no noise is seen in the gradient"),
            "best_lr": positive(best, best, "the gradient or the curvature is below its own noise"),
        }
