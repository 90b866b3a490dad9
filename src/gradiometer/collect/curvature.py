"""Where curvature comes from: gradients and Hessians of parts of the step's own batch, at its own weights.

The parts of a batch are independent of each other, so products of distinct parts are unbiased: neither
another batch nor a copy of the weights is needed, and each step is measured where it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import parallel
from ..autodiff.functional import examples
from ..autodiff.products import SplitCurvature, split_curvature
from ..errors import SampleSkippedError, UnsupportedError
from ..optimizers import family_of
from ..stats.linalg import inner_products
from .base import Collector, Memory, MomentName, Step, Training
from .own_batch import OwnBatch
from .snapshot import Curvature


class CurvatureCollector(Collector):
    """Products of the gradients of the last micro-batch's parts, plain and through their Hessians.

    The passes are its own, in the modes of training; batch norm normalises within each part.
    """

    moment: ClassVar[MomentName] = "before_step"
    keeps_batch: ClassVar[bool] = True
    parts: ClassVar[int] = 3

    def __init__(self, training: Training, step: Step, memory: Memory) -> None:
        super().__init__(training, step, memory)
        self._curvature: Curvature | None = None
        self._batch: OwnBatch | None = None

    def before_step(self) -> None:
        """Make the passes while the weights are those of this batch's loss."""
        batch = self.own_batch("curvature can only be measured where the loss is known")
        size = examples(batch.inputs)
        if size < self.parts:
            raise SampleSkippedError(
                f"curvature needs a micro-batch of {self.parts} or more examples",
                got=size,
                fix="This step is left out; use larger micro-batches.",
            )
        parameters = self._moving()
        if not parameters:
            raise SampleSkippedError("no parameter has a gradient at this step")
        self._batch = batch
        self._curvature = self._measure(parameters)

    def _moving(self) -> list[Tensor]:
        """The model's parameters that this step moves."""
        moved = {id(parameter) for parameter in _moved(self.training.optimizer)}
        return [p for p in self.training.model.parameters() if p.requires_grad and id(p) in moved]

    def _measure(self, parameters: list[Tensor]) -> Curvature:
        """The parts' gradients themselves."""
        products = self._split(parameters)
        return self._finite(products.gram, products.gram, products.forms, products.sizes)

    def _split(
        self, parameters: list[Tensor], step: Callable[[list[Tensor]], list[Tensor]] | None = None
    ) -> SplitCurvature:
        batch = self._batch
        assert batch is not None
        return split_curvature(
            self.training.model,
            batch.loss_fn,
            batch.inputs,
            batch.targets,
            self.parts,
            parameters=parameters,
            loss_reduction=self.step.reduction,
            step=step,
            forward=batch.forward,
        )

    def _finite(self, gram: Tensor, step_gram: Tensor, forms: Tensor, sizes: Tensor) -> Curvature:
        """A snapshot's form, without what is not finite."""
        finite = gram.isfinite().all() & step_gram.isfinite().all() & forms.isfinite().all()
        if self.step.recording and not bool(finite):  # else nobody waits for the device
            raise SampleSkippedError("gradient or curvature is not finite at this step")
        return Curvature(
            gram=torch.where(finite, gram, 0.0),
            step_gram=torch.where(finite, step_gram, 0.0),
            forms=torch.where(finite, forms, 0.0),
            sizes=sizes,
            noise_share=self._noise_share(),
            weight=finite.to(gram.dtype),
        )

    def _noise_share(self) -> float:
        """Variance of the gradient that makes the step over that of one example."""
        sizes = self.step.sizes
        if self.step.reduction == "sum":
            return 1 / (sum(sizes) * parallel.world_size())
        return sum(1 / size for size in sizes) / (len(sizes) ** 2 * parallel.world_size())

    def result(self) -> Curvature:
        """The products of this step's parts."""
        if self._curvature is None:
            raise SampleSkippedError(
                "the weights before the step were not seen", fix="Call monitor.before_step()."
            )
        return self._curvature


