"""Several processes: whether they measure together, and how their open blocks become one.

Every process gets to a reduction at the same steps: schedules are those all have agreed on, and nothing is
retired, owed or retried but by what is exchanged there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import parallel
from ..errors import InputError, SampleSkippedError, TooEarlyError, UnsupportedError
from .guard import Guard
from .instrument import Instrument
from .step import Taking

_SEVERITY: Mapping[type[Exception], int] = {SampleSkippedError: 1, TooEarlyError: 1, UnsupportedError: 3}
"""Of two errors the graver one counts; any other error is 2."""
_OTHERS = {1: SampleSkippedError, 2: InputError, 3: UnsupportedError}


def severity(error: Exception | None) -> int:
    """How grave an error is; 0 for none.

    Args:
        error: An error, or ``None``.
    """
    return 0 if error is None else _SEVERITY.get(type(error), 2)


class Ranks:
    """The processes of a run, as one of them sees them.

    Args:
        model: The model being trained; processes exchange tensors on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.together: bool | None = None
        """Whether all processes measure the same; ``None`` until they were asked."""

    def agree(self, prefix: str, plan: Any, guard: Guard) -> None:
        """Find out whether all processes measure the same; else each one's readings are its own.

        Args:
            prefix: First part of every key, which tells monitors apart.
            plan: What this process is about to measure.
            guard: Says it where they do not.
        """
        self.together = False
        if parallel.world_size() == 1:
            return
        self.together = parallel.agree(prefix, re.sub(r" at 0x[0-9a-f]+", "", repr(plan)))
        if not self.together:
            guard.warn(
                f"not all of the {parallel.world_size()} processes have a monitor with the same "
                "observables, controllers and budget: readings are this process's own. "
                "Build the same Monitor on every rank, and give recorders to rank 0 only."
            )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._model.parameters()).device

    def first(self, number: int) -> int:
        """Rank 0's number, on every process that measures together.

        Args:
            number: This process's own.
        """
        if not self.together:
            return number
        return int(parallel.broadcast(torch.tensor(number, device=self.device)))

    @staticmethod
    def keep(taking: Taking, error: Exception) -> None:
        """Keep an error until all processes have met.

        Args:
            taking: What was to be taken.
            error: Why it could not be.
        """
        taking.drop()
        if severity(error) > severity(taking.error):
            taking.error = error

    def reduce(
        self,
        recording: Sequence[tuple[Instrument, Taking]],
        settle: Callable[[Instrument, Taking, Exception], None],
    ) -> None:
        """Average open blocks over processes; what failed on one has failed on all.

        Args:
            recording: Those that record at this step, in the same order on every process.
            settle: What to do about an error.
        """
        device = self.device
        pending = [instrument.estimator.pending for instrument, _ in recording]
        sizes = [sum(t.numel() for t in sums.values()) for sums, _ in pending]
        states = [severity(taking.error) for _, taking in recording]
        worst = parallel.largest([*states, *sizes, *(-size for size in sizes)], device)
        count = len(recording)
        measured = []
        for i, (instrument, taking) in enumerate(recording):
            state = worst[i]
            if state == 0 and worst[count + i] != -worst[2 * count + i]:
                state = 2
            error, taking.error = taking.error, None
            if state == 0:
                measured.append(instrument.estimator)
            elif error is not None and severity(error) == state:
                settle(instrument, taking, error)
            else:
                settle(instrument, taking, _OTHERS[state]("another process could not measure"))
        flat = []
        for estimator in measured:
            sums, weight = estimator.pending
            flat += [*sums.values(), torch.as_tensor(weight)]
        means = iter(parallel.mean(flat, device))
        for estimator in measured:
            averages = {name: next(means) for name in estimator.pending[0]}
            estimator.pending = (averages, float(next(means)))
