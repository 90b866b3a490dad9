"""Where the noise scale comes from: gradients of parts of a batch, from every place a run offers them.

A part is one example, one micro-batch, one process's batch or a piece of a batch that was split. Every
source ends in the same :class:`~gradiometer.collect.snapshot.GradientParts`: squared norms of the parts' own
mean gradients, whatever the loss was divided by. Or it ends in a refusal, and who asked decides what to do.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import parallel
from ..autodiff.functional import examples
from ..autodiff.products import split_gradients
from ..autodiff.ride_along import RideAlong, refusal
from ..errors import GradiometerError, SampleSkippedError, TooEarlyError, UnsupportedError
from ..optimizers.adam import Preconditioner
from ..optimizers.base import family_of
from ..stats.linalg import accumulation_dtype, real_numbers, squared_norms
from .base import ACCUMULATE, Collector, Memory, MomentName, Step, Training, no_micro_batch
from .parameter_hooks import Received, entries
from .parts_and_whole import Accounts, Balance, foreign
from .snapshot import GradientParts

FEWEST_NORMALISED = 8
"""Examples in a piece that batch norm normalises: over fewer, the noise is that of the normalisation."""
LEAST_COVERAGE = 0.5
"""Share of the parameters that single examples must be seen of, where a batch can be split instead: noise
differs between layers by factors, and with fewer the reading would be that of the layers that have rules."""
MOST_SINGLE = 64
"""Pieces that a batch is split into at the first step, where single examples could not be seen yet."""
NORM_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
Refusal: TypeAlias = SampleSkippedError | UnsupportedError
"""Why parts cannot be had, at this step or on this run."""
_INSTEAD = f"{ACCUMULATE}, or pass loss_fn= to have batches split, or leave GradientNoiseScale out."
_FOREIGN = (
    "per-example gradients are not available: the gradient is more than the sum over the examples (a penalty "
    "in the loss, a derivative of the gradient, weights tied by hand)"
)
_NOT_ALL = "its gradient is not all from its module's calls (tied by hand, a penalty)"
TRIES = 3
"""Samples in a row at which something adds to a gradient, before it is taken to stay so."""


class PreconditionerCollector(Collector):
    """Makes this step's sources measure in Adam's metric too."""

    moment: ClassVar[MomentName] = "before_step"

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._metric: Preconditioner = family_of(training.optimizer).metric(training.optimizer)

    def result(self) -> Preconditioner:
        """The metric itself."""
        return self._metric


class PartsCollector(Collector):
    """Supplies gradient parts, which are measured before the step while ``.grad`` is still unclipped."""

    moment: ClassVar[MomentName] = "before_step"

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._measured: GradientParts | Refusal | None = None

    @abstractmethod
    def measure(self) -> GradientParts | Refusal:
        """The norms of this step's parts, or why they cannot be had."""

    def before_step(self) -> None:
        """Measure once."""
        self._measured = self.measure()

    def result(self) -> GradientParts:
        """The norms of this step's parts."""
        if self._measured is None:
            raise SampleSkippedError(
                "the gradient was not seen before the step",
                fix="Call monitor.before_step(); in a closure of the optimizer's, after its backward pass.",
            )
        if isinstance(self._measured, GradiometerError):
            raise self._measured
        return self._measured


