"""Gather what observables need from a running loop: one collector per snapshot field.

A collector is made for one optimizer step on which its field is needed, and thrown away after it. It
may hook the model during the user's own forward and backward; it never makes a pass of its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import SubsetRandomSampler

from . import parallel
from ._types import Forward
from .autodiff.functional import matrix_forward
from .autodiff.ride_along import RideAlong, refusal
from .errors import InputError, SampleSkippedError, UnsupportedError
from .linalg import accumulation_dtype, inner_products, squared_norms
from .snapshot import Chunks, GroupSettings, Update, Weights, Work

MomentName = Literal["before_step", "after_step"]

INPUT_KEYS = ("x", "input", "inputs", "image", "images", "input_ids", "pixel_values", "features")
TARGET_KEYS = ("y", "target", "targets", "label", "labels")


@dataclass
class Run:
    """What collectors may look at.

    Args:
        model: The model being trained.
        optimizer: Its optimizer.
        micro_batches_before: Micro-batches of the step before this one, 0 when unknown.
        loss_scale: Factor on the loss during the backward pass.
        grad_scale: Factor still in ``.grad`` at ``before_step``.
        sizes: Examples of each micro-batch of this step so far.
        updates: Optimizer steps seen so far.
        scratch: One tensor of the shape of each parameter, kept between steps: allocating them anew costs
            more than filling them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    micro_batches_before: int = 0
    loss_scale: float = 1.0
    grad_scale: float = 1.0
    sizes: list[int] = field(default_factory=list)
    updates: int = 0
    scratch: dict[Tensor, Tensor] = field(default_factory=dict)


class Collector(ABC):
    """Supplies one snapshot field on one step."""

    moment: ClassVar[MomentName] = "after_step"

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seconds_in_hooks = 0.0

    def enter(self, size: int) -> None:  # noqa: B027 - most collectors need no hook here
        """A micro-batch of ``size`` examples begins."""

    def exit(self) -> None:  # noqa: B027
        """Its backward pass is done."""

    def before_step(self) -> None:  # noqa: B027
        """The full, unclipped gradient stands in ``.grad``."""

    def close(self) -> None:  # noqa: B027
        """Remove everything; called exactly once, also after a failure."""

    @abstractmethod
    def result(self) -> Any:
        """The field's value.

        Raises:
            UnsupportedError: It can never be had on this run.
            SampleSkippedError: It cannot be had at this step.
        """


