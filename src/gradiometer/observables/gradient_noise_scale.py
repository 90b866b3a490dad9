"""The gradient noise scale: how large a batch must be before its gradient is mostly signal.

Two different quantities carry the name. ``B_simple = tr(Sigma) / |G|^2`` is a number of examples and
knows nothing of the learning rate; SGD's ``g = eps N / 2B`` is the temperature of the optimizer's own
noise. They are reported under separate names and never share an axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..autodiff.per_example import per_example_grad_norms
from ..collect.snapshot import GradientParts, Snapshot
from ..errors import InputError, SampleSkippedError, check_choice, check_flag
from ..optimizers import GroupSettings
from ..parallel import world_size
from ..record.readings import Quantity, Reading, sibling
from ..stats.estimators import Estimator, Reference, Window
from ..stats.noise_scale import (
    BATCH,
    gradient_noise_scale,
    of_training_set,
    sgd_noise_scale,
    solve,
)
from .base import Estimate, Numbers, Observable, Sample
from .noise_parts import check_one_gradient, comparable, moments_like
from .noise_resolution import (
    OF_THE_DATA_SET,
    beside_data_set,
    critical_fraction,
    not_measured,
    population,
    ratio_of_scales,
    resolved_scale,
)
from .relations import CrossCheck, differs
from .schedules import Schedule

__all__ = [
    "GradientNoiseScale",
    "gradient_noise_scale",
    "per_example_grad_norms",
    "sgd_noise_scale",
]


SCALE, SCALE_LOWER_BOUND, CRITICAL_BATCH_FRACTION = "scale", "scale_lower_bound", "critical_batch_fraction"
TRACE, GRAD_SQ_NORM, BATCH_GRAD_SQ_NORM = "trace", "grad_sq_norm", "batch_grad_sq_norm"
SOURCE_RATIO = "source_ratio"
SMALL_BATCH, LARGE_BATCH = 0.1, 0.9
"""Critical-batch fraction below the first is noise-limited, above the second wasteful."""
WITHOUT_REPLACEMENT = "batches are drawn without replacement"
"""Part of a note that a verdict looks for."""
LEAST_COVERAGE = 0.5
"""Share of the parameters below which the scale would be that of the layers that happen to be seen."""


def _reduction(loss_reduction: str) -> str:
    return f"loss_reduction={loss_reduction}"


def _coverage(share: float) -> str:
    return f"over {100 * share:.0f} % of parameters"


def of_mean_loss(reading: Reading) -> bool:
    """Whether a reading's note says that the loss is a mean over the batch.

    Args:
        reading: One of :class:`GradientNoiseScale`.
    """
    return _reduction("mean") in reading.note


def of_all_parameters(reading: Reading) -> bool:
    """Whether a reading's note says that it covers all parameters.

    Args:
        reading: One of :class:`GradientNoiseScale`.
    """
    return _coverage(1.0) in reading.note


def _scale_says(reading: Reading, others: Mapping[str, Reading]) -> str:
    if reading.why:
        return f"{reading.why}."
    if OF_THE_DATA_SET in reading.note:
        return "about as large as the data set: the noise of the whole set is all that can be seen of it."
    reached = others.get(sibling(reading.key, CRITICAL_BATCH_FRACTION))
    fraction = reached.number if reached is not None else math.nan
    if fraction < SMALL_BATCH:
        return "noise-limited: a batch up to this size would save steps almost in proportion."
    if fraction > LARGE_BATCH:
        return "the batch is larger than the noise asks for: smaller ones would cost few extra steps."
    return "the batch is of the order of the noise scale: a balanced choice."


def _heat_says(reading: Reading, others: Mapping[str, Reading]) -> str:
    if WITHOUT_REPLACEMENT in reading.note:
        return (
            f"{reading.sentence} Batches are drawn without replacement, so directions that need longer than "
            "an epoch to relax are colder than this."
        )
    return reading.sentence


def _contradicted_by_second_source(readings: Mapping[str, Reading], groups: Sequence[GroupSettings]) -> str:
    """The trace from ``cross_check`` against that from the first source."""
    ratio = readings.get(GradientNoiseScale.key(SOURCE_RATIO))
    if ratio is None or not differs(ratio, 1.0, 0.0):
        return ""
    return (
        f"two sources of the noise scale disagree: the trace from the second is {ratio.number:.3g} +- "
        f"{ratio.stderr:.2g} times that from the first ({ratio.note}). One of them does not see the "
        "gradient that trains the model."
    )


Source = Literal["auto", "per example", "norm layers", "split batch"]
_FIELDS: Mapping[str, str] = {
    "auto": "gradient_parts",
    "per example": "example_parts",
    "norm layers": "norm_layer_parts",
    "split batch": "split_parts",
}


FIRST, FULL, CHECK, PRECONDITIONED = "first", "full", "check", "preconditioned"
"""Rows of the statistics: the source asked for, the one that calibrates it, the one that checks it, and the
first or the calibrating one in the optimizer's metric."""


