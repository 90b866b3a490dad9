"""Errors in words: a short cause and what to do about it, without the contents of tensors."""

from __future__ import annotations

import re

import torch

from ..errors import GradiometerError

LONGEST = 450
"""Characters of a description."""
_SENTENCE = 160
"""Characters of what somebody else's error says."""
_CONTENTS = re.compile(r"(tensor|array|Parameter containing:)\s*\(.*", re.DOTALL)

_NO_BRANCHES = "Leave it out of observables=, or write the model without branches on the values of tensors."
_REMEDIES = (
    (
        "match the size|cannot be multiplied|size mismatch|shape",
        "Pass a probe= or forward= that fits the model.",
    ),
    ("same device|two devices", "Put the model, its buffers and its inputs on one device."),
    ("dtype|scalar type", "Give inputs and weights one dtype."),
    (
        "missing .*argument|takes .*argument|unexpected keyword",
        "Pass forward=, which calls the model as you do.",
    ),
    (r"vmap|functorch|data-dependent|\.item\(\)", _NO_BRANCHES),
    (
        "double backward|derivative for .* not implemented",
        "Leave it out of observables=: it needs that derivative.",
    ),
    ("[Ss]parse", "Leave it out of observables=, or pass a dense probe=."),
)


def description_of(error: Exception) -> str:
    """An error in words for a warning: the class's name where the message is not written for the user.

    Args:
        error: Any error.

    Example:
        >>> description_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))[:60]
        'RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3'
    """
    if isinstance(error, GradiometerError):
        return short(str(error), LONGEST)
    text = f"{type(error).__name__}: {short(str(error), _SENTENCE)}" if str(error) else type(error).__name__
    return f"{text.rstrip('.')}. {_remedy(error)}".rstrip()


def _remedy(error: Exception) -> str:
    """What to do about somebody else's error, where it is known."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "Pass a smaller probe_size= or max_memory=."
    text = str(error)
    return next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, text)), "")


def short(text: str, longest: int) -> str:
    """The first sentences of a text, on one line and without the contents of tensors.

    Args:
        text: Any text.
        longest: Characters.

    Example:
        >>> short("no such thing. It was tensor([1., 2.]) at first.", 30)
        'no such thing. It was a tensor'
    """
    plain = " ".join(_CONTENTS.sub("a tensor", text).split())
    if len(plain) <= longest:
        return plain
    cut = plain[: longest - 3]
    end = cut.rfind(". ")
    return cut[: end + 1] if end > longest // 4 else cut.rpartition(" ")[0] + " ..."
