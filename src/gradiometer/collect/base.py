"""How a collector works: it gathers one snapshot field on one optimizer step.

A collector is made for one optimizer step on which its field is needed, and thrown away after it. It may
hook the model during the user's own forward and backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import SampleSkippedError
from .sections import Sections

MomentName = Literal["before_step", "after_step"]
LossFunction = Callable[[Any, Any], Tensor]
"""Maps outputs and targets of a batch to its loss."""


@dataclass
class Run:
    """What collectors may look at.

    Args:
        model: The model being trained.
        optimizer: Its optimizer.
        sections: Which parameters are read together.
        loss_reduction: ``"mean"`` or ``"sum"`` over the examples of a micro-batch.
        loss_fn: Maps outputs and targets to the loss, where it is known.
        micro_batches_before: Micro-batches of the step before this one, 0 when unknown.
        loss_divisor: What the loss of each micro-batch was divided by; unknown when ``None``.
        loss_scale: Factor on the loss during the backward pass.
        grad_scale: Factor still in ``.grad`` at ``before_step``.
        sizes: Examples of each micro-batch of this step so far.
        batch: Inputs and targets of the latest micro-batch.
        recording: Whether anything is recorded at this step; only then may a collector wait for the device.
        updates: Optimizer steps seen so far.
        drifts: Steps so far at which a learning rate moved.
        centre: Weights at the window's first record, where they are asked for.
        scratch: One tensor of the shape of each parameter, kept between steps: allocating them anew costs
            more than filling them.
        preconditioner: The optimizer's own metric, where norms in it are asked for at this step.
        unaccounted: Why a parameter's gradient is more than the sum of its examples', or nothing where it
            is that sum; by name, for parameters whose gradient has been looked at.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sections: Sections
    loss_reduction: str = "mean"
    loss_fn: LossFunction | None = None
    micro_batches_before: int = 0
    loss_divisor: float | None = None
    loss_scale: float = 1.0
    grad_scale: float = 1.0
    sizes: list[int] = field(default_factory=list)
    batch: tuple[Any, Any] | None = None
    recording: bool = False
    updates: int = 0
    drifts: int = 0
    centre: dict[Tensor, Tensor] = field(default_factory=dict)
    scratch: dict[Tensor, Tensor] = field(default_factory=dict)
    preconditioner: Any = None
    unaccounted: dict[str, str] = field(default_factory=dict)

    @property
    def loss_multiple(self) -> float:
        """How often the step's gradient holds that of the mean loss."""
        mean = self.loss_reduction == "mean"
        if mean and self.loss_divisor is None:
            return 1.0
        if not self.sizes:
            raise no_micro_batch()
        return (len(self.sizes) if mean else sum(self.sizes)) / (self.loss_divisor or 1)


class Collector(ABC):
    """Supplies one snapshot field on one step."""

    moment: ClassVar[MomentName] = "after_step"
    stages: ClassVar[frozenset[str]] = frozenset()
    """The stages that do something; the others need not be called."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        named = ("enter", "exit", "before_step", "close")
        cls.stages = frozenset(name for name in named if getattr(cls, name) is not getattr(Collector, name))

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seconds_in_hooks = 0.0

    def enter(self, size: int) -> None:  # noqa: B027 - most collectors need no hook here
        """A micro-batch of ``size`` examples begins."""

    def exit(self) -> None:  # noqa: B027
        """Its backward pass is done."""

    def before_step(self) -> None:  # noqa: B027
        """The full, unclipped gradient stands in ``.grad``."""

    def close(self) -> None:  # noqa: B027
        """Remove everything; called exactly once, also after a failure."""

    @abstractmethod
    def result(self) -> Any:
        """The field's value.

        Raises:
            UnsupportedError: It can never be had on this run.
            SampleSkippedError: It cannot be had at this step.
        """


def no_micro_batch() -> SampleSkippedError:
    """What to say when a step passes of which nothing but the gradient was shown."""
    return SampleSkippedError(
        "no micro-batch was seen at this step",
        fix="Put the forward and backward inside: with monitor.micro_batch(x, y): ...",
    )
