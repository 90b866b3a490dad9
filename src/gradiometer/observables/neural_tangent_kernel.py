"""The empirical neural tangent kernel on a fixed probe, and how far it has moved.

``Theta[a, b] = sum_p (df(x_a)/dp) (df(x_b)/dp)``. A kernel that stays put means lazy training; one that
turns towards the targets means features are being learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _NormBase

from ..autodiff.empirical_ntk import EXACT_OUTPUTS, MODES, empirical_ntk, probed_kernel
from ..autodiff.factors import Mode
from ..autodiff.functional import examples, take
from ..collect.snapshot import Probe, Snapshot
from ..errors import check_choice, check_flag, check_number
from ..record.readings import Quantity, Reading, sibling
from ..stats.estimators import Reference
from ..stats.jackknife import delete_block_jackknife
from ..stats.kernel_geometry import (
    angle_between,
    centred,
    cosine,
    distance_between,
    drift_between,
    effective_rank,
    kernel_alignment,
    kernel_angle,
    kernel_distance,
    projection_stderr,
    relative_drift,
    rescaled_parts,
    spread_of_projections,
    target_kernel,
)
from .base import Estimate, Numbers, Observable
from .schedules import Schedule, every, log_spaced

__all__ = [
    "NeuralTangentKernel",
    "empirical_ntk",
    "kernel_alignment",
    "kernel_angle",
    "kernel_distance",
    "projection_stderr",
    "relative_drift",
]

_REPLICATES = 64
"""Kernels held at a time in the jackknife over examples."""


LAZY, FEATURES = 0.005, 0.02
"""Turning beyond changes of scale: below the first training is lazy, above the second features are learned.
Half the squared change across the kernel's direction, where that is a tenth and a fifth of its size."""
_FEW = 32
"""Examples of the probe on which the layers' shares are kept from record to record."""
_COLD = 0.05
"""Share of running statistics' first value that may be left in them where a kernel is compared with."""
_COLD_START = "batch norm's running statistics had not warmed up when the first kernel was taken"


def _features_say(reading: Reading, others: Mapping[str, Reading]) -> str:
    if _COLD_START in reading.note:
        return (
            f"cannot tell: {_COLD_START}. Begin later, as with NeuralTangentKernel(schedule=at([100, 1000]))."
        )
    error = 2 * reading.stderr if math.isfinite(reading.stderr) else 0.0
    if reading.number - error > FEATURES:
        return "learning features: the kernel has turned as no change of scale could turn it."
    if reading.number + error >= LAZY:
        return "between lazy and feature learning."
    drift = others.get(sibling(reading.key, "drift"))
    if drift is not None and drift.number > RESCALED:
        return "lazy so far: the kernel has changed in scale and kept its direction."
    return "lazy so far: the kernel is close to its first value; the network acts like a linear model."


RESCALED = 0.1
"""Relative kernel drift above which the kernel is not called close to its first value."""


