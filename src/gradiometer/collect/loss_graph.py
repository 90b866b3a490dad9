"""The loss, read off the autograd graph of the tensor that is differentiated.

Root, then constant factors, then one loss function of torch, then reshapes, then the network's output: every
node on that way has one differentiable input, so nothing else can be in the loss. What the nodes keep for the
backward pass gives the call, which is made again and must give the same value before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autodiff.untouched import in_own_pass
from .graph_nodes import AS_IT_IS, FACTORS, REDUCTIONS, Reduction, ends_of, factor_of, only
from .loss_terms import Terms, read_terms

_RESHAPES = AS_IT_IS | {"TransposeBackward0", "TBackward0", "PermuteBackward0"}
_ELEMENTWISE = {
    "MseLossBackward0": "mse_loss",
    "SmoothL1LossBackward0": "smooth_l1_loss",
    "HuberLossBackward0": "huber_loss",
    "BinaryCrossEntropyWithLogitsBackward0": "binary_cross_entropy_with_logits",
    "BinaryCrossEntropyBackward0": "binary_cross_entropy",
}
_BY_HAND = {"PowBackward0": "mse_loss", "AbsBackward0": "l1_loss"}


@dataclass(frozen=True)
class FoundLoss:
    """A loss that the graph has shown.

    Args:
        name: The function of torch.
        function: Maps the network's output and targets to the loss.
        target: The targets: laid out as the output, without its class axis for class indices.
        leaf: Which tensor of the network's output it is of.
        class_axis: The axis of the output that counts classes, where targets are class indices.
        reduction: Whether it is a mean or a sum over the examples.
        divides: What it divides by that differs from batch to batch, in words; empty where nothing does.
        fixed: Whether that is so in every batch.
        factor: How often the tensor that is differentiated holds the loss.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    target: Tensor
    leaf: int
    class_axis: int | None = None
    reduction: Reduction = "mean"
    divides: str = ""
    fixed: bool = False
    factor: float = 1.0


@dataclass
class BackwardWatch:
    """Looks at the tensors that are differentiated, before their graphs are used up.

    Args:
        outputs: Gives the tensors of the network's output, by number, at the time of the backward pass.
    """

    outputs: Callable[[], Sequence[Any]]
    passes: int = 0
    loss: FoundLoss | str = "no backward pass was seen"
    """The loss, or why it is not known."""
    terms: Terms = field(default_factory=Terms)
    """What it is divided by, also where it is not known."""
    _original: Any = field(default=None, repr=False)
    _wrapped: Any = field(default=None, repr=False)

    def attach(self) -> None:
        """Look at the backward passes from now on."""
        self.detach()
        self._original = original = torch.autograd.backward

        def backward(tensors: Any, *arguments: Any, **options: Any) -> None:
            self._look(tensors)
            original(tensors, *arguments, **options)

        self._wrapped = torch.autograd.backward = backward

    def detach(self) -> None:
        """Look no more."""
        if self._wrapped is not None and torch.autograd.backward is self._wrapped:
            torch.autograd.backward = self._original
        self._wrapped = None

    def _look(self, tensors: Any) -> None:
        if self._wrapped is None or in_own_pass():  # None where another watch was put around this one
            return
        self.passes += 1
        root = tensors if isinstance(tensors, Tensor) else tensors[0] if len(tensors) == 1 else None
        if self.passes > 1:
            self.loss, self.terms = "the step makes several backward passes", Terms()
        elif root is None or root.numel() != 1:
            self.loss = "several tensors are differentiated at once"
        else:
            try:
                outputs = self.outputs()
                self.terms = read_terms(root, outputs)
                self.loss = read_loss(root, outputs)
            except Exception as error:  # private names of another torch; the user's pass goes on
                self.loss = f"its graph could not be read ({type(error).__name__})"


