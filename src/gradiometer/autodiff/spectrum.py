"""The largest eigenvalue of the curvature of one batch's loss, by Lanczos iteration.

Everything is evaluated as training evaluates it, see ``products.py``: each module in the mode it is in, so
that batch norm normalises with the batch in train mode, and one set of dropout masks for all products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..stats.jackknife import delete_block_jackknife
from ..stats.linalg import accumulation_dtype
from .factors import Weight
from .functional import examples, take
from .products import Loss, LossFn, check_second_derivative, differentiate, part_slices, pull_back

CurvatureKind = Literal["hessian", "gauss_newton"]
Product = Callable[[Sequence[Tensor]], list[Tensor]]

TOLERANCE = 0.01
"""Largest residual of a converged pair, relative to the eigenvalue."""
_BASIS = 12
"""Vectors that are held at most; a matrix as small as that is made in full."""
_PARTS = 8
"""Parts of the batch that are left out in turn; each has two examples at least, as batch norm needs."""
_ADDS_UP = 1e-3
"""Relative difference between the parts and the whole beyond which they are not parts of one loss."""


def hessian(loss: Loss, x: Any, y: Any) -> Product:
    r"""Products with the Hessian, each one backward pass through the graph of the gradient.

    .. math:: H = \nabla^2_\theta\,\ell(f(\theta))

    Args:
        loss: The loss as a function of the parameters, within ``as_training(model)``.
        x: Inputs.
        y: Targets.
    """
    slope = loss.gradient(x, y, differentiable=True)
    check_second_derivative(slope)
    return lambda vector: pull_back(slope, loss.leaves, vector, retain_graph=True)


def gauss_newton(loss: Loss, x: Any, y: Any) -> Product:
    r"""Products with the Gauss-Newton matrix, the Hessian of the loss of the linearised model.

    .. math:: H_{GN} = J^T\,(\nabla^2_f\,\ell)\,J, \qquad J = \partial f/\partial\theta

    ``J v`` is the derivative of ``J^T u`` in the dual vector ``u``. For half the mean squared error the
    matrix is :math:`J^TJ/N`, whose eigenvalues, zeros aside, are those of the full tangent kernel over N.

    Args:
        loss: The loss as a function of the parameters, within ``as_training(model)``.
        x: Inputs.
        y: Targets.

    Raises:
        InputError: If the loss is linear in what the model returns.
    """
    nest, form = pytree.tree_flatten(loss.outputs(x))
    places = [i for i, leaf in enumerate(nest) if isinstance(leaf, Tensor) and leaf.requires_grad]
    outputs = [nest[i] for i in places]
    points = [out.detach().requires_grad_() for out in outputs]
    for i, point in zip(places, points, strict=True):
        nest[i] = point
    slope = differentiate([loss.of(pytree.tree_unflatten(nest, form), x, y)], points, None, create_graph=True)
    if not any(s.requires_grad for s in slope):
        raise InputError(
            "the loss is linear in the model's outputs, and so its Gauss-Newton matrix is 0",
            fix='Compute the loss of logits in loss_fn, or write curvature="hessian".',
        )
    duals = [torch.zeros_like(out, requires_grad=True) for out in outputs]
    pulled = differentiate(outputs, loss.leaves, duals, create_graph=True)
    check_second_derivative(pulled)

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        pushed = pull_back(pulled, duals, vector, retain_graph=True)
        curved = pull_back(slope, points, pushed, retain_graph=True)
        return pull_back(outputs, loss.leaves, curved, retain_graph=True)

    return product


class Eigenpair(NamedTuple):
    """An approximate eigenvalue and its vector; there is an eigenvalue within ``residual`` of ``value``."""

    value: float
    vector: Tensor
    residual: float
    products: int


def top_eigenpair(product: Callable[[Tensor], Tensor], start: Tensor, max_products: int = 100) -> Eigenpair:
    r"""The largest eigenvalue of a symmetric matrix of which only products are known.

    By the implicitly restarted Lanczos iteration of ARPACK, which ends when the residual is 1 % of the
    eigenvalue. The error of the value is then of the order of the square of that, over the gap to the next
    one; it is never too large. Twelve vectors are held in the host's memory, in float64.

    Args:
        product: ``v -> A v``.
        start: Where to begin; a random vector has all eigenvectors in it.
        max_products: When to give up: the value is then the largest of :math:`v^T A v` so far.

    Returns:
        The pair, with an infinite residual where the iteration was given up; ``nan`` where a product is not
        finite.

    Shapes:
        start ``[P]``.

    Source:
        Lehoucq, Sorensen, Yang 1998, ARPACK Users' Guide, through ``scipy.sparse.linalg.eigsh``.

    Example:
        >>> matrix = torch.diag(torch.tensor([3.0, 1.0, -5.0]))
        >>> round(top_eigenpair(lambda v: matrix @ v, torch.ones(3)).value, 5)
        3.0
    """
    matrix = _Counted(product, start, max_products)
    size = len(start)
    try:
        if size > _BASIS:
            values, vectors = eigsh(
                LinearOperator((size, size), matrix.times, dtype=np.float64),
                k=1,
                which="LA",
                v0=start.detach().cpu().double().numpy(),
                ncv=_BASIS,
                tol=TOLERANCE,
            )
        else:
            values, vectors = np.linalg.eigh(np.stack([matrix.times(row) for row in np.eye(size)]))
        vector = vectors[:, -1]
        residual = float(np.linalg.norm(matrix.times(vector) - values[-1] * vector))
    except _NotFiniteError:
        return Eigenpair(math.nan, start, math.nan, matrix.count)
    except (_GivenUpError, ArpackNoConvergence):
        return Eigenpair(matrix.largest, start, math.inf, matrix.count)
    except ArpackError:
        if matrix.count > 1:
            raise
        return Eigenpair(0.0, start / start.norm(), 0.0, 1)  # it does not take a first product of 0
    return Eigenpair(float(values[-1]), torch.from_numpy(vector).to(start), residual, matrix.count)


class _GivenUpError(Exception):
    """There were as many products as were allowed."""


class _NotFiniteError(Exception):
    """A product is not finite."""


class _Counted:
    """A matrix for ARPACK, which counts its products and keeps the largest Rayleigh quotient."""

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor, most: int) -> None:
        self._product, self._like, self._most = product, like, most
        self.count, self.largest = 0, -math.inf

    def times(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """One product."""
        if self.count == self._most:
            raise _GivenUpError
        self.count += 1
        curved: NDArray[np.float64] = (
            self._product(torch.from_numpy(vector).to(self._like)).cpu().double().numpy()
        )
        if not np.isfinite(curved).all():
            raise _NotFiniteError
        square = float(vector @ vector)
        self.largest = max(self.largest, float(vector @ curved) / square if square else -math.inf)
        return curved


class Curvature:
    r"""The curvature of a batch's mean loss in a metric of its own, :math:`D^{1/2} H D^{1/2} + S`.

    D and S are diagonal, and H is the Hessian or its Gauss-Newton part. Parameters are one flat vector. To be
    used within ``as_training(model)``. A product costs about two backward passes of the batch.

    Args:
        model: Any module.
        loss_fn: Maps outputs and targets to one number.
        kind: ``"hessian"`` or ``"gauss_newton"``.
        gains: D: a number, or a tensor of its shape, for each trainable parameter; 1 when ``None``.
        shifts: S, likewise; 0 when ``None``.
        loss_reduction: What ``loss_fn`` takes over the examples: a ``"mean"``, or a ``"sum"``, which is
            divided by their number.

    Raises:
        InputError: If the kind is unknown.

    Example:
        >>> from gradiometer.autodiff.untouched import as_training
        >>> net = nn.Linear(2, 1, bias=False)                   # H = x^T x / N
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> with as_training(net):
        ...     pair = Curvature(net, lambda out, y: out.square().mean() / 2).top(x, None)
        >>> round(pair.value, 5)
        2.0
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        kind: CurvatureKind = "hessian",
        gains: Sequence[Weight] | None = None,
        shifts: Sequence[Weight] | None = None,
        loss_reduction: str = "mean",
    ) -> None:
        if kind not in get_args(CurvatureKind):
            raise InputError(
                "unknown curvature", got=repr(kind), fix=f"Write one of {get_args(CurvatureKind)}."
            )
        self._make = hessian if kind == "hessian" else gauss_newton
        self._loss = Loss(model, loss_fn, None, loss_reduction)
        self._leaves = self._loss.leaves
        count = len(self._leaves)
        self._roots = [gain**0.5 for gain in gains or [1.0] * count]
        self._shifts = shifts or [0.0] * count

    def of(self, x: Any, y: Any) -> Callable[[Tensor], Tensor]:
        """Products for one batch.

        Args:
            x: Inputs: a tensor, or a nest of tensors with the examples first.
            y: Targets.
        """
        curvature = self._make(self._loss, x, y)

        def product(vector: Tensor) -> Tensor:
            pieces = self._split(vector)
            curved = _scaled(curvature(_scaled(pieces, self._roots)), self._roots)
            shifted = _scaled(pieces, self._shifts)
            return self._flat([c + s.to(c) for c, s in zip(curved, shifted, strict=True)])

        return product

    def top(self, x: Any, y: Any, max_products: int = 100) -> Eigenpair:
        """The largest eigenvalue for one batch; see ``top_eigenpair``.

        Args:
            x: Inputs: a tensor, or a nest of tensors with the examples first.
            y: Targets.
            max_products: When to give up.
        """
        generator = torch.Generator().manual_seed(0)
        start = self._flat([torch.randn(leaf.shape, generator=generator) for leaf in self._leaves])
        return top_eigenpair(self.of(x, y), start, max_products)

    def stderr(self, x: Any, y: Any, pair: Eigenpair) -> float:
        """Standard error of an eigenvalue over examples, at the cost of one product.

        To first order the eigenvalue changes by what the eigenvector's quadratic form does when an eighth of
        the batch is left out.

        Args:
            x: Inputs: a tensor, or a nest of tensors with the examples first.
            y: Targets: a tensor, or a nest of tensors with the examples first.
            pair: The eigenvalue and its vector for this batch.

        Returns:
            The error; ``nan`` with fewer than eight examples, or where the parts do not add up to the whole:
            batch norm in train mode normalises within each, dropout draws masks of its own.
        """
        count, dtype = examples(x), accumulation_dtype(pair.vector.device)
        parts = part_slices(x, y, min(_PARTS, max(count // 2, 1)), at_least=1)
        curved = [self.of(take(x, part), take(y, part))(pair.vector) for part in parts]
        forms = torch.stack([pair.vector.to(dtype) @ product.to(dtype) for product in curved])
        sizes = forms.new_tensor([part.stop - part.start for part in parts])
        mean = sizes @ forms / count
        if abs(float(mean) - pair.value) > _ADDS_UP * abs(pair.value):
            return math.nan
        without = (count * mean - sizes * forms) / (count - sizes)
        return float(delete_block_jackknife(mean[None], without[:, None], sizes))

    def _split(self, vector: Tensor) -> list[Tensor]:
        pieces = vector.split([leaf.numel() for leaf in self._leaves])
        return [piece.view(leaf.shape) for piece, leaf in zip(pieces, self._leaves, strict=True)]

    def _flat(self, pieces: Sequence[Tensor]) -> Tensor:
        """One vector, on the device of the first parameter and in float32 at least."""
        first = self._leaves[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        return torch.cat([piece.reshape(-1).to(first.device, dtype) for piece in pieces])


def _scaled(pieces: Sequence[Tensor], factors: Sequence[Weight]) -> list[Tensor]:
    return [
        piece * (factor.to(piece.device) if isinstance(factor, Tensor) else factor)
        for piece, factor in zip(pieces, factors, strict=True)
    ]
