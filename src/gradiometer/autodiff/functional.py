"""Call a module as a pure function: ``pure_function`` turns it into ``f(parameters, x)``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ..errors import InputError, check_callable, check_kind, shown

Forward = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch of inputs to outputs, examples in the first dimension."""
PureFunction = Callable[[Mapping[str, Tensor], Any], Tensor]


def call(model: nn.Module, x: Any) -> Any:
    """``model(x)``, with mappings spread as keyword arguments.

    Args:
        model: A module.
        x: A tensor, or a mapping of keyword arguments.

    Raises:
        InputError: If the module has no ``forward`` of its own.
    """
    try:
        return model(**x) if isinstance(x, Mapping) else model(x)
    except NotImplementedError as error:
        raise InputError(
            f"{type(model).__name__} has no usable forward",
            fix="Pass forward=lambda model, x: ... that returns outputs [N, O]; "
            'in Lightning name the network inside: DynamicsMonitor(model="backbone").',
        ) from error


def matrix_forward(model: nn.Module, x: Any, output_key: str | None = None) -> Tensor:
    """The engine's default forward: outputs as ``[N, O]`` wherever that is safe.

    A mapping or an object with ``logits`` gives its logits; sequence outputs ``[N, T, V]`` give their
    last position; images are flattened; a single output per example ``[N]`` becomes ``[N, 1]``.

    Args:
        model: A module.
        x: A batch of inputs.
        output_key: Key or attribute of the outputs; ``logits`` when ``None``.

    Returns:
        Outputs ``[N, O]``, or the output unchanged where no rule applies.

    Example:
        >>> matrix_forward(nn.Embedding(5, 7), torch.zeros(2, 3, dtype=torch.int64)).shape
        torch.Size([2, 7])
    """
    out = call(model, x)
    if not isinstance(out, Tensor):
        key = output_key or "logits"
        tensor = out.get(key) if isinstance(out, Mapping) else getattr(out, key, None)
        if tensor is None:
            raise InputError(
                f"the outputs of {type(model).__name__} are no tensor and have no {key!r}",
                got=sorted(map(str, out)) if isinstance(out, Mapping) else type(out).__name__,
                fix='Pass forward=, or in Lightning DynamicsMonitor(output_key="...").',
            )
        out = tensor
    if isinstance(out, Tensor) and out.ndim == 3:
        return out[:, -1]
    if isinstance(out, Tensor) and out.ndim == 1:
        return out[:, None]
    return out.flatten(1) if isinstance(out, Tensor) and out.ndim > 3 else out


def warn_of_train_mode(model: nn.Module, what: str) -> None:
    """Say that something is evaluated in another mode than the model is in, where that makes a difference.

    Args:
        model: The module.
        what: The quantity, as the beginning of a clause.
    """
    switched = {
        type(module).__name__
        for module in model.modules()
        if module.training and isinstance(module, (_BatchNorm, _DropoutNd)) and getattr(module, "p", 1) > 0
    }
    if switched:
        warnings.warn(
            f"the model is in train mode, where {', '.join(sorted(switched))} computes something else: "
            f"{what} is that of evaluation mode. Call model.eval() first if this is what you want.",
            stacklevel=3,
        )


