"""Derivatives of the loss that training itself does not take: Hessian products, gradients of parts.

Everything is evaluated as training evaluates it, each module in the mode it is in, and leaves no trace:
parameters enter as detached tensors, so that no ``.grad`` and no hook of a parameter is touched, buffers
enter as copies, and the random state is restored. Within one call the random state moves on, so that every
part of a batch has its own dropout masks; two calls at the same random state have the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError, UnsupportedError
from ..stats.linalg import inner_products
from .functional import call, check_inputs, examples, fresh, outside_inference, pure_function, take
from .untouched import as_training

LossFn = Callable[[Any, Any], Tensor]
RawForward = Callable[[nn.Module, Any], Any]
"""Maps a model and a batch of inputs to whatever a loss takes."""

_WRONG_TWICE = {
    # the mark stands beside the way to the parameters, so that autograd.grad never meets it
    "torch::autograd::Error": (
        "a torch.autograd.Function marked once_differentiable",
        "Freeze what lies before it, or write its backward pass with differentiable operations.",
    ),
    # its second derivative takes the norm of the weight for a constant (gradgradcheck fails)
    "WeightNormInterfaceBackward0": (
        "the fused kernel of weight_norm, whose second derivative is wrong",
        "Leave weight_norm out, or exclude its parameters by parameters=.",
    ),
}


def loss_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    x: Any,
    y: Any,
    *,
    parameters: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Gradient of the loss of one batch, as training would compute it, without touching ``.grad``.

    Args:
        model: Any module.
        loss_fn: Maps outputs and targets to one number.
        x: Inputs: a tensor, or a nest of tensors with the examples first.
        y: Targets: anything that ``loss_fn`` takes.
        parameters: Which of the model's parameters; all trainable ones when ``None``.

    Returns:
        One tensor per parameter; zero where the loss does not depend on it.

    Shapes:
        Those of the parameters.

    Units:
        loss / parameter.

    Raises:
        InputError: A loss that is not one number or does not depend on the parameters, a parameter that is
            frozen or not the model's, or an empty or non-finite batch.
        UnsupportedError: If autograd cannot take the gradient.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> x, y = torch.ones(2, 1), torch.tensor([[1.0], [3.0]])
        >>> loss_gradient(net, lambda out, y: (out * y).mean(), x, y)
        [tensor([[2.]])]
    """
    with as_training(model):
        return Loss(model, loss_fn, parameters).gradient(x, y)


def hessian_vector_product(
    model: nn.Module,
    loss_fn: LossFn,
    x: Any,
    y: Any,
    vectors: Sequence[Sequence[Tensor]],
    *,
    parameters: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    r"""Products ``H v`` of the Hessian of one batch's loss with several vectors.

    The graph of the gradient is built once; each product is one backward pass through it,

    .. math:: H v = \nabla_\theta \big( v \cdot \nabla_\theta f \big)

    It is the Hessian of what ``loss_fn`` returns: with ``reduction="sum"`` divide by the number of examples,
    and for an L2 term that the optimizer adds, add ``weight_decay * v``. A
    custom ``torch.autograd.Function`` whose backward pass uses values that autograd does not follow gives a
    wrong product; only one marked ``once_differentiable`` can be noticed.

    Args:
        model: Any module; attention runs in its plain form, which has second derivatives.
        loss_fn: Maps outputs and targets to one number.
        x: Inputs: a tensor, or a nest of tensors with the examples first.
        y: Targets: anything that ``loss_fn`` takes.
        vectors: Each one tensor per parameter.
        parameters: Which of the model's parameters; all trainable ones when ``None``.

    Returns:
        One product per vector, each one tensor per parameter.

    Shapes:
        Those of the parameters.

    Units:
        Those of the vector times loss / parameter^2.

    Raises:
        InputError: As ``loss_gradient``, or vectors that do not fit the parameters.
        UnsupportedError: If an operation has no second derivative.

    Source:
        Pearlmutter 1994, Neural Computation 6:147-160.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)               # out = w x, loss = w^2 mean(x^2) / 2
        >>> x, v = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0]])
        >>> hessian_vector_product(net, lambda out, y: out.square().mean() / 2, x, None, [[v]])
        [[tensor([[10.]])]]
    """
    with as_training(model):
        return list(Loss(model, loss_fn, parameters).products(x, y, vectors))


def split_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    x: Any,
    y: Any,
    parts: int,
    *,
    parameters: Sequence[Tensor] | None = None,
    forward: RawForward = call,
) -> tuple[list[list[Tensor]], Tensor]:
    """Gradient of each part's own loss, for a batch cut into nearly equal consecutive parts.

    With a mean over examples these are the part means that the noise scale is made of; with
    ``reduction="sum"`` divide each by its size. Batch norm in train mode normalises within each part.

    Args:
        model: Any module.
        loss_fn: Maps outputs and targets of a part to one number.
        x: Inputs: a tensor, or a nest of tensors with the examples first.
        y: Targets: a tensor, or a nest of tensors with the examples first.
        parts: Number of parts; their sizes differ by one at most.
        parameters: Which of the model's parameters; all trainable ones when ``None``.
        forward: Maps model and inputs to what ``loss_fn`` takes; ``model(x)`` when left out.

    Returns:
        The gradients, one list per part, and the number of examples in each part.

    Shapes:
        Gradients as the parameters; sizes ``[parts]``.

    Units:
        loss / parameter; examples.

    Raises:
        InputError: As ``loss_gradient``; fewer than two parts, or more than examples.
        UnsupportedError: If autograd cannot take the gradient.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [3.0], [5.0]])
        >>> split_gradients(net, lambda out, y: out.mean(), x, None, 2)
        ([[tensor([[1.]])], [tensor([[4.]])]], tensor([1, 2]))
    """
    slices = part_slices(x, y, parts, at_least=2)
    with as_training(model):
        loss = Loss(model, loss_fn, parameters, forward=forward)
        gradients = [loss.gradient(take(x, part), take(y, part)) for part in slices]
    return gradients, _sizes(slices)


