"""How each parameter of a network is reached, found out from one example and from two.

An axis that is twice as long for two examples holds the examples. A parameter is served by the rules of the
layers that call it, where those calls account for every edge of the graph that ends in it; by the operations
in which it meets the examples, where they do not; and one example at a time where neither can be matched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import InputError, UnsupportedError
from .forward_pass import Call, ForwardPass, Network
from .functional import Batch
from .operations import Axis, UnmatchedError, Use, grown, meetings
from .rules import RULES, batch_axis_must_lead, verify

_KEEPS_EXAMPLES = frozenset(
    f"{name}Backward"
    for name in (
        *("Add", "Addmm", "AdaptiveAvgPool2D", "AvgPool2D", "Bmm", "Clone", "Convolution", "Div", "Expand"),
        *("Gelu", "Mean", "Mm", "Mul", "NativeBatchNorm", "NativeLayerNorm", "Permute", "Relu"),
        *("ReshapeAlias", "SafeSoftmax", "ScaledDotProductFlashAttentionForCpu", "Sigmoid", "Silu"),
        *("Softmax", "Sub", "Sum", "T", "Tanh", "Transpose", "UnsafeView", "Unsqueeze", "View"),
    )
) | {"torch::autograd::AccumulateGrad"}
"""Derivatives that neither move examples nor hide a use of a parameter, with batching rules to be trusted."""
_MOVES = frozenset(
    f"{name}Backward"
    for name in ("Cat", "Embedding", "Select", "Slice", "Split", "Squeeze", "Stack", "Unbind")
)
"""Derivatives with batching rules to be trusted that might move examples. All others are checked."""


@dataclass(frozen=True)
class Sizes:
    """What one example costs.

    Args:
        forward: Bytes that its forward pass keeps.
        cotangents: Bytes of the cotangents of all calls, for one output.
        explicit: Bytes of the gradients that must be formed, for one output.
        elements: Elements of all cotangents of one output.
        widest: Elements of the largest parameter of a layer with positions.
    """

    forward: int
    cotangents: int
    explicit: int
    elements: int
    widest: int


@dataclass(frozen=True)
class Structure:
    """What must be the same for a plan to hold: what one example runs through, and where parameters enter.

    Args:
        parameters: Name and shape of each that is followed.
        calls: Of each layer call: path, input and output shape, and why its rule does not hold.
        kinds: How many nodes of each kind the graph has.
        edges: How many edges of the graph end in each parameter.
    """

    parameters: Mapping[str, torch.Size]
    calls: tuple[tuple[str, torch.Size, torch.Size, str | None], ...]
    kinds: Mapping[str, int]
    edges: Mapping[str, int]

    @classmethod
    def of(cls, network: Network, alone: ForwardPass) -> Structure:
        """Read it from a pass over one example.

        Args:
            network: The network.
            alone: The pass.
        """
        nodes = _reachable(alone.output)
        return cls(
            parameters={name: p.shape for name, p in network.parameters.items()},
            calls=tuple((call.path, call.a.shape, call.shape, call.reason) for call in alone.calls),
            kinds=Counter(
                node.name().rstrip("0123456789") for node in nodes
            ),  # of AddBackward0, AddBackward1
            edges=_edges_into_parameters(nodes, network.names),
        )


@dataclass(frozen=True)
class Plan:
    """How each parameter is reached.

    Args:
        structure: Of the pass over one example.
        axes: Of each layer call, which axis holds the examples; ``None`` where no rule serves the call.
        uses: Operations in which parameters meet the examples, by their number in the pass.
        apart: Parameters that are differentiated one example at a time.
        unsupported: Parameters that no method reaches, and why.
        doubtful: Parameters whose gradients are to be compared with autograd's before they are used.
        trusted: Whether every derivative of the graph has a batching rule that is known to be right.
        sizes: What one example costs.
    """

    structure: Structure
    axes: tuple[Axis | None, ...]
    uses: Mapping[int, Use]
    apart: tuple[str, ...]
    unsupported: Mapping[str, str]
    doubtful: tuple[str, ...]
    trusted: bool
    sizes: Sizes


def look(network: Network, first: Batch) -> ForwardPass:
    """Run one example through a network whose parameters can be followed.

    Args:
        network: The network.
        first: One example.

    Raises:
        InputError: A complex parameter, or outputs that no parameter reaches.
        UnsupportedError: Batch norm without running statistics, or an embedding that rescales itself.
    """
    check_parameters(network)
    alone = network.watch(first, weigh=True)
    if not alone.output.requires_grad:
        raise InputError(
            "no trainable parameter reaches the outputs",
            fix="Call model.requires_grad_(True) on the part that is trained; see that the forward "
            "does not detach or run under no_grad.",
        )
    return alone


def learn(
    network: Network, first: Batch, both: Batch, alone: ForwardPass
) -> tuple[Plan, ForwardPass, ForwardPass]:
    """Find out how each parameter is reached.

    Args:
        network: The network.
        first: One example.
        both: The same example and another.
        alone: What :func:`look` saw of the first.

    Returns:
        The plan, and the passes over one and over two examples that it was learned from.

    Raises:
        InputError: If a registered rule is wrong.
        UnsupportedError: If the outputs of one example depend on the others of the batch.
    """
    pair = network.watch(both)
    structure = Structure.of(network, alone)
    check_independence(alone.output.detach(), pair.output, lambda: _culprit(alone, pair))
    if [call.path for call in alone.calls] != [call.path for call in pair.calls]:
        apart = tuple(network.parameters)  # another course for each example: nothing to be matched
        sizes = _weigh(network, alone, (), {}, apart)
        return Plan(structure, (), {}, apart, {}, (), False, sizes), alone, pair
    axes = tuple(_axis_of_call(a, b) for a, b in zip(alone.calls, pair.calls, strict=True))
    for call, axis in zip(pair.calls, axes, strict=True):
        if axis is not None:
            verify(call.path, call.module, call.a.movedim(axis.axis, 0))
    nodes = _reachable(alone.output)
    unsupported = _behind_checkpoints(network, alone, nodes)
    odd, rest = _unserved(network, alone, axes, nodes, structure.edges)
    rest -= set(unsupported)
    uses: Mapping[int, Use] = {}
    apart = ()
    saved = alone.saved_bytes
    if rest:
        alone, pair = network.watch(first, None), network.watch(both, None)
        alone.saved_bytes = saved
        try:
            uses = _meetings(network, alone, pair, axes, rest)
        except UnmatchedError:
            apart = tuple(sorted(rest))
    kinds = set(structure.kinds)
    doubtful = _doubtful(network, alone, odd | rest, kinds) - {*apart, *unsupported}
    plan = Plan(
        structure=structure,
        axes=axes,
        uses=uses,
        apart=apart,
        unsupported=unsupported,
        doubtful=tuple(sorted(doubtful)),
        trusted=kinds <= _KEEPS_EXAMPLES | _MOVES,
        sizes=_weigh(network, alone, axes, uses, apart),
    )
    return plan, alone, pair


def _unserved(
    network: Network,
    alone: ForwardPass,
    axes: tuple[Axis | None, ...],
    nodes: set[Node],
    edges: Mapping[str, int],
) -> tuple[set[str], set[str]]:
    """Parameters of calls in an odd layout, and those of which the calls do not account for every edge."""
    served = dict.fromkeys(network.parameters, 0)
    odd: set[str] = set()
    for call, axis in zip(alone.calls, axes, strict=True):
        for parameter in call.module._parameters.values():
            name = network.name(parameter)
            if name is not None and axis is not None and call.edge.node in nodes:
                served[name] += 1
                if axis != Axis(0, 1):
                    odd.add(name)
    return odd, {name for name in served if edges.get(name, 0) != served[name]}


def _meetings(
    network: Network, alone: ForwardPass, pair: ForwardPass, axes: tuple[Axis | None, ...], rest: set[str]
) -> dict[int, Use]:
    served = {call.number for call, axis in zip(alone.calls, axes, strict=True) if axis is not None}
    wanted = {id(network.parameters[name]) for name in rest}
    return meetings(alone.operations, pair.operations, wanted, served)


def _doubtful(network: Network, alone: ForwardPass, odd: set[str], kinds: set[str]) -> set[str]:
    """Parameters whose gradients nothing but a comparison with autograd vouches for."""
    if not kinds <= _KEEPS_EXAMPLES | _MOVES:
        return set(network.parameters)
    doubtful = set(odd)
    if kinds <= _KEEPS_EXAMPLES:
        return doubtful
    # one parameter of each layer tells whether its examples moved
    for module in {id(call.module): call.module for call in alone.calls}.values():
        followed = network.followed(module)
        doubtful.add(min(followed, key=lambda name: followed[name].numel()))
    return doubtful


def _behind_checkpoints(network: Network, alone: ForwardPass, nodes: set[Node]) -> dict[str, str]:
    """Parameters whose gradient would pass through a reentrant checkpoint."""
    doors = [node for node in nodes if node.name() == "CheckpointFunctionBackward"]
    if not doors:
        return {}
    reason = "its gradient passes through a reentrant checkpoint; write use_reentrant=False"
    behind: set[Node] = set()
    for door in doors:
        behind |= _upstream(door)
    lost = {name for name in map(network.name, map(_variable, behind)) if name is not None}
    hidden = {name for name in network.parameters if name.rpartition(".")[0] in alone.hidden}
    return dict.fromkeys(sorted(lost | hidden), reason)


def _weigh(
    network: Network,
    alone: ForwardPass,
    axes: tuple[Axis | None, ...],
    uses: Mapping[int, Use],
    apart: tuple[str, ...],
) -> Sizes:
    """What one example costs; half-precision parts are widened to float32 before they are multiplied."""
    forward, cotangents, elements, widest = alone.saved_bytes, 0, 0, 0
    wide = max(4, alone.output.element_size())
    for call, axis in zip(alone.calls, axes, strict=False):  # no axes where calls cannot be matched
        if axis is None:
            continue
        elements += call.shape.numel()
        if call.shape.numel() != call.shape[-1] or not isinstance(call.module, nn.Linear):  # positions
            widest = max(widest, *[p.numel() for p in call.module._parameters.values() if p is not None])
        cotangents += wide * call.shape.numel()
        patch = 1
        if isinstance(call.module, (_ConvNd, _ConvTransposeNd)):
            patch = math.prod(call.module.kernel_size)
        forward += wide * call.a.numel() * patch
    met = (network.name(leaf) for use in uses.values() for leaf in use.operation.leaves)
    explicit = sum(
        wide * network.parameters[name].numel() for name in {*apart, *(n for n in met if n is not None)}
    )
    for module in network.model.modules():
        if type(module) not in RULES or isinstance(module, _ConvTransposeNd):
            explicit += wide * sum(p.numel() for p in network.followed(module).values())
    return Sizes(forward, 2 * cotangents, explicit, elements, widest)


# the graph


def _reachable(output: Tensor) -> set[Node]:
    assert output.grad_fn is not None
    return _upstream(output.grad_fn) | {output.grad_fn}


def _upstream(node: Node) -> set[Node]:
    """All nodes that a node's gradient flows to."""
    passed: set[Node] = set()
    open_nodes = [node]
    while open_nodes:
        for other, _ in open_nodes.pop().next_functions:
            if other is not None and other not in passed:
                passed.add(other)
                open_nodes.append(other)
    return passed


