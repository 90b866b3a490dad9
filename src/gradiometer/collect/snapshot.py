"""A frozen view of one moment of training: all that an observable may look at."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..autodiff.functional import Forward
from ..errors import InputError, MissingFieldError
from ..optimizers.base import GroupSettings, ParameterStep
from .gradient import Gradient
from .sections import Section

_SUPPLIED_BY = {
    "probe": "Monitor(probe=...) or the first call of monitor.micro_batch(x, y)",
    **dict.fromkeys(
        ("gradient_parts", "example_parts", "norm_layer_parts", "split_parts"),
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
    "fixed_order": "Monitor(fixed_order=...)",
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
class GradientParts:
    """Squared gradient norms of parts of one batch, each part's gradient that of its own mean loss.

    Args:
        source: Where the parts come from, in words.
        sq_norms: Squared norm of each part's mean gradient by section, loss scale removed.
        sizes: Examples in each part.
        shares: Share of each part in this process's mean gradient.
        batch_sq_norm: Squared norm of the batch's mean gradient over the same parameters, before clipping.
        weight: 1, or 0 where the gradient is not finite and this step must not count.
        parameters: Number of parameters behind these norms by section.
        coverage: Their share of all trainable parameters.
        skipped: Why the others are missing, by parameter name.
        processes: Processes whose parts make up the batch's gradient.
        note: What was undone between the parts and the batch, in words.
        sums: Of several processes: these parts' gradient along a random direction, the batch's gradient
            along it, its squared norm, and what rounding may make of the difference. In the mean over the
            processes the first two are the same.
        preconditioned: The same in the metric of the optimizer's own steps, where it is asked for.

    Shapes:
        sq_norms ``[k, U]``, sizes and shares ``[k]``, batch_sq_norm and parameters ``[U]``, weight scalar,
        sums ``[4]``.
    """

    source: str
    sq_norms: Tensor
    sizes: Tensor
    shares: Tensor
    batch_sq_norm: Tensor
    weight: Tensor
    parameters: Tensor
    coverage: float
    skipped: Mapping[str, str]
    processes: int = 1
    note: str = ""
    sums: Tensor | None = None
    preconditioned: GradientParts | None = None


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
        weight: 1, or 0 where something is not finite and this step must not count.

    Shapes:
        gram and step_gram ``[k, k]``, forms ``[k, k, k]``, sizes ``[k]``, weight scalar.
    """

    gram: Tensor
    step_gram: Tensor
    forms: Tensor
    sizes: Tensor
    noise_share: float
    weight: Tensor


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


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Snapshot:
    """One moment of training. A missing field raises and names the call that supplies it.

    A field that nobody supplied is not set, so that making a snapshot costs one dictionary.

    Args:
        step: The optimizer step under which this batch's loss is logged.
        model: The model.
        forward: Maps model and inputs to outputs ``[N, O]``.
        groups: The optimizer's settings by parameter group.
        sections: Which parameters are read together.
        batch_size: Examples behind this step's gradient.
        dataset_size: Examples in the training set.
        replacement: Whether batches are drawn with replacement.
        fixed_order: Whether every epoch takes the same batches, which are then no draws at all.
        probe: The fixed batch.
        gradient_parts: Gradient norms of parts of the batch, from the best source at hand.
        example_parts: The same from single examples.
        norm_layer_parts: The same from single examples as the norm layers see them.
        split_parts: The same from a batch that was split.
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
        loss_reduction: ``"mean"`` or ``"sum"`` over the examples of a batch.
        loss_fn: Maps outputs and targets of a batch to its loss; ``None`` where it is not known.

    Raises:
        InputError: A field that does not exist.
        MissingFieldError: On reading a field that was not supplied.

    Example:
        >>> Snapshot(step=3, model=nn.Linear(1, 1)).probe
        Traceback (most recent call last):
            ...
        gradiometer.errors.MissingFieldError: the snapshot of step 3 has no 'probe'. It is supplied by Monitor(probe=...) or the first call of monitor.micro_batch(x, y).
    """  # noqa: E501

    step: int
    model: nn.Module
    forward: Forward
    groups: tuple[GroupSettings, ...]
    sections: tuple[Section, ...]
    batch_size: int
    dataset_size: int
    replacement: bool
    fixed_order: bool
    probe: Probe
    gradient_parts: GradientParts
    example_parts: GradientParts
    norm_layer_parts: GradientParts
    split_parts: GradientParts
    gradient: Gradient
    previous_gradient: Gradient | None
    preconditioner: Any
    curvature: Curvature
    step_curvature: Curvature
    update: Update
    work: Work
    weights: Weights
    centred_weights: Weights
    step_factors: Mapping[str, float | Tensor]
    parameter_steps: Mapping[str, ParameterStep]
    loss_reduction: str = "mean"
    loss_fn: Callable[[Any, Any], Tensor] | None = None

    def __init__(self, step: int, **fields: Any) -> None:
        if not fields.keys() <= _FIELDS:
            fields = {present_name(name): value for name, value in fields.items()}
            unknown = fields.keys() - _FIELDS
            if unknown:
                raise InputError(
                    "a snapshot has no such field",
                    got=", ".join(sorted(unknown)),
                    fix=f"Write one of {', '.join(sorted(_FIELDS))}.",
                )
        self.__dict__.update(fields, step=step)

    if not TYPE_CHECKING:  # so that a field that does not exist is still found by a type checker

        def __getattr__(self, name: str) -> Any:
            """Refuse a field that nobody supplied; reached only where nothing of this name is set."""
            if name in RENAMED:
                return getattr(self, present_name(name))
            if name not in _FIELDS:
                raise AttributeError(f"a snapshot has no field {name!r}")
            raise MissingFieldError(
                f"the snapshot of step {self.__dict__.get('step')} has no {name!r}",
                fix=f"It is supplied by {_SUPPLIED_BY.get(name, f'Snapshot({name}=...)')}.",
            )

    @property
    def section_settings(self) -> list[GroupSettings]:
        """The settings of each section's parameter group."""
        return [self.groups[section.group] for section in self.sections]

    def has(self, name: str) -> bool:
        """Whether a field was supplied.

        Args:
            name: A field.
        """
        name = present_name(name)
        return name in self.__dict__ or name in _DEFAULTS

    def replace(self, **fields: Any) -> Snapshot:
        """A copy with more fields.

        Args:
            fields: What to add.
        """
        return Snapshot(**{**self.__dict__, **fields})


_FIELDS = frozenset(Snapshot.__annotations__)
_DEFAULTS = frozenset({"loss_reduction", "loss_fn"})
RENAMED: Mapping[str, str] = {
    "chunks": "gradient_parts",
    "example_chunks": "example_parts",
    "norm_layer_chunks": "norm_layer_parts",
    "split_chunks": "split_parts",
}
"""Fields of snapshots by the names they had; these go with the next release."""


def present_name(field: str, stacklevel: int = 3) -> str:
    """A field's name of today; a warning where it had another.

    Args:
        field: As observables ask for it.
        stacklevel: Frames from here to the code that says the old name.
    """
    if field not in RENAMED:
        return field
    message = f"the snapshot's {field!r} is now called {RENAMED[field]!r}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
    return RENAMED[field]


def __getattr__(name: str) -> Any:
    if name == "Chunks":
        warnings.warn("Chunks is now called GradientParts", DeprecationWarning, stacklevel=2)
        return GradientParts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