class SplitCurvature(NamedTuple):
    """Products of the gradients and Hessians of a batch's parts; see ``split_curvature``."""

    gram: Tensor
    forms: Tensor
    sizes: Tensor
    steps: list[list[Tensor]]


def split_curvature(
    model: nn.Module,
    loss_fn: LossFn,
    x: Any,
    y: Any,
    parts: int,
    *,
    parameters: Sequence[Tensor] | None = None,
    loss_reduction: str = "mean",
    step: Callable[[list[Tensor]], list[Tensor]] | None = None,
    forward: RawForward = call,
) -> SplitCurvature:
    r"""Inner products of the gradients of a batch's parts, plain and through the Hessians of other parts.

    .. math:: \text{gram}_{il} = u_i\cdot g_l, \qquad \text{forms}_{jil} = u_i^T H_j\, u_l
              \quad (l \ne j;\ \text{zero where } l = j)

    with :math:`u_i = g_i`, or the step that an optimizer makes of it. What ``noise_curvature`` is made
    of. Each part's Hessian meets the k - 1 gradients of the others, so that all together cost k - 1 products
    with the Hessian of the whole batch and k gradients are held at once. Dropout masks of gradients and
    Hessians are independent.

    Args:
        model: Any module.
        loss_fn: Maps outputs and targets of a part to its loss.
        x: Inputs: a tensor, or a nest of tensors with the examples first.
        y: Targets: a tensor, or a nest of tensors with the examples first.
        parts: Number of parts k, three at least.
        parameters: Which of the model's parameters; all trainable ones when ``None``.
        loss_reduction: What ``loss_fn`` takes over the examples of a part: a ``"mean"``, or a ``"sum"``,
            which is divided by their number.
        step: Maps the gradient of a part to a vector ``u`` of the same shapes; the gradient itself when
            ``None``.
        forward: Maps model and inputs to what ``loss_fn`` takes; ``model(x)`` when left out.

    Returns:
        ``gram``, ``forms``, the number of examples in each part, ``sizes``, and the vectors ``u``,
        ``steps``.

    Shapes:
        gram ``[k, k]``, forms ``[k, k, k]``, sizes ``[k]``, steps as the parameters.

    Units:
        loss^2 / parameter^2; loss^3 / parameter^4; examples; loss / parameter.

    Raises:
        InputError: As ``split_gradients``; fewer than three parts.
        UnsupportedError: If an operation has no second derivative.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(net.weight)                   # part losses x^2 w^2 / 2: g = H = x^2
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> found = split_curvature(net, lambda out, y: out.square().mean() / 2, x, None, 3)
        >>> found.forms[0]                         # H_0 = 1, from g_0 = 1, g_1 = 4, g_2 = 9 to g_1 and g_2
        tensor([[ 0.,  4.,  9.],
                [ 0., 16., 36.],
                [ 0., 36., 81.]], dtype=torch.float64)
    """
    slices = part_slices(x, y, parts, at_least=3)
    with as_training(model):
        loss = Loss(model, loss_fn, parameters, loss_reduction, forward=forward)
        batches = [(take(x, part), take(y, part)) for part in slices]
        gradients = [loss.gradient(*batch) for batch in batches]
        steps = gradients if step is None else [step(gradient) for gradient in gradients]
        gram = torch.stack([_dots(gradients, direction) for direction in steps])
        forms = gram.new_zeros(parts, parts, parts)
        for j, batch in enumerate(batches):
            others = [i for i in range(parts) if i != j]
            vectors = [steps[i] for i in others]
            for i, product in zip(others, loss.products(*batch, vectors), strict=True):
                forms[j, :, i] = _dots(steps, product)
    return SplitCurvature(gram, forms, _sizes(slices), steps)