def _variable(node: Node) -> Any:
    """The tensor whose gradient a leaf of the graph accumulates."""
    return getattr(node, "variable", None)


def _edges_into_parameters(nodes: set[Node], names: dict[int, str]) -> dict[str, int]:
    """How many edges of the graph end in each parameter."""
    edges: dict[str, int] = {}
    for node in nodes:
        for other, _ in node.next_functions:
            name = None if other is None else names.get(id(_variable(other)))
            if name is not None:
                edges[name] = edges.get(name, 0) + 1
    return edges


def _axis_of_call(first: Call, second: Call) -> Axis | None:
    """The axis of the examples in a call that a rule can serve."""
    if first.path != second.path or first.reason is not None:
        return None
    try:
        axis, out = grown(first.a.shape, second.a.shape), grown(first.shape, second.shape)
    except UnmatchedError:
        return None
    if axis is None or axis != out:
        return None
    if axis.axis > 0 and batch_axis_must_lead(first.module):
        return None
    return axis


# what is refused


def check_parameters(network: Network) -> None:
    """Refuse parameters that have no real gradient, and modules that a measurement would change.

    Args:
        network: The network.

    Raises:
        InputError: No trainable parameter, or a complex one.
        UnsupportedError: Batch statistics without running ones, or an embedding that rescales itself.
    """
    if not network.parameters:
        raise InputError(
            f"{type(network.model).__name__} has no trainable parameter",
            fix="Call model.requires_grad_(True) on the part that is trained.",
        )
    for name, parameter in network.parameters.items():
        if parameter.is_complex():
            raise InputError(
                f"parameter {name!r} is complex, and the kernel is defined for real parameters",
                got=parameter.dtype,
                fix="Hold real and imaginary parts as two real parameters, or freeze it.",
            )
    for path, module in network.model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise coupled(f"; module {path!r} ({type(module).__name__}) has no running statistics")
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise UnsupportedError(
                f"module {path!r} rescales its own weights in every forward (max_norm), so that measuring "
                "would change the run",
                fix="Leave max_norm out.",
            )


