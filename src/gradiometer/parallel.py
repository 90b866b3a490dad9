"""How processes exchange what they measure: through the store they met at, never by a collective.

A collective of ours could meet one of the script's, and stops both processes for good where only one comes.
In a store nothing has an order, and whoever does not come costs the others one bounded wait.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = 10.0
"""Seconds that a process waits for the others.

Exchanges come after a backward pass, in which data-parallel processes wait for each other, so that they
arrive together; and a process that waits here keeps the others waiting in the script's own collectives.
"""
_PIECE = 2**22
"""Bytes in one value; a TCP store takes at most 8 MiB."""
_YES, _LEFT = "yes", "process {} has closed its monitor"


def world_size() -> int:
    """Number of training processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class ApartError(Exception):
    """Not all processes came to an exchange, or not with the same."""


class Meeting:
    """Exchanges between all processes: each posts something, and process 0 answers for all of them.

    Exchanges are numbered. The first word on each of them holds for every process: either process 0's that
    all have come, or the reason why there will be no more, from whoever has waited long enough or has left.

    Args:
        store: A ``torch.distributed.Store`` where the processes post; nobody else uses it.
        rank: This process's number.
        world: Number of processes.
        seconds: How long to wait for others.
    """

    def __init__(self, store: Any, rank: int, world: int, seconds: float) -> None:
        self._store = store
        self._rank, self._world, self._seconds = rank, world, seconds
        self._number = 0
        self._posted: list[str] = []
        """Keys of what this process has brought to the exchange that comes next."""
        self._answered: list[str] = []
        """Keys of process 0's last answer."""

    @classmethod
    def of_all(cls, name: str) -> Meeting:
        """A meeting of all processes of the default group.

        Args:
            name: What tells meetings apart. A process comes to the meetings of one name in turn, and passes
                by those that have ended without it.
        """
        c10d = dist.distributed_c10d
        default: Any = c10d._get_default_store()
        names, rank = c10d.PrefixStore(f"gradiometer/{name}", default), dist.get_rank()
        # far below the time after which the script's own collectives give up on this process
        seconds = min(PATIENCE, default.timeout.total_seconds() / 4)
        while True:
            store = c10d.PrefixStore(str(names.add(f"turn/{rank}", 1)), names)
            if not store.check(["0/word"]):
                return cls(store, rank, dist.get_world_size(), seconds)

    def post(self, mine: Any) -> None:
        """Say what this process brings to the next exchange, without waiting for anybody.

        Args:
            mine: Anything that can be pickled, but ``None``.
        """
        self._posted = self._put(f"{self._number}/{self._rank}", pickle.dumps(mine))

    def exchange(self, mine: Any, answer: Callable[[list[Any]], Any]) -> Any:
        """What process 0 answers to what all have posted.

        Args:
            mine: What this process brings, unless it has posted that already.
            answer: Maps what all bring, by process, to the answer; called on process 0 alone, and raises
                :class:`ApartError` where they do not fit.

        Raises:
            ApartError: If not all processes come, on every process that does.
        """
        try:
            if not self._posted:
                self.post(mine)
            word, value = self._lead(answer) if self._rank == 0 else self._follow()
            if word == _YES:
                self._drop(self._posted)
        except dist.DistError as error:
            raise ApartError("the store that the processes met at cannot be reached") from error
        if word != _YES:
            raise ApartError(word)
        self._number, self._posted = self._number + 1, []
        return value

    def _lead(self, answer: Callable[[list[Any]], Any]) -> tuple[str, Any]:
        """The word on this exchange, and process 0's own answer."""
        keys = self._keys()
        if not self._come(keys):
            return self._say(self._absent()), None
        self._drop(self._answered)  # all have taken it, or they would not be here
        posts = [pickle.loads(self._get(key)) for key in keys]
        if None in posts:
            return self._say(_LEFT.format(posts.index(None))), None
        try:
            value = answer(posts)
        except ApartError as error:
            return self._say(str(error)), None
        word = f"{self._number}/word"
        self._answered = [*self._put(f"{self._number}/answer", pickle.dumps(value)), word]
        return self._say(_YES), value

    def _follow(self) -> tuple[str, Any]:
        """The word on this exchange, and process 0's answer."""
        if self._come([f"{self._number}/word"]):
            word = self._store.get(f"{self._number}/word").decode()
        else:
            word = self._say(self._absent())
        return word, pickle.loads(self._get(f"{self._number}/answer")) if word == _YES else None

    def _keys(self) -> list[str]:
        return [f"{self._number}/{rank}" for rank in range(self._world)]

    def _absent(self) -> str:
        """Whom this process has waited for; process 0 has still to answer where all have come."""
        absent = [rank for rank, key in enumerate(self._keys()) if not self._store.check([key])]
        names = ", ".join(str(rank) for rank in absent or [0])
        return f"process {names} did not come within {self._seconds:g} s"

    def _come(self, keys: list[str]) -> bool:
        """Whether all keys are there, soon enough."""
        try:
            self._store.wait(keys, timedelta(seconds=self._seconds))
        except RuntimeError:  # what it is depends on the store
            return bool(self._store.check(keys))
        return True

    def _say(self, word: str) -> str:
        """The word on this exchange: this one, unless another process was first."""
        return str(self._store.compare_set(f"{self._number}/word", "", word).decode())

    def leave(self) -> None:
        """Tell the others not to wait for this process any more."""
        with contextlib.suppress(dist.DistError):  # the store has gone with the process that kept it
            if not self._posted:
                self.post(None)
            self._say(_LEFT.format(self._rank))

    def _put(self, key: str, data: bytes) -> list[str]:
        """Post some bytes; the keys they are under."""
        first, *rest = (data[begin : begin + _PIECE] for begin in range(0, len(data), _PIECE))
        for number, piece in enumerate(rest, 1):
            self._store.set(f"{key}/{number}", piece)
        self._store.set(key, b"%d " % (1 + len(rest)) + first)  # the last, since it is what others wait for
        return [key, *(f"{key}/{number}" for number in range(1, 1 + len(rest)))]

    def _get(self, key: str) -> bytes:
        count, _, data = self._store.get(key).partition(b" ")
        return bytes(data) + b"".join(self._store.get(f"{key}/{number}") for number in range(1, int(count)))

    def _drop(self, keys: list[str]) -> None:
        for key in keys:
            self._store.delete_key(key)
