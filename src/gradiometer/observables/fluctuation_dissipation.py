"""Yaida's first fluctuation-dissipation relation: has the run reached its stationary state?

Measured on the fly, the relation is a telescoping identity for the squared norm of the weights. So the
right side is sampled, and the left side follows from it and two exact end points: no gradient has to
be multiplied by the weights. Equality says that the norm of the weights has stopped drifting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..collect.snapshot import Snapshot
from ..errors import InputError, check_choice, check_flag, check_number
from ..optimizers import GroupSettings
from ..record.readings import Quantity, Reading, sibling
from ..stats.arguments import check_entries, check_finite, check_pair, check_sgd, check_together
from ..stats.estimators import Estimator, HalfRun, Last, Reference
from ..stats.jackknife import correlated_jackknife, t_quantile
from ..stats.stationarity import FEWEST_KNOTS, Answer, Floats, end_point_deviation, sasa_plus, stationary
from .base import Estimate, Numbers, Observable
from .gradient_noise_scale import BATCH_GRAD_SQ_NORM_KEY, of_all_parameters, of_mean_loss
from .relations import STANDARD_ERRORS, CrossCheck, differs, widest
from .schedules import Schedule, every

__all__ = [
    "FluctuationDissipation",
    "Relation",
    "fluctuation_dissipation",
]


class Relation(NamedTuple):
    """Both sides of the relation over a window, in units of the loss."""

    left: Tensor
    right: Tensor


def fluctuation_dissipation(
    displacement_sq: Tensor,
    weight_sq: tuple[Tensor, Tensor],
    steps: Tensor | int,
    lr: Tensor | float,
    *,
    momentum: Tensor | float = 0.0,
    dampening: Tensor | float = 0.0,
    nesterov: Tensor | bool = False,
    displacement_dot_velocity: Tensor | float = 0.0,
    weight_dot_velocity: tuple[Tensor | float, Tensor | float] = (0.0, 0.0),
) -> Relation:
    r"""Both sides of FDR1 for ``torch.optim.SGD`` over a window, exactly.

    With torch's buffer ``b <- mu b + (1 - nu) g``, the displacement ``u = theta_t - theta_{t+1}`` and T
    steps from ``theta_0`` to ``theta_T``:

    .. math::
        \text{right} &= \frac{1+\mu}{2(1-\nu)}\,\frac{\langle|u|^2\rangle}{\eta}
            \quad\text{or, Nesterov,}\quad
            \frac{1-\mu}{2\eta}\langle|u|^2\rangle + \mu^2 \langle u\cdot b\rangle \\
        \text{left} &= \langle\theta\cdot g\rangle = \text{right} - \frac{E_T - E_0}{T} \\
        E &= \frac{1-\mu}{2\eta(1-\nu)}|\theta|^2 - \frac{\mu}{1-\nu}\,\theta\cdot b
            \quad\text{or, Nesterov,}\quad \frac{1-\mu}{2\eta}|\theta|^2 - \mu^2\,\theta\cdot b

    Without momentum this is also the master form of any optimizer, ``d = u / eta``.

    Args:
        displacement_sq: Mean of ``|u|^2`` over the window.
        weight_sq: ``|theta|^2`` at the two ends.
        steps: Number of optimizer steps in the window, T.
        lr: Learning rate.
        momentum: Momentum coefficient.
        dampening: Dampening.
        nesterov: Whether the momentum is Nesterov's; dampening must be 0 then.
        displacement_dot_velocity: Mean of ``u . b``, with b after the same step; for Nesterov.
        weight_dot_velocity: ``theta . b`` at the two ends.

    Returns:
        ``left`` and ``right``; they agree at a stationary state.

    Shapes:
        Scalars, or one entry per parameter group ``[G]``.

    Units:
        Those of the loss.

    Raises:
        InputError: A window without steps, settings that SGD does not have, numbers that are not finite,
            shapes that do not go together, or Nesterov with dampening.

    Source:
        Yaida 2018, arXiv:1810.00004, the relation FDR1 and its form with momentum; the end-point form and
        the Nesterov form are derived here, by summing ``theta_t . g_t`` by parts, and tested to rounding.

    Example:
        >>> one = torch.tensor(1.0)      # a step of length 1 that leaves |theta|^2 as it was
        >>> fluctuation_dissipation(one, (one, one), steps=1, lr=0.5)
        Relation(left=tensor(1.), right=tensor(1.))
    """
    check_finite(displacement_sq=displacement_sq)
    check_entries("displacement_sq", displacement_sq, least=0)
    check_sgd(lr, momentum, dampening, nesterov)
    check_entries("displacement_dot_velocity", displacement_dot_velocity)
    for name, ends in (("weight_sq", weight_sq), ("weight_dot_velocity", weight_dot_velocity)):
        check_pair(name, ends)
        for end in ends:
            check_entries(name, end, least=0 if name == "weight_sq" else -math.inf)
        check_together(displacement_sq=displacement_sq, lr=lr, steps=steps, start=ends[0], end=ends[1])
    check_entries("steps", steps, integer=True)
    if bool(torch.as_tensor(steps).lt(1).any()):
        raise InputError("a window needs at least one step", got=steps, fix="Record twice or more.")
    nesterov = torch.as_tensor(nesterov).to(displacement_sq)
    form = _Form(lr, momentum, dampening, nesterov)
    right = form.right(displacement_sq, displacement_dot_velocity)
    start, end = (form.level(*ends) for ends in zip(weight_sq, weight_dot_velocity, strict=True))
    left = right - (end - start) / steps
    check_finite(left=left, right=right)
    return Relation(left, right)


class _Form(NamedTuple):
    """The relation's coefficients: numbers, tensors or arrays alike; ``nesterov`` is 0 or 1."""

    lr: Any
    momentum: Any
    dampening: Any
    nesterov: Any

    def right(self, displacement_sq: Any, displacement_dot_velocity: Any) -> Any:
        """The right side, from the squared update."""
        lr, mu, nu, nesterov = self
        heavy_ball = (1 + mu) / (2 * (1 - nu)) / lr * (1 - nesterov)
        looking_ahead = (1 - mu) / (2 * lr) * nesterov
        return (heavy_ball + looking_ahead) * displacement_sq + (mu**2 * nesterov) * displacement_dot_velocity

    def level(self, weight_sq: Any, weight_dot_velocity: Any) -> Any:
        """The state function E whose drift separates the two sides."""
        lr, mu, nu, nesterov = self
        coupled = mu / (1 - nu) * (1 - nesterov) + mu**2 * nesterov
        return (1 - mu) / (2 * lr * (1 - nu)) * weight_sq - coupled * weight_dot_velocity


