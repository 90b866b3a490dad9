"""How a layer turns its input ``a`` and the cotangents ``g`` of its output into per-example gradients.

One function per module type. It prepares what depends on ``a [N, ...]`` alone, and returns the function
from ``g [K, N, ...]`` to one factor per parameter (see :mod:`.factors`). :func:`register_rule` adds a type.
Source of the Linear and norm-layer forms: Gray et al. 2024, arXiv:2411.00999; Goodfellow 2015,
arXiv:1510.01799 for the case without a sequence axis.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..errors import InputError
from .factors import Factor, Outer, Plain, Rows

Gradients = Callable[[Tensor], dict[str, Factor]]
LayerRule = Callable[[nn.Module, Tensor], Gradients]


def linear(module: nn.Module, a: Tensor) -> Gradients:
    """``nn.Linear`` with any number of position axes: a ``[N, ..., i]``, g ``[K, N, ..., o]``."""
    del module
    rows = a.reshape(len(a), 1, -1, a.shape[-1])

    def gradients(g: Tensor) -> dict[str, Factor]:
        cotangents = g.reshape(*g.shape[:2], 1, -1, g.shape[-1])
        inputs, cotangents = _without_idle_positions(rows, cotangents)
        return {"weight": Outer(inputs, cotangents), "bias": _bias(cotangents)}

    return gradients


def _without_idle_positions(rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out positions without any cotangent, as most are below a head that reads a single one.

    All are looked at only where the first or the last one is idle.
    """
    ends = (bool(g[:, :, :, end].any()) for end in (0, -1))
    if g.shape[3] == 1 or all(ends):
        return rows, g
    busy = (g.abs().amax((0, 1, 2, 4)) > 0).nonzero()[:, 0]
    busy = busy if len(busy) else busy.new_zeros(1)
    return rows[:, :, busy], g[:, :, :, busy]


def _bias(g: Tensor) -> Outer:
    """A bias is the weight of a constant input."""
    return Outer(g.new_ones(()).expand(*g.shape[1:4], 1), g)


def convolution(module: nn.Module, a: Tensor) -> Gradients:
    """``nn.Conv1d/2d/3d``: patches of the padded input are the rows of a Linear, group by group."""
    conv = cast("nn.Conv2d", module)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    inside = a.ndim == 4 and mode == "constant" and not isinstance(conv.padding, str)
    padded = a if inside else functional.pad(a, conv._reversed_padding_repeated_twice, mode=mode)
    if a.ndim == 4:  # several times faster than by hand
        padding = cast("tuple[int, int]", conv.padding) if inside else (0, 0)
        columns = functional.unfold(padded, conv.kernel_size, conv.dilation, padding, conv.stride)
        patches = columns.unflatten(1, (conv.groups, -1)).mT
    else:
        patches = _patches(padded, conv).flatten(2, -2)

    def gradients(g: Tensor) -> dict[str, Factor]:
        cotangents = g.reshape(*g.shape[:2], conv.groups, -1, math.prod(g.shape[3:])).mT
        return {"weight": Outer(patches, cotangents), "bias": _bias(cotangents)}

    return gradients


def _patches(padded: Tensor, conv: nn.Conv2d) -> Tensor:
    """What the kernel sees at each position, ``[N, groups, *positions, C / groups * kernel]``."""
    patches = padded.unflatten(1, (conv.groups, -1))
    axes = padded.ndim - 2
    for axis in range(axes):
        span = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        patches = patches.unfold(3 + axis, span, conv.stride[axis])[..., :: conv.dilation[axis]]
    return patches.movedim(2, 2 + axes).flatten(2 + axes)


def transposed_convolution(module: nn.Module, a: Tensor) -> Gradients:
    """``nn.ConvTranspose1d/2d/3d``: a convolution with input and cotangent in each other's place."""
    conv = cast("nn.ConvTranspose2d", module)
    batch, positions = len(a), a.shape[2:]
    rows = a.reshape(batch, conv.groups, -1, math.prod(positions))
    # as functional.pad has it: the last axis first, both sides
    around = [size for size in reversed(cast("tuple[int, ...]", conv.padding)) for _ in range(2)]

    def gradients(g: Tensor) -> dict[str, Factor]:
        patches = _patches(functional.pad(g.flatten(0, 1), around), cast("nn.Conv2d", conv))
        for axis, count in enumerate(positions):  # output padding adds positions no input belongs to
            patches = patches.narrow(2 + axis, 0, count)
        gradient = rows @ patches.flatten(2, -2).unflatten(0, (-1, batch))
        cotangents = g.reshape(*g.shape[:2], 1, -1, math.prod(g.shape[3:])).mT
        return {"weight": Plain(gradient.flatten(2)), "bias": _bias(cotangents)}

    return gradients


