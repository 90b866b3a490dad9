"""Batches whose size may change while the loader runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any
from weakref import ref

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from ..errors import InputError, check_flag, check_number

__all__ = [
    "GrowingBatchSampler",
]


class GrowingBatchSampler(Sampler[list[int]]):
    """Cut the examples of a sampler into batches of a size that may be assigned at any time.

    A new ``batch_size`` holds from the next batch that the loader draws. A loader with workers has drawn
    ``prefetch_factor * num_workers`` batches in advance; these keep their size. Within an epoch no example is
    lost or repeated by a change.

    ``len()`` counts the batches of the epoch under way: those drawn, and the rest at the present size.
    Between epochs it is the length of the next one; where the iterator is kept (persistent workers,
    Lightning), it stays that of the last one until the next begins.

    Args:
        sampler: Draws the examples, such as ``RandomSampler(dataset)``; on several processes
            ``DistributedSampler(dataset)``. Frameworks call its ``set_epoch``.
        batch_size: Examples in a batch, per process.
        drop_last: Whether to leave out a last batch that is shorter than the size at that time. A growth near
            the end of an epoch then ends it at once.

    Shapes:
        Each batch is a list of at most ``batch_size`` indices.

    Units:
        Examples.

    Raises:
        InputError: If ``sampler`` does not draw single examples, or a size is not a positive whole number.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> sampler = GrowingBatchSampler(SequentialSampler(range(10)), 2)
        >>> loader = DataLoader(range(10), batch_sampler=sampler)
        >>> for x in loader:
        ...     print(x.tolist(), len(loader))
        ...     sampler.batch_size = 4
        [0, 1] 5
        [2, 3, 4, 5] 3
        [6, 7, 8, 9] 3
        >>> len(loader)
        3
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool = False) -> None:
        _check_sampler(sampler)
        check_flag("drop_last", drop_last)
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._epoch: ref[_Epoch] | None = None

    @property
    def batch_size(self) -> int:
        """Examples in the next batch that is drawn."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        check_number("batch_size", size, least=1, integer=True, example="64")
        self._batch_size = size

    def __iter__(self) -> Iterator[list[int]]:
        epoch = _Epoch(self)
        self._epoch = ref(epoch)
        return epoch

    def __len__(self) -> int:
        epoch = self._epoch() if self._epoch is not None else None
        batches, examples = (epoch.batches, epoch.examples) if epoch is not None else (0, 0)
        left = len(self.sampler) - examples  # type: ignore[arg-type]  # without a length: TypeError, as in torch
        return batches + (left // self.batch_size if self.drop_last else -(-left // self.batch_size))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": None}  # a copy has begun no epoch


class _Epoch(Iterator[list[int]]):
    """One pass over the examples, with the numbers of batches and examples drawn."""

    def __init__(self, owner: GrowingBatchSampler) -> None:
        self.owner = owner
        self.batches = self.examples = 0
        self._indices: Iterator[int] | None = None

    def __next__(self) -> list[int]:
        if self._indices is None:  # not before the first batch: set_epoch may come after iter()
            self._indices = iter(self.owner.sampler)
        size = self.owner.batch_size
        batch = list(islice(self._indices, size))
        self.examples += len(batch)
        if not batch or (self.owner.drop_last and len(batch) < size):
            raise StopIteration
        self.batches += 1
        return batch


def _check_sampler(sampler: object) -> None:
    """Refuse what does not draw single examples, and say what to write instead."""
    makes_batches = isinstance(sampler, (BatchSampler, GrowingBatchSampler))
    if isinstance(sampler, Sampler) and not makes_batches:
        return
    dataset = sampler.dataset if isinstance(sampler, DataLoader) else sampler
    if isinstance(dataset, IterableDataset):
        fix = "A stream has no sampler: form its batches in the dataset, or accumulate gradients."
    elif makes_batches:
        fix = "This one draws batches: pass its own sampler, GrowingBatchSampler(batches.sampler, 32)."
    else:
        fix = (
            "Write sampler = GrowingBatchSampler(RandomSampler(dataset), 32) and "
            "DataLoader(dataset, batch_sampler=sampler)."
        )
    raise InputError(
        "GrowingBatchSampler needs a sampler that draws single examples", got=type(sampler).__name__, fix=fix
    )