def read_loss(root: Tensor, outputs: Sequence[Any]) -> FoundLoss | str:
    """The loss that a tensor is, or why it is not known.

    Args:
        root: The tensor that is about to be differentiated.
        outputs: The tensors of the network's output.

    Example:
        >>> out, y = torch.zeros(4, 3, requires_grad=True) * 1, torch.tensor([0, 1, 2, 0])
        >>> loss = read_loss(F.cross_entropy(out, y) / 2, [out])
        >>> loss.name, loss.reduction, loss.target.tolist()
        ('cross_entropy', 'mean', [0, 1, 2, 0])
    """
    ends = ends_of(outputs)
    factor, node = _without_factors(root.grad_fn)
    reduction: Reduction | None = None
    if node is not None and node.name() in ("MeanBackward0", "SumBackward0"):
        reduction = "mean" if node.name() == "MeanBackward0" else "sum"
        node = only(node)
    guesses = _guesses(node, reduction, ends)
    if isinstance(guesses, str):
        return guesses
    with torch.no_grad():
        for guess in guesses:
            leaf = outputs[guess.leaf].detach()
            value = guess.function(leaf, guess.target) * factor
            rough = leaf.dtype in (torch.float16, torch.bfloat16)
            if torch.isclose(value.to(root), root.detach(), rtol=2e-2 if rough else 1e-5, atol=1e-12).item():
                return replace(guess, factor=factor)
    return "made again from the network's output it has another value"


def _without_factors(node: Any) -> tuple[float, Any]:
    """Constant factors before the loss, multiplied, and the node behind them."""
    factor = 1.0
    while node is not None:
        name = node.name()
        if name in FACTORS:
            number = factor_of(node)
            if number is None:
                return factor, node
            factor *= number
        elif name not in AS_IT_IS:
            return factor, node
        before, node = node, only(node)
        if node is None:
            return factor, before
    return factor, node


def _guesses(node: Any, reduction: Reduction | None, ends: Mapping[Any, Any]) -> list[FoundLoss] | str:
    """The calls that may have made a node; their values are compared later."""
    name = "nothing" if node is None else node.name()
    smoothing = 0.0
    if name == "AddBackward0":
        smoothed = _smoothed(node)
        if smoothed is None:
            return "it is a sum of several terms"
        node, smoothing = smoothed
        name = node.name()
    if name in ("NllLossBackward0", "NllLoss2DBackward0"):
        return _classes(node, reduction, smoothing, ends)
    if name in _ELEMENTWISE or name in _BY_HAND:
        return _elements(node, reduction, ends)
    return f"{name} is none of torch's losses that are known here"


def _smoothed(node: Any) -> tuple[Any, float] | None:
    """The cross entropy within one that smooths its labels, and how much it does."""
    for following, _ in node.next_functions:
        if following is not None and following.name() == "MulBackward1":
            inner = only(following)
            if inner is not None and inner.name().startswith("NllLoss"):
                return inner, 1.0 - float(following._saved_other)
    return None


def _to_output(node: Any, ends: Mapping[Any, Any]) -> tuple[int, Tensor] | str:
    """The output behind reshapes."""
    while node is not None and node not in ends:
        if node.name() not in _RESHAPES:
            return f"between the network's output and the loss stands {node.name().removesuffix('Backward0')}"
        node = only(node)
    return "it is not made from the network's output" if node is None else ends[node]


def _classes(
    node: Any, reduction: Reduction | None, smoothing: float, ends: Mapping[Any, Any]
) -> list[FoundLoss] | str:
    """Cross entropy, or its second half where the network returns log-probabilities."""
    softmax = only(node)
    while softmax is not None and softmax not in ends and softmax.name() in AS_IT_IS:
        softmax = only(softmax)
    over_logits = softmax is not None and softmax not in ends and softmax.name() == "LogSoftmaxBackward0"
    end = _to_output(only(softmax) if over_logits else softmax, ends)
    if isinstance(end, str):
        return end
    number, output = end
    ignored = node._saved_ignore_index
    ignored = ignored - 2**64 if ignored >= 2**63 else ignored
    weight, target = node._saved_weight, node._saved_target.detach().clone()
    inner = REDUCTIONS[node._saved_reduction]
    call = partial(
        _cross_entropy,
        smoothing=smoothing,
        weight=None if weight is None else weight.detach().clone(),
        ignored=ignored,
        inner=inner,
        outer=reduction if inner == "none" else None,
        logits=over_logits,
    )
    divides = ""
    if inner == "mean" and weight is not None and not bool((weight == weight[0]).all()):
        divides = "class weights"
    elif inner == "mean" and bool((target == ignored).any()):
        divides = "the number of targets that are not ignored"
    total: Reduction = inner if inner != "none" else reduction or "none"
    return [
        FoundLoss(
            name="cross_entropy" if over_logits else "nll_loss",
            function=partial(call, axis=axis),
            target=placed,
            leaf=number,
            class_axis=axis,
            reduction=total,
            divides=divides,
            fixed=divides == "class weights",
        )
        for axis in dict.fromkeys((1 if output.ndim > 1 else 0, output.ndim - 1))
        for placed in _placed(target, output.shape[:axis] + output.shape[axis + 1 :])
    ]


