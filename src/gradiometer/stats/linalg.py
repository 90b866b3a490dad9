"""Norms, inner products and random orthonormal directions.

Complex numbers are pairs of reals throughout, as optimizers take them. Float32 (or the tensor's own
precision) inside one tensor, float64 across tensors: a float64 pass over all parameters costs as much as
half a small training step, and is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import InputError

_HALF = frozenset({torch.float16, torch.bfloat16})


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Float64 where the device has it, else float32 (Apple's ``mps`` has none)."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_reals(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, without a copy; a real one as it is.

    Args:
        tensor: Any tensor.

    Shapes:
        Complex ``[...]`` -> real ``[..., 2]``.

    Example:
        >>> in_reals(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_numbers(tensor: Tensor) -> int:
    """How many real numbers a tensor holds: two for each complex one.

    Args:
        tensor: Any tensor.

    Example:
        >>> real_numbers(torch.ones(3, dtype=torch.cfloat))
        6
    """
    return tensor.numel() * (1 + tensor.is_complex())


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Squared norm of each tensor.

    Args:
        tensors: Tensors on one device, at least one; half precision is raised to float32 inside.

    Returns:
        One squared norm per tensor.

    Shapes:
        ``n`` tensors of any shape -> ``[n]``.

    Example:
        >>> squared_norms([torch.ones(4), torch.full((2, 2), 2.0)])
        tensor([ 4., 16.], dtype=torch.float64)
    """
    tensors = [in_reals(tensor) for tensor in tensors]
    kinds = {tensor.dtype for tensor in tensors}
    dtype = None
    if not kinds.isdisjoint(_HALF):
        dtype = torch.float64 if torch.float64 in kinds else torch.float32
    norms = torch._foreach_norm(tensors, 2.0, dtype)
    if norms[0].is_cpu:  # nobody waits for a device there, and plain numbers are faster than small tensors
        lengths = [norm.item() for norm in norms]
        return torch.tensor([length * length for length in lengths], dtype=torch.float64)
    return torch.stack(norms).to(accumulation_dtype(norms[0].device)).square()


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner product of each pair of tensors; of complex ones the real part of ``conj(left) . right``.

    Args:
        left: Tensors.
        right: As many tensors of the same shapes, complex where those are.

    Returns:
        One inner product per pair.

    Shapes:
        ``n`` pairs of any shape -> ``[n]``.

    Example:
        >>> inner_products([torch.ones(3)], [torch.arange(3.0)])
        tensor([3.], dtype=torch.float64)
    """
    dtype = accumulation_dtype(left[0].device)
    products = []
    for a, b in zip(map(in_reals, left), map(in_reals, right), strict=True):
        common = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        products.append(torch.dot(a.reshape(-1).to(common), b.reshape(-1).to(common)).to(dtype))
    return torch.stack(products)


def gram_matrix(left: Tensor, right: Tensor, *, same: bool = False) -> Tensor:
    """``left right^T``; of a matrix with itself only the upper triangle is computed, in four blocks.

    Args:
        left: Row vectors.
        right: Row vectors of the same length.
        same: Whether right is left.

    Returns:
        Their inner products.

    Shapes:
        left ``[..., n, p]``, right ``[..., m, p]`` -> ``[..., n, m]``.

    Example:
        >>> gram_matrix(torch.eye(2), torch.ones(1, 2))
        tensor([[1.],
                [1.]])
    """
    rows = left.shape[-2]
    if not same or rows < 256:
        return left @ right.mT
    if left.ndim > 2:
        return torch.stack([gram_matrix(block, block, same=True) for block in left])
    product = left.new_empty(rows, rows)
    edges = [i * rows // 4 for i in range(5)]
    for begin, end in pairwise(edges):
        torch.mm(left[begin:end], left[begin:].mT, out=product[begin:end, begin:])
        product[end:, begin:end] = product[begin:end, end:].mT
    return product


def random_orthonormal_rows(
    rows: int, dimension: int, *, generator: torch.Generator | None = None, batch: int = 1
) -> Tensor:
    """Uniformly distributed sets of orthonormal vectors.

    Args:
        rows: Number of vectors in each set, at most ``dimension``.
        dimension: Length of each vector.
        generator: Source of randomness on the CPU; a new one with seed 0 when ``None``, so that the
            global generator is never touched.
        batch: Number of independent sets.

    Returns:
        The sets, float64 on the CPU.

    Shapes:
        ``[batch, rows, dimension]``.

    Raises:
        InputError: If ``rows`` is below 1 or above ``dimension``.

    Example:
        >>> v = random_orthonormal_rows(2, 5, batch=3)
        >>> torch.allclose(v @ v.mT, torch.eye(2, dtype=v.dtype).expand(3, 2, 2))
        True
    """
    if not 1 <= rows <= dimension:
        raise InputError(
            f"the number of projections must lie between 1 and the {dimension} outputs",
            got=rows,
            fix=f"Write num_projections={min(2, dimension)}, or None for the exact value.",
        )
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(batch, dimension, rows, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    signs = r.diagonal(dim1=-2, dim2=-1).sign()  # what makes QR of a Gaussian uniform
    return (q * signs[:, None]).mT
