"""The Jacobian regulariser: a term of the loss, under which outputs answer less to a change of the input."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import reduce

import torch
from torch import Tensor

from ..errors import InputError, check_number
from ..stats.linalg import random_orthonormal_rows

__all__ = [
    "JacobianRegularizer",
]


@dataclass(frozen=True)
class JacobianRegularizer:
    r"""Half the mean squared norm of the input-output Jacobian, to be added to the loss.

    .. math:: \frac{\lambda}{2N}\sum_x |J(x)|_F^2 \approx
              \frac{\lambda}{2N}\sum_x \frac{O}{k}\sum_{\mu=1}^{k}
              \Big|\frac{\partial (v_\mu\cdot z)}{\partial x}\Big|^2

    with ``v`` orthonormal, uniformly distributed and drawn anew for each example from torch's global
    generator, as dropout is (for several projections that of the CPU): term and gradient are unbiased. It
    is taken from the forward pass of the loss and costs one more backward pass per projection, and the way
    back through it. A loop or a ``training_step`` gains the first of these lines and the last words of the
    last::

        x = x.detach().requires_grad_()  # not the caller's batch; an embedding's output as it is
        logits = model(x)
        loss = F.cross_entropy(logits, y) + regularizer(x, logits)

    All modes are the user's: with dropout it is the Jacobian of the thinned network. Batch norm in train
    mode couples the examples, and each then answers also for what its input does to the outputs of the
    others. The model must be differentiable twice: fused attention and compiled models are not, run them
    under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` and uncompiled.

    Args:
        strength: λ, the weight of the term.
        num_projections: Orthonormal projections per example, k; all outputs one by one, hence the exact
            norm, when ``None``.

    Shapes:
        ``regularizer(x, logits)``: x ``[N, ...]`` flattened to D, logits ``[N, ...]`` flattened to O ->
        scalar.

    Units:
        Those of the loss; λ is in loss (input/output)².

    Raises:
        InputError: Inputs that are not floating-point, do not require a gradient or are not what the
            logits were computed from; logits that are no tensor or not one per example; more
            projections than outputs; disabled gradients.

    Source:
        Hoffman, Roberts, Yaida 2019, arXiv:1908.02729; orthonormal directions are ours.

    Example:
        >>> model, regularizer = torch.nn.Linear(3, 2), JacobianRegularizer(0.1, num_projections=None)
        >>> x = torch.randn(8, 3).requires_grad_()
        >>> torch.allclose(regularizer(x, model(x)), 0.1 / 2 * model.weight.square().sum())
        True
    """

    strength: float
    _: KW_ONLY
    num_projections: int | None = 1

    def __post_init__(self) -> None:
        """Check both numbers."""
        check_number("strength", self.strength, least=0, example="0.1")
        check_number("num_projections", self.num_projections, least=1, integer=True, optional=True)

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        """The term, in float32 at least."""
        _check(x, logits)
        directions = _directions(self.num_projections, logits)
        k, n, width = directions.shape
        with torch.autocast(logits.device.type, enabled=False):  # back in the precision of the forward
            squares = reduce(torch.add, (_squared_norm(x, logits, v) for v in directions))
            return self.strength * width / (2 * k * n) * squares


def _directions(k: int | None, logits: Tensor) -> Tensor:
    """Orthonormal directions ``[k, N, O]``; the unit vectors where there are as many as outputs."""
    n, width = len(logits), logits[0].numel()
    if k is None or k == width:
        return torch.eye(width, dtype=logits.dtype, device=logits.device)[:, None].expand(width, n, width)
    if k == 1:
        v = torch.randn_like(logits).reshape(n, width)
        return (v / torch.linalg.vector_norm(v, dim=1, keepdim=True))[None]
    v = random_orthonormal_rows(k, width, generator=torch.default_generator, batch=n)
    return v.to(logits).transpose(0, 1)


def _squared_norm(x: Tensor, logits: Tensor, v: Tensor) -> Tensor:
    """``|v^T J|^2``, summed over the examples, with a graph of its own."""
    (grad,) = torch.autograd.grad(logits, x, v.reshape(logits.shape), create_graph=True, allow_unused=True)
    if grad is None:
        raise _independent()
    row = grad.flatten().to(torch.promote_types(grad.dtype, torch.float32))
    return torch.dot(row, row)


def _check(x: Tensor, logits: Tensor) -> None:
    """Refuse what has no Jacobian."""
    if not torch.is_grad_enabled():
        raise InputError(
            "the Jacobian regulariser needs gradients, which are disabled here",
            fix="Leave the term out under torch.no_grad(), as in validation.",
        )
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InputError(
            "the Jacobian needs one tensor of floating-point inputs",
            got=x.dtype if isinstance(x, Tensor) else type(x).__name__,
            fix="For token inputs pass the output of the embedding: regularizer(embedded, logits).",
        )
    if not x.requires_grad:
        raise InputError(
            "the inputs do not require a gradient",
            fix="Write x = x.detach().requires_grad_() before logits = model(x).",
        )
    if not isinstance(logits, Tensor):
        raise InputError(
            "the outputs must be one tensor",
            got=type(logits).__name__,
            fix="Pass the logits themselves: regularizer(x, out.logits).",
        )
    if x.ndim == 0 or logits.ndim == 0 or not 0 < len(x) == len(logits):
        raise InputError(
            "inputs and outputs must hold the same examples along their first axis, at least one",
            got=f"inputs {list(x.shape)} and outputs {list(logits.shape)}",
            fix="Pass logits [N, ...] of inputs [N, ...].",
        )
    if not logits.requires_grad:
        raise _independent()


def _independent() -> InputError:
    return InputError(
        "the outputs do not depend on these inputs",
        fix="Write x = x.detach().requires_grad_() before logits = model(x), and pass this x.",
    )
