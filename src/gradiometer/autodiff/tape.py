"""The layer tape: per-example gradients of all outputs from one forward and one backward pass each.

For every call of a module with a rule the tape records the input ``a`` and, per network output, the
cotangent ``g`` of the call's output; no parameter gradient and no Jacobian is formed. Parameters used
in any other way (in a parent's forward, tied, reparametrized, inside a module without a rule) are
followed operation by operation: ``torch.func.vjp`` of the one operation where such a parameter meets the
examples, mapped over examples. What even that does not reach is differentiated one example at a time.

:mod:`.plan` finds out which way serves which parameter. Every way but the plain one is checked here against
autograd, on two examples, before it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UnsupportedError
from ..stats.linalg import accumulation_dtype
from .factors import BLOCK, Factor, Plain, Side, Weight, add
from .forward_pass import Call, ForwardPass, Function, Network
from .functional import Batch
from .operations import Axis, equal, pull
from .plan import Plan, Structure, check_independence, coupled, learn, look
from .rules import RULES, Gradients

_FUSED = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]
"""Attention for backward passes taken in turn; batched ones need the plain form."""

_ONE_BY_ONE = {"cpu": 2**19}
_ONE_BY_ONE_ELSEWHERE = 2**25
"""Elements of all cotangents of one output above which outputs are taken in turn, not batched."""

_SHAKES = 8
"""How often the last bits of an example are changed, to see what rounding does to its gradients."""
_FLIPS = 4.0
"""How much farther company may move a gradient than these did: several units may stand at a corner."""

Cotangents = Mapping[GradientEdge, Tensor | None]
"""By the edge where they arrive, ``[K, ...]``; ``None`` where no function depends on it."""


_PLANS: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()
"""The last plan of each model; it is used again where one example shows the same structure."""


class LayerTape:
    """Records batches of one network, by a plan of how each parameter is reached.

    To be made and used inside :func:`.untouched.measuring`.

    Args:
        model: The module whose parameters are followed.
        function: Runs it, from a batch of inputs to outputs ``[N, ...]``.
        x: A batch to learn the structure from.

    Raises:
        InputError: A complex parameter, or outputs that no parameter reaches.
        UnsupportedError: If the outputs of one example depend on the others of the batch.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> batch = Batch.of(torch.ones(4, 3))
        >>> tape = LayerTape(net, net, batch)
        >>> recording = tape.record(batch)
        >>> sides = recording.sides(torch.eye(2)[:, None].expand(2, 4, 2))
        >>> sorted(sides), sides["weight"].dense().shape
        (['bias', 'weight'], torch.Size([2, 4, 6]))
    """

    def __init__(self, model: nn.Module, function: Function, x: Batch) -> None:
        self.network = Network(model, function)
        self.batched = True
        """Whether the cotangents of all outputs may come from one backward pass; until one was wrong."""
        both = x.part(0, 2)
        if x.count == 1:
            both = Batch(x.map(lambda t: torch.cat([t, t])), 2)
        first = both.part(0, 1)
        alone = look(self.network, first)
        self._alone = alone.output.detach()
        self.shape, self.dtype, self.device = alone.output.shape, alone.output.dtype, alone.output.device
        plan = _PLANS.get(model)
        if plan is not None and plan.structure == Structure.of(self.network, alone):
            self.plan = plan
        else:
            self.plan, alone, pair = learn(self.network, first, both, alone)
            if self.plan.doubtful:
                wrong = self._disagreeing(both, alone, pair)
                self.plan = replace(self.plan, apart=tuple(sorted({*self.plan.apart, *wrong})))
            if not self.plan.uses:  # an operation holds tensors of the pass it was learned from
                _PLANS[model] = self.plan
        self.parameters = self.network.parameters
        self.unsupported = self.plan.unsupported
        """Parameters that no method reaches, and why."""

    @property
    def owners(self) -> dict[str, str]:
        """The path of the first module that owns each parameter."""
        owners: dict[str, str] = {}
        for path, module in self.network.model.named_modules():
            for name in self.network.followed(module):
                owners.setdefault(name, path)
        return owners

    # what is checked on two examples

    def _disagreeing(self, both: Batch, alone: ForwardPass, pair: ForwardPass) -> set[str]:
        """Doubtful parameters whose gradients for two examples are not autograd's, with their layers' others.

        A gradient that changes for the first example when the second comes along belongs to no example.
        """
        names = self.plan.doubtful
        parameters = [self.network.parameters[name] for name in names]
        rows = pair.output.new_zeros(2, *pair.output.shape)
        # in float64 on the CPU, so that a device and a precision draw the same
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(pair.output.shape, generator=generator, dtype=torch.float64).to(rows)
        rows[0, 0], rows[1, 1] = drawn[0], drawn[1]
        expected = [_autograd(pair.output, parameters, row) for row in rows]
        scale = sum(float(g.norm()) for g in expected[0])
        first = _autograd(alone.output, parameters, drawn[:1])
        moved = [_distance(a, b) for a, b in zip(first, expected[0], strict=True)]
        if not all(distance <= self._rounding() * scale for distance in moved):
            shaken = self._moved_by_rounding(both.part(0, 1), parameters, drawn[:1], first)
            for name, distance, rounding in zip(names, moved, shaken, strict=True):
                if not distance <= self._rounding() * scale + _FLIPS * rounding:
                    raise coupled(f"; the gradient of parameter {name!r} shows it")
        wrong = self._wrong(both, pair, rows, expected, scale)
        if not self.plan.trusted:  # what sorts the examples may have left these two in their order
            turned = Batch(both.map(lambda t: t.flip(0) if t.ndim else t), 2)
            again = self.network.watch(turned, set(self.plan.uses))
            expected = [_autograd(again.output, parameters, row) for row in rows]
            wrong |= self._wrong(turned, again, rows, expected, scale)
        for module in self.network.model.modules():  # the others of such a layer were not looked at
            followed = set(self.network.followed(module))
            wrong |= followed if followed & wrong else set()
        return wrong

    def _moved_by_rounding(
        self, first: Batch, parameters: list[nn.Parameter], row: Tensor, gradients: list[Tensor]
    ) -> list[float]:
        """How far the last bits of the inputs move each gradient of one example.

        Far, where a unit stands at the corner of its activation: which side it is on is then a matter of
        rounding, and so of what else is in the batch.
        """
        generator = torch.Generator().manual_seed(0)

        def shake(values: Tensor) -> Tensor:
            if not values.is_floating_point():
                return values
            noise = torch.randn(values.shape, generator=generator).to(values)
            return values * (1 + 4 * torch.finfo(values.dtype).eps * noise)

        tables = [m for m in self.network.model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        hooks = [table.register_forward_hook(lambda module, args, out: shake(out)) for table in tables]
        farthest = [0.0] * len(gradients)
        try:
            for _ in range(_SHAKES):
                with torch.enable_grad():
                    out = self.network.run(Batch(first.map(shake), 1))
                shaken = _autograd(out, parameters, row)
                for i, (before, after) in enumerate(zip(gradients, shaken, strict=True)):
                    farthest[i] = max(farthest[i], _distance(before, after))
        finally:
            for hook in hooks:
                hook.remove()
        return farthest

    def _wrong(
        self, batch: Batch, seen: ForwardPass, rows: Tensor, expected: list[list[Tensor]], scale: float
    ) -> set[str]:
        """Parameters whose recorded gradients are not the expected ones, or leak between the examples."""
        names = self.plan.doubtful
        try:
            sides = Recording(self, batch, seen).sides(rows, names)
        except (UnsupportedError, RuntimeError):
            sides = {}
        wrong = set()
        for i, name in enumerate(names):
            size = self.network.parameters[name].numel()
            recorded = sides[name].dense() if name in sides else rows.new_zeros(2, 2, size)
            for k, n in ((0, 0), (0, 1), (1, 0), (1, 1)):
                gradient = expected[k][i] if k == n else torch.zeros_like(expected[k][i])
                tolerance = self._rounding() * (float(expected[k][i].norm()) + 1e-2 * scale)
                if not _distance(recorded[k, n], gradient) <= tolerance:
                    wrong.add(name)
        return wrong

    def _rounding(self) -> float:
        """What the coarsest numbers in the model leave of a gradient; never a share that passes for equal."""
        kinds = (p.dtype for p in self.network.model.parameters() if p.is_floating_point())
        return min(1e3 * max(torch.finfo(kind).eps for kind in kinds), 0.1)

    # what a batch costs

    def bytes_needed(self, count: int, outputs: int) -> int:
        """Estimated peak of recording and contracting this many examples and outputs.

        Args:
            count: Examples at a time.
            outputs: Network outputs at a time.
        """
        sizes = self.plan.sizes
        return count * (sizes.forward + outputs * (sizes.cotangents + sizes.explicit))

    def workspace(self, pairs: int) -> int:
        """Bytes for blocks of explicit gradients.

        Args:
            pairs: Examples times outputs at a time.
        """
        return 3 * 4 * min(BLOCK, pairs * self.plan.sizes.widest)

    def in_turn(self, count: int) -> bool:
        """Whether one backward pass for this many examples is work enough to take outputs in turn.

        Args:
            count: Examples at a time.
        """
        return self.plan.sizes.elements * count > _ONE_BY_ONE.get(self.device.type, _ONE_BY_ONE_ELSEWHERE)

    # one batch

    def record(self, batch: Batch, *, first: bool = False) -> Recording:
        """Run the model on a batch and keep what its gradients are made of.

        Args:
            batch: Inputs of the structure learned from.
            first: Whether the batch begins with the example that the structure was learned from: its
                outputs must then be those it has alone.

        Raises:
            UnsupportedError: If the structure is another one.
        """
        with sdpa_kernel(_FUSED) if self.in_turn(batch.count) else nullcontext():
            seen = self.network.watch(batch, set(self.plan.uses))
        if not self.plan.axes:
            seen.calls = []
        if len(seen.calls) != len(self.plan.axes) or set(seen.operations) != set(self.plan.uses):
            raise UnsupportedError(
                "the model takes another course for other examples, and cannot be recorded in one batch",
                fix="Pass forward= for a part of the model that is the same for all.",
            )
        recording = Recording(self, batch, seen)
        if first:
            check_independence(self._alone, seen.output)
        return recording


class Recording:
    """One batch on the tape.

    Args:
        tape: Knows how each parameter is reached.
        batch: What was recorded.
        seen: What the forward pass showed.

    Raises:
        UnsupportedError: If a layer's output does not grow with the batch.
    """

    def __init__(self, tape: LayerTape, batch: Batch, seen: ForwardPass) -> None:
        self._tape = tape
        self._plan = tape.plan
        self._network = tape.network
        self._batch = batch
        self._seen = seen
        self.output = seen.output
        self._prepared: dict[GradientEdge, Gradients] = {}
        self._calls = [
            (call, axis) for call, axis in zip(seen.calls, tape.plan.axes, strict=True) if axis is not None
        ]
        self._direct = [(use, seen.operations[number]) for number, use in tape.plan.uses.items()]
        for call, axis in self._calls:
            _check_size(call, axis, batch.count)

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
        wanted = set(self._network.parameters if names is None else names) - set(self._plan.unsupported)
        apart = [name for name in self._plan.apart if name in wanted]
        uses: dict[str, list[Factor]] = {name: [] for name in self._network.parameters if name in wanted}
        edges = self._edges(wanted)
        cotangents = dict(zip(edges, self._cotangents(edges, rows), strict=True))
        for name, factor in (*self._of_calls(cotangents), *self._of_operations(cotangents)):
            if name in uses and name not in apart:
                uses[name].append(factor)
        for name, gradient in self._one_example_at_a_time(apart, rows).items():
            uses[name].append(Plain(gradient))
        weights = weights or {}
        return {
            name: Side(add(factors), self._network.parameters[name].shape, weights.get(name, 1.0))
            for name, factors in uses.items()
            if factors
        }

    def _edges(self, wanted: set[str]) -> list[GradientEdge]:
        """Where cotangents are needed, each edge once."""
        edges: dict[GradientEdge, None] = {}
        for call, _ in self._calls:
            if wanted & set(self._network.followed(call.module)):
                edges[call.edge] = None
        for use, operation in self._direct:
            edges.update(dict.fromkeys(operation.output(i)[1] for i in use.outputs))
        return list(edges)

    def _of_calls(self, cotangents: Cotangents) -> Iterator[tuple[str, Factor]]:
        """What each layer call contributes, by rule."""
        for call, axis in self._calls:
            g = cotangents.get(call.edge)
            if g is not None:
                for local, factor in self._factors(call, axis, g).items():
                    name = self._network.name(call.module._parameters[local])
                    assert name is not None
                    yield name, factor

    def _of_operations(self, cotangents: Cotangents) -> Iterator[tuple[str, Factor]]:
        """What each operation contributes in which parameters meet the examples."""
        network = self._network
        for use, operation in self._direct:
            gs = [cotangents[operation.output(i)[1]] for i in use.outputs]
            if any(g is not None for g in gs):
                yield from pull(use, operation, gs, self._batch.count, network.names, network.parameters)

    def _factors(self, call: Call, axis: Axis, g: Tensor) -> dict[str, Factor]:
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
            if self._network.name(call.module._parameters.get(local)) is not None
        }
        return trained if axis.size == 1 else {k: f.fold(axis.size) for k, f in trained.items()}

    def _cotangents(self, edges: list[GradientEdge], rows: Tensor) -> list[Tensor | None]:
        """Of each edge, ``[K, ...]``."""
        if not edges:
            return []
        if len(rows) > 1 and self._tape.batched and not self._tape.in_turn(self._batch.count):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # a missing batching rule is a warning, and slow
                    batched = self._grad(edges, rows, is_grads_batched=True)
                if self._plan.trusted or equal(
                    [g if g is None else g[-1] for g in batched], self._grad(edges, rows[-1])
                ):
                    return list(batched)
            except (RuntimeError, UserWarning):
                pass
            self._tape.batched = False
        in_turn = [self._grad(edges, row) for row in rows]
        if len(in_turn) == 1:
            return [None if g is None else g[None] for g in in_turn[0]]
        return [None if gs[0] is None else torch.stack(gs) for gs in zip(*in_turn, strict=True)]

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
        parameters = [self._network.parameters[name] for name in names]
        gradients = [
            rows.new_zeros(len(rows), self._batch.count, p.numel(), dtype=p.dtype) for p in parameters
        ]
        for n, alone in self._batch.parts(1):
            with torch.enable_grad():
                out = self._network.run(alone)
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


def _autograd(output: Tensor, parameters: list[nn.Parameter], row: Tensor) -> list[Tensor]:
    """Gradients of one function of the outputs, flat; zeros where nothing depends on a parameter."""
    grads = torch.autograd.grad(output, parameters, row, retain_graph=True, allow_unused=True)
    dense = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return [(g.to_dense() if g.is_sparse else g).reshape(-1) for g in dense]


def _distance(a: Tensor, b: Tensor) -> float:
    wide = accumulation_dtype(a.device)
    return float((a.to(wide) - b.to(wide)).norm())


def _check_size(call: Call, axis: Axis, count: int) -> None:
    if call.shape[axis.axis] != count * axis.size:
        raise UnsupportedError(
            f"the output of module {call.path!r} does not grow with the batch as it did for two examples",
            got=f"{list(call.shape)} for {count} examples",
            fix="Pass forward= for the part of the model that treats examples one by one.",
        )