class ChunkCollector(Collector):
    """Gradient norms of micro-batches, or of single examples when there is one micro-batch only."""

    moment: ClassVar[MomentName] = "before_step"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._micro: list[list[Tensor]] = []
        self._fired: list[bool] = []
        self._calls: dict[str, int] = {}
        self._handles: list[Any] = []
        self._tape: RideAlong | None = None
        self._refusal: str | None = None
        held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        self._trained = {
            name: p for name, p in run.model.named_parameters() if p.requires_grad and id(p) in held
        }
        self._repeated: str | None = None
        self._error: Exception | None = None
        self._chunks: Chunks | None = None

    def enter(self, size: int) -> None:
        """Hook the parameters; ride along too unless micro-batches are known to be several."""
        self._calls.clear()
        self._fired.append(False)
        self._micro.append([])
        if not self._handles:
            self._handles = [p.register_hook(self._hook(name)) for name, p in self._trained.items()]
        if len(self.run.sizes) == 1 and self.run.micro_batches_before < 2:
            self._refusal = refusal(self.run.model)
            if self._refusal is None:
                self._tape = RideAlong(self.run.model, size, list(self._trained.values()))
        elif self._tape is not None:
            self._tape.detach()
            self._tape = None

    def _hook(self, name: str) -> Any:
        def hook(grad: Tensor) -> None:
            began = perf_counter()
            try:
                self._fired[-1] = True
                self._calls[name] = self._calls.get(name, 0) + 1
                if self._calls[name] > 1:
                    self._repeated = name
                wide = torch.promote_types(grad.dtype, torch.float32)
                self._micro[-1].append(torch.linalg.vector_norm(grad.detach(), dtype=wide))
            except Exception as error:  # the user's backward goes on; result() raises this
                self._error = self._error or error
            self.seconds_in_hooks += perf_counter() - began

        return hook

    def exit(self) -> None:
        """Take the layer hooks off; parameter hooks stay for the next micro-batch."""
        if self._tape is not None:
            self._tape.detach()

    def before_step(self) -> None:
        """Reduce everything while ``.grad`` is still unclipped."""
        gradients = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        if parallel.world_size() > 1:
            raise UnsupportedError(
                "the noise scale is not available under data-parallel training",
                got=f"{parallel.world_size()} processes",
                fix="Leave GradientNoiseScale out of observables=, or measure it on one process.",
            )
        if not self.run.sizes:
            raise no_micro_batch()
        if not gradients:
            raise SampleSkippedError("no parameter has a gradient at this step")
        several = len(self.run.sizes) > 1
        if several:  # a micro-batch that was given up has no backward and is no part of the gradient
            self.run.sizes = [n for n, fired in zip(self.run.sizes, self._fired, strict=True) if fired]
        names, sq_norms, sizes, skipped = self._micro_batches() if several else self._examples()
        covered = {name: gradients[name] for name in names if name in gradients}
        total = sum(p.numel() for p in self._trained.values())
        parameters = sum(g.numel() for g in covered.values())
        self._chunks = Chunks(
            source="micro-batches" if several else "per example",
            sq_norms=sq_norms / self.run.loss_scale**2,
            sizes=sizes,
            batch_sq_norm=squared_norms(list(covered.values())).sum() / self.run.grad_scale**2,
            parameters=parameters,
            coverage=parameters / total,
            skipped=skipped,
        )
        finite = self._chunks.sq_norms.isfinite().all() & self._chunks.batch_sq_norm.isfinite()
        if not bool(finite):
            raise SampleSkippedError("the gradient is not finite at this step")

    def _micro_batches(self) -> tuple[set[str], Tensor, Tensor, dict[str, str]]:
        if self._error:
            raise self._error
        if self._repeated is not None:
            raise UnsupportedError(
                f"parameter {self._repeated!r} received its gradient in several pieces in one backward "
                "pass (reentrant checkpointing), so the norm of the whole is not known",
                fix="Write checkpoint(..., use_reentrant=False).",
            )
        kind = accumulation_dtype(next(iter(self._trained.values())).device)
        norms = [
            torch.stack([norm.to(kind) for norm in each]).square().sum()
            for each, fired in zip(self._micro, self._fired, strict=True)
            if fired
        ]
        if len(norms) < 2:
            raise SampleSkippedError("fewer than two micro-batches of this step had a backward pass")
        return set(self._trained), torch.stack(norms), torch.tensor(self.run.sizes), {}

    def _examples(self) -> tuple[set[str], Tensor, Tensor, dict[str, str]]:
        if self._refusal is not None:
            raise UnsupportedError(
                f"per-example gradients are not available: {self._refusal}",
                fix="Accumulate over two or more micro-batches (Lightning: accumulate_grad_batches=2), "
                "or leave GradientNoiseScale out of observables=.",
            )
        if self._tape is None:
            raise SampleSkippedError("this step has one micro-batch where the last had several")
        sq_norms, names, skipped = self._tape.result()
        self.seconds_in_hooks += self._tape.seconds
        return names, sq_norms, torch.ones(len(sq_norms), dtype=torch.int64), skipped

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.exit()

    def result(self) -> Chunks:
        """The norms of this step's parts."""
        if self._chunks is None:
            raise SampleSkippedError(
                "the gradient was not seen before the step", fix="Call monitor.before_step()."
            )
        return self._chunks


