"""Grow the batch towards the measured noise scale, instead of lowering the learning rate.

Twice the batch and half the learning rate make the same noise (Smith, Kindermans, Ying, Le 2017), and the
former takes half the updates, for as long as the batch stays below the noise scale (McCandlish et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from ..errors import InputError, check_choice, check_flag, check_number
from ..observables import GradientNoiseScale, Observable
from ..observables.gradient_noise_scale import SCALE, SCALE_LOWER_BOUND
from ..record.readings import Decision
from .base import Controller, Effect, State, View
from .sampler import GrowingBatchSampler

__all__ = [
    "NoiseScaleBatchSize",
]

Coupling = Literal["keep", "optimal", "noise"]
GROWTH = 2
"""What the batch is multiplied by: one power of two at a time."""
WORTH_IT = 1.5
"""The noise scale must be above the batch by this factor."""
SHARE = 10
"""Of the data set's N examples, a batch holds N / 10 at most: beyond that its noise is no longer 1 / B."""
_SCALE, _LOWER_BOUND = (GradientNoiseScale.key(name) for name in (SCALE, SCALE_LOWER_BOUND))


class _Found(NamedTuple):
    """The batch size, the noise scale, why the batch is not to grow, and whether it is called for.

    The reason is empty where there is none; the last is ``None`` where nobody can say.
    """

    batch: int
    scale: float
    why_not: str
    calls_for_more: bool | None


