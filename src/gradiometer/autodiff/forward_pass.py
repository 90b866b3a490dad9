"""One forward pass under watch: which layers were called with what, and which torch functions ran.

Hooks are on the modules for the length of the pass only. What a call or a function returned is kept as the
edge of the graph where its gradient arrives, not as a tensor: an activation may overwrite that in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from .functional import Batch, fresh
from .operations import Operation, Operations
from .rules import RULES, exception_to_rule
from .untouched import State

Function = Callable[[Any], Tensor]
"""A batch of inputs to outputs ``[N, ...]``."""


@dataclass
class Call:
    """One call of a module whose type has a rule.

    Args:
        number: Which call of the pass this is, from 1.
        path: Of the module.
        module: The module.
        a: Its input.
        version: Of the input when it went in.
        shape: Of the output.
        edge: Where the gradient of the output arrives.
        reason: Why the rule does not hold for this call, or ``None``.
    """

    number: int
    path: str
    module: nn.Module
    a: Tensor
    version: int
    shape: torch.Size
    edge: GradientEdge
    reason: str | None


@dataclass
class ForwardPass:
    """What was seen of one forward pass.

    Args:
        output: What the network returned.
        calls: Layer calls, in their order.
        operations: Torch functions by their number in the pass, those that were asked for.
        hidden: Paths of the modules with a rule that ran where autograd could not see them.
        saved_bytes: What the graph keeps beside the parameters, where it was weighed.
    """

    output: Tensor
    calls: list[Call] = field(default_factory=list)
    operations: dict[int, Operation] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    saved_bytes: int = 0


class Network:
    """A model, how to run it, and the parameters that are followed through it.

    Args:
        model: The module.
        function: Runs it.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> seen = Network(net, net).watch(Batch.of(torch.ones(4, 3)))
        >>> [(call.path, call.shape) for call in seen.calls], seen.output.shape
        ([('', torch.Size([4, 2]))], torch.Size([4, 2]))
    """

    def __init__(self, model: nn.Module, function: Function) -> None:
        self.model = model
        self._function = function
        self._state = State(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = {id(p): name for name, p in self.parameters.items()}

    def name(self, parameter: Tensor | None) -> str | None:
        """The name of a tensor that is a followed parameter; ``None`` for all others.

        Args:
            parameter: Any tensor, or ``None``.
        """
        return self.names.get(id(parameter))

    def followed(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The followed parameters that a module owns itself, by their full names.

        Args:
            module: One of the model's modules.
        """
        owned = (p for p in module._parameters.values() if p is not None)
        return {self.names[id(p)]: p for p in owned if id(p) in self.names}

    def run(self, batch: Batch) -> Tensor:
        """The outputs; a model that remembers its last call is put back.

        Args:
            batch: The inputs.
        """
        try:
            return self._function(fresh(batch.nest))
        finally:
            self._state.restore(noticed=True)

    def watch(
        self, batch: Batch, operations: Collection[int] | None = (), *, weigh: bool = False
    ) -> ForwardPass:
        """Run the model and see what happens.

        Args:
            batch: The inputs.
            operations: Numbers of the torch functions to note; ``None`` for all of them.
            weigh: Whether to add up what the graph keeps.
        """
        seen = ForwardPass(torch.empty(()))
        # a mode sees every function and costs as much as a small layer: none where no function is looked for
        mode = Operations(seen.operations, operations) if operations is None or operations else None
        with ExitStack() as stack:
            stack.enter_context(_LayerHooks(self, seen, mode).attached())
            saved = stack.enter_context(_saved_by_the_graph(self.model)) if weigh else {}
            if mode is not None:
                stack.enter_context(mode)
            seen.output = self.run(batch)
        seen.saved_bytes = sum(saved.values())
        return seen


@contextmanager
def _saved_by_the_graph(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps for the backward pass, by address; parameters apart."""
    saved: dict[int, int] = {}
    parameters = {id(p) for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()  # views of one storage count once
        return tensor.detach()  # an output saved by its own node would hold the graph for ever

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


class _LayerHooks:
    """Notes the calls of modules with a rule, and tells the operations in which call they happen."""

    def __init__(self, network: Network, seen: ForwardPass, operations: Operations | None) -> None:
        self._network = network
        self._seen = seen
        self._operations = operations
        self._number = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        # on the modules: a compiled part of the model warns of global hooks
        network = self._network
        with ExitStack() as stack:
            for path, module in network.model.named_modules():
                if type(module) in RULES and network.followed(module):
                    stack.callback(module.register_forward_pre_hook(self._before).remove)
                    # before the user's hooks: those may put another output in the place of this one
                    after = partial(self._after, path)
                    handle = module.register_forward_hook(after, prepend=True, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def _before(self, module: nn.Module, args: Any) -> None:
        self._number += 1
        if self._operations is not None:
            self._operations.call = self._number

    def _after(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if self._operations is not None:
            self._operations.call = None
        if not torch.is_grad_enabled() or not isinstance(out, Tensor) or not out.requires_grad:
            self._seen.hidden.add(path)
            return
        a = args[0] if args else kwargs.get("input")
        assert isinstance(a, Tensor)
        if self._operations is not None:
            self._operations.paused = True  # looking at a call runs torch functions of its own
        self._seen.calls.append(
            Call(
                number=self._number,
                path=path,
                module=module,
                a=a.detach(),
                version=a._version,
                shape=out.shape,
                edge=get_gradient_edge(out),
                reason=exception_to_rule(module, a, out),
            )
        )
        if self._operations is not None:
            self._operations.paused = False
