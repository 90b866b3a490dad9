"""Hooks on the calls of some modules that stand on none of them.

They are one of torch's global hooks, which passes over every other module. So a copy or a pickle of the
model that is made meanwhile carries nothing of ours, and one call takes them off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakMethod

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook

from .untouched import in_own_pass

After = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
"""Path, module, arguments, keyword arguments, what was returned."""


class ModuleHooks:
    """Calls a function after each call of some modules, before the user's own hooks.

    Args:
        paths: The modules, and their paths.
        after: Called after each of their calls; what it returns does not matter.
        passes_of_user: Whether to look at the user's passes only, and not at those of our own.

    Example:
        >>> import torch
        >>> net, seen = nn.Sequential(nn.Linear(2, 1), nn.Tanh()), []
        >>> hooks = ModuleHooks({net[0]: "0"}, lambda path, module, *call: seen.append(path))
        >>> hooks.attach(); _ = net(torch.ones(1, 2)); hooks.detach()
        >>> seen
        ['0']
    """

    def __init__(self, paths: Mapping[nn.Module, str], after: After, *, passes_of_user: bool = True) -> None:
        self._paths, self._after, self._passes_of_user = paths, after, passes_of_user
        self._handle: Any = None

    def attach(self) -> None:
        """Look at all calls from now on."""
        self.detach()
        if self._paths:
            self._handle = register_module_forward_hook(weakly(self._returned), with_kwargs=True)

    def detach(self) -> None:
        """Look no more; may be called twice."""
        if self._handle is not None:
            self._handle.remove()
            # torch forgets to take this away, and torch.compile takes it for a hook
            torch_module._global_forward_hooks_with_kwargs.pop(self._handle.id, None)
            self._handle = None

    def __del__(self) -> None:
        """Nobody looks any more, as after an interrupt."""
        self.detach()

    def _returned(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        path = self._paths.get(module)
        if path is not None and not (self._passes_of_user and in_own_pass()):
            self._after(path, module, args, kwargs, out)


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A method that does nothing once nobody else holds its object.

    Args:
        method: A bound method.
    """
    reference = WeakMethod(method)

    def hook(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    return hook
