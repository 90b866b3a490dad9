"""What each parameter receives in the backward passes of one micro-batch, before anything is averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from ..stats.directions import Directions


class Metric(Protocol):
    """What the optimizer makes of a gradient, in whose metric norms may be taken too."""

    def apply(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The gradient as the optimizer sees it."""
        ...


@dataclass
class Received:
    """The gradient of one micro-batch on this process, by parameter.

    Args:
        size: Its examples.
        norms: The plain norm, and that in a metric where one is given.
        along: The gradient along the parameter's direction.
        passes: The backward passes that added to ``.grad``, by autograd's number.
        given_up: Whether its gradient was thrown away before the step.

    Shapes:
        Each norm ``[M]``; along scalars.
    """

    size: int
    norms: dict[str, Tensor] = field(default_factory=dict)
    along: dict[str, Tensor] = field(default_factory=dict)
    passes: set[int] = field(default_factory=set)
    given_up: bool = False


class ParameterHooks:
    """Looks at the gradient of each micro-batch, before it is added to ``.grad`` or averaged over processes.

    A gradient counts once it has been added: what ``torch.autograd.grad`` asks for is only passing by. A
    parameter may receive its gradient in several pieces, from several backward passes or a checkpointed part
    of the model; then ``pieces`` is set, and the norms are those of the first one unless ``add_up``.

    Args:
        parameters: The parameters, by name.
        directions: Along which gradients are compared.
        add_up: Whether to hold the gradient of a micro-batch, so that its pieces can be added up.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> hooks = ParameterHooks(dict(net.named_parameters()), Directions())
        >>> hooks.attach(1); net(torch.ones(1, 2)).sum().backward(); hooks.detach()
        >>> hooks.micro_batches[0].norms
        {'weight': tensor([1.4142])}
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], directions: Directions, *, add_up: bool = False
    ) -> None:
        self._parameters, self._directions, self._add_up = parameters, directions, add_up
        self._metric: Metric | None = None
        self._handles: list[Any] = []
        self._passing: dict[str, tuple[int, Any]] = {}
        self._sums: dict[str, Tensor] = {}
        self.micro_batches: list[Received] = []
        self.pieces = False
        """Whether a parameter received its gradient in several pieces that were not added up."""
        self.error: Exception | None = None
        self.seconds = 0.0

    def attach(self, size: int, metric: Metric | None = None) -> None:
        """Look at the backward passes of the next micro-batch.

        Args:
            size: Its examples.
            metric: For a second norm of each gradient.
        """
        self.detach()
        self._metric = metric
        self.micro_batches.append(Received(size))
        for name, parameter in self._parameters.items():
            self._handles.append(parameter.register_hook(self._arrives(name)))
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._stays(name)))

    def detach(self) -> None:
        """Remove every hook; the micro-batch is over."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._passing = [], {}
        for name, gradient in self._sums.items():
            self._safely(self._note_sum, name, gradient)
        self._sums = {}

    def _safely(self, function: Any, *arguments: Any) -> None:
        """Keep an error out of the user's backward pass; it is in ``error``."""
        began = perf_counter()
        try:
            function(*arguments)
        except Exception as error:
            self.error = self.error or error
        self.seconds += perf_counter() - began

    def _arrives(self, name: str) -> Any:
        """A gradient is on its way to the parameter."""

        def look(gradient: Tensor) -> None:
            if self._parameters[name].grad is None:  # zero_grad() was called since the others
                for received in self.micro_batches[:-1]:
                    received.given_up |= name in received.norms
            gradient = gradient.detach()
            seen = gradient.clone() if self._add_up else self._look(name, gradient)
            self._passing[name] = torch._C._current_graph_task_id(), seen

        return lambda gradient: self._safely(look, gradient)

    def _stays(self, name: str) -> Any:
        """It has been added to ``.grad``."""

        def count(parameter: Tensor) -> None:
            del parameter
            number, seen = self._passing.pop(name)
            received = self.micro_batches[-1]
            received.passes.add(number)
            if not self._add_up:
                self.pieces |= name in received.norms
                self._note(name, seen)
            elif name in self._sums:
                self._sums[name] = self._sums[name] + seen
            else:
                self._sums[name] = seen

        return lambda parameter: self._safely(count, parameter)

    def _look(self, name: str, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Norms of a gradient, and the gradient along its direction."""
        gradients = [entries(gradient)]
        if self._metric is not None:
            gradients.append(self._metric.apply(self._parameters[name], gradient))
        wide = torch.promote_types(gradient.dtype, torch.float32)
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in gradients])
        return norms, self._directions.along(name, gradient)

    def _note_sum(self, name: str, gradient: Tensor) -> None:
        self._note(name, self._look(name, gradient))

    def _note(self, name: str, seen: tuple[Tensor, Tensor]) -> None:
        received = self.micro_batches[-1]
        received.norms[name], received.along[name] = seen


def entries(gradient: Tensor) -> Tensor:
    """All that is not zero in a sparse gradient, once; a dense one as it is.

    Args:
        gradient: Of a parameter.
    """
    return gradient.coalesce().values() if gradient.is_sparse else gradient
