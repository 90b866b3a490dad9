"""Evaluate a model and leave no trace: whatever its forward pass may change is put back.

A forward pass may write to buffers and tensors, advance generators, fill lists, count calls on a class, and
turn flags. ``State`` notes all of that which can be reached from the modules and from the code of their
methods. Compiled code is left alone: our own passes run the original modules.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from operator import is_
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

_OWN_PASS: ContextVar[bool] = ContextVar("own_pass", default=False)
_TABLES = ("_parameters", "_buffers", "_modules")
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has; beside the tables those are hooks, and no forward pass adds to them."""
_DEPTH = 4
"""How far objects are followed from a module: a helper, its list, and what is in it."""
_LONGEST = 10_000
"""Entries of a container that are followed; a longer one is data, and no forward pass writes to it."""
_BIGGEST = 2**26
"""Elements of a tensor that is no buffer and is still copied: 256 MB in float32."""


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluate a model without changing it or anything around it.

    Inside: evaluation mode, gradients on, no autocast, nothing compiled, attention in its plain form (the
    fused kernels have no second derivative). Afterwards all is as it was that :class:`State` knows, and the
    random state of torch, numpy and python. The mode is set without calling ``eval()``, which some layers
    override to merge weights.

    Args:
        model: The module to be evaluated.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> with measuring(net):
        ...     net.training
        False
        >>> net.training
        True
    """
    with _aside(model):
        for module in model.modules():
            if _mode(module):
                module.training = False
        yield


@contextmanager
def as_training(model: nn.Module) -> Iterator[None]:
    """Evaluate a model in the modes it is in, without changing it or anything around it.

    As :func:`measuring`, except that every module keeps its own ``training`` flag: batch norm uses the
    statistics of the batch, dropout draws masks.

    Args:
        model: The module to be evaluated.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with as_training(net):
        ...     _ = net(torch.ones(3, 2))
        ...     net.training, net.running_mean
        (True, tensor([0.1000, 0.1000]))
        >>> net.running_mean
        tensor([0., 0.])
    """
    with _aside(model):
        yield


@contextmanager
def _aside(model: nn.Module) -> Iterator[None]:
    """All that both have in common."""
    state = State(model, generators=True)
    devices = {p.device for p in model.parameters()}
    with ExitStack() as stack:
        stack.callback(state.restore)  # twice, so that an interrupt in one of them leaves the other
        stack.callback(state.restore)
        stack.callback(_OWN_PASS.reset, _OWN_PASS.set(True))
        cuda = [device for device in devices if device.type == "cuda"]
        stack.enter_context(torch.random.fork_rng(cuda, enabled=bool(cuda)))
        stack.enter_context(uncompiled())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for kind in {device.type for device in devices} | {"cpu"}:
            if kind in ("cpu", "cuda", "xpu", "hpu"):
                stack.enter_context(torch.autocast(kind, enabled=False))
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):  # no backward pass of its own will follow
                stack.enter_context(module.no_sync())
                module.require_forward_param_sync = False  # nor may buffers be sent; the state puts it back
        yield


def uncompiled() -> AbstractContextManager[Any]:
    """Run the original of everything compiled; what the user's own code compiles to stays as it is."""
    # without the compiler loaded nothing is compiled, and loading it takes a second
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def in_own_pass() -> bool:
    """Whether a model is being evaluated by us, so that hooks which look at the user's passes look away."""
    return _OWN_PASS.get()


