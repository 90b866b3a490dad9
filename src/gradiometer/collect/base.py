"""How a collector works: it gathers one snapshot field on one optimizer step.

A collector is made for one optimizer step on which its field is needed, and thrown away after it. It may
hook the model during the user's own forward and backward. It is given three things and writes into the last
one only: what is being trained, what is known of the step under way, and its own memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import SampleSkippedError, UnsupportedError
from .compilation import CompilerWatch
from .loss_graph import FoundLoss
from .loss_terms import OTHER, Terms
from .own_batch import LossFunction as LossFunction
from .own_batch import OwnBatch
from .sections import Sections

MomentName = Literal["before_step", "after_step"]
ACCUMULATE = "Accumulate over two or more micro-batches (Lightning: accumulate_grad_batches=2)"
"""What gives a noise scale on any run."""
Memory = dict[str, Any]
"""What the collectors of one field keep from step to step."""


@dataclass(frozen=True)
class Training:
    """What is being trained; the same at every step.

    Args:
        model: The model being trained.
        optimizer: Its optimizer.
        loss_reduction: ``"mean"`` or ``"sum"`` over the examples of a micro-batch, where it was said.
        loss_fn: Maps outputs and targets to the loss, where it is given.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_reduction: str | None = None
    loss_fn: LossFunction | None = None

    def parameters(self) -> list[Tensor]:
        """What the optimizer holds, in its own order, which checkpoints keep."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


@dataclass
class Step:
    """What is known of the step under way; the engine fills it in, and collectors read it.

    Args:
        number: The optimizer step under which this batch's loss is logged.
        sections: Which parameters are read together.
        micro_batches_before: Micro-batches of the step before this one, 0 when unknown.
        updates: Optimizer steps seen so far; this one is counted once it has been made.
        drifts: Steps so far at which a learning rate moved.
        recording: Whether anything is recorded at this step; only then may a collector wait for the device.
        sizes: Examples of each micro-batch of this step so far.
        batch: The latest micro-batch for passes of our own, where the loss is known.
        loss: The loss that the graph has shown, or why it is not known.
        terms: What the loss is divided by, also where it is not known.
        reduction: ``"mean"`` or ``"sum"`` over the examples of a micro-batch.
        axes: The examples' axis of the input of each layer, where it was tried.
        refusal: Why the examples of a batch are not known.
        apart: Whether each of several processes reads for itself.
        loss_divisor: What the loss of each micro-batch was divided by; unknown when ``None``.
        loss_scale: Factor on the loss during the backward pass.
        grad_scale: Factor still in ``.grad`` at ``before_step``.
        broken: Whether the micro-batch before this one ended in an exception.
        compiler: Knows whether hooks may be put on modules.
    """

    number: int
    sections: Sections
    micro_batches_before: int = 0
    updates: int = 0
    drifts: int = 0
    recording: bool = False
    sizes: list[int] = field(default_factory=list)
    batch: OwnBatch | None = None
    loss: FoundLoss | str = "no backward pass was seen"
    terms: Terms = field(default_factory=Terms)
    reduction: str = "mean"
    axes: Mapping[nn.Module, int] = field(default_factory=dict)
    refusal: UnsupportedError | None = None
    apart: bool = False
    loss_divisor: float | None = None
    loss_scale: float = 1.0
    grad_scale: float = 1.0
    broken: bool = False
    compiler: CompilerWatch = field(default_factory=CompilerWatch)

    def loss_multiple(self) -> float:
        """How often the step's gradient holds that of the mean loss."""
        mean = self.reduction == "mean"
        if mean and self.loss_divisor is None:
            return 1.0
        if not self.sizes:
            raise no_micro_batch()
        return (len(self.sizes) if mean else sum(self.sizes)) / (self.loss_divisor or 1)

    @property
    def sum_is_mean(self) -> bool:
        """Whether the loss is a sum over the examples that is divided by their number."""
        return self.reduction == "mean" and not isinstance(self.loss, str) and self.loss.reduction == "sum"

    def loss_factor(self) -> float:
        """How often the loss holds the one that its graph has shown, apart from accumulation and scaling."""
        if isinstance(self.loss, str):
            return 1.0
        factor = self.loss.factor / self.loss_scale * (self.terms.examples if self.sum_is_mean else 1)
        divisor = self.loss_divisor or (len(self.sizes) if self.reduction == "mean" else 1)
        return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-5) else factor * divisor

    @property
    def metric(self) -> Any:
        """The optimizer's own metric before this step, where norms in it are asked for; else ``None``."""
        return None


