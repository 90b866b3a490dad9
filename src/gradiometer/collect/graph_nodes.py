"""What nodes of an autograd graph say of themselves; their names and what they keep are torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("none", "mean", "sum")
FACTORS = {"MulBackward0", "DivBackward0", "MulBackward1", "DivBackward1"}
AS_IT_IS = {
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0", "CloneBackward0"),
    *("SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "UnsqueezeBackward0", "ToCopyBackward0"),
}


def ends_of(outputs: Sequence[Any]) -> dict[Any, tuple[int, Tensor]]:
    """The numbers and tensors of a network's output, by the node that made each.

    Args:
        outputs: The tensors of the network's output.
    """
    return {
        leaf.grad_fn: (number, leaf)
        for number, leaf in enumerate(outputs)
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None
    }


def factor_of(node: Any) -> float | None:
    """The number that one of ``FACTORS`` multiplies with; ``None`` where it is none.

    Args:
        node: A product or a quotient.
    """
    others = [getattr(node, key, None) for key in ("_saved_other", "_saved_self")]
    number = next((other for other in others if other is not None), None)
    if number is None or (isinstance(number, Tensor) and (number.numel() != 1 or number.requires_grad)):
        return None
    return float(number) if node.name().startswith("Mul") else 1 / float(number)


def only(node: Any) -> Any:
    """The one node that a node's gradient goes to; ``None`` where there are several.

    Args:
        node: A node of an autograd graph.
    """
    following = [other for other, _ in node.next_functions if other is not None]
    return following[0] if len(following) == 1 else None
