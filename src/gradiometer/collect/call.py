"""What the network was called with in a micro-batch: its own arguments, and what it returned.

Hooks are on the modules that hold all trained parameters, one inside the other, until the first call
returns.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..autodiff.functional import detached_copy
from ..autodiff.module_hooks import ModuleHooks, weakly
from ..autodiff.untouched import in_own_pass


@dataclass
class NetworkCall:
    """The first call of one module.

    Args:
        path: Of the module within the model.
        args: Copies of its positional arguments, made before the module could write to them.
        kwargs: Copies of its keyword arguments.
        output: What it returned, with its graph.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@dataclass
class CallCapture:
    """Notes the first call of each module that holds all of some parameters.

    Args:
        model: The model being trained.
        parameters: The parameters that are trained.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> capture = CallCapture(net, list(net.parameters()))
        >>> capture.attach(); _ = net(torch.ones(4, 2)); capture.detach()
        >>> [(call.path, call.args[0].shape) for call in capture.calls]
        [('', torch.Size([4, 2]))]
    """

    model: nn.Module
    parameters: Collection[Tensor]
    calls: list[NetworkCall] = field(default_factory=list)
    arguments: list[Tensor] = field(default_factory=list)
    """Every tensor that one of the modules was called with, in all its calls."""
    _handles: list[Any] = field(default_factory=list)
    _hooks: ModuleHooks | None = None

    def attach(self) -> None:
        """Look at the calls from now on."""
        self.detach()
        modules = holders(self.model, self.parameters)
        self._hooks = ModuleHooks({module: path for path, module in modules}, weakly(self._returned))
        self._hooks.attach()
        for path, module in modules:
            self._handles.append(module.register_forward_pre_hook(self._begins(path), with_kwargs=True))

    def detach(self) -> None:
        """Look no more."""
        self._take_off()
        if self._hooks is not None:
            self._hooks.detach()

    def _take_off(self) -> None:
        """No hook is left on a module, where a copy of the model would carry it away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begins(self, path: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not in_own_pass() and all(call.path != path for call in self.calls):
                self.calls.append(NetworkCall(path, *detached_copy((args, kwargs))))

        return look

    def _returned(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.arguments += [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for call in self.calls:
            if call.path == path and call.output is None:
                call.output = output
        if self.calls and self.calls[0].path == path:
            self._take_off()


def holders(model: nn.Module, parameters: Collection[Tensor]) -> list[tuple[str, nn.Module]]:
    """The modules that hold all of some parameters, the outermost first.

    Args:
        model: A model.
        parameters: Some of its parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
        >>> [path for path, _ in holders(net, list(net[1].parameters()))]
        ['', '1', '1.0']
    """
    wanted = {id(parameter) for parameter in parameters}
    inside = model.named_modules()
    return [(path, m) for path, m in inside if wanted <= {id(parameter) for parameter in m.parameters()}]
