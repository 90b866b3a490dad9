"""Yaida's second fluctuation-dissipation relation: the curvature and the anharmonicity that SGD's noise sees.

At a stationary state the mean loss has stopped falling: what each step gains along the gradient, it loses to
the curvature across it. The two sides are measured independently of each other. They agree up to third
derivatives of the loss, so their ratio tells how harmonic the loss is over one step, and the left side as
a function of the learning rate how harmonic it is over the whole stationary distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..collect.snapshot import Snapshot
from ..errors import InputError, UnsupportedError, check_flag
from ..record.readings import Quantity
from ..stats.arguments import check_entries, check_finite, check_sgd, check_together, number_sequence
from ..stats.estimators import Estimator, HalfRun, Reference
from .base import Estimate, Numbers, Observable, Sample
from .noise_curvature import moments_of
from .noise_resolution import not_measured, population, positive

__all__ = [
    "SecondFluctuationDissipation",
    "harmonicity",
    "second_fluctuation_dissipation",
    "shuffling_factor",
]

Array = npt.NDArray[np.float64]


class SecondRelation(NamedTuple):
    """Both sides of the relation over a window, in units of loss^2 / parameter^2."""

    left: Tensor
    right: Tensor


def second_fluctuation_dissipation(
    grad_sq_norm: Tensor,
    displacement_curvature: Tensor,
    lr: Tensor | float,
    *,
    momentum: Tensor | float = 0.0,
    dampening: Tensor | float = 0.0,
    nesterov: Tensor | bool = False,
    velocity_dot_gradient: Tensor | float = 0.0,
    weight_decay: Tensor | float = 0.0,
    weight_dot_gradient: Tensor | float = 0.0,
    weight_sq: Tensor | float = 0.0,
    velocity_dot_weight: Tensor | float = 0.0,
    displacement_sq: Tensor | float = 0.0,
) -> SecondRelation:
    r"""Both sides of FDR2 for ``torch.optim.SGD``, from averages over a stationary window.

    The function that the run minimises is ``f``, the loss and ``lambda |theta|^2 / 2``. A step subtracts
    ``u = eta d``, where ``d`` is made of the new gradient and torch's buffer b before the step,

    .. math::
        d = \alpha\,(g + \lambda\theta) + \beta\,b, \qquad
        (\alpha, \beta) = (1 - \nu,\ \mu) \quad\text{or, Nesterov,}\quad (1 + \mu,\ \mu^2)

    Given theta and b, the mean of g over batches is G, the gradient of the loss. So from
    :math:`\langle f(\theta - u)\rangle = \langle f(\theta)\rangle` to second order in u,

    .. math::
        \text{left} &= \langle\nabla f\cdot d\rangle = \alpha\,\langle|\nabla f|^2\rangle
                       + \beta\,\langle b\cdot\nabla f\rangle
                     = \frac{\langle u^T H u\rangle + \lambda\langle|u|^2\rangle}{2\eta} = \text{right} \\
        |\nabla f|^2 &= |G|^2 + 2\lambda\,\theta\cdot G + \lambda^2|\theta|^2, \qquad
        b\cdot\nabla f = b\cdot G + \lambda\,b\cdot\theta

    All at the weights before the step. Products with G may be taken with the gradient g of the step's own
    batch, except the square, which needs independent parts; but b is long, and a gradient of another, larger
    batch makes ``b . g`` far less noisy. H may come from any batch but the one that made the step. All of
    this needs batches drawn independently of one another (with replacement across steps): under epoch
    shuffling soft directions are colder, see ``shuffling_factor``, and the left side falls short of the
    right. Clipped steps are not of this form.

    Args:
        grad_sq_norm: Mean of an unbiased estimate of ``|G|^2``, loss only, as ``gradient_noise_scale`` or
            ``noise_curvature`` give it.
        displacement_curvature: Mean of ``u^T H u``, with the Hessian of the loss only.
        lr: Learning rate.
        momentum: Momentum coefficient.
        dampening: Dampening.
        nesterov: Whether the momentum is Nesterov's; dampening must be 0 then.
        velocity_dot_gradient: Mean of ``b . g``, b before the step, g loss only; with momentum.
        weight_decay: L2 coefficient lambda of the optimizer.
        weight_dot_gradient: Mean of ``theta . g``, both before the step, g loss only; with L2.
        weight_sq: Mean of ``|theta|^2`` before the step; with L2.
        velocity_dot_weight: Mean of ``b . theta``, both before the step; with momentum and L2.
        displacement_sq: Mean of ``|u|^2``; with L2.

    Returns:
        ``left`` and ``right``; they agree at a stationary state up to third derivatives of the loss.

    Shapes:
        Scalars, or one entry per parameter group ``[G]`` with ``u_G . (H u)_G`` for the curvature. The
        Hessian couples groups, so only their sum is a relation: ``(lr * left).sum()`` and
        ``(lr * right).sum()``.

    Units:
        loss^2 / parameter^2.

    Raises:
        InputError: A learning rate that is not positive, settings that SGD does not have, numbers that are
            not finite, shapes that do not go together, or Nesterov with dampening.

    Source:
        Yaida 2018, arXiv:1810.00004, the relation FDR2 and its form with momentum; the form for Nesterov and
        the terms of L2 are derived here and tested against exact stationary covariances.

    Example:
        >>> g2, uhu = torch.tensor(2.0), torch.tensor(0.04)
        >>> second_fluctuation_dissipation(g2, uhu, lr=0.01)
        SecondRelation(left=tensor(2.), right=tensor(2.))
    """
    averages = {
        "grad_sq_norm": grad_sq_norm,
        "displacement_curvature": displacement_curvature,
        "velocity_dot_gradient": velocity_dot_gradient,
        "weight_dot_gradient": weight_dot_gradient,
        "weight_sq": weight_sq,
        "velocity_dot_weight": velocity_dot_weight,
        "displacement_sq": displacement_sq,
    }
    check_finite(grad_sq_norm=grad_sq_norm, displacement_curvature=displacement_curvature)
    for name, value in averages.items():
        check_entries(name, value, least=0 if name in ("weight_sq", "displacement_sq") else -math.inf)
    check_sgd(lr, momentum, dampening, nesterov)
    check_entries("weight_decay", weight_decay, least=0, example="0.0")
    check_together(**averages, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    nesterov = torch.as_tensor(nesterov)
    fresh, carried = _weights_of(grad_sq_norm, momentum, dampening, nesterov)
    square = grad_sq_norm + 2 * weight_decay * weight_dot_gradient + weight_decay * weight_decay * weight_sq
    along_velocity = velocity_dot_gradient + weight_decay * velocity_dot_weight
    left = fresh * square + carried * along_velocity
    right = (displacement_curvature + weight_decay * displacement_sq) / (2 * lr)
    check_finite(left=torch.as_tensor(left), right=torch.as_tensor(right))
    return SecondRelation(left, right)


def _weights_of(
    like: Tensor, momentum: Tensor | float, dampening: Tensor | float, nesterov: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights alpha of the new gradient and beta of the old buffer in one step."""
    mu = torch.as_tensor(momentum, dtype=like.dtype)  # where() rounds floats to float32
    undamped = torch.as_tensor(1 - dampening, dtype=like.dtype)
    return torch.where(nesterov, 1 + mu, undamped), torch.where(nesterov, mu.square(), mu)


