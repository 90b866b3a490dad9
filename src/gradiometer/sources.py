"""Where the noise scale comes from: gradients of parts of a batch, from every place a run offers them.

A part is one example, one micro-batch, one process's batch or a piece of a batch that was split. Every
source ends in the same :class:`~gradiometer.snapshot.Chunks`: squared norms of the parts' own mean
gradients, whatever the loss was divided by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import parallel
from .autodiff.functional import examples
from .autodiff.products import split_gradients
from .autodiff.ride_along import RideAlong, refusal
from .collectors import Collector, MomentName, Run, no_micro_batch
from .errors import SampleSkippedError, UnsupportedError
from .linalg import accumulation_dtype, squared_norms
from .snapshot import Chunks

NORM_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_ACCUMULATE = "Accumulate over two or more micro-batches (Lightning: accumulate_grad_batches=2)"


class ParameterHooks:
    """Norms of the gradient each parameter receives in one backward pass on this process.

    A hook on a parameter sees the gradient of the one micro-batch, before it is added to ``.grad`` and
    before processes average theirs.

    Args:
        parameters: The parameters, by name.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> hooks = ParameterHooks(dict(net.named_parameters()))
        >>> hooks.attach(); net(torch.ones(1, 2)).sum().backward(); hooks.detach()
        >>> hooks.norms
        {'weight': tensor(1.4142)}
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._handles: list[Any] = []
        self.norms: dict[str, Tensor] = {}
        self.repeated: str | None = None
        self.error: Exception | None = None
        self.seconds = 0.0

    def attach(self) -> None:
        """Look at the next backward pass."""
        self.norms = {}
        self._handles = [p.register_hook(self._hook(name)) for name, p in self._parameters.items()]

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Any:
        def hook(grad: Tensor) -> None:
            began = perf_counter()
            try:
                if name in self.norms:
                    self.repeated = name
                wide = torch.promote_types(grad.dtype, torch.float32)
                self.norms[name] = torch.linalg.vector_norm(grad.detach(), dtype=wide)
            except Exception as error:  # the user's backward goes on; check() raises this
                self.error = self.error or error
            self.seconds += perf_counter() - began

        return hook

    def check(self) -> None:
        """Refuse norms that are not those of whole gradients.

        Raises:
            UnsupportedError: If a parameter received its gradient in pieces.
        """
        if self.error:
            raise self.error
        if self.repeated is not None:
            raise UnsupportedError(
                f"parameter {self.repeated!r} received its gradient in several pieces in one backward "
                "pass (reentrant checkpointing), so the norm of the whole is not known",
                fix="Write checkpoint(..., use_reentrant=False).",
            )


class _Source(Collector):
    """What all sources share: the parameters that are trained, and the loss's reduction."""

    moment: ClassVar[MomentName] = "before_step"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        self._trained = {
            name: p for name, p in run.model.named_parameters() if p.requires_grad and id(p) in held
        }
        self._chunks: Chunks | None = None

    def _divisor(self, micro_batches: int) -> float:
        """What each micro-batch's loss was divided by; 1 under a summed loss unless it is known."""
        if self.run.loss_divisor is not None:
            return self.run.loss_divisor
        return float(micro_batches) if self.run.loss_reduction == "mean" else 1.0

    def _keep(
        self,
        source: str,
        names: Sequence[str],
        sq_norms: Tensor,
        sizes: Tensor,
        whole: Tensor,
        *,
        processes: int = 1,
        skipped: dict[str, str] | None = None,
    ) -> None:
        """Put mean gradients of parts ``[k, U]`` and of the whole ``[U]`` into a snapshot's form."""
        finite = sq_norms.isfinite().all() & whole.isfinite().all()
        if self.run.recording and not bool(finite):  # else nobody waits for the device
            raise SampleSkippedError("the gradient is not finite at this step")
        weights = torch.full((len(sizes),), 1.0 / len(sizes), dtype=torch.float64)
        if self.run.loss_reduction == "sum":
            weights = sizes.double() / sizes.sum()
        covered = [self._trained[name] for name in names]
        counts = self.run.sections.reduce(
            covered, torch.tensor([p.numel() for p in covered], device=whole.device)
        )
        self._chunks = Chunks(
            source=source,
            sq_norms=torch.where(finite, sq_norms, 0.0),
            sizes=sizes,
            weights=weights,
            batch_sq_norm=torch.where(finite, whole, 0.0),
            counted=finite.to(whole.dtype),
            parameters=counts,
            coverage=float(counts.sum()) / sum(p.numel() for p in self._trained.values()),
            skipped=skipped or {},
            processes=processes,
        )

    def _whole(self, names: Sequence[str], factor: float) -> Tensor:
        """Squared norm of the mean gradient from ``.grad``, unclipped, ``[U]``."""
        covered = [p for p in (self._trained[name] for name in names) if p.grad is not None]
        gradients = [p.grad for p in covered]
        return self.run.sections.sums(squared_norms, covered, gradients) * (factor / self.run.grad_scale) ** 2

    def _sums(self, norms: dict[str, Tensor]) -> Tensor:
        """Squared norm of one gradient from the norms of its parameters, ``[U]``."""
        held = [self._trained[name] for name in norms]
        kind = accumulation_dtype(held[0].device)
        squares = torch.stack([norm.to(kind) for norm in norms.values()]).square()
        return self.run.sections.reduce(held, squares)

    def result(self) -> Chunks:
        """The norms of this step's parts."""
        if self._chunks is None:
            raise SampleSkippedError(
                "the gradient was not seen before the step", fix="Call monitor.before_step()."
            )
        return self._chunks


