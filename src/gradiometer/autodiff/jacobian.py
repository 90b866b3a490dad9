"""Norms and singular values of the input-output Jacobian, exact or by random projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError, UnsupportedError, check_number
from ..stats.linalg import random_orthonormal_rows
from .functional import (
    Forward,
    check_inputs,
    check_model,
    check_result,
    pure_function,
    take,
    warn_of_train_mode,
)
from .untouched import measuring

__all__ = [
    "EXACT_OUTPUTS",
    "Linearised",
    "differentiable",
    "first_embedding",
    "jacobian_norms",
    "jacobian_singular_values",
    "linearise",
    "projected_sq_norms",
    "spectral_norms",
]


EXACT_OUTPUTS = 16


_KRYLOV_ROUNDS = 10


_KRYLOV_TOLERANCE = 0.01


class Linearised:
    """Outputs of a batch and products with its per-example Jacobians ``[N, O, D]``."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.x = x.detach().clone().requires_grad_()
        out = function(self.x)
        if not isinstance(out, Tensor) or out.ndim == 0 or len(out) != len(x):
            raise InputError(
                "the model must return one output, of any shape, per example",
                got=list(out.shape) if isinstance(out, Tensor) else type(out).__name__,
                fix="Pass forward=lambda model, x: ... that returns a tensor [N, ...].",
            )
        if out.is_complex() or not out.numel():
            raise InputError(
                "the outputs must be real numbers, one or more per example",
                got=f"{list(out.shape)} of {out.dtype}",
                fix="Pass forward=lambda model, x: torch.view_as_real(model(x)).flatten(1).",
            )
        if not out.requires_grad:
            raise InputError(
                "the outputs do not depend on the inputs through differentiable operations",
                fix="Pass forward= that returns logits rather than decisions.",
            )
        self.out = out.reshape(len(out), -1)
        self.width = self.out.shape[1]

    def rows(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """``v^T J`` per example: v ``[N, O]`` -> ``[N, D]``, one backward pass."""
        (grad,) = torch.autograd.grad(
            self.out, self.x, v.to(self.out), retain_graph=True, create_graph=create_graph
        )
        return grad.reshape(len(grad), -1)

    def columns(self, w: Tensor) -> Tensor:
        """``J w`` per example by differentiating ``v^T J w`` in v: w ``[N, D]`` -> ``[N, O]``."""
        v = torch.zeros_like(self.out, requires_grad=True)
        (grad,) = torch.autograd.grad((self.rows(v, create_graph=True) * w).sum(), v)
        return grad

    def full(self) -> Tensor:
        """The Jacobians themselves, ``[N, O, D]``: one backward pass per output."""
        unit = torch.eye(self.width, dtype=self.out.dtype, device=self.out.device)
        return torch.stack([self.rows(unit[o].expand_as(self.out)) for o in range(self.width)], 1)


def linearise(model: nn.Module, x: Any, forward: Forward | None) -> Linearised:
    """The model at a batch, ready for products with its Jacobians.

    Args:
        model: Any module.
        x: Floating-point inputs.
        forward: Maps model and inputs to outputs; ``model(x)`` when ``None``.

    Raises:
        InputError: If the inputs cannot be differentiated by.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InputError(
            "the Jacobian needs one tensor of floating-point inputs",
            got=x.dtype if isinstance(x, Tensor) else type(x).__name__,
            fix="For token inputs differentiate the embedding: "
            "jacobian_norms(model, embedded, forward=lambda model, e: ...).",
        )
    if x.layout != torch.strided:
        raise UnsupportedError(
            "sparse inputs have no Jacobian that can be taken", got=x.layout, fix="Write x.to_dense()."
        )
    check_inputs(model, x)
    function, parameters = pure_function(model, forward, frozen=True)
    return Linearised(lambda inputs: function(parameters, inputs), x)


def jacobian_norms(
    model: nn.Module,
    x: Tensor,
    *,
    num_projections: int | None = None,
    generator: torch.Generator | None = None,
    forward: Forward | None = None,
) -> Tensor:
    r"""Frobenius norm of the input-output Jacobian of each example, in evaluation mode.

    .. math:: |J(x)|_F^2 = \sum_{oi} J_{oi}^2 \approx \frac{O}{k}\sum_{\mu=1}^{k}
              \Big|\frac{\partial (v_\mu\cdot z)}{\partial x}\Big|^2

    with ``v`` orthonormal and uniformly distributed. The estimate of the square is unbiased; its root
    is biased low, by a relative ``Var/8`` of the square.

    Args:
        model: Any module; its outputs should be logits, not probabilities.
        x: Inputs.
        num_projections: Number of projections per example; the exact norm when ``None``.
        generator: CPU generator of the projections; a fixed seed when ``None``.
        forward: Maps ``(model, x)`` to outputs; ``model(x)`` when ``None``.

    Returns:
        One norm per example.

    Shapes:
        x ``[N, ...]``, outputs ``[N, ...]`` flattened to O -> ``[N]``.

    Units:
        outputs / inputs.

    Raises:
        InputError: Integer, empty, non-finite or misplaced inputs; outputs not one per example;
            projections outside 1..O.

    Source:
        Hoffman, Roberts, Yaida 2019, arXiv:1908.02729; orthonormal directions are ours.

    Example:
        >>> net = nn.Linear(3, 2, bias=False)
        >>> torch.allclose(jacobian_norms(net, torch.randn(4, 3)), net.weight.norm().expand(4))
        True
    """
    check_model(model, forward=forward, generator=generator)
    check_number("num_projections", num_projections, integer=True, optional=True, example="None")
    warn_of_train_mode(model, "the Jacobian")
    with measuring(model):
        line = linearise(model, x, forward)
        if num_projections is None:
            norms = line.full().flatten(1).norm(dim=1)
        else:
            norms = projected_sq_norms(line, num_projections, generator).mean(1).sqrt()
    check_result("the Jacobian", norms)
    return norms


def jacobian_singular_values(
    model: nn.Module, x: Tensor, *, k: int | None = None, forward: Forward | None = None
) -> Tensor:
    """Singular values of the input-output Jacobian of each example, largest first.

    The Jacobian is formed row by row, one backward pass per output.

    Args:
        model: Any module.
        x: Inputs.
        k: How many to return; all ``min(O, D)`` when ``None``.
        forward: Maps ``(model, x)`` to outputs; ``model(x)`` when ``None``.

    Returns:
        Singular values.

    Shapes:
        x ``[N, ...]`` -> ``[N, k]``.

    Units:
        outputs / inputs.

    Raises:
        InputError: As :func:`jacobian_norms`, or ``k`` outside 1..min(O, D).

    Source:
        Pennington, Schoenholz, Ganguli 2017, arXiv:1711.04735.

    Example:
        >>> net = nn.Linear(3, 2, bias=False)
        >>> values = jacobian_singular_values(net, torch.randn(4, 3))
        >>> torch.allclose(values[0], torch.linalg.svdvals(net.weight.detach()))
        True
    """
    check_model(model, forward=forward)
    check_number("k", k, integer=True, optional=True, example="None")
    warn_of_train_mode(model, "the Jacobian")
    with measuring(model):
        jacobians = linearise(model, x, forward).full()
        check_result("the Jacobian", jacobians)
        values = torch.linalg.svdvals(jacobians)
    if k is not None and not 1 <= k <= values.shape[1]:
        raise InputError(
            f"k must lie between 1 and min(outputs, inputs) = {values.shape[1]}",
            got=k,
            fix="Write k=None for all singular values.",
        )
    return values[:, :k]


def projected_sq_norms(line: Linearised, num_projections: int, generator: torch.Generator | None) -> Tensor:
    """``O |v^T J|^2`` for orthonormal random v of each example, ``[N, k]``: unbiased for the square."""
    n = len(line.x)
    v = random_orthonormal_rows(num_projections, line.width, generator=generator, batch=n)
    norms = [line.rows(v[:, m]).square().sum(1) for m in range(num_projections)]
    return line.width * torch.stack(norms, 1)


def spectral_norms(line: Linearised, generator: torch.Generator) -> Tensor:
    r"""Largest singular value per example, ``[N]``: a lower bound that tightens.

    The largest one of :math:`J^\top` on the Krylov space of :math:`JJ^\top` (Lanczos, with full
    orthogonalisation): as many passes as power iteration takes for the same space, and the best value in it.
    Stops when the mean over the examples grows by less than 1 %, after ten rounds at the latest.
    """
    u = random_orthonormal_rows(1, line.width, generator=generator, batch=len(line.x))[:, 0]
    basis, images = [u.to(line.out)], []
    value = torch.zeros(len(u), dtype=basis[0].dtype, device=basis[0].device)
    for _ in range(min(_KRYLOV_ROUNDS, line.width)):
        w = line.rows(basis[-1]).detach()
        images.append(w)
        spanned = torch.stack(images, 1)
        grown = torch.linalg.eigvalsh(spanned @ spanned.mT)[:, -1].clamp(min=0).sqrt()
        done = bool(grown.mean() <= value.mean() * (1 + _KRYLOV_TOLERANCE))
        value = torch.maximum(value, grown)
        if done:
            break
        u = line.columns(w)
        length = u.norm(dim=1, keepdim=True)
        directions = torch.stack(basis, 1)
        for _ in range(2):  # once is not enough in single precision
            u = u - (directions.mT @ (directions @ u[:, :, None]))[:, :, 0]
        rest = u.norm(dim=1, keepdim=True)
        exhausted = rest <= 10 * torch.finfo(u.dtype).eps * length
        basis.append(torch.where(exhausted, torch.zeros_like(u), u / rest))
    return value


def _side_by_side(
    leaves: list[Any], spec: Any, floating: list[Tensor], forward: Forward
) -> tuple[Forward, Tensor]:
    """A nest of inputs as one tensor ``[N, D]``; what is no floating tensor stays as it is."""
    kind = torch.promote_types(floating[0].dtype, floating[-1].dtype)
    widths = [leaf[0].numel() for leaf in floating]

    def from_flat(model: nn.Module, flat: Tensor) -> Tensor:
        pieces = iter(zip(flat.split(widths, 1), floating, strict=True))

        def put_back(leaf: Any) -> Any:
            if not any(leaf is other for other in floating):
                return leaf
            piece, like = next(pieces)
            return piece.reshape(-1, *like.shape[1:]).to(like.dtype)

        return forward(model, pytree.tree_unflatten([put_back(leaf) for leaf in leaves], spec))

    return from_flat, torch.cat([leaf.reshape(len(leaf), -1).to(kind) for leaf in floating], 1)


def first_embedding(model: nn.Module) -> tuple[str, nn.Embedding]:
    """Name and module of the first table of a model.

    Args:
        model: Any module.

    Raises:
        UnsupportedError: If it has none.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            return name, module
    raise UnsupportedError(
        "integer inputs have no Jacobian and the model has no nn.Embedding to take it at",
        fix="Leave JacobianNorm out of observables=, or pass forward= and a floating-point probe.",
    )


def differentiable(model: nn.Module, x: Any, forward: Forward) -> tuple[Forward, Tensor]:
    """A forward of one floating tensor, and that tensor.

    That is the input, or the floating tensors of a nest side by side; for tokens what the first embedding
    gives.
    """
    leaves, spec = pytree.tree_flatten(x)
    floating = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if any(leaf.layout != torch.strided for leaf in floating):
        raise UnsupportedError(
            "sparse inputs have no Jacobian that can be taken",
            fix="Leave JacobianNorm out of observables=, or pass dense inputs as probe=.",
        )
    if isinstance(x, Tensor) and floating:
        return forward, x
    if floating:
        return _side_by_side(leaves, spec, floating, forward)
    _, table = first_embedding(model)
    embedded = _embedded(table, model, x, forward)
    alone = _embedded(table, model, take(x, slice(0, 1)), forward)
    grown = [axis for axis, (a, b) in enumerate(zip(alone.shape, embedded.shape, strict=True)) if a != b]
    axis = grown[0] if grown else 0

    def from_embedding(model: nn.Module, embedded: Tensor) -> Tensor:
        pending = [embedded.movedim(0, axis)]

        def replace(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return pending.pop() if pending else out

        handle = table.register_forward_hook(replace)
        try:
            return forward(model, x)
        finally:
            handle.remove()

    return from_embedding, embedded.movedim(axis, 0)


def _embedded(table: nn.Embedding, model: nn.Module, x: Any, forward: Forward) -> Tensor:
    """The first output of a table in a forward pass."""
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = table.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            function, parameters = pure_function(model, forward, frozen=True)
            function(parameters, x)
        finally:
            handle.remove()
    if not seen:
        raise UnsupportedError("the model's first nn.Embedding was not called in its forward")
    return seen[0]
