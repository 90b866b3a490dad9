"""Which axis of a network's arguments counts the examples, and where they are in what it returns.

The examples are what the outputs are independent of: an example has the same output alone, beside others and
in another order. That is tried on the first three of them, in evaluation mode. Doubling alone would not tell
examples from time steps.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..autodiff.functional import fresh
from ..autodiff.module_hooks import ModuleHooks
from ..autodiff.rules import RULES
from ..autodiff.untouched import measuring
from ..errors import UnsupportedError
from .call import CallCapture, NetworkCall

TOLERANCE = 1e-4
EITHER = "either may count the examples"
_SETS: tuple[tuple[int, ...], ...] = ((0,), (0, 1), (1, 0), (1, 2), (0, 1, 2))
_TWICE = (0, 0)
"""A single example beside itself."""
_MOST_TRIES = 12
_NONE_GROWS = "the network returns no tensor that grows with the examples and depends on its parameters"
_COUPLED = "an example's output changes with the other examples of the batch, or is random"


@dataclass(frozen=True)
class OutputLayout:
    """Where the examples are in what a network returns.

    Args:
        leaf: Which tensor of the output, in the order of its leaves.
        axis: The axis along which the examples are.
        rows: Entries of that axis per example.
        strided: Whether an example's entries are every n-th, rather than one block.
        others: Whether an earlier tensor of the output was passed over: in it examples depend on others.
    """

    leaf: int
    axis: int
    rows: int = 1
    strided: bool = False
    others: bool = False

    def examples_first(self, tensor: Tensor) -> Tensor:
        """The examples in the first dimension; several entries per example in the second.

        Args:
            tensor: That leaf of the output, or something that is laid out as it is.
        """
        first = tensor.movedim(self.axis, 0)
        if self.rows == 1:
            return first
        if self.strided:
            return first.unflatten(0, (self.rows, -1)).transpose(0, 1)
        return first.unflatten(0, (-1, self.rows))

    def back(self, first: Tensor) -> Tensor:
        """The inverse of :meth:`examples_first`.

        Args:
            first: A tensor that begins with the examples.
        """
        if self.rows > 1:
            first = (first.transpose(0, 1) if self.strided else first).flatten(0, 1)
        return first.movedim(0, self.axis)


@dataclass(frozen=True)
class Calling:
    """How the network is called: which module, which arguments hold the examples, and what comes of it.

    Args:
        path: Of the network within the model.
        spec: The structure of its arguments.
        axes: The examples' axis of each argument, ``None`` for those that all examples share.
        layout: Where the examples are in the output.
    """

    path: str
    spec: Any
    axes: tuple[int | None, ...]
    layout: OutputLayout

    def inputs(self, call: NetworkCall) -> tuple[list[Tensor], list[Any]]:
        """The arguments that hold examples, with these in the first dimension, and those that all share.

        Args:
            call: A call of the same form.

        Raises:
            UnsupportedError: If it is called in another way than before.
        """
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        if spec != self.spec:
            raise UnsupportedError(
                "the network is called with other arguments than at first",
                fix="Pass forward=, which maps the model and a batch to outputs.",
            )
        pairs = list(zip(leaves, self.axes, strict=True))
        return (
            [leaf.movedim(axis, 0) for leaf, axis in pairs if axis is not None],
            [leaf for leaf, axis in pairs if axis is None],
        )

    def call(self, model: nn.Module, varying: Sequence[Tensor], shared: Sequence[Any]) -> Any:
        """Call the network.

        Args:
            model: The model that the network is part of.
            varying: Arguments that hold examples, as :meth:`inputs` gives them.
            shared: The others.
        """
        inputs, others = iter(varying), iter(shared)
        leaves = [next(others) if axis is None else next(inputs).movedim(0, axis) for axis in self.axes]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return model.get_submodule(self.path)(*args, **kwargs)

    def leaf(self, output: Any) -> Tensor:
        """The tensor of the output that holds the examples.

        Args:
            output: What the network returned.
        """
        leaf = output_leaves(output)[self.layout.leaf]
        assert isinstance(leaf, Tensor)
        return leaf

    def matrix(self, leaf: Tensor) -> Tensor:
        """Outputs as ``[N, O]``: of a sequence the last position, of an image all of it.

        Args:
            leaf: A tensor that is laid out as the output.
        """
        first = self.layout.examples_first(leaf)
        if first.ndim == 3:
            return first[:, -1]
        return first[:, None] if first.ndim == 1 else first.flatten(1)


def module_axes(
    model: nn.Module, calling: Calling, varying: Sequence[Tensor], shared: Sequence[Any]
) -> dict[nn.Module, int]:
    """Along which axis of its input each layer with a rule holds the examples, where there are two or more.

    Args:
        model: The model.
        calling: How its network is called.
        varying: Arguments that hold examples.
        shared: The others.
    """
    shapes: list[dict[nn.Module, torch.Size]] = []
    if len(varying[0]) < 2:
        return {}
    paths = {module: path for path, module in model.named_modules() if type(module) in RULES}
    with measuring(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in (1, 2):
            seen: dict[nn.Module, torch.Size] = {}

            hooks = ModuleHooks(paths, partial(_note_shape, seen), passes_of_user=False)
            with ExitStack() as stack:
                stack.callback(hooks.detach)
                hooks.attach()
                calling.call(model, [fresh(leaf[:count]) for leaf in varying], fresh(list(shared)))
            shapes.append(seen)
    alone, pair = shapes
    return {m: _grown(alone[m], pair[m]) for m in alone.keys() & pair.keys()}


def _note_shape(
    seen: dict[nn.Module, torch.Size],
    path: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
) -> None:
    a = args[0] if args else kwargs.get("input")
    seen[module] = a.shape if isinstance(a, Tensor) else torch.Size()


def _grown(alone: torch.Size, pair: torch.Size) -> int:
    """The first axis that grew, -1 for none."""
    if len(alone) != len(pair):
        return -1
    return next((axis for axis, (a, b) in enumerate(zip(alone, pair, strict=True)) if a != b), -1)


def output_leaves(output: Any) -> list[Any]:
    """The leaves of what a network returns, also of an object with attributes.

    Args:
        output: Tensors in any nest.
    """
    if isinstance(output, Mapping):  # also those that torch does not know for a container
        output = dict(output)
    elif not isinstance(output, (Tensor, tuple, list)) and hasattr(output, "__dict__"):
        output = vars(output)
    return pytree.tree_leaves(output)


def output_leaves_of(capture: CallCapture) -> list[Any]:
    """The leaves of what all the noted calls returned, one after the other.

    Args:
        capture: The calls.
    """
    return [leaf for seen in capture.calls for leaf in output_leaves(seen.output)]


def named_leaf(output: Any, name: int | str) -> int | None:
    """The number of the leaf that an index or a key stands for.

    Args:
        output: What a network returned.
        name: An index, a key or an attribute.
    """
    try:
        chosen = (
            output[name] if isinstance(name, int) or isinstance(output, Mapping) else getattr(output, name)
        )
    except (KeyError, IndexError, AttributeError, TypeError):
        return None
    numbers = [number for number, leaf in enumerate(output_leaves(output)) if leaf is chosen]
    return numbers[0] if numbers else None


def find_calling(
    model: nn.Module, call: NetworkCall, *, batch_dim: int | None, output: int | str | None, size: int | None
) -> Calling | str:
    """How the network is called, or why that cannot be told.

    Args:
        model: The model that the network is part of.
        call: One call of it.
        batch_dim: The examples' axis of the first tensor, where it was said.
        output: Which part of the output, where it was said.
        size: Examples in a batch, where the loader says so; it decides between two axes that would both do.
    """
    leaf = _chosen_output(call, output)
    if isinstance(leaf, str):
        return leaf
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        return "the network was called without any tensor"
    last = tensors[0].ndim - 1
    axes = [batch_dim] if batch_dim is not None else list(range(min(2, last + 1))) + [last] * (last > 1)
    fitting: list[Calling] = []
    reasons: list[str] = []
    network = model.get_submodule(call.path)
    with measuring(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's own pass has given them
        for axis in axes:
            if axis > 1 and fitting and batch_dim is None:  # only where neither of the first two will do
                break
            answer = _try_axis(network, call.path, leaves, spec, tensors[0], axis, leaf)
            if isinstance(answer, Calling):
                fitting.append(answer)
            else:
                reasons.append(answer)
    if len(fitting) == 2:  # a dimension of one entry says nothing
        fitting = [c for axis, c in enumerate(fitting) if tensors[0].shape[axis] > 1] or fitting[:1]
    if len(fitting) == 2 and size is not None:
        matching = [c for axis, c in enumerate(fitting) if tensors[0].shape[axis] == size]
        fitting = matching if len(matching) == 1 else fitting
    if len(fitting) > 1:
        return (
            f"the outputs are independent along both first dimensions of the input {list(tensors[0].shape)}, "
            f"so that {EITHER}"
        )
    return fitting[0] if fitting else reasons[0]


def _chosen_output(call: NetworkCall, name: int | str | None) -> int | str | None:
    """The number of the leaf that was asked for; ``None`` where the first one that will do is taken."""
    if name is None:
        return named_leaf(call.output, "logits")
    number = named_leaf(call.output, name)
    if number is None:
        given = (
            sorted(map(str, call.output)) if isinstance(call.output, Mapping) else type(call.output).__name__
        )
        return f"the network's output has no {name!r} (it gives {given})"
    return number


def _try_axis(
    network: nn.Module, path: str, leaves: list[Any], spec: Any, first: Tensor, axis: int, chosen: int | None
) -> Calling | str:
    """Whether the examples are along one axis of the first tensor."""
    if axis >= first.ndim:
        return f"batch_dim={axis} is no dimension of the input {list(first.shape)}"
    count = first.shape[axis]
    reason = ""
    for axes in itertools.islice(_axes_of_all(leaves, first, axis, count), _MOST_TRIES):
        sets = [numbers for numbers in _SETS if max(numbers) < count] if count > 1 else [(0,), _TWICE]
        try:
            outputs = {numbers: _outputs(network, leaves, spec, axes, numbers) for numbers in sets}
            answer = _layout(outputs, chosen)
            if isinstance(answer, OutputLayout) and _says_nothing(answer, outputs):
                moved = _moved_parameters(network)
                outputs = {n: _outputs(network, leaves, spec, axes, n, moved) for n in sets}
                answer = _layout(outputs, chosen)
        except Exception as error:  # of the user's own module, called with fewer examples
            reason = reason or f"it cannot be called with the first example alone ({_short(error)})"
            continue
        if isinstance(answer, OutputLayout):
            return Calling(path, spec, axes, answer)
        reason = answer
    return reason


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}"


def _axes_of_all(leaves: list[Any], first: Tensor, axis: int, count: int) -> Iterator[tuple[int | None, ...]]:
    """The axes of all arguments, likely ones first: a square one may hold the examples along either."""
    choices: list[list[int | None]] = []
    for leaf in leaves:
        if leaf is first:
            choices.append([axis])
        elif not isinstance(leaf, Tensor):
            choices.append([None])
        else:
            along = [a for a in (axis, 0, 1) if a < leaf.ndim and leaf.shape[a] == count]
            choices.append([*dict.fromkeys(along), *([] if len(along) == 1 else [None])])
    yield from itertools.product(*choices)


def _says_nothing(layout: OutputLayout, outputs: Mapping[tuple[int, ...], list[Any]]) -> bool:
    """Whether the outputs of different examples are the same, as where the last layer begins at zero."""
    if (0, 1) not in outputs:
        return False
    first, second = layout.examples_first(outputs[0, 1][layout.leaf].detach())
    return torch.equal(first, second)


def _moved_parameters(network: nn.Module) -> dict[str, Tensor]:
    """The network's parameters, each moved a little, for outputs that differ between examples."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator).to(p)
        for name, p in network.named_parameters()
        if p.is_floating_point()
    }


