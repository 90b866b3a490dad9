"""Several processes: whether they measure together, and how their open blocks become one.

Processes that measure together come to each exchange at the same step. Once one of them does not, each reads
for itself, for good: nothing tells a process that is late from one that will never come.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import parallel
from ..collect.snapshot import Probe
from ..errors import InputError, SampleSkippedError, TooEarlyError, UnsupportedError
from ..parallel import ApartError
from .guard import Guard
from .instrument import Instrument
from .probe import probe_state, saved_probe
from .step import Taking

T = TypeVar("T")

_SEVERITY: Mapping[type[Exception], int] = {SampleSkippedError: 1, TooEarlyError: 1, UnsupportedError: 3}
"""Of two errors the graver one counts; any other error is 2."""
_OTHERS = {1: SampleSkippedError, 2: InputError, 3: UnsupportedError}


def severity(error: Exception | None) -> int:
    """How grave an error is; 0 for none.

    Args:
        error: An error, or ``None``.
    """
    return 0 if error is None else _SEVERITY.get(type(error), 2)


@dataclass(frozen=True)
class _Blocks:
    """The open blocks of what records at one step, or their averages over processes.

    Args:
        step: The optimizer step.
        names: Groups that record.
        states: How grave the error of each is.
        rows: Sums and weight of each in one row; empty where there is an error.
        dearest: Position of the observable to be measured less often, else -1; process 0's counts.
    """

    step: int
    names: list[str]
    states: list[int]
    rows: list[np.ndarray[Any, np.dtype[np.float64]]]
    dearest: int


def _averaged(posts: Sequence[_Blocks]) -> _Blocks:
    """Process 0's blocks with every row averaged; what failed on one process has failed on all."""
    first = posts[0]
    for rank, post in enumerate(posts):
        if post.step != first.step:
            raise ApartError(f"process {rank} is at step {post.step}, process 0 at step {first.step}")
        if post.names != first.names:
            raise ApartError(f"at step {post.step} process {rank} records {post.names}, not {first.names}")
    states, rows = [], []
    for i in range(len(first.names)):
        state = max(post.states[i] for post in posts)
        parts = [post.rows[i] for post in posts]
        if state == 0 and len({len(row) for row in parts}) > 1:
            state = 2
        states.append(state)
        rows.append(sum(parts[1:], parts[0]) / len(posts) if state == 0 else np.empty(0))
    return _Blocks(first.step, first.names, states, rows, first.dearest)


