"""How this step's gradient lies to the last one's: along it, across it, or against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..collect.snapshot import Snapshot
from ..record.readings import Quantity
from ..stats.estimators import Estimator, Reference, Window
from .base import Numbers, Observable
from .schedules import Schedule

__all__ = ["GradientCosine"]


@dataclass(frozen=True, kw_only=True)
class GradientCosine(Observable):
    r"""Cosine between the gradients of two steps in a row, over a window.

    .. math:: \frac{\langle g_t \cdot g_{t-1}\rangle}
              {\sqrt{\langle |g_t|^2\rangle\, \langle |g_{t-1}|^2\rangle}}

    Averages are taken first and the ratio last. Where batches are independent and the weights move little,
    the inner product is that of the true gradient with itself, so the value is about ``B / (B + B_simple)``,
    as ``noise/critical_batch_fraction``. Below 0 the steps jump to and fro across a valley.

    Args:
        schedule: When it is recorded; every 50 steps by default.
        sampling: When it is sampled in between; every 10 steps by default.
        estimator: Average over steps; the last 1,000 steps by default.

    Units:
        None.

    Source:
        The gradient's noise in it: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1; a negative value
        at the edge of stability: Cohen et al. 2021, arXiv:2103.00065.

    Shapes:
        Scalars, in total and per section of parameters.

    Example:
        >>> [step for step in range(40) if GradientCosine(schedule=20).samples(step)]    # drawn, with a seed
        [0, 5, 16, 22, 33]
    """

    group: ClassVar[str] = "gradient_cosine"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "previous_gradient"})
    default_estimator: ClassVar[type[Estimator]] = Window
    of_batch: ClassVar[bool] = True
    restarts: ClassVar[frozenset[str]] = frozenset({"parameters"})
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "cosine": Quantity(
            "1",
            "Cosine between this step's gradient and the previous step's.",
            formula="`<g_t . g_(t-1)> / sqrt(<‖g_t‖²> <‖g_(t-1)‖²>)`, unclipped",
            cost="two copies of the gradient and three inner products",
            source="arXiv:1812.06162, appendix A.1; arXiv:2103.00065",
            tells="with independent batches about `B / (B + B_simple)`, the share of signal in the squared "
            "gradient; below 0: steps jump to and fro across a valley",
            act="below 0: lower the learning rate",
        ),
    }

    schedule: Schedule | int = 50
    sampling: Schedule | int | None = 10

    def statistics(self, snapshot: Snapshot) -> dict[str, Tensor] | None:
        """Inner products of both gradients, per section; none at the first step."""
        gradient, previous = snapshot.gradient, snapshot.previous_gradient
        if previous is None:
            return None
        return {
            "dot": gradient.dot(previous),
            "sq_norm": gradient.dot(gradient),
            "previous_sq_norm": previous.dot(previous),
        }

    def note(self, snapshot: Snapshot) -> str:
        """Which gradients these are."""
        del snapshot
        return "unclipped gradients of whole batches"

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """The ratio of the averages, in total and per section."""
        del reference
        norms = (now["sq_norm"], now["previous_sq_norm"])
        readings = {"cosine": now["dot"].sum(-1) / (norms[0].sum(-1) * norms[1].sum(-1)).sqrt()}
        sections = now["dot"].shape[-1]
        for u in range(sections) if sections > 1 else ():
            readings[f"cosine/{u}"] = now["dot"][..., u] / (norms[0][..., u] * norms[1][..., u]).sqrt()
        return readings
