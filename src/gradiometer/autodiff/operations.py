"""Parameters outside of layers: the operations in which they meet the examples, and their gradients there.

A parameter may be used in a parent's forward, tied by hand, reparametrized, or belong to a module without a
rule. Every torch function of the forward is written down, in a pass over one example and in one over two;
a tensor that does not grow with the batch and is made of parameters alone is followed until it enters a
function whose result does grow. The gradient of that one function is taken example by example.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import vjp, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import UnsupportedError
from .factors import Factor, Plain
from .rules import linear


@dataclass(frozen=True)
class Axis:
    """Which axis holds the examples, and how many entries each has there."""

    axis: int
    size: int


@dataclass
class Operation:
    """One call of a torch function.

    Args:
        function: The function.
        leaves: All arguments, flattened; kept in the passes that are learned from.
        edges: Where the gradients of arguments go.
        spec: How to put the arguments together again.
        versions: Of the tensors in ``inputs``.
        outputs: Shape and edge of each tensor that came out; ``None`` for one without a gradient.
        made: The tensors themselves, in the passes that are learned from.
        inputs: The arguments' values as they went in.
        call: The number of the layer call in which it happened.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    edges: list[GradientEdge | None]
    spec: pytree.TreeSpec
    versions: list[int]
    outputs: list[tuple[torch.Size, GradientEdge] | None]
    made: list[Tensor]
    inputs: list[Any]
    call: int | None

    def output(self, i: int) -> tuple[torch.Size, GradientEdge]:
        """Shape and edge of an output that has a gradient."""
        output = self.outputs[i]
        assert output is not None
        return output


def _edge(value: Any) -> GradientEdge | None:
    return get_gradient_edge(value) if isinstance(value, Tensor) and value.requires_grad else None


@dataclass(frozen=True)
class Use:
    """An operation in which parameters meet the examples."""

    operation: Operation
    free: list[int]
    axes: dict[int, Axis]
    outputs: list[int]
    output_axes: list[Axis]


class UnmatchedError(Exception):
    """Operations cannot be matched between batches: the parameters are differentiated example by example."""


