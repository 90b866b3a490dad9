"""Where the noise scale comes from: gradients of parts of a batch, from every place a run offers them.

A part is one example, one micro-batch, one process's batch or a piece of a batch that was split. Every
source ends in the same :class:`~gradiometer.collect.snapshot.GradientParts`: squared norms of the parts' own
mean gradients, whatever the loss was divided by. Or it ends in a refusal, and who asked decides what to do.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import parallel
from ..autodiff.functional import examples
from ..autodiff.products import split_gradients
from ..autodiff.ride_along import RideAlong, refusal
from ..errors import GradiometerError, SampleSkippedError, UnsupportedError
from ..optimizers.adam import Preconditioner
from ..optimizers.base import family_of
from ..stats.linalg import accumulation_dtype, real_numbers, squared_norms
from .base import Collector, Memory, MomentName, Step, Training, no_micro_batch
from .parameter_hooks import ParameterHooks, entries
from .snapshot import GradientParts

FEWEST_NORMALISED = 8
"""Examples in a piece that batch norm normalises: over fewer, the noise is that of the normalisation."""
LEAST_COVERAGE = 0.5
"""Share of the parameters that single examples must be seen of, where a batch can be split instead: noise
differs between layers by factors, and with fewer the reading would be that of the layers that have rules."""
NORM_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
Refusal: TypeAlias = SampleSkippedError | UnsupportedError
"""Why parts cannot be had, at this step or on this run."""
_ACCUMULATE = "Accumulate over two or more micro-batches (Lightning: accumulate_grad_batches=2)"


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
        self._mean = training.loss_reduction == "mean"

    @property
    def _divisor(self) -> float:
        """What each micro-batch's loss was divided by; 1 under a summed loss unless it is known."""
        if self.step.loss_divisor is not None:
            return self.step.loss_divisor
        return float(len(self.step.sizes)) if self._mean else 1.0

    def _parts(
        self,
        source: str,
        names: Sequence[str],
        sq_norms: Tensor,
        sizes: Tensor,
        batch_sq_norm: Tensor,
        *,
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
        plain, *preconditioned = [
            GradientParts(
                source=source,
                sq_norms=sq_norms[..., m],
                sizes=sizes,
                shares=shares,
                batch_sq_norm=batch_sq_norm[..., m],
                weight=finite[m].to(batch_sq_norm.dtype),
                parameters=counts,
                coverage=float(counts.sum()) / sum(map(real_numbers, self._trained.values())),
                skipped=skipped or {},
                processes=processes,
            )
            for m in range(len(finite))
        ]
        return dataclasses.replace(plain, preconditioned=preconditioned[0]) if preconditioned else plain

    def _batch_squares(self, names: Sequence[str], factor: float) -> Tensor:
        """Squared norm of the mean gradient from ``.grad``, unclipped, ``[U, M]``."""
        covered = [p for p in (self._trained[name] for name in names) if p.grad is not None]
        squares = self._squares(covered, [p.grad for p in covered if p.grad is not None])
        return squares * (factor / self.step.grad_scale) ** 2

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


class ExampleSource(_Source):
    """Single examples of the step's first micro-batch, by riding along with its own two passes.

    The first time, each parameter's gradient is compared with the sum over the examples; where something
    else adds to it, it is left out from then on.
    """

    layers: ClassVar[tuple[type[nn.Module], ...] | None] = None
    name: ClassVar[str] = "per example"

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._tape: RideAlong | None = None
        # why a parameter's gradient is more than the sum of its examples', or "" where it is that sum
        self._unaccounted: dict[str, str] = memory.setdefault("unaccounted", {})
        self._hooks: ParameterHooks | None = None
        self.refusal: str | None = None
        self._wanted = self._trained
        if self.layers is not None:
            of_layers = {
                id(p)
                for m in training.model.modules()
                if isinstance(m, self.layers)
                for p in m.parameters(recurse=False)
            }
            self._wanted = {name: p for name, p in self._trained.items() if id(p) in of_layers}

    def enter(self, size: int) -> None:
        """Hook the layers in the first micro-batch, and the parameters if more are to come."""
        if len(self.step.sizes) > 1:
            return
        self.refusal = refusal(self.training.model)
        if self.refusal is None and not self._wanted:
            self.refusal = f"the model has none of the layers of source={self.name!r}"
        if self.refusal is not None:
            return
        reasons, metric = self._unaccounted, self.step.metric
        self._tape = RideAlong(
            self.training.model,
            size,
            [p for name, p in self._wanted.items() if not reasons.get(name)],
            metric=None if metric is None else lambda p: _squared(metric.of(p)),
            check=not self._wanted.keys() <= reasons.keys(),
        )
        self._hooks = ParameterHooks(self._wanted)
        if self.step.micro_batches_before != 1:
            self._hooks.attach(metric)

    def exit(self) -> None:
        """Take the hooks off."""
        if self._tape is not None:
            self._tape.detach()
        if self._hooks is not None:
            self._hooks.detach()

    def close(self) -> None:
        """Take the hooks off."""
        self.exit()

    def measure(self) -> GradientParts | Refusal:
        """Reduce everything while ``.grad`` is still unclipped."""
        if not self.step.sizes:
            return no_micro_batch()
        if self._tape is None or self._hooks is None:
            return UnsupportedError(
                f"per-example gradients are not available: {self.refusal}",
                fix=f"{_ACCUMULATE}, or leave GradientNoiseScale out of observables=.",
            )
        if not any(p.grad is not None for p in self._wanted.values()):
            return SampleSkippedError("no parameter has a gradient at this step")
        try:
            by_parameter, skipped = self._tape.result()
        except (SampleSkippedError, UnsupportedError) as refusal:
            return refusal
        self.seconds_in_hooks += self._tape.seconds + self._hooks.seconds
        skipped |= {name: reason for name, reason in self._unaccounted.items() if reason}
        self._remember(skipped)
        names, size, divisor = list(by_parameter), self.step.sizes[0], self._divisor
        scale = divisor / self.step.loss_scale
        sq_norms = self._rows(by_parameter) * (scale * (size if self._mean else 1.0)) ** 2
        share = 1.0 if self._mean else 1.0 / size
        if len(self.step.sizes) == 1:
            batch_sq_norm = self._batch_squares(names, divisor * share)
        else:
            self._hooks.check()
            if not self._hooks.norms:
                return SampleSkippedError("this step has several micro-batches where the last had one")
            norms = {name: self._hooks.norms[name] for name in names}
            batch_sq_norm = self._sums(norms) * (scale * share) ** 2
        # the gradient of one micro-batch among several is this process's own
        processes = parallel.world_size() if len(self.step.sizes) == 1 else 1
        ones = torch.ones(size, dtype=torch.int64)
        return self._parts(
            self.name, names, sq_norms, ones, batch_sq_norm, processes=processes, skipped=skipped
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

    def _remember(self, skipped: Mapping[str, str]) -> None:
        """Which parameters have been looked at; one without any gradient is looked at again."""
        comparison = self._tape.comparison if self._tape is not None else None
        for name in comparison.judged if comparison is not None else ():
            self._unaccounted[name] = skipped.get(name, "")


def _squared(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.square()


class NormLayerSource(ExampleSource):
    """Single examples as the norm layers alone see them (Gray et al. 2024, arXiv:2411.00999)."""

    layers = NORM_LAYERS
    name = "norm layers"


class MicroBatchSource(_Source):
    """Micro-batches of gradient accumulation, on every process."""

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._hooks = ParameterHooks(self._trained)
        self._micro: list[dict[str, Tensor]] = []

    def enter(self, size: int) -> None:
        """Hook the parameters for one backward pass."""
        self._hooks.attach(self.step.metric)

    def exit(self) -> None:
        """Note what came."""
        self._hooks.detach()
        self._micro.append(self._hooks.norms)

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.detach()

    def measure(self) -> GradientParts | Refusal:
        """Reduce everything while ``.grad`` is still unclipped."""
        if not self.step.sizes:
            return no_micro_batch()
        if not any(p.grad is not None for p in self._trained.values()):
            return SampleSkippedError("no parameter has a gradient at this step")
        self._hooks.check()
        self.seconds_in_hooks += self._hooks.seconds
        # a micro-batch that was given up has no backward pass and is no part of the gradient
        seen = [(norms, n) for norms, n in zip(self._micro, self.step.sizes, strict=True) if norms]
        if len(seen) * parallel.world_size() < 2:
            return SampleSkippedError("fewer than two micro-batches of this step had a backward pass")
        self.step.sizes = [n if norms else 0 for norms, n in zip(self._micro, self.step.sizes, strict=True)]
        sizes = torch.tensor([n for _, n in seen])
        factors = torch.full((len(seen),), self._divisor / self.step.loss_scale, dtype=torch.float64)
        if not self._mean:
            factors /= sizes
        rows = torch.stack([self._sums(norms) for norms, _ in seen])
        sq_norms = rows * factors.to(rows)[:, None, None].square()
        names = [name for name in self._trained if any(name in norms for norms, _ in seen)]
        factor = self._divisor / (len(seen) if self._mean else int(sizes.sum()))
        batch_sq_norm = self._batch_squares(names, factor)
        processes = parallel.world_size()
        return self._parts(self._name(len(seen)), names, sq_norms, sizes, batch_sq_norm, processes=processes)

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

    pieces: ClassVar[int] = 8

    def measure(self) -> GradientParts | Refusal:
        """Make the passes; the loss's own reduction is over examples."""
        if self.training.loss_fn is None:
            return UnsupportedError(
                "a batch can only be split where the loss is known",
                fix="Pass loss_fn=, which maps outputs and targets to the loss.",
            )
        if self.step.batch is None:
            return no_micro_batch()
        x, y = self.step.batch
        normalised = any(isinstance(m, _BatchNorm) and m.training for m in self.training.model.modules())
        least = FEWEST_NORMALISED if normalised else 1
        pieces = min(self.pieces, examples(x) // least)
        if pieces < 2:
            return SampleSkippedError(
                f"a batch is split into two or more pieces of {least} or more examples", got=examples(x)
            )
        parameters = list(self._trained.values())
        gradients, counts = split_gradients(
            self.training.model, self.training.loss_fn, x, y, pieces, parameters=parameters
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

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._micro = MicroBatchSource(training, step, memory)
        self._examples: ExampleSource | None = None

    def enter(self, size: int) -> None:
        """Hook the parameters; ride along too unless parts of another kind are known to come."""
        self._micro.enter(size)
        if len(self.step.sizes) == 1 and self.step.micro_batches_before < 2 and parallel.world_size() == 1:
            self._examples = ExampleSource(self.training, self.step, self.memory)
            self._examples.enter(size)
        elif self._examples is not None:
            self._examples.close()

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
        if len(self.step.sizes) > 1 or parallel.world_size() > 1 or not self.step.sizes:
            return self._micro.measure()
        if self._examples is None:
            return SampleSkippedError("this step has one micro-batch where the last had several")
        measured = self._examples.measure()
        if self.training.loss_fn is not None and _covers_too_little(measured):
            return SplitSource(self.training, self.step, self.memory).measure()
        return measured

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