class Loss:
    """The loss of a batch as a function of some of a model's parameters."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        parameters: Sequence[Tensor] | None,
        reduction: str = "mean",
        *,
        forward: RawForward = call,
    ) -> None:
        self._model, self._loss_fn, self._reduction = model, loss_fn, reduction
        self._function, self._values = pure_function(model, forward)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        names = dict(zip(map(id, trainable), self._values, strict=True))
        chosen = trainable if parameters is None else list(parameters)
        if not chosen or any(id(parameter) not in names for parameter in chosen):
            raise InputError(
                "parameters must be trainable parameters of the model",
                got="none" if not chosen else "one that is frozen, or not the model's",
                fix="Write parameters=[p for p in model.parameters() if p.requires_grad].",
            )
        self.leaves = [self._values[names[id(parameter)]].requires_grad_() for parameter in chosen]

    def outputs(self, x: Any) -> Any:
        """What the model returns, with a graph."""
        check_inputs(self._model, x)
        return self._function(self._values, outside_inference(x))

    def of(self, outputs: Any, x: Any, y: Any) -> Tensor:
        """The loss of outputs for these inputs: one number, a mean over the examples."""
        loss = self._loss_fn(outputs, fresh(y))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise InputError(
                "loss_fn must return one number",
                got=f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__,
                fix='Write loss_fn=nn.CrossEntropyLoss(), or any other with reduction="mean".',
            )
        if not loss.requires_grad:
            raise InputError(
                "the loss does not depend on the parameters",
                fix="Leave no detach(), item() or no_grad() between the parameters and the loss.",
            )
        return (loss / examples(x) if self._reduction == "sum" else loss).sum()

    def gradient(self, x: Any, y: Any, *, differentiable: bool = False) -> list[Tensor]:
        """Gradient at the parameters; with a graph of its own when it is to be differentiated again."""
        loss = self.of(self.outputs(x), x, y)
        return differentiate([loss], self.leaves, None, create_graph=differentiable)

    def products(self, x: Any, y: Any, vectors: Sequence[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
        """Products of the Hessian with each vector in turn, from one graph."""
        shapes = [leaf.shape for leaf in self.leaves]
        for vector in vectors:
            if [entry.shape for entry in vector] != shapes:
                raise InputError(
                    "each vector must hold one tensor per parameter, of its shape",
                    got=[list(entry.shape) for entry in vector],
                    fix=f"Pass tensors of shapes {[list(shape) for shape in shapes]}.",
                )
        gradient = self.gradient(x, y, differentiable=True)
        check_second_derivative(gradient)
        for number, vector in enumerate(vectors, 1):
            yield pull_back(gradient, self.leaves, vector, retain_graph=number < len(vectors))


def pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], *, retain_graph: bool
) -> list[Tensor]:
    """``weights^T (d outputs / d inputs)``; an output without a graph depends on nothing and adds nothing."""
    pairs = [(out, w.to(out)) for out, w in zip(outputs, weights, strict=True) if out.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in inputs]
    outs, graphs = zip(*pairs, strict=True)
    return differentiate(outs, inputs, graphs, retain_graph=retain_graph)


def differentiate(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor]:
    """``torch.autograd.grad``, with zeros where nothing depends and its refusals translated."""
    try:
        return list(
            torch.autograd.grad(
                outputs,
                inputs,
                weights,
                create_graph=create_graph,
                retain_graph=create_graph if retain_graph is None else retain_graph,
                materialize_grads=True,
            )
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedError(
            "autograd cannot differentiate this loss",
            got=str(error).partition("\n")[0],
            fix="Use operations whose backward pass is differentiable: checkpoint(use_reentrant=False), "
            "torch.backends.cudnn.flags(enabled=False) around recurrent layers.",
        ) from error


def check_second_derivative(gradient: Sequence[Tensor]) -> None:
    """Refuse a gradient whose graph has a part that would be left out of the products without a word."""
    pending = [g.grad_fn for g in gradient if g.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.name() in _WRONG_TWICE:
            what, fix = _WRONG_TWICE[node.name()]
            raise UnsupportedError("autograd cannot differentiate this loss twice", got=what, fix=fix)
        reached = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= reached
        pending += reached


def part_slices(x: Any, y: Any, parts: int, *, at_least: int) -> list[slice]:
    """Nearly equal consecutive parts of a batch."""
    count = examples(x)
    for leaf in pytree.tree_leaves((x, y)):
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or len(leaf) != count):
            raise InputError(
                f"every tensor of inputs and targets must begin with the {count} examples",
                got=f"shape {list(leaf.shape)}",
                fix="Expand what all examples share, or close over it in loss_fn.",
            )
    if not at_least <= parts <= count:
        raise InputError(
            f"the number of parts must lie between {at_least} and the {count} examples of the batch",
            got=parts,
            fix=f"Write parts={at_least}, with a batch of at least as many examples.",
        )
    edges = [i * count // parts for i in range(parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def _sizes(slices: Sequence[slice]) -> Tensor:
    return torch.tensor([part.stop - part.start for part in slices])


def _dots(vectors: Sequence[Sequence[Tensor]], other: Sequence[Tensor]) -> Tensor:
    """Inner product of each vector with another one."""
    return torch.stack([inner_products(vector, other).sum() for vector in vectors])