LEFT, RIGHT, RATIO = "left", "right", "ratio"
STATIONARY, WEIGHT_NORM_SQ = "stationary", "weight_norm_sq"
NEAR_ONE = 0.1
"""In words, the ratio counts as 1 within this, if its error is below it too."""
SPARSER = 5.0
"""Updates that are sampled for one gradient, at the default cadences. Both averages are of the same squares,
which have heavy tails late in training: the fewer samples have at least the root of this times the other's
error."""


def _ratio_says(reading: Reading, others: Mapping[str, Reading]) -> str:
    away, error = abs(reading.number - 1), reading.stderr
    decided = others.get(sibling(reading.key, STATIONARY))
    decision = decided.number if decided is not None else math.nan
    if decision == 0.0 or away - 2 * error > NEAR_ONE:
        return "transient: the weights are still on their way. Keep the learning rate."
    if decision == 1.0 or (decided is None and away < NEAR_ONE and error < NEAR_ONE):
        return (
            "stationary: the norm of the weights has stopped drifting. More steps at this learning "
            "rate only average noise; lower it or stop."
        )
    return f"not resolved: {why_undecided(decided) or 'the window is still too short to tell'}."


def _decision_says(reading: Reading, others: Mapping[str, Reading]) -> str:
    if not reading.resolved:
        return f"not decided: {why_undecided(reading)}."
    if reading.number == 1.0:
        return "the run has settled: lower the learning rate, raise the batch size, or stop."
    return "the run is still on its way."


def why_undecided(decision: Reading | None) -> str:
    """Why the run is called neither stationary nor transient: the last part of the note.

    Args:
        decision: The reading ``stationary``, where there is one.
    """
    return decision.why.removeprefix("not resolved: ") if decision is not None else ""