class Operations(TorchFunctionMode):
    """Writes down torch functions, and what went in and came out."""

    def __init__(self, operations: dict[int, Operation], wanted: Collection[int] | None) -> None:
        super().__init__()
        self._operations = operations
        self._wanted = wanted
        self._count = 0
        self.paused = False
        self.call: int | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        self._count += 1
        if self._wanted is not None and self._count not in self._wanted:
            return function(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        try:
            edges = [_edge(leaf) for leaf in leaves]
        except RuntimeError:  # inside a transform of the model's own
            return function(*args, **kwargs)
        inputs = list(leaves)
        in_place = out_of_place(function) is not None
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
                inputs[i] = leaf.detach().clone() if in_place else leaf.detach()
        out = function(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        try:
            ends = [_edge(t) for t in tensors]
        except RuntimeError:
            return out
        if tensors:
            self._operations[self._count] = Operation(
                function=function,
                leaves=leaves if self._wanted is None else [],
                edges=edges,
                spec=spec,
                versions=[leaf._version if isinstance(leaf, Tensor) else 0 for leaf in inputs],
                outputs=[
                    None if edge is None else (t.shape, edge) for t, edge in zip(tensors, ends, strict=True)
                ],
                made=tensors if self._wanted is None else [],
                inputs=inputs,
                call=self.call,
            )
        return out


def meetings(
    alone: Mapping[int, Operation],
    in_company: Mapping[int, Operation],
    parameters: set[int],
    served: Collection[int],
) -> dict[int, Use]:
    """The operations in which tensors made of parameters alone meet tensors that hold examples.

    Args:
        alone: Operations on one example.
        in_company: The same on two.
        parameters: ``id`` of each parameter looked for.
        served: Numbers of the layer calls that a rule serves; what happens inside them does not count.

    Raises:
        UnmatchedError: If the two do not match.
    """
    if list(alone) != list(in_company):
        raise UnmatchedError
    free = set(parameters)
    uses: dict[int, Use] = {}
    for number, first in alone.items():
        second = in_company[number]
        met = [i for i, leaf in enumerate(first.leaves) if isinstance(leaf, Tensor) and id(leaf) in free]
        if not met or not any(first.outputs) or first.call in served:
            continue
        if first.function is not second.function or len(first.made) != len(second.made):
            raise UnmatchedError
        outputs = [i for i, out in enumerate(first.outputs) if out is not None]
        axes = [grown(first.made[i].shape, second.made[i].shape) for i in outputs]
        if all(axis is None for axis in axes):
            free |= {id(first.made[i]) for i in outputs}
            continue
        batched = {
            i: grown(leaf.shape, second.leaves[i].shape)
            for i, leaf in enumerate(first.leaves)
            if isinstance(leaf, Tensor) and i not in met
        }
        output_axes = [axis for axis in axes if axis is not None]
        if len(output_axes) < len(axes):
            raise UnmatchedError
        uses[number] = Use(
            first, met, {i: axis for i, axis in batched.items() if axis is not None}, outputs, output_axes
        )
    return uses


def grown(first: torch.Size, second: torch.Size) -> Axis | None:
    """The axis that is twice as long for two examples as for one."""
    if first == second:
        return None
    changed = [i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]
    if len(first) != len(second) or len(changed) != 1 or second[changed[0]] != 2 * first[changed[0]]:
        raise UnmatchedError
    return Axis(changed[0], first[changed[0]])


def pull(
    use: Use,
    now: Operation,
    gs: Sequence[Tensor | None],
    count: int,
    names: Mapping[int, str],
    parameters: Mapping[str, Tensor],
) -> list[tuple[str, Factor]]:
    """Gradients of parameters through one operation.

    Args:
        use: The operation as it was learned.
        now: The same in the pass over the batch.
        gs: Cotangents of the outputs in ``use.outputs``, ``[K, ...]`` or ``None``; not all ``None``.
        count: Number of examples.
        names: Of the parameters, by ``id``.
        parameters: By name.
    """
    then = use.operation
    for i in use.axes:
        if now.inputs[i]._version != now.versions[i]:
            raise UnsupportedError(
                f"an input of {_name(then.function)} was changed in place after it was used with a parameter",
                fix="Write the operation that changes it out of place.",
            )
    present = [g for g in gs if g is not None]
    if len(gs) == 1 and then.function in _ADDITIONS and len(then.leaves) == 2 and len(use.free) == 1:
        factors_of: dict[int, Factor] = {use.free[0]: _added(use, present[0], count)}
    elif then.function is functional.linear and (of_layer := _as_layer(use, now, present[0])) is not None:
        factors_of = of_layer
    else:
        full = [_like_output(use, i, present[0], count) if g is None else g for i, g in enumerate(gs)]
        gradients = _example_by_example(use, now, full, count)
        factors_of = {i: Plain(g.reshape(*g.shape[:2], -1)) for i, g in zip(use.free, gradients, strict=True)}
    factors: list[tuple[str, Factor]] = []
    for i, factor in factors_of.items():
        name = names.get(id(then.leaves[i]))
        if name is not None:
            factors.append((name, factor))
            continue
        shape = then.leaves[i].shape
        dense = factor.dense(shape)
        gradient = dense.reshape(*dense.shape[:2], *shape)
        factors += [(name, Plain(part)) for name, part in _back(then.edges[i], gradient, parameters).items()]
    return factors


def _like_output(use: Use, i: int, like: Tensor, count: int) -> Tensor:
    shape = list(use.operation.made[use.outputs[i]].shape)
    shape[use.output_axes[i].axis] *= count
    return like.new_zeros(len(like), *shape)


_ADDITIONS = frozenset((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__))


def _added(use: Use, g: Tensor, count: int) -> Plain:
    """A sum: the cotangent itself, summed over what was broadcast."""
    axis, shape = use.output_axes[0], use.operation.leaves[use.free[0]].shape
    gradients = g.unflatten(axis.axis + 1, (count, axis.size)).movedim(axis.axis + 1, 1)
    aligned = (1,) * (gradients.ndim - 2 - len(shape)) + tuple(shape)
    broadcast = [2 + d for d, size in enumerate(aligned) if size == 1 and gradients.shape[2 + d] != 1]
    summed = gradients.sum(broadcast, keepdim=True) if broadcast else gradients
    return Plain(summed.reshape(*gradients.shape[:2], -1))


def _as_layer(use: Use, now: Operation, g: Tensor) -> dict[int, Factor] | None:
    """``functional.linear`` with a weight from elsewhere: the rule of ``nn.Linear``."""
    numbers = list(range(len(use.operation.leaves)))
    args, kwargs = pytree.tree_unflatten(numbers, use.operation.spec)
    places = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    axis = use.axes.get(places["input"])
    local = {places[name]: name for name in ("weight", "bias") if places.get(name) in use.free}
    if axis is None or axis != use.output_axes[0] or len(local) < len(use.free) or axis.axis == g.ndim - 2:
        return None
    wide = torch.promote_types(g.dtype, torch.float32)
    a = now.inputs[places["input"]].to(wide).movedim(axis.axis, 0)
    factors = linear(nn.Identity(), a)(g.to(wide).movedim(axis.axis + 1, 1))
    return {i: factors[name].fold(axis.size) for i, name in local.items()}


class _OneOperation:
    """One function on its own, example by example.

    Args:
        use: The operation as it was learned; free tensors keep the values they had there.
        now: The same in the pass over the batch.
        gs: Cotangents of the outputs, ``[K, ...]``.
        count: Number of examples.
    """

    def __init__(self, use: Use, now: Operation, gs: Sequence[Tensor], count: int) -> None:
        self._use = use
        self._now = now
        self._function = out_of_place(use.operation.function) or use.operation.function
        self._free = [use.operation.inputs[i].detach() for i in use.free]
        # an axis of N * size entries becomes two, so that one index picks one example
        self._xs = [now.inputs[i].unflatten(axis.axis, (count, axis.size)) for i, axis in use.axes.items()]
        self._x_dims = [axis.axis for axis in use.axes.values()]
        self._gs = [
            g.unflatten(axis.axis + 1, (count, axis.size))
            for g, axis in zip(gs, use.output_axes, strict=True)
        ]
        self._g_dims = [axis.axis + 1 for axis in use.output_axes]

    def _run(self, xs: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs that have a gradient, of one example."""
        then, now, use = self._use.operation, self._now, self._use
        leaves = [now.inputs[i] if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(then.inputs)]
        for i, value in [*zip(use.axes, xs, strict=True), *zip(use.free, values, strict=True)]:
            leaves[i] = value
        args, kwargs = pytree.tree_unflatten(leaves, then.spec)
        tensors = [out for out in pytree.tree_leaves(self._function(*args, **kwargs)) if _is_tensor(out)]
        return tuple(tensors[i] for i in use.outputs)

    def mapped(self) -> Sequence[Tensor]:
        """All examples and outputs at once, ``[K, N, ...]`` for each free tensor.

        Raises:
            RuntimeError: If the function has no batching rule; a slow one is a UserWarning.
        """

        def one_example(xs: list[Tensor], gs: list[Tensor]) -> tuple[Tensor, ...]:
            pull_back = vjp(lambda *values: self._run(xs, values), *self._free)[1]
            return vmap(lambda *g: pull_back(tuple(g)))(*gs)

        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("error")
            return vmap(one_example, in_dims=(self._x_dims, self._g_dims), out_dims=1)(self._xs, self._gs)

    def plain(self, n: int, ks: Sequence[int]) -> list[list[Tensor]]:
        """One example by plain autograd: for each output, for each free tensor."""
        values = [value.detach().clone().requires_grad_() for value in self._free]
        xs = [x.select(dim, n) for x, dim in zip(self._xs, self._x_dims, strict=True)]
        with torch.enable_grad():
            out = self._run(xs, values)
        gradients = []
        for k in ks:
            gs = [g.select(dim, n)[k] for g, dim in zip(self._gs, self._g_dims, strict=True)]
            grads = torch.autograd.grad(out, values, gs, retain_graph=True, allow_unused=True)
            gradients.append(
                [torch.zeros_like(v) if grad is None else grad for v, grad in zip(values, grads, strict=True)]
            )
        return gradients


def _example_by_example(use: Use, now: Operation, gs: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """Any function: its own vjp, mapped over examples and outputs; ``[K, N, ...]`` per free tensor."""
    operation, outputs = _OneOperation(use, now, gs, count), len(gs[0])
    try:
        gradients = operation.mapped()
        corners = [(k, n) for n in {0, count - 1} for k in {0, outputs - 1}]
        # a batching rule may be wrong, as that of prelu is in torch 2.13
        if all(equal([g[k, n] for g in gradients], operation.plain(n, [k])[0]) for k, n in corners):
            return gradients
    except (RuntimeError, UserWarning):  # no batching rule, as for GRU
        pass
    by_example = [operation.plain(n, range(outputs)) for n in range(count)]
    return [
        torch.stack([torch.stack([row[i] for row in rows]) for rows in by_example], 1)
        for i in range(len(use.free))
    ]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def equal(fast: Sequence[Tensor | None], true: Sequence[Tensor | None]) -> bool:
    """Equal up to rounding."""
    for a, b in zip(fast, true, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif not torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()), equal_nan=True):
            return False
    return True


def _back(edge: GradientEdge | None, gradient: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From a tensor made of parameters back to them, ``[K, N, ...]`` to ``[K, N, p]``."""
    if edge is None:
        return {}
    flat = gradient.flatten(0, 1)
    leaves = list(parameters.values())
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    plain = torch.autograd.grad([edge], leaves, [flat[-1]], **options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            grads = torch.autograd.grad([edge], leaves, [flat], is_grads_batched=True, **options)
    except (RuntimeError, UserWarning):
        grads = plain
    if grads is plain or not equal([None if g is None else g[-1] for g in grads], plain):
        in_turn = [torch.autograd.grad([edge], leaves, [row], **options) for row in flat]
        stacks = [None if rows[0] is None else torch.stack(rows) for rows in zip(*in_turn, strict=True)]
        grads = tuple(stacks)  # type: ignore[arg-type]
    return {
        name: grad.reshape(*gradient.shape[:2], -1)
        for name, grad in zip(parameters, grads, strict=True)
        if grad is not None
    }


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


def out_of_place(function: Any) -> Callable[..., Any] | None:
    """The function that returns what an in-place one writes; ``None`` for all others."""
    name = _name(function)
    if name.startswith("__i") and name.endswith("__") and hasattr(Tensor, f"__{name[3:]}"):
        return getattr(Tensor, f"__{name[3:]}") if name not in ("__init__", "__int__", "__invert__") else None
    if name.endswith("_") and not name.endswith("__"):
        return getattr(Tensor, name[:-1], None)
    return None