class StepCurvatureCollector(CurvatureCollector):
    r"""The same for the steps that ``torch.optim.SGD`` would make of each part's gradient.

    With the mean loss ``L`` and the function ``f`` that the run minimises, loss and L2 term,

    .. math:: u_i = \eta\,\big[\alpha\,\nabla f_i + \beta\,b\big], \qquad
              \text{gram}_{il} = u_i\cdot\nabla f_l, \qquad \text{forms}_{jil} = u_i^T\,\nabla^2 f_j\,u_l

    Learning rate, momentum and L2 are each parameter's own. A gradient that holds the mean loss c times, as
    that of a sum over c examples does, is that of the mean loss with c times the learning rate and 1/c of
    the L2 coefficient.
    """

    def _moving(self) -> list[Tensor]:
        """All that the optimizer moves, or nothing can be said."""
        optimizer = self.training.optimizer
        if not family_of(optimizer).linear:
            raise UnsupportedError(
                "the curvature along the optimizer's own steps is known for torch.optim.SGD only",
                got=type(optimizer).__name__,
                fix="Leave SecondFluctuationDissipation out of observables=.",
            )
        if any(group["maximize"] for group in optimizer.param_groups):
            raise UnsupportedError(
                "the curvature along the optimizer's own steps is known where it minimises",
                got="maximize=True",
                fix="Leave maximize=True out, and train on the negative of the objective.",
            )
        parameters = super()._moving()
        if len(parameters) != len(_moved(optimizer)):
            raise UnsupportedError(
                "the optimizer also moves parameters that are frozen or not the model's",
                fix="Give the monitor the module that holds all of them.",
            )
        return parameters

    def _measure(self, parameters: list[Tensor]) -> Curvature:
        """The parts' steps, with the L2 term added to gradients and Hessians."""
        groups = {id(p): group for group in self.training.optimizer.param_groups for p in group["params"]}
        settings = [self._settings(parameter, groups[id(parameter)]) for parameter in parameters]
        decays = [setting.decay for setting in settings]
        fresh = [setting.fresh for setting in settings]
        pull = carried = None
        if any(decays):
            pull = torch._foreach_mul([parameter.detach() for parameter in parameters], decays)
        if any(setting.buffer is not None for setting in settings):
            buffers = [
                torch.zeros_like(parameter) if setting.buffer is None else setting.buffer
                for parameter, setting in zip(parameters, settings, strict=True)
            ]
            carried = torch._foreach_mul(buffers, [setting.carried for setting in settings])

        def step(gradient: list[Tensor]) -> list[Tensor]:
            pulled = gradient if pull is None else torch._foreach_add(gradient, pull)
            moved = torch._foreach_mul(pulled, fresh)
            return list(moved if carried is None else torch._foreach_add(moved, carried))

        products = self._split(parameters, step)
        gram, forms, steps = products.gram, products.forms, products.steps
        if pull is not None:
            gram = gram + torch.stack([_dot(vector, pull) for vector in steps])[:, None]
            forms = forms + _gram(steps, [torch._foreach_mul(vector, decays) for vector in steps])
        return self._finite(gram, _gram(steps, steps), forms, products.sizes)

    def _settings(self, parameter: Tensor, group: Mapping[str, Any]) -> _Settings:
        """How the optimizer moves a parameter, on the scale of the mean loss."""
        lr, momentum, nesterov = float(group["lr"]), group["momentum"], group["nesterov"]
        buffer = self.training.optimizer.state.get(parameter, {}).get("momentum_buffer") if momentum else None
        # torch takes the first gradient as it is for the buffer
        new = 1 + momentum if nesterov else 1.0 if buffer is None else 1 - group["dampening"]
        scale = self.step.loss_multiple()
        return _Settings(
            fresh=scale * lr * new,
            carried=lr * (momentum**2 if nesterov else momentum),
            decay=float(group["weight_decay"]) / scale,
            buffer=buffer,
        )


class _Settings(NamedTuple):
    """What makes a parameter's step: ``fresh`` times its gradient of f, ``carried`` times its buffer."""

    fresh: float
    carried: float
    decay: float
    buffer: Tensor | None


def _moved(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _gram(left: Sequence[Sequence[Tensor]], right: Sequence[Sequence[Tensor]]) -> Tensor:
    """Inner products of all pairs, ``[k, k]``."""
    return torch.stack([torch.stack([_dot(row, column) for column in right]) for row in left])


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return inner_products(left, right).sum()