@dataclass(frozen=True, kw_only=True)
class NeuralTangentKernel(Observable):
    """The kernel on the probe: drift, distance, angular velocity, alignment, spectrum.

    Errors are those of the probe: a delete-one-example jackknife, which says how much the reading would
    change on other examples of the same kind; that of ``trace`` has the error of random projections in
    it, where these are used. The spectrum depends on the number of examples and has none.

    Args:
        schedule: When it is recorded: steps 0, 1, 2, 5, 10, ... 1,000 and then every 500 by default.
        sampling: Not used: a kernel is a state function.
        estimator: Not used beyond keeping the first and the previous kernel.
        outputs: ``"trace"``, ``"diagonal"`` or ``"full"``, see :func:`empirical_ntk`.
        num_projections: Random output projections; exact up to 16 outputs and 8 beyond when ``None``.
        preconditioned: Weigh squared derivatives with the optimizer's step per unit of gradient (learning
            rates relative to the first group's, for Adam times ``1/(sqrt(v) + eps)``): the kernel that
            moves the outputs. Its group is ``preconditioned_ntk``, so that both can be recorded.
        max_memory: Bytes that may be taken, see :func:`empirical_ntk`.
        seed: Seed of the projections, the same at all steps so that drift is not masked.

    Units:
        See ``quantities``.

    Source:
        arXiv:1806.07572, arXiv:2010.15110.

    Shapes:
        The kernel is ``[N, N]`` for the trace, see :func:`empirical_ntk` for the others.

    Example:
        >>> NeuralTangentKernel(schedule=500, outputs="full").group
        'ntk'
    """

    group: ClassVar[str] = "ntk"
    level_needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    arrays: ClassVar[frozenset[str]] = frozenset({"kernel", "spectrum"})
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "drift": Quantity(
            "1",
            "Relative Frobenius distance of the kernel from the first one.",
            chart="kernel drift",
            formula="`‖Theta - Theta_0‖_F / ‖Theta_0‖_F`",
            cost=(
                "O backward passes of the probe (8 beyond 16 outputs), and about as much again in products"
            ),
            source="arXiv:1902.06720",
            tells="it sees scale as well as direction: below 0.1 training is lazy, above it nothing is said",
            act="as `feature_change`",
        ),
        "feature_change": Quantity(
            "1",
            "Turning of the kernel that no change of the layers' scales explains.",
            verdict=_features_say,
            chart="learning features? (turning beyond scale)",
            formula=(
                "one minus the cosine with the nearest sum of the layers' first kernels, each times a factor "
                "of 0 or more; on the first 32 examples, without layers of one parameter"
            ),
            cost="with drift; a second kernel of 32 examples where the probe is larger",
            source="distance of arXiv:2010.15110 from a sum of rescaled parts",
            tells=(
                "below 0.005 training is lazy, above 0.02 features are learned; a gain, a temperature, decay "
                "or a last layer that grows does not move it"
            ),
            act="lazy and not meant to be: raise the learning rate, or train a narrower or deeper network",
        ),
        "distance": Quantity(
            "1",
            "One minus the cosine with the first kernel; blind to scale.",
            chart="kernel direction",
            formula="`1 - <Theta, Theta_0> / (‖Theta‖ ‖Theta_0‖)`",
            cost="with drift",
            source="arXiv:2010.15110",
            tells=(
                "turning of the kernel, blind to its scale; quadratic in small changes, so do not "
                "compare it with drift"
            ),
            act="as `feature_change`",
        ),
        "velocity": Quantity(
            "rad/step",
            "Angle turned since the last record, per step.",
            chart="kernel velocity",
            formula="`2 asin(sqrt(S / 2)) / steps` between records",
            cost="with drift",
            source="angle of the distance of arXiv:2010.15110",
            tells="how fast the kernel turns, whatever the cadence",
            act="a velocity that has died down means the features are settled",
        ),
        "alignment": Quantity(
            "1",
            "Centred alignment with the targets.",
            chart="kernel direction",
            formula="`<H Theta H, H Y Y^T H> / (norms)`",
            cost="with drift",
            source="Cortes et al. 2012, JMLR 13:795",
            tells="how well the kernel knows the targets; absent without targets",
            act="a rise is feature learning in the right direction",
        ),
        "top_eigenvalue": Quantity(
            "output^2/parameter^2",
            "Largest eigenvalue on the probe.",
            chart="kernel spectrum",
            formula="largest eigenvalue on the probe",
            cost="with drift",
            source="arXiv:1902.06720",
            tells=(
                "with one output, full-batch gradient descent on half the mean squared error is stable "
                "for `eta < 2 N / lambda_max`, on `nn.MSELoss` for half of that"
            ),
            act='keep the learning rate below it for that loss; with several outputs use `outputs="full"`',
        ),
        "smallest_eigenvalue": Quantity(
            "output^2/parameter^2",
            "Smallest eigenvalue on the probe.",
            chart="kernel spectrum",
            formula="smallest eigenvalue on the probe",
            cost="with drift",
            source="arXiv:1902.06720",
            tells="the slowest direction of linearised training",
            act="near 0: some examples cannot be told apart",
        ),
        "trace": Quantity(
            "output^2/parameter^2",
            "Mean of the kernel's diagonal over examples.",
            chart="kernel spectrum",
            formula="mean of the diagonal",
            cost="with drift",
            source="arXiv:1806.07572",
            tells="overall size of the kernel",
            act="the largest stable rate falls as it grows",
        ),
        "effective_rank": Quantity(
            "1",
            "Number of directions that share the spectrum.",
            formula="`(sum lambda)² / sum lambda²`",
            cost="with drift",
            source="participation ratio",
            tells="how many directions share the kernel; depends on the probe size",
            act="compare runs on one probe only",
        ),
        "off_diagonal": Quantity(
            "1",
            "Share of the norm in blocks between different outputs.",
            formula="norm of the blocks between outputs / norm",
            cost="with drift",
            source="arXiv:2206.12543",
            tells='only with `outputs="full"`; near 0 at initialisation of wide networks',
            act="large: the trace kernel leaves something out",
        ),
        "kernel": Quantity(
            "output^2/parameter^2",
            "The kernel on the probe.",
            formula="the kernel, as an image",
            cost="with drift",
            source="arXiv:1806.07572",
            tells="blocks of one class brighten as features form",
        ),
        "spectrum": Quantity(
            "output^2/parameter^2",
            "Its eigenvalues in ascending order.",
            formula="its eigenvalues, as a histogram",
            cost="with drift",
            source="arXiv:1806.07572",
            tells="how uneven the directions are",
        ),
    }

    not_averaged: ClassVar[frozenset[str]] = Observable.not_averaged | {"max_memory"}

    schedule: Schedule | int = log_spaced(until=1000) | every(500)
    outputs: Mode = "trace"
    num_projections: int | None = None
    preconditioned: bool = False
    max_memory: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the mode and the numbers."""
        super().__post_init__()
        check_choice("outputs", self.outputs, MODES)
        check_number("num_projections", self.num_projections, least=1, integer=True, optional=True)
        check_number("max_memory", self.max_memory, least=1, integer=True, optional=True)
        check_number("seed", self.seed, least=0, integer=True)
        check_flag("preconditioned", self.preconditioned)
        if self.preconditioned:
            object.__setattr__(self, "group", "preconditioned_ntk")
            object.__setattr__(self, "level_needs", self.level_needs | {"step_factors"})
            # it also moves with the optimizer's state, and the charts are those of the plain kernel
            plain = {n: replace(words, verdict=None, chart="") for n, words in self.quantities.items()}
            object.__setattr__(self, "quantities", plain)

    @property
    def names(self) -> frozenset[str]:
        """All; the optimizer's state turns the preconditioned kernel too, whatever the features do."""
        return frozenset(self.quantities) - ({"feature_change"} if self.preconditioned else set())

    def levels(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The kernel at this step, its layers' shares, and the kernel of the targets where there are any."""
        probe = snapshot.probe
        together = not self.preconditioned and self.outputs == "trace" and examples(probe.inputs) <= _FEW
        kernels, width = self._kernels(snapshot, probe.inputs, self.outputs, layers=together)
        kernel = torch.stack([*kernels.values()]).sum(0)
        levels = {"kernel": kernel}
        if self.outputs == "trace" and kernel.ndim == 3:  # one estimate per projection
            levels["kernel"] = kernel.mean(-1)
            levels["projection_error"] = spread_of_projections(kernel.diagonal().mean(-1), width)
        targets = _targets(probe, len(kernel))
        if targets is not None:
            levels["targets"] = target_kernel(targets)
        if not self.preconditioned:
            if not together:
                few = take(probe.inputs, slice(_FEW))
                kernels, _ = self._kernels(snapshot, few, "trace", layers=True)
            levels["layers"] = _shares(snapshot.model, kernels)
            levels["cold"] = kernel.new_full((), _cold(snapshot.model))
        return levels

    def _kernels(
        self, snapshot: Snapshot, inputs: Any, outputs: Mode, *, layers: bool
    ) -> tuple[dict[str, Tensor], int]:
        return probed_kernel(
            snapshot.model,
            inputs,
            outputs=outputs,
            layers=layers,
            num_projections=self.num_projections,
            project_above=EXACT_OUTPUTS if outputs == "trace" else None,
            weights=snapshot.step_factors if self.preconditioned else None,
            generator=torch.Generator().manual_seed(self.seed),
            forward=snapshot.forward,
            max_memory=self.max_memory,
        )

    def note(self, snapshot: Snapshot) -> str:
        """Probe size and mode."""
        return f"{self.outputs} kernel, {examples(snapshot.probe.inputs)} probe examples"

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Everything the kernel says at this step."""
        kernel, first = now["kernel"], reference.first["kernel"]
        previous = reference.previous.get("kernel")
        steps = reference.step - reference.previous_step
        over_examples = _over_examples(kernel)
        flat = _flat(kernel)
        spectrum = torch.linalg.eigvalsh(flat)
        measures: dict[str, Callable[[Tensor], Tensor]] = {
            "drift": lambda keep: drift_between(_keep(kernel, keep), _keep(first, keep)),
            "distance": lambda keep: distance_between(_keep(kernel, keep), _keep(first, keep)),
            "trace": lambda keep: _keep(over_examples, keep).diagonal().mean(),
        }
        if previous is not None and steps > 0:
            measures["velocity"] = lambda keep: (
                angle_between(_keep(kernel, keep), _keep(previous, keep)) / steps
            )
        if "targets" in now:
            targets = now["targets"]
            measures["alignment"] = lambda keep: cosine(
                centred(_keep(over_examples, keep)), centred(_keep(targets, keep))
            )
        if kernel.ndim == 4:
            measures["off_diagonal"] = lambda keep: _off_diagonal(_keep(kernel, keep))
        estimates = _leave_one_out(measures, len(kernel), kernel.device)
        if "projection_error" in now:
            trace, error = estimates["trace"][:2]
            estimates["trace"] = Estimate(trace, torch.hypot(error, now["projection_error"].to(error)))
        exact = {
            "top_eigenvalue": spectrum[-1],
            "smallest_eigenvalue": spectrum[0],
            "effective_rank": effective_rank(spectrum),
            "kernel": flat,
            "spectrum": spectrum,
        }
        return {**estimates, **exact, **_feature_change(now, reference.first)}


def _shares(model: nn.Module, kernels: Mapping[str, Tensor]) -> Tensor:
    """The layers' shares in the kernel, ``[L, N, N]``; a frozen layer's is 0.

    A layer of one parameter, such as a gain or a temperature, turns nothing but the kernel: its share is 0.
    """
    like = _over_examples(next(iter(kernels.values())))
    owners = {path: [*layer.parameters(recurse=False)] for path, layer in model.named_modules()}
    return torch.stack(
        [
            _over_examples(kernels[path])
            if path in kernels and sum(parameter.numel() for parameter in parameters) > 1
            else torch.zeros_like(like)
            for path, parameters in owners.items()
            if parameters
        ]
    )


def _cold(model: nn.Module) -> float:
    """Share of their first value in the running statistics of the layer that has seen the fewest batches."""
    left = [
        (1 - layer.momentum if layer.momentum is not None else 0.0) ** int(layer.num_batches_tracked)
        for layer in model.modules()
        if isinstance(layer, _NormBase) and layer.num_batches_tracked is not None
    ]
    return max(left, default=0.0)


def _feature_change(now: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, Estimate]:
    """How far the kernel has turned from all sums of its layers' rescaled first shares."""
    if "layers" not in now or "layers" not in first:
        return {}
    kernel, nearest = now["layers"].sum(0), rescaled_parts(now["layers"].sum(0), first["layers"])
    turned = {"feature_change": lambda keep: distance_between(_keep(kernel, keep), _keep(nearest, keep))}
    estimates = _leave_one_out(turned, len(kernel), kernel.device)
    if first["cold"] > _COLD:
        estimates["feature_change"] = estimates["feature_change"]._replace(resolved=False, note=_COLD_START)
    return estimates


def _targets(probe: Probe, count: int) -> Tensor | None:
    """The targets that belong to the outputs: of a sequence of tokens, the last position's."""
    targets, inputs = probe.targets, probe.inputs
    if targets is None or len(targets) != count:
        return None
    tokens = isinstance(inputs, Tensor) and not inputs.is_floating_point()
    return targets[:, -1] if tokens and targets.shape == inputs.shape and targets.ndim == 2 else targets


def _over_examples(kernel: Tensor) -> Tensor:
    """The kernel over examples: the mean over outputs where those are kept."""
    if kernel.ndim == 4:
        return kernel.diagonal(dim1=2, dim2=3).mean(-1)
    return kernel.mean(-1) if kernel.ndim == 3 else kernel


def _flat(kernel: Tensor) -> Tensor:
    """One square matrix: ``[N, N]``, or ``[N O, N O]`` for the full kernel."""
    if kernel.ndim == 4:
        n, m, o, _ = kernel.shape
        return kernel.permute(0, 2, 1, 3).reshape(n * o, m * o)
    return _over_examples(kernel)


def _off_diagonal(kernel: Tensor) -> Tensor:
    """Norm of the blocks between different outputs over that of all, ``[N, N, O, O]``."""
    variances = kernel.diagonal(dim1=2, dim2=3)
    return (1 - variances.square().sum() / kernel.square().sum()).clamp(min=0).sqrt()


def _keep(kernel: Tensor, keep: Tensor) -> Tensor:
    return kernel[keep][:, keep]


def _leave_one_out(
    measures: Mapping[str, Callable[[Tensor], Tensor]], count: int, device: torch.device
) -> dict[str, Estimate]:
    """Each measure with its delete-one-example jackknife error."""
    everyone = torch.arange(count, device=device)

    def row(keep: Tensor) -> Tensor:
        return torch.stack([measure(keep) for measure in measures.values()])

    full = row(everyone)
    others = everyone.expand(count, count)[~torch.eye(count, dtype=torch.bool, device=device)].view(
        count, count - 1
    )
    rows = vmap(row, chunk_size=_REPLICATES)(others)
    errors = delete_block_jackknife(full, rows, torch.ones(count, dtype=full.dtype, device=device))
    return {name: Estimate(full[i], errors[i]) for i, name in enumerate(measures)}
