"""The layer tape: per-example gradients of all outputs from one forward and one backward pass each.

For every call of a module with a rule the tape records the input ``a`` and, per network output, the
cotangent ``g`` of the call's output; no parameter gradient and no Jacobian is formed. Parameters used
in any other way (in a parent's forward, tied, reparametrized, inside a module without a rule) are
followed operation by operation: ``torch.func.vjp`` of the one operation where such a parameter meets the
examples, mapped over examples. What even that does not reach is differentiated one example at a time.

How each parameter is reached is found out before, on batches of one and of two examples: an axis that
grows with the batch holds the examples. Every way but the plain one is checked against autograd there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from ..errors import InputError, UnsupportedError
from ..stats.linalg import accumulation_dtype
from .factors import BLOCK, Factor, Plain, Side, Weight, add
from .functional import State, examples, take
from .operations import Axis, Operation, Operations, UnmatchedError, Use, equal, grown, meetings, pull
from .rules import RULES, Gradients, batch_axis_must_lead, exception_to_rule

Function = Callable[[Any], Tensor]

_FUSED = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]
"""Attention for backward passes taken in turn; batched ones need the plain form."""
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

_ONE_BY_ONE = {"cpu": 2**19}
_ONE_BY_ONE_ELSEWHERE = 2**25
"""Elements of all cotangents of one output above which outputs are taken in turn, not batched."""


@dataclass
class _Call:
    """One call of a module whose type has a rule."""

    number: int
    path: str
    module: nn.Module
    a: Tensor
    version: int
    shape: torch.Size
    edge: GradientEdge
    reason: str | None


@dataclass
class _Pass:
    """What was seen of one forward pass."""

    output: Tensor
    calls: list[_Call] = field(default_factory=list)
    operations: dict[int, Operation] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    saved_bytes: int = 0


class LayerTape:
    """How each parameter of a model is reached, and the recording of batches.

    To be made and used inside :func:`.functional.measuring`.

    Args:
        model: The module whose parameters are followed.
        function: Runs it, from a batch of inputs to outputs ``[N, ...]``.
        x: A batch to learn the structure from.

    Raises:
        InputError: A complex parameter, or outputs that no parameter reaches.
        UnsupportedError: If the outputs of one example depend on the others of the batch.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> x = torch.ones(4, 3)
        >>> tape = LayerTape(net, net, x)
        >>> recording = tape.record(x)
        >>> sides = recording.sides(torch.eye(2)[:, None].expand(2, 4, 2))
        >>> sorted(sides), sides["weight"].dense().shape
        (['bias', 'weight'], torch.Size([2, 4, 6]))
    """

    def __init__(self, model: nn.Module, function: Function, x: Any) -> None:
        self._model = model
        self._function = function
        self._state = State(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names = {id(p): name for name, p in self.parameters.items()}
        _check_parameters(model, self.parameters)
        self.owners = _owners(model, self._names)
        self.unsupported: dict[str, str] = {}
        """Parameters that no method reaches, and why."""
        self._axes: list[Axis | None] = []
        self._uses: dict[int, Use] = {}
        self._apart: list[str] = []
        self.batched = True
        self._trusted = False
        self._elements = 0
        self._widest = 0
        pilot = take(x, slice(0, 2))
        if examples(x) == 1:
            pilot = pytree.tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) else t, pilot)
        self._learn(take(pilot, slice(0, 1)), pilot)

    # what is learned from one and two examples

    def _learn(self, x1: Any, x2: Any) -> None:
        one, two = self._watch(x1, (), weigh=True), self._watch(x2, ())
        if not one.output.requires_grad:
            raise InputError(
                "no trainable parameter reaches the outputs",
                fix="Call model.requires_grad_(True) on the part that is trained; see that the forward "
                "does not detach or run under no_grad.",
            )
        self._alone = one.output.detach()
        self.shape, self.dtype, self.device = one.output.shape, one.output.dtype, one.output.device
        _check_independence(self._alone, two.output, lambda: _culprit(one, two))
        if [call.path for call in one.calls] != [call.path for call in two.calls]:
            self._apart = list(self.parameters)
            self._example_bytes = self._weigh(one, one.saved_bytes)
            return
        self._axes = [
            _axis_of_call(first, second) for first, second in zip(one.calls, two.calls, strict=True)
        ]
        nodes = _reachable(one.output)
        kinds = {node.name().rstrip("0123456789") for node in nodes}  # of AddBackward0, AddBackward1, ...
        self._trusted = kinds <= _KEEPS_EXAMPLES | _MOVES
        uses = _uses_of_parameters(nodes, self._names)
        served: dict[str, int] = dict.fromkeys(self.parameters, 0)
        odd: set[str] = set()
        for call, axis in zip(one.calls, self._axes, strict=True):
            for parameter in call.module._parameters.values():
                name = self._names.get(id(parameter))
                if name is not None and axis is not None and call.edge.node in nodes:
                    served[name] += 1
                    if axis != Axis(0, 1):
                        odd.add(name)
        self.unsupported = self._behind_checkpoints(one, nodes)
        rest = {name for name in served if uses.get(name, 0) != served[name]} - set(self.unsupported)
        saved = one.saved_bytes
        if rest:
            one, two = self._watch(x1), self._watch(x2)
            try:
                served_calls = {
                    call.number for call, axis in zip(one.calls, self._axes, strict=True) if axis is not None
                }
                wanted = {id(self.parameters[name]) for name in rest}
                self._uses = meetings(one.operations, two.operations, wanted, served_calls)
            except UnmatchedError:
                self._apart = sorted(rest)
        self._example_bytes = self._weigh(one, saved)
        doubtful = odd | rest
        if not self._trusted:
            doubtful = set(self.parameters)
        elif not kinds <= _KEEPS_EXAMPLES:  # one parameter of each layer tells whether its examples moved
            for module in {id(call.module): call.module for call in one.calls}.values():
                own = [p for p in module._parameters.values() if p is not None and id(p) in self._names]
                doubtful.add(self._names[id(min(own, key=lambda p: p.numel()))])
        doubtful -= {*self._apart, *self.unsupported}
        if doubtful:
            self._check(x2, one, two, sorted(doubtful))

    def _check(self, x2: Any, one: _Pass, two: _Pass, names: list[str]) -> None:
        """Compare gradients for two examples with autograd's; what is wrong is taken example by example."""
        kept = [self.parameters[name] for name in names]

        def true(output: Tensor, row: Tensor) -> list[Tensor]:
            grads = torch.autograd.grad(output, kept, row, retain_graph=True, allow_unused=True)
            dense = [torch.zeros_like(p) if g is None else g for p, g in zip(kept, grads, strict=True)]
            return [(g.to_dense() if g.is_sparse else g).reshape(-1) for g in dense]

        rows = two.output.new_zeros(2, *two.output.shape)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(two.output.shape, generator=generator, dtype=torch.float64).to(rows)
        rows[0, 0], rows[1, 1] = drawn[0], drawn[1]
        expected = [true(two.output, row) for row in rows]
        whole = sum(float(g.norm()) for g in expected[0])
        # what the coarsest numbers in the model leave, and never a share that would pass for equal
        rough = min(
            1e3 * max(torch.finfo(p.dtype).eps for p in self._model.parameters() if p.is_floating_point()),
            0.1,
        )
        for name, alone, together in zip(names, true(one.output, drawn[:1]), expected[0], strict=True):
            if not _close(alone, together, rough * whole):
                raise _coupled(f"; the gradient of parameter {name!r} shows it")
        passes = [(x2, two, expected)]
        if not self._trusted:  # what orders the examples may have left these two alone
            turned = pytree.tree_map(lambda t: t.flip(0) if isinstance(t, Tensor) and t.ndim else t, x2)
            again = self._watch(turned, set(self._uses))
            passes.append((turned, again, [true(again.output, row) for row in rows]))
        wrong = set()
        for x, seen, gradients in passes:
            try:
                sides = Recording(self, x, seen, 2).sides(rows, names)
            except (UnsupportedError, RuntimeError):
                sides = {}
            for i, name in enumerate(names):
                found = sides[name].dense() if name in sides else rows.new_zeros(2, 2, kept[i].numel())
                for k, n in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    gradient = gradients[k][i] if k == n else torch.zeros_like(gradients[k][i])
                    size = float(gradients[k][i].norm()) + 1e-2 * whole
                    if not _close(found[k, n], gradient, rough * size):
                        wrong.add(name)
        for module in self._model.modules():  # where one is wrong, so are those that were not looked at
            own = {self._names[id(p)] for p in module._parameters.values() if id(p) in self._names}
            wrong |= own if own & wrong else set()
        self._apart = sorted({*self._apart, *wrong})

    def _behind_checkpoints(self, one: _Pass, nodes: set[Node]) -> dict[str, str]:
        """Parameters whose gradient would pass through a reentrant checkpoint."""
        doors = [node for node in nodes if node.name() == "CheckpointFunctionBackward"]
        if not doors:
            return {}
        reason = "its gradient passes through a reentrant checkpoint; write use_reentrant=False"
        behind: set[Node] = set()
        for door in doors:
            behind |= _upstream(door)
        lost = {self._names[id(v)] for v in map(_variable, behind) if id(v) in self._names}
        hidden = {name for name in self.parameters if name.rpartition(".")[0] in one.hidden}
        return dict.fromkeys(sorted(lost | hidden), reason)

    def _weigh(self, one: _Pass, saved: int) -> tuple[int, int, int]:
        """Bytes per example: kept by the forward, of all cotangents of one output, of explicit parts."""
        forward, cotangents = saved, 0
        wide = max(4, one.output.element_size())
        for i, call in enumerate(one.calls):
            if not self._axes or self._axes[i] is None:
                continue
            self._elements += call.shape.numel()
            if call.shape.numel() != call.shape[-1] or not isinstance(call.module, nn.Linear):  # positions
                own = [p.numel() for p in call.module._parameters.values() if p is not None]
                self._widest = max(self._widest, *own)
            cotangents += wide * call.shape.numel()
            patch = 1
            if isinstance(call.module, (_ConvNd, _ConvTransposeNd)):
                patch = math.prod(call.module.kernel_size)
            forward += wide * call.a.numel() * patch
        names = {*self._apart}
        for use in self._uses.values():
            names |= {self._names[id(p)] for p in use.operation.leaves if id(p) in self._names}
        explicit = sum(wide * self.parameters[name].numel() for name in names)
        for module in self._model.modules():
            if type(module) not in RULES or isinstance(module, _ConvTransposeNd):
                explicit += wide * sum(
                    p.numel() for p in module._parameters.values() if p is not None and id(p) in self._names
                )
        return forward, 2 * cotangents, explicit

    def bytes_needed(self, count: int, outputs: int) -> int:
        """Estimated peak of recording and contracting this many examples and outputs.

        Args:
            count: Examples at a time.
            outputs: Network outputs at a time.
        """
        forward, cotangents, explicit = self._example_bytes
        return count * (forward + outputs * (cotangents + explicit))

    def workspace(self, pairs: int) -> int:
        """Bytes for blocks of explicit gradients.

        Args:
            pairs: Examples times outputs at a time.
        """
        return 3 * 4 * min(BLOCK, pairs * self._widest)

    def in_turn(self, count: int) -> bool:
        """Whether one backward pass for this many examples is work enough to take outputs in turn.

        Args:
            count: Examples at a time.
        """
        return self._elements * count > _ONE_BY_ONE.get(self.device.type, _ONE_BY_ONE_ELSEWHERE)

    # one batch

    def record(self, x: Any, *, first: bool = False) -> Recording:
        """Run the model on a batch and keep what its gradients are made of.

        Args:
            x: A batch of inputs, of the structure learned from.
            first: Whether the batch begins with the example that the structure was learned from: its
                outputs must then be those it has alone.

        Raises:
            UnsupportedError: If the structure is another one.
        """
        with sdpa_kernel(_FUSED) if self.in_turn(examples(x)) else nullcontext():
            seen = self._watch(x, set(self._uses))
        if not self._axes:
            seen.calls = []
        if len(seen.calls) != len(self._axes) or set(seen.operations) != set(self._uses):
            raise _another_course()
        recording = Recording(self, x, seen, examples(x))
        if first:
            _check_independence(self._alone, seen.output, str)
        return recording

    def run(self, x: Any) -> Tensor:
        """The outputs; a model that remembers its last call is put back.

        Args:
            x: A batch of inputs.
        """
        try:
            return self._function(x)
        finally:
            self._state.restore()

    def _watch(self, x: Any, operations: Collection[int] | None = None, *, weigh: bool = False) -> _Pass:
        """One forward pass, with the torch functions of these numbers; ``None`` for all of them."""
        seen = _Pass(torch.empty(()))
        mode = Operations(seen.operations, operations) if operations is None or operations else None
        saved: dict[int, int] = {}
        own = {id(p) for p in self._model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if id(tensor) not in own:
                storage = tensor.untyped_storage()
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself would hold its own graph for ever

        with _hooks(self, seen, mode), ExitStack() as stack:
            if weigh:
                stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
            if mode is not None:
                stack.enter_context(mode)
            seen.output = self.run(x)
        seen.saved_bytes = sum(saved.values())
        return seen


@contextmanager
def _hooks(tape: LayerTape, seen: _Pass, operations: Operations | None) -> Iterator[None]:
    """See the calls of modules with a rule, and tell operations in which call they happen."""
    handles = []
    number = 0

    def before(module: nn.Module, args: Any) -> None:
        nonlocal number
        number += 1
        if operations is not None:
            operations.call = number

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if operations is not None:
                operations.call = None
            if not torch.is_grad_enabled() or not isinstance(out, Tensor) or not out.requires_grad:
                seen.hidden.add(path)
                return
            if operations is not None:
                operations.paused = True
            a = args[0] if args else kwargs.get("input")
            assert isinstance(a, Tensor)
            seen.calls.append(
                _Call(
                    number=number,
                    path=path,
                    module=module,
                    a=a.detach(),
                    version=a._version,
                    shape=out.shape,
                    edge=get_gradient_edge(out),
                    reason=exception_to_rule(module, a, out),
                )
            )
            if operations is not None:
                operations.paused = False

        return hook

    try:
        for path, module in tape._model.named_modules():
            own = [p for p in module._parameters.values() if id(p) in tape._names]
            if own and type(module) in RULES:
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after(path), prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recording:
    """One batch on the tape.

    Args:
        tape: Knows how each parameter is reached.
        x: The batch.
        seen: What the forward pass showed.
        count: Number of examples.
    """

    def __init__(self, tape: LayerTape, x: Any, seen: _Pass, count: int) -> None:
        self._tape = tape
        self._x = x
        self._seen = seen
        self._count = count
        self.output = seen.output
        self._prepared: dict[GradientEdge, Gradients] = {}
        self._calls = [
            (call, axis) for call, axis in zip(seen.calls, tape._axes, strict=True) if axis is not None
        ]
        for call, axis in self._calls:
            _check_size(call.path, call.shape, axis, count)

    @torch.no_grad()
    def sides(
        self,
        rows: Tensor,
        names: Collection[str] | None = None,
        weights: dict[str, Weight] | None = None,
    ) -> dict[str, Side]:
        """Gradients of K functions of the outputs, per example and parameter, in factored form.

        Args:
            rows: Cotangents of the outputs, ``[K, *output.shape]``.
            names: Parameters wanted; all that are reached when ``None``.
            weights: What squared gradients count, 1 for parameters that are not in it.

        Returns:
            One :class:`.factors.Side` per parameter; parameters that nothing depends on are absent.

        Raises:
            UnsupportedError: If an input was changed in place after it was recorded.
        """
        tape = self._tape
        wanted = set(tape.parameters if names is None else names) - set(tape.unsupported)
        uses: dict[str, list[Factor]] = {name: [] for name in tape.parameters if name in wanted}
        direct = [(use, self._seen.operations[number]) for number, use in tape._uses.items()]
        apart = [name for name in tape._apart if name in wanted]
        edges: dict[GradientEdge, int] = {}
        for call, _ in self._calls:
            if any(tape._names.get(id(p)) in wanted for p in call.module._parameters.values()):
                edges.setdefault(call.edge, len(edges))
        for use, operation in direct:
            for i in use.outputs:
                edges.setdefault(operation.output(i)[1], len(edges))
        cotangents = self._cotangents(list(edges), rows)
        for call, axis in self._calls:
            if call.edge not in edges or cotangents[edges[call.edge]] is None:
                continue
            g = cotangents[edges[call.edge]]
            assert g is not None
            for local, factor in self._factors(call, axis, g).items():
                name = tape._names.get(id(call.module._parameters[local]))
                if name in uses and name not in apart:
                    uses[name].append(factor)
        for use, operation in direct:
            gs = [cotangents[edges[operation.output(i)[1]]] for i in use.outputs]
            if any(g is not None for g in gs):
                for name, factor in pull(use, operation, gs, self._count, tape._names, tape.parameters):
                    if name in uses and name not in apart:
                        uses[name].append(factor)
        for name, gradient in self._one_example_at_a_time(apart, rows).items():
            uses[name].append(Plain(gradient))
        weights = weights or {}
        return {
            name: Side(add(found), tape.parameters[name].shape, weights.get(name, 1.0))
            for name, found in uses.items()
            if found
        }

    def _factors(self, call: _Call, axis: Axis, g: Tensor) -> dict[str, Factor]:
        """The rule, on a batch whose first axis holds the examples."""
        wide = torch.promote_types(g.dtype, torch.float32)
        if call.edge not in self._prepared:
            if call.a._version != call.version:
                raise UnsupportedError(
                    f"the input of module {call.path!r} was changed in place after its forward",
                    fix="Write the operation that changes it out of place, as in ReLU(inplace=False).",
                )
            a = call.a.to(wide) if call.a.is_floating_point() else call.a
            rule = RULES[type(call.module)]
            self._prepared[call.edge] = rule(call.module, a.movedim(axis.axis, 0))
        factors = self._prepared[call.edge](g.to(wide).movedim(axis.axis + 1, 1))
        trained = {
            local: factor
            for local, factor in factors.items()
            if id(call.module._parameters.get(local)) in self._tape._names
        }
        return trained if axis.size == 1 else {k: f.fold(axis.size) for k, f in trained.items()}

    def _cotangents(self, edges: list[GradientEdge], rows: Tensor) -> list[Tensor | None]:
        """Of each recorded output, ``[K, ...]``."""
        if not edges:
            return []
        if len(rows) > 1 and self._tape.batched and not self._tape.in_turn(self._count):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # a missing batching rule is a warning, and slow
                    batched = self._grad(edges, rows, is_grads_batched=True)
                if self._tape._trusted or equal(
                    [g if g is None else g[-1] for g in batched], self._grad(edges, rows[-1])
                ):
                    return list(batched)
            except (RuntimeError, UserWarning):
                pass
            self._tape.batched = False
        found = [self._grad(edges, row) for row in rows]
        if len(found) == 1:
            return [None if g is None else g[None] for g in found[0]]
        return [None if gs[0] is None else torch.stack(gs) for gs in zip(*found, strict=True)]

    def _grad(
        self, edges: list[GradientEdge], rows: Tensor, *, is_grads_batched: bool = False
    ) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            self.output,
            edges,
            rows,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=is_grads_batched,
        )

    def _one_example_at_a_time(self, names: list[str], rows: Tensor) -> dict[str, Tensor]:
        """Plain autograd on batches of one, ``[K, N, p]``."""
        if not names:
            return {}
        parameters = [self._tape.parameters[name] for name in names]
        gradients = [rows.new_zeros(len(rows), self._count, p.numel(), dtype=p.dtype) for p in parameters]
        for n in range(self._count):
            with torch.enable_grad():
                out = self._tape.run(take(self._x, slice(n, n + 1)))
            for k, row in enumerate(rows):
                cotangent = row[n : n + 1]
                try:
                    grads = torch.autograd.grad(
                        out, parameters, cotangent, retain_graph=True, allow_unused=True
                    )
                except RuntimeError as error:
                    raise UnsupportedError(
                        f"no method differentiates parameter {names[0]!r}",
                        got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
                        fix="Freeze it, or pass forward= for a part of the model without it.",
                    ) from error
                for gradient, grad in zip(gradients, grads, strict=True):
                    if grad is not None:
                        gradient[k, n] = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
        return dict(zip(names, gradients, strict=True))


