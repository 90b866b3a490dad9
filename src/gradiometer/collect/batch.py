"""Inputs and targets of a batch in the usual shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import InputError

INPUT_KEYS = ("x", "input", "inputs", "image", "images", "input_ids", "pixel_values", "features")
TARGET_KEYS = ("y", "target", "targets", "label", "labels")


def split_batch(
    batch: Any, input_key: str | None = None, target_key: str | None = None
) -> tuple[Any, Tensor | None]:
    """Inputs and targets of a batch that is a pair or a mapping.

    Args:
        batch: ``(x, y)``, a mapping, or the inputs alone; of a longer sequence only the first entry is
            used, since which other one holds the targets is not clear.
        input_key: Key of the inputs in a mapping; one of the usual names when ``None``.
        target_key: Key of the targets; one of the usual names, or no targets, when ``None``.

    Returns:
        Inputs, and targets or ``None``.

    Raises:
        InputError: If a mapping has no key, or several, that may hold the inputs.

    Example:
        >>> import torch
        >>> split_batch({"image": torch.zeros(2, 3), "label": torch.tensor([0, 1])})[1]
        tensor([0, 1])
    """
    if isinstance(batch, Mapping):
        source = _one_key(batch, input_key, INPUT_KEYS, "input_key")
        if source is None:
            raise InputError(
                "the batch is a mapping, and which of its entries the model takes is not clear",
                got=f"keys {sorted(map(str, batch))}",
                fix='Name it: DynamicsMonitor(input_key="image", target_key="label").',
            )
        target = _one_key(batch, target_key, TARGET_KEYS, "target_key")
        return batch[source], batch[target] if target is not None else None
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch):
        second = batch[1] if len(batch) == 2 and isinstance(batch[1], Tensor) else None
        return batch[0], second
    return batch, None


def _one_key(batch: Mapping[Any, Any], given: str | None, usual: Sequence[str], argument: str) -> str | None:
    if given is not None:
        if given not in batch:
            raise InputError(
                f"{argument}={given!r} is not in the batch",
                got=f"keys {sorted(map(str, batch))}",
                fix="Name one of them.",
            )
        return given
    present = [key for key in usual if key in batch]
    return present[0] if len(present) == 1 else None