def original(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(module)``; any other module as it is.

    Args:
        model: A module.
    """
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def _mode(module: nn.Module) -> bool | None:
    """The training flag; ``None`` where there is none, as in a frozen script."""
    return getattr(module, "training", None)


class State:
    """What a forward pass may change, as it is now.

    Followed are the attributes of modules, and of objects of the model's own packages that hang on them;
    lists, dictionaries, sets and arrays; tensors by value; generators; attributes of the modules' classes,
    and what the code of their methods names in closures and among the globals of its module.

    Args:
        model: The module.
        generators: Whether the random states of torch (on the CPU), numpy and python belong to it.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> state = State(net)
        >>> net.seen = 3
        >>> state.restore()
        >>> hasattr(net, "seen")
        False
    """

    def __init__(self, model: nn.Module, *, generators: bool = False) -> None:
        self._followed: dict[int, Any] = {}  # by address, and kept alive, so that none is used again
        self._contents: list[_Contents] = []
        self._undo: list[Callable[[], object]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        modules = list(model.modules())
        self._modes = [(module, _mode(module)) for module in modules]
        kinds = {type(module) for module in modules}
        self._packages = {kind.__module__.partition(".")[0] for kind in kinds} - {"torch"}
        self._parameters = {id(parameter) for parameter in model.parameters()}
        for buffer in model.buffers():
            self._tensor(buffer)
        for module in modules:
            if not isinstance(module, torch.jit.ScriptModule):
                self._module(module)
        for kind in kinds:
            if kind.__module__.partition(".")[0] in self._packages:
                self._class(kind)
        if generators:
            self._random_states()

    def restore(self, *, noticed: bool = False) -> None:
        """Put everything back.

        Args:
            noticed: Whether autograd may see that tensors were written to, and refuse a graph that needs them
                as they were in the forward pass.
        """
        for contents in self._contents:
            contents.restore()
        for undo in self._undo:
            undo()
        with torch.no_grad():
            for tensor, before in self._tensors:
                if not torch.equal(tensor, before):
                    (tensor if noticed else tensor.data).copy_(before)
        for module, mode in self._modes:
            if mode is not None and _mode(module) is not mode:
                module.training = mode

    def _module(self, module: nn.Module) -> None:
        """Attributes of a module, and what hangs on them."""
        self._followed[id(module)] = module
        attributes = vars(module)
        self._contents.append(_Contents(attributes))
        self._contents.extend(_Contents(attributes[name]) for name in _TABLES)
        for name, value in attributes.items():
            if name not in _OF_ANY_MODULE:
                self._follow(value, _DEPTH)

    def _follow(self, value: Any, depth: int) -> None:
        """Note one value, and what is in it."""
        if value is None or isinstance(value, _PLAIN) or id(value) in self._followed or depth == 0:
            return
        if isinstance(value, (FunctionType, MethodType, partial)):
            self._code(value, depth)
            return
        self._followed[id(value)] = value
        if isinstance(value, Tensor):
            if id(value) not in self._parameters:
                self._tensor(value)
        elif isinstance(value, _GENERATORS):
            self._generator(value)
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, _CONTAINERS):
            self._container(value, depth)
        elif type(value).__module__.partition(".")[0] in self._packages and hasattr(value, "__dict__"):
            self._attributes(value, depth)

    def _tensor(self, tensor: Tensor) -> None:
        self._followed[id(tensor)] = tensor
        tensor = getattr(tensor, "_local_tensor", tensor)
        strided = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_inference()
        if strided and tensor.numel() <= _BIGGEST:
            self._tensors.append((tensor, tensor.detach().clone()))

    def _generator(self, generator: Any) -> None:
        if isinstance(generator, torch.Generator):
            self._undo.append(partial(generator.set_state, generator.get_state()))
        elif isinstance(generator, np.random.Generator):
            numbers = generator.bit_generator.state
            self._undo.append(lambda: setattr(generator.bit_generator, "state", numbers))
        elif isinstance(generator, np.random.RandomState):
            self._undo.append(partial(generator.set_state, generator.get_state()))
        else:
            self._undo.append(partial(generator.setstate, generator.getstate()))

    def _array(self, array: np.ndarray[Any, Any]) -> None:
        if array.size <= _BIGGEST and array.flags.writeable:
            self._undo.append(partial(np.copyto, array, array.copy()))

    def _container(self, container: Any, depth: int) -> None:
        if len(container) > _LONGEST:
            return
        contents = _Contents(container)
        if not isinstance(container, tuple):
            self._contents.append(contents)
        for value in contents.values:
            self._follow(value, depth - 1)

    def _attributes(self, thing: Any, depth: int) -> None:
        """An object of the model's own package."""
        self._container(vars(thing), depth)

    def _class(self, kind: type) -> None:
        """Attributes of a class, and what the code of its methods names."""
        for name, value in list(vars(kind).items()):
            if isinstance(value, FunctionType):
                self._function(value, _DEPTH)
            elif not name.startswith("__") and not callable(value) and not hasattr(value, "__get__"):
                self._undo.append(partial(_set_back, kind, name, value))
                self._follow(value, _DEPTH)

    def _code(self, value: Any, depth: int) -> None:
        """A function, and what belongs to it."""
        if isinstance(value, partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._follow(part, depth - 1)
        elif isinstance(value, MethodType):
            self._follow(value.__self__, depth)
            self._follow(value.__func__, depth)
        elif (value.__module__ or "").partition(".")[0] in self._packages:
            self._function(value, depth)

    def _function(self, function: FunctionType, depth: int) -> None:
        """What a function names outside of itself."""
        if id(function) in self._followed:
            return
        self._followed[id(function)] = function
        table = function.__globals__
        for name in _names(function.__code__) & table.keys():
            value = table[name]
            if isinstance(value, (ModuleType, type)):
                continue
            if not callable(value):
                self._undo.append(partial(table.__setitem__, name, value))
            self._follow(value, depth - 1)
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                self._undo.append(partial(setattr, cell, "cell_contents", cell.cell_contents))
                self._follow(cell.cell_contents, depth - 1)

    def _random_states(self) -> None:
        # the global states are what must be kept
        self._undo.append(partial(torch.set_rng_state, torch.get_rng_state()))
        self._undo.append(partial(random.setstate, random.getstate()))
        self._undo.append(partial(np.random.set_state, np.random.get_state()))  # noqa: NPY002


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque, bytearray, tuple)


def _names(code: CodeType) -> set[str]:
    """Global names in a function, and in the functions within it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


class _Contents:
    """What is in a container, to be put back into the container that others know.

    The container type's own methods are called, since a subclass may give out what it makes on demand.
    """

    __slots__ = ("container", "keys", "kind", "values")

    def __init__(self, container: Any) -> None:
        self.container = container
        self.kind = next(kind for kind in _CONTAINERS if isinstance(container, kind))
        mapping = isinstance(container, dict)
        self.keys: list[Any] | None = list(self.kind.keys(container)) if mapping else None
        self.values = list(self._now())

    def _now(self) -> Iterable[Any]:
        iterate = self.kind.__iter__ if self.keys is None else self.kind.values
        return cast("Iterable[Any]", iterate(self.container))

    def restore(self) -> None:
        """Put everything back, where anything has changed."""
        same = len(self.container) == len(self.values) and all(map(is_, self._now(), self.values))
        if same and (self.keys is None or all(map(is_, self.kind.__iter__(self.container), self.keys))):
            return
        self.kind.clear(self.container)
        if self.keys is not None:
            self.kind.update(self.container, zip(self.keys, self.values, strict=True))
        elif self.kind is set:
            self.container.update(self.values)
        else:
            self.kind.extend(self.container, self.values)


def _set_back(kind: type, name: str, value: Any) -> None:
    if vars(kind).get(name) is not value:
        setattr(kind, name, value)
