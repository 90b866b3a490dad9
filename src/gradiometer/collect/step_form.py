"""How the optimizer makes each parameter's steps."""

from __future__ import annotations

from torch import Tensor

from ..errors import SampleSkippedError, UnsupportedError
from ..optimizers import ParameterStep, family_of
from .base import Collector


class StepFactorCollector(Collector):
    """How far the optimizer moves each weight per unit of gradient, relative to the first group's rate."""

    def result(self) -> dict[str, float | Tensor]:
        """By parameter name."""
        optimizer = self.training.optimizer
        family = family_of(optimizer)
        if not family.steps_known:
            raise UnsupportedError(
                "how the optimizer makes its steps is known for SGD, Adam and AdamW",
                got=type(optimizer).__name__,
                fix="Leave LearningRateLimit out; write NeuralTangentKernel(preconditioned=False).",
            )
        names = {id(p): name for name, p in self.training.model.named_parameters() if p.requires_grad}
        reference = float(optimizer.param_groups[0]["lr"])
        if reference == 0.0:
            raise SampleSkippedError(
                "the first group's learning rate is 0 at this step, and the others cannot be relative to it",
                fix="This step is left out; put a group that is trained first.",
            )
        metric = family.metric(optimizer) if family.adaptive else None
        factors: dict[str, float | Tensor] = dict.fromkeys(names.values(), 0.0)
        for group in optimizer.param_groups:
            rate = float(group["lr"]) / reference
            for parameter in group["params"]:
                factor = metric.of(parameter) if metric is not None else 1.0
                if id(parameter) in names and factor is not None:
                    factors[names[id(parameter)]] = rate * factor
        return factors


class ParameterStepCollector(Collector):
    """How the optimizer makes each parameter's steps; one that it does not move has rate 0.

    A gradient that holds the mean loss c times is that of the mean loss with c times the learning rate and
    1/c of the L2 coefficient.
    """

    def result(self) -> dict[str, ParameterStep]:
        """By parameter name."""
        optimizer = self.training.optimizer
        if any(group["maximize"] for group in optimizer.param_groups if "maximize" in group):
            raise UnsupportedError(
                "a stable learning rate is known where the optimizer minimises",
                got="maximize=True",
                fix="Leave maximize=True out, and train on the negative of the objective.",
            )
        family = family_of(optimizer)
        names = {id(p): name for name, p in self.training.model.named_parameters()}
        reference, multiple = (
            float(optimizer.param_groups[0]["lr"]),
            self.step.loss_multiple(),
        )
        factors = StepFactorCollector(self.training, self.step, self.memory).result()
        steps = {name: ParameterStep(rate=0.0) for name in factors}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(id(parameter), "")
                factor = factors.get(name, 0.0)
                if isinstance(factor, float) and factor == 0.0:  # not the model's, or not moved
                    continue
                steps[name] = family.parameter_step(group, factor * reference, multiple)
        return steps