def check_independence(alone: Tensor, together: Tensor, detail: Callable[[], str] = str) -> None:
    """Refuse a network whose first example gives something else in company.

    Args:
        alone: Outputs of the first example.
        together: Outputs of a batch that begins with it.
        detail: Says where the coupling begins.

    Raises:
        UnsupportedError: If they differ by more than rounding and other kernels of torch explain.
    """
    difference = (alone - together.detach()[:1]).abs().max()
    tolerance = max(1e-2, 20 * torch.finfo(alone.dtype).eps)
    if bool(difference > tolerance * together.abs().max()):
        raise coupled(detail())


def coupled(detail: str) -> UnsupportedError:
    """The error for examples that depend on each other.

    Args:
        detail: What shows it.
    """
    return UnsupportedError(
        "the outputs for one example change with the others in the batch, so that no example has a gradient "
        "of its own" + detail,
        fix="Use layers that treat examples one by one (BatchNorm with running statistics, GroupNorm).",
    )


def _culprit(alone: ForwardPass, pair: ForwardPass) -> str:
    """Where the coupling begins."""
    for first, second in zip(alone.calls, pair.calls, strict=False):
        if first.reason is not None:
            return f"; module {first.path!r}: {first.reason}"
        if first.a.is_floating_point() and second.a.shape == (2, *first.a.shape[1:]):
            difference = (first.a[0] - second.a[0]).abs().max()
            if bool(difference > 1e-2 * second.a.abs().max()):
                return f"; it begins before module {first.path!r}"
    return ""