def _outputs(
    network: nn.Module,
    leaves: list[Any],
    spec: Any,
    axes: Sequence[int | None],
    numbers: Sequence[int],
    parameters: Mapping[str, Tensor] | None = None,
) -> list[Any]:
    """What the network returns for some of the examples."""
    index = torch.tensor(numbers)
    some = [
        leaf if axis is None else leaf.index_select(axis, index.to(leaf.device))
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    args, kwargs = fresh(pytree.tree_unflatten(some, spec))
    if parameters is None:
        return output_leaves(network(*args, **kwargs))
    leaves_of = {name: p.requires_grad_() for name, p in parameters.items()}
    return output_leaves(functional_call(network, leaves_of, args, kwargs))


def _layout(outputs: Mapping[tuple[int, ...], list[Any]], chosen: int | None) -> OutputLayout | str:
    """Where the examples are in the outputs, if these are independent of each other."""
    numbers = range(len(outputs[0,])) if chosen is None else [chosen]
    reason, coupled = _NONE_GROWS, False
    for leaf in numbers:
        tensors = {index: of[leaf] for index, of in outputs.items() if leaf < len(of)}
        alone = tensors.get((0,))
        if not isinstance(alone, Tensor) or not alone.is_floating_point() or not alone.requires_grad:
            continue
        layouts = _growing(leaf, tensors)
        for layout in layouts:
            if _independent(layout, tensors):
                return replace(layout, others=coupled)
        if layouts:
            reason, coupled = _COUPLED, True
    return reason


def _growing(leaf: int, tensors: Mapping[tuple[int, ...], Tensor]) -> list[OutputLayout]:
    """Along which axis the output grows with the examples, and in which ways they may be there."""
    alone, pair = tensors[0,], tensors[_TWICE if _TWICE in tensors else (0, 1)]
    if alone.ndim != pair.ndim:
        return []
    larger = [axis for axis in range(alone.ndim) if pair.shape[axis] != alone.shape[axis]]
    if len(larger) != 1 or pair.shape[larger[0]] != 2 * alone.shape[larger[0]]:
        return []
    [axis] = larger
    rows = alone.shape[axis]
    return [OutputLayout(leaf, axis, rows, strided) for strided in ((False, True) if rows > 1 else (False,))]


def _independent(layout: OutputLayout, tensors: Mapping[tuple[int, ...], Tensor]) -> bool:
    """Whether each example's output is the same in all sets."""
    seen: dict[int, Tensor] = {}
    for numbers, tensor in tensors.items():
        first = layout.examples_first(tensor.detach())
        if len(first) != len(numbers):
            return False
        for number, row in zip(numbers, first, strict=True):
            if not torch.isfinite(row).all():
                return False
            other = seen.setdefault(number, row)
            if other.shape != row.shape or (row - other).norm() > TOLERANCE * (row.norm() + other.norm()):
                return False
    return True