class UpdateCollector(Collector):
    """The displacement of each parameter group.

    Under SGD it is rebuilt from what the optimizer leaves behind: torch's buffer ``b`` is the direction
    itself, and without momentum ``d (1 - lr wd) = grad + wd theta'``. Nesterov, whose multi-tensor form
    overwrites the gradient, and any other optimizer cost a copy of the weights on sampled steps.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._copies: list[list[Tensor]] | None = None

    def before_step(self) -> None:
        """Copy the weights where the update cannot be rebuilt."""
        if not is_rebuilt(self.run.optimizer):
            self._copies = [self._copy(group["params"]) for group in self.run.optimizer.param_groups]

    def _copy(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The weights of a group, in the scratch tensors."""
        trained = _trained(parameters)
        for parameter in trained:
            if parameter not in self.run.scratch:
                self.run.scratch[parameter] = torch.empty_like(parameter, requires_grad=False)
        copies = [self.run.scratch[parameter] for parameter in trained]
        if copies:
            torch._foreach_copy_(copies, [parameter.detach() for parameter in trained])
        return copies

    def result(self) -> Update:
        """Squared displacement, and its inner product with the buffer for Nesterov."""
        squares, dots = [], []
        for g, group in enumerate(self.run.optimizer.param_groups):
            if self._copies is not None:
                moved = self._copies[g]
                if moved:
                    torch._foreach_sub_(moved, [p.detach() for p in _trained(group["params"])])
                squares.append(_total(squared_norms, moved))
                velocities = _velocities(self.run.optimizer, _trained(group["params"]))
                nesterov = group.get("nesterov") and velocities
                dots.append(_total(inner_products, moved, velocities) if nesterov else squares[-1] * 0)
            elif is_rebuilt(self.run.optimizer):
                directions = sgd_directions(self.run.optimizer, group)
                squares.append(float(group["lr"]) ** 2 * _total(squared_norms, directions))
                dots.append(squares[-1] * 0)
            else:
                raise SampleSkippedError(
                    "the weights before the step were not seen", fix="Call monitor.before_step()."
                )
        return Update(_stacked(squares), torch.stack(dots))


class WorkCollector(Collector):
    """Inner products with the weights before the step; copies them, so for verification only."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._copies: list[list[Tensor]] | None = None

    def before_step(self) -> None:
        """Copy the weights."""
        self._copies = [_copies(group["params"]) for group in self.run.optimizer.param_groups]

    def result(self) -> Work:
        """Both inner products, in float64 throughout."""
        if self._copies is None:
            raise SampleSkippedError(
                "the weights before the step were not seen", fix="Call monitor.before_step()."
            )
        gradient, displacement = [], []
        for old, group in zip(self._copies, self.run.optimizer.param_groups, strict=True):
            old64 = [tensor.double() for tensor in old]
            after = [p.detach() for p in _trained(group["params"])]
            moved = [(a - b).double() for a, b in zip(old, after, strict=True)]
            displacement.append(_total(inner_products, old64, moved))
            if is_sgd(self.run.optimizer) and group["nesterov"]:  # d = g + mu b
                lr, momentum = float(group["lr"]), group["momentum"]
                velocities = _velocities(self.run.optimizer, _trained(group["params"]))
                used = [d / lr - momentum * b.double() for d, b in zip(moved, velocities, strict=True)]
                gradient.append(_total(inner_products, old64, used))
            elif is_sgd(self.run.optimizer):
                sign = -1.0 if group["maximize"] else 1.0
                used = [
                    sign * _gradient(p).double() + group["weight_decay"] * before
                    for p, before in zip(_trained(group["params"]), old64, strict=True)
                ]
                gradient.append(_total(inner_products, old64, used))
            else:
                gradient.append(torch.full_like(displacement[-1], math.nan))
        return Work(torch.stack(gradient), torch.stack(displacement))


class WeightCollector(Collector):
    """Norms of the weights after the step, and their inner products with the buffer."""

    def result(self) -> Weights:
        """Both, per parameter group."""
        squares, dots = [], []
        for group in self.run.optimizer.param_groups:
            parameters = [p for p in group["params"] if p.requires_grad]  # idle ones count too
            squares.append(_total(squared_norms, [p.detach() for p in parameters]))
            held = [(p, _buffer(self.run.optimizer, p)) for p in parameters]
            pairs = [(p.detach(), b) for p, b in held if b is not None]
            zero = squares[-1] * 0
            dots.append(inner_products(*zip(*pairs, strict=True)).sum() if pairs else zero)
        updates = torch.tensor(self.run.updates, dtype=torch.float64)
        return Weights(_stacked(squares), torch.stack(dots), updates)


class StepFactorCollector(Collector):
    """How far the optimizer moves each weight per unit of gradient, relative to the first group's rate."""

    def result(self) -> dict[str, float | Tensor]:
        """By parameter name."""
        optimizer = self.run.optimizer
        adaptive = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        if not adaptive and not is_sgd(optimizer):
            raise UnsupportedError(
                "the kernel under the optimizer's own steps is known for SGD, Adam and AdamW",
                got=type(optimizer).__name__,
                fix="Write NeuralTangentKernel(preconditioned=False).",
            )
        names = {id(p): name for name, p in self.run.model.named_parameters() if p.requires_grad}
        reference = float(optimizer.param_groups[0]["lr"])
        if reference == 0.0:
            raise SampleSkippedError(
                "the first group's learning rate is 0 at this step, and the others cannot be relative to it",
                fix="This step is left out; put a group that is trained first.",
            )
        factors: dict[str, float | Tensor] = dict.fromkeys(names.values(), 0.0)
        for group in optimizer.param_groups:
            rate = float(group["lr"]) / reference
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    continue
                state = optimizer.state.get(parameter, {})
                if not adaptive:
                    factors[name] = rate
                elif state:
                    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
                    corrected = second / (1 - group["betas"][1] ** float(state["step"]))
                    factors[name] = rate / (corrected.sqrt() + group["eps"])
        return factors