class Collector(ABC):
    """Supplies one snapshot field on one step.

    Args:
        training: What is being trained.
        step: The step under way.
        memory: What this field's collectors keep from step to step; empty at the beginning.
    """

    moment: ClassVar[MomentName] = "after_step"
    stages: ClassVar[frozenset[str]] = frozenset()
    """The stages that do something; the others need not be called."""
    saved: ClassVar[frozenset[str]] = frozenset()
    """The parts of its memory that readings depend on. They go into checkpoints, so they are made of tensors,
    numbers, strings, lists and dictionaries; a tensor may come back on another device."""
    ahead: ClassVar[bool] = False
    """Whether it must also run at the step before one at which its field is needed."""
    keeps_batch: ClassVar[bool] = False
    """Whether it makes passes of its own on the step's batch, of which the step then keeps a copy."""
    of_window: ClassVar[bool] = False
    """Whether the memory belongs to a window of steps, and is dropped where windows begin anew."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        named = ("enter", "resize", "exit", "before_step", "close")
        cls.stages = frozenset(name for name in named if getattr(cls, name) is not getattr(Collector, name))

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        self.training = training
        self.step = step
        self.memory = memory
        self.seconds_in_hooks = 0.0

    def enter(self, size: int) -> None:  # noqa: B027 - most collectors need no hook here
        """A micro-batch of ``size`` examples begins."""

    def resize(self, size: int) -> None:  # noqa: B027
        """The micro-batch turns out to have ``size`` examples; before its end."""

    def exit(self) -> None:  # noqa: B027
        """Its backward pass is done."""

    def before_step(self) -> None:  # noqa: B027
        """The full, unclipped gradient stands in ``.grad``."""

    def close(self) -> None:  # noqa: B027
        """Remove everything; called exactly once, also after a failure."""

    def own_batch(self, where: str) -> OwnBatch:
        """The step's batch for passes of our own.

        Args:
            where: What rests on it, as the beginning of a sentence that ends in "where the loss is known".

        Raises:
            UnsupportedError: If the loss is not known, with the reason, or divides by class weights.
            SampleSkippedError: If no micro-batch was seen, or the loss divides by something else of it.
        """
        refusal = None if self.step.batch is None else self.not_a_plain_mean("its parts do not add up")
        if refusal is not None:
            raise refusal
        if self.step.batch is not None and self.training.loss_fn is not None:
            return self.step.batch
        if self.step.batch is not None:
            return self.step.batch.multiplied(self.step.loss_factor(), averaged=self.step.sum_is_mean)
        if not self.step.sizes:
            raise no_micro_batch()
        reason = self.step.loss if isinstance(self.step.loss, str) else "the network's call was not seen"
        raise UnsupportedError(
            f"{where}, and it is not: {reason}",
            fix="Pass loss_fn=, which maps outputs and targets to the loss.",
        )

    def not_a_plain_mean(self, consequence: str) -> SampleSkippedError | UnsupportedError | None:
        """Why examples do not add up to the gradient with equal weights; ``None`` where they do.

        Args:
            consequence: What follows, as the end of a sentence.
        """
        step, loss = self.step, self.step.loss
        divides, fixed, fix = "", False, f"{ACCUMULATE}: batches then count as they are."
        if not isinstance(loss, str) and loss.divides:
            divides, fixed = loss.divides, loss.fixed
        elif step.sizes:
            divides = step.terms.divides(len(step.sizes), step.loss_scale)
        if divides == OTHER:
            divides = divides if self.training.loss_reduction is None else ""
            fix = f'{fix[:-1]}. Where that number is always the same, write loss_reduction="sum" or "mean".'
        if not divides:
            return None
        kind = UnsupportedError if fixed else SampleSkippedError
        return kind(f"the loss divides by {divides} of each batch, so that {consequence}", fix=fix)

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