class _Call(nn.Module):
    """Lets ``functional_call`` run any ``forward(model, x)``."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, x: Any) -> Tensor:
        return self._forward(self.model, fresh(x))


def pure_function(
    model: nn.Module, forward: Forward | None = None, *, frozen: bool = False
) -> tuple[PureFunction, dict[str, Tensor]]:
    """A module as a function of its trainable parameters.

    Each module is named once and a tensor used under two names is passed once, so that shared and tied
    layers sum their derivatives and keep their own ``Parameter`` afterwards (the default
    ``tie_weights=True`` of ``functional_call`` would leave the passed tensor in its place). Buffers are
    copies: nothing the call writes reaches the module.

    Args:
        model: Any module.
        forward: Maps model and inputs to outputs; ``model(x)`` when ``None``.
        frozen: Whether a model without a trainable parameter will do, for derivatives in the inputs.

    Returns:
        The function and the detached trainable parameters it takes, by name.

    Raises:
        InputError: If no parameter is trainable, unless ``frozen``.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> f, parameters = pure_function(net)
        >>> x = torch.ones(4, 3)
        >>> torch.equal(f(parameters, x), net(x))
        True
    """
    wrapped = _Call(model, forward or call)
    names: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for prefix, module in wrapped.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names[f"{prefix}.{name}"] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers[f"{prefix}.{name}"] = buffer.detach()
    first_name: dict[int, str] = {}
    for name, parameter in names.items():
        first_name.setdefault(id(parameter), name)
    trainable = {n: p.detach() for n, p in names.items() if p.requires_grad and first_name[id(p)] == n}
    if not trainable and not frozen:
        raise InputError(
            f"{type(model).__name__} has no trainable parameter",
            fix="Call model.requires_grad_(True) on the part that is trained.",
        )
    constants = {name: p.detach() for name, p in names.items() if not p.requires_grad}
    aliases = {name: first_name[id(p)] for name, p in names.items() if p.requires_grad}

    def function(parameters: Mapping[str, Tensor], x: Any) -> Tensor:
        values = {name: parameters[alias] for name, alias in aliases.items()}
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(wrapped, {**constants, **copies, **values}, (x,), tie_weights=False)

    return function, trainable


def examples(x: Any) -> int:
    """Number of examples in a batch: the first dimension of its first tensor.

    Args:
        x: A tensor, or a nest of tensors.

    Raises:
        InputError: If there is no tensor with a first dimension, or no example in it.

    Example:
        >>> examples({"a": torch.zeros(4, 2)})
        4
    """
    nest = [x] if isinstance(x, Tensor) else pytree.tree_leaves(x)
    leaves = [leaf for leaf in nest if isinstance(leaf, Tensor)]
    if not leaves or leaves[0].ndim == 0:
        raise InputError(
            "a batch must hold a tensor whose first dimension counts the examples",
            got=type(x).__name__ if not leaves else "a scalar tensor",
            fix="Pass the model's inputs as a tensor [N, ...], or a nest of such tensors.",
        )
    if len(leaves[0]) == 0:
        raise InputError("a batch must hold at least one example", got=0, fix="Pass x[:32].")
    return len(leaves[0])


def take(x: Any, index: Any) -> Any:
    """Index the first dimension of every tensor in a nest.

    Args:
        x: A tensor, or a nest of tensors.
        index: What to take: a slice, an integer or a mask.

    Example:
        >>> take({"a": torch.arange(4)}, slice(1, 3))
        {'a': tensor([1, 2])}
    """

    def some(leaf: Tensor) -> Tensor:
        if leaf.layout == torch.strided:
            return leaf[index]
        return leaf.index_select(0, torch.arange(len(leaf), device=leaf.device)[index].reshape(-1))

    return pytree.tree_map(lambda leaf: some(leaf) if isinstance(leaf, Tensor) else leaf, x)


@dataclass(frozen=True)
class Batch:
    """A nest of tensors whose first dimension counts the examples, and how many they are.

    Args:
        nest: A tensor, or a nest of tensors.
        count: Number of examples.

    Example:
        >>> batch = Batch.of({"a": torch.arange(5)})
        >>> batch.count, [(begin, part.nest["a"].tolist()) for begin, part in batch.parts(2)]
        (5, [(0, [0, 1]), (2, [2, 3]), (4, [4])])
    """

    nest: Any
    count: int

    @classmethod
    def of(cls, nest: Any) -> Batch:
        """Count the examples of a nest, as :func:`examples` does."""
        return cls(nest, examples(nest))

    def part(self, begin: int, size: int) -> Batch:
        """Consecutive examples.

        Args:
            begin: The first of them.
            size: How many, where there are as many.
        """
        end = min(begin + size, self.count)
        return Batch(take(self.nest, slice(begin, end)), end - begin)

    def parts(self, size: int) -> Iterator[tuple[int, Batch]]:
        """All examples, so many at a time, with the number of the first.

        Args:
            size: Examples at a time.
        """
        for begin in range(0, self.count, size):
            yield begin, self.part(begin, size)

    def map(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The nest with something else in place of each tensor.

        Args:
            function: Of one tensor.
        """
        return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, self.nest)


def outside_inference(x: Any) -> Any:
    """The same nest, with copies of tensors made under ``torch.inference_mode``, which autograd refuses.

    Args:
        x: A tensor, or a nest of tensors.
    """
    return pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf, x
    )


def fresh(x: Any) -> Any:
    """The same nest with a copy of every tensor, for a model that writes to its inputs.

    Args:
        x: A tensor, or a nest of tensors.
    """
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)


def detached_copy(x: Any) -> Any:
    """A copy of every tensor in a nest, off the graph.

    Args:
        x: A tensor, or a nest of tensors.
    """
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, x)


def check_model(model: Any, *, forward: Any = None, generator: Any = None) -> None:
    """Refuse what cannot be run as a model.

    Args:
        model: What was given for the module.
        forward: What was given to run it, if anything.
        generator: What was given to draw from, if anything.

    Raises:
        InputError: With what to write instead.

    Example:
        >>> check_model(nn.Linear)
        Traceback (most recent call last):
        gradiometer.errors.InputError: model must be a Module, got <class 'torch.nn.modules.linear.Linear'> (the parentheses are missing). Write model=nn.Linear(3, 2).
    """  # noqa: E501
    check_kind("model", model, nn.Module, "nn.Linear(3, 2)")
    check_materialised(model)
    home = next((p.device for p in model.parameters() if p.is_meta), None)
    if home is not None:
        raise InputError(
            f"the parameters of {type(model).__name__} hold no numbers",
            got=f"some on the device {home}",
            fix='Write model.to_empty(device="cpu"), and load or initialise them.',
        )
    check_forward(forward)
    check_kind("generator", generator, (torch.Generator, type(None)), "torch.Generator().manual_seed(0)")
    if generator is not None and generator.device.type != "cpu":
        raise InputError(
            "generator must be one of the CPU, so that all devices draw the same",
            got=generator.device,
            fix="Write generator=torch.Generator().manual_seed(0).",
        )


