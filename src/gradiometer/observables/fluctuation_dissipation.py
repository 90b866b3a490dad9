"""Yaida's first fluctuation-dissipation relation: has the run reached its stationary state?

Measured on the fly, the relation is a telescoping identity for the squared norm of the weights. So the
right side is sampled, and the left side follows from it and two exact end points: no gradient has to
be multiplied with the weights. Equality says that the norm of the weights has stopped drifting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..estimators import Estimator, HalfRun, Last, Reference
from ..records import Quantity
from ..schedules import Schedule, every
from ..snapshot import Snapshot
from ..statistics import detrended_variance
from .base import Estimate, Numbers, Observable

_LR_TOLERANCE = 1e-12


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
        InputError: A window without steps, or Nesterov with dampening.

    Source:
        Yaida 2018, arXiv:1810.00004, the relation FDR1 and its form with momentum; the end-point form and
        the Nesterov form are derived here, by summing ``theta_t . g_t`` by parts, and tested to rounding.

    Example:
        >>> one = torch.tensor(1.0)      # a step of length 1 that leaves |theta|^2 as it was
        >>> fluctuation_dissipation(one, (one, one), steps=1, lr=0.5)
        Relation(left=tensor(1.), right=tensor(1.))
    """
    if bool(torch.as_tensor(steps).lt(1).any()):
        raise InputError("a window needs at least one step", got=steps, fix="Record twice or more.")
    nesterov = torch.as_tensor(nesterov)
    if bool((nesterov & torch.as_tensor(dampening).ne(0)).any()):
        raise InputError("Nesterov momentum has no dampening", got=dampening, fix="Write dampening=0.")
    heavy_ball = (1 + momentum) / (2 * (1 - dampening)) * displacement_sq / lr
    looking_ahead = (1 - momentum) / (2 * lr) * displacement_sq + momentum**2 * displacement_dot_velocity
    right = torch.where(nesterov, looking_ahead, heavy_ball)
    start, end = (
        _level(sq, dot, lr, momentum, dampening, nesterov)
        for sq, dot in zip(weight_sq, weight_dot_velocity, strict=True)
    )
    return Relation(right - (end - start) / steps, right)


def _level(
    weight_sq: Tensor,
    weight_dot_velocity: Tensor | float,
    lr: Tensor | float,
    momentum: Tensor | float,
    dampening: Tensor | float,
    nesterov: Tensor,
) -> Tensor:
    """The state function E whose drift separates the two sides."""
    dot = torch.as_tensor(weight_dot_velocity, dtype=weight_sq.dtype)  # where() rounds floats to float32
    coupled = torch.where(nesterov, momentum**2 * dot, momentum / (1 - dampening) * dot)
    return (1 - momentum) / (2 * lr * (1 - dampening)) * weight_sq - coupled


