"""The empirical neural tangent kernel of a module on a batch.

``Theta[a, b] = sum_p (df(x_a)/dp) (df(x_b)/dp)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError, UnsupportedError, check_choice, check_kind, check_number, shown
from ..stats.linalg import random_orthonormal_rows
from .factors import Mode
from .functional import (
    Batch,
    Forward,
    call,
    check_inputs,
    check_model,
    check_outputs,
    check_result,
    examples,
    outside_inference,
    warn_of_train_mode,
)
from .ntk import KernelRequest, tangent_kernel
from .tape import LayerTape
from .untouched import measuring

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "EXACT_OUTPUTS",
    "MODES",
    "checked_weights",
    "empirical_ntk",
    "layer_ntks",
    "probed_kernel",
]


MODES = ("trace", "full", "diagonal")


EXACT_OUTPUTS = 16


_PROJECTIONS = 8


_MOST_FEATURES = 10**6
"""Random features at most; so many hold more numbers than the gradients that they stand for."""


class KernelOptions(TypedDict, total=False):
    """How a kernel is taken; :func:`empirical_ntk` says what each means."""

    outputs: Mode
    weights: Mapping[str, float | Tensor] | None
    num_projections: int | None
    sketch_size: int | None
    generator: torch.Generator | None
    forward: Forward | None
    chunk_size: int | None
    max_memory: int | None
    on_unsupported: Literal["raise", "skip"]


def empirical_ntk(
    model: nn.Module,
    x: Any,
    x2: Any = None,
    *,
    outputs: Mode = "trace",
    layers: Literal[False] = False,
    weights: Mapping[str, float | Tensor] | None = None,
    num_projections: int | None = None,
    sketch_size: int | None = None,
    generator: torch.Generator | None = None,
    forward: Forward | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    on_unsupported: Literal["raise", "skip"] = "raise",
) -> Tensor:
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
        layers: Deprecated; call :func:`layer_ntks`.
        weights: What each parameter's squared derivative counts, by name: a number or a tensor of the
            parameter's shape; 1 for names that are missing. With learning rates relative to one of them,
            for Adam times ``1/(sqrt(v) + eps)``, this is the kernel that moves the outputs.
        num_projections: Replace the O outputs by this many random orthonormal combinations: an unbiased
            estimate of the trace kernel. With ``outputs="diagonal"`` one such estimate per projection,
            whose scatter gives its error (see :func:`projection_stderr`). Exact when ``None``.
        sketch_size: Multiply the gradients with this many random Gaussian features: an unbiased estimate
            with variance ``(Theta_aa Theta_bb + Theta_ab^2) / sketch_size``. Exact when ``None``.
        generator: CPU generator of projections and features; a fixed seed when ``None``, so that kernels
            of one network at two times can be compared.
        forward: Maps ``(model, x)`` to outputs ``[N, O]``; ``model(x)`` when ``None``.
        chunk_size: Examples at a time; chosen from ``max_memory`` when ``None``.
        max_memory: Bytes that may be taken, by estimate; a quarter of what is free when ``None``.
        on_unsupported: ``"skip"`` returns, with a warning, the kernel over the parameters that can be
            reached when some cannot.

    Returns:
        The kernel in float64 (float32 on devices without it).

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
    options = KernelOptions(
        outputs=outputs,
        weights=weights,
        num_projections=num_projections,
        sketch_size=sketch_size,
        generator=generator,
        forward=forward,
        chunk_size=chunk_size,
        max_memory=max_memory,
        on_unsupported=on_unsupported,
    )
    if layers:
        warnings.warn(  # type: ignore[unreachable]
            "empirical_ntk(layers=True) is deprecated: write layer_ntks", DeprecationWarning, stacklevel=2
        )
        return layer_ntks(model, x, x2, **options)
    check_model(model, forward=forward, generator=generator)
    warn_of_train_mode(model, "the kernel")
    kernel = probed_kernel(model, x, x2, **options)[0][""]
    check_result("the kernel", kernel)
    return kernel


def layer_ntks(
    model: nn.Module, x: Any, x2: Any = None, **options: Unpack[KernelOptions]
) -> dict[str, Tensor]:
    """The share of each layer in the empirical neural tangent kernel.

    Args:
        model: As :func:`empirical_ntk` takes it.
        x: Inputs.
        x2: Second set of inputs; ``x`` itself when ``None``.
        **options: Those of :func:`empirical_ntk`. With ``sketch_size`` each layer has features of its own.

    Returns:
        One kernel per module that owns parameters, by the module's path (``""`` for the model itself). They
        add up to the total. A tied parameter belongs to its first owner.

    Shapes:
        Each as that of :func:`empirical_ntk`.

    Units:
        outputs^2 / parameters^2.

    Raises:
        InputError: As :func:`empirical_ntk`.
        UnsupportedError: As :func:`empirical_ntk`.

    Source:
        Jacot et al. 2018, arXiv:1806.07572: the kernel is a sum over parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)).double()
        >>> x = torch.ones(3, 2, dtype=torch.float64)
        >>> layers = layer_ntks(net, x)
        >>> sorted(layers), torch.allclose(sum(layers.values()), empirical_ntk(net, x))
        (['0', '1'], True)
    """
    check_model(model, forward=options.get("forward"), generator=options.get("generator"))
    warn_of_train_mode(model, "the kernel")
    kernels = probed_kernel(model, x, x2, layers=True, **options)[0]
    check_result("the kernel", torch.stack([*kernels.values()]))
    return kernels


def probed_kernel(
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
    with measuring(model):
        first = Batch.of(outside_inference(x))
        second = None if x2 is None else Batch.of(outside_inference(x2))
        tape = LayerTape(model, _outputs_of_one_width(model, forward or call), first)
        width = tape.shape[1]
        if project_above is not None and num_projections is None and width > project_above:
            num_projections = _PROJECTIONS
        if project_above is not None and num_projections is not None and num_projections > 1:
            outputs = "diagonal"
        request = KernelRequest(
            mode=outputs,
            rows=_rows(tape, num_projections, generator),
            names=_reached(tape, on_unsupported),
            layers=layers,
            weights=checked_weights(weights, tape.parameters),
            sketch_size=sketch_size,
            generator=generator,
            chunk_size=chunk_size,
            max_memory=max_memory,
        )
        kernels = tangent_kernel(tape, first, second, request)
    if outputs == "trace":
        scale = 1.0 if num_projections is None else width / num_projections
        kernels = {path: kernel * (scale / width) for path, kernel in kernels.items()}
    return kernels, width


def _outputs_of_one_width(model: nn.Module, forward: Forward) -> Callable[[Any], Tensor]:
    """The forward as a function of the inputs, refused where its outputs are not ``[N, O]`` with one O."""
    widths: set[int] = set()

    def function(batch: Any) -> Tensor:
        out = forward(model, batch)
        check_outputs(out, examples(batch))
        widths.add(out.shape[1])
        if len(widths) > 1:
            raise InputError(
                "the number of outputs must be the same for all examples",
                got=f"{min(widths)} and {max(widths)} outputs",
                fix="Pass forward= that selects the same outputs for all.",
            )
        return out

    return function


def _rows(tape: LayerTape, num_projections: int | None, generator: torch.Generator) -> Tensor:
    """The combinations of outputs that are differentiated, ``[K, O]``: each output, or random ones."""
    rows = torch.eye(tape.shape[1], dtype=tape.dtype, device=tape.device)
    if num_projections is None:
        return rows
    return random_orthonormal_rows(num_projections, tape.shape[1], generator=generator)[0].to(rows)


def _check_request(
    outputs: str,
    num_projections: int | None,
    sketch_size: int | None,
    chunk_size: int | None,
    max_memory: int | None,
    on_unsupported: str,
) -> None:
    check_choice("outputs", outputs, MODES)
    if num_projections is not None and outputs == "full":
        raise InputError(
            "random output projections estimate the trace kernel only",
            got=f"outputs={outputs!r}",
            fix='Write outputs="trace", or num_projections=None.',
        )
    check_choice("on_unsupported", on_unsupported, ("raise", "skip"))
    check_number("num_projections", num_projections, integer=True, optional=True, example="None")
    for name, size in {"chunk_size": chunk_size, "max_memory": max_memory}.items():
        check_number(name, size, least=1, integer=True, optional=True, example="None")
    check_number(
        "sketch_size", sketch_size, least=1, below=_MOST_FEATURES, integer=True, optional=True, example="None"
    )


def _check_alike(x: Any, x2: Any) -> None:
    """Two batches of one kind: the same nest, and the same shapes behind the examples."""
    left, first = pytree.tree_flatten(x)
    right, second = pytree.tree_flatten(x2)
    shapes = [
        [list(leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf for leaf in side]
        for side in (left, right)
    ]
    layouts = [[leaf.layout for leaf in side if isinstance(leaf, Tensor)] for side in (left, right)]
    if layouts[0] != layouts[1]:
        raise InputError(
            "x and x2 must both be dense, or both sparse",
            got=f"{layouts[0]} and {layouts[1]}",
            fix="Write x2.to_dense().",
        )
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
    check_kind("weights", weights, (Mapping, type(None)), '{"0.weight": 0.1}')
    for name, weight in (weights or {}).items():
        if name not in parameters:
            raise InputError(
                "weights name a parameter that is not trained",
                got=repr(name),
                fix=f"Use names of model.named_parameters(), such as {next(iter(parameters))!r}.",
            )
        if not isinstance(weight, (Tensor, int, float)) or isinstance(weight, bool):
            fix = "Pass a learning rate."
            raise InputError(
                f"the weight of {name!r} must be a number or a tensor", got=shown(weight), fix=fix
            )
        values = torch.as_tensor(weight)
        if values.is_complex() or values.is_meta or values.dtype == torch.bool:
            got = "a tensor on the device meta" if values.is_meta else values.dtype
            raise InputError(f"the weight of {name!r} must be real", got=got, fix="Pass learning rates.")
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
