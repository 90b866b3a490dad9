"""The tangent kernel from the layer tape, in pieces that keep within a memory limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..stats.linalg import accumulation_dtype
from .factors import Mode, Plain, Side, Weight, gram, sketch
from .functional import Batch
from .tape import LayerTape, Recording

FREE_SHARE = 0.25
"""Share of the free memory that a kernel may take when nothing else is asked for."""
_UNKNOWN_MEMORY = 2**30


def memory_limit(device: torch.device) -> int:
    """A quarter of the memory that is free on a device now; 1 GiB where that is not known.

    Args:
        device: Where the model is.

    Example:
        >>> memory_limit(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return int(FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return _UNKNOWN_MEMORY
    return int(FREE_SHARE * free) if device.type == "cpu" else _UNKNOWN_MEMORY


@dataclass(frozen=True)
class KernelRequest:
    """What is asked of :func:`tangent_kernel`.

    Args:
        mode: Which pairs of outputs are kept.
        rows: Combinations of outputs that are differentiated, ``[K, O]``.
        names: Parameters that count.
        layers: Whether each module that owns parameters gets a kernel of its own.
        weights: What their squared gradients count.
        sketch_size: Number of random features; exact when ``None``.
        generator: Of the features.
        chunk_size: Examples at a time; from ``max_memory`` when ``None``.
        max_memory: Bytes; :func:`memory_limit` when ``None``.
    """

    mode: Mode
    rows: Tensor
    names: list[str]
    layers: bool
    weights: dict[str, Weight]
    sketch_size: int | None
    generator: torch.Generator
    chunk_size: int | None
    max_memory: int | None


def tangent_kernel(tape: LayerTape, x: Batch, x2: Batch | None, request: KernelRequest) -> dict[str, Tensor]:
    """The kernel, or one per module that owns parameters.

    Args:
        tape: Knows how each parameter is reached.
        x: Inputs.
        x2: Second inputs, or ``None`` for x itself.
        request: What is asked for.

    Returns:
        By path of the owning module; under ``""`` the sum of all when ``layers`` is false.

    Shapes:
        K rows, N and M examples -> trace ``[N, M]`` (summed over the rows), diagonal ``[N, M, K]``,
        full ``[N, M, K, K]``.
    """
    batches = [x] if x2 is None else [x, x2]
    modules: dict[str, list[str]] = {}
    for name in request.names:
        modules.setdefault(tape.owners[name], []).append(name)
    step, outputs = _pieces(tape, batches, request)
    if request.sketch_size is not None:
        return _sketched(tape, batches, modules, request, step, outputs)
    symmetric = x2 is None
    rows = request.rows
    shape = {"trace": (), "diagonal": (len(rows),), "full": (len(rows), len(rows))}[request.mode]
    dtype = accumulation_dtype(rows.device)
    paths = list(modules) if request.layers else [""]
    kernels = {
        path: torch.zeros(x.count, batches[-1].count, *shape, dtype=dtype, device=rows.device)
        for path in paths
    }
    for i, first in _recordings(tape, x, step, first=True):
        for j in range(i if symmetric else 0, batches[-1].count, step):
            same = symmetric and i == j
            second = first if same else tape.record(batches[-1].part(j, step))
            for k in range(0, len(rows), outputs):
                left = _sides(first, k, outputs, request)
                last = len(rows) if request.mode == "full" else k + 1
                for other in range(k if same or request.mode != "full" else 0, last, outputs):
                    right = left if same and other == k else _sides(second, other, outputs, request)
                    for path, block in _blocks(modules, left, right, request, same and other == k):
                        _put(kernels[path], block, request.mode, (i, j, k, other), symmetric)
    return kernels


def _recordings(tape: LayerTape, batch: Batch, step: int, *, first: bool) -> Iterator[tuple[int, Recording]]:
    """The batch in chunks."""
    for i, part in batch.parts(step):
        yield i, tape.record(part, first=i == 0 and first)


def _sides(recording: Recording, k: int, outputs: int, request: KernelRequest) -> dict[str, Side]:
    rows = request.rows[k : k + outputs, None].expand(-1, len(recording.output), -1)
    return recording.sides(rows, request.names, request.weights)


def _blocks(
    modules: dict[str, list[str]],
    left: dict[str, Side],
    right: dict[str, Side],
    request: KernelRequest,
    same: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Products per module, or their sum; in float64 between modules."""
    total: Tensor | None = None
    for path, names in modules.items():
        reached = [name for name in names if name in left and name in right]
        if not reached:
            continue
        block = gram([left[n] for n in reached], [right[n] for n in reached], request.mode, same)
        if request.layers:
            yield path, block
        elif total is None:
            total = block.to(accumulation_dtype(block.device))
        else:
            total += block
    if total is not None:
        yield "", total


def _put(kernel: Tensor, block: Tensor, mode: Mode, at: tuple[int, int, int, int], symmetric: bool) -> None:
    """Add a block where it belongs, and its mirror image where only half is computed."""
    i, j, k, other = at
    if mode == "trace":
        n, m = block.shape
        kernel[i : i + n, j : j + m] += block
        if symmetric and i != j:
            kernel[j : j + m, i : i + n] += block.mT
    elif mode == "diagonal":
        outputs, n, m = block.shape
        kernel[i : i + n, j : j + m, k : k + outputs] += block.permute(1, 2, 0)
        if symmetric and i != j:
            kernel[j : j + m, i : i + n, k : k + outputs] += block.permute(2, 1, 0)
    else:
        outputs, n, others, m = block.shape
        kernel[i : i + n, j : j + m, k : k + outputs, other : other + others] += block.permute(1, 3, 0, 2)
        if symmetric and (i, k) != (j, other):
            kernel[j : j + m, i : i + n, other : other + others, k : k + outputs] += block.permute(3, 1, 2, 0)


def _pieces(tape: LayerTape, batches: list[Batch], request: KernelRequest) -> tuple[int, int]:
    """How many examples and how many outputs are held at a time."""
    most = max(batch.count for batch in batches)
    count, outputs = min(request.chunk_size or most, most), len(request.rows)
    limit = request.max_memory or memory_limit(request.rows.device)
    if request.mode != "full" and tape.in_turn(count):
        outputs = 1
    pairs_kept = 3 if request.mode == "full" else 0  # the product of all pairs, and what it is made of

    def needed(count: int, outputs: int) -> int:
        recordings = 1 if len(batches) == 1 and count == most else 2
        recordings = 2 if request.mode == "full" and outputs < len(request.rows) else recordings
        products = 8 * (count * outputs) ** 2 * pairs_kept
        return recordings * tape.bytes_needed(count, outputs) + tape.workspace(count * outputs) + products

    while needed(count, outputs) > limit:
        examples_first = request.mode == "full" and count > 1 and request.chunk_size is None
        if outputs > 1 and not examples_first:
            outputs = (outputs + 1) // 2
        elif count > 1 and request.chunk_size is None:
            count = (count + 1) // 2
        else:
            raise InputError(
                f"max_memory is too small for {count} example(s) and one output at a time",
                got=f"max_memory={limit}",
                fix=f"Write max_memory={needed(count, outputs)} or more"
                + (", or a smaller chunk_size." if count > 1 else "."),
            )
    return count, outputs


def _sketched(
    tape: LayerTape,
    batches: list[Batch],
    modules: dict[str, list[str]],
    request: KernelRequest,
    step: int,
    outputs: int,
) -> dict[str, Tensor]:
    """Products of random features."""
    size = request.sketch_size
    assert size is not None
    seeds = {path: int(torch.randint(2**62, (), generator=request.generator)) for path in modules}
    features: list[dict[str, Tensor]] = []
    for batch in batches:
        shape = (len(request.rows), batch.count, size)
        sums = {path: request.rows.new_zeros(shape) for path in (modules if request.layers else [""])}
        for i, recording in _recordings(tape, batch, step, first=batch is batches[0]):
            for k in range(0, len(request.rows), outputs):
                sides = _sides(recording, k, outputs, request)
                for path, names in modules.items():
                    drawn = [sides[name] for name in names if name in sides]
                    if drawn:
                        generator = torch.Generator().manual_seed(seeds[path])
                        part = sketch(drawn, size, generator)
                        sums[path if request.layers else ""][k : k + len(part), i : i + part.shape[1]] += part
        features.append(sums)
    kernels = {}
    for path, left in features[0].items():
        first, second = (
            Side([Plain(side.to(accumulation_dtype(side.device)))], torch.Size([size]))
            for side in (left, features[-1][path])
        )
        block = gram([first], [second], request.mode, False)
        order = {"trace": (0, 1), "diagonal": (1, 2, 0), "full": (1, 3, 0, 2)}[request.mode]
        kernels[path] = block.permute(order)
    return kernels
