"""What a loss is divided by: read off the reductions in its graph, also where the loss itself is not known.

A sum over a batch that is divided by the number of its examples is a mean. One that is divided by something
else of the batch, as by the number of valid tokens, is no plain mean over the examples.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .graph_nodes import AS_IT_IS, FACTORS, REDUCTIONS, ends_of, factor_of, only

SELECTED = "the number of elements that are selected"
WEIGHTS = "the sum of its weights"
OTHER = "a number that is not that of the examples"
_CLOSE = 1e-5
_MOST_TERMS = 64
_MOST_NODES = 10_000


@dataclass(frozen=True)
class Terms:
    """The reductions of a loss over its batch.

    Args:
        factor: Of the largest sum, where all terms are sums; ``None`` where one is a mean, or not known.
        weighted: Whether a sum is divided by the sum of its weights, which differ.
        selected: Entries of each selection from the batch that is averaged; -1 where a mask has chosen them.
        examples: Examples in the micro-batch; 0 where that is not known.

    Example:
        >>> out = torch.zeros(4, 3, requires_grad=True) * 1
        >>> terms = read_terms(out.square().sum() / 4 + out.abs().sum() / 8, [out])
        >>> terms.factor, replace(terms, examples=4).reduction(micro_batches=1)
        (0.25, 'mean')
    """

    factor: float | None = None
    weighted: bool = False
    selected: tuple[int, ...] = ()
    examples: int = 0

    def reduction(self, micro_batches: int, loss_scale: float = 1.0) -> Literal["mean", "sum"]:
        """Whether the loss is a mean or a sum over the examples.

        Args:
            micro_batches: In the step.
            loss_scale: Factor on the loss in the backward pass.
        """
        return "sum" if self._reading(micro_batches, loss_scale) == "sum" else "mean"

    def divides(self, micro_batches: int, loss_scale: float = 1.0) -> str:
        """What it divides by that differs from batch to batch, in words; empty where nothing is seen.

        Args:
            micro_batches: In the step.
            loss_scale: Factor on the loss in the backward pass.
        """
        reading = self._reading(micro_batches, loss_scale)
        return "" if reading in ("mean", "sum") else reading

    def _reading(self, micro_batches: int, loss_scale: float) -> str:
        if any(count < 0 or count % max(self.examples, 1) for count in self.selected):
            return SELECTED
        if self.weighted:
            return WEIGHTS
        if not self.factor or not self.examples:
            return "mean"
        multiple = self.factor / loss_scale
        if multiple > 1 - _CLOSE:
            return "sum"
        if _is_whole(1 / (multiple * self.examples)):
            return "mean"
        return "sum" if abs(multiple * micro_batches - 1) < _CLOSE else OTHER


def read_terms(root: Tensor, outputs: Sequence[Any]) -> Terms:
    """The reductions of the tensor that is differentiated.

    Args:
        root: That tensor, before its graph is used up.
        outputs: The tensors of the network's output; terms that are not made from them do not count.
    """
    ends = ends_of(outputs).keys()
    terms = [term for term in _reductions(root.grad_fn) if _reaches(term.node, ends)]
    if not terms:
        return Terms()
    below = [_below(term, ends) for term in terms]
    sums = all(term.kind == "sum" for term in terms)
    return Terms(
        factor=max(abs(term.factor) for term in below) if sums else None,
        weighted=any(term.weighted for term in below),
        selected=tuple(term.selected for term in below if term.kind == "mean" and term.selected),
    )


@dataclass(frozen=True)
class _Term:
    """One reduction: a sum or a mean, and the factor before it."""

    kind: str
    factor: float
    node: Any
    weighted: bool = False
    selected: int = 0


def _reductions(root: Any) -> list[_Term]:
    """The reductions that a scalar is a combination of; none where it is something else."""
    terms: list[_Term] = []
    waiting = [(root, 1.0)]
    while waiting:
        node, factor = waiting.pop()
        name = "" if node is None else node.name()
        kind = _kind(node, name)
        if kind in ("mean", "sum"):
            terms.append(_Term(kind, factor, node))
        elif name in ("AddBackward0", "SubBackward0"):
            second = factor * float(node._saved_alpha) * (-1 if name.startswith("Sub") else 1)
            pairs = zip(node.next_functions, (factor, second), strict=True)
            waiting += [(child, f) for (child, _), f in pairs if child is not None]
        elif name in FACTORS and only(node) is not None and (number := factor_of(node)) is not None:
            waiting.append((only(node), factor * number))
        elif name in AS_IT_IS or name == "NegBackward0":
            waiting.append((only(node), factor))
        else:
            return []
        if len(terms) + len(waiting) > _MOST_TERMS:
            return []
    return terms


def _kind(node: Any, name: str) -> str:
    """Whether a node makes a mean, a sum, or neither."""
    if hasattr(node, "_saved_reduction"):
        return REDUCTIONS[node._saved_reduction]
    return next((kind for kind in ("mean", "sum") if name.lower().startswith(f"{kind}backward")), "")


def _reaches(node: Any, ends: Collection[Any]) -> bool:
    """Whether something is made from the network's output."""
    seen, waiting = {node}, [node]
    while waiting and len(seen) < _MOST_NODES:
        for child, _ in waiting.pop().next_functions:
            if child in ends:
                return True
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return False


def _below(term: _Term, ends: Collection[Any]) -> _Term:
    """A term with what is done to the elements before they are added up."""
    node = only(term.node)
    while node is not None and node not in ends:
        name = node.name()
        number = factor_of(node) if name in FACTORS else None
        if number is not None:
            term = replace(term, factor=term.factor * number)
        elif term.kind == "sum" and not term.weighted:
            term = replace(term, weighted=_divided_by_weights(node, name, term.factor))
        if name.startswith(("IndexBackward", "MaskedSelectBackward", "IndexSelectBackward")):
            term = replace(term, selected=_selected(node))
        node = only(node)
    return term


def _divided_by_weights(node: Any, name: str, factor: float) -> bool:
    """Whether the elements are weighed, and their sum is divided by that of the weights."""
    if name in FACTORS:
        weights = next((w for w in (node._saved_other, node._saved_self) if isinstance(w, Tensor)), None)
        if weights is None or weights.requires_grad or not name.startswith("Mul"):
            return False
        sums = [weights.sum()]
    elif name in ("WhereBackward0", "MaskedFillBackward0"):
        weights = node._saved_condition if name.startswith("Where") else node._saved_mask
        sums = [weights.sum(), (~weights).sum()]
    else:
        return False
    differ = bool((weights != weights.flatten()[0]).any())
    return differ and any(float(total) > 0 and _is_whole(1 / (abs(factor) * float(total))) for total in sums)


def _selected(node: Any) -> int:
    """How many entries a selection has; -1 where a mask has chosen some of them."""
    name = node.name()
    if name.startswith("MaskedSelect"):
        masks = [node._saved_mask]
    else:
        saved = node._saved_index if name.startswith("IndexSelect") else node._saved_indices
        masks = [index for index in ([saved] if isinstance(saved, Tensor) else saved) if index is not None]
    first = masks[0]
    if first.dtype in (torch.bool, torch.uint8):
        return 0 if bool(first.all()) else -1
    return int(first.numel())


def _is_whole(number: float) -> bool:
    return number > 1 - _CLOSE and abs(number - round(number)) < _CLOSE * number
