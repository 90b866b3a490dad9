"""Ride along with the user's own forward and backward pass and read per-example gradient norms.

For every module with a rule the tape notes the input ``a`` in a forward hook and, through a hook on the
output tensor, the cotangent ``g`` when the backward pass gets there. No extra pass is made, no
parameter gradient is formed, and all hooks are removed again.

What is read belongs to the training gradient only if the gradient is the sum of what the calls of modules
contribute. On request that is checked along random directions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import SampleSkippedError, UnsupportedError
from .factors import Factor, add
from .rules import RULES, exception_to_rule, verify

_TOLERANCE = 1e-3
_ROUNDINGS = 10.0


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
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            return f"module {name or 'model'!r} is compiled, and compiled modules run no hooks"
    return None


class RideAlong:
    """Hooks for one forward and backward pass.

    Args:
        model: The module being trained.
        batch_size: Examples in the batch; a layer whose input does not begin with this many is left
            out by name.
        parameters: Parameters to look at; all trainable ones when ``None``.
        metric: Factor on the square of each component of a parameter's gradient, for a second set of
            norms in ``weighted``; a parameter for which it returns ``None`` has none.
        check: Whether to leave out parameters whose gradient is not the sum over the examples.

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
        check: bool = False,
    ) -> None:
        self._batch = batch_size
        self._metric = metric
        self.comparison = Comparison() if check else None
        self.weighted: dict[str, Tensor] = {}
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
        self._calls: dict[nn.Module, int] = {}
        self._returned: dict[nn.Module, list[dict[str, Factor]]] = {}
        self._sq_norms: dict[str, Tensor] = {}
        self._backward_began = False
        self._fatal: str | None = None
        self._error: Exception | None = None
        self.seconds = 0.0
        self._owners: dict[int, int] = {}
        self._handles: list[Any] = []
        for path, module in model.named_modules():
            followed = [p for p in module._parameters.values() if p is not None and id(p) in self._names]
            for parameter in followed:
                self._owners[id(parameter)] = self._owners.get(id(parameter), 0) + 1
            if followed and type(module) in RULES:
                self._handles.append(module.register_forward_hook(self._forward_hook(path), with_kwargs=True))
        if self.comparison is not None:
            for name, parameter in model.named_parameters():
                if id(parameter) in self._names:
                    self._handles.append(parameter.register_hook(self._gradient_hook(name)))

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

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
                self._skipped[self._names[id(parameter)]] = reason
        self._calls[module] = -1

    def _gradient_hook(self, name: str) -> Any:
        assert self.comparison is not None
        compare = self.comparison.found
        return lambda grad: self._safely(compare, name, grad)

    def _forward_hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self._safely(see, module, args, kwargs, out)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
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
            if self._backward_began:
                if isinstance(out, Tensor) and out.requires_grad:
                    out.register_hook(lambda g: self._safely(self._again, path))
                return
            if not torch.is_grad_enabled():
                self._without_gradients.add(module)
                return
            a = args[0] if args else kwargs.get("input")
            if self._calls.get(module, 0) < 0 or not isinstance(out, Tensor) or not out.requires_grad:
                return
            if not isinstance(a, Tensor) or a.ndim == 0 or len(a) != self._batch:
                got = list(a.shape) if isinstance(a, Tensor) else type(a).__name__
                self._skip(module, f"its input {got} does not begin with the {self._batch} examples")
                return
            reason = _cannot(module, a, out)
            if reason:
                self._skip(module, reason)
                return
            verify(path, module, a)
            self._calls[module] = self._calls.get(module, 0) + 1
            version = a._version
            out.register_hook(lambda g: self._safely(self._returns, path, module, a, version, g))

        return hook

    @torch.no_grad()
    def _returns(self, path: str, module: nn.Module, a: Tensor, version: int, g: Tensor) -> None:
        """The backward pass reached one call: contract at once when it was the module's only one."""
        self._backward_began = True
        if self._calls[module] < 0:
            return
        if a._version != version:
            self._skip(module, f"the input of {path!r} was changed in place after its forward")
            return
        kind = torch.promote_types(g.dtype, torch.float32)
        rule = RULES[type(module)](module, a.to(kind) if a.is_floating_point() else a)
        factors = rule(g.to(kind)[None])
        returned = self._returned.setdefault(module, [])
        returned.append(factors)
        if len(returned) > self._calls[module]:
            self._again(path)
        elif len(returned) == self._calls[module]:
            self._contract(module, returned, torch.finfo(g.dtype).eps)
            returned[:] = [{}] * len(returned)

    def _again(self, path: str) -> None:
        """A second backward pass adds to gradients whose norms are already taken."""
        self._fatal = f"the backward pass went through module {path!r} more than once"

    def _contract(self, module: nn.Module, returned: list[dict[str, Factor]], rounding: float) -> None:
        for own_name in returned[0]:
            parameter = module._parameters.get(own_name)
            if parameter is None or id(parameter) not in self._names:
                continue
            name = self._names[id(parameter)]
            if self._owners[id(parameter)] > 1:
                self._skipped[name] = "it is tied to another module"
                continue
            [factor] = add([factors[own_name] for factors in returned])
            self._sq_norms[name] = factor.sq_norms()[0]
            self._skipped.pop(name, None)
            weight = self._metric(parameter) if self._metric else None
            if weight is not None:
                self.weighted[name] = factor.sq_norms(weight.reshape(-1).to(self._sq_norms[name]))[0]
            if self.comparison is not None:
                self.comparison.expect(name, factor, parameter.numel(), rounding)

    def result(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the pass showed.

        Returns:
            Squared norm of each example's contribution to the gradient of each parameter, and why the
            other parameters are missing.

        Shapes:
            ``[B]``.

        Raises:
            UnsupportedError: If nothing was seen, with the reason.
            SampleSkippedError: If no backward pass was made.
        """
        if self._error:
            raise self._error
        if self._fatal:
            raise UnsupportedError(
                f"per-example gradients are not available: {self._fatal}",
                fix="Accumulate over two or more micro-batches instead.",
            )
        for name in self.comparison.wrong() if self.comparison else ():
            self._sq_norms.pop(name, None)
            self._skipped[name] = "its gradient is not all from its module's calls (tied by hand, a penalty)"
        if not self._sq_norms:
            if self._calls and not self._backward_began:
                raise SampleSkippedError("no backward pass was made inside monitor.micro_batch")
            reasons = sorted(set(self._skipped.values()))
            raise UnsupportedError(
                "per-example gradients are not available: no layer was seen in the backward pass "
                f"({'; '.join(reasons)})",
                fix="Accumulate over two or more micro-batches instead; a compiled model runs no hooks.",
            )
        widest = max((norms.dtype for norms in self._sq_norms.values()), key=lambda kind: kind.itemsize)
        return {name: norms.to(widest) for name, norms in self._sq_norms.items()}, dict(self._skipped)


class Comparison:
    """Whether gradients are the sums of their examples' factors, along one random direction for each.

    The direction is a Gaussian outer product, so that both sides cost one pass over what is there, and a
    difference shows in proportion to its norm. It counts from a thousandth of the gradient's norm, and ten
    times what rounding makes of the gradient and of its single terms. Losses that couple examples, whose
    contributions still add up, are not noticed.

    Example:
        >>> from gradiometer.autodiff.factors import Plain
        >>> comparison, factor = Comparison(), Plain(torch.ones(1, 4, 2))
        >>> comparison.expect("weight", factor, 2, 1e-7)
        >>> comparison.found("weight", torch.tensor([4.0, 5.0]))      # four examples give 4 and 4
        >>> comparison.wrong()
        ['weight']
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)  # not the global one
        self._directions: dict[str, tuple[Tensor, Tensor, float]] = {}
        self._expected: dict[str, tuple[Tensor, Tensor]] = {}
        self._found: dict[str, tuple[Tensor, Tensor]] = {}
        self.judged: set[str] = set()

    def expect(self, name: str, factor: Factor, numel: int, rounding: float) -> None:
        """Add up the examples.

        Args:
            name: The parameter.
            factor: Its gradients.
            numel: Its number of components.
            rounding: Relative error of one cotangent.
        """
        terms = factor.terms()
        sizes = numel // factor.width, factor.width
        rows, columns = (torch.randn(size, generator=self._generator).to(terms) for size in sizes)
        if terms.is_cuda and terms.dtype == torch.float32:
            rounding = max(rounding, 2.0**-10)  # of TF32, in which convolutions run
        error = _ROUNDINGS * rounding
        self._directions[name] = rows, columns, error
        self._expected[name] = factor.contract(rows, columns), error * terms.sqrt()

    def found(self, name: str, grad: Tensor) -> None:
        """Look at the gradient that a parameter received.

        Args:
            name: The parameter.
            grad: Its gradient.
        """
        if name in self._directions:
            rows, columns, error = self._directions[name]
            wide = grad.detach().to(rows.dtype)
            along = rows @ (wide.reshape(len(rows), -1) @ columns)
            self._found[name] = along, (_TOLERANCE + error) * torch.linalg.vector_norm(wide)

    def wrong(self) -> list[str]:
        """Parameters whose gradient is something else; ``judged`` are those of which it is known.

        A gradient that is zero or not finite says nothing.
        """
        names = list(self._found)
        if not names:
            return []
        both = [(*self._expected[name], *self._found[name]) for name in names]
        rows = torch.stack([torch.stack(row).double().cpu() for row in both])
        difference, bound = (rows[:, 0] - rows[:, 2]).abs(), rows[:, 1] + rows[:, 3]
        judged = rows.isfinite().all(1) & (bound > 0)
        self.judged = {name for name, is_judged in zip(names, judged.tolist(), strict=True) if is_judged}
        apart = (judged & (difference > bound)).tolist()
        return [name for name, wrong in zip(names, apart, strict=True) if wrong]


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