def embedding(module: nn.Module, a: Tensor) -> Gradients:
    """``nn.Embedding``: a holds indices ``[N, ...]``, g ``[K, N, ..., d]``."""
    table = cast("nn.Embedding", module)
    index = a.reshape(len(a), -1)

    def gradients(g: Tensor) -> dict[str, Factor]:
        cotangents = g.reshape(*g.shape[:2], -1, g.shape[-1])
        if table.padding_idx is not None:
            cotangents = cotangents * (index != table.padding_idx)[..., None]
        return {"weight": Rows(index, cotangents)}

    return gradients


def layer_norm(module: nn.Module, a: Tensor) -> Gradients:
    """``nn.LayerNorm``: the normalised input times the cotangent, summed over positions."""
    norm = cast("nn.LayerNorm", module)
    normal = functional.layer_norm(a, norm.normalized_shape, eps=norm.eps)
    return _scale_and_shift(normal, len(norm.normalized_shape))


def rms_norm(module: nn.Module, a: Tensor) -> Gradients:
    """``nn.RMSNorm``: as layer norm, without a shift."""
    norm = cast("nn.RMSNorm", module)
    normal = functional.rms_norm(a, norm.normalized_shape, eps=norm.eps)
    return _scale_and_shift(normal, len(norm.normalized_shape))


def group_norm(module: nn.Module, a: Tensor) -> Gradients:
    """``nn.GroupNorm``: a ``[N, C, ...]``."""
    norm = cast("nn.GroupNorm", module)
    return _per_channel(functional.group_norm(a, norm.num_groups, eps=norm.eps))


def instance_norm(module: nn.Module, a: Tensor) -> Gradients:
    """``nn.InstanceNorm1d/2d/3d``: a ``[N, C, ...]``; running statistics, if kept, are used in evaluation."""
    norm = cast("nn.InstanceNorm2d", module)
    mean, variance = norm.running_mean, norm.running_var
    return _per_channel(
        functional.instance_norm(a, mean, variance, use_input_stats=mean is None, eps=norm.eps)
    )


def frozen_batch_norm(module: nn.Module, a: Tensor) -> Gradients:
    """``nn.BatchNorm1d/2d/3d`` in evaluation mode, where examples are independent."""
    norm = cast("nn.BatchNorm2d", module)
    return _per_channel(functional.batch_norm(a, norm.running_mean, norm.running_var, eps=norm.eps))


def _scale_and_shift(normal: Tensor, axes: int) -> Gradients:
    """Sum over all axes between the examples and the normalised ones."""

    def gradients(g: Tensor) -> dict[str, Factor]:
        shape = (*g.shape[:2], -1, math.prod(g.shape[g.ndim - axes :]))
        return {
            "weight": Plain((normal * g).reshape(shape).sum(2)),
            "bias": Plain(g.reshape(shape).sum(2)),
        }

    return gradients


def _per_channel(normal: Tensor) -> Gradients:
    """Sum over all axes behind the channels."""

    def gradients(g: Tensor) -> dict[str, Factor]:
        return {
            "weight": Plain((normal * g).reshape(*g.shape[:3], -1).sum(3)),
            "bias": Plain(g.reshape(*g.shape[:3], -1).sum(3)),
        }

    return gradients


RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: transposed_convolution,
    nn.ConvTranspose2d: transposed_convolution,
    nn.ConvTranspose3d: transposed_convolution,
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

_unverified: set[type[nn.Module]] = set()