def check_materialised(model: nn.Module) -> None:
    """Refuse a module some of whose parameters have no shape yet.

    Args:
        model: The module.

    Raises:
        InputError: If a lazy module in it has not run.
    """
    if any(is_lazy(p) for p in model.parameters()):
        raise InputError(
            f"{type(model).__name__} has lazy modules, whose parameters have no shape yet",
            fix="Call the model on a batch first, then make its optimizer and the Monitor.",
        )


def check_forward(forward: Any) -> None:
    """Refuse what cannot run a model.

    Args:
        forward: What was given for it; ``model(x)`` when ``None``.

    Raises:
        InputError: If it is no function of model and inputs.
    """
    example = "lambda model, x: model(x)"
    check_callable("forward", forward, "(model, x) -> outputs [N, O]", example, optional=True)
    if isinstance(forward, nn.Module):
        raise InputError(
            "forward must be a callable (model, x) -> outputs [N, O]",
            got=f"the module {type(forward).__name__}",
            fix=f"Write forward={example}.",
        )


def check_leaves(name: str, x: Any, count: int, *, targets: bool = False) -> None:
    """Refuse a nest that cannot be taken apart into examples.

    Args:
        name: The argument.
        x: A tensor, or a nest of tensors.
        count: Number of examples.
        targets: Whether every tensor has to begin with the examples and to hold numbers; in inputs one
            without a dimension serves all examples.

    Raises:
        InputError: If a tensor of it has no examples in its first dimension, or holds no numbers.
    """
    for leaf in pytree.tree_leaves(x):
        if isinstance(leaf, np.ndarray):
            raise InputError(
                f"{name} must hold tensors", got=shown(leaf), fix=f"Write torch.from_numpy({name})."
            )
        if not isinstance(leaf, Tensor):
            continue
        if leaf.is_nested or (targets and leaf.is_meta):
            raise InputError(
                f"{name} must hold plain tensors with their numbers",
                got="a nested tensor" if leaf.is_nested else "a tensor on the device meta",
                fix="Pad sequences to one length, and load the data first.",
            )
        if len(leaf) != count if leaf.ndim else targets:
            raise InputError(
                "every tensor of a batch must begin with the examples",
                got=f"first dimensions {count} and {len(leaf) if leaf.ndim else 'none'}",
                fix="Expand what all examples share, or close over it: forward=lambda model, x: ...",
            )


def check_result(what: str, result: Tensor) -> None:
    """Refuse to return what is not finite without a word.

    Args:
        what: The quantity, as the beginning of a sentence.
        result: Its numbers.

    Raises:
        InputError: If one of them is not.
    """
    if not bool(result.isfinite().all()):
        raise InputError(
            f"{what} is not finite at these weights",
            got="NaN or infinity",
            fix="Look for NaN or infinity in the weights, the outputs and the loss.",
        )


def check_inputs(model: nn.Module, x: Any) -> None:
    """Refuse inputs that no kernel or Jacobian can be taken at.

    Args:
        model: The module.
        x: A batch of inputs.

    Raises:
        InputError: If the batch is empty, lies on another device than the model, or is not finite.
    """
    count = examples(x)
    home = next((p.device for p in model.parameters()), None)
    for leaf in pytree.tree_leaves(x):
        if not isinstance(leaf, Tensor):
            continue
        if home is not None and leaf.device != home:
            raise InputError(
                "inputs and model must be on one device",
                got=f"inputs on {leaf.device}, model on {home}",
                fix=f"Write x.to('{home}').",
            )
    check_leaves("x", x, count)
    for leaf in pytree.tree_leaves(x):
        if not isinstance(leaf, Tensor):
            continue
        # a sum is ten times cheaper to look at, but may overflow
        if leaf.is_floating_point() and not bool(leaf.sum().isfinite()) and not bool(leaf.isfinite().all()):
            raise InputError(
                "inputs must be finite",
                got="NaN or infinity",
                fix="Clean the probe batch, or pass another one with probe=.",
            )


def check_outputs(out: Any, count: int) -> None:
    """Refuse outputs that are not ``[N, O]``.

    Args:
        out: What the forward returned.
        count: Number of examples N.

    Raises:
        InputError: With the shape that was found and the ``forward=`` to write.
    """
    if isinstance(out, Tensor) and out.is_complex():
        raise InputError(
            "the outputs must be real",
            got=f"complex outputs ({out.dtype})",
            fix="Pass forward=lambda model, x: torch.view_as_real(model(x)).flatten(1).",
        )
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != count:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(
            f"the outputs must have shape [N, O] with N = {count}",
            got=got,
            fix="Pass forward=lambda model, x: model(x).flatten(1), or one that selects a position.",
        )