class _Source(PartsCollector):
    """What all sources share: the parameters that are trained, the loss's reduction, the metrics.

    A last axis M holds the plain squared norm and, where it is asked for, that in the optimizer's metric.
    """

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        stepped = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
        self._trained = {
            name: p for name, p in training.model.named_parameters() if p.requires_grad and id(p) in stepped
        }

    @property
    def _mean(self) -> bool:
        """Whether the loss is a mean over the examples."""
        return self.step.reduction == "mean"

    def _divisor(self, balance: Balance) -> float:
        """What each micro-batch's loss was divided by; 1 under a summed loss unless it is known."""
        if self.step.loss_divisor is not None:
            return self.step.loss_divisor
        return float(len(self.step.sizes)) if self._mean and not balance.averaged else 1.0

    def _parts(
        self,
        source: str,
        names: Sequence[str],
        sq_norms: Tensor,
        sizes: Tensor,
        batch_sq_norm: Tensor,
        *,
        balance: Balance | None = None,
        processes: int = 1,
        skipped: dict[str, str] | None = None,
    ) -> GradientParts | Refusal:
        """Put mean gradients of parts ``[k, U, M]`` and of the batch ``[U, M]`` into a snapshot's form."""
        finite = sq_norms.isfinite().all(1).all(0) & batch_sq_norm.isfinite().all(0)
        if self.step.recording and not bool(finite[0]):  # else nobody waits for the device
            return SampleSkippedError("the gradient is not finite at this step")
        shares = torch.full((len(sizes),), 1.0 / len(sizes), dtype=torch.float64)
        if not self._mean:
            shares = sizes.double() / sizes.sum()
        covered = [self._trained[name] for name in names]
        counts = self.step.sections.reduce(covered, torch.tensor([real_numbers(p) for p in covered]))
        sq_norms, batch_sq_norm = sq_norms.where(finite, 0.0), batch_sq_norm.where(finite, 0.0)
        weights = finite.to(batch_sq_norm.dtype) * (1.0 if balance is None else balance.weight)
        plain, *preconditioned = [
            GradientParts(
                source=source,
                sq_norms=sq_norms[..., m],
                sizes=sizes,
                shares=shares,
                batch_sq_norm=batch_sq_norm[..., m],
                weight=weights[m],
                parameters=counts,
                coverage=float(counts.sum()) / sum(map(real_numbers, self._trained.values())),
                skipped=skipped or {},
                processes=processes,
                note="" if balance is None else balance.note,
                sums=None if balance is None or balance.sums is None else balance.sums.where(finite[m], 0.0),
            )
            for m in range(len(finite))
        ]
        return dataclasses.replace(plain, preconditioned=preconditioned[0]) if preconditioned else plain

    def _batch_squares(self, names: Sequence[str], factor: float, balance: Balance) -> Tensor:
        """Squared norm of the mean gradient from ``.grad``, as it was before it was clipped, ``[U, M]``."""
        covered = [p for p in (self._trained[name] for name in names) if p.grad is not None]
        squares = self._squares(covered, [p.grad for p in covered if p.grad is not None])
        return squares * (factor / (self.step.grad_scale * balance.factor)) ** 2

    def _squares(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Squared norm of a gradient, ``[U, M]``."""
        columns = [self.step.sections.sums(squared_norms, parameters, [entries(g) for g in gradients])]
        if self.step.metric is not None:
            pairs = zip(parameters, gradients, strict=True)
            scaled = [self.step.metric.apply(p, g) for p, g in pairs]
            columns.append(self.step.sections.sums(squared_norms, parameters, scaled))
        return torch.stack(columns, -1)

    def _sums(self, norms: dict[str, Tensor]) -> Tensor:
        """Squared norm of one gradient from the norms of its parameters, ``[U, M]``."""
        parameters = [self._trained[name] for name in norms]
        kind = accumulation_dtype(parameters[0].device)
        squares = torch.stack([norm.to(kind) for norm in norms.values()]).square()
        return self.step.sections.reduce(parameters, squares)


class _HookedSource(_Source):
    """A source that looks at the user's own backward passes, and holds them against ``.grad``."""

    def __init__(
        self, training: Training, step: Step, memory: Memory, accounts: Accounts | None = None
    ) -> None:
        super().__init__(training, step, memory)
        self._shared = accounts is not None
        self.accounts = accounts or Accounts(self._trained, memory)
        self._settled: Balance | SampleSkippedError | None = None

    def enter(self, size: int) -> None:
        """Hook the parameters for one backward pass."""
        if not self._shared:
            self.accounts.enter(size, self.step.metric)

    def exit(self) -> None:
        """Take the hooks off."""
        if not self._shared:
            self.accounts.exit()

    def close(self) -> None:
        """Take the hooks off."""
        self.exit()

    def resize(self, size: int) -> None:
        """The micro-batch has another number of examples than was thought."""
        self.accounts.hooks.micro_batches[-1].size = size

    def settle(self) -> Balance | Refusal:
        """The micro-batches whose gradients are in ``.grad``; the others are taken out of the step."""
        if not self.step.sizes:
            return no_micro_batch()
        if self.step.refusal is not None:
            return self.step.refusal
        if not any(p.grad is not None for p in self._trained.values()):
            return SampleSkippedError("no parameter has a gradient at this step")
        hooks = self.accounts.hooks
        self.seconds_in_hooks, hooks.seconds = self.seconds_in_hooks + hooks.seconds, 0.0
        balance = self.accounts.settle(
            self.step.grad_scale,
            self.step.loss_scale,
            recording=self.step.recording,
            apart=self.step.apart,
        )
        if isinstance(balance, Balance) and balance.micro_batches:
            self.step.sizes[:] = self.accounts.sizes
        return balance


class ExampleSource(_HookedSource):
    """Single examples of the step's first micro-batch, by riding along with its own passes.

    Each parameter's gradient is compared with the sum over the examples. Where something else adds to it at
    the first look, or three times in a row, it is left out from then on.
    """

    keeps_batch: ClassVar[bool] = True
    layers: ClassVar[tuple[type[nn.Module], ...] | None] = None
    name: ClassVar[str] = "per example"

    def __init__(
        self, training: Training, step: Step, memory: Memory, accounts: Accounts | None = None
    ) -> None:
        super().__init__(training, step, memory, accounts)
        self._tape: RideAlong | None = None
        self._received: Received | None = None
        self._size = 0
        self._axes: Mapping[nn.Module, int] = {}
        # why a parameter's gradient is more than the sum of its examples', or "" where it is that sum
        self._unaccounted: dict[str, str] = memory.setdefault("unaccounted", {})
        self.refusal: Refusal | None = None
        self.foreign = False
        """Whether something else adds to most of the gradients at this step."""
        self._wanted = self._trained
        if self.layers is not None:
            of_layers = {
                id(p)
                for m in training.model.modules()
                if isinstance(m, self.layers)
                for p in m.parameters(recurse=False)
            }
            self._wanted = {name: p for name, p in self._trained.items() if id(p) in of_layers}
            if accounts is None:
                self.accounts = Accounts(self._wanted, memory)

    def enter(self, size: int) -> None:
        """Hook the parameters, and in the first micro-batch the layers."""
        super().enter(size)
        given_up = self.step.broken or (self._received is not None and self._received.given_up)
        if self._tape is not None and not given_up:
            return
        self.refusal = self._refusal()
        if self.refusal is not None:
            return
        metric, self._size, self._axes = self.step.metric, size, self.step.axes
        self._received = self.accounts.hooks.micro_batches[-1]
        self._tape = RideAlong(
            self.training.model,
            size,
            [p for name, p in self._wanted.items() if not self._unaccounted.get(name)],
            metric=None if metric is None else lambda p: _squared(metric.of(p)),
            directions=self.accounts.directions,
            several=self.memory.get("several", False),
            axes=self._axes,
        )

    def _refusal(self) -> Refusal | None:
        """Why the layers cannot be hooked."""
        compiled = self.step.compiler.refusal(self.training.model)
        if compiled is not None:
            return compiled
        reason = refusal(self.training.model)
        if reason is None and not self._wanted:
            reason = f"the model has none of the layers of source={self.name!r}"
        if reason is None:
            return None
        return UnsupportedError(f"per-example gradients are not available: {reason}", fix=_INSTEAD)

    def exit(self) -> None:
        """Take the hooks off."""
        super().exit()
        if self._tape is not None:
            self._tape.detach()

    def measure(self) -> GradientParts | Refusal:
        """Reduce everything while ``.grad`` is still unclipped."""
        balance = self.settle()
        if not isinstance(balance, Balance):
            return balance
        reason = self._absent(balance)
        if reason is not None:
            return reason
        assert self._tape is not None
        assert self._received is not None
        try:
            by_parameter, skipped = self._tape.result(self._received.passes)
        except (SampleSkippedError, UnsupportedError) as refusal:
            self.memory["several"] = self.memory.get("several", False) or self._tape.came_again
            return refusal
        self.seconds_in_hooks += self._tape.seconds
        answer = self._accounted(by_parameter)
        if not isinstance(answer, Tensor):
            return answer
        balance = dataclasses.replace(balance, weight=balance.weight * answer)
        skipped |= {name: reason for name, reason in self._unaccounted.items() if reason}
        by_parameter = {name: norms for name, norms in by_parameter.items() if name not in skipped}
        names, size, divisor = list(by_parameter), self._received.size, self._divisor(balance)
        scale = divisor / self.step.loss_scale
        sq_norms = self._rows(by_parameter) * (scale * (size if self._mean else 1.0)) ** 2
        share = 1.0 if self._mean else 1.0 / size
        alone = len(balance.micro_batches) == 1
        if alone:
            batch_sq_norm = self._batch_squares(names, divisor * share, balance)
        else:
            norms = {name: self._received.norms[name] for name in names}
            batch_sq_norm = self._sums(norms) * (scale * share) ** 2
        return self._parts(
            self.name,
            names,
            sq_norms,
            torch.ones(size, dtype=torch.int64),
            batch_sq_norm,
            balance=balance,
            # the gradient of one micro-batch among several is this process's own
            processes=parallel.world_size() if alone else 1,
            skipped=skipped,
        )

    def _rows(self, by_parameter: Mapping[str, Tensor]) -> Tensor:
        """Squared norms of the examples, ``[B, U, M]``."""
        assert self._tape is not None
        metrics: list[Mapping[str, Tensor]] = [by_parameter]
        if self.step.metric is not None:
            unknown = torch.full_like(next(iter(by_parameter.values())), torch.nan)
            metrics.append({name: self._tape.weighted.get(name, unknown) for name in by_parameter})
        rows = torch.stack([torch.stack([norms[name] for name in by_parameter]) for norms in metrics], -1)
        parameters = [self._trained[name] for name in by_parameter]
        return self.step.sections.reduce(parameters, rows.to(accumulation_dtype(rows.device))).transpose(0, 1)

    def _absent(self, balance: Balance) -> Refusal | None:
        """Why single examples were not seen at this step, or do not make up its gradient."""
        reason = self.refusal or self.not_a_plain_mean("its gradient is no plain mean over the examples")
        if reason is not None:
            return reason
        if self._tape is None or self._received is None:
            return no_micro_batch()
        if balance.micro_batches and self._received not in balance.micro_batches:
            return SampleSkippedError("the first micro-batch of this step was given up")
        learned = self.step.axes != self._axes and any(axis > 0 for axis in self.step.axes.values())
        if self._received.size != self._size or learned:
            return TooEarlyError("where the examples of a batch are was not known before its forward pass")
        return None

    def _accounted(self, seen: Collection[str]) -> Tensor | Refusal:
        """Note which parameters' gradients are more than the sums over the examples; the sample's weight.

        Where looking means waiting for the device, the weight alone says it.
        """
        assert self._tape is not None
        assert self._received is not None
        names, apart, judged = foreign(self._tape.expected, self._received)
        if apart.device.type != "cpu" and not self.step.recording:
            return (~apart.any()).to(accumulation_dtype(apart.device))
        wrong = [name for name, is_apart in zip(names, apart.tolist(), strict=True) if is_apart]
        times: dict[str, int] = self.memory.setdefault("wrong_in_a_row", {})
        for name, says_something in zip(names, judged.tolist(), strict=True):
            if says_something and name not in wrong:
                self._unaccounted.setdefault(name, "")
                times.pop(name, None)
        sound = sum(self._wanted[name].numel() for name in seen if name not in wrong)
        self.foreign = bool(wrong) and sound < LEAST_COVERAGE * sum(p.numel() for p in self._wanted.values())
        waiting = [name for name in wrong if self.foreign or name in self._unaccounted]
        for name in waiting:
            times[name] = times.get(name, 0) + 1
        if any(times[name] < TRIES for name in waiting):
            return SampleSkippedError(_FOREIGN, fix=_INSTEAD)
        self._unaccounted.update(dict.fromkeys(wrong, _NOT_ALL))
        return torch.ones(()) if sound else UnsupportedError(_FOREIGN, fix=_INSTEAD)


def _squared(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.square()


class NormLayerSource(ExampleSource):
    """Single examples as the norm layers alone see them (Gray et al. 2024, arXiv:2411.00999)."""

    layers = NORM_LAYERS
    name = "norm layers"


class MicroBatchSource(_HookedSource):
    """Micro-batches of gradient accumulation, on every process."""

    def measure(self) -> GradientParts | Refusal:
        """Reduce everything while ``.grad`` is still unclipped."""
        balance = self.settle()
        if not isinstance(balance, Balance):
            return balance
        seen = balance.micro_batches
        if len(seen) * parallel.world_size() < 2:
            return SampleSkippedError("fewer than two micro-batches of this step had a backward pass")
        sizes = torch.tensor([received.size for received in seen])
        factors = torch.full((len(seen),), self._divisor(balance) / self.step.loss_scale, dtype=torch.float64)
        if not self._mean:
            factors /= sizes
        rows = torch.stack([self._sums(received.norms) for received in seen])
        sq_norms = rows * factors.to(rows)[:, None, None].square()
        # a parameter without a gradient in this process's pass still has one in the mean over processes
        names = [name for name, p in self._trained.items() if p.grad is not None]
        factor = self._divisor(balance) / (len(seen) if self._mean else int(sizes.sum()))
        batch_sq_norm = self._batch_squares(names, factor, balance)
        return self._parts(
            self._name(len(seen)),
            names,
            sq_norms,
            sizes,
            batch_sq_norm,
            balance=balance,
            processes=parallel.world_size(),
        )

    @staticmethod
    def _name(micro_batches: int) -> str:
        processes = parallel.world_size()
        if processes == 1:
            return "micro-batches"
        return f"{processes} processes" if micro_batches == 1 else f"micro-batches of {processes} processes"


class SplitSource(_Source):
    """The step's last micro-batch, split: a pass of its own for each piece, in the modes of training.

    The batch's gradient is the mean over the pieces, so that batch norm, which normalises within each,
    is the same in both.
    """

    keeps_batch: ClassVar[bool] = True
    most_pieces = 8

    def measure(self) -> GradientParts | Refusal:
        """Make the passes; the loss's own reduction is over examples."""
        if self.step.refusal is not None:
            return self.step.refusal
        try:
            batch = self.own_batch("a batch can only be split where the loss is known")
        except (SampleSkippedError, UnsupportedError) as refusal:
            return refusal
        normalised = any(isinstance(m, _BatchNorm) and m.training for m in self.training.model.modules())
        least = FEWEST_NORMALISED if normalised else 1
        pieces = min(self.most_pieces, examples(batch.inputs) // least)
        if pieces < 2:
            return SampleSkippedError(
                f"a batch is split into two or more pieces of {least} or more examples",
                got=examples(batch.inputs),
                fix=f"Use batches of {2 * least} or more examples, or accumulate over several micro-batches.",
            )
        parameters = list(self._trained.values())
        gradients, counts = split_gradients(
            self.training.model,
            batch.loss_fn,
            batch.inputs,
            batch.targets,
            pieces,
            parameters=parameters,
            forward=batch.forward,
        )
        sizes = counts.double()
        factors = torch.ones_like(sizes) if self._mean else 1.0 / sizes
        shares = torch.full_like(sizes, 1.0 / pieces) if self._mean else sizes / sizes.sum()
        rows = torch.stack([self._squares(parameters, piece) for piece in gradients])
        sq_norms = rows * factors.to(rows)[:, None, None].square()
        total = [torch.zeros_like(p) for p in parameters]
        for piece, factor in zip(gradients, (shares * factors).tolist(), strict=True):
            torch._foreach_add_(total, piece, alpha=factor)
        batch_sq_norm = self._squares(parameters, total)
        return self._parts("split batch", list(self._trained), sq_norms, counts, batch_sq_norm)


class AutoSource(PartsCollector):
    """The best source at hand: micro-batches and processes, else single examples, else a split batch.

    A batch is split where the loss is known and single examples are seen of too few parameters.
    """

    keeps_batch: ClassVar[bool] = True

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._micro = MicroBatchSource(training, step, memory)
        self._examples: ExampleSource | None = None

    def enter(self, size: int) -> None:
        """Hook the parameters; ride along too unless parts of another kind are known to come."""
        self._micro.enter(size)
        first = len(self.step.sizes) == 1 and self.step.micro_batches_before < 2
        if self._examples is None and first and parallel.world_size() == 1:
            self._examples = ExampleSource(
                self.training, self.step, self.memory, accounts=self._micro.accounts
            )
        if self._examples is not None:
            self._examples.enter(size)

    def resize(self, size: int) -> None:
        """The micro-batch has another number of examples than was thought."""
        self._micro.resize(size)

    def exit(self) -> None:
        """A backward pass is done."""
        self._micro.exit()
        if self._examples is not None:
            self._examples.exit()

    def measure(self) -> GradientParts | Refusal:
        """Choose by what came."""
        measured = self._choose()
        self.seconds_in_hooks = self._micro.seconds_in_hooks
        if self._examples is not None:
            self.seconds_in_hooks += self._examples.seconds_in_hooks
        return measured

    def _choose(self) -> GradientParts | Refusal:
        balance = self._micro.settle()
        if not isinstance(balance, Balance):
            return balance
        if len(self.step.sizes) > 1 or parallel.world_size() > 1:
            return self._micro.measure()
        if self._examples is None:
            return SampleSkippedError("this step has one micro-batch where the last had several")
        measured = self._examples.measure()
        if self.step.batch is None:
            return measured
        split = SplitSource(self.training, self.step, self.memory)
        if isinstance(measured, TooEarlyError):
            split.most_pieces = MOST_SINGLE
            return split.measure()
        too_little = self._examples.foreign or _covers_too_little(measured)
        return split.measure() if too_little else measured

    def close(self) -> None:
        """Take the hooks off."""
        self._micro.close()
        if self._examples is not None:
            self._examples.close()


def _covers_too_little(measured: GradientParts | Refusal) -> bool:
    """Whether single examples are never seen, or of too few parameters."""
    if isinstance(measured, GradientParts):
        return measured.coverage < LEAST_COVERAGE
    return isinstance(measured, UnsupportedError)