def register_rule(module_type: type[nn.Module], rule: LayerRule) -> None:
    """Give a layer of your own a rule for its per-example gradients.

    Without one a kernel still reaches the layer's parameters, more slowly, and the noise scale from single
    examples leaves them out. A call must take one tensor that begins with the examples and return another.
    At its first use the rule is compared with autograd, on two examples, and refused where it differs; the
    layer's forward runs once more for that.

    Args:
        module_type: The layer's class; subclasses are not served.
        rule: Takes the module and its input ``a [N, ...]``, and returns a function from the cotangents
            ``g [K, N, ...]`` of K functions of the output to one factor per parameter, by the name it has
            in the module: :class:`.factors.Outer`, :class:`.factors.Rows` or :class:`.factors.Plain`.

    Raises:
        InputError: If it is no class of modules, or the class has a rule.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return self.gain * x
        >>> def scale(module, a):                                     # a [N, 3]
        ...     return lambda g: {"gain": Plain(g * a)}               # g [K, N, 3] -> [K, N, 3]
        >>> register_rule(Scale, scale)
        >>> from gradiometer import empirical_ntk
        >>> empirical_ntk(Scale(), torch.tensor([[1.0, 2.0, 0.0]]))   # mean of 1, 4 and 0
        tensor([[1.6667]], dtype=torch.float64)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise InputError(
            "a rule is registered for a class of modules",
            got=repr(module_type),
            fix="Write register_rule(MyLayer, rule), without parentheses behind MyLayer.",
        )
    if not callable(rule):
        raise InputError("a rule is a function", got=repr(rule), fix="Write rule(module, a).")
    if module_type in RULES:
        raise InputError(
            f"{module_type.__name__} has a rule",
            got=getattr(RULES[module_type], "__name__", repr(RULES[module_type])),
            fix="Register a rule once; for another one derive a class of your own.",
        )
    RULES[module_type] = rule
    _unverified.add(module_type)


@torch.enable_grad()
def verify(path: str, module: nn.Module, a: Tensor) -> None:
    """Compare a registered rule with autograd, if this is its first use.

    Args:
        path: Of the module, for the error.
        module: The module.
        a: An input of it, with the examples first.

    Raises:
        InputError: If the rule is wrong, or has not one factor for each trainable parameter.
    """
    if type(module) not in _unverified:
        return
    shared = {name: p for name, p in module._parameters.items() if p is not None and p.requires_grad}
    values = [p.detach().requires_grad_() for p in shared.values()]
    a = a.detach()[:2]
    a = a.to(values[0].dtype) if a.is_floating_point() else a
    twin = copy.copy(module)  # hooks and gradients of the module in use see nothing of this call
    twin.__dict__["_parameters"] = {**module._parameters, **dict(zip(shared, values, strict=True))}
    twin.__dict__["_buffers"] = {k: b if b is None else b.clone() for k, b in module._buffers.items()}
    cards = [p.device for p in values if p.is_cuda]
    with torch.random.fork_rng(cards), torch.autocast(a.device.type, enabled=False):
        out = twin.forward(a)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(2, *out.shape, generator=generator).to(out)
    described = f"the rule registered for {type(module).__name__}"
    try:
        with torch.no_grad():
            factors = RULES[type(module)](module, a)(g)
            gradients = {name: factors[name].dense(p.shape) for name, p in shared.items() if name in factors}
    except Exception as error:
        raise InputError(
            f"{described} fails at module {path!r}",
            got=f"{type(error).__name__}: {error}",
            fix=f"Let it take a {list(a.shape)}, and g {list(g.shape)}.",
        ) from error
    if not set(shared) <= set(factors) <= set(module._parameters):
        raise InputError(
            f"{described} must return one factor for each parameter of the module",
            got=f"{sorted(factors)} for {sorted(shared)}",
            fix="Return a dictionary with these names.",
        )
    for k in range(2):
        for n in range(len(a)):
            row = torch.zeros_like(g[k])
            row[n] = g[k, n]
            true = torch.autograd.grad(out, values, row, retain_graph=True, materialize_grads=True)
            for name, expected in zip(shared, true, strict=True):
                _compare(described, path, name, gradients[name], (k, n), expected)
    _unverified.discard(type(module))


def _compare(
    described: str, path: str, name: str, gradient: Tensor, at: tuple[int, int], expected: Tensor
) -> None:
    """Refuse a gradient ``[K, N, p]`` that is not autograd's for one function and example."""
    fix = "Return the gradient of each function k and example n: factor.dense(shape) is [K, N, p]."
    if gradient.ndim != 3 or gradient.shape[2] != expected.numel():
        raise InputError(
            f"{described} gives no gradient [K, N, {expected.numel()}] of {name!r} at module {path!r}",
            got=f"shape {list(gradient.shape)}",
            fix=fix,
        )
    difference = float((gradient[at].double() - expected.reshape(-1).double()).norm())
    rounding = min(1e3 * torch.finfo(expected.dtype).eps, 0.1)
    if not difference <= rounding * (float(expected.double().norm()) + 1e-30):
        raise InputError(
            f"{described} gives a wrong gradient of {name!r} at module {path!r}",
            got=f"for function {at[0]} and example {at[1]} a difference of {difference:.2g} from autograd's, "
            f"whose norm is {float(expected.double().norm()):.2g}",
            fix=fix,
        )


def exception_to_rule(module: nn.Module, a: Tensor, out: Tensor) -> str | None:
    """Why one call has no rule although its module's type has one.

    Args:
        module: A module whose type is in ``RULES``.
        a: Its input.
        out: Its output.
    """
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq:
            return "an Embedding with max_norm or scale_grad_by_freq has no rule"
    elif isinstance(module, _InstanceNorm):
        if module.training and module.track_running_stats:
            return "an InstanceNorm with running statistics has no rule"
        if a.ndim != out.ndim or a.ndim != _axes(module):
            return "an unbatched InstanceNorm has no rule"
    elif isinstance(module, _BatchNorm):
        if module.training or module.running_mean is None:
            return "a BatchNorm with batch statistics couples the examples"
    elif isinstance(module, (_ConvNd, _ConvTransposeNd)) and a.ndim != len(module.kernel_size) + 2:
        return "an unbatched convolution has no rule"
    return None


def batch_axis_must_lead(module: nn.Module) -> bool:
    """Whether the rule reads the second axis as channels, so that the first must count the examples."""
    return not isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm))


def _axes(norm: _InstanceNorm) -> int:
    return {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}.get(type(norm), 0)