def _first_at(other: str) -> str:
    """Row of what the first source says of the steps at which there is the other."""
    return f"{FIRST} at {other}"


@dataclass(frozen=True, kw_only=True)
class GradientNoiseScale(Observable):
    """B_simple from the best source the run offers, and SGD's own noise scale beside it.

    The source is the micro-batches of gradient accumulation and the processes of data-parallel training
    or, without either, the single examples seen by riding along with the forward and backward pass, or
    pieces of a batch that is split where the loss is known (read off its graph, or ``Monitor(loss_fn=...)``)
    and the model couples examples, or shows them for less than half of its parameters. Its name, the loss
    reduction and the share of parameters covered are part of every reading. Weight decay inside the
    optimizer is not part of the gradient measured here.

    Noise and gradient are those of the training set. Where batches are drawn from it without replacement,
    no two examples of a step are the same, on all processes together, and readings are corrected for that,
    see ``of_training_set``; this takes ``Monitor(dataset_size=, replacement=False)``, which the Lightning
    callback finds out by itself. Where it is not known how batches are drawn, or from how many examples,
    nothing is corrected: readings are those of the distribution that the examples were drawn from. The note
    says which of the two.

    B_simple is a ratio of averages with Fieller's interval. Where the squared gradient is within two
    standard errors of zero it is not resolved: the reading is ``nan``, and its lower bound stands.

    The preconditioned readings are the same for the gradient times ``1 / (sqrt(v) + eps)``, from the state
    before the step: what Adam makes of it. They do not depend on how layers are scaled against one another.

    Args:
        schedule: When it is sampled and recorded; every 50 steps by default.
        sampling: When it is sampled in between.
        estimator: Average over steps; the last 1,000 steps by default.
        source: ``"auto"``, or one of ``"per example"``, ``"norm layers"`` and ``"split batch"``. Norm
            layers alone are sampled cheaply (with ``sampling=``) and calibrated at every record against
            the source that ``"auto"`` takes.
        cross_check: A second source, measured at recording steps. Where it covers other parameters than
            the first, the two cannot be compared; where it cannot be had, the first stands alone.
        preconditioned: Whether to measure in the metric of Adam or AdamW too; with norm layers at
            recording steps only. Under another optimizer these readings are ``nan``.

    Units:
        See ``quantities``.

    Source:
        arXiv:1812.06162, arXiv:1710.06451; norm layers: arXiv:2411.00999; intervals: Fieller 1954,
        Journal of the Royal Statistical Society B 16:175.

    Shapes:
        Scalars, in total and per section of parameters.

    Raises:
        InputError: An unknown source, or one that is checked against itself.

    Example:
        >>> GradientNoiseScale(schedule=20, estimator=Window(500)).group
        'noise'
    """

    group: ClassVar[str] = "noise"
    default_estimator: ClassVar[type[Estimator]] = Window
    of_batch: ClassVar[bool] = True
    restarts: ClassVar[frozenset[str]] = frozenset({"parameters"})
    checks: ClassVar[Mapping[str, CrossCheck]] = {SOURCE_RATIO: _contradicted_by_second_source}
    quantities: ClassVar[Mapping[str, Quantity]] = {
        SCALE: Quantity(
            "samples",
            "B_simple, the batch at which noise and signal balance.",
            verdict=_scale_says,
            chart="batch size right? (noise scale)",
            formula="`B_simple = tr(Sigma) / ‖G‖²`, ratio of averages",
            cost="hooks on one training step",
            source="arXiv:1812.06162, appendix A",
            tells="the batch at which noise and signal balance",
            act="far above the batch: larger batches save steps; far below: they are wasted",
        ),
        SCALE_LOWER_BOUND: Quantity(
            "samples",
            "Lower end of the 95 % interval of B_simple.",
            formula="lower end of Fieller's 95 % interval",
            cost="with it",
            source="Fieller 1954",
            tells="what is known of `B_simple` where it is not resolved",
        ),
        TRACE: Quantity(
            "loss^2/parameter^2 samples",
            "Trace of the per-example covariance.",
            formula="`tr(Sigma)`, covariance of the per-example gradient",
            cost="with it",
            source="arXiv:1812.06162, appendix A",
            tells="size of the noise",
        ),
        GRAD_SQ_NORM: Quantity(
            "loss^2/parameter^2",
            "Squared norm of the true gradient.",
            formula="`‖G‖²`, unbiased",
            cost="with it",
            source="arXiv:1812.06162, appendix A",
            tells="size of the signal; an average at or below 0 means not resolved",
            act="average longer",
        ),
        BATCH_GRAD_SQ_NORM: Quantity(
            "loss^2/parameter^2",
            "Squared norm of the batch gradient.",
            formula=(
                "mean of `‖g_B‖²`, which is `‖G‖² + tr(Sigma)/B`, or `‖G‖² + tr(Sigma)/B (N - B)/(N - 1)` "
                "without replacement"
            ),
            cost="with it",
            source="arXiv:1812.06162, appendix A",
            tells=(
                "what the update is made of; at a stationary state of plain SGD `eta/2` times it is "
                "FDR1's right side"
            ),
        ),
        CRITICAL_BATCH_FRACTION: Quantity(
            "1",
            "B / (B + B_simple), near 1 for wasteful batches.",
            chart="critical batch fraction",
            formula="`B / (B + B_simple)`",
            cost="with it",
            source="arXiv:1812.06162",
            tells="share of the best possible progress per step that this batch reaches",
            act="below 0.1 noise-limited, above 0.9 wasteful",
        ),
        "sgd_scale": Quantity(
            "parameter^2/loss samples",
            "SGD's g = eps N / 2B with momentum.",
            verdict=_heat_says,
            chart="SGD noise scale",
            formula="`g = eps (1 - nu) / (2 (1 - mu)) (N - B)/B N/(N - 1)`, of the last record",
            cost="none",
            source="arXiv:1710.06451; arXiv:1711.00489",
            tells="strength of SGD's own noise; only for `torch.optim.SGD` and a data set of known size",
            act="cut it by lowering the rate or raising the batch",
        ),
        "temperature": Quantity(
            "loss",
            "Temperature of SGD's noise per parameter, mean loss.",
            verdict=_heat_says,
            chart="SGD temperature",
            formula="`g tr(Sigma) / (N P)`, with `g` as above",
            cost="with scale",
            source="arXiv:1710.06451",
            tells="noise per parameter for the mean loss",
            act="sets the floor of the loss at this rate",
        ),
        "norm_layer_factor": Quantity(
            "1",
            "B_simple of all parameters over that of the norm layers.",
            formula="`B_simple` of all parameters over that of the norm layers",
            cost="with scale",
            source="arXiv:2411.00999",
            tells='only with `source="norm layers"`: the measured calibration',
            act="far from steady: take another source",
        ),
        SOURCE_RATIO: Quantity(
            "1",
            "Trace from the second source over that from the first.",
            formula="`tr(Sigma)` from `cross_check` over that from the first source",
            cost="that of the second source",
            source="arXiv:1812.06162",
            tells=(
                "only with `cross_check=`: 1 within its error; `nan` where the two cover different parameters"
            ),
            act="further than four errors from 1: one of the sources is wrong here",
        ),
        "preconditioned_scale": Quantity(
            "samples",
            "B_simple of the gradient as Adam rescales it.",
            formula="`tr(P Sigma P) / ‖P G‖²`, `P = 1/(sqrt(v) + eps)` before the step",
            cost="up to 0.8 of a training step more than `scale`",
            source="arXiv:1812.06162 in the metric of arXiv:1412.6980",
            tells=(
                "only with `preconditioned=True`, Adam and AdamW: the critical batch of the step Adam "
                "makes; blind to how layers are scaled"
            ),
            act="as `scale`, under Adam",
        ),
        "preconditioned_trace": Quantity(
            "samples",
            "Trace of the covariance as Adam rescales it.",
            formula="`tr(P Sigma P)`",
            cost="with it",
            source="the same",
            tells="size of the noise as Adam rescales it",
        ),
        "preconditioned_grad_sq_norm": Quantity(
            "1",
            "Squared norm of the gradient as Adam rescales it.",
            formula="`‖P G‖²`, unbiased",
            cost="with it",
            source="the same",
            tells="size of the signal as Adam rescales it",
            act="average longer if at or below 0",
        ),
    }

    schedule: Schedule | int = 50
    source: Source = "auto"
    cross_check: Source | None = None
    preconditioned: bool = False

    def __post_init__(self) -> None:
        """Refuse sources that do not exist."""
        super().__post_init__()
        check_choice("source", self.source, list(_FIELDS))
        check_choice("cross_check", self.cross_check, [*_FIELDS, None])
        check_flag("preconditioned", self.preconditioned)
        if self.cross_check == self.source:
            raise InputError(
                "a source cannot be checked against itself",
                got=repr(self.source),
                fix='Write cross_check="per example" or "split batch".',
            )

    @property
    def _others(self) -> dict[str, str]:
        """Snapshot fields of the sources that are measured once for each record, by row."""
        fields = {FULL: _FIELDS["auto"]} if self.source == "norm layers" else {}
        return fields | ({CHECK: _FIELDS[self.cross_check]} if self.cross_check is not None else {})

    @property
    def _rows(self) -> list[str]:
        """What stands along the axis of the sources."""
        others = [row for other in self._others for row in (other, _first_at(other))]
        return [FIRST, *others, *([PRECONDITIONED] if self.preconditioned else [])]

    @property
    def _main(self) -> str:
        """The row that is read."""
        return FULL if self.source == "norm layers" else FIRST

    def required(self, thorough: bool) -> frozenset[str]:
        """The parts of the batch; those that calibrate or check once for each record."""
        fields = {_FIELDS[self.source], *(self._others.values() if thorough else ())}
        if self.preconditioned and (thorough or self.source != "norm layers"):
            fields.add("preconditioner")
        return frozenset(fields)

    @property
    def optional(self) -> frozenset[str]:
        """The second source and the metric: without either the scale itself stands."""
        check = {_FIELDS[self.cross_check]} if self.cross_check is not None else set()
        return frozenset({"preconditioner"} | check - {_FIELDS[self.source], self._others.get(FULL)})

    @property
    def names(self) -> frozenset[str]:
        """All, without those that rest on a source or a metric that is not asked for."""
        asked = {
            "norm_layer_factor": self.source == "norm layers",
            "source_ratio": self.cross_check is not None,
            "preconditioned_scale": self.preconditioned,
            "preconditioned_trace": self.preconditioned,
            "preconditioned_grad_sq_norm": self.preconditioned,
        }
        return frozenset(name for name in self.quantities if asked.get(name, True))

    def statistics(self, snapshot: Snapshot) -> Sample:
        """Moments of every source at this step, and the settings they go with.

        Each source has a weight of its own beside that of the step: 0 where it was not measured.
        """
        first: GradientParts = getattr(snapshot, _FIELDS[self.source])
        if len(first.sq_norms) * first.processes < 2:
            raise SampleSkippedError(
                "the noise scale needs at least two parts of a batch",
                got=len(first.sq_norms),
                fix="This step is left out; use batches of two or more examples, or accumulate.",
            )
        rows = self._measured(snapshot, first)
        moments, weights, parameters, coverage = zip(*(rows[name] for name in self._rows), strict=True)
        statistics = {
            "moments": torch.stack(moments),
            "source_weight": torch.stack(weights),
            "parameters": torch.stack(parameters),
            "coverage": torch.stack(coverage),
        }
        settings = {"batch_size": float(snapshot.batch_size), **_heat(snapshot)}
        if snapshot.has("dataset_size"):
            settings["dataset_size"] = float(snapshot.dataset_size)
        share, _ = population(snapshot)
        if share is not None:
            settings["example_share"] = share
        if first.sums is not None:
            statistics["sums"] = first.sums
        for name, value in settings.items():
            statistics[name] = first.sq_norms.new_full((), value)
        return Sample(statistics, first.weight)

    def _measured(self, snapshot: Snapshot, first: GradientParts) -> dict[str, tuple[Tensor, ...]]:
        """Moments, weight, parameters and coverage by row; zeros where a source was not measured."""
        absent = torch.zeros_like(first.weight)
        moments = moments_like(first, first)
        rows = {FIRST: (first, torch.ones_like(first.weight))}
        for other, field in self._others.items():
            parts = getattr(snapshot, field) if snapshot.has(field) else None
            if other == CHECK and parts is not None and not comparable(first, parts):
                parts = None
            weight = absent if parts is None else parts.weight
            rows |= {other: (parts or first, weight), _first_at(other): (first, weight)}
        if self.preconditioned:
            field = self._others.get(FULL, _FIELDS[self.source])
            parts = getattr(snapshot, field).preconditioned if snapshot.has(field) else None
            rows[PRECONDITIONED] = (parts or first, absent if parts is None else parts.weight)
        return {
            name: (
                (moments if parts is first else moments_like(parts, first)) * weight,
                weight,
                parts.parameters * weight,
                parts.coverage * weight,
            )
            for name, (parts, weight) in rows.items()
        }

    def note(self, snapshot: Snapshot) -> str:
        """Source, reduction, coverage, sampling, and whose noise it is."""
        parts: GradientParts = getattr(snapshot, _FIELDS[self.source])
        text = f"{parts.source}, {_reduction(snapshot.loss_reduction)}, {_coverage(parts.coverage)}"
        if parts.skipped:
            names = sorted(parts.skipped)
            text += f"; skipped: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        if snapshot.has("replacement") and not snapshot.replacement:
            text += f"; {WITHOUT_REPLACEMENT}"
        text += f"; {population(snapshot)[1]}"
        if parts.note:
            text += f"; {parts.note}"
        if self.cross_check is not None and snapshot.has(_FIELDS[self.cross_check]):
            other: GradientParts = getattr(snapshot, _FIELDS[self.cross_check])
            verb = "checked against" if comparable(parts, other) else "not comparable with"
            text += f"; {verb}: {other.source}, {_coverage(other.coverage)}"
        return text

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Ratios of the averages with their intervals, in total and per section."""
        if "sums" in now:
            check_one_gradient(now["sums"][0])
        weights, batch = reference.weights, float(now["batch_size"][0])
        traces, signals = self._solved(now, self._main)
        main = self._rows.index(self._main)
        readings = _of_sections(now["parameters"][0, main], traces, signals, weights, batch)
        trace, signal = traces.sum(-1), signals.sum(-1)
        readings |= {"trace": trace, "grad_sq_norm": signal}
        coverage = float(now["coverage"][0, main] / now["source_weight"][0, main])
        batch_sq_norm = now["moments"][:, main, BATCH].sum(-1)
        readings["batch_grad_sq_norm"] = batch_sq_norm / now["source_weight"][:, main]
        above, below = trace, signal
        if self._main == FULL:
            all_trace, all_signal = self._total(now, FIRST)
            paired_trace, paired_signal = self._total(now, _first_at(FULL))
            readings["norm_layer_factor"] = ratio_of_scales(
                resolved_scale(trace, signal, weights, batch)["scale"],
                resolved_scale(paired_trace, paired_signal, weights, batch)["scale"],
            )
            above, below = all_trace * trace * paired_signal, all_signal * signal * paired_trace
        scales = resolved_scale(above, below, weights, batch)
        if coverage < LEAST_COVERAGE:
            unseen = not_measured(f"single parts of the batch show {100 * coverage:.0f} % of the parameters")
            scales = dict.fromkeys((*scales, CRITICAL_BATCH_FRACTION), unseen)
        elif "dataset_size" in now and "example_share" not in now:
            scales["scale"] = beside_data_set(scales["scale"], float(now["dataset_size"][0]))
        readings[CRITICAL_BATCH_FRACTION] = critical_fraction(now["batch_size"], scales["scale"])
        readings |= scales
        readings |= self._noise_of_sgd(now, reference, trace)
        if self.cross_check is not None:
            readings["source_ratio"] = self._total(now, CHECK)[0] / self._total(now, _first_at(CHECK))[0]
        if self.preconditioned:
            trace, signal = self._total(now, PRECONDITIONED)
            readings |= {"preconditioned_trace": trace, "preconditioned_grad_sq_norm": signal}
            readings["preconditioned_scale"] = resolved_scale(trace, signal, weights, batch)["scale"]
        return readings

    def _solved(self, now: Mapping[str, Tensor], row: str) -> tuple[Tensor, Tensor]:
        """Trace and squared gradient of a source by section, ``[R, U]``."""
        index = self._rows.index(row)
        trace, signal = solve(now["moments"][:, index], now["source_weight"][:, index])
        if "example_share" not in now:
            return trace, signal
        return of_training_set(trace, signal, now["example_share"][:, None])

    def _total(self, now: Mapping[str, Tensor], row: str) -> tuple[Tensor, Tensor]:
        """The same over all sections, ``[R]``."""
        trace, signal = self._solved(now, row)
        return trace.sum(-1), signal.sum(-1)

    def _noise_of_sgd(
        self, now: Mapping[str, Tensor], reference: Reference, trace: Tensor
    ) -> dict[str, Estimate]:
        """SGD's own noise scale and temperature, where its steps are known."""
        readings = {}
        if "sgd_scale" in now:
            readings["sgd_scale"] = Estimate(_latest("sgd_scale", reference), 0.0)
        if "heat" in now:
            main = self._rows.index(self._main)
            parameters = now["parameters"][:, main].sum(-1) / now["source_weight"][:, main]
            temperature, epoch = _latest("heat", reference) / parameters * trace, ""
            if "dataset_size" in now:  # of the usual batch, not of a short one at the end of an epoch
                epoch = f"{float((now['dataset_size'] / now['batch_size'])[0]):.3g} batches per epoch"
            readings["temperature"] = Estimate(temperature, note=epoch)
        return readings


