"""What goes into a checkpoint: plain values that load under ``weights_only=True``, in parts that are sealed.

A part is continued as a whole or not at all. Its seal is made from the structure, the numbers and the words
in it, and from the form of its tensors: where something was lost or changed on the way, it does not fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

_SEAL = "seal"


def plain(nest: Any) -> Any:
    """Tensors, numbers, strings, lists and dictionaries, and nothing else.

    Args:
        nest: What is to be saved; tuples become lists.

    Raises:
        InputError: With the first thing in it that is none of these.

    Example:
        >>> plain({"sizes": (3, np.float64(0.5)), "note": None})
        {'sizes': [3, 0.5], 'note': None}
    """
    if isinstance(nest, Tensor):
        return plain_tensor(nest)
    if isinstance(nest, np.generic):
        nest = nest.item()
    if nest is None or type(nest) in (bool, int, float, str):
        return nest
    if type(nest) in (list, tuple):
        return [plain(part) for part in nest]
    if isinstance(nest, Mapping) and all(type(key) in (int, str) for key in nest):
        return {key: plain(part) for key, part in nest.items()}
    raise InputError(
        "a checkpoint holds tensors, numbers, strings, lists and dictionaries only", got=type(nest).__name__
    )


def plain_tensor(tensor: Tensor) -> Tensor:
    """A tensor without a graph, of torch's own class, that brings no more memory along than it shows.

    Args:
        tensor: Any tensor.
    """
    tensor = tensor.detach()
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor)
    view = tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if view else tensor


def sealed(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a state, plain and with its seal.

    Args:
        part: What is to be saved.

    Raises:
        InputError: If something in it cannot be saved.

    Example:
        >>> opened(sealed({"step": 3}))
        {'step': 3}
    """
    content = plain(part)
    return {**content, _SEAL: fingerprint(content)}


def opened(saved: Any) -> dict[str, Any] | None:
    """What :func:`sealed` was given; ``None`` where that is not what is there.

    Args:
        saved: What was in the checkpoint.
    """
    if not isinstance(saved, Mapping):
        return None
    content = {key: part for key, part in saved.items() if key != _SEAL}
    try:
        return content if saved.get(_SEAL) == fingerprint(content) else None
    except InputError:
        return None


def fingerprint(nest: Any) -> str:
    """A short word for plain values; of tensors their form counts, not what is in them.

    Args:
        nest: Plain values.

    Raises:
        InputError: If there are others among them.
    """
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{list(part.shape)};".encode())
        elif isinstance(part, Mapping):
            digest.update(f"{{{len(part)};".encode())
            for key in sorted(part, key=repr):
                digest.update(f"{key!r}:".encode())
                add(part[key])
        elif isinstance(part, list):
            digest.update(f"[{len(part)};".encode())
            for entry in part:
                add(entry)
        else:
            digest.update(f"{plain(part)!r};".encode())

    add(nest)
    return digest.hexdigest()[:16]


class Misfits:
    """What of a checkpoint is not continued, and why; it becomes one warning."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, *names: str) -> None:
        """Note something that begins anew.

        Args:
            reason: Why, as the end of a sentence that says so.
            names: What begins anew.
        """
        self._names.setdefault(reason, []).extend(names)

    def message(self) -> str:
        """All of it in words; empty where everything goes on.

        Example:
            >>> misfits = Misfits()
            >>> misfits.add("another model", "ntk", "fdr")
            >>> misfits.message()
            'not everything in the checkpoint fits this run. What begins anew: ntk, fdr (another model).'
        """
        parts = [f"{', '.join(names)} ({reason})" for reason, names in self._names.items()]
        if not parts:
            return ""
        return f"not everything in the checkpoint fits this run. What begins anew: {'; '.join(parts)}."
