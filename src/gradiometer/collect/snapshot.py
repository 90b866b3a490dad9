"""A frozen view of one moment of training: all that an observable may look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..autodiff.functional import Forward
from ..errors import MissingFieldError
from ..optimizers.base import GroupSettings, ParameterStep
from .gradient import Gradient
from .sections import Section

_SUPPLIED_BY = {
    "probe": "Monitor(probe=...) or the first call of monitor.micro_batch(x, y)",
    **dict.fromkeys(
        ("chunks", "example_chunks", "norm_layer_chunks", "split_chunks"),
        "monitor.micro_batch(x, y) around each forward and backward, then monitor.before_step()",
    ),
    **dict.fromkeys(
        ("curvature", "step_curvature"),
        "Monitor(loss_fn=...) and monitor.micro_batch(x, y), then monitor.before_step()",
    ),
    **dict.fromkeys(("gradient", "previous_gradient"), "monitor.before_step() before the optimizer's step"),
    "update": "monitor.before_step() before the optimizer's step",
    "work": "monitor.before_step() before the optimizer's step",
    "weights": "the optimizer's step itself",
    "centred_weights": "the optimizer's step itself",
    "step_factors": "the optimizer's step itself",
    "parameter_steps": "the optimizer's step itself",
    "batch_size": "monitor.micro_batch(x, y) around each forward and backward",
    "dataset_size": "Monitor(dataset_size=...)",
    "replacement": "Monitor(replacement=...)",
}


@dataclass(frozen=True)
class Probe:
    """The fixed batch on which kernels and Jacobians are evaluated.

    Args:
        inputs: What the model takes, first dimension the examples.
        targets: Their targets, or ``None``.
    """

    inputs: Any
    targets: Tensor | None = None


@dataclass(frozen=True)
class Chunks:
    """Squared gradient norms of parts of one batch, each part's gradient that of its own mean loss.

    Args:
        source: Where the parts come from, in words.
        sq_norms: Squared norm of each part's mean gradient by section, loss scale removed.
        sizes: Examples in each part.
        weights: Share of each part in this process's mean gradient.
        batch_sq_norm: Squared norm of the whole mean gradient over the same parameters, before clipping.
        counted: 1, or 0 where the gradient is not finite and this step must not count.
        parameters: Number of parameters behind these norms by section.
        coverage: Their share of all trainable parameters.
        skipped: Why the others are missing, by parameter name.
        processes: Processes whose parts make up the whole gradient.
        preconditioned: The same in the metric of the optimizer's own steps, where it is asked for.

    Shapes:
        sq_norms ``[k, U]``, sizes and weights ``[k]``, batch_sq_norm and parameters ``[U]``, counted scalar.
    """

    source: str
    sq_norms: Tensor
    sizes: Tensor
    weights: Tensor
    batch_sq_norm: Tensor
    counted: Tensor
    parameters: Tensor
    coverage: float
    skipped: Mapping[str, str]
    processes: int = 1
    preconditioned: Chunks | None = None


@dataclass(frozen=True)
class Curvature:
    """Products of distinct parts of one batch, each part with a gradient, a step and a Hessian of its own.

    The steps are the gradients themselves, or what the optimizer makes of them.

    Args:
        gram: Inner product of each part's step with each part's gradient.
        step_gram: Inner products of the parts' steps.
        forms: The same through the Hessian of a third part, at ``[Hessian, step, step]``.
        sizes: Examples in each part.
        noise_share: Variance of the gradient that makes the step over that of one example, 1 / B.
        counted: 1, or 0 where something is not finite and this step must not count.

    Shapes:
        gram and step_gram ``[k, k]``, forms ``[k, k, k]``, sizes ``[k]``, counted scalar.
    """

    gram: Tensor
    step_gram: Tensor
    forms: Tensor
    sizes: Tensor
    noise_share: float
    counted: Tensor


@dataclass(frozen=True)
class Update:
    """The update of one step, by section.

    Args:
        displacement_sq: Squared norm of ``theta_t - theta_{t+1}``.
        displacement_dot_velocity: Its inner product with torch's momentum buffer under Nesterov, else
            ``None``.

    Shapes:
        Each ``[U]``.
    """

    displacement_sq: Tensor
    displacement_dot_velocity: Tensor | None = None


@dataclass(frozen=True)
class Work:
    """Inner products with the weights before the step, by section; for verification.

    Args:
        weight_dot_gradient: ``theta_t . g_t`` with the gradient the optimizer used, L2 term included;
            ``nan`` for optimizers other than SGD.
        weight_dot_displacement: ``theta_t . (theta_t - theta_{t+1})``.

    Shapes:
        Each ``[U]``.
    """

    weight_dot_gradient: Tensor
    weight_dot_displacement: Tensor


@dataclass(frozen=True)
class Weights:
    """State functions of the weights after the step, by section.

    Args:
        sq_norm: Squared norm of the weights.
        dot_velocity: Inner product of the weights with torch's momentum buffer, 0 without one.
        updates: Number of optimizer steps seen so far, scalar.
        drifts: Number of steps so far at which the learning rate moved.

    Shapes:
        sq_norm and dot_velocity ``[U]``, updates scalar.
    """

    sq_norm: Tensor
    dot_velocity: Tensor
    updates: Tensor
    drifts: int = 0


_UNSET: Any = object()


@dataclass(frozen=True)
class Snapshot:
    """One moment of training. A missing field raises and names the call that supplies it.

    Args:
        step: The optimizer step under which this batch's loss is logged.
        model: The model.
        forward: Maps model and inputs to outputs ``[N, O]``.
        groups: The optimizer's settings by parameter group.
        sections: Which parameters are read together.
        loss_reduction: ``"mean"`` or ``"sum"`` over the examples of a batch.
        batch_size: Examples behind this step's gradient.
        dataset_size: Examples in the training set.
        replacement: Whether batches are drawn with replacement.
        probe: The fixed batch.
        chunks: Gradient norms of parts of the batch, from the best source at hand.
        example_chunks: The same from single examples.
        norm_layer_chunks: The same from single examples as the norm layers see them.
        split_chunks: The same from a batch that was split.
        gradient: The unclipped gradient of this step.
        previous_gradient: That of the step before; ``None`` where it was not seen, as at the first step.
        preconditioner: The metric of the optimizer's own steps, before this one.
        curvature: Gradients and Hessians of parts of the batch.
        step_curvature: The same with the steps that the optimizer makes of the parts' gradients.
        update: The update this step made.
        work: Inner products for verification.
        weights: State functions of the weights after the step.
        centred_weights: The same, relative to the weights at the window's first record.
        step_factors: How far the optimizer moves each weight per unit of gradient, by parameter name.
        parameter_steps: How the optimizer makes each parameter's steps from gradients, by its name.
        loss_fn: Maps outputs and targets of a batch to its loss; ``None`` where it is not known.

    Raises:
        MissingFieldError: On reading a field that was not supplied.

    Example:
        >>> Snapshot(step=3, model=nn.Linear(1, 1)).probe
        Traceback (most recent call last):
            ...
        gradiometer.errors.MissingFieldError: the snapshot of step 3 has no 'probe'. It is supplied by Monitor(probe=...) or the first call of monitor.micro_batch(x, y).
    """  # noqa: E501

    step: int
    model: nn.Module = _UNSET
    forward: Forward = _UNSET
    groups: tuple[GroupSettings, ...] = _UNSET
    sections: tuple[Section, ...] = _UNSET
    loss_reduction: str = "mean"
    batch_size: int = _UNSET
    dataset_size: int = _UNSET
    replacement: bool = _UNSET
    probe: Probe = _UNSET
    chunks: Chunks = _UNSET
    example_chunks: Chunks = _UNSET
    norm_layer_chunks: Chunks = _UNSET
    split_chunks: Chunks = _UNSET
    gradient: Gradient = _UNSET
    previous_gradient: Gradient | None = _UNSET
    preconditioner: Any = _UNSET
    curvature: Curvature = _UNSET
    step_curvature: Curvature = _UNSET
    update: Update = _UNSET
    work: Work = _UNSET
    weights: Weights = _UNSET
    centred_weights: Weights = _UNSET
    step_factors: Mapping[str, float | Tensor] = _UNSET
    parameter_steps: Mapping[str, ParameterStep] = _UNSET
    loss_fn: Callable[[Any, Any], Tensor] | None = None

    def __getattribute__(self, name: str) -> Any:
        """Refuse a field that nobody supplied."""
        value = object.__getattribute__(self, name)
        if value is _UNSET:
            source = _SUPPLIED_BY.get(name, f"Snapshot({name}=...)")
            step = object.__getattribute__(self, "step")
            raise MissingFieldError(
                f"the snapshot of step {step} has no {name!r}", fix=f"It is supplied by {source}."
            )
        return value

    @property
    def section_settings(self) -> list[GroupSettings]:
        """The settings of each section's parameter group."""
        return [self.groups[section.group] for section in self.sections]

    def has(self, name: str) -> bool:
        """Whether a field was supplied.

        Args:
            name: A field.
        """
        return object.__getattribute__(self, name) is not _UNSET

    def replace(self, **fields: Any) -> Snapshot:
        """A copy with more fields.

        Args:
            fields: What to add.
        """
        given = {
            f.name: object.__getattribute__(self, f.name)
            for f in dataclasses.fields(self)
            if self.has(f.name)
        }
        return Snapshot(**{**given, **fields})