BATCH_GRAD_SQ_NORM_KEY = GradientNoiseScale.key(BATCH_GRAD_SQ_NORM)
"""For the relation that another observable checks it by."""


def _of_sections(
    covered: Tensor, traces: Tensor, signals: Tensor, weights: Tensor, batch: float
) -> dict[str, Tensor | Estimate]:
    """Readings of each section, where there are several; those seen in no part are not measured."""
    readings: dict[str, Tensor | Estimate] = {}
    sections = traces.shape[-1]
    for u in range(sections) if sections > 1 else ():
        if not bool(covered[u]):
            unseen = not_measured("no parameter of this group is seen in parts of the batch")
            readings |= {f"{name}/{u}": unseen for name in (TRACE, GRAD_SQ_NORM, SCALE, SCALE_LOWER_BOUND)}
            continue
        readings |= {f"{TRACE}/{u}": traces[..., u], f"{GRAD_SQ_NORM}/{u}": signals[..., u]}
        scales = resolved_scale(traces[..., u], signals[..., u], weights, batch)
        readings |= {f"{name}/{u}": value for name, value in scales.items()}
    return readings


def _heat(snapshot: Snapshot) -> dict[str, float]:
    """SGD's noise scale, and the temperature per unit of trace and parameter."""
    first = snapshot.groups[0]
    alike = len({(group.lr, group.momentum, group.dampening) for group in snapshot.groups}) == 1
    if not alike or not all(group.is_sgd for group in snapshot.groups):
        return {}
    # a summed loss makes every gradient, and so every step, B times that of the mean loss
    own_batch = snapshot.batch_size / world_size()  # processes average their gradients
    lr = first.lr * (own_batch if snapshot.loss_reduction == "sum" else 1) * (1 - first.dampening)
    if not snapshot.has("dataset_size"):
        return {"heat": lr / (2 * snapshot.batch_size * (1 - first.momentum))}
    replacement = snapshot.has("replacement") and snapshot.replacement
    size = min(snapshot.batch_size, snapshot.dataset_size)
    scale = sgd_noise_scale(lr, snapshot.dataset_size, size, first.momentum, replacement=replacement)
    return {"sgd_scale": scale, "heat": scale / snapshot.dataset_size}


def _latest(name: str, reference: Reference) -> float:
    """A setting as it was at the last records, since settings are not averaged."""
    weights = reference.block_weights
    return float(reference.block_means[name][-1]) if weights[-1] else math.nan