class Ranks:
    """The processes of a run, as one of them sees them.

    Args:
        model: The model being trained; its device is where a probe of process 0 goes.
        prefix: First part of every key, which tells monitors apart.
        guard: Says it where processes do not measure together.
    """

    def __init__(self, model: nn.Module, prefix: str, guard: Guard) -> None:
        self._model, self._prefix, self._guard = model, prefix, guard
        self._meeting: parallel.Meeting | None = None
        self.announced = False
        """Whether this process has said what it measures."""
        self.together: bool | None = None
        """Whether all processes measure the same; ``None`` until they have answered."""
        self.parted: Callable[[], None] = lambda: None
        """Called once they no longer do."""

    @property
    def apart(self) -> bool:
        """Whether each of several processes reads for itself."""
        return parallel.world_size() > 1 and not self.together

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._model.parameters()).device

    def announce(self, plan: Any) -> None:
        """Tell other processes what this one is about to measure, and wait for nobody.

        Args:
            plan: Has a ``repr`` that is the same for the same.
        """
        self.announced = True
        if parallel.world_size() == 1:
            return
        self._meeting = parallel.Meeting.of_all(self._prefix)
        self._meeting.post(re.sub(r" at 0x[0-9a-f]+", "", repr(plan)))

    def agree(self, probe: Probe | None) -> Probe | None:
        """Find out whether all processes measure the same; else each one's readings are its own.

        Comes after the first backward pass, in which data-parallel processes have waited for each other.

        Args:
            probe: What this process has taken from its first batch, if anything.

        Returns:
            What process 0 has taken where all are together.
        """
        if self._meeting is None:
            self.together = False
            return probe
        if self.device.type != "cpu":  # a backward pass that is only queued has met nobody
            torch.zeros((), device=self.device).item()
        try:
            sent = self._meeting.exchange(None, lambda plans: _sent(plans, probe))
        except ApartError as apart:
            self.together = False
            self._guard.warn(
                f"not all of the {parallel.world_size()} processes have a monitor with the same "
                f"observables, controllers and budget ({apart}): readings are this process's own. "
                "Build the same Monitor on every rank, and give recorders to rank 0 only."
            )
            return probe
        self.together = True
        return probe if sent is None else saved_probe(pickle.loads(sent), self.device)

    def share(self, step: int, make: Callable[[], T]) -> T | None:
        """What process 0 makes, on every process that measures together; ``None`` once they do not.

        Args:
            step: The optimizer step.
            make: Makes it, of plain values.
        """
        if not self.together or self._meeting is None:
            return make()
        try:
            made: T = self._meeting.exchange(step, lambda posts: make())
        except ApartError as apart:
            self._part(step, apart)
            return None
        return made

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
        step: int,
        recording: Sequence[tuple[Instrument, Taking]],
        settle: Callable[[Instrument, Taking, Exception], None],
        dearest: int,
    ) -> int:
        """Average open blocks over processes; what failed on one has failed on all.

        Args:
            step: The optimizer step.
            recording: Those that record at this step, in the same order on every process.
            settle: What to do about an error.
            dearest: Position of the observable to be measured less often, else -1.

        Returns:
            Process 0's ``dearest``.
        """
        assert self._meeting is not None
        try:
            answer: _Blocks = self._meeting.exchange(_blocks(step, recording, dearest), _averaged)
        except ApartError as apart:
            self._part(step, apart)
            for instrument, taking in recording:
                if instrument.retired:
                    taking.drop()
                elif taking.error is not None:
                    settle(instrument, taking, taking.error)
            return dearest
        for (instrument, taking), state, row in zip(recording, answer.states, answer.rows, strict=True):
            error, taking.error = taking.error, None
            if state == 0:
                sums, _ = instrument.estimator.pending
                means = torch.as_tensor(row).split([*(t.numel() for t in sums.values()), 1])
                averages = {
                    name: part.reshape(t.shape).to(t.device)
                    for (name, t), part in zip(sums.items(), means, strict=False)
                }
                instrument.estimator.pending = averages, float(means[-1])
            elif error is not None and severity(error) == state:
                settle(instrument, taking, error)
            else:
                settle(instrument, taking, _OTHERS[state]("another process could not measure"))
        return answer.dearest

    def _part(self, step: int, apart: ApartError) -> None:
        """From here on this process reads for itself."""
        self.together = False
        self.parted()
        self._guard.warn(
            f"at step {step} the processes stopped measuring together, because {apart}: readings are this "
            "process's own from here on, and what compares the gradients of processes is left out. Every "
            "process must make every optimizer step, and close its monitor after the last."
        )

    def leave(self) -> None:
        """Nobody must wait for this process any more."""
        if self._meeting is not None and self.together is not False and dist.is_initialized():
            self._meeting.leave()
            self.together = False


def _sent(plans: Sequence[str], probe: Probe | None) -> bytes | None:
    """Process 0's probe for the others, where they plan the same."""
    other = next((rank for rank, plan in enumerate(plans) if plan != plans[0]), None)
    if other is not None:
        raise ApartError(f"process {other} has others than process 0")
    if probe is None:
        return None

    def host(leaf: Any) -> Any:
        return leaf.cpu() if isinstance(leaf, Tensor) else leaf

    on_host = Probe(*pytree.tree_map(host, (probe.inputs, probe.targets)))
    try:
        return pickle.dumps(probe_state(on_host))
    except InputError as error:
        raise ApartError(f"the first batch cannot be sent to other processes: {error}") from error


def _blocks(step: int, recording: Sequence[tuple[Instrument, Taking]], dearest: int) -> _Blocks:
    """This process's open blocks; the values come to the host in one piece, once the step has been made."""
    states = [severity(taking.error) for _, taking in recording]
    sizes, flat = [], [torch.empty(0, dtype=torch.float64)]
    for (instrument, _), state in zip(recording, states, strict=True):
        sums, weight = instrument.estimator.pending
        parts = [] if state else [*sums.values(), torch.as_tensor(weight)]
        flat += [t.detach().reshape(-1).double() for t in parts]
        sizes.append(sum(t.numel() for t in parts))
    device = next((t.device for t in flat if t.device.type != "cpu"), flat[0].device)
    rows = torch.cat([t.to(device) for t in flat]).cpu().numpy()
    names = [taking.name for _, taking in recording]
    return _Blocks(step, names, states, np.split(rows, np.cumsum(sizes)[:-1]), dearest)
