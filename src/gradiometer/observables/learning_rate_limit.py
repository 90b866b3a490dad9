"""The learning rate at which full-batch descent stops being stable, from the top eigenvalue of the curvature.

Beyond it the stiffest direction of a quadratic loss grows from step to step, changing its sign each time. A
network need not diverge there: it moves to flatter weights, or hovers at the limit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..autodiff.empirical_ntk import checked_weights
from ..autodiff.functional import check_model, examples
from ..autodiff.products import LossFn
from ..autodiff.spectrum import TOLERANCE, Curvature, CurvatureKind
from ..autodiff.untouched import as_training
from ..collect.snapshot import Snapshot
from ..errors import (
    InputError,
    MeasurementWarning,
    SampleSkippedError,
    UnsupportedError,
    check_callable,
    check_choice,
    check_flag,
    check_number,
)
from ..optimizers import ParameterStep
from ..record.readings import Quantity, Reading
from ..stats.arguments import check_entries
from ..stats.estimators import Reference
from .base import Estimate, Numbers, Observable
from .rate_trial import HALVINGS, STEPS, Steps, rate_that_trains
from .schedules import Schedule

__all__ = [
    "LearningRateLimit",
    "stability_limit",
    "suggest_learning_rate",
]


def stability_limit(momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> float:
    r"""Learning rate times curvature at which ``torch.optim.SGD`` becomes unstable.

    .. math:: \eta h < \frac{2(1+\mu)}{1-\nu}, \qquad
              \text{Nesterov } \eta h < \frac{2(1+\mu)}{1+2\mu}

    There the recursion of weight and momentum has the eigenvalue -1. With momentum and dampening
    :math:`\beta_1` it is the limit of Adam whose second moment stands still, 38 at 0.9.

    Args:
        momentum: Coefficient :math:`\mu`.
        dampening: Coefficient :math:`\nu`; without momentum torch makes no use of it.
        nesterov: Whether the momentum is Nesterov's.

    Returns:
        The limit of the product.

    Shapes:
        Scalars.

    Units:
        None.

    Raises:
        InputError: A coefficient below 0 or not below 1, or Nesterov's momentum with dampening or without
            momentum.

    Source:
        Cohen et al. 2021, arXiv:2103.00065, appendix B; Adam: Cohen et al. 2022, arXiv:2207.14484. Dampening
        is derived here.

    Example:
        >>> stability_limit(), round(stability_limit(0.9), 3), round(stability_limit(0.9, 0.9), 3)
        (2.0, 3.8, 38.0)
    """
    check_entries("momentum", momentum, scalar=True, example="0.9")
    check_entries("dampening", dampening, scalar=True, example="0.0")
    check_flag("nesterov", nesterov)
    if not (0 <= momentum < 1 and 0 <= dampening < 1):
        raise InputError(
            "momentum and dampening must be at least 0 and below 1",
            got=f"momentum={momentum}, dampening={dampening}",
            fix="Write what the optimizer is given: momentum=0.9.",
        )
    if nesterov and (momentum == 0 or dampening != 0):
        raise InputError(
            "Nesterov's momentum needs momentum and no dampening",
            got=f"momentum={momentum}, dampening={dampening}",
            fix="Write momentum=0.9, nesterov=True.",
        )
    if nesterov:
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    return 2 * (1 + momentum) / (1 - dampening) if momentum else 2.0


class LearningRateSuggestion(NamedTuple):
    """What ``suggest_learning_rate`` returns.

    Args:
        suggestion: The fraction asked for of the limit, or less; ``nan`` where no rate was seen to train.
        limit: Learning rate at which full-batch descent becomes unstable; infinite where no curvature is
            positive, ``nan`` where the eigenvalue is not converged.
        top_eigenvalue: Largest eigenvalue of the curvature; a lower bound where it is not converged.
        residual: Some eigenvalue lies within this of it; converged where it is below 1 % of it.
    """

    suggestion: float
    limit: float
    top_eigenvalue: float
    residual: float


def suggest_learning_rate(
    model: nn.Module,
    x: Any,
    y: Any = None,
    *,
    loss_fn: LossFn | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    weights: Mapping[str, float | Tensor] | None = None,
    fraction: float = 0.5,
    curvature: CurvatureKind | None = None,
    max_products: int = 100,
) -> LearningRateSuggestion:
    r"""A learning rate below the stability limit of ``torch.optim.SGD`` on this batch, at these weights.

    .. math:: \eta = \text{fraction}\cdot\frac{c}{\lambda_\max\big(W^{1/2}(H + \lambda)\,W^{1/2}\big)}

    with c from :func:`stability_limit`. It is exact for full-batch descent on a quadratic loss. Elsewhere it
    holds at these weights only: a network whose gradient is small at first is flat there, and steep once it
    learns. So the rate is tried, in 64 steps of an eighth of the batch each, and then smaller ones down to an
    eighth of it. Where none lowers the loss by a tenth, or without a loss, nothing is suggested and a warning
    says why. Adam's rate has another unit; see ``weights``.

    The loss is that of training: each module is in the mode it is in, and batch norm in train mode normalises
    with this batch. Takes mostly 10 to 20 products, each about two backward passes of the batch, and holds
    twelve copies of the parameters and some more in the host's memory, in float64; the trial mostly 9 passes.

    Without a loss it is the largest eigenvalue of the full tangent kernel over N: the curvature of half the
    squared error :math:`\sum_a |f(x_a) - y_a|^2 / 2N` of the linearised model, whatever the targets. Softmax
    cross entropy has half of that curvature at most, and so twice this limit at least.

    Args:
        model: Any module; it is not changed.
        x: Inputs: a tensor, or a nest of tensors with the examples first. The largest
            curvature of few examples is larger than that of many, and their limit lower.
        y: Targets: anything that ``loss_fn`` takes.
        loss_fn: Maps the model's outputs and ``y`` to the mean loss, as in training; the kernel's limit when
            ``None``.
        momentum: The optimizer's momentum.
        dampening: The optimizer's dampening.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: The optimizer's L2 coefficient, for all parameters.
        weights: Learning rates relative to the one that is suggested, by parameter name, each a number or a
            tensor of the parameter's shape; 1 for names that are missing.
        fraction: Which part of the limit; at most so much is suggested.
        curvature: ``"hessian"``, or ``"gauss_newton"``, the Hessian of the linearised model's loss; by
            default the former where the loss is given. With ``nn.MSELoss`` the latter is 2 / O times the
            kernel's.
        max_products: When to give up.

    Returns:
        Suggestion, limit, the eigenvalue and its residual.

    Shapes:
        Scalars.

    Units:
        parameter^2 / loss; the eigenvalue loss / parameter^2.

    Raises:
        InputError: A fraction outside (0, 1], a negative or infinite weight or decay, unknown names, an
            impossible momentum, an unknown curvature, a Hessian without a loss, outputs that are no tensor
            where there is no loss, a loss that is not one number, an empty or non-finite batch, or a
            curvature that is not finite.
        UnsupportedError: If an operation has no second derivative.

    Source:
        Lee et al. 2019, arXiv:1902.06720, for the kernel; Cohen et al. 2021, arXiv:2103.00065, for the
        Hessian.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)                   # H = x^T x / N
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> found = suggest_learning_rate(net, x, loss_fn=lambda out, y: out.square().mean() / 2)
        >>> round(found.limit, 5), round(found.suggestion, 5)
        (1.0, 0.5)
    """
    check_model(model)
    _check_loss(loss_fn, curvature)
    _check_numbers(fraction, weight_decay, max_products)
    kind: CurvatureKind = curvature or ("gauss_newton" if loss_fn is None else "hessian")
    limit = stability_limit(momentum, dampening, nesterov)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    checked = checked_weights(weights, parameters)
    gains = [checked.get(name, 1.0) for name in parameters]
    with as_training(model):
        metric = Curvature(
            model,
            loss_fn or _half_squares,
            kind=kind,
            gains=gains,
            shifts=[weight_decay * gain for gain in gains],
        )
        top = metric.top(x, y, max_products)
    if math.isnan(top.value):
        raise InputError(
            "the curvature is not finite at these weights",
            fix="Look for NaN or infinity in weights, inputs and loss.",
        )
    if top.residual > TOLERANCE * abs(top.value):
        rate = math.nan
    else:
        rate = limit / top.value if top.value > 0 else math.inf
    suggestion = math.nan
    if loss_fn is None:
        why = "without a loss none can be tried: pass y and loss_fn="
    elif not math.isfinite(rate):
        why = "no curvature is positive here" if rate > 0 else "the largest curvature was not found"
    else:
        steps = Steps(momentum, dampening, nesterov, weight_decay, gains)
        highest = max(fraction, 0.5) * rate
        with as_training(model):
            trained = rate_that_trains(model, loss_fn, x, y, highest, steps)
        suggestion = trained if math.isnan(trained) else min(fraction * rate, trained)
        why = (
            f"at rates from {highest / 2**HALVINGS:.2g} to {highest:.2g}, below the limit of the curvature "
            f"here, the loss of this batch did not fall steadily by a tenth in {STEPS} steps"
        )
    if math.isnan(suggestion):
        warnings.warn(f"no learning rate is suggested: {why}.", MeasurementWarning, stacklevel=2)
    return LearningRateSuggestion(suggestion, rate, top.value, top.residual)


def _half_squares(outputs: Any, targets: Any) -> Tensor:
    """Half the mean squared error from targets of 0: the curvature does not depend on them."""
    del targets
    if not isinstance(outputs, Tensor) or outputs.ndim == 0:
        raise InputError(
            "without a loss the model must return one tensor of outputs [N, ...]",
            got=type(outputs).__name__,
            fix="Pass loss_fn=, which maps outputs and targets to the loss.",
        )
    return outputs.square().sum() / (2 * len(outputs))


def _check_loss(loss_fn: Any, curvature: Any) -> None:
    check_callable("loss_fn", loss_fn, "(outputs, targets) -> loss", "F.cross_entropy", optional=True)
    if curvature is not None:
        check_choice("curvature", curvature, get_args(CurvatureKind))
    if loss_fn is None and curvature == "hessian":
        raise InputError("the Hessian is that of a loss", fix="Write loss_fn=F.cross_entropy, and pass y.")


def _check_numbers(fraction: float, weight_decay: float, max_products: int) -> None:
    check_number("fraction", fraction, example="0.5")
    if not 0 < fraction <= 1:
        raise InputError("fraction must lie above 0 and not above 1", got=fraction, fix="Write fraction=0.5.")
    check_entries("weight_decay", weight_decay, least=0, scalar=True, example="0.0")
    check_number("max_products", max_products, least=1, integer=True, example="100")


EDGE = 0.9
"""A learning rate above this share of its limit counts as at the edge of stability."""


def _over_limit_says(reading: Reading, others: Mapping[str, Reading]) -> str:
    value, error = reading.number, reading.stderr if math.isfinite(reading.stderr) else 0.0
    if not reading.resolved:
        return f"not resolved, at least {reading.low:.3g}: the largest curvature was not found."
    if value <= 0:
        return "no curvature is positive on the probe, so nothing limits the learning rate there."
    if value - 2 * error > 1:
        return (
            f"beyond the edge of stability: unless the loss falls all the same, divide the learning rate by "
            f"{value / EDGE:.2g}."
        )
    if value + 2 * error < EDGE:
        return (
            "stable on the probe at these weights. Curvature mostly rises to meet a larger learning rate, so "
            "this does not say that one would train."
        )
    return "at the edge of stability: the learning rate sets the curvature. Lower it if the loss swings."


@dataclass(frozen=True, kw_only=True)
class LearningRateLimit(Observable):
    r"""The learning rate over the limit of stability, for the optimizer's own steps.

    .. math:: \frac{\eta}{\eta_{limit}} = \lambda_\max\Big(C^{1/2}(H + \Lambda)\,C^{1/2}
              + \frac{\eta\Lambda'}{2}\Big), \qquad C = \frac{\eta P}{c}

    with the Hessian of the loss on the probe, each parameter's own learning rate, momentum constant c of
    :func:`stability_limit` and, under Adam, :math:`P = 1/(\sqrt v + \epsilon)`, the L2 term :math:`\Lambda`
    and the decoupled decay :math:`\Lambda'`. Where the eigenvalue is 1 the recursion of weights and momentum
    has the eigenvalue -1, also where groups differ in rate and momentum. Taken after the step, under SGD,
    Adam and AdamW, with each module in the mode it is in. Needs ``Monitor(loss_fn=...)`` and a probe with
    targets.

    The curvature is that of the probe's loss, and larger for few examples: give a probe of some hundred.
    Small batches make descent unstable below the limit. The error is from leaving out eighths of the probe,
    and not known under batch norm or dropout in train mode. The bias correction of Adam's first moment, which
    fades within a few times 1/(1 - beta1) steps, is left out.

    Args:
        schedule: When it is recorded; every 1,000 steps by default.
        sampling: Not used: the curvature is a state function.
        estimator: Not used.

    Units:
        See ``quantities``.

    Source:
        Cohen et al. 2021, arXiv:2103.00065; the preconditioned Hessian under Adam: Cohen et al. 2022,
        arXiv:2207.14484.

    Shapes:
        Scalars.

    Example:
        >>> LearningRateLimit(schedule=500).group
        'control'
    """

    group: ClassVar[str] = "control"
    level_needs: ClassVar[frozenset[str]] = frozenset({"probe", "parameter_steps"})
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "lr_over_limit": Quantity(
            "1",
            "Learning rate over the largest one that is stable on the probe.",
            verdict=_over_limit_says,
            chart="learning rate over its limit",
            formula=(
                "largest eigenvalue of `C^1/2 (H + lambda) C^1/2 + eta lambda_d / 2`, `C = eta P / c`, "
                "with `c` the constant above, `P` Adam's `1/(sqrt(v) + eps)` or 1, `lambda` the L2 and "
                "`lambda_d` the decoupled decay"
            ),
            cost=(
                "mostly 10 to 20 Hessian products of the probe, each about two backward passes, and nine "
                "more for the error"
            ),
            source="arXiv:2103.00065; under Adam arXiv:2207.14484",
            tells=(
                "below 1 the quadratic expansion is stable; near 1 training is at the edge of stability, "
                "where descent hovers by itself"
            ),
            act=(
                "above 1 and the loss does not fall: divide the learning rate by it; below 1 it does not say "
                "that a larger rate trains"
            ),
        ),
        "lr_limit": Quantity(
            "1",
            "Largest stable learning rate of the first group.",
            formula="learning rate / `lr_over_limit`, of the first group with the others in proportion",
            cost="with it",
            source="the same",
            tells="the learning rate at the edge, at these weights; it moves with the rate in use",
            act="stay below it; it is not a rate to train at",
        ),
    }

    schedule: Schedule | int = 1000

    def levels(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The eigenvalue at this step, and what is known of its error."""
        probe, steps = snapshot.probe, snapshot.parameter_steps
        if snapshot.loss_fn is None:
            raise UnsupportedError(
                "the limit of the learning rate can only be measured where the loss is known",
                fix="Pass loss_fn=, which maps outputs and targets to the loss.",
            )
        trained = [name for name, p in snapshot.model.named_parameters() if p.requires_grad]
        edges = [_edge(steps[name]) for name in trained]
        with as_training(snapshot.model):
            metric = Curvature(
                snapshot.model,
                snapshot.loss_fn,
                gains=[edge.gain for edge in edges],
                shifts=[edge.shift for edge in edges],
                loss_reduction=snapshot.loss_reduction,
            )
            top = metric.top(probe.inputs, probe.targets)
            if math.isnan(top.value):
                raise SampleSkippedError("the curvature is not finite at this step")
            error = metric.stderr(probe.inputs, probe.targets, top)
        numbers = {
            "top": top.value,
            "residual": top.residual,
            "stderr": error,
            "products": top.products,
            "lr": snapshot.groups[0].lr,
        }
        return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}

    def note(self, snapshot: Snapshot) -> str:
        """Whose curvature it is."""
        return f"Hessian of the loss on {examples(snapshot.probe.inputs)} probe examples"

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Both numbers, or a bound where the iteration has not converged."""
        top, lr, error = now["top"], now["lr"], now["stderr"]
        note = f"{int(now['products'])} Hessian products"
        if now["residual"] > TOLERANCE * top.abs():
            why = f"{note}; not resolved: the largest curvature was not found"
            unknown = Estimate(math.nan, math.nan, resolved=False, note=why)
            return {"lr_over_limit": unknown._replace(low=float(top)), "lr_limit": unknown}
        limited = bool(top > 0)  # where no curvature is positive, nothing is
        limit = lr / top
        return {
            "lr_over_limit": Estimate(top, error, note=note),
            "lr_limit": Estimate(limit, limit * error / top, note=note)
            if limited
            else Estimate(
                math.nan,
                math.nan,
                resolved=False,
                note=f"{note}; not resolved: no curvature is positive on the probe",
            ),
        }


class _Edge(NamedTuple):
    """What curvature is multiplied by, and what is added, for 1 to be the limit of stability."""

    gain: float | Tensor
    shift: float | Tensor


def _edge(step: ParameterStep) -> _Edge:
    """``rate (h + decay) / c + shrinkage / 2 = 1`` is where the recursion has the eigenvalue -1."""
    gain = step.rate / stability_limit(step.momentum, step.dampening, step.nesterov)
    return _Edge(gain, gain * step.weight_decay + step.shrinkage / 2)
