"""How statistics are averaged over steps: the only place with state.

Samples add to an open block, on the device. A recording step closes the block and brings it to the
host. Closed blocks are merged in pairs when there are too many, so memory does not grow, and they are
what standard errors are made from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError, check_number
from .linalg import accumulation_dtype

Floats = NDArray[np.float64]

_JACKKNIFE_GROUPS = 32
_FEWEST_GROUPS = 4


Layout = list[tuple[str, list[int]]]
"""Names and shapes of tensors that are kept as one flat vector."""


@dataclass
class Moment:
    """State functions (a kernel, a squared norm) right after one step, as one float64 vector."""

    step: int
    levels: Floats


class Reference:
    """What a reading may be compared with: a view of an estimator, good until its next record.

    Levels and means are made ready when they are first asked for.

    Args:
        state: What the estimator remembers, with at least one record.
        weights: Weight of each group of blocks that the replicates leave out; none while there are too
            few groups for an error.
    """

    def __init__(self, state: _State, weights: Tensor) -> None:
        self._state = state
        self.weights = weights

    @property
    def step(self) -> int:
        """The step of the reading."""
        return -1 if self._state.now is None else self._state.now.step

    @property
    def previous_step(self) -> int:
        """The step of the record before this one; -1 at the first."""
        return -1 if self._state.previous is None else self._state.previous.step

    @property
    def samples(self) -> float:
        """Weight behind the averages: the number of samples that count."""
        return sum(block.weight for block in self._state.blocks)

    @cached_property
    def first(self) -> dict[str, Tensor]:
        """Levels at the first record of the run, which is never forgotten."""
        return self._state.levels_at(self._state.first)

    @cached_property
    def previous(self) -> dict[str, Tensor]:
        """Levels at the record before this one; empty at the first."""
        return self._state.levels_at(self._state.previous)

    @cached_property
    def path(self) -> dict[str, Floats]:
        """Levels along the window, stacked ``[K, ...]``; ``K = 1`` until the window has a known start."""
        moments = self._state.path()
        if not moments:
            return {}
        return _unflatten(np.array([moment.levels for moment in moments]), self._state.levels_layout)

    @cached_property
    def path_steps(self) -> Floats:
        """Steps along the window, ``[K]``."""
        return np.array([moment.step for moment in self._state.path()], dtype=np.float64)

    @cached_property
    def block_weights(self) -> Floats:
        """Weight of each block along the window, ``[K - 1]``: its samples that count."""
        return np.array([block.weight for block in self._state.blocks])

    @cached_property
    def block_means(self) -> dict[str, Floats]:
        """Means over the samples of each block along the window, ``[K - 1, ...]``; 0 without a sample."""
        blocks, layout = self._state.blocks, self._state.sums_layout
        size = sum(math.prod(shape) for _, shape in layout)
        sums = np.array([block.sums if block.weight else np.zeros(size) for block in blocks])
        weights = np.where(self.block_weights > 0, self.block_weights, 1.0)
        return _unflatten(sums / weights[:, None], layout) if len(sums) else {}


@dataclass
class _Block:
    """Weighted sums over consecutive samples, as one vector, and the levels after the last one."""

    sums: Floats
    weight: float
    moment: Moment
    closes: int = 1

    def absorb(self, later: _Block) -> None:
        """Append the block that follows; either may be without a sample."""
        both = self.weight > 0 and later.weight > 0
        self.sums = self.sums + later.sums if both else later.sums if later.weight > 0 else self.sums
        self.weight += later.weight
        self.moment = later.moment
        self.closes += later.closes


@dataclass
class _State:
    """Everything an estimator remembers: tensors and numbers only."""

    open_sums: dict[str, Tensor] = field(default_factory=dict)
    open_weight: float | Tensor = 0.0
    sums_layout: Layout = field(default_factory=list)
    levels_layout: Layout = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)
    span: int = 1
    begin: int = -1
    origin: Moment | None = None
    first: Moment | None = None
    previous: Moment | None = None
    now: Moment | None = None

    def levels_at(self, moment: Moment | None) -> dict[str, Tensor]:
        """Levels by name; empty where there is no such record."""
        return _tensors(moment.levels, self.levels_layout) if moment else {}

    def path(self) -> list[Moment]:
        """The window's known start and the end of each of its blocks, where levels were taken."""
        moments = ([self.origin] if self.origin else []) + [block.moment for block in self.blocks]
        return [moment for moment in moments if moment.levels.size]


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
        self._replicates: tuple[dict[str, Tensor], Tensor] | None = None

    # -- what differs ------------------------------------------------------------------------------

    @abstractmethod
    def _oldest(self, begin: int, step: int) -> float:
        """Blocks that end at or before this step are forgotten."""

    # -- filling -----------------------------------------------------------------------------------

    def add(self, statistics: Mapping[str, Tensor], weight: float | Tensor = 1.0) -> None:
        """Add one sample to the open block; nothing waits for the device.

        Args:
            statistics: Tensors whose shapes stay the same from sample to sample.
            weight: How often the sample counts. One of weight 0 changes nothing, whatever its values are,
                ``nan`` included. A tensor, on the device of the statistics, may know it later than the host.

        Shapes:
            weight scalar.

        Raises:
            InputError: A plain number that is negative or ``nan``.

        Example:
            >>> mean = Mean()
            >>> mean.add({"x": torch.tensor(2.0)})
            >>> mean.add({"x": torch.tensor(torch.nan)}, weight=torch.tensor(0.0))
            >>> mean.close(1)
            >>> mean.averages()["x"].item(), mean.reference().samples
            (2.0, 1.0)
        """
        if isinstance(weight, Tensor) or weight != 1.0:
            self._add_weighted(statistics, weight)
            return
        state = self._state
        for name, value in statistics.items():
            value = value.detach().to(accumulation_dtype(value.device))
            total = self._open_sum(name, value)
            if total is None:
                state.open_sums[name] = value.clone()
                continue
            if self.decay != 1.0:
                total.mul_(self.decay)
            total.add_(value)
        state.open_weight = state.open_weight * self.decay + 1.0

    def _add_weighted(self, statistics: Mapping[str, Tensor], weight: float | Tensor) -> None:
        """Add a sample as ``weight`` equal ones: with a decay they add up to ``(1 - d^w) / (1 - d)``."""
        state = self._state
        if isinstance(weight, Tensor):
            weight = weight.detach().to(accumulation_dtype(weight.device))
        elif not weight >= 0.0:
            raise InputError(
                "the weight of a sample must not be negative",
                got=weight,
                fix="Write weight=0 for a step that must not count.",
            )
        fade: float | Tensor = 1.0
        share = weight
        if self.decay != 1.0:
            fade = self.decay**weight
            share = (1.0 - fade) / (1.0 - self.decay)
        for name, value in statistics.items():
            value = value.detach().to(accumulation_dtype(value.device))
            total = self._open_sum(name, value)
            if isinstance(share, Tensor):
                factor = share.to(value)
                value = torch.where(factor > 0, value * factor, 0.0)  # nan times 0 is nan
            else:
                value = value * share if share else torch.zeros_like(value)
            if total is None:
                state.open_sums[name] = value
                continue
            if self.decay != 1.0:
                total.mul_(fade)
            total.add_(value)
        state.open_weight = state.open_weight * fade + share

    def _open_sum(self, name: str, value: Tensor) -> Tensor | None:
        """The sum that a value is added to, on its device; ``None`` for the first."""
        total = self._state.open_sums.get(name)
        if total is not None and total.device != value.device:  # after a checkpoint was loaded
            total = self._state.open_sums[name] = total.to(value.device)
        return total

    @property
    def pending(self) -> tuple[dict[str, Tensor], float | Tensor]:
        """Sums and weight of the open block; what processes add up before it is closed."""
        return self._state.open_sums, self._state.open_weight

    @pending.setter
    def pending(self, value: tuple[dict[str, Tensor], float | Tensor]) -> None:
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
        state, self._replicates = self._state, None
        moment = Moment(step, _flatten(levels or {}))
        if levels:
            state.levels_layout = _layout_of(levels)
        if state.begin < 0:
            state.begin = step
        if state.first is None:
            state.first = moment
        state.previous, state.now = state.now, moment
        if levels and state.origin is None:
            state.origin = moment
            self.discard_pending()
            return
        if state.open_sums:
            state.sums_layout = _layout_of(state.open_sums)
        block = _Block(_flatten(state.open_sums), float(state.open_weight), moment)
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

    def reset(self, *, everything: bool = False) -> None:
        """Forget the window, for a jump of the learning rate.

        Args:
            everything: Forget the first record too, since other parameters are read from now on.
        """
        before, self._replicates = _State() if everything else self._state, None
        self._state = _State(
            sums_layout=before.sums_layout,
            levels_layout=before.levels_layout,
            first=before.first,
            previous=before.previous,
            now=before.now,
        )

    # -- reading -----------------------------------------------------------------------------------

    def averages(self) -> dict[str, Tensor]:
        """Weighted means over the window, and the levels of now."""
        rows, _ = self.replicates()
        return {name: row[0] for name, row in rows.items()} | self.levels()

    def levels(self) -> dict[str, Tensor]:
        """The state functions of now."""
        return self._state.levels_at(self._state.now)

    def replicates(self) -> tuple[dict[str, Tensor], Tensor]:
        """Weighted means over the window, and the same without each of at most 32 groups of blocks.

        Returns:
            Row 0 is the mean over all blocks, row ``j`` that without group ``j``; and the weight of each
            group. With fewer than four groups there are no further rows.

        Shapes:
            ``[1 + g, ...]`` for a statistic ``[...]``, and ``[g]``.
        """
        if self._replicates is not None:
            return self._replicates
        blocks = [block for block in self._state.blocks if block.weight > 0]
        if not blocks:
            return {}, torch.zeros(0, dtype=torch.float64)
        starts = range(0, len(blocks), -(-len(blocks) // _JACKKNIFE_GROUPS))
        sums = np.add.reduceat(np.array([block.sums for block in blocks]), starts)
        weights = np.add.reduceat(np.array([block.weight for block in blocks]), starts)
        total, weight = sums.sum(0, keepdims=True), weights.sum(keepdims=True)
        if len(weights) < _FEWEST_GROUPS:
            weights = weights[:0]
        else:
            total = np.concatenate([total, total - sums])
            weight = np.concatenate([weight, weight - weights])
        rows = _tensors(total / weight[:, None], self._state.sums_layout)
        self._replicates = rows, torch.from_numpy(weights)
        return self._replicates

    def reference(self) -> Reference:
        """What the readings of now may be compared with.

        Raises:
            InputError: If nothing was recorded yet.
        """
        if self._state.now is None:
            raise InputError("this estimator has no record yet", fix="Call close(step) first.")
        return Reference(self._state, self.replicates()[1])

    # -- checkpoint --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, lists and dictionaries."""
        state = self._state
        return {
            "open_sums": {name: total.clone() for name, total in state.open_sums.items()},
            "open_weight": float(state.open_weight),
            "sums_layout": state.sums_layout,
            "levels_layout": state.levels_layout,
            "span": state.span,
            "begin": state.begin,
            "blocks": [
                {
                    "sums": torch.from_numpy(block.sums),
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
        self._replicates = None
        self._state = _State(
            open_sums={name: total.clone() for name, total in saved["open_sums"].items()},
            open_weight=saved["open_weight"],
            sums_layout=_read_layout(saved["sums_layout"]),
            levels_layout=_read_layout(saved["levels_layout"]),
            span=saved["span"],
            begin=saved["begin"],
            blocks=[
                _Block(b["sums"].numpy(), b["weight"], _read_moment(b["moment"]), b["closes"])
                for b in saved["blocks"]
            ],
            **{name: _unpack(saved[name]) for name in ("origin", "first", "previous", "now")},
        )


def _layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    return [(name, list(tensor.shape)) for name, tensor in tensors.items()]


def _read_layout(saved: Any) -> Layout:
    return [(name, list(shape)) for name, shape in saved]


def _flatten(tensors: Mapping[str, Tensor]) -> Floats:
    """One float64 vector on the host; the only place that waits for the device."""
    parts = [tensor.detach().cpu().double().numpy().reshape(-1) for tensor in tensors.values()]
    return np.concatenate(parts) if parts else np.zeros(0)


def _unflatten(flat: Floats, layout: Layout) -> dict[str, Floats]:
    """Views of ``[..., S]`` by name, each ``[..., *shape]``."""
    views = {}
    end = 0
    for name, shape in layout:
        begin, end = end, end + math.prod(shape)
        views[name] = flat[..., begin:end].reshape([*flat.shape[:-1], *shape])
    return views if end == flat.shape[-1] else {}  # a moment without levels


def _tensors(flat: Floats, layout: Layout) -> dict[str, Tensor]:
    return {name: torch.from_numpy(view) for name, view in _unflatten(flat, layout).items()}


def _pack(moment: Moment | None) -> dict[str, Any] | None:
    return None if moment is None else {"step": moment.step, "levels": torch.from_numpy(moment.levels)}


def _read_moment(saved: Mapping[str, Any]) -> Moment:
    return Moment(saved["step"], saved["levels"].numpy())


def _unpack(saved: dict[str, Any] | None) -> Moment | None:
    return None if saved is None else _read_moment(saved)


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
        InputError: If ``steps`` is not a positive whole number.

    Example:
        >>> window = Window(2)
        >>> for step, value in enumerate([100.0, 1.0, 5.0]):
        ...     window.add({"x": torch.tensor(value)}); window.close(step)
        >>> window.averages()["x"].item()
        3.0
    """

    def __init__(self, steps: int = 1000) -> None:
        super().__init__()
        check_number("steps", steps, least=1, integer=True, example="1000")
        self.steps = steps

    def _oldest(self, begin: int, step: int) -> float:
        del begin
        return step - self.steps


class HalfRun(Estimator):
    """Averages over the second half of the run so far (Yaida's half-running average).

    Source:
        Yaida 2018, arXiv:1810.00004: the first half is dropped as transient.

    Example:
        >>> half = HalfRun()
        >>> for step in range(9):
        ...     half.add({"x": torch.tensor(float(step))}); half.close(step)
        >>> half.averages()["x"].item()   # mean of 5, 6, 7, 8
        6.5
    """

    max_blocks = 64

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
        check_number("decay", decay, above=0, below=1, example="0.95")
        self.decay = decay
        self._state.span = max(1, round(1.0 / (8.0 * (1.0 - decay))))

    def _oldest(self, begin: int, step: int) -> float:
        del begin, step
        return float("-inf")

    def close(self, step: int, levels: Mapping[str, Tensor] | None = None) -> None:
        """End the open block and let the older ones decay by as many samples."""
        samples = self._state.open_weight = float(self._state.open_weight)
        # open_weight = (1 - decay^n) / (1 - decay), so decay^n follows from it without a counter
        factor = 1.0 - samples * (1.0 - self.decay)
        for block in self._state.blocks:
            block.sums = block.sums * factor
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

    def reset(self, *, everything: bool = False) -> None:
        """Forget the window; the block length stays."""
        span = self._state.span
        super().reset(everything=everything)
        self._state.span = span
