"""How the network is run in passes of our own: given, or learned from what it is really called with.

In the first micro-batch hooks note the network's own call, and the loss that is differentiated. From these
come the examples' axis, the probe, and the loss, where the graph shows it. Later calls are noted only where
the batch itself is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..autodiff.functional import Forward, detached_copy, examples, fresh, matrix_forward, take
from ..collect.base import Training
from ..collect.call import CallCapture, NetworkCall
from ..collect.compilation import CompilerWatch
from ..collect.examples_axis import (
    EITHER,
    Calling,
    find_calling,
    module_axes,
    output_leaves,
    output_leaves_of,
)
from ..collect.loss_graph import BackwardWatch, FoundLoss
from ..collect.loss_terms import Terms
from ..collect.own_batch import OwnBatch, batch_with_found_loss, batch_with_given_loss, layout_of_targets
from ..collect.trial import trace_of_a_pass
from ..errors import UnsupportedError
from .step import StepUnderWay

_PASSED_OVER = (
    "the network returns several tensors, and of an earlier one an example's entries change with the other "
    "examples of the batch, or at random: kernel and Jacobian are those of tensor {0} (counted from 0). "
    "Write output= to say which is meant."
)
_NO_AXIS = (
    "Pass forward=, which maps model and batch to outputs [N, O], and batches whose tensors all begin with "
    "the N examples."
)


@dataclass(frozen=True)
class Hints:
    """What is said of the network's calls.

    Args:
        forward: Maps model and batch to outputs ``[N, O]``.
        network: Path of the network within the model.
        batch_dim: The examples' axis.
        output: Which part of the output.
        batch_size: Examples in a batch, where the loader says so.
        probe_is_given: Whether kernels are taken on a probe that the user gave, as the model takes it.
    """

    forward: Forward | None = None
    network: str | None = None
    batch_dim: int | None = None
    output: int | str | None = None
    batch_size: int | None = None
    probe_is_given: bool = False


@dataclass(frozen=True)
class Shown:
    """A micro-batch as the loop has it.

    Args:
        x: The inputs.
        y: The targets, or ``None``.
        named: Whether the targets were named as such, rather than taken for them.
    """

    x: Any
    y: Any = None
    named: bool = True


@dataclass
class Listening:
    """Hooks on one micro-batch."""

    capture: CallCapture
    watch: BackwardWatch


class Calls:
    """What is known of the network's calls.

    Args:
        training: What is being trained.
        hints: What the user has said.
        compiler: Knows whether hooks may be put on modules.
    """

    def __init__(self, training: Training, hints: Hints, compiler: CompilerWatch) -> None:
        self._training, self._hints, self._compiler = training, hints, compiler
        self.forward: Forward = hints.forward or self._of_batch
        self.understood = False
        self.refusal: UnsupportedError | None = None
        """Why the examples of a batch are not known."""
        self.remark = ""
        """What the user must be told of what was learned."""
        self.axes: dict[nn.Module, int] = {}
        """The examples' axis of the input of each layer, where it was tried."""
        self.loss: FoundLoss | str = "no backward pass was seen"
        self.terms = Terms()
        self._reduction: str | None = None
        self._calling: Calling | None = None
        self._ordinary = True
        self._size_axis: int | None = hints.batch_dim or 0
        self._last_size = 0
        self._listening: Listening | None = None
        self._copy: tuple[Any, Any] | None = None

    @property
    def reduction(self) -> str:
        """Whether the loss is a mean or a sum over the examples, as far as is known."""
        return self._training.loss_reduction or self._reduction or "mean"

    def size(self, x: Any) -> int:
        """Examples in a micro-batch, 0 where that is not known before the network is called.

        Args:
            x: Its inputs.

        Raises:
            InputError: If there is none.
        """
        if self._size_axis is None or self.refusal is not None:
            return self._last_size
        if self._size_axis == 0 and isinstance(x, Tensor) and x.ndim and x.shape[0]:
            return x.shape[0]
        if self._size_axis == 0 and (self.understood or _is_batch(x)):
            return examples(x)
        leaves = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
        axis = self._size_axis
        return leaves[0].shape[axis] if leaves and leaves[0].ndim > axis else 0

    # -- one micro-batch ---------------------------------------------------------------------------

    def listen(self, shown: Shown, *, needed: bool) -> None:
        """Look at the network's calls and at the loss, in the micro-batch that begins.

        Args:
            shown: The micro-batch.
            needed: Whether it is needed for passes of our own.
        """
        self.stop()
        if self.understood and not needed:
            return
        if self._training.loss_fn is not None:
            self._copy = detached_copy((shown.x, shown.y))
        if self._hints.forward is not None or self._compiler.refusal(self._training.model) is not None:
            return
        inside = {id(parameter) for parameter in self._training.model.parameters()}
        trained = [p for p in self._training.parameters() if p.requires_grad and id(p) in inside]
        capture = CallCapture(self._training.model, trained)
        self._listening = Listening(capture, BackwardWatch(lambda: output_leaves_of(capture)))
        self._listening.capture.attach()
        self._listening.watch.attach()

    def stop(self) -> None:
        """Look no more."""
        if self._listening is not None:
            self._listening.capture.detach()
            self._listening.watch.detach()
        self._listening, self._copy = None, None

    def heard(self, step: StepUnderWay, shown: Shown) -> CallCapture | None:
        """What the micro-batch has shown; learn from it, if it is the first one.

        Args:
            step: The step under way.
            shown: The micro-batch.

        Returns:
            The calls, where they were noted.
        """
        listening, copied = self._listening, self._copy
        self.stop()
        capture = None if listening is None else listening.capture
        if not self.understood:
            self.understood = True
            self.refusal = self._trial(capture, shown.x)
            if capture is not None and self.refusal is None:
                self._learn(capture, shown.x)
        seen = None if capture is None else self._call_in(capture)
        if listening is not None:
            self.loss = self._of_network(listening, seen)
        if seen is not None and self._calling is not None:
            self._learn_size(step, shown.x, len(self._calling.inputs(seen)[0][0]))
        if listening is not None:
            self.terms = replace(listening.watch.terms, examples=step.sizes[-1])
        step.loss, step.terms, step.axes = self.loss, self.terms, self.axes
        step.batch = self._own_batch(seen, copied)
        return capture

    def settle(self, step: StepUnderWay) -> None:
        """Find out whether the loss is a mean or a sum, once its scale and the micro-batches are known.

        Args:
            step: The step under way, before its update.
        """
        if step.takings and step.sizes:
            self._reduction = self.terms.reduction(len(step.sizes), step.loss_scale)
        step.reduction = self.reduction

    def _call_in(self, capture: CallCapture) -> NetworkCall | None:
        path = None if self._calling is None else self._calling.path
        return next((seen for seen in capture.calls if seen.path == path), None)

    def _learn_size(self, step: StepUnderWay, x: Any, size: int) -> None:
        """Note the number of examples, and which dimension of the loop's own batch counts them."""
        leaves = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
        shape = leaves[0].shape if leaves else torch.Size()
        preferred = () if self._size_axis is None else (self._size_axis,)
        along = [axis for axis in (*preferred, 0, 1) if axis < len(shape) and shape[axis] == size]
        self._size_axis, self._last_size = along[0] if along else None, size
        step.resize(size)

    # -- learning ----------------------------------------------------------------------------------

    def _trial(self, capture: CallCapture | None, x: Any) -> UnsupportedError | None:
        """Why passes of our own would change the run."""
        model = self._training.model
        calls = [] if capture is None else capture.calls

        def run() -> list[Any]:
            if calls:
                args, kwargs = fresh((calls[0].args, calls[0].kwargs))
                return output_leaves(model.get_submodule(calls[0].path)(*args, **kwargs))
            return output_leaves(self.forward(model, fresh(x)))

        trace = trace_of_a_pass(model, run)
        if not trace:
            return None
        return UnsupportedError(
            f"{type(model).__name__} cannot be run in passes of our own: {trace}",
            fix="Keep such state in buffers or attributes of the module, and change weights after the step.",
        )

    def _learn(self, capture: CallCapture, x: Any) -> None:
        """Find out how the network is called: the outermost module that tells is taken."""
        hints, reasons = self._hints, []
        calls = [seen for seen in capture.calls if hints.network in (None, seen.path)]
        for seen in calls:
            answer = find_calling(
                self._training.model,
                seen,
                batch_dim=hints.batch_dim,
                output=hints.output,
                size=hints.batch_size,
            )
            if isinstance(answer, Calling):
                self._take_up(answer, seen, x)
                return
            reasons.append(answer)
        if reasons and not (_is_plain(calls[0], x) and EITHER not in reasons[0]):
            # a model that takes the batch as it is has its own reasons when it is run
            self.refusal = UnsupportedError(
                f"which dimension counts the examples could not be found: {reasons[0]}",
                fix="Write batch_dim=0 (or 1)." if EITHER in reasons[0] else _NO_AXIS,
            )

    def _take_up(self, calling: Calling, seen: NetworkCall, x: Any) -> None:
        self._calling = calling
        if calling.layout.others:
            self.remark = _PASSED_OVER.format(calling.layout.leaf)
        varying, shared = calling.inputs(seen)
        self.axes = module_axes(self._training.model, calling, varying, shared)
        first_axis = calling.axes == (0,) and calling.layout.axis == 0 and calling.layout.rows == 1
        self._ordinary = first_axis and _is_plain(seen, x) and isinstance(seen.output, Tensor)
        if self._ordinary or self._hints.probe_is_given:
            return

        def forward(model: nn.Module, inputs: Any) -> Tensor:
            some = [inputs] if isinstance(inputs, Tensor) else inputs
            return calling.matrix(calling.leaf(calling.call(model, some, shared)))

        self.forward = forward

    def _of_batch(self, model: nn.Module, x: Any) -> Tensor:
        """The model called with the batch's inputs."""
        axis = self._hints.batch_dim or 0
        key = self._hints.output if isinstance(self._hints.output, str) else None
        model = model.get_submodule(self._hints.network or "")
        if axis == 0:
            return matrix_forward(model, x, key)
        out = matrix_forward(model, x.movedim(0, axis), key)
        return out.movedim(axis, 0) if out.ndim > axis else out

    def _of_network(self, listening: Listening, seen: NetworkCall | None) -> FoundLoss | str:
        """The loss, if it is one of the output that is looked at."""
        loss = listening.watch.loss
        if listening.watch.passes and not listening.capture.calls:
            return "the network itself was not called inside monitor.micro_batch"
        if isinstance(loss, str):
            return loss
        if seen is None or self._calling is None:
            return "the network's own call could not be made out"
        if output_leaves_of(listening.capture)[loss.leaf] is not self._calling.leaf(seen.output):
            return "it is made from another output of the network"
        if loss.class_axis == self._calling.layout.axis:
            return "its classes are along the examples"
        return loss

    # -- what comes of it --------------------------------------------------------------------------

    def _own_batch(self, seen: NetworkCall | None, copied: tuple[Any, Any] | None) -> OwnBatch | None:
        """The micro-batch for passes of our own, where the loss is known."""
        given, calling = self._training.loss_fn, self._calling
        if given is not None and copied is not None:
            if self._ordinary or seen is None or calling is None:
                return OwnBatch(*copied, given)
            return batch_with_given_loss(calling, seen, copied[1], given)
        if seen is None or calling is None or isinstance(self.loss, str) or given is not None:
            return None
        return batch_with_found_loss(calling, seen, self.loss)

    def probe(self, capture: CallCapture | None, shown: Shown, size: int) -> tuple[Any, Tensor | None]:
        """The first examples of the first micro-batch, and their targets where they are known.

        Args:
            capture: The network's calls in it.
            shown: The micro-batch.
            size: How many examples.

        Raises:
            UnsupportedError: If the examples are not known.
        """
        if self.refusal is not None:
            raise self.refusal
        first = slice(0, size)
        seen = None if capture is None else self._call_in(capture)
        if seen is None or self._calling is None:
            inputs = shown.x.movedim(self._hints.batch_dim, 0) if self._hints.batch_dim else shown.x
        else:
            varying, _ = self._calling.inputs(seen)
            inputs = varying[0] if len(varying) == 1 else varying
        targets = self._targets(capture, shown, examples(inputs))
        return detached_copy(take(inputs, first)), None if targets is None else targets[
            first
        ].detach().clone()

    def _targets(self, capture: CallCapture | None, shown: Shown, count: int) -> Tensor | None:
        """The targets: those that were named, else those of the loss; what goes into the network is none."""
        y = shown.y
        fits = isinstance(y, Tensor) and y.ndim > 0 and len(y) == count
        if capture is not None and any(y is tensor for tensor in capture.arguments):
            return None
        if fits and (shown.named or capture is None):
            return y
        if isinstance(self.loss, str) or self._calling is None:
            return None
        first = layout_of_targets(self._calling.layout, self.loss).examples_first(self.loss.target)
        if self.loss.class_axis is None:
            wide = self.loss.target if first.is_floating_point() else self.loss.target.float()
            return self._calling.matrix(wide)
        if self._ordinary and first.ndim == 2:
            return first
        return first if first.ndim == 1 else first[:, -1] if first.ndim == 2 else None


def _is_batch(x: Any) -> bool:
    """Whether the first dimension of something may count examples."""
    leaves = [x] if isinstance(x, Tensor) else pytree.tree_leaves(x)
    return any(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves[:1])


def _is_plain(seen: NetworkCall, x: Any) -> bool:
    """Whether the model itself was called with the batch's inputs, and nothing else."""
    if seen.path or seen.kwargs or len(seen.args) != 1:
        return False
    [a] = seen.args
    return isinstance(a, Tensor) and isinstance(x, Tensor) and a.shape == x.shape and torch.equal(a, x)