def _contradicted_by_gradient(readings: Mapping[str, Reading], groups: Sequence[GroupSettings]) -> str:
    """The right side from the update, against that from the gradient."""
    key = FluctuationDissipation.key(RIGHT)
    work = _work_of_noise(readings, groups)
    right = readings.get(key)
    if work is None or right is None:
        return ""
    expected, error = work[0], max(work[1], math.sqrt(SPARSER) * right.stderr)
    if not differs(right, expected, error):
        return ""
    return (
        f"{key}, from the update, is {right.number:.3g} +- {right.stderr:.2g}; "
        f"{BATCH_GRAD_SQ_NORM_KEY}, from the gradient, gives {expected:.3g} +- {error:.2g} for the same "
        "at a stationary state. Something between the gradient and the update changes one of them: "
        "clipping after before_step(), or a scaled loss."
    )


def _work_of_noise(
    readings: Mapping[str, Reading], groups: Sequence[GroupSettings]
) -> tuple[float, float] | None:
    """FDR1's right side ``eta/2 (|G|^2 + S/B)`` and its error, where plain SGD makes that a relation.

    The windows of both readings differ, so it is one at a stationary state only. Weight decay acts on the
    update and not on the gradient measured: with F = G + lambda theta and <theta . F> = right,
    ``right (1 - eta lambda) = eta/2 (|G|^2 + S/B - lambda^2 |theta|^2)``.
    """
    batch = readings.get(BATCH_GRAD_SQ_NORM_KEY)
    weights = readings.get(FluctuationDissipation.key(WEIGHT_NORM_SQ))
    decision = readings.get(FluctuationDissipation.key(STATIONARY))
    if not groups or batch is None or weights is None or decision is None:
        return None
    first = groups[0]
    plain = first.is_sgd and not first.momentum
    if not plain or any((g.lr, g.weight_decay, g.momentum) != _settings(first) for g in groups):
        return None
    if decision.number != 1.0 or not of_all_parameters(batch) or not of_mean_loss(batch):
        return None
    lr, decay = first.lr, first.weight_decay
    pulled = decay**2 * weights.number
    factor = lr / 2 / (1 - lr * decay)
    return factor * (batch.number - pulled), factor * widest(batch) / STANDARD_ERRORS


def _settings(group: GroupSettings) -> tuple[float, float, float]:
    return group.lr, group.weight_decay, group.momentum


Test = Literal["tolerance", "sasa", "sasa_blocks"]


