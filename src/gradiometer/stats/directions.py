"""One random direction for each parameter, along which gradients are compared.

A number along a fixed direction is linear in the gradient. So what the parts of a batch give can be added up
and held against the whole, without any gradient being kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Products in the precision of their factors, also inside a backward pass that runs under autocast.

    Args:
        device: Where the factors are.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class Directions:
    """A Gaussian outer product for each parameter, drawn once and kept.

    With an outer product a gradient that is held in factors costs as little as one that is written out. Where
    two gradients differ, their numbers differ in proportion to the norm of the difference.

    Example:
        >>> directions, gradient = Directions(), torch.ones(3, 2)
        >>> whole = directions.along("weight", gradient)
        >>> torch.allclose(directions.along("weight", 2 * gradient), 2 * whole)
        True
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)  # not the global one
        self._drawn: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        self._widths: dict[str, int] = {}

    def of(self, name: str, numel: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The two vectors of a direction; from now on gradients of this name are taken to have this width.

        Args:
            name: The parameter.
            numel: Its number of components.
            width: Length of its rows.
            like: Gives dtype and device.

        Shapes:
            ``[numel / width]`` and ``[width]``.
        """
        self._widths[name] = width
        key = (name, numel, width)
        if key not in self._drawn:
            sizes = numel // width, width
            rows, columns = (torch.randn(size, generator=self._generator).to(like) for size in sizes)
            self._drawn[key] = rows, columns
        rows, columns = self._drawn[key]
        if rows.dtype != like.dtype or rows.device != like.device:
            rows, columns = self._drawn[key] = rows.to(like), columns.to(like)
        return rows, columns

    @torch.no_grad()
    def along(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient's component along its direction, times the direction's length.

        Args:
            name: The parameter.
            gradient: Its gradient, dense or sparse along the first dimension.

        Shapes:
            Scalar, in the gradient's dtype, at least float32.
        """
        gradient = getattr(gradient, "_local_tensor", gradient)  # of a sharded one, this process's part
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient)
        numel = gradient.numel()
        width = self._widths.get(name) or (numel // gradient.shape[0] if gradient.ndim > 1 else 1)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        with full_precision(gradient.device):
            if gradient.is_sparse:
                gradient = gradient.coalesce()
                values = gradient.values().to(wide)
                rows, columns = self.of(name, numel, width, values)
                return rows[gradient.indices()[0]] @ (values.reshape(-1, width) @ columns)
            gradient = gradient.detach().to(wide)
            rows, columns = self.of(name, numel, width, gradient)
            return rows @ (gradient.reshape(-1, width) @ columns)
