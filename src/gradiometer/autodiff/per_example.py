"""Norms of the gradients of single examples, from one forward and backward pass of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError, UnsupportedError, check_callable, check_number, shown
from ..stats.linalg import accumulation_dtype
from .factors import Plain
from .functional import (
    Batch,
    call,
    check_inputs,
    check_leaves,
    check_model,
    check_result,
    examples,
    fresh,
    outside_inference,
    take,
)
from .tape import LayerTape
from .untouched import measuring

__all__ = [
    "per_example_grad_norms",
]


def per_example_grad_norms(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], x: Any, y: Any, *, chunk_size: int | None = None
) -> Tensor:
    """Norm of each example's own loss gradient, from one forward and backward pass of the batch.

    Evaluation mode. ``loss_fn`` sees one example at a time, as a batch of one, so that it does not matter
    whether it takes a mean or a sum over examples.

    Args:
        model: Any module that treats the examples of a batch one by one.
        loss_fn: Maps outputs and targets of a batch of one to one number.
        x: Inputs.
        y: Targets: a tensor, or a nest of tensors with the examples first.
        chunk_size: Examples at a time; all when ``None``.

    Returns:
        One norm per example, float64.

    Shapes:
        x ``[N, ...]`` -> ``[N]``.

    Units:
        loss / parameter.

    Raises:
        InputError: A loss that is not one number, outputs without an axis of examples, no trainable
            parameter, or an empty or non-finite batch.
        UnsupportedError: If a parameter cannot be reached, or examples are coupled.

    Source:
        Goodfellow 2015, arXiv:1510.01799; Gray et al. 2024, arXiv:2411.00999.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2)
        >>> per_example_grad_norms(net, lambda out, y: out.mean(), x, y)   # d out_i / d w = x_i
        tensor([1., 2.], dtype=torch.float64)
    """
    check_model(model)
    check_callable("loss_fn", loss_fn, "(outputs, targets) -> loss", "F.cross_entropy")
    check_number("chunk_size", chunk_size, least=1, integer=True, optional=True, example="None")
    check_inputs(model, x)
    check_leaves("y", y, examples(x), targets=True)
    leaves: list[Any] = []
    spec: Any = None

    def function(batch: Any) -> Tensor:
        nonlocal leaves, spec
        leaves, spec = pytree.tree_flatten(call(model, batch))
        moved = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        count = examples(batch)
        if not moved or any(leaf.ndim == 0 or len(leaf) != count for leaf in moved):
            raise InputError(
                f"the outputs must be tensors whose first dimension counts the {count} examples",
                got=[list(getattr(leaf, "shape", [type(leaf).__name__])) for leaf in leaves],
                fix="Wrap the model so that it returns such a tensor.",
            )
        return torch.cat([leaf.reshape(count, -1) for leaf in moved], 1)

    norms = []
    with measuring(model):
        batch, y = Batch.of(outside_inference(x)), outside_inference(y)
        tape = LayerTape(model, function, batch)
        if tape.unsupported:
            name, reason = next(iter(tape.unsupported.items()))
            raise UnsupportedError(
                f"per-example gradients miss {len(tape.unsupported)} of the parameters, first {name!r}: "
                f"{reason}",
                fix="Mend that, or freeze those parameters.",
            )
        for begin, part in batch.parts(chunk_size or batch.count):
            recording = tape.record(part, first=begin == 0)
            targets = take(y, slice(begin, begin + part.count))
            rows = _loss_cotangents(loss_fn, leaves, spec, targets, part.count)
            squares = rows.new_zeros(len(rows), dtype=accumulation_dtype(rows.device))
            for side in recording.sides(rows[None]).values():
                gradient = side.uses[0] if len(side.uses) == 1 else Plain(side.dense())
                squares += gradient.sq_norms()[0]
            norms.append(squares.sqrt())
    together = torch.cat(norms)
    check_result("the gradient of an example", together)
    return together


def _loss_cotangents(
    loss_fn: Callable[[Any, Any], Tensor], leaves: list[Any], spec: Any, y: Any, count: int
) -> Tensor:
    """Derivative of each example's own loss with respect to its outputs, ``[N, S]``."""
    rows, losses = [], []
    for n in range(count):
        shown = [
            leaf.detach()[n : n + 1].requires_grad_(leaf.requires_grad)
            if isinstance(leaf, Tensor) and leaf.ndim
            else leaf
            for leaf in leaves
        ]
        loss = loss_fn(pytree.tree_unflatten(shown, spec), fresh(take(y, slice(n, n + 1))))
        _check_loss(loss)
        losses.append(loss.detach().reshape(()))
        moved = [leaf for leaf in shown if isinstance(leaf, Tensor) and leaf.requires_grad]
        grads = torch.autograd.grad(loss.sum(), moved, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    together = loss_fn(pytree.tree_unflatten(detached, spec), fresh(y))
    _check_number(together)
    _check_adds_up(together, torch.stack(losses))
    return torch.stack(rows)


def _check_loss(loss: Any) -> None:
    """Refuse what is not one number that depends on the outputs."""
    _check_number(loss)
    if not loss.requires_grad:
        raise InputError(
            "the loss does not depend on the outputs",
            fix="Leave no detach(), item() or no_grad() between the outputs and the loss.",
        )


def _check_number(loss: Any) -> None:
    """Refuse what is not one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        raise InputError(
            "loss_fn must return one number",
            got=f"shape {list(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else shown(loss),
            fix='Write loss_fn=nn.CrossEntropyLoss(), or any other with reduction="mean".',
        )


def _check_adds_up(together: Tensor, alone: Tensor) -> None:
    """Refuse a loss that is neither the mean nor the sum of what it is of single examples."""
    sums = torch.stack([alone.mean(), alone.sum()]).double()
    value, rough = together.detach().double().reshape(()), max(1e-3, 10 * torch.finfo(alone.dtype).eps)
    if bool(sums.isfinite().all()) and not bool(torch.isclose(sums, value, rtol=rough).any()):
        raise InputError(
            "the loss of a batch is neither the mean nor the sum of its examples' losses: it divides by "
            "something of the batch, such as class weights or valid tokens, or couples examples",
            fix='Write loss_fn with reduction="sum".',
        )