@dataclass(frozen=True, kw_only=True)
class FluctuationDissipation(Observable):
    """Both sides of FDR1 over the second half of the run, in total and per section of parameters.

    Under ``torch.optim.SGD`` with constant settings in the window it is Yaida's relation, momentum,
    dampening, Nesterov and L2 included. For every other optimizer, and where the learning rate drifts
    within the window, it is the master form, a statement about the norm of the weights alone; the note
    says which one it is. A jump of the settings begins the window anew.

    The error of the ratio is that of its end points, since errors from blocks are several times too wide for
    a telescoping series. The left side is the right one less the drift, and has the errors of both; they are
    nearly independent, with a correlation of ``1 / sqrt(2 T)`` on a noisy quadratic.

    Args:
        schedule: When it is recorded; every 50 steps by default.
        sampling: When the squared update is sampled; every 10 steps by default.
        estimator: Window; Yaida's half-running average by default. ``Last`` has none and is refused.
        tolerance: How far from 1 the ratio may be at a stationary state.
        test: How ``stationary`` is decided: ``"tolerance"``; ``"sasa"``, the test of SASA+ with the errors
            of end points; ``"sasa_blocks"``, the same with errors from blocks, as published.
        centred: Take the weights relative to those at the window's first record: the same stationary
            value, with less scatter where weights fluctuate about a large mean. Keeps a copy of the
            weights, also in the checkpoint.
        verify: Also accumulate the inner product of weights and gradient at every step and report the
            residual of the identity. Costs a copy of the weights per step.

    Units:
        Loss; the ratio has none.

    Source:
        arXiv:1810.00004; SASA+: arXiv:2002.10597.

    Shapes:
        Scalars, in total and per section.

    Raises:
        InputError: If the estimator keeps no window, the tolerance is not positive, there is no such
            test, or ``centred`` is to be verified.

    Example:
        >>> sum(FluctuationDissipation(schedule=100, sampling=10).samples(step) for step in range(1, 101))
        10
    """

    group: ClassVar[str] = "fdr"
    needs: ClassVar[frozenset[str]] = frozenset({"update"})
    level_needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    default_estimator: ClassVar[type[Estimator]] = HalfRun
    of_batch: ClassVar[bool] = True
    restarts: ClassVar[frozenset[str]] = frozenset({"settings", "parameters"})
    not_averaged: ClassVar[frozenset[str]] = Observable.not_averaged | {"tolerance", "test"}
    checks: ClassVar[Mapping[str, CrossCheck]] = {RIGHT: _contradicted_by_gradient}
    quantities: ClassVar[Mapping[str, Quantity]] = {
        LEFT: Quantity(
            "loss",
            "Left side, the mean of weights times gradient.",
            chart="fluctuation and dissipation",
            formula="`<theta . g>`",
            cost="norm of the weights",
            source="arXiv:1810.00004, FDR1",
            tells="pull of the gradient on the weights",
        ),
        RIGHT: Quantity(
            "loss",
            "Right side, the mean squared update.",
            chart="fluctuation and dissipation",
            formula="`(1 + mu) / (2 (1 - nu)) eta <‖v‖²>`",
            cost="norm of the update, at one of every 10 steps",
            source="arXiv:1810.00004, FDR1'",
            tells="work done by the fluctuations",
        ),
        RATIO: Quantity(
            "1",
            "Left over right: 1 at a stationary state.",
            verdict=_ratio_says,
            chart="stationary? (fdr ratio)",
            formula="left / right",
            source="arXiv:1810.00004",
            tells="1 within its error: the norm of the weights has stopped drifting",
            act="stationary: lower the learning rate or stop; transient: go on",
        ),
        STATIONARY: Quantity(
            "1",
            "1 where the run has settled, 0 where it has not.",
            verdict=_decision_says,
            chart="stationary: 1, not: 0",
            formula=(
                "1 if `abs(r) < X` over the window, `< 3X` over both its halves, also a fifth of the "
                "window earlier, and `s < X`; 0 if `abs(r) - 2s > X` or one of them fails; with `r = "
                "ratio - 1`, `X = tolerance`, `s = resolution`"
            ),
            source="arXiv:1810.00004; halves, second check and resolution are added",
            tells="1: the run has settled at this learning rate; nan: the note says why it is not decided",
            act="as for the ratio",
        ),
        "resolution": Quantity(
            "1",
            "Standard deviation of the ratio at a stationary state.",
            formula=(
                "standard deviation of the ratio at a stationary state, from the scatter of its end points"
            ),
            source="summation by parts",
            tells="the tolerance that this window can tell from 0; it falls as 1/T",
            act="above the tolerance: go on measuring",
        ),
        WEIGHT_NORM_SQ: Quantity(
            "parameter^2",
            "Squared norm of the weights.",
            formula="`‖theta‖²`",
            cost="norm of the weights",
            tells="what the relation is about",
            act="grows without end: there is no weight decay and no stationary state",
        ),
        "residual": Quantity(
            "1",
            "Violation of the identity, relative to the right side.",
            formula="(measured left − left) / right",
            cost="a copy of the weights per step",
            source="summation by parts",
            tells="only with `verify=True`; must be at rounding level",
            act="larger: something else changes the weights",
        ),
    }

    schedule: Schedule | int = 50
    sampling: Schedule | int | None = 10
    tolerance: float = 0.05
    test: Test = "tolerance"
    centred: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        """Sample every step when verifying; refuse what cannot be."""
        for name in ("centred", "verify"):
            check_flag(name, getattr(self, name))
        if self.verify:
            object.__setattr__(self, "sampling", every(1))
            object.__setattr__(self, "needs", self.needs | {"work"})
        if self.centred:
            object.__setattr__(self, "level_needs", self.level_needs | {"centred_weights"})
        super().__post_init__()
        check_choice("test", self.test, get_args(Test))
        check_number("tolerance", self.tolerance, above=0)
        if isinstance(self.estimator, Last):
            raise InputError(
                "FluctuationDissipation compares the two ends of a window",
                got="Last()",
                fix="Write estimator=HalfRun(), Window(1000) or Mean().",
            )
        if self.centred and self.verify:
            raise InputError(
                "the identity is verified for the weights themselves",
                got="centred=True, verify=True",
                fix="Leave one of them out.",
            )

    @property
    def names(self) -> frozenset[str]:
        """All, without the residual unless verifying."""
        return frozenset(self.quantities) - (frozenset() if self.verify else {"residual"})

    def statistics(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """Squared update of this step, per section."""
        update = snapshot.update
        statistics = {"displacement_sq": update.displacement_sq}
        if update.displacement_dot_velocity is not None:
            statistics["displacement_dot_velocity"] = update.displacement_dot_velocity
        if self.verify:
            statistics["weight_dot_gradient"] = snapshot.work.weight_dot_gradient
            statistics["weight_dot_displacement"] = snapshot.work.weight_dot_displacement
        return statistics

    def levels(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The end points: norms, inner products with the velocity, and the settings that go with them."""
        weights = snapshot.weights
        ends = snapshot.centred_weights if self.centred else weights
        return {
            "weight_norm_sq": weights.sq_norm,
            "weight_sq": ends.sq_norm,
            "weight_dot_velocity": ends.dot_velocity,
            "updates": weights.updates,
            "settings": torch.tensor(
                [
                    [g.lr, g.momentum, g.dampening, g.nesterov, g.is_sgd, weights.drifts]
                    for g in snapshot.section_settings
                ],
                dtype=torch.float64,
            ).reshape(-1, 6),  # also where nothing is trained for now
        }

    def note(self, snapshot: Snapshot) -> str:
        """Which form the relation takes under this optimizer."""
        groups = snapshot.groups
        sgd = all(group.is_sgd for group in groups)
        text = (
            "SGD form while the learning rate is constant, else the master form"
            if sgd
            else "master form: a statement about the norm of the weights"
        )
        if not any(group.weight_decay for group in groups):
            text += "; without weight decay the norm may grow for ever"
        return text

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Both sides, their ratio and the decision, in total and per section, once there is a window."""
        with np.errstate(over="ignore", invalid="ignore"):  # of weights that diverge
            norms = now["weight_norm_sq"].numpy()
            window = _window(now, reference)
            sections = norms.shape[-1]
            readings = {WEIGHT_NORM_SQ: norms.sum(-1), **self._sides(window, slice(None), "")}
            for u in range(sections) if sections > 1 else ():
                if window is None or window.moves[u]:
                    readings |= self._sides(window, slice(u, u + 1), f"/{u}")
                    readings[f"{WEIGHT_NORM_SQ}/{u}"] = norms[..., u]
            return readings

    def _sides(self, window: _Window | None, columns: slice, name: str) -> dict[str, Floats | Estimate]:
        """Readings of some sections together: both sides are sums over parameters."""
        if window is None:
            return {}
        left, right = window.left[..., columns].sum(-1), window.right[..., columns].sum(-1)
        level, rights = window.level[:, columns].sum(-1), window.rights[:, columns].sum(-1)
        deviation = float(end_point_deviation(window.steps, level))
        decision = self._decide(window, level, rights, deviation)
        drift_error = deviation / float(window.steps[-1] - window.steps[0])
        resolution = float(_ratio(drift_error, right[:1])[0])
        unknown = _why_unknown(window, right) if math.isnan(resolution) else ""
        resolved = not unknown or not right[0]  # where nothing moves there is no ratio to resolve
        right_error, _ = _block_error(right[:1], right[1:], window.left_out)
        sides: dict[str, Floats | Estimate] = {
            LEFT: Estimate(left, math.hypot(right_error, drift_error)),
            RIGHT: right,
            RATIO: Estimate(_ratio(left, right), resolution, resolved=resolved, note=unknown),
            "resolution": Estimate(resolution, math.nan, resolved=not unknown, note=unknown),
            STATIONARY: Estimate(
                decision.value, math.nan, resolved=not math.isnan(decision.value), note=decision.reason
            ),
        }
        if window.violation is not None:
            sides["residual"] = _residual(window.violation[:, columns].sum(-1), window.weights, right[:1])
        return {key + name: value for key, value in sides.items()}

    def _decide(self, window: _Window, level: Floats, rights: Floats, deviation: float) -> Answer:
        if not rights.any():
            return Answer(math.nan, "the weights do not move")
        if self.test == "tolerance":
            return stationary(
                window.steps,
                level,
                rights,
                window.weights,
                self.tolerance,
                deviation=deviation,
                constant_lr=window.constant,
            )
        errors = "blocks" if self.test == "sasa_blocks" else "end_points"
        return sasa_plus(window.steps, level, errors=errors, constant_lr=window.constant)


def _why_unknown(window: _Window, right: Floats) -> str:
    """What there is no resolution without."""
    if not right[0]:
        return "not measured: the weights do not move"
    if len(window.steps) < FEWEST_KNOTS:
        return f"the window holds fewer than {FEWEST_KNOTS} records"
    return "the level of the weights is not finite"


def _residual(violation: Floats, weights: Floats, right: Floats) -> Estimate:
    """Mean violation of the identity over the right side, with an error from the blocks' own violations.

    Each block has its own two ends, and so no violation where every step is sampled.
    """
    sampled = weights > 0
    parts, weights = violation[sampled], weights[sampled]
    mean = weights @ parts / weights.sum()
    without = _ratio(weights.sum() * mean - weights * parts, weights.sum() - weights)
    error, groups = _block_error(mean[None], without, weights)
    value, stderr = (float(_ratio(left, right)[0]) for left in (mean, error))
    half = t_quantile(groups) * stderr
    return Estimate(value, stderr, value - half, value + half)


def _block_error(full: Floats, left_out: Floats, weights: Floats) -> tuple[float, int]:
    """Standard error of one average from those that each leave blocks out, and the groups behind it."""
    rows = torch.from_numpy(full), torch.from_numpy(left_out)[:, None], torch.from_numpy(weights)
    error = correlated_jackknife(*rows)
    return float(error.stderr), int(error.groups)


def _ratio(numerator: Floats | float, denominator: Floats) -> Floats:
    """``nan`` where the denominator is 0, since nothing moves there."""
    unknown = np.full_like(denominator, math.nan)
    return np.divide(numerator, denominator, out=unknown, where=denominator != 0)


class _Window(NamedTuple):
    """The relation of every section and what it is made of.

    Both sides with their replicates and the samples that each of these leaves out, the level E and the
    number of updates at each knot, the right side, the samples and the violation of the identity between
    knots, which sections move, and whether the settings stay the same.
    """

    left: Floats
    right: Floats
    left_out: Floats
    level: Floats
    steps: Floats
    rights: Floats
    weights: Floats
    violation: Floats | None
    moves: NDArray[np.bool_]
    constant: bool


def _window(now: Mapping[str, Tensor], reference: Reference) -> _Window | None:
    """The relation over the estimator's window, each section in its own form.

    A section whose learning rate is 0 does not move and takes no part.
    """
    path, blocks = reference.path, reference.block_means
    if len(reference.path_steps) < 2 or "displacement_sq" not in now:
        return None
    steps, settings = path["updates"], path["settings"]
    lr, momentum, dampening, nesterov, is_sgd, _ = settings[-1].T
    same = (settings == settings[-1]).all((0, 2))
    alone = same & (is_sgd > 0)
    lr = np.where(same, lr, settings[..., 0].mean(0))
    moves = lr > 0
    form = _Form(np.where(moves, lr, 1.0), momentum * alone, dampening * alone, nesterov * alone)
    velocity = "displacement_dot_velocity"
    averages = {name: value.numpy() for name, value in now.items()}
    right = form.right(averages["displacement_sq"], averages.get(velocity, 0.0)) * moves
    level = form.level(path["weight_sq"], path["weight_dot_velocity"]) * moves
    left = right - (level[-1] - level[0]) / (steps[-1] - steps[0])
    rights = form.right(blocks["displacement_sq"], blocks.get(velocity, 0.0)) * moves
    violation = None
    if "weight_dot_gradient" in now:
        displaced = blocks["weight_dot_displacement"] / form.lr
        work = np.where(alone, blocks["weight_dot_gradient"], displaced) * moves
        violation = work - rights + np.diff(level, axis=0) / np.diff(steps)[:, None]
    return _Window(
        left,
        right,
        reference.weights.numpy(),
        level,
        steps,
        rights,
        reference.block_weights,
        violation,
        moves,
        bool(same[moves].all()),
    )
