"""The empirical neural tangent kernel on a fixed probe, and how far it has moved.

``Theta[a, b] = sum_p (df(x_a)/dp) (df(x_b)/dp)``. A kernel that stays put means lazy training; one that
turns towards the targets means features are being learned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from ..autodiff.factors import Mode
from ..autodiff.functional import (
    Forward,
    call,
    check_inputs,
    check_outputs,
    examples,
    measuring,
    outside_inference,
)
from ..autodiff.ntk import KernelRequest, tangent_kernel
from ..autodiff.tape import LayerTape
from ..collect.snapshot import Probe, Snapshot
from ..errors import InputError, UnsupportedError
from ..record.readings import Quantity, Reading
from ..stats.estimators import Reference
from ..stats.jackknife import delete_block_jackknife
from ..stats.linalg import random_orthonormal_rows
from .base import Estimate, Numbers, Observable
from .schedules import Schedule, every, log_spaced

__all__ = [
    "NeuralTangentKernel",
    "empirical_ntk",
    "kernel_alignment",
    "kernel_angle",
    "kernel_distance",
    "projection_stderr",
    "relative_drift",
]

_MODES = ("trace", "full", "diagonal")
_EXACT_OUTPUTS = 16
_PROJECTIONS = 8
_REPLICATES = 64
"""Kernels held at a time in the jackknife over examples."""


@overload
def empirical_ntk(
    model: nn.Module,
    x: Any,
    x2: Any = ...,
    *,
    outputs: Mode = ...,
    layers: Literal[False] = ...,
    weights: Mapping[str, float | Tensor] | None = ...,
    num_projections: int | None = ...,
    sketch_size: int | None = ...,
    generator: torch.Generator | None = ...,
    forward: Forward | None = ...,
    chunk_size: int | None = ...,
    max_memory: int | None = ...,
    on_unsupported: Literal["raise", "skip"] = ...,
) -> Tensor: ...


@overload
def empirical_ntk(
    model: nn.Module,
    x: Any,
    x2: Any = ...,
    *,
    outputs: Mode = ...,
    layers: Literal[True],
    weights: Mapping[str, float | Tensor] | None = ...,
    num_projections: int | None = ...,
    sketch_size: int | None = ...,
    generator: torch.Generator | None = ...,
    forward: Forward | None = ...,
    chunk_size: int | None = ...,
    max_memory: int | None = ...,
    on_unsupported: Literal["raise", "skip"] = ...,
) -> dict[str, Tensor]: ...


def empirical_ntk(
    model: nn.Module,
    x: Any,
    x2: Any = None,
    *,
    outputs: Mode = "trace",
    layers: bool = False,
    weights: Mapping[str, float | Tensor] | None = None,
    num_projections: int | None = None,
    sketch_size: int | None = None,
    generator: torch.Generator | None = None,
    forward: Forward | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    on_unsupported: Literal["raise", "skip"] = "raise",
) -> Tensor | dict[str, Tensor]:
    r"""Empirical neural tangent kernel of the trainable parameters, in evaluation mode.

    .. math:: \Theta_{ao,bo'} = \sum_p w_p\,\frac{\partial f_o(x_a)}{\partial\theta_p}
              \frac{\partial f_{o'}(x'_b)}{\partial\theta_p},
              \qquad \text{trace kernel } \frac1O \sum_o \Theta_{ao,bo}

    One forward pass and one backward pass per output, and for each layer a product of its inputs and of
    the cotangents of its outputs: no Jacobian is stored. Products are taken in the precision of each
    parameter (at least float32) and added over layers in float64. Batch norm uses its running statistics
    and dropout is off: the kernel is that of the network as evaluated. A parameter that is used in
    several places counts once, with the sum of its gradients.

    Args:
        model: Any module that treats the examples of a batch one by one.
        x: Inputs: a tensor, or a nest of tensors with the examples first.
        x2: Second set of inputs; ``x`` itself when ``None``.
        outputs: ``"trace"`` averages over the outputs, ``"diagonal"`` keeps each output's own kernel,
            ``"full"`` keeps every pair.
        layers: Return one kernel per module that owns parameters, by the module's path (``""`` for the
            model itself). They add up to the total. A tied parameter belongs to its first owner.
        weights: What each parameter's squared derivative counts, by name: a number or a tensor of the
            parameter's shape; 1 for names that are missing. With learning rates relative to one of them,
            for Adam times ``1/(sqrt(v) + eps)``, this is the kernel that moves the outputs.
        num_projections: Replace the O outputs by this many random orthonormal combinations: an unbiased
            estimate of the trace kernel. With ``outputs="diagonal"`` one such estimate per projection,
            whose scatter gives its error (see :func:`projection_stderr`). Exact when ``None``.
        sketch_size: Multiply the gradients with this many random Gaussian features: an unbiased estimate
            with variance ``(Theta_aa Theta_bb + Theta_ab^2) / sketch_size``. With ``layers=True`` each
            layer has features of its own. Exact when ``None``.
        generator: CPU generator of projections and features; a fixed seed when ``None``, so that kernels
            of one network at two times can be compared.
        forward: Maps ``(model, x)`` to outputs ``[N, O]``; ``model(x)`` when ``None``.
        chunk_size: Examples at a time; chosen from ``max_memory`` when ``None``.
        max_memory: Bytes that may be taken, by estimate; a quarter of what is free when ``None``.
        on_unsupported: ``"skip"`` returns, with a warning, the kernel over the parameters that can be
            reached when some cannot.

    Returns:
        The kernel in float64 (float32 on devices without it), or a dictionary of them.

    Shapes:
        x ``[N, ...]``, x2 ``[M, ...]`` -> trace ``[N, M]``, diagonal ``[N, M, O]``, full ``[N, M, O, O]``.

    Units:
        outputs^2 / parameters^2.

    Raises:
        InputError: No trainable parameter or a complex one, an empty, non-finite or misplaced batch, x2
            unlike x, an unknown mode, outputs that are not ``[N, O]``, weights that do not fit,
            projections asked for ``outputs="full"``, or too little ``max_memory``.
        UnsupportedError: If a parameter cannot be reached, or examples are coupled, with the module's path.

    Source:
        Jacot et al. 2018, arXiv:1806.07572; structured derivatives as in Novak et al. 2022,
        arXiv:2206.08720.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
        >>> empirical_ntk(nn.Linear(2, 1, bias=False, dtype=torch.float64), x)   # = x x^T
        tensor([[1., 1.],
                [1., 5.]], dtype=torch.float64)
    """
    switched = {
        type(module).__name__
        for module in model.modules()
        if module.training and isinstance(module, (_BatchNorm, _DropoutNd)) and getattr(module, "p", 1) > 0
    }
    if switched:
        warnings.warn(
            f"the model is in train mode, and its {', '.join(sorted(switched))} behave otherwise there: the "
            "kernel is that of evaluation mode. Call model.eval() before to say that this is meant.",
            stacklevel=2,
        )
    kernels, _ = _kernel(
        model,
        x,
        x2,
        outputs=outputs,
        layers=layers,
        weights=weights,
        num_projections=num_projections,
        sketch_size=sketch_size,
        generator=generator,
        forward=forward,
        chunk_size=chunk_size,
        max_memory=max_memory,
        on_unsupported=on_unsupported,
    )
    return kernels if layers else kernels[""]


def _kernel(
    model: nn.Module,
    x: Any,
    x2: Any = None,
    *,
    outputs: Mode,
    layers: bool = False,
    weights: Mapping[str, float | Tensor] | None = None,
    num_projections: int | None = None,
    sketch_size: int | None = None,
    generator: torch.Generator | None = None,
    forward: Forward | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    on_unsupported: str = "raise",
    project_above: int | None = None,
) -> tuple[dict[str, Tensor], int]:
    """The kernels and the number of outputs; above ``project_above`` one estimate per projection."""
    _check_request(outputs, num_projections, sketch_size, chunk_size, max_memory, on_unsupported)
    check_inputs(model, x)
    if x2 is not None:
        check_inputs(model, x2)
        _check_alike(x, x2)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)

    widths: set[int] = set()

    def function(batch: Any) -> Tensor:
        out = (forward or call)(model, batch)
        check_outputs(out, examples(batch))
        widths.add(out.shape[1])
        if len(widths) > 1:
            raise InputError(
                "the number of outputs must be the same for all examples",
                got=f"{min(widths)} and {max(widths)} outputs",
                fix="Pass forward= that selects the same outputs for all.",
            )
        return out

    with measuring(model):
        x, x2 = outside_inference(x), outside_inference(x2)
        tape = LayerTape(model, function, x)
        names = _reached(tape, on_unsupported)
        width = tape.shape[1]
        scale = 1.0
        if project_above is not None and num_projections is None and width > project_above:
            num_projections = _PROJECTIONS
        if project_above is not None and num_projections is not None and num_projections > 1:
            outputs = "diagonal"
        rows = torch.eye(width, dtype=tape.dtype, device=tape.device)
        if num_projections is not None:
            drawn = random_orthonormal_rows(num_projections, width, generator=generator)[0]
            rows = drawn.to(rows)
            scale = width / num_projections
        request = KernelRequest(
            mode=outputs,
            rows=rows,
            names=names,
            layers=layers,
            weights=checked_weights(weights, tape.parameters),
            sketch_size=sketch_size,
            generator=generator,
            chunk_size=chunk_size,
            max_memory=max_memory,
        )
        kernels = tangent_kernel(tape, x, x2, request)
    if outputs == "trace":
        kernels = {path: kernel * (scale / width) for path, kernel in kernels.items()}
    return kernels, width


def _check_request(
    outputs: str,
    num_projections: int | None,
    sketch_size: int | None,
    chunk_size: int | None,
    max_memory: int | None,
    on_unsupported: str,
) -> None:
    if outputs not in _MODES:
        raise InputError("unknown output mode", got=repr(outputs), fix=f"Write one of {_MODES}.")
    if num_projections is not None and outputs == "full":
        raise InputError(
            "random output projections estimate the trace kernel only",
            got=f"outputs={outputs!r}",
            fix='Write outputs="trace", or num_projections=None.',
        )
    if on_unsupported not in ("raise", "skip"):
        raise InputError("unknown on_unsupported", got=repr(on_unsupported), fix='Write "raise" or "skip".')
    sizes = {"sketch_size": sketch_size, "chunk_size": chunk_size, "max_memory": max_memory}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise InputError(
                f"{name} must be at least 1", got=size, fix=f"Write {name}=None for the default."
            )


def _check_alike(x: Any, x2: Any) -> None:
    """Two batches of one kind: the same nest, and the same shapes behind the examples."""
    left, first = pytree.tree_flatten(x)
    right, second = pytree.tree_flatten(x2)
    shapes = [
        [list(leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf for leaf in side]
        for side in (left, right)
    ]
    if first != second or shapes[0] != shapes[1]:
        raise InputError(
            "x and x2 must have the same shape behind the examples",
            got=f"{shapes[0]} and {shapes[1]}",
            fix="Pass inputs of one kind; pad sequences to one length.",
        )


def _reached(tape: LayerTape, on_unsupported: str) -> list[str]:
    """Names of the parameters that count."""
    names = [name for name in tape.parameters if name not in tape.unsupported]
    if tape.unsupported:
        name, reason = next(iter(tape.unsupported.items()))
        if on_unsupported == "raise" or not names:
            raise UnsupportedError(
                f"the kernel misses {len(tape.unsupported)} of the parameters, first {name!r} of module "
                f"{tape.owners[name]!r}: {reason}",
                fix='Mend that, or write on_unsupported="skip" for the kernel over the others.',
            )
        warnings.warn(
            f"the kernel leaves out {', '.join(map(repr, tape.unsupported))}: {reason}", stacklevel=4
        )
    return names


def checked_weights(
    weights: Mapping[str, float | Tensor] | None, parameters: Mapping[str, Tensor]
) -> dict[str, float | Tensor]:
    """Weights of parameters by name, refused where they do not fit."""
    for name, weight in (weights or {}).items():
        if name not in parameters:
            raise InputError(
                "weights name a parameter that is not trained",
                got=repr(name),
                fix=f"Use names of model.named_parameters(), such as {next(iter(parameters))!r}.",
            )
        values = torch.as_tensor(weight)
        if values.ndim and values.shape != parameters[name].shape:
            raise InputError(
                f"the weight of {name!r} must be a number or have its shape {list(parameters[name].shape)}",
                got=list(values.shape),
                fix="Pass one weight per entry of the parameter.",
            )
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise InputError(
                f"the weight of {name!r} must be finite and not negative",
                got=f"values from {float(values.min()):.3g} to {float(values.max()):.3g}",
                fix="Pass squared factors, such as learning rates.",
            )
    return {
        name: weight.detach() if isinstance(weight, Tensor) and weight.ndim else float(weight)
        for name, weight in (weights or {}).items()
    }


def projection_stderr(estimates: Tensor, width: int) -> Tensor:
    r"""Standard error of the mean over random orthonormal output projections.

    .. math:: \mathrm{se}^2 = \frac{s^2}{k}\Bigl(1 - \frac kO\Bigr)

    with the sample variance :math:`s^2`: exchangeable projections whose mean is exact at ``k = O`` are
    drawn without replacement in this sense.

    Args:
        estimates: One estimate per projection, along the last axis, at least two.
        width: Number of outputs O.

    Returns:
        The standard error.

    Shapes:
        ``[..., k]`` -> ``[...]``.

    Units:
        Those of the estimates.

    Raises:
        InputError: If there are fewer than two estimates.

    Source:
        The finite population correction (Cochran 1977, Sampling Techniques), for projections as those of
        arXiv:1908.02729.

    Example:
        >>> projection_stderr(torch.tensor([1.0, 3.0]), width=4)
        tensor(0.7071)
    """
    k = estimates.shape[-1]
    if k < 2:
        raise InputError("an error needs at least two projections", got=k, fix="Write num_projections=8.")
    return (estimates.var(-1) / k * (1 - k / width)).sqrt()


def kernel_distance(k1: Tensor, k2: Tensor) -> Tensor:
    r"""One minus the cosine between two kernels: 0 when they differ by a factor only.

    .. math:: S = 1 - \frac{\langle K_1, K_2\rangle_F}{|K_1|_F\,|K_2|_F}

    Computed as half the squared distance of the normalised kernels, which keeps its digits when the
    kernels are close.

    Args:
        k1: A kernel.
        k2: Another one of the same shape.

    Returns:
        A scalar in [0, 1] for positive kernels.

    Shapes:
        Any, twice the same -> scalar.

    Units:
        None.

    Raises:
        InputError: If the shapes differ.

    Source:
        Fort et al. 2020, arXiv:2010.15110.

    Example:
        >>> kernel_distance(torch.eye(2), 4 * torch.eye(2))
        tensor(0.)
    """
    _check_pair(k1, k2)
    return (k1 / k1.norm() - k2 / k2.norm()).square().sum() / 2


def kernel_angle(k1: Tensor, k2: Tensor) -> Tensor:
    r"""Angle between two kernels, accurate for small angles.

    .. math:: \alpha = \arccos(1 - S) = 2\arcsin\sqrt{S/2}

    Divided by the steps in between it is the angular velocity, which does not depend on the cadence for
    motion at constant speed (the distance itself grows with the square of the time).

    Args:
        k1: A kernel.
        k2: Another one of the same shape.

    Returns:
        A scalar.

    Shapes:
        Any, twice the same -> scalar.

    Units:
        Radians.

    Raises:
        InputError: If the shapes differ.

    Source:
        The distance of Fort et al. 2020, arXiv:2010.15110, turned into an angle.

    Example:
        >>> kernel_angle(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0])))
        tensor(1.5708)
    """
    return 2 * torch.asin((kernel_distance(k1, k2) / 2).sqrt().clamp(max=1.0))


def relative_drift(k: Tensor, k0: Tensor) -> Tensor:
    r"""How far a kernel has moved, relative to where it began: sees scale and direction.

    .. math:: D = |K - K_0|_F / |K_0|_F

    Args:
        k: The kernel now.
        k0: The kernel at the beginning.

    Returns:
        A scalar.

    Shapes:
        Any, twice the same -> scalar.

    Units:
        None.

    Raises:
        InputError: If the shapes differ.

    Source:
        Lee et al. 2019, arXiv:1902.06720.

    Example:
        >>> relative_drift(2 * torch.eye(2), torch.eye(2))
        tensor(1.)
    """
    _check_pair(k, k0)
    return (k - k0).norm() / k0.norm()


def kernel_alignment(k: Tensor, y: Tensor) -> Tensor:
    r"""Centred alignment of a kernel over examples with the targets.

    .. math:: A = \frac{\langle HKH, HYY^\top H\rangle_F}{|HKH|_F\,|HYY^\top H|_F},
              \qquad H = 1 - \tfrac1N 11^\top

    Args:
        k: Kernel over examples.
        y: Targets: class indices (whole numbers) or vectors.

    Returns:
        A scalar in [-1, 1].

    Shapes:
        k ``[N, N]``, y ``[N]`` or ``[N, C]`` -> scalar.

    Units:
        None.

    Raises:
        InputError: If the shapes do not fit.

    Source:
        Cortes, Mohri, Rostamizadeh 2012, JMLR 13:795-828.

    Example:
        >>> y = torch.tensor([0, 0, 1, 1])
        >>> round(kernel_alignment(target_kernel(y), y).item(), 6)
        1.0
    """
    targets = target_kernel(y)
    if k.ndim != 2 or k.shape != targets.shape:
        raise InputError(
            "alignment needs a kernel [N, N] and N targets",
            got=f"a kernel {list(k.shape)} and targets {list(y.shape)}",
            fix='Use the trace kernel, empirical_ntk(model, x, outputs="trace").',
        )
    return _cosine(_centred(k.to(targets)), _centred(targets))


def target_kernel(y: Tensor) -> Tensor:
    """``Y Y^T`` of targets; class indices count as one-hot vectors.

    Args:
        y: Targets.

    Returns:
        The kernel of the targets, float64.

    Shapes:
        y ``[N]`` or ``[N, C]`` -> ``[N, N]``.

    Example:
        >>> target_kernel(torch.tensor([3, 3, 5]))[0].tolist()
        [1.0, 1.0, 0.0]
    """
    if not y.is_floating_point():
        flat = y.reshape(len(y), -1)
        return (flat[:, None] == flat[None, :]).all(-1).double()
    flat = y.reshape(len(y), -1).double()
    return flat @ flat.mT


def effective_rank(eigenvalues: Tensor) -> Tensor:
    r"""Participation ratio of a spectrum: how many directions share it.

    .. math:: (\sum_i \lambda_i)^2 / \sum_i \lambda_i^2

    Args:
        eigenvalues: A spectrum.

    Returns:
        A scalar between 1 and ``n``.

    Shapes:
        ``[n]`` -> scalar.

    Example:
        >>> effective_rank(torch.ones(5))
        tensor(5.)
    """
    return eigenvalues.sum().square() / eigenvalues.square().sum()


def _check_pair(k1: Tensor, k2: Tensor) -> None:
    if k1.shape != k2.shape:
        raise InputError(
            "two kernels can be compared only on one probe",
            got=f"shapes {list(k1.shape)} and {list(k2.shape)}",
            fix="Evaluate both on the same inputs with the same outputs mode.",
        )


def _centred(k: Tensor) -> Tensor:
    return k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


LAZY, FEATURES = 0.1, 0.3
"""Relative kernel drift below the first is lazy training, above the second feature learning."""


def _drift_says(reading: Reading, others: Mapping[str, Reading]) -> str:
    if reading.number < LAZY:
        return "lazy so far: the kernel is close to its first value; the network acts like a linear model."
    if reading.number > FEATURES:
        return "learning features: the kernel has changed a good part of itself."
    return "between lazy and feature learning."


@dataclass(frozen=True, kw_only=True)
class NeuralTangentKernel(Observable):
    """The kernel on the probe: drift, distance, angular velocity, alignment, spectrum.

    Errors are those of the probe: a delete-one-example jackknife, which says how much the reading would
    change on other examples of the same kind; that of ``trace`` has the error of random projections in
    it, where these are used. The spectrum depends on the number of examples and has none.

    Args:
        schedule: When it is recorded: steps 0, 1, 2, 5, 10, ... 1,000 and then every 500 by default.
        sampling: Not used: a kernel is a state function.
        estimator: Not used beyond keeping the first and the previous kernel.
        outputs: ``"trace"``, ``"diagonal"`` or ``"full"``, see :func:`empirical_ntk`.
        num_projections: Random output projections; exact up to 16 outputs and 8 beyond when ``None``.
        preconditioned: Weigh squared derivatives with the optimizer's step per unit of gradient (learning
            rates relative to the first group's, for Adam times ``1/(sqrt(v) + eps)``): the kernel that
            moves the outputs. Its group is ``preconditioned_ntk``, so that both can be recorded.
        max_memory: Bytes that may be taken, see :func:`empirical_ntk`.
        seed: Seed of the projections, the same at all steps so that drift is not masked.

    Units:
        See ``quantities``.

    Source:
        arXiv:1806.07572, arXiv:2010.15110.

    Shapes:
        The kernel is ``[N, N]`` for the trace, see :func:`empirical_ntk` for the others.

    Example:
        >>> NeuralTangentKernel(schedule=500, outputs="full").group
        'ntk'
    """

    group: ClassVar[str] = "ntk"
    level_needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    arrays: ClassVar[frozenset[str]] = frozenset({"kernel", "spectrum"})
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "drift": Quantity(
            "1",
            "Relative Frobenius distance of the kernel from the first one.",
            verdict=_drift_says,
            chart="learning features? (kernel drift)",
            formula="`‖Theta - Theta_0‖_F / ‖Theta_0‖_F`",
            cost=(
                "O backward passes of the probe (8 beyond 16 outputs), and about as much again in products"
            ),
            source="arXiv:1902.06720",
            tells="below 0.1 training is lazy; it sees scale as well as direction",
            act="lazy and not meant to be: raise the learning rate, or train a narrower or deeper network",
        ),
        "distance": Quantity(
            "1",
            "One minus the cosine with the first kernel; blind to scale.",
            chart="kernel direction",
            formula="`1 - <Theta, Theta_0> / (‖Theta‖ ‖Theta_0‖)`",
            cost="with drift",
            source="arXiv:2010.15110",
            tells=(
                "turning of the kernel, blind to its scale; quadratic in small changes, so do not "
                "compare it with drift"
            ),
            act="as drift",
        ),
        "velocity": Quantity(
            "rad/step",
            "Angle turned since the last record, per step.",
            chart="kernel velocity",
            formula="`2 asin(sqrt(S / 2)) / steps` between records",
            cost="with drift",
            source="angle of the distance of arXiv:2010.15110",
            tells="how fast the kernel turns, whatever the cadence",
            act="a velocity that has died down means the features are settled",
        ),
        "alignment": Quantity(
            "1",
            "Centred alignment with the targets.",
            chart="kernel direction",
            formula="`<H Theta H, H Y Y^T H> / (norms)`",
            cost="with drift",
            source="Cortes et al. 2012, JMLR 13:795",
            tells="how well the kernel knows the targets; absent without targets",
            act="a rise is feature learning in the right direction",
        ),
        "top_eigenvalue": Quantity(
            "output^2/parameter^2",
            "Largest eigenvalue on the probe.",
            chart="kernel spectrum",
            formula="largest eigenvalue on the probe",
            cost="with drift",
            source="arXiv:1902.06720",
            tells=(
                "with one output, full-batch gradient descent on half the mean squared error is stable "
                "for `eta < 2 N / lambda_max`, on `nn.MSELoss` for half of that"
            ),
            act='keep the learning rate below it for that loss; with several outputs use `outputs="full"`',
        ),
        "smallest_eigenvalue": Quantity(
            "output^2/parameter^2",
            "Smallest eigenvalue on the probe.",
            chart="kernel spectrum",
            formula="smallest eigenvalue on the probe",
            cost="with drift",
            source="arXiv:1902.06720",
            tells="the slowest direction of linearised training",
            act="near 0: some examples cannot be told apart",
        ),
        "trace": Quantity(
            "output^2/parameter^2",
            "Mean of the kernel's diagonal over examples.",
            chart="kernel spectrum",
            formula="mean of the diagonal",
            cost="with drift",
            source="arXiv:1806.07572",
            tells="overall size of the kernel",
            act="the largest stable rate falls as it grows",
        ),
        "effective_rank": Quantity(
            "1",
            "Number of directions that share the spectrum.",
            formula="`(sum lambda)² / sum lambda²`",
            cost="with drift",
            source="participation ratio",
            tells="how many directions share the kernel; depends on the probe size",
            act="compare runs on one probe only",
        ),
        "off_diagonal": Quantity(
            "1",
            "Share of the norm in blocks between different outputs.",
            formula="norm of the blocks between outputs / norm",
            cost="with drift",
            source="arXiv:2206.12543",
            tells='only with `outputs="full"`; near 0 at initialisation of wide networks',
            act="large: the trace kernel leaves something out",
        ),
        "kernel": Quantity(
            "output^2/parameter^2",
            "The kernel on the probe.",
            formula="the kernel, as an image",
            cost="with drift",
            source="arXiv:1806.07572",
            tells="blocks of one class brighten as features form",
        ),
        "spectrum": Quantity(
            "output^2/parameter^2",
            "Its eigenvalues in ascending order.",
            formula="its eigenvalues, as a histogram",
            cost="with drift",
            source="arXiv:1806.07572",
            tells="how uneven the directions are",
        ),
    }

    schedule: Schedule | int = log_spaced(until=1000) | every(500)
    outputs: Mode = "trace"
    num_projections: int | None = None
    preconditioned: bool = False
    max_memory: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the mode."""
        super().__post_init__()
        if self.outputs not in _MODES:
            raise InputError("unknown output mode", got=repr(self.outputs), fix=f"Write one of {_MODES}.")
        if self.preconditioned:
            object.__setattr__(self, "group", "preconditioned_ntk")
            object.__setattr__(self, "level_needs", self.level_needs | {"step_factors"})
            # it also moves with the optimizer's state, and the charts are those of the plain kernel
            plain = {n: replace(words, verdict=None, chart="") for n, words in self.quantities.items()}
            object.__setattr__(self, "quantities", plain)

    def levels(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The kernel at this step, and that of the targets where there are any."""
        probe = snapshot.probe
        found, width = _kernel(
            snapshot.model,
            probe.inputs,
            outputs=self.outputs,
            num_projections=self.num_projections,
            project_above=_EXACT_OUTPUTS if self.outputs == "trace" else None,
            weights=snapshot.step_factors if self.preconditioned else None,
            generator=torch.Generator().manual_seed(self.seed),
            forward=snapshot.forward,
            max_memory=self.max_memory,
        )
        kernel = found[""]
        levels = {"kernel": kernel}
        if self.outputs == "trace" and kernel.ndim == 3:  # one estimate per projection
            levels["kernel"] = kernel.mean(-1)
            levels["projection_error"] = projection_stderr(kernel.diagonal().mean(-1), width)
        targets = _targets(probe, len(kernel))
        if targets is not None:
            levels["targets"] = target_kernel(targets)
        return levels

    def note(self, snapshot: Snapshot) -> str:
        """Probe size and mode."""
        return f"{self.outputs} kernel, {examples(snapshot.probe.inputs)} probe examples"

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> Numbers:
        """Everything the kernel says at this step."""
        kernel, first = now["kernel"], reference.first["kernel"]
        previous = reference.previous.get("kernel")
        steps = reference.step - reference.previous_step
        over_examples = _over_examples(kernel)
        flat = _flat(kernel)
        spectrum = torch.linalg.eigvalsh(flat)
        measures: dict[str, Callable[[Tensor], Tensor]] = {
            "drift": lambda keep: relative_drift(_keep(kernel, keep), _keep(first, keep)),
            "distance": lambda keep: kernel_distance(_keep(kernel, keep), _keep(first, keep)),
            "trace": lambda keep: _keep(over_examples, keep).diagonal().mean(),
        }
        if previous is not None and steps > 0:
            measures["velocity"] = lambda keep: (
                kernel_angle(_keep(kernel, keep), _keep(previous, keep)) / steps
            )
        if "targets" in now:
            targets = now["targets"]
            measures["alignment"] = lambda keep: _cosine(
                _centred(_keep(over_examples, keep)), _centred(_keep(targets, keep))
            )
        if kernel.ndim == 4:
            measures["off_diagonal"] = lambda keep: _off_diagonal(_keep(kernel, keep))
        estimates = _leave_one_out(measures, len(kernel), kernel.device)
        if "projection_error" in now:
            trace, error = estimates["trace"][:2]
            estimates["trace"] = Estimate(trace, torch.hypot(error, now["projection_error"].to(error)))
        exact = {
            "top_eigenvalue": spectrum[-1],
            "smallest_eigenvalue": spectrum[0],
            "effective_rank": effective_rank(spectrum),
            "kernel": flat,
            "spectrum": spectrum,
        }
        return {**estimates, **exact}


def _targets(probe: Probe, count: int) -> Tensor | None:
    """The targets that belong to the outputs: of a sequence of tokens, the last position's."""
    targets, inputs = probe.targets, probe.inputs
    if targets is None or len(targets) != count:
        return None
    tokens = isinstance(inputs, Tensor) and not inputs.is_floating_point()
    return targets[:, -1] if tokens and targets.shape == inputs.shape and targets.ndim == 2 else targets


def _over_examples(kernel: Tensor) -> Tensor:
    """The kernel over examples: the mean over outputs where those are kept."""
    if kernel.ndim == 4:
        return kernel.diagonal(dim1=2, dim2=3).mean(-1)
    return kernel.mean(-1) if kernel.ndim == 3 else kernel


def _flat(kernel: Tensor) -> Tensor:
    """One square matrix: ``[N, N]``, or ``[N O, N O]`` for the full kernel."""
    if kernel.ndim == 4:
        n, m, o, _ = kernel.shape
        return kernel.permute(0, 2, 1, 3).reshape(n * o, m * o)
    return _over_examples(kernel)


def _off_diagonal(kernel: Tensor) -> Tensor:
    """Norm of the blocks between different outputs over that of all, ``[N, N, O, O]``."""
    own = kernel.diagonal(dim1=2, dim2=3)
    return (1 - own.square().sum() / kernel.square().sum()).clamp(min=0).sqrt()


def _keep(kernel: Tensor, keep: Tensor) -> Tensor:
    return kernel[keep][:, keep]


def _leave_one_out(
    measures: Mapping[str, Callable[[Tensor], Tensor]], count: int, device: torch.device
) -> dict[str, Estimate]:
    """Each measure with its delete-one-example jackknife error."""
    everyone = torch.arange(count, device=device)

    def row(keep: Tensor) -> Tensor:
        return torch.stack([measure(keep) for measure in measures.values()])

    full = row(everyone)
    others = everyone.expand(count, count)[~torch.eye(count, dtype=torch.bool, device=device)].view(
        count, count - 1
    )
    rows = vmap(row, chunk_size=_REPLICATES)(others)
    errors = delete_block_jackknife(full, rows, torch.ones(count, dtype=full.dtype, device=device))
    return {name: Estimate(full[i], errors[i]) for i, name in enumerate(measures)}