# the graph


def _reachable(output: Tensor) -> set[Node]:
    assert output.grad_fn is not None
    return _upstream(output.grad_fn) | {output.grad_fn}


def _upstream(node: Node) -> set[Node]:
    """All nodes that a node's gradient flows to."""
    found: set[Node] = set()
    open_nodes = [node]
    while open_nodes:
        for other, _ in open_nodes.pop().next_functions:
            if other is not None and other not in found:
                found.add(other)
                open_nodes.append(other)
    return found


def _variable(node: Node) -> Any:
    return getattr(node, "variable", None)


def _uses_of_parameters(nodes: set[Node], names: dict[int, str]) -> dict[str, int]:
    """How many edges of the graph end in each parameter."""
    uses: dict[str, int] = {}
    for node in nodes:
        for other, _ in node.next_functions:
            name = None if other is None else names.get(id(_variable(other)))
            if name is not None:
                uses[name] = uses.get(name, 0) + 1
    return uses


def _owners(model: nn.Module, names: dict[int, str]) -> dict[str, str]:
    """The path of the first module that owns each parameter."""
    owners: dict[str, str] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if id(parameter) in names:
                owners.setdefault(names[id(parameter)], path)
    return owners


# what is refused


def _check_parameters(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        raise InputError(
            f"{type(model).__name__} has no trainable parameter",
            fix="Call model.requires_grad_(True) on the part that is trained.",
        )
    for name, parameter in parameters.items():
        if parameter.is_complex():
            raise InputError(
                f"parameter {name!r} is complex, and the kernel is defined for real parameters",
                got=parameter.dtype,
                fix="Hold real and imaginary parts as two real parameters, or freeze it.",
            )
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise _coupled(f"; module {path!r} ({type(module).__name__}) has no running statistics")
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise UnsupportedError(
                f"module {path!r} rescales its own weights in every forward (max_norm), so that measuring "
                "would change the run",
                fix="Leave max_norm out.",
            )


def _another_course() -> UnsupportedError:
    return UnsupportedError(
        "the model takes another course for other examples, and cannot be recorded in one batch",
        fix="Pass forward= for a part of the model that is the same for all.",
    )


def _coupled(detail: str) -> UnsupportedError:
    return UnsupportedError(
        "the outputs for one example change with the others in the batch, so that no example has a gradient "
        "of its own" + detail,
        fix="Use layers that treat examples one by one (BatchNorm with running statistics, GroupNorm).",
    )


def _close(found: Tensor, true: Tensor, tolerance: float) -> bool:
    wide = accumulation_dtype(found.device)
    return float((found.to(wide) - true.to(wide)).norm()) <= tolerance


def _check_independence(alone: Tensor, together: Tensor, detail: Callable[[], str]) -> None:
    """The first example must give the same alone and in company."""
    difference = (alone - together.detach()[:1]).abs().max()
    tolerance = max(1e-2, 20 * torch.finfo(alone.dtype).eps)
    if bool(difference > tolerance * together.abs().max()):
        raise _coupled(detail())


def _culprit(one: _Pass, two: _Pass) -> str:
    for first, second in zip(one.calls, two.calls, strict=False):
        if first.reason is not None:
            return f"; module {first.path!r}: {first.reason}"
        if first.a.is_floating_point() and second.a.shape == (2, *first.a.shape[1:]):
            difference = (first.a[0] - second.a[0]).abs().max()
            if bool(difference > 1e-2 * second.a.abs().max()):
                return f"; it begins before module {first.path!r}"
    return ""


def _axis_of_call(first: _Call, second: _Call) -> Axis | None:
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


def _check_size(path: str, shape: torch.Size, axis: Axis, count: int) -> None:
    if shape[axis.axis] != count * axis.size:
        raise UnsupportedError(
            f"the output of module {path!r} does not grow with the batch as it did for two examples",
            got=f"{list(shape)} for {count} examples",
            fix="Pass forward= for the part of the model that treats examples one by one.",
        )