COLLECTORS: Mapping[str, type[Collector]] = {
    "chunks": ChunkCollector,
    "update": UpdateCollector,
    "work": WorkCollector,
    "weights": WeightCollector,
    "step_factors": StepFactorCollector,
}


def no_micro_batch() -> SampleSkippedError:
    """What to say when a step passes of which nothing but the gradient was shown."""
    return SampleSkippedError(
        "no micro-batch was seen at this step",
        fix="Put the forward and backward inside: with monitor.micro_batch(x, y): ...",
    )


def is_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update is exactly that of ``torch.optim.SGD``.

    Args:
        optimizer: Any optimizer.
    """
    return type(optimizer) is torch.optim.SGD


def is_rebuilt(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update can be read off after the step: SGD, but not Nesterov's.

    Args:
        optimizer: Any optimizer.
    """
    return is_sgd(optimizer) and not any(group["nesterov"] for group in optimizer.param_groups)


def group_settings(optimizer: torch.optim.Optimizer) -> tuple[GroupSettings, ...]:
    """The optimizer's settings by parameter group, with distinct names.

    Args:
        optimizer: Any optimizer.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> group_settings(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))[0].momentum
        0.9
    """
    sgd = is_sgd(optimizer)
    names: list[str] = []
    settings = []
    for index, group in enumerate(optimizer.param_groups):
        name = str(group.get("name", index)).replace("/", ".")
        names.append(name if name not in names else f"{name}.{index}")
        momentum = float(group.get("momentum", 0.0)) if sgd else 0.0
        settings.append(
            GroupSettings(
                name=names[-1],
                lr=float(group["lr"]),
                momentum=momentum,
                dampening=float(group.get("dampening", 0.0)) if momentum else 0.0,
                nesterov=bool(group.get("nesterov", False)) if sgd else False,
                weight_decay=float(group.get("weight_decay", 0.0)),
                is_sgd=sgd,
            )
        )
    return tuple(settings)


def sgd_directions(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> list[Tensor]:
    """Directions ``d = (theta_t - theta_{t+1}) / lr`` after a step of ``torch.optim.SGD`` without Nesterov.

    Args:
        optimizer: The optimizer, right after its step, gradients still in place.
        group: One of its parameter groups.

    Returns:
        Directions of the parameters that had a gradient; the buffers themselves under momentum.
    """
    lr, decay = float(group["lr"]), group["weight_decay"]
    sign = -1.0 if group["maximize"] else 1.0
    parameters = _trained(group["params"])
    if group["momentum"]:
        return _velocities(optimizer, parameters)
    directions = []
    for parameter in parameters:
        direction = sign * _gradient(parameter)
        if decay:
            direction = direction.add(parameter.detach(), alpha=decay) / (1.0 - lr * decay)
        directions.append(direction)
    return directions


def split_batch(
    batch: Any, input_key: str | None = None, target_key: str | None = None
) -> tuple[Any, Tensor | None]:
    """Inputs and targets of a batch that is a pair or a mapping.

    Args:
        batch: ``(x, y)``, a mapping, or the inputs alone; of a longer sequence only the first entry is
            used, since which other one holds the targets is not clear.
        input_key: Key of the inputs in a mapping; one of the usual names when ``None``.
        target_key: Key of the targets; one of the usual names, or no targets, when ``None``.

    Returns:
        Inputs, and targets or ``None``.

    Raises:
        InputError: If a mapping has no key, or several, that may hold the inputs.

    Example:
        >>> split_batch({"image": torch.zeros(2, 3), "label": torch.tensor([0, 1])})[1]
        tensor([0, 1])
    """
    if isinstance(batch, Mapping):
        source = _one_key(batch, input_key, INPUT_KEYS, "input_key")
        if source is None:
            raise InputError(
                "the batch is a mapping, and which of its entries the model takes is not clear",
                got=f"keys {sorted(map(str, batch))}",
                fix='Name it: DynamicsMonitor(input_key="image", target_key="label").',
            )
        target = _one_key(batch, target_key, TARGET_KEYS, "target_key")
        return batch[source], batch[target] if target is not None else None
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch):
        second = batch[1] if len(batch) == 2 and isinstance(batch[1], Tensor) else None
        return batch[0], second
    return batch, None


