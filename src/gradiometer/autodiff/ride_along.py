"""Ride along with the user's own forward and backward pass and read per-example gradient norms.

For every module with a rule the tape notes the input ``a`` in a forward hook and, through a hook on the
output tensor, the cotangent ``g`` when the backward pass gets there. No extra pass is made, no
parameter gradient is formed, and all hooks are removed again.

What is read belongs to the training gradient only if the gradient is the sum of what the calls of modules
contribute. Whoever sees the gradient can check that: the sum is left along a direction of each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import SampleSkippedError, UnsupportedError
from ..stats.directions import Directions, full_precision
from .factors import Factor, add
from .module_hooks import ModuleHooks, weakly
from .rules import RULES, exception_to_rule, verify

ROUNDINGS = 10.0
"""How many relative errors of single terms their sum may be off by."""


def refusal(model: nn.Module) -> str | None:
    """Why per-example gradients do not exist, or cannot be seen, on this model as it stands.

    Args:
        model: The module about to be trained on one batch.

    Returns:
        The reason, or ``None``.

    Example:
        >>> refusal(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        "module '1' (BatchNorm1d) is in train mode and couples the examples of a batch"
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return (
                f"module {name!r} ({type(module).__name__}) is in train mode and couples the "
                "examples of a batch"
            )
    return None


@dataclass
class _Pass:
    """What one backward pass showed."""

    factors: dict[nn.Module, list[dict[str, Factor]]] = field(default_factory=dict)
    contracted: set[nn.Module] = field(default_factory=set)
    sq_norms: dict[str, Tensor] = field(default_factory=dict)
    rounding: float = 0.0
    incomplete: bool = False


class RideAlong:
    """Hooks for the forward and backward passes of one micro-batch.

    Args:
        model: The module being trained.
        batch_size: Examples in the batch; a layer whose input does not begin with this many is left
            out by name.
        parameters: Parameters to look at; all trainable ones when ``None``.
        metric: Factor on the square of each component of a parameter's gradient, for a second set of
            norms in ``weighted``; a parameter for which it returns ``None`` has none.
        directions: Along which the sum over the examples is left in ``expected``, with what rounding may make
            of it and the relative error of one term; ``None`` where nobody compares.
        axes: The dimension of its input along which a layer holds the examples, where that is not the first.
        several: Whether to hold what layers show until the end, so that several backward passes add up.

    Example:
        >>> net = nn.Linear(3, 1)
        >>> x = torch.randn(4, 3)
        >>> tape = RideAlong(net, 4)
        >>> net(x).sum().backward()
        >>> tape.detach()
        >>> sq_norms, skipped = tape.result()
        >>> torch.allclose(sum(sq_norms.values()), x.square().sum(1) + 1), list(sq_norms), skipped
        (True, ['weight', 'bias'], {})
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        parameters: Collection[Tensor] | None = None,
        *,
        metric: Callable[[Tensor], Tensor | None] | None = None,
        directions: Directions | None = None,
        several: bool = False,
        axes: Mapping[nn.Module, int] | None = None,
    ) -> None:
        self._axes = axes or {}
        self._batch, self._metric, self._several = batch_size, metric, several
        self._directions = directions
        self.expected: dict[str, tuple[Tensor, Tensor, float]] = {}
        self.weighted: dict[str, Tensor] = {}
        self.came_again = False
        """Whether the gradient came in several backward passes that were not held; ``result`` finds out."""
        wanted = None if parameters is None else {id(p) for p in parameters}
        trained = {
            name: p
            for name, p in model.named_parameters()
            if p.requires_grad and (wanted is None or id(p) in wanted)
        }
        self._names = {id(p): name for name, p in trained.items() if not p.is_complex()}
        self._without_gradients: set[nn.Module] = set()
        self._skipped = dict.fromkeys(trained, "it is complex")
        self._skipped |= dict.fromkeys(self._names.values(), "its module has no rule, or was not called")
        # the backward passes that came through each call of a module; a module that is left out has none
        self._calls: dict[nn.Module, list[set[int]]] = {}
        self._left_out: set[nn.Module] = set()
        self._dropped: set[str] = set()
        self._passes: dict[int, _Pass] = {}
        self._fatal: str | None = None
        self._error: Exception | None = None
        self.seconds = 0.0
        self._owners: dict[int, int] = {}
        paths: dict[nn.Module, str] = {}
        for path, module in model.named_modules():
            followed = [p for p in module._parameters.values() if p is not None and id(p) in self._names]
            for parameter in followed:
                self._owners[id(parameter)] = self._owners.get(id(parameter), 0) + 1
            if followed and type(module) in RULES:
                paths[module] = path
        self._uncalled = bool(paths)
        self._hooks = ModuleHooks(paths, weakly(self._look))
        self._hooks.attach()

    def detach(self) -> None:
        """Remove every hook."""
        self._hooks.detach()

    def _safely(self, function: Any, *arguments: Any) -> None:
        """Keep an error out of the user's forward and backward; ``result`` raises it."""
        began = perf_counter()
        try:
            function(*arguments)
        except Exception as error:  # the user's pass goes on; result() raises this
            self._error = self._error or error
        self.seconds += perf_counter() - began

    def _skip(self, module: nn.Module, reason: str) -> None:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) in self._names:
                name = self._names[id(parameter)]
                self._skipped[name] = reason
                self._dropped.add(name)
        self._left_out.add(module)

    def _look(self, *call: Any) -> None:
        self._safely(self._called, *call)

    def _called(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """A module was called: note its input, and look at the gradient of its output."""
        if torch._C._current_graph_task_id() != -1:
            # a checkpointed segment is run again in the backward pass: not a new call, but if its
            # first run had no gradients either, its outputs were never hooked
            if module in self._without_gradients:
                self._fatal = (
                    f"module {path!r} ran without gradients: reentrant checkpointing hides its graph "
                    "(use_reentrant=False shows it)"
                )
            return
        if torch.compiler.is_compiling():
            return
        self._uncalled = False
        if not torch.is_grad_enabled():
            self._without_gradients.add(module)
            return
        a = args[0] if args else kwargs.get("input")
        output = out
        if module in self._left_out or not isinstance(out, Tensor) or not out.requires_grad:
            return
        axis = max(self._axes.get(module, 0), 0)
        if axis and isinstance(a, Tensor) and a.ndim > axis and out.ndim > axis:
            a, out = a.movedim(axis, 0), out.movedim(axis, 0)
        if not isinstance(a, Tensor) or a.ndim == 0 or len(a) != self._batch:
            got = list(a.shape) if isinstance(a, Tensor) else type(a).__name__
            self._skip(module, f"its input {got} does not begin with the {self._batch} examples")
            return
        reason = _cannot(module, a, out)
        if reason:
            self._skip(module, reason)
            return
        verify(path, module, a)
        through: set[int] = set()
        self._calls.setdefault(module, []).append(through)
        version = a._version

        def returns(g: Tensor) -> None:
            self._safely(self._returns, path, module, through, a, version, g.movedim(axis, 0))

        output.register_hook(returns)

    @torch.no_grad()
    def _returns(
        self, path: str, module: nn.Module, through: set[int], a: Tensor, version: int, g: Tensor
    ) -> None:
        """A backward pass reached one call: contract at once when it is the last one of the module."""
        number = torch._C._current_graph_task_id()
        shown = self._passes.setdefault(number, _Pass())
        if module in self._left_out:
            return
        if a._version != version:
            self._skip(module, f"the input of {path!r} was changed in place after its forward")
            return
        kind = torch.promote_types(g.dtype, torch.float32)
        through.add(number)
        returned = shown.factors.setdefault(module, [])
        with full_precision(g.device):
            rule = RULES[type(module)](module, a.to(kind) if a.is_floating_point() else a)
            returned.append(rule(g.to(kind)[None]))
        shown.rounding = max(shown.rounding, torch.finfo(g.dtype).eps)
        if self._several:
            return
        # calls that only an earlier pass came through will hardly be met again
        ahead = [call for call in self._calls[module] if not call or number in call]
        if module in shown.contracted:
            shown.incomplete = True
        elif len(returned) == len(ahead):
            self._contract(module, returned, shown.sq_norms, shown.rounding)
            shown.contracted.add(module)
            returned.clear()

    def _contract(
        self,
        module: nn.Module,
        returned: Sequence[dict[str, Factor]],
        sq_norms: dict[str, Tensor],
        rounding: float,
    ) -> None:
        for own_name in returned[0]:
            parameter = module._parameters.get(own_name)
            if parameter is None or id(parameter) not in self._names:
                continue
            name = self._names[id(parameter)]
            if self._owners[id(parameter)] > 1:
                self._skipped[name] = "it is tied to another module"
                continue
            with full_precision(parameter.device):
                [factor] = add([factors[own_name] for factors in returned])
                sq_norms[name] = factor.sq_norms()[0]
                weight = self._metric(parameter) if self._metric else None
                if weight is not None:
                    self.weighted[name] = factor.sq_norms(weight.reshape(-1).to(sq_norms[name]))[0]
                if self._directions is not None:
                    self.expected[name] = self._sum_along(name, factor, parameter.numel(), rounding)

    def _sum_along(
        self, name: str, factor: Factor, numel: int, rounding: float
    ) -> tuple[Tensor, Tensor, float]:
        """The sum over the examples along the parameter's direction, and what rounding makes of it."""
        assert self._directions is not None
        terms = factor.terms()
        if terms.is_cuda and terms.dtype == torch.float32:
            rounding = max(rounding, 2.0**-10)  # of TF32, in which convolutions run
        rows, columns = self._directions.of(name, numel, factor.width, terms)
        error = ROUNDINGS * rounding
        return factor.contract(rows, columns), error * terms.sqrt(), error

    @torch.no_grad()
    def result(self, passes: Collection[int] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the passes showed.

        Args:
            passes: Numbers of the backward passes that count, those that added to ``.grad``; all of them
                when ``None``.

        Returns:
            Squared norm of each example's contribution to the gradient of each parameter, and why the
            other parameters are missing.

        Shapes:
            ``[B]``.

        Raises:
            UnsupportedError: If nothing was seen, with the reason.
            SampleSkippedError: If no backward pass was made, or several that were not held.
        """
        if self._error:
            raise self._error
        if self._fatal:
            raise UnsupportedError(
                f"per-example gradients are not available: {self._fatal}",
                fix="Accumulate over two or more micro-batches instead.",
            )
        counted = [shown for number, shown in self._passes.items() if passes is None or number in passes]
        if self._calls and not counted:
            raise SampleSkippedError("no backward pass was made inside monitor.micro_batch")
        self.came_again = not self._several and (
            len(counted) > 1 or any(shown.incomplete for shown in counted)
        )
        if self.came_again:
            raise SampleSkippedError(
                "the gradient came in several backward passes",
                fix="From the next sample on they are added up.",
            )
        shown_norms = self._added(counted) if self._several else counted[0].sq_norms if counted else {}
        sq_norms = {name: norms for name, norms in shown_norms.items() if name not in self._dropped}
        if not sq_norms and self._uncalled:
            raise UnsupportedError(
                "per-example gradients are not available: none of the model's layers was called inside "
                "monitor.micro_batch (the forward pass was outside it, or does not call them)",
                fix="Put the forward pass inside it too, or accumulate over two or more micro-batches.",
            )
        if not sq_norms:
            reasons = sorted(set(self._skipped.values()))
            raise UnsupportedError(
                "per-example gradients are not available: no layer was seen in the backward pass "
                f"({'; '.join(reasons)})",
                fix="Accumulate over two or more micro-batches instead; a compiled model runs no hooks.",
            )
        widest = max((norms.dtype for norms in sq_norms.values()), key=lambda kind: kind.itemsize)
        skipped = {name: reason for name, reason in self._skipped.items() if name not in sq_norms}
        return {name: norms.to(widest) for name, norms in sq_norms.items()}, skipped

    def _added(self, counted: Sequence[_Pass]) -> dict[str, Tensor]:
        """The norms of what several passes add up to."""
        sq_norms: dict[str, Tensor] = {}
        for module in {module: None for shown in counted for module in shown.factors}:
            returned = [factors for shown in counted for factors in shown.factors.get(module, ())]
            if module not in self._left_out:
                self._contract(module, returned, sq_norms, max(shown.rounding for shown in counted))
        return sq_norms


def _cannot(module: nn.Module, a: Tensor, out: Tensor) -> str | None:
    """Why this call has no rule although its type has one."""
    if isinstance(module, nn.Embedding):
        if module.sparse:
            return "an Embedding with sparse gradients has no rule"
        if a.ndim == 1:
            return "one-dimensional indices may be positions rather than examples"
    elif out.ndim < 2 or len(out) != len(a):
        return "its output does not begin with the examples"
    return exception_to_rule(module, a, out)