def _cross_entropy(
    output: Tensor,
    target: Tensor,
    *,
    axis: int,
    smoothing: float,
    weight: Tensor | None,
    ignored: int,
    inner: Reduction,
    outer: Reduction | None,
    logits: bool,
) -> Tensor:
    scores = output.movedim(axis, 1) if output.ndim > 1 else output
    weight = None if weight is None else weight.to(output)
    if logits:
        loss = F.cross_entropy(
            scores, target, weight, ignore_index=ignored, reduction=inner, label_smoothing=smoothing
        )
    else:
        loss = F.nll_loss(scores, target, weight, ignore_index=ignored, reduction=inner)
    return _reduced(loss, outer)


def _reduced(loss: Tensor, reduction: Reduction | None) -> Tensor:
    return loss if reduction is None else loss.mean() if reduction == "mean" else loss.sum()


def _placed(target: Tensor, shape: torch.Size) -> list[Tensor]:
    """The targets in a shape, also where the first two dimensions were exchanged before they were one."""
    if target.numel() != shape.numel():
        return []
    ways = [target.reshape(shape)]
    if len(shape) > 1:
        exchanged = (shape[1], shape[0], *shape[2:])
        ways.append(target.reshape(exchanged).transpose(0, 1))
    return ways


def _elements(node: Any, reduction: Reduction | None, ends: Mapping[Any, Any]) -> list[FoundLoss] | str:
    """A loss of each element of the output."""
    by_hand = node.name() in _BY_HAND
    behind = only(node)
    squashed = False
    options: dict[str, Any] | str
    if by_hand:
        if behind is None or behind.name() != "SubBackward0" or getattr(node, "_saved_exponent", 2) != 2:
            return f"{node.name()} is none of torch's losses that are known here"
        sign = 1.0 if behind.next_functions[0][0] is not None else -1.0
        difference, behind = node._saved_self * sign, only(behind)
    elif behind is not None and behind.name() == "SigmoidBackward0" and behind not in ends:
        squashed, behind = True, only(behind)
    end = _to_output(behind, ends)
    if isinstance(end, str):
        return end
    number, output = end
    if by_hand:
        name, options = _BY_HAND[node.name()], {}
        inner: Reduction = "none"
        if difference.numel() != output.numel():
            return "its targets have another shape than the output"
        target = (output.detach().reshape(difference.shape) - difference).detach()
    else:
        name, inner = _ELEMENTWISE[node.name()], REDUCTIONS[node._saved_reduction]
        target = node._saved_target.detach().clone()
        options = _options(node, output)
        if isinstance(options, str):
            return options
    outer = reduction if inner == "none" else None
    if inner == "none" and reduction is None:
        return "it has no mean or sum over the examples"
    call = partial(_elementwise, name=name, inner=inner, outer=outer, options=options, squashed=squashed)
    total = inner if inner != "none" else reduction
    return [
        FoundLoss(name=name, function=call, target=placed, leaf=number, reduction=total)  # type: ignore[arg-type]
        for placed in _placed(target, output.shape)
    ]


def _options(node: Any, output: Tensor) -> dict[str, Any] | str:
    """Further arguments of a loss of each element."""
    options: dict[str, Any] = {}
    for name, key in (("_saved_delta", "delta"), ("_saved_beta", "beta")):
        if hasattr(node, name):
            options[key] = getattr(node, name)
    positive = getattr(node, "_saved_pos_weight", None)
    if positive is not None:
        if positive.numel() != 1:
            return "its pos_weight differs between outputs"
        options["pos_weight"] = positive.detach().clone()
    if getattr(node, "_saved_weight", None) is not None:
        return "it weighs its elements"
    return options


def _elementwise(
    output: Tensor,
    target: Tensor,
    *,
    name: str,
    inner: Reduction,
    outer: Reduction | None,
    options: dict[str, Any],
    squashed: bool,
) -> Tensor:
    shown = output.sigmoid() if squashed else output
    loss = getattr(F, name)(shown, target.to(shown), reduction=inner, **options)
    return _reduced(loss, outer)
