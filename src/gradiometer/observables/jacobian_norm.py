"""The input-output Jacobian: how strongly the logits answer to a small change of the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..autodiff.jacobian import (
    EXACT_OUTPUTS,
    differentiable,
    first_embedding,
    jacobian_norms,
    jacobian_singular_values,
    linearise,
    projected_sq_norms,
    spectral_norms,
)
from ..autodiff.untouched import measuring
from ..collect.snapshot import Snapshot
from ..errors import check_number
from ..record.readings import Quantity, Reading
from ..stats.estimators import Reference
from .base import Estimate, Numbers, Observable
from .schedules import Schedule

__all__ = [
    "JacobianNorm",
    "jacobian_norms",
    "jacobian_singular_values",
]


def _norm_says(reading: Reading, others: Mapping[str, Reading]) -> str:
    return (
        "mean change of the logits per unit change of the input; a steady rise means growing "
        "sensitivity to input noise."
    )


@dataclass(frozen=True, kw_only=True)
class JacobianNorm(Observable):
    """Norms of the input-output Jacobian on the probe.

    Errors are those of the random projections; the exact norm (up to 16 outputs, or
    ``num_projections=None`` there) has error 0 on its probe.

    Args:
        schedule: When it is recorded; every 250 steps by default.
        sampling: When it is sampled in between, for an averaging estimator.
        estimator: How records are averaged; the last one by default.
        num_projections: Orthonormal projections per example; exact up to 16 outputs and 2 beyond when
            ``None``.
        seed: Seed of the projections; the step is added, so that errors of different steps are
            independent and a resumed run draws the same.

    Units:
        outputs / inputs.

    Source:
        arXiv:1908.02729.

    Shapes:
        Scalars.

    Example:
        >>> JacobianNorm(schedule=100, num_projections=2).due(300)
        True
    """

    group: ClassVar[str] = "jacobian"
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "frobenius_norm": Quantity(
            "output/input",
            "Mean over the probe of the Frobenius norm.",
            verdict=_norm_says,
            chart="input sensitivity (Jacobian)",
            formula="mean over the probe of `‖J‖_F`",
            cost="O backward passes of the probe, or 2 projections beyond 16 outputs",
            source="arXiv:1908.02729",
            tells="mean change of the logits per unit change of the input",
            act="a steady rise at constant accuracy: regularise, or stop",
        ),
        "frobenius_rms": Quantity(
            "output/input",
            "Root of the mean squared Frobenius norm.",
            chart="input sensitivity (Jacobian)",
            formula="`sqrt(mean ‖J‖_F²)`",
            cost="with it",
            source="arXiv:1908.02729",
            tells=(
                "the same, weighted towards sensitive examples; unbiased under projections but for the root"
            ),
            act="far above the mean norm: a few examples dominate",
        ),
        "spectral_norm": Quantity(
            "output/input",
            "Mean over the probe of the largest singular value.",
            chart="input sensitivity (Jacobian)",
            formula="mean largest singular value",
            cost="with it, or up to 20 passes of Lanczos iteration, mostly 6",
            source="arXiv:1711.04735",
            tells="the worst direction; beyond 16 outputs a lower bound, low by about a per cent",
            act="as the Frobenius norm",
        ),
    }

    schedule: Schedule | int = 250
    num_projections: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check both numbers."""
        super().__post_init__()
        check_number("num_projections", self.num_projections, least=1, integer=True, optional=True)
        check_number("seed", self.seed, least=0, integer=True)

    def statistics(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """Means over the probe, and the variance that the projections leave in them."""
        model, x = snapshot.model, snapshot.probe.inputs
        generator = torch.Generator().manual_seed(self.seed + snapshot.step)
        with measuring(model):
            forward, x = differentiable(model, x, snapshot.forward)
            line = linearise(model, x, forward)
            if line.width <= EXACT_OUTPUTS:
                jacobian = line.full().detach().double()
                spectral = torch.linalg.eigvalsh(jacobian @ jacobian.mT)[:, -1].clamp(min=0).sqrt()
            else:
                jacobian, spectral = None, spectral_norms(line, generator).double()
            if jacobian is not None and self.num_projections is None:
                squares = jacobian.flatten(1).square().sum(1, keepdim=True)
                k = line.width
            else:
                k = min(self.num_projections or 2, line.width)
                squares = projected_sq_norms(line, k, generator).detach().double()
        return {**_norm_statistics(squares, k, line.width), "spectral_norm": spectral.mean()}

    def note(self, snapshot: Snapshot) -> str:
        """What the Jacobian is taken with respect to."""
        x = snapshot.probe.inputs
        if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(x)):
            return "with respect to the inputs"
        return f"with respect to the output of {first_embedding(snapshot.model)[0]!r}"

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Both means and the spectral norm."""
        mean, mean_sq = now["norm"], now["square"]
        records = max(reference.samples, 1.0)
        return {
            "frobenius_norm": Estimate(mean, (now["norm_variance"] / records).sqrt()),
            "frobenius_rms": Estimate(
                mean_sq.sqrt(), (now["square_variance"] / records / mean_sq).sqrt() / 2
            ),
            "spectral_norm": now["spectral_norm"],
        }


def _norm_statistics(squares: Tensor, k: int, width: int) -> dict[str, Tensor]:
    r"""Means over examples and the variance left by ``k`` of ``O`` orthonormal directions.

    Orthonormal directions are a sample without replacement: the mean of k of them has variance
    ``s^2/k (O - k)/O`` with ``s^2`` their sample variance, exactly 0 at ``k = O``.
    """
    per_example = squares.mean(1)
    if k == width:
        variance = torch.zeros_like(per_example)
    elif squares.shape[1] < 2:
        variance = torch.full_like(per_example, torch.nan)
    else:
        variance = squares.var(1) / k * (width - k) / width
    count, tiny = len(squares), torch.finfo(squares.dtype).tiny
    return {
        "norm": per_example.sqrt().mean(),
        "norm_variance": (variance / (4 * per_example.clamp(min=tiny))).sum() / count**2,
        "square": per_example.mean(),
        "square_variance": variance.sum() / count**2,
    }
