"""How statistics are averaged over steps: the only place with state.

Samples add to an open block, on the device. A recording step closes the block and brings it to the
host. Closed blocks are merged in pairs when there are too many, so memory does not grow, and they are
what standard errors are made from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .linalg import accumulation_dtype

_JACKKNIFE_GROUPS = 16


@dataclass
class Moment:
    """Values of state functions (a kernel, a squared norm) right after one step."""

    step: int
    levels: dict[str, Tensor]


@dataclass
class Reference:
    """What a reading may be compared with.

    Args:
        step: The step of the reading.
        first: Levels at the first recording of the run, never forgotten.
        first_step: Its step.
        previous: Levels at the recording before this one; empty at the first.
        previous_step: Its step; ``-1`` at the first recording.
        path: Levels at the window's start and at the end of each of its blocks, stacked.
        path_steps: Their steps; a single one until the window has a known start.
        samples: Number of samples behind the averages.
    """

    step: int
    first: dict[str, Tensor]
    first_step: int
    previous: dict[str, Tensor]
    previous_step: int
    path: dict[str, Tensor]
    path_steps: Tensor
    samples: float


@dataclass
class _Block:
    """Weighted sums over consecutive samples, and the levels at the end of the last one."""

    sums: dict[str, Tensor]
    weight: float
    moment: Moment
    closes: int = 1

    def absorb(self, later: _Block) -> None:
        """Append the block that follows."""
        self.sums = {name: self.sums[name] + later.sums[name] for name in later.sums}
        self.weight += later.weight
        self.moment = later.moment
        self.closes += later.closes


@dataclass
class _State:
    """Everything an estimator remembers: tensors and numbers only."""

    open_sums: dict[str, Tensor] = field(default_factory=dict)
    open_weight: float = 0.0
    blocks: list[_Block] = field(default_factory=list)
    span: int = 1
    begin: int = -1
    origin: Moment | None = None
    first: Moment | None = None
    previous: Moment | None = None
    now: Moment | None = None


class Estimator(ABC):
    """Averages the statistics of one observable over steps and keeps what they are compared with.

    The subclasses differ in how much of the past they keep. Where an observable has levels (state
    functions that are differenced over the window), samples from before the first known level are left
    out of the window.
    """

    max_blocks = 32
    decay = 1.0

    def __init__(self) -> None:
        self._state = _State()

    # -- what differs ------------------------------------------------------------------------------

    @abstractmethod
    def _oldest(self, begin: int, step: int) -> float:
        """Blocks that end at or before this step are forgotten."""

    # -- filling -----------------------------------------------------------------------------------

    def add(self, statistics: Mapping[str, Tensor]) -> None:
        """Add one sample to the open block; nothing waits for the device.

        Args:
            statistics: Tensors whose shapes stay the same from sample to sample.
        """
        state = self._state
        for name, value in statistics.items():
            value = value.detach().to(accumulation_dtype(value.device))
            total = state.open_sums.get(name)
            state.open_sums[name] = (
                value.clone() if total is None else total.to(value.device) * self.decay + value
            )
        state.open_weight = state.open_weight * self.decay + 1.0

    @property
    def pending(self) -> tuple[dict[str, Tensor], float]:
        """Sums and weight of the open block; what processes add up before it is closed."""
        return self._state.open_sums, self._state.open_weight

    @pending.setter
    def pending(self, value: tuple[dict[str, Tensor], float]) -> None:
        self._state.open_sums, self._state.open_weight = value

    def discard_pending(self) -> None:
        """Drop the samples of the open block."""
        self._state.open_sums, self._state.open_weight = {}, 0.0

    def close(self, step: int, levels: Mapping[str, Tensor] | None = None) -> None:
        """End the open block at a recording step; the values come to the host here.

        Args:
            step: The recording step.
            levels: State functions at this step.
        """
        state = self._state
        moment = Moment(step, {name: value.detach().cpu() for name, value in (levels or {}).items()})
        if state.begin < 0:
            state.begin = step
        if state.first is None:
            state.first = moment
        state.previous, state.now = state.now, moment
        if moment.levels and state.origin is None:
            state.origin = moment
            self.discard_pending()
            return
        sums = {name: total.cpu().double() for name, total in state.open_sums.items()}
        block = _Block(sums, state.open_weight, moment)
        self.discard_pending()
        self._append(block)
        oldest = self._oldest(state.begin, step)
        while len(state.blocks) > 1 and state.blocks[0].moment.step <= oldest:
            state.origin = state.blocks.pop(0).moment

    def _append(self, block: _Block) -> None:
        """Add a closed block; merge pairs and double the span when there are too many."""
        blocks = self._state.blocks
        if blocks and blocks[-1].closes < self._state.span:
            blocks[-1].absorb(block)
        else:
            blocks.append(block)
        if len(blocks) > self.max_blocks:
            for left, right in zip(blocks[::2], blocks[1::2], strict=False):
                left.absorb(right)
            self._state.blocks = blocks[::2]
            self._state.span *= 2

    def reset(self) -> None:
        """Forget the window, for a jump of the learning rate; ``first`` stays."""
        kept = self._state
        self._state = _State(first=kept.first, previous=kept.previous, now=kept.now)

    # -- reading -----------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever recorded."""
        return self._state.now is None

    def averages(self) -> dict[str, Tensor]:
        """Weighted means over the window, and the levels of now."""
        return self._now(_merge(self._state.blocks))

    def left_out(self) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The averages without each of at most 16 groups of blocks, and the groups' weights.

        Returns:
            As many dictionaries as groups, and weights ``[g]``; empty with a single group.
        """
        blocks = [block for block in self._state.blocks if block.weight > 0]
        size = -(-len(blocks) // _JACKKNIFE_GROUPS) if blocks else 1
        groups = [_merge(blocks[i : i + size]) for i in range(0, len(blocks), size)]
        weights = torch.tensor([weight for _, weight in groups], dtype=torch.float64)
        if len(groups) < 2:
            return [], weights
        sums, weight = _merge(blocks)
        rest = [({name: sums[name] - part[name] for name in part}, weight - share) for part, share in groups]
        return [self._now(each) for each in rest], weights

    def _now(self, merged: tuple[dict[str, Tensor], float]) -> dict[str, Tensor]:
        sums, weight = merged
        levels = self._state.now.levels if self._state.now else {}
        means = {name: total / weight for name, total in sums.items()} if weight > 0 else {}
        return {**means, **levels}

    def reference(self) -> Reference:
        """What the readings of now may be compared with.

        Raises:
            InputError: If nothing was recorded yet.
        """
        state = self._state
        if state.now is None or state.first is None:
            raise InputError("this estimator has no record yet", fix="Call close(step) first.")
        moments = ([state.origin] if state.origin else []) + [b.moment for b in state.blocks]
        moments = [moment for moment in moments if moment.levels]
        return Reference(
            step=state.now.step,
            first=state.first.levels,
            first_step=state.first.step,
            previous=state.previous.levels if state.previous else {},
            previous_step=state.previous.step if state.previous else -1,
            path={n: torch.stack([m.levels[n] for m in moments]) for n in state.now.levels},
            path_steps=torch.tensor([m.step for m in moments], dtype=torch.float64),
            samples=sum(block.weight for block in state.blocks),
        )

    # -- checkpoint --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, lists and dictionaries."""
        state = self._state
        return {
            "open_sums": dict(state.open_sums),
            "open_weight": state.open_weight,
            "span": state.span,
            "begin": state.begin,
            "blocks": [
                {
                    "sums": dict(block.sums),
                    "weight": block.weight,
                    "closes": block.closes,
                    "moment": _pack(block.moment),
                }
                for block in state.blocks
            ],
            **{name: _pack(getattr(state, name)) for name in ("origin", "first", "previous", "now")},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            saved: What ``state_dict`` returned.
        """
        self._state = _State(
            open_sums=dict(saved["open_sums"]),
            open_weight=saved["open_weight"],
            span=saved["span"],
            begin=saved["begin"],
            blocks=[
                _Block(dict(b["sums"]), b["weight"], _unpack(b["moment"]) or Moment(0, {}), b["closes"])
                for b in saved["blocks"]
            ],
            **{name: _unpack(saved[name]) for name in ("origin", "first", "previous", "now")},
        )


def _merge(blocks: list[_Block]) -> tuple[dict[str, Tensor], float]:
    """Sums and weight of several blocks together."""
    sums: dict[str, Tensor] = {}
    for block in blocks:
        for name, value in block.sums.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums, sum(block.weight for block in blocks)


def _pack(moment: Moment | None) -> dict[str, Any] | None:
    return None if moment is None else {"step": moment.step, "levels": dict(moment.levels)}


def _unpack(saved: dict[str, Any] | None) -> Moment | None:
    return None if saved is None else Moment(saved["step"], dict(saved["levels"]))


class Last(Estimator):
    """Keeps the last record only.

    Example:
        >>> last = Last()
        >>> for step, value in enumerate([1.0, 5.0]):
        ...     last.add({"x": torch.tensor(value)}); last.close(step)
        >>> last.averages()["x"].item()
        5.0
    """

    def _oldest(self, begin: int, step: int) -> float:
        del begin
        return step - 1


class Mean(Estimator):
    """Averages over the whole run.

    Example:
        >>> mean = Mean()
        >>> for step, value in enumerate([1.0, 5.0]):
        ...     mean.add({"x": torch.tensor(value)}); mean.close(step)
        >>> mean.averages()["x"].item()
        3.0
    """

    def _oldest(self, begin: int, step: int) -> float:
        del begin, step
        return float("-inf")


class Window(Estimator):
    """Averages over the last ``steps`` optimizer steps, to the precision of a block.

    Args:
        steps: Length of the window in optimizer steps.

    Raises:
        InputError: If ``steps`` is not positive.

    Example:
        >>> window = Window(2)
        >>> for step, value in enumerate([100.0, 1.0, 5.0]):
        ...     window.add({"x": torch.tensor(value)}); window.close(step)
        >>> window.averages()["x"].item()
        3.0
    """

    def __init__(self, steps: int = 1000) -> None:
        super().__init__()
        if steps < 1:
            raise InputError("Window(steps) must be at least 1", got=steps, fix="Write Window(1000).")
        self.steps = steps

    def _oldest(self, begin: int, step: int) -> float:
        del begin
        return step - self.steps


class HalfRun(Estimator):
    """Averages over the second half of the run so far (Yaida's half-running average).

    Source:
        Yaida 2018, arXiv:1810.00004, section 3.1: the first half is dropped as transient.

    Example:
        >>> half = HalfRun()
        >>> for step in range(9):
        ...     half.add({"x": torch.tensor(float(step))}); half.close(step)
        >>> half.averages()["x"].item()   # mean of 5, 6, 7, 8
        6.5
    """

    max_blocks = 256

    def _oldest(self, begin: int, step: int) -> float:
        return begin + (step - begin) // 2


class Ema(Estimator):
    """Exponential moving average over samples, debiased.

    Args:
        decay: Weight of the past at each sample, between 0 and 1.

    Raises:
        InputError: If ``decay`` lies outside (0, 1).

    Example:
        >>> ema = Ema(0.5)
        >>> for step, value in enumerate([0.0, 3.0]):
        ...     ema.add({"x": torch.tensor(value)}); ema.close(step)
        >>> ema.averages()["x"].item()   # (0.5 * 0 + 1 * 3) / 1.5
        2.0
    """

    def __init__(self, decay: float = 0.95) -> None:
        super().__init__()
        if not 0.0 < decay < 1.0:
            raise InputError("Ema(decay) must lie between 0 and 1", got=decay, fix="Write Ema(0.95).")
        self.decay = decay
        self._state.span = max(1, round(1.0 / (8.0 * (1.0 - decay))))

    def _oldest(self, begin: int, step: int) -> float:
        del begin, step
        return float("-inf")

    def close(self, step: int, levels: Mapping[str, Tensor] | None = None) -> None:
        """End the open block and let the older ones decay by as many samples."""
        samples = torch.tensor(self.pending[1], dtype=torch.float64)
        # open_weight = (1 - decay^n) / (1 - decay), so decay^n follows from it without a counter
        factor = float(1.0 - samples * (1.0 - self.decay))
        for block in self._state.blocks:
            block.sums = {name: total * factor for name, total in block.sums.items()}
            block.weight *= factor
        super().close(step, levels)

    def _append(self, block: _Block) -> None:
        """Add a closed block; the oldest two become one when there are too many."""
        blocks = self._state.blocks
        if blocks and blocks[-1].closes < self._state.span:
            blocks[-1].absorb(block)
        else:
            blocks.append(block)
        if len(blocks) > self.max_blocks:
            blocks[0].absorb(blocks.pop(1))

    def reset(self) -> None:
        """Forget the window; the block length stays."""
        span = self._state.span
        super().reset()
        self._state.span = span
