"""The gradient noise scale: how large a batch must be before its gradient is mostly signal.

Two different quantities carry the name. ``B_simple = tr(Sigma) / |G|^2`` is a number of examples and
knows nothing of the learning rate; SGD's ``g = eps N / 2B`` is the temperature of the optimizer's own
noise. They are reported under separate names and never share an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..autodiff.factors import Plain
from ..autodiff.functional import call, check_inputs, examples, measuring, outside_inference, take
from ..autodiff.tape import LayerTape
from ..errors import InputError, SampleSkippedError, UnsupportedError
from ..estimators import Estimator, Reference, Window
from ..linalg import accumulation_dtype
from ..records import Quantity
from ..schedules import Schedule
from ..snapshot import Snapshot
from .base import Estimate, Numbers, Observable


def gradient_noise_scale(
    sq_norms: Tensor, sizes: Tensor, batch_sq_norm: Tensor, *, loss_reduction: str = "mean"
) -> dict[str, Tensor]:
    r"""Unbiased noise trace and squared gradient norm from the parts of one batch.

    With part means ``g_j`` of ``b_j`` examples and weights ``w_j`` that add up to 1,

    .. math:: A = \sum_j w_j |g_j|^2 \to |G|^2 + S \sum_j \frac{w_j}{b_j}, \qquad
              C = \Big|\sum_j w_j g_j\Big|^2 \to |G|^2 + S \sum_j \frac{w_j^2}{b_j}

    and hence ``S = (A - C) / (sum w/b - sum w^2/b)``, ``|G|^2 = C - S sum w^2/b``. With equal parts these
    are the two estimators of the source. ``loss_reduction="mean"``: every part contributes the gradient
    of its mean loss with equal weight, so ``g_j`` is k times the contribution, and ``|G|^2`` is on the
    scale of the gradient that the optimizer sees. ``"sum"``: ``g_j`` is the contribution over ``b_j``.

    Args:
        sq_norms: Squared norm of each part's contribution to the batch gradient.
        sizes: Examples in each part.
        batch_sq_norm: Squared norm of the batch gradient (the sum of the contributions), unclipped.
        loss_reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over examples.

    Returns:
        ``trace`` (S) and ``grad_sq_norm`` (:math:`|G|^2`). Average both over steps before dividing:
        the ratio is ``B_simple``. Either can be negative on one step.

    Shapes:
        sq_norms and sizes ``[k]``, batch_sq_norm scalar -> scalars.

    Units:
        (loss / parameter)^2, the trace times one example.

    Raises:
        InputError: Fewer than two parts, an empty part, or an unknown reduction.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A; the weights for
        unequal parts are ours.

    Example:
        >>> one = torch.tensor([0.75, 0.75])          # two contributions of squared norm 3/4: g_j^2 = 3
        >>> gradient_noise_scale(one, torch.ones(2), torch.tensor(2.0))
        {'trace': tensor(2., dtype=torch.float64), 'grad_sq_norm': tensor(1., dtype=torch.float64)}
    """
    if loss_reduction not in ("mean", "sum"):
        raise InputError("unknown loss_reduction", got=repr(loss_reduction), fix='Write "mean" or "sum".')
    k = len(sq_norms)
    if k < 2:
        raise InputError(
            "the noise scale needs at least two parts of a batch",
            got=k,
            fix="Accumulate over two or more micro-batches "
            "(Lightning: accumulate_grad_batches=2), or use batches of two or more examples.",
        )
    if bool((sizes < 1).any()):
        raise InputError("every part must hold an example", got=sizes.tolist(), fix="Drop empty parts.")
    b = sizes.double()
    if loss_reduction == "mean":
        w = torch.full_like(b, 1.0 / k)
        whole = batch_sq_norm.double()
    else:
        w = b / b.sum()
        whole = batch_sq_norm.double() / b.sum().square()
    parts = (sq_norms.double() / (w if loss_reduction == "mean" else b).square() * w).sum()
    single, batch = (w / b).sum(), (w.square() / b).sum()
    trace = (parts - whole) / (single - batch)
    return {"trace": trace, "grad_sq_norm": whole - trace * batch}


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
    check_inputs(model, x)
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
                got=[
                    list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves
                ],
                fix="Wrap the model so that it returns such a tensor.",
            )
        return torch.cat([leaf.reshape(count, -1) for leaf in moved], 1)

    norms = []
    with measuring(model):
        x, y = outside_inference(x), outside_inference(y)
        tape = LayerTape(model, function, x)
        if tape.unsupported:
            name, reason = next(iter(tape.unsupported.items()))
            raise UnsupportedError(
                f"per-example gradients miss {len(tape.unsupported)} of the parameters, first {name!r}: "
                f"{reason}",
                fix="Mend that, or freeze those parameters.",
            )
        for begin in range(0, examples(x), chunk_size or examples(x)):
            part = slice(begin, begin + (chunk_size or examples(x)))
            recording = tape.record(take(x, part), first=begin == 0)
            rows = _loss_cotangents(loss_fn, leaves, spec, take(y, part), len(recording.output))
            squares = rows.new_zeros(len(rows), dtype=accumulation_dtype(rows.device))
            for side in recording.sides(rows[None]).values():
                whole = side.uses[0] if len(side.uses) == 1 else Plain(side.dense())
                squares += whole.sq_norms()[0]
            norms.append(squares.sqrt())
    return torch.cat(norms)


def _loss_cotangents(
    loss_fn: Callable[[Any, Any], Tensor], leaves: list[Any], spec: Any, y: Any, count: int
) -> Tensor:
    """Derivative of each example's own loss with respect to its outputs, ``[N, S]``."""
    rows = []
    for n in range(count):
        own = [
            leaf.detach()[n : n + 1].requires_grad_(leaf.requires_grad)
            if isinstance(leaf, Tensor) and leaf.ndim
            else leaf
            for leaf in leaves
        ]
        loss = loss_fn(pytree.tree_unflatten(own, spec), take(y, slice(n, n + 1)))
        if loss.numel() != 1:
            raise InputError(
                "loss_fn must return one number",
                got=f"shape {list(loss.shape)}",
                fix='Write loss_fn=nn.CrossEntropyLoss(), or any other with reduction="mean".',
            )
        moved = [leaf for leaf in own if isinstance(leaf, Tensor) and leaf.requires_grad]
        grads = torch.autograd.grad(loss.sum(), moved, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    return torch.stack(rows)


def sgd_noise_scale(
    lr: float,
    dataset_size: int,
    batch_size: int,
    momentum: float = 0.0,
    *,
    replacement: bool = True,
) -> float:
    r"""SGD's noise scale, the temperature of its stationary distribution for the summed loss.

    .. math:: g = \frac{\epsilon N}{2B(1-\mu)} \qquad\text{or, without replacement,}\qquad
              g = \frac{\epsilon}{2(1-\mu)}\,\frac{N-B}{B}\,\frac{N}{N-1}

    Args:
        lr: Learning rate for the mean loss.
        dataset_size: Examples in the training set, N.
        batch_size: Examples per step, B.
        momentum: Heavy-ball coefficient.
        replacement: Whether batches are drawn with replacement.

    Returns:
        The noise scale, in the convention ``E[dxi dxi^T] = 2 g F dt``; twice this in the papers that
        write ``g F dt``.

    Shapes:
        Plain numbers.

    Units:
        parameter^2 / loss * samples.

    Raises:
        InputError: Sizes below 1, a batch larger than the data set, or momentum outside [0, 1).

    Source:
        Smith & Le 2017, arXiv:1710.06451; momentum from Smith et al. 2017,
        arXiv:1711.00489.

    Example:
        >>> sgd_noise_scale(0.1, dataset_size=1000, batch_size=10)
        5.0
    """
    if dataset_size < 1 or batch_size < 1 or batch_size > dataset_size:
        raise InputError(
            "the batch must hold between 1 and dataset_size examples",
            got=f"batch_size={batch_size}, dataset_size={dataset_size}",
            fix="Pass the number of examples in the training set as dataset_size=.",
        )
    if not 0.0 <= momentum < 1.0:
        raise InputError("momentum must lie in [0, 1)", got=momentum, fix="Write momentum=0.9.")
    if replacement:
        ratio = dataset_size / batch_size
    elif dataset_size == 1:
        ratio = 0.0
    else:
        ratio = (dataset_size - batch_size) / batch_size * dataset_size / (dataset_size - 1)
    return lr * ratio / (2.0 * (1.0 - momentum))


@dataclass(frozen=True, kw_only=True)
class GradientNoiseScale(Observable):
    """B_simple from the best source the run offers, and SGD's own noise scale beside it.

    The source is the micro-batches of gradient accumulation or, without them, the single examples seen
    by riding along with the forward and backward pass. Its name, the loss reduction and the share of
    parameters covered are part of every reading. Weight decay inside the optimizer is not part of the
    gradient measured here.

    Args:
        schedule: When it is sampled and recorded; every 50 steps by default.
        sampling: When it is sampled in between.
        estimator: Average over steps; the last 1,000 steps by default.

    Units:
        See ``quantities``.

    Source:
        arXiv:1812.06162, arXiv:1710.06451.

    Shapes:
        Scalars.

    Example:
        >>> GradientNoiseScale(schedule=20, estimator=Window(500)).group
        'noise'
    """

    group: ClassVar[str] = "noise"
    needs: ClassVar[frozenset[str]] = frozenset({"chunks"})
    default_estimator: ClassVar[type[Estimator]] = Window
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "scale": Quantity("samples", "B_simple, the batch at which noise and signal balance."),
        "trace": Quantity("loss^2/parameter^2 samples", "Trace of the per-example covariance."),
        "grad_sq_norm": Quantity("loss^2/parameter^2", "Squared norm of the true gradient."),
        "critical_batch_fraction": Quantity("1", "B / (B + B_simple), near 1 for wasteful batches."),
        "sgd_scale": Quantity("parameter^2/loss samples", "SGD's g = eps N / 2B with momentum."),
        "temperature": Quantity("loss", "Temperature of SGD's noise per parameter, mean loss."),
    }

    schedule: Schedule | int = 50

    def statistics(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """Both estimators of this step, and the settings they go with."""
        chunks = snapshot.chunks
        if len(chunks.sq_norms) < 2:
            raise SampleSkippedError(
                "the noise scale needs at least two parts of a batch",
                got=len(chunks.sq_norms),
                fix="This step is left out; use batches of two or more examples, or accumulate.",
            )
        parts = gradient_noise_scale(
            chunks.sq_norms,
            chunks.sizes,
            chunks.batch_sq_norm,
            loss_reduction=snapshot.loss_reduction,
        )
        scalars = {"batch_size": float(snapshot.batch_size), "parameters": float(chunks.parameters)}
        first = snapshot.groups[0]
        alike = {(group.lr, group.momentum) for group in snapshot.groups} == {(first.lr, first.momentum)}
        if alike and all(group.is_sgd for group in snapshot.groups):
            # a summed loss makes every gradient, and so every step, B times that of the mean loss
            lr = first.lr * (snapshot.batch_size if snapshot.loss_reduction == "sum" else 1)
            scalars["lr_over_damping"] = lr / (1.0 - first.momentum)
            if snapshot.has("dataset_size"):
                size = min(snapshot.batch_size, snapshot.dataset_size)
                scalars["sgd_scale"] = sgd_noise_scale(
                    lr, snapshot.dataset_size, size, first.momentum, replacement=False
                )
        numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}
        return {**parts, **numbers}

    def note(self, snapshot: Snapshot) -> str:
        """Source, reduction and coverage."""
        chunks = snapshot.chunks
        text = (
            f"{chunks.source}, loss_reduction={snapshot.loss_reduction}, "
            f"over {100 * chunks.coverage:.0f} % of parameters"
        )
        if chunks.skipped:
            names = sorted(chunks.skipped)
            text += f"; skipped: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        return text

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Ratios of the averages; ``nan`` where the squared gradient is not above zero."""
        del reference
        trace, signal, batch = now["trace"], now["grad_sq_norm"], now["batch_size"]
        scale = torch.where((signal > 0) & (trace > 0), trace / signal, torch.nan)
        readings: dict[str, Tensor | Estimate] = {
            "scale": scale,
            "trace": trace,
            "grad_sq_norm": signal,
            "critical_batch_fraction": batch / (batch + scale),
        }
        if "sgd_scale" in now:
            readings["sgd_scale"] = Estimate(now["sgd_scale"], 0.0)
        if "lr_over_damping" in now:
            per_parameter = trace / now["parameters"]
            readings["temperature"] = now["lr_over_damping"] * per_parameter / (2 * batch)
        return readings