@dataclass(frozen=True, kw_only=True)
class FluctuationDissipation(Observable):
    """Both sides of FDR1 over the second half of the run, in total and per parameter group.

    Under ``torch.optim.SGD`` with constant settings in the window it is Yaida's relation, momentum,
    dampening, Nesterov and L2 included. For every other optimizer, and where the learning rate changes
    within the window, it is the master form, a statement about the norm of the weights alone; the note
    says which one it is. The error of the ratio comes from the scatter of the end points about their
    trend, since errors from blocks are several times too wide for a telescoping series.

    Args:
        schedule: When it is recorded; every 50 steps by default.
        sampling: When the squared update is sampled; every 10 steps by default.
        estimator: Window; Yaida's half-running average by default. ``Last`` has none and is refused.
        verify: Also accumulate the inner product of weights and gradient at every step and report the
            residual of the identity. Costs a copy of the weights per step.

    Units:
        Loss; the ratio has none.

    Source:
        arXiv:1810.00004.

    Shapes:
        Scalars, in total and per parameter group.

    Raises:
        InputError: If the estimator keeps no window.

    Example:
        >>> FluctuationDissipation(schedule=100).samples(10)
        True
    """

    group: ClassVar[str] = "fdr"
    level_needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    default_estimator: ClassVar[type[Estimator]] = HalfRun
    restarts: ClassVar[frozenset[str]] = frozenset({"settings", "parameters"})
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "left": Quantity("loss", "Left side, the mean of weights times gradient."),
        "right": Quantity("loss", "Right side, the mean squared update."),
        "ratio": Quantity("1", "Left over right: 1 at a stationary state."),
        "weight_norm_sq": Quantity("parameter^2", "Squared norm of the weights."),
        "residual": Quantity("1", "Violation of the identity, relative to the right side."),
    }

    schedule: Schedule | int = 50
    sampling: Schedule | int | None = 10
    verify: bool = False

    def __post_init__(self) -> None:
        """Sample every step when verifying; refuse an estimator without a window."""
        if self.verify:
            object.__setattr__(self, "sampling", every(1))
        super().__post_init__()
        if isinstance(self.estimator, Last):
            raise InputError(
                "FluctuationDissipation compares the two ends of a window",
                got="Last()",
                fix="Write estimator=HalfRun(), Window(1000) or Mean().",
            )

    def required(self, recording: bool) -> frozenset[str]:
        """The update, the weights at recording steps, and the inner products when verifying."""
        work = {"work"} if self.verify else set()
        return frozenset({"update"} | work | (set(self.level_needs) if recording else set()))

    def statistics(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """Squared update and learning rate of this step, per group."""
        update = snapshot.update
        lr = torch.tensor([group.lr for group in snapshot.section_settings], dtype=torch.float64)
        statistics = {
            "displacement_sq": update.displacement_sq,
            "displacement_dot_velocity": update.displacement_dot_velocity,
            "lr": lr,
            "lr_sq": lr.square(),
        }
        if self.verify:
            statistics["weight_dot_gradient"] = snapshot.work.weight_dot_gradient
            statistics["weight_dot_displacement"] = snapshot.work.weight_dot_displacement
        return statistics

    def levels(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The end points: norms, inner products with the velocity, and the settings that go with them."""
        weights = snapshot.weights
        return {
            "weight_sq": weights.sq_norm,
            "weight_dot_velocity": weights.dot_velocity,
            "updates": weights.updates,
            "settings": torch.tensor(
                [[g.lr, g.momentum, g.dampening, g.nesterov, g.is_sgd] for g in snapshot.section_settings],
                dtype=torch.float64,
            ),
        }

    def note(self, snapshot: Snapshot) -> str:
        """Which form the relation takes under this optimizer."""
        if all(group.is_sgd for group in snapshot.groups):
            return "SGD form while the learning rate is constant, else the master form"
        return "master form: a statement about the norm of the weights"

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Both sides and their ratio, in total and per group, once the window has two ends."""
        groups = now["weight_sq"].shape[-1]
        window = _window(now, reference)
        total = {"weight_norm_sq": now["weight_sq"].sum(-1), **_sides(window, slice(None))}
        if groups > 1:
            for g in range(groups):
                if window is not None and not window.moves[g]:
                    continue
                own = _sides(window, slice(g, g + 1))
                total.update({f"{name}/{g}": value for name, value in own.items()})
                total[f"weight_norm_sq/{g}"] = now["weight_sq"][..., g]
        return total


class _Window(NamedTuple):
    """The relation of every group, the path of its level E, and the violation of the identity."""

    relation: Relation
    path: Tensor
    steps: Tensor
    violation: Tensor | None
    moves: Tensor


def _window(now: Mapping[str, Tensor], reference: Reference) -> _Window | None:
    """The relation over the estimator's window, each parameter group in its own form.

    A group whose learning rate is 0 does not move and takes no part.
    """
    path = reference.path
    if len(reference.path_steps) < 2 or "displacement_sq" not in now:
        return None
    steps, settings = path["updates"], path["settings"]
    lr, momentum, dampening, nesterov, is_sgd = settings[-1].unbind(-1)
    mean_lr, mean_lr_sq = (now[name].reshape(-1, len(lr))[0] for name in ("lr", "lr_sq"))
    constant = mean_lr_sq - mean_lr.square() <= _LR_TOLERANCE * mean_lr.square()
    own = constant & (settings == settings[-1]).all(0).all(-1) & is_sgd.bool()
    moves = mean_lr > 0
    lr = torch.where(own, lr, mean_lr).where(moves, 1.0)
    momentum, dampening, nesterov = momentum * own, dampening * own, nesterov.bool() & own
    dot, weight_sq = path["weight_dot_velocity"], path["weight_sq"]
    relation = fluctuation_dissipation(
        now["displacement_sq"],
        (weight_sq[0], weight_sq[-1]),
        steps[-1] - steps[0],
        lr,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        displacement_dot_velocity=now["displacement_dot_velocity"],
        weight_dot_velocity=(dot[0], dot[-1]),
    )
    violation = None
    if "weight_dot_gradient" in now:
        work = torch.where(own, now["weight_dot_gradient"], now["weight_dot_displacement"] / lr)
        violation = (work - relation.left) * moves
    relation = Relation(relation.left * moves, relation.right * moves)
    level = _level(weight_sq, dot, lr, momentum, dampening, nesterov) * moves
    return _Window(relation, level, steps, violation, moves)


def _sides(window: _Window | None, groups: slice) -> dict[str, Tensor | Estimate]:
    """Readings of some groups together: both sides are sums over parameters."""
    if window is None:
        return {}
    left, right = (side[..., groups].sum(-1) for side in window.relation)
    variance = detrended_variance(window.steps, window.path[:, groups].sum(-1, keepdim=True))
    drift_error = (2 * variance).sqrt() / (window.steps[-1] - window.steps[0])
    sides: dict[str, Tensor | Estimate] = {
        "left": left,
        "right": right,
        "ratio": Estimate(left / right, drift_error / right),
    }
    if window.violation is not None:
        sides["residual"] = window.violation[..., groups].sum(-1) / right
    return sides
