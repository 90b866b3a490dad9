"""Norms of what each parameter receives in one backward pass, before anything is added up or averaged."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedError


class Metric(Protocol):
    """What the optimizer makes of a gradient, in whose metric norms may be taken too."""

    def apply(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The gradient as the optimizer sees it."""
        ...


class ParameterHooks:
    """Norms of the gradient each parameter receives in one backward pass on this process.

    A hook on a parameter sees the gradient of the one micro-batch, before it is added to ``.grad`` and
    before processes average theirs.

    Args:
        parameters: The parameters, by name.

    Shapes:
        Each norm ``[M]``: the plain one, and that in a metric where one is given.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> hooks = ParameterHooks(dict(net.named_parameters()))
        >>> hooks.attach(); net(torch.ones(1, 2)).sum().backward(); hooks.detach()
        >>> hooks.norms
        {'weight': tensor([1.4142])}
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._metric: Metric | None = None
        self._handles: list[Any] = []
        self.norms: dict[str, Tensor] = {}
        self.repeated: str | None = None
        self.error: Exception | None = None
        self.seconds = 0.0

    def attach(self, metric: Metric | None = None) -> None:
        """Look at the next backward pass.

        Args:
            metric: For a second norm of each gradient.
        """
        self.detach()
        self.norms = {}
        self._metric = metric
        self._handles = [p.register_hook(self._hook(name)) for name, p in self._parameters.items()]

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Any:
        def hook(grad: Tensor) -> None:
            began = perf_counter()
            try:
                if name in self.norms:
                    self.repeated = name
                self.norms[name] = self._norms(self._parameters[name], grad.detach())
            except Exception as error:  # the user's backward goes on; check() raises this
                self.error = self.error or error
            self.seconds += perf_counter() - began

        return hook

    def _norms(self, parameter: Tensor, grad: Tensor) -> Tensor:
        grads = [entries(grad)]
        if self._metric is not None:
            grads.append(self._metric.apply(parameter, grad))
        wide = torch.promote_types(grad.dtype, torch.float32)
        return torch.stack([torch.linalg.vector_norm(gradient, dtype=wide) for gradient in grads])

    def check(self) -> None:
        """Refuse norms that are not those of whole gradients.

        Raises:
            UnsupportedError: If a parameter received its gradient in pieces.
        """
        if self.error:
            raise self.error
        if self.repeated is not None:
            raise UnsupportedError(
                f"parameter {self.repeated!r} received its gradient in several pieces in one backward "
                "pass (reentrant checkpointing), so the norm of the whole is not known",
                fix="Write checkpoint(..., use_reentrant=False).",
            )


def entries(gradient: Tensor) -> Tensor:
    """All that is not zero in a sparse gradient, once; a dense one as it is.

    Args:
        gradient: Of a parameter.
    """
    return gradient.coalesce().values() if gradient.is_sparse else gradient