@dataclass(frozen=True, kw_only=True)
class NoiseScaleBatchSize(Controller):
    r"""Double the batch when the gradient noise scale has called for it at several checks in a row.

    A check calls for more where ``kappa`` times ``noise/scale`` is above one and a half times the batch, and
    the lower end of its 95 % interval is above the batch, too. A noise scale that is not resolved never
    moves anything: it neither counts as a check nor begins the count anew. The batch never shrinks.

    The batch grows in one of two ways. With a ``sampler``, its size is doubled between two batches. Without
    one, gradients are accumulated over twice as many micro-batches: the Lightning callback sets
    ``accumulate_grad_batches`` where that is safe; a plain loop reads ``monitor.accumulation`` after each
    step.

    Args:
        sampler: The batch sampler of the training loader; ``None`` to accumulate.
        kappa: The batch that is aimed at, in noise scales. At 1 a run takes twice the fewest steps that any
            batch would take, and twice the fewest examples.
        learning_rate: What goes with a doubled batch: ``"keep"`` lets the noise fall, as a decayed rate
            would; ``"optimal"`` follows the best rate, :math:`\epsilon(B) \propto 1 / (1 + B_{noise} / B)`,
            for optimizers other than SGD its square root; ``"noise"`` doubles the rate, so that
            :math:`g = \epsilon N / 2B` stays the same.
        check_every: Steps between checks.
        patience: Checks in a row that must call for more, not counting those without a resolved scale.
        max_batch_size: Examples in a batch of all processes, at most. A tenth of the data set is the limit in
            any case; where the data set has no known size, this must be given.
        dry_run: Say what would be done, and change nothing.

    Units:
        Batch sizes and the noise scale are in examples.

    Raises:
        InputError: If a setting cannot be used; by the monitor, if there is no limit to the batch.

    Source:
        Smith et al. 2017, arXiv:1711.00489; McCandlish et al. 2018, arXiv:1812.06162, eq. 2.7 for the best
        learning rate.

    Example:
        >>> from torch.utils.data import DataLoader, RandomSampler
        >>> sampler = GrowingBatchSampler(RandomSampler(range(640)), 8)
        >>> loader = DataLoader(range(640), batch_sampler=sampler)
        >>> growing = NoiseScaleBatchSize(sampler=sampler)      # for Monitor(controllers=[growing])
        >>> sorted(growing.turns())
        ['batch_size']
    """

    knobs: ClassVar[tuple[str, ...]] = ("batch_size",)

    sampler: GrowingBatchSampler | None = None
    kappa: float = 1.0
    learning_rate: Coupling = "keep"
    check_every: int = 100
    patience: int = 3
    max_batch_size: int | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that no run can use."""
        if self.sampler is not None and not isinstance(self.sampler, GrowingBatchSampler):
            raise InputError(
                "sampler must be the loader's GrowingBatchSampler",
                got=type(self.sampler).__name__,
                fix="Write sampler = GrowingBatchSampler(RandomSampler(dataset), 32), "
                "DataLoader(dataset, batch_sampler=sampler) and NoiseScaleBatchSize(sampler=sampler).",
            )
        check_number("kappa", self.kappa, above=0)
        check_choice("learning_rate", self.learning_rate, get_args(Coupling))
        check_number("check_every", self.check_every, least=1, integer=True)
        check_number("patience", self.patience, least=1, integer=True)
        check_number("max_batch_size", self.max_batch_size, least=1, integer=True, optional=True)
        check_flag("dry_run", self.dry_run)

    def turns(self) -> frozenset[str]:
        """The batch size, and the learning rate where it follows."""
        return frozenset(self.knobs) | ({"learning_rate"} if self.learning_rate != "keep" else set())

    def observables(self) -> tuple[Observable, ...]:
        """The gradient noise scale."""
        return (GradientNoiseScale(),)

    def check_run(self, dataset_size: int | None) -> None:
        """Refuse a run in which nothing would stop the batch from growing."""
        if dataset_size is None and self.max_batch_size is None:
            raise InputError(
                "NoiseScaleBatchSize has no limit on a data set of unknown size",
                fix="Write NoiseScaleBatchSize(max_batch_size=1024), or give Monitor(dataset_size=...).",
            )

    @property
    def accumulates(self) -> bool:
        """Where it has no sampler."""
        return self.sampler is None

    def check_loader(self, loader: Any) -> None:
        """Refuse a loader that draws its batches from another sampler."""
        several = isinstance(loader, (Mapping, Sequence)) or hasattr(loader, "flattened")
        if self.sampler is not None and several:
            raise InputError(
                "NoiseScaleBatchSize acts on one training loader",
                got=type(loader).__name__,
                fix="Train on one loader, or leave sampler= out and accumulate.",
            )
        used = getattr(loader, "batch_sampler", self.sampler)  # what hides its sampler is seen by its batches
        if self.sampler is not None and used is not self.sampler:
            raise InputError(
                "the training loader does not draw its batches from the sampler of NoiseScaleBatchSize",
                got=type(used).__name__,
                fix="Write DataLoader(dataset, batch_sampler=sampler); on several processes "
                "GrowingBatchSampler(DistributedSampler(dataset), 32) and "
                "Trainer(use_distributed_sampler=False).",
            )

    def start(self) -> State:
        """The batch as the script makes it."""
        numbers = {"streak": 0, "grown": 1, "asked": 0, "waited": 0, "size": 0, "accumulation": 0}
        return {"next": 1, "factor": 1.0, **numbers}

    def effect(self, state: State) -> Effect:
        """The micro-batches and the learning rate reached so far."""
        return Effect({"": state["factor"]}, state["accumulation"] or None)

    def apply(self, state: State) -> None:
        """Set the sampler's size."""
        if self.sampler is not None and state["size"]:
            self.sampler.batch_size = state["size"]

    def decide(self, view: View, state: State) -> tuple[list[Decision], State, str]:
        """One check: twice the batch, or the reason for none."""
        scale = self._find(view, state)
        streak = 0 if scale.calls_for_more is False else state["streak"] + bool(scale.calls_for_more)
        why_not = scale.why_not
        if not why_not and streak < self.patience:
            why_not = f"called for at {streak} of the {self.patience} checks in a row that are asked for"
        waited = 0 if self._followed(view, state) else state["waited"] + 1
        after = {**state, "next": view.step + self.check_every, "streak": streak, "waited": waited}
        made = [self._decision(view, "batch_size", scale.batch, 1.0 if why_not else GROWTH, why_not)]
        if not why_not:
            factor = self._rate_factor(view, scale)
            after |= {
                "streak": 0,
                "grown": state["grown"] * GROWTH,
                "asked": scale.batch * GROWTH,
                "factor": state["factor"] * factor,
            }
            if self.sampler is not None:
                after["size"] = (state["size"] or self.sampler.batch_size) * GROWTH
            else:
                after["accumulation"] = (state["accumulation"] or view.micro_batches) * GROWTH
            if factor != 1.0:
                before = view.groups[0].lr * (state["factor"] if self.dry_run else 1.0)
                made.append(self._decision(view, "learning_rate", before, factor, ""))
        return made, after, self._advice(scale.batch, state) if waited > 1 else ""

    def _find(self, view: View, state: State) -> _Found:
        """Whether the noise scale calls for more."""
        batch = view.batch_size * (state["grown"] if self.dry_run else 1)
        scale = view.number(_SCALE)
        reading = view.readings.get(_SCALE)
        limit = min(self.max_batch_size or math.inf, (view.dataset_size or math.inf) / SHARE)
        why_not, calls = "", None
        if not batch:
            why_not = "the size of the batch is not known: call monitor.micro_batch(x, y)"
        elif self.sampler is None and not (state["accumulation"] or view.micro_batches):
            why_not = "this step's batch is not of the usual size"
        elif reading is None or math.isnan(scale):
            why_not = f"the noise scale is {reading.why}" if reading else "the noise scale was not recorded"
        elif not self._followed(view, state):
            why_not = f"the batch is not yet the {state['asked']} examples asked for"
        elif self.kappa * scale <= WORTH_IT * batch:
            why_not, calls = f"the noise scale calls for no more than {WORTH_IT:g} times the batch", False
        elif not self.kappa * reading.low > batch:
            why_not, calls = "the lower end of the noise scale's interval is not above the batch", False
        else:
            calls = True
            if GROWTH * batch > limit:
                why_not = f"the batch would be above its limit of {limit:.0f}"
        return _Found(batch, scale, why_not, calls)

    def _followed(self, view: View, state: State) -> bool:
        """Whether the batches are what they were last set to, in units of that setting."""
        parts = view.micro_batches  # 0 where this step's are not the usual ones, and say nothing
        if self.dry_run:
            return True
        if self.sampler is None:
            return not parts or parts >= state["accumulation"]
        return view.batch_size >= state["size"] * max(parts, 1) * view.processes

    def _advice(self, batch: int, state: State) -> str:
        """What to tell where the script does not take up a change."""
        fix = (
            "pass the sampler to the training loader, as batch_sampler="
            if self.sampler is not None
            else "read monitor.accumulation after each step, and accumulate that many micro-batches"
        )
        return (
            f"NoiseScaleBatchSize asked for a batch of {state['asked']}, and it is still {batch}: {fix}. "
            "It does nothing more until then."
        )

    def _rate_factor(self, view: View, scale: _Found) -> float:
        """What the learning rate is multiplied by when the batch is doubled."""
        if self.learning_rate == "keep":
            return 1.0
        if self.learning_rate == "noise":
            return float(GROWTH)
        ratio = (1 + scale.scale / scale.batch) / (1 + scale.scale / (GROWTH * scale.batch))
        return ratio if all(group.is_sgd for group in view.groups) else math.sqrt(ratio)

    def _decision(self, view: View, knob: str, before: float, factor: float, why_not: str) -> Decision:
        rule = f"{self.kappa:g} {_SCALE} > {WORTH_IT:g} batch and its low end > batch"
        return Decision(
            step=view.step,
            controller=type(self).__name__,
            knob=knob,
            rule=f"{rule}, at {self.patience} checks in a row",
            read=view.seen(_SCALE, _LOWER_BOUND),
            before=float(before),
            factor=factor,
            reason=why_not or f"called for at {self.patience} checks in a row",
            dry_run=self.dry_run,
        )
