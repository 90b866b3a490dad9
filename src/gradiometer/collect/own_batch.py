"""A step's batch for passes of our own: inputs, targets, how the network is run on them, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..autodiff.functional import call, examples
from .call import NetworkCall
from .examples_axis import Calling, OutputLayout
from .loss_graph import FoundLoss

LossFunction = Callable[[Any, Any], Tensor]
"""Maps outputs and targets of a batch to its loss."""


@dataclass(frozen=True)
class OwnBatch:
    """A batch, and how to make passes on parts of it.

    Args:
        inputs: A nest of tensors that begin with the examples.
        targets: The same, or ``None``.
        loss_fn: Maps what ``forward`` returns, and targets, to the loss.
        forward: Maps model and inputs to what the loss takes.
    """

    inputs: Any
    targets: Any
    loss_fn: LossFunction
    forward: Callable[[nn.Module, Any], Any] = call

    def multiplied(self, factor: float, *, averaged: bool) -> OwnBatch:
        """The same with a multiple of the loss.

        Args:
            factor: How often.
            averaged: Whether the loss is a sum over the examples, and their mean is meant.
        """
        if factor == 1.0 and not averaged:
            return self

        def loss_fn(output: Any, targets: Any) -> Tensor:
            return self.loss_fn(output, targets) * (factor / (examples(targets) if averaged else 1))

        return replace(self, loss_fn=loss_fn)


def batch_with_found_loss(calling: Calling, seen: NetworkCall, loss: FoundLoss) -> OwnBatch:
    """The batch that the network was called with, and the loss that the graph has shown.

    Args:
        calling: How the network is called.
        seen: The call.
        loss: The loss.
    """
    varying, shared = calling.inputs(seen)
    layout = layout_of_targets(calling.layout, loss)

    def forward(model: nn.Module, inputs: Any) -> Tensor:
        return calling.leaf(calling.call(model, inputs, shared))

    def loss_fn(output: Any, targets: Any) -> Tensor:
        return loss.function(output, layout.back(targets))

    return OwnBatch(varying, layout.examples_first(loss.target), loss_fn, forward)


def batch_with_given_loss(
    calling: Calling, seen: NetworkCall, targets: Any, loss_fn: LossFunction
) -> OwnBatch:
    """The batch that the network was called with, and a loss that takes what the network returns.

    Args:
        calling: How the network is called.
        seen: The call.
        targets: The loop's own, laid out as the network's output.
        loss_fn: Maps outputs and targets to the loss.
    """
    varying, shared = calling.inputs(seen)
    axis, count = calling.layout.axis, len(varying[0])
    moves = isinstance(targets, Tensor) and targets.ndim > axis and targets.shape[axis] == count

    def forward(model: nn.Module, inputs: Any) -> Any:
        return calling.call(model, inputs, shared)

    def loss(output: Any, some: Any) -> Tensor:
        return loss_fn(output, some.movedim(0, axis) if moves else some)

    return OwnBatch(varying, targets.movedim(axis, 0) if moves else targets, loss, forward)


def layout_of_targets(layout: OutputLayout, loss: FoundLoss) -> OutputLayout:
    """Where the examples are in the targets: as in the output, without its class axis.

    Args:
        layout: Of the output.
        loss: The loss.
    """
    if loss.class_axis is None or loss.class_axis > layout.axis:
        return layout
    return replace(layout, axis=layout.axis - 1)
