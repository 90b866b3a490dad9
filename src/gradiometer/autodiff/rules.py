"""How a layer turns its input ``a`` and the cotangent ``g`` of its output into per-example gradients.

One function per module type. A rule returns, for each of its parameters, a factor whose squared norm
per example can be had without ever summing over the batch:

* ``Outer``: the gradient of example ``b`` is ``sum_t a[b, :, t] g[b, :, t]^T`` (Linear, convolution);
* ``Rows``: the gradient adds ``g[b, t]`` to row ``index[b, t]`` (Embedding);
* ``Plain``: the gradient itself.

Source of the Linear and norm-layer forms: Gray et al. 2024, arXiv:2411.00999; Goodfellow
2015, arXiv:1510.01799 for the case without a sequence axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

_MAX_ELEMENTS = 2**24


@dataclass(frozen=True)
class Outer:
    """Sum over positions of outer products, ``a [B, G, T, i]`` and ``g [B, G, T, o]``."""

    a: Tensor
    g: Tensor

    def join(self, other: Outer) -> Outer:
        """The same layer called again: more positions."""
        return Outer(torch.cat([self.a, other.a], 2), torch.cat([self.g, other.g], 2))

    def sq_norms(self) -> Tensor:
        """Squared Frobenius norm per example, ``[B]``, by the cheaper of two exact forms."""
        batch, groups, positions, inputs = self.a.shape
        outputs = self.g.shape[-1]
        if positions == 1:
            return (self.a.square().sum(-1) * self.g.square().sum(-1)).sum((1, 2))
        gram = positions * (inputs + outputs) < inputs * outputs
        per_example = groups * (positions**2 if gram else inputs * outputs)
        size = max(1, _MAX_ELEMENTS // per_example)
        parts = []
        for i in range(0, batch, size):
            a, g = self.a[i : i + size], self.g[i : i + size]
            parts.append(
                ((a @ a.mT) * (g @ g.mT)).sum((1, 2, 3)) if gram else (a.mT @ g).square().sum((1, 2, 3))
            )
        return torch.cat(parts)


@dataclass(frozen=True)
class Rows:
    """Sum over positions of ``g [B, T, d]`` into the rows ``index [B, T]``."""

    index: Tensor
    g: Tensor

    def join(self, other: Rows) -> Rows:
        """The same table used again: more positions."""
        return Rows(torch.cat([self.index, other.index], 1), torch.cat([self.g, other.g], 1))

    def sq_norms(self) -> Tensor:
        """Squared norm per example, ``[B]``: equal rows of one example are added first."""
        batch, positions, width = self.g.shape
        rows = int(self.index.max()) + 1
        example = torch.arange(batch, device=self.index.device)[:, None].expand(batch, positions)
        touched, where = (example * rows + self.index).unique(return_inverse=True)
        sums = self.g.new_zeros(len(touched), width)
        sums.index_add_(0, where.reshape(-1), self.g.reshape(-1, width))
        return self.g.new_zeros(batch).index_add_(0, touched // rows, sums.square().sum(-1))


@dataclass(frozen=True)
class Plain:
    """The per-example gradient itself, ``[B, ...]``."""

    gradient: Tensor

    def join(self, other: Plain) -> Plain:
        """The same parameter used again."""
        return Plain(self.gradient + other.gradient)

    def sq_norms(self) -> Tensor:
        """Squared norm per example, ``[B]``."""
        return self.gradient.flatten(1).square().sum(1)


Factor = Outer | Rows | Plain
LayerRule = Callable[[nn.Module, Tensor, Tensor], dict[str, Factor]]


def linear(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Factor]:
    """``nn.Linear`` with any number of position axes: a ``[B, ..., i]``, g ``[B, ..., o]``."""
    del module
    batch = len(a)
    rows, cotangents = a.reshape(batch, 1, -1, a.shape[-1]), g.reshape(batch, 1, -1, g.shape[-1])
    return {"weight": Outer(rows, cotangents), "bias": Plain(cotangents.sum((1, 2)))}


def convolution(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Factor]:
    """``nn.Conv1d/2d/3d``: patches of the padded input are the rows of a Linear, group by group."""
    conv = cast("nn.Conv2d", module)
    batch, spatial = len(a), a.ndim - 2
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    patches = functional.pad(a, conv._reversed_padding_repeated_twice, mode=mode)
    for axis in range(spatial):
        kernel, dilation = conv.kernel_size[axis], conv.dilation[axis]
        patches = patches.unfold(2 + axis, dilation * (kernel - 1) + 1, conv.stride[axis])
        patches = patches[..., ::dilation]
    # [B, C, out..., kernel...] -> [B, groups, positions, C / groups * kernel]
    patches = patches.reshape(batch, conv.groups, -1, g[0, 0].numel(), _product(conv.kernel_size))
    patches = patches.transpose(2, 3).flatten(3)
    cotangents = g.reshape(batch, conv.groups, -1, g[0, 0].numel()).transpose(2, 3)
    return {"weight": Outer(patches, cotangents), "bias": Plain(g.flatten(2).sum(2))}


def embedding(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Factor]:
    """``nn.Embedding``: a holds indices ``[B, ...]``, g ``[B, ..., d]``."""
    table = cast("nn.Embedding", module)
    batch = len(a)
    index, cotangents = a.reshape(batch, -1), g.reshape(batch, -1, g.shape[-1])
    if table.padding_idx is not None:
        cotangents = cotangents * (index != table.padding_idx)[..., None]
    return {"weight": Rows(index, cotangents)}


def layer_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Factor]:
    """``nn.LayerNorm``: the normalised input times the cotangent, summed over positions."""
    norm = cast("nn.LayerNorm", module)
    normal = functional.layer_norm(a, norm.normalized_shape, eps=norm.eps)
    return _scale_and_shift(normal, g, len(norm.normalized_shape))


def rms_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Factor]:
    """``nn.RMSNorm``: as layer norm, without a shift."""
    norm = cast("nn.RMSNorm", module)
    normal = functional.rms_norm(a, norm.normalized_shape, eps=norm.eps)
    return _scale_and_shift(normal, g, len(norm.normalized_shape))


def group_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Factor]:
    """``nn.GroupNorm``: a and g ``[B, C, ...]``."""
    norm = cast("nn.GroupNorm", module)
    return _per_channel(functional.group_norm(a, norm.num_groups, eps=norm.eps), g)


def instance_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Factor]:
    """``nn.InstanceNorm1d/2d/3d`` without running statistics: a and g ``[B, C, ...]``."""
    norm = cast("nn.InstanceNorm2d", module)
    return _per_channel(functional.instance_norm(a, eps=norm.eps), g)


def frozen_batch_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Factor]:
    """``nn.BatchNorm1d/2d/3d`` in evaluation mode, where examples are independent."""
    norm = cast("nn.BatchNorm2d", module)
    return _per_channel(functional.batch_norm(a, norm.running_mean, norm.running_var, eps=norm.eps), g)


def _scale_and_shift(normal: Tensor, g: Tensor, axes: int) -> dict[str, Factor]:
    """Sum over all axes between the batch and the normalised ones."""
    shape = (len(g), -1, *g.shape[g.ndim - axes :])
    return {
        "weight": Plain((normal * g).reshape(shape).sum(1)),
        "bias": Plain(g.reshape(shape).sum(1)),
    }


def _per_channel(normal: Tensor, g: Tensor) -> dict[str, Factor]:
    """Sum over all axes behind the channels."""
    return {
        "weight": Plain((normal * g).reshape(*g.shape[:2], -1).sum(2)),
        "bias": Plain(g.reshape(*g.shape[:2], -1).sum(2)),
    }


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.InstanceNorm1d: instance_norm,
    nn.InstanceNorm2d: instance_norm,
    nn.InstanceNorm3d: instance_norm,
    nn.BatchNorm1d: frozen_batch_norm,
    nn.BatchNorm2d: frozen_batch_norm,
    nn.BatchNorm3d: frozen_batch_norm,
}
"""Rules by exact module type; a subclass with a forward of its own is not served by its parent's."""