class Harmonicity(NamedTuple):
    """The left side of FDR2 as a function of the learning rate, fitted; see ``harmonicity``."""

    slope: float
    slope_error: float
    bend: float
    bend_error: float
    chi_square: float
    curvature: float
    curvature_error: float


def harmonicity(
    lrs: Sequence[float],
    lefts: Sequence[float],
    stderrs: Sequence[float] | None = None,
    *,
    noise_trace: float | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> Harmonicity:
    r"""Curvature under the noise, and the bend beyond it, from stationary states at several learning rates.

    The left side of FDR2 is fitted as :math:`a\,\eta + c\,\eta^2`. To first order noise of covariance C per
    step, filtered by momentum, spreads over a quadratic bowl, so

    .. math:: a = \tfrac12\,\kappa\,\mathrm{Tr}(HC), \qquad
              \kappa = \alpha^2 + \frac{(1-\nu)^2\beta^2}{1-\mu^2}, \qquad
              h_{\mathrm{eff}} = \frac{\mathrm{Tr}(HC)}{\mathrm{Tr}\,C} = \frac{2a}{\kappa\,\mathrm{Tr}\,C}

    with alpha and beta of ``second_fluctuation_dissipation``. A bend does not need anharmonicity: in a
    quadratic bowl with constant noise plain SGD has :math:`\sum_i \eta h_i C_i/(2 - \eta h_i)`, so that
    :math:`c/a = \frac12\mathrm{Tr}(H^2C)/\mathrm{Tr}(HC)`, between 0 and half of the largest curvature (with
    heavy-ball momentum :math:`(1-\nu)/(1+\mu)` times that). A bend outside this range means that H
    or C change over the stationary distribution.

    Args:
        lrs: Learning rates, two or more different ones.
        lefts: Left side at each.
        stderrs: Standard error of each. When ``None`` they are taken to be in proportion to the learning
            rate, and the errors of the result come from the scatter about the fit: ``nan`` for two points.
        noise_trace: Trace of C, the covariance of the batch gradient: that of one example over B.
        momentum: Momentum coefficient of the runs.
        dampening: Dampening.
        nesterov: Whether the momentum is Nesterov's.

    Returns:
        ``slope`` a and ``bend`` c with their errors, ``chi_square`` of the fit (``nan`` without
        ``stderrs``), ``curvature`` :math:`h_{\mathrm{eff}}` with the error from the slope (``nan`` without
        ``noise_trace``).

    Shapes:
        Sequences of one length -> numbers.

    Units:
        Slope loss^3 / parameter^4, bend loss^4 / parameter^6, curvature loss / parameter^2.

    Raises:
        InputError: Sequences of different lengths, fewer than two different learning rates, learning
            rates or errors that are not positive, momentum outside [0, 1), or Nesterov with dampening.

    Source:
        Yaida 2018, arXiv:1810.00004, section 3; the factor of momentum and the bend of a quadratic bowl are
        derived here.

    Example:
        >>> fit = harmonicity([0.01, 0.02, 0.04], [0.0102, 0.0208, 0.0432], noise_trace=0.5)
        >>> round(fit.slope, 6), round(fit.bend, 6), round(fit.curvature, 6)
        (1.0, 2.0, 4.0)
    """
    eta, left = number_sequence("lrs", lrs), number_sequence("lefts", lefts)
    error = eta if stderrs is None else number_sequence("stderrs", stderrs)
    if noise_trace is not None:
        check_entries("noise_trace", noise_trace, above=0, scalar=True, example="0.5")
    gain = _gain(momentum, dampening, nesterov)
    _check_runs(eta, left, error)
    # left / eta = a + c eta is the same least-squares problem
    (bend, slope), covariance = np.polyfit(eta, left / eta, 1, w=eta / error, cov="unscaled")
    chi_square = np.square((left - slope * eta - bend * eta**2) / error).sum()
    if stderrs is None:
        freedom = len(eta) - 2
        covariance, chi_square = covariance * (chi_square / freedom if freedom else np.nan), np.nan
    bend_error, slope_error = np.sqrt(np.diag(covariance))
    per_slope = np.nan if noise_trace is None else 2 / (gain * noise_trace)
    numbers = (slope, slope_error, bend, bend_error, chi_square, slope * per_slope, slope_error * per_slope)
    return Harmonicity(*map(float, numbers))


def _gain(momentum: float, dampening: float, nesterov: bool) -> float:
    """Variance of the direction d that noise of unit variance per step adds up to."""
    check_entries("momentum", momentum, scalar=True, example="0.9")
    if not 0 <= momentum < 1:
        raise InputError("momentum must lie in [0, 1)", got=momentum, fix="Write momentum=0.9.")
    check_entries("dampening", dampening, least=0, below=1, scalar=True, example="0.0")
    check_flag("nesterov", nesterov)
    if nesterov and dampening:
        raise InputError("Nesterov momentum has no dampening", got=dampening, fix="Write dampening=0.")
    fresh, carried = (1 + momentum, momentum**2) if nesterov else (1 - dampening, momentum)
    return fresh**2 + ((1 - dampening) * carried) ** 2 / (1 - momentum**2)


def _check_runs(eta: Array, left: Array, error: Array) -> None:
    """Refuse what no line can be fitted to."""
    if not eta.shape == left.shape == error.shape or eta.ndim != 1:
        raise InputError(
            "learning rates, left sides and errors must be sequences of one length",
            got=[list(values.shape) for values in (eta, left, error)],
            fix="Pass one left side and one standard error per learning rate.",
        )
    if len(set(eta.tolist())) < 2:
        raise InputError(
            "the fit needs two or more different learning rates",
            got=eta.tolist(),
            fix="Run to a stationary state at several, for instance 0.01, 0.02 and 0.05.",
        )
    if not ((eta > 0) & (error > 0)).all():
        raise InputError(
            "learning rates and standard errors must be positive",
            got=[eta.tolist(), error.tolist()],
            fix="Leave out runs without an error, or write stderrs=None.",
        )


_MOST_STEPS = 10**8
"""Steps of an epoch; beyond, the sums over them do not fit into memory."""
_SOFT = 1e-8
"""Curvature times learning rate times steps, below which the limit of small ones is the more exact."""


def shuffling_factor(curvature_times_lr: float, steps_per_epoch: int) -> float:
    r"""How much colder epoch shuffling leaves a direction than independent batches do, exactly.

    Variance of a weight under plain SGD with batches drawn without replacement within an epoch, over that
    with independent batches of the same variance. Noise of one epoch adds up to zero, so two of its M steps
    have the covariance :math:`-\sigma^2/(M-1)`. With :math:`a = 1 - \eta h`, and mean and variance
    :math:`m_k, v_k` of :math:`a^0 \dots a^{k-1}`, the noise of the first k steps of an epoch and the start
    of an epoch contribute

    .. math::
        S_k = \frac{\sigma^2 k}{M-1}\,\big[M v_k + (M - k)\,m_k^2\big], \qquad
        V_0 = \frac{\eta^2 S_M}{1 - a^{2M}}, \qquad
        V = \frac1M \sum_{k<M} \big(a^{2k}\,V_0 + \eta^2 S_k\big)

    against :math:`\eta^2\sigma^2/(1-a^2)`. For :math:`\eta h M \ll 1` the ratio is
    :math:`\eta h\,(M+1)/3`; it is 1 at :math:`\eta h = 1`, and beyond, where steps overshoot, a little more.

    Args:
        curvature_times_lr: Curvature times learning rate, :math:`\eta h`.
        steps_per_epoch: Steps per epoch M, the data set over the batch size.

    Returns:
        The ratio of variances.

    Shapes:
        Plain numbers.

    Units:
        1.

    Raises:
        InputError: ``curvature_times_lr`` outside (0, 2), where the direction is not stable, or fewer than
            two steps per epoch.

    Source:
        The effect: Kühn & Rosenow 2023, arXiv:2306.05300; the formula is derived here and tested against
        simulation.

    Example:
        >>> round(shuffling_factor(0.1, steps_per_epoch=10), 4)
        0.3026
    """
    check_entries("curvature_times_lr", curvature_times_lr, scalar=True, example="0.01")
    check_entries(
        "steps_per_epoch", steps_per_epoch, below=_MOST_STEPS, integer=True, scalar=True, example="100"
    )
    if not 0 < curvature_times_lr < 2:
        raise InputError(
            "curvature times learning rate must lie in (0, 2), where SGD is stable",
            got=curvature_times_lr,
            fix="Pass the product of the two, for instance 0.01.",
        )
    if steps_per_epoch < 2:
        raise InputError(
            "shuffling needs two or more steps per epoch",
            got=steps_per_epoch,
            fix="A single batch with all the data has no noise.",
        )
    if curvature_times_lr * steps_per_epoch < _SOFT:
        return curvature_times_lr * (steps_per_epoch + 1) / 3
    M, a = steps_per_epoch, 1 - curvature_times_lr
    k = np.arange(1, M + 1)
    lost = a ** (k - 1.0) - 1  # the variance of what is lost is exact where a is close to 1
    mean = np.cumsum(lost) / k
    variance = np.cumsum(lost**2) / k - mean**2
    S = k / (M - 1) * (M * variance + (M - k) * (1 + mean) ** 2)
    start = S[-1] / (1 - a ** (2 * M))
    shuffled = np.mean(a ** (2 * k - 2.0) * start + np.append(0, S[:-1]))
    return float(shuffled * (1 - a**2))


@dataclass(frozen=True, kw_only=True)
class SecondFluctuationDissipation(Observable):
    r"""Both sides of FDR2 for one step of ``torch.optim.SGD``, over the second half of the run.

    With the step u that the optimizer subtracts, and f the mean loss and the L2 term,

    .. math::
        \text{left} = \langle u\cdot\nabla f\rangle, \qquad
        \text{right} = \tfrac12\,\langle u^T\,\nabla^2 f\; u\rangle

    what a step gains along the gradient, and what it loses to the curvature: ``lr`` times the two sides of
    ``second_fluctuation_dissipation``. In this form groups with settings of their own add up, and the
    Hessian may couple them. Both sides come from three parts of the step's last micro-batch: with the steps
    :math:`u_i` that torch would make of each part's gradient, momentum, Nesterov and L2 included, left is
    the mean of :math:`u_i\cdot\nabla f_l` and right follows from :math:`u_i^T\nabla^2 f_j\,u_l` of distinct
    parts and, for the noise, of i = l, scaled from a part to the whole batch. Needs the loss, read off its
    graph or given as ``Monitor(loss_fn=...)``; a summed loss is read as the mean loss at as many times the
    learning rate.

    The relation takes the gradient's mean at given weights for the gradient of the loss, which only batches
    drawn independently of each other have. In a shuffled epoch the weights have moved along the gradients of
    the examples that were seen, and so against those that are left for this batch: parts of it do not show
    the gradient of the loss. It is not that of clipped steps, and batch norm, which normalises within each
    part, makes f the loss of batches of that size.

    Args:
        schedule: When it is sampled and recorded; every 100 steps by default.
        sampling: When it is sampled in between. The left side scatters: its error falls with the number of
            samples.
        estimator: Average over steps; Yaida's half-running average by default.
        allow_shuffled: Also measure what can be where batches are drawn without replacement: the right side
            and the curvature, corrected for examples that are never drawn twice where their number is known,
            and what shuffling makes of a direction of that curvature. There is no left side and no ratio.

    Units:
        Loss; the ratio has none.

    Source:
        Yaida 2018, arXiv:1810.00004, the relation FDR2 and its form with momentum; Nesterov, L2 and the
        estimator from distinct parts are derived here. Shuffling: arXiv:2306.05300.

    Shapes:
        Scalars.

    Example:
        >>> SecondFluctuationDissipation(schedule=200, sampling=20).due(400)
        True
    """

    group: ClassVar[str] = "fdr2"
    needs: ClassVar[frozenset[str]] = frozenset({"step_curvature"})
    default_estimator: ClassVar[type[Estimator]] = HalfRun
    of_batch: ClassVar[bool] = True
    restarts: ClassVar[frozenset[str]] = frozenset({"settings", "parameters"})
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "left": Quantity(
            "loss",
            "Left side, what one step gains along the gradient.",
            formula=(
                "`<u . grad f>`, step `u` and gradient from distinct parts of the batch, `f` with the L2 term"
            ),
            cost="about 9 training steps: 3 gradients and 6 Hessian products of a third of the batch each",
            source="arXiv:1810.00004, FDR2",
            tells=(
                "what one step gains along the gradient; `lr` times the left side that `harmonicity` takes"
            ),
        ),
        "right": Quantity(
            "loss",
            "Right side, what one step loses to the curvature.",
            formula="`<u^T H u> / 2`, `H` of a third part, noise scaled from a part to the batch",
            cost="with left",
            source="arXiv:1810.00004, FDR2",
            tells="what one step loses to the curvature",
        ),
        "ratio": Quantity(
            "1",
            "Left over right: 1 at a stationary state of a harmonic loss.",
            formula="left / right",
            cost="with left",
            source="arXiv:1810.00004, FDR2; Nesterov and L2 are added",
            tells=(
                "1 within its error: the mean loss has stopped falling, and is harmonic over one step; "
                "above 1 the loss falls still"
            ),
            act=(
                "above 1: go on; 1: lower the learning rate or stop; below 1: clipping, or a loss that is "
                "not harmonic"
            ),
        ),
        "curvature": Quantity(
            "loss/parameter^2",
            "Mean curvature in the directions of the noise, L2 included.",
            formula="`Tr(H C) / Tr(C)`, `C` the covariance of the step, `H` with the L2 term",
            cost="with left",
            source="arXiv:1810.00004",
            tells="curvature of the directions that the noise fills, `h_eff`",
            act="relaxation takes `(1 - mu) / (eta h_eff)` steps: windows should be longer",
        ),
        "shuffling": Quantity(
            "1",
            "How much colder shuffled epochs leave a direction of that curvature.",
            formula=(
                "variance under shuffled over that under independent batches, at `eta h_eff / (1 - mu)` "
                "and `M` steps per epoch"
            ),
            cost="none",
            source="arXiv:2306.05300; the formula is derived here",
            tells=(
                "only with `allow_shuffled=True`, batches drawn without replacement and a data set of "
                "known size; far below 1: the relation cannot hold"
            ),
            act="draw with replacement to measure it",
        ),
    }

    allow_shuffled: bool = False

    def __post_init__(self) -> None:
        """Check the setting."""
        super().__post_init__()
        check_flag("allow_shuffled", self.allow_shuffled)

    def statistics(self, snapshot: Snapshot) -> Sample:
        """Both sides at this step, and what the curvature under the noise is made of."""
        if _shuffled(snapshot) and not self.allow_shuffled:
            raise UnsupportedError(
                "the second fluctuation-dissipation relation needs batches drawn independently of each "
                "other, and these are drawn without replacement",
                fix="Draw with RandomSampler(dataset, replacement=True), or write allow_shuffled=True.",
            )
        parts = snapshot.step_curvature
        moments = moments_of(parts, parts.gram, snapshot)
        steps = moments_of(parts, parts.step_gram, snapshot)
        noise, share = moments["noise_curvature"], population(snapshot)[0]
        # the variance of a batch's gradient over that of an example's; none is left of the whole set's
        step_noise = (parts.noise_share - share) / (1 - share) if share else parts.noise_share
        statistics = {
            "right": (moments["gradient_curvature"] + step_noise * noise) / 2,
            "noise_curvature": noise,
            "noise": moments["trace"],
            "step_noise": steps["trace"],
            **{name: parts.weight.new_full((), value) for name, value in _epoch(snapshot).items()},
        }
        if not _shuffled(snapshot):
            statistics["left"] = moments["grad_sq_norm"]
        return Sample(statistics, parts.weight)

    def note(self, snapshot: Snapshot) -> str:
        """How batches are drawn, and from what."""
        if not snapshot.has("replacement"):
            text = "holds only for batches drawn with replacement, and how these are drawn is not known"
        elif snapshot.replacement:
            text = "batches drawn with replacement"
        else:
            text = (
                "batches drawn without replacement: soft directions are colder than the relation takes them"
            )
        return f"{text}; {population(snapshot)[1]}"

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Both sides and their ratio, the curvature, and what shuffling makes of it."""
        del reference
        right, noise = now["right"], now["noise_curvature"]
        still = "the noise of the steps is not above 0"
        readings: dict[str, Tensor | Estimate] = {
            "right": right,
            "curvature": positive(noise / now["step_noise"], now["step_noise"], still),
        }
        note = ""
        if "per_rate" in now:
            rate = float(noise[0] / now["noise"][0] * now["per_rate"][0])
            epoch = float(now["steps_per_epoch"][0])
            note = f"M = {epoch:.4g} steps per epoch, eta h_eff M / (1 - mu) = {rate * epoch:.3g}"
            if "left" not in now and 0 < rate < 2 and round(epoch) > 1:
                readings["shuffling"] = Estimate(shuffling_factor(rate, round(epoch)), math.nan)
        if "left" not in now:
            left, ratio = not_measured(_SHUFFLED), not_measured(_SHUFFLED)
        else:
            left = Estimate(now["left"])
            quotient = torch.where(right > 0, now["left"] / right, torch.nan)
            ratio = positive(quotient, right, "the right side is not above 0")
        note = "; ".join(filter(None, (note, ratio.note)))
        return {"left": left, **readings, "ratio": ratio._replace(note=note)}


_SHUFFLED = "the weights know the batches of this epoch so far, and with them the examples that are left"


def _shuffled(snapshot: Snapshot) -> bool:
    """Whether batches are known to be drawn without replacement."""
    return snapshot.has("replacement") and not snapshot.replacement


def _epoch(snapshot: Snapshot) -> dict[str, float]:
    """What compares the curvature under the noise with an epoch; nothing where groups move differently.

    A step has ``eta alpha h`` for its noise-weighted curvature, and a direction relaxes at the rate
    ``eta (1 - nu) h / (1 - mu)`` per step.
    """
    first = snapshot.groups[0]
    forms = {(group.momentum, group.nesterov) for group in snapshot.groups}
    if len(forms) > 1 or not snapshot.has("dataset_size"):
        return {}
    return {
        "per_rate": 1 / ((1 - first.momentum) * (1 + first.momentum * first.nesterov)),
        "steps_per_epoch": snapshot.dataset_size / snapshot.batch_size,
    }