def selected_forward(model: nn.Module, part: str | None, output_key: str | None) -> Forward | None:
    """A forward through one attribute of the model, and to one entry of its output.

    Args:
        model: The module that has the attribute.
        part: Dotted attribute path of the network; the module itself when ``None``.
        output_key: Key or attribute of the output; the output itself when ``None``.

    Returns:
        A forward, or ``None`` when the default serves.

    Raises:
        InputError: If there is no such attribute.

    Example:
        >>> net = nn.ModuleDict({"body": nn.Linear(3, 2)})
        >>> selected_forward(net, "body", None)(net, torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """
    if part is None and output_key is None:
        return None
    if part is not None and part not in dict(model.named_modules()):
        children = [name for name, _ in model.named_children()]
        raise InputError(
            f"{type(model).__name__} has no submodule {part!r}",
            got=f"submodules {children}",
            fix='Name one of them: model="...".',
        )

    def forward(model: nn.Module, x: Any) -> Tensor:
        return matrix_forward(model.get_submodule(part or ""), x, output_key)

    return forward


def loss_scales(scaler: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What ``Monitor.before_step`` takes under a gradient scaler that has already unscaled.

    Fused optimizers unscale inside their step, so their gradients still carry the factor.

    Args:
        scaler: A ``GradScaler``, or ``None``.
        optimizer: The optimizer about to step.
    """
    if scaler is None:
        return {"grad_scale": 1.0, "loss_scale": 1.0}
    scale = float(scaler.get_scale())
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return {"grad_scale": scale if fused else 1.0, "loss_scale": scale}


def dataset_size_of(loader: Any) -> int | None:
    """Examples behind a data loader, ``None`` where it has no length.

    Args:
        loader: A data loader.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        return len(sampler)
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None


def _one_key(batch: Mapping[Any, Any], given: str | None, usual: Sequence[str], argument: str) -> str | None:
    if given is not None:
        if given not in batch:
            raise InputError(
                f"{argument}={given!r} is not in the batch",
                got=f"keys {sorted(map(str, batch))}",
                fix="Name one of them.",
            )
        return given
    found = [key for key in usual if key in batch]
    return found[0] if len(found) == 1 else None


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach()


def _trained(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.requires_grad and p.grad is not None]


def _buffer(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    return optimizer.state.get(parameter, {}).get("momentum_buffer") if is_sgd(optimizer) else None


def _velocities(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Tensor]:
    return [b for b in (_buffer(optimizer, p) for p in parameters) if b is not None]


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in _trained(parameters)]


def _total(function: Any, *tensors: Sequence[Tensor]) -> Tensor:
    """Sum of per-tensor numbers; 0 for a group without any."""
    if not tensors[0]:
        return torch.zeros((), dtype=accumulation_dtype(torch.device("cpu")))
    return function(*tensors).sum()


def _stacked(values: list[Tensor]) -> Tensor:
    """Stack one number per group; the values stay on the device unless groups are spread over several."""
    if len({value.device for value in values}) > 1:
        values = [value.cpu() for value in values]
    return torch.stack(values)