class ExampleSource(_Source):
    """Single examples of the step's first micro-batch, by riding along with its own two passes."""

    layers: ClassVar[tuple[type[nn.Module], ...] | None] = None
    name: ClassVar[str] = "per example"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._tape: RideAlong | None = None
        self._hooks: ParameterHooks | None = None
        self.refusal: str | None = None
        self._wanted = self._trained
        if self.layers is not None:
            own = {
                id(p)
                for m in run.model.modules()
                if isinstance(m, self.layers)
                for p in m.parameters(recurse=False)
            }
            self._wanted = {name: p for name, p in self._trained.items() if id(p) in own}

    def enter(self, size: int) -> None:
        """Hook the layers in the first micro-batch, and the parameters if more are to come."""
        if self._tape is not None or len(self.run.sizes) > 1:
            return
        self.refusal = refusal(self.run.model)
        if self.refusal is None and self._wanted:
            self._tape = RideAlong(self.run.model, size, list(self._wanted.values()))
            self._hooks = ParameterHooks(self._wanted)
            if self.run.micro_batches_before != 1:
                self._hooks.attach()

    def exit(self) -> None:
        """Take the hooks off."""
        if self._tape is not None:
            self._tape.detach()
        if self._hooks is not None:
            self._hooks.detach()

    def close(self) -> None:
        """Take the hooks off."""
        self.exit()

    def before_step(self) -> None:
        """Reduce everything while ``.grad`` is still unclipped."""
        if not self.run.sizes:
            raise no_micro_batch()
        if self.refusal is not None or self._tape is None:
            reason = self.refusal or f"the model has none of the layers of source={self.name!r}"
            raise UnsupportedError(
                f"per-example gradients are not available: {reason}",
                fix=f"{_ACCUMULATE}, or leave GradientNoiseScale out of observables=.",
            )
        if not any(p.grad is not None for p in self._wanted.values()):
            raise SampleSkippedError("no parameter has a gradient at this step")
        by_parameter, skipped = self._tape.result()
        self.seconds_in_hooks += self._tape.seconds
        names = list(by_parameter)
        size, micro_batches = self.run.sizes[0], len(self.run.sizes)
        divisor = self._divisor(micro_batches)
        factor = divisor * (size if self.run.loss_reduction == "mean" else 1.0)
        rows = torch.stack(list(by_parameter.values()))
        sums = self.run.sections.reduce(
            [self._trained[name] for name in names], rows.to(accumulation_dtype(rows.device))
        )
        sq_norms = sums.mT * (factor / self.run.loss_scale) ** 2
        own = divisor if self.run.loss_reduction == "mean" else divisor / size
        if micro_batches == 1:
            whole = self._whole(names, own)
        else:
            assert self._hooks is not None
            self._hooks.check()
            if not self._hooks.norms:
                raise SampleSkippedError("this step has several micro-batches where the last had one")
            self.seconds_in_hooks += self._hooks.seconds
            first = {name: self._hooks.norms[name] for name in names}
            whole = self._sums(first) * (own / self.run.loss_scale) ** 2
        processes = parallel.world_size() if micro_batches == 1 else 1
        ones = torch.ones(size, dtype=torch.int64)
        self._keep(self.name, names, sq_norms, ones, whole, processes=processes, skipped=skipped)


class NormLayerSource(ExampleSource):
    """Single examples as the norm layers alone see them (Gray et al. 2024, arXiv:2411.00999)."""

    layers = NORM_LAYERS
    name = "norm layers"


class MicroBatchSource(_Source):
    """Micro-batches of gradient accumulation, on every process."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._hooks = ParameterHooks(self._trained)
        self._micro: list[dict[str, Tensor]] = []

    def enter(self, size: int) -> None:
        """Hook the parameters for one backward pass."""
        self._hooks.attach()

    def exit(self) -> None:
        """Note what came."""
        self._hooks.detach()
        self._micro.append(self._hooks.norms)

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.detach()

    def before_step(self) -> None:
        """Reduce everything while ``.grad`` is still unclipped."""
        if not self.run.sizes:
            raise no_micro_batch()
        if not any(p.grad is not None for p in self._trained.values()):
            raise SampleSkippedError("no parameter has a gradient at this step")
        self._hooks.check()
        self.seconds_in_hooks += self._hooks.seconds
        # a micro-batch that was given up has no backward pass and is no part of the gradient
        seen = [(norms, n) for norms, n in zip(self._micro, self.run.sizes, strict=True) if norms]
        self.run.sizes = [n for _, n in seen]
        if len(seen) * parallel.world_size() < 2:
            raise SampleSkippedError("fewer than two micro-batches of this step had a backward pass")
        divisor = self._divisor(len(seen))
        sizes = torch.tensor(self.run.sizes)
        mean = self.run.loss_reduction == "mean"
        factors = torch.full((len(seen),), divisor).double() / (1.0 if mean else sizes)
        rows = [self._sums(norms) for norms, _ in seen]
        sq_norms = torch.stack(rows) * (factors.to(rows[0].device)[:, None] / self.run.loss_scale) ** 2
        names = [name for name in self._trained if any(name in norms for norms, _ in seen)]
        whole = self._whole(names, divisor / (len(seen) if mean else int(sizes.sum())))
        self._keep(self._name(len(seen)), names, sq_norms, sizes, whole, processes=parallel.world_size())

    @staticmethod
    def _name(micro_batches: int) -> str:
        processes = parallel.world_size()
        if processes == 1:
            return "micro-batches"
        return f"{processes} processes" if micro_batches == 1 else f"micro-batches of {processes} processes"


class SplitSource(_Source):
    """The step's last micro-batch, split: a pass of its own for each piece, in the modes of training.

    The whole gradient is the mean over the pieces, so that batch norm, which normalises within each,
    is the same in both.
    """

    pieces: ClassVar[int] = 8

    def before_step(self) -> None:
        """Make the passes; the loss's own reduction is over examples."""
        if self.run.loss_fn is None:
            raise UnsupportedError(
                "a batch can only be split where the loss is known",
                fix="Pass loss_fn=, which maps outputs and targets to the loss.",
            )
        if self.run.batch is None:
            raise no_micro_batch()
        x, y = self.run.batch
        pieces = min(self.pieces, examples(x))
        if pieces < 2:
            raise SampleSkippedError("a batch of one example cannot be split", got=examples(x))
        parameters = list(self._trained.values())
        gradients, counts = split_gradients(
            self.run.model, self.run.loss_fn, x, y, pieces, parameters=parameters
        )
        mean = self.run.loss_reduction == "mean"
        factors = torch.ones(pieces) if mean else 1.0 / counts
        weights = (torch.full((pieces,), 1.0 / pieces) if mean else counts / counts.sum()).tolist()
        rows = [self.run.sections.sums(squared_norms, parameters, piece) for piece in gradients]
        sq_norms = torch.stack(rows) * factors.to(rows[0].device)[:, None].square()
        total = [torch.zeros_like(p) for p in parameters]
        for piece, weight, factor in zip(gradients, weights, factors.tolist(), strict=True):
            torch._foreach_add_(total, piece, alpha=weight * factor)
        whole = self.run.sections.sums(squared_norms, parameters, total)
        self._keep("split batch", list(self._trained), sq_norms, counts, whole)


class AutoSource(Collector):
    """The best source at hand: micro-batches and processes, else single examples, else a split batch."""

    moment: ClassVar[MomentName] = "before_step"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._micro = MicroBatchSource(run)
        self._examples: ExampleSource | None = None
        self._chosen: Collector = self._micro

    def enter(self, size: int) -> None:
        """Hook the parameters; ride along too unless parts of another kind are known to come."""
        self._micro.enter(size)
        if len(self.run.sizes) == 1 and self.run.micro_batches_before < 2 and parallel.world_size() == 1:
            self._examples = ExampleSource(self.run)
            self._examples.enter(size)
        elif self._examples is not None:
            self._examples.close()

    def exit(self) -> None:
        """A backward pass is done."""
        self._micro.exit()
        if self._examples is not None:
            self._examples.exit()

    def before_step(self) -> None:
        """Choose by what came."""
        if len(self.run.sizes) > 1 or parallel.world_size() > 1 or not self.run.sizes:
            self._micro.before_step()
        elif self._examples is None:
            raise SampleSkippedError("this step has one micro-batch where the last had several")
        elif self._examples.refusal is not None and self.run.loss_fn is not None:
            self._chosen = SplitSource(self.run)
            self._chosen.before_step()
        else:
            self._chosen = self._examples
            self._chosen.before_step()
        self.seconds_in_hooks = self._chosen.seconds_in_hooks

    def close(self) -> None:
        """Take the hooks off."""
        self._micro.close()
        if self._examples is not None:
            self._examples.close()

    def result(self) -> Chunks:
        """The norms of this step's parts."""
        return self._chosen.result()
