"""Which parameters are read together in a running monitor, and under which settings they are trained."""

from __future__ import annotations

import torch
from torch import nn

from ..autodiff.invariance import scale_invariant_weights
from ..collect.sections import Sections
from ..collect.snapshot import Probe
from ..optimizers import group_settings
from .calls import Calls
from .guard import Guard


class Division:
    """Sections of the parameters: as groups come, and once for scale-invariant weights.

    Args:
        model: The model being trained.
        optimizer: Its optimizer.
        calls: Knows how the network is run.
        guard: Says it where scale-invariant weights cannot be told apart.
        layers: Whether each layer is a section.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        calls: Calls,
        guard: Guard,
        *,
        layers: bool,
    ) -> None:
        self._model, self._optimizer, self._calls = model, optimizer, calls
        self._guard, self._layers = guard, layers
        self.invariant: list[str] | None = None
        """Names of the weights whose scale does not change the outputs; ``None`` until looked for."""
        self.stale = True
        """Whether the optimizer's settings may have changed since they were read."""
        self.divide()

    def divide(self) -> None:
        """Read the groups, and divide the parameters anew."""
        self.read_settings()
        self._sizes = [len(group["params"]) for group in self._optimizer.param_groups]
        names = [group.name for group in self.groups]
        invariant = self.invariant or ()
        self.sections = Sections(
            self._model, self._optimizer, names, layers=self._layers, invariant=invariant
        )

    def read_settings(self) -> None:
        """Read the optimizer's settings as they are now."""
        self.groups = group_settings(self._optimizer)

    def names(self) -> list[str]:
        """Names of the parameter groups at this moment."""
        return [group.name for group in group_settings(self._optimizer)]

    def follow(self, probe: Probe | None, *, thorough: bool) -> bool:
        """Keep the sections right at a step on which something is measured.

        Args:
            probe: Tells scale-invariant weights apart; ``None`` where nothing due asks for that.
            thorough: Whether to look at every parameter, as is done where something is recorded; between
                records only new parameters are noticed, not ones that are trained again.

        Returns:
            Whether other parameters are read together from now on.
        """
        looked = self.invariant is not None or probe is None
        sizes = [len(group["params"]) for group in self._optimizer.param_groups]
        if looked and (self.sections.cover(self._optimizer) if thorough else sizes == self._sizes):
            return False
        if probe is not None:
            self.invariant = self._find_invariant(probe)
        before = self.sections.sections
        self.divide()
        return looked or self.sections.sections != before

    def _find_invariant(self, probe: Probe) -> list[str]:
        """Names of the scale-invariant weights; none where the model cannot be run on the probe."""
        try:
            return scale_invariant_weights(self._model, probe.inputs, self._calls.forward)
        except Exception as error:
            if not self._guard.contains:
                raise
            self._guard.warn(
                "scale-invariant weights are read together with the others, because looking for them failed: "
                f"{type(error).__name__}: {error}"
            )
            return []

    def label(self, name: str) -> str:
        """``ratio/1`` with the second section's own name in the place of its index.

        Args:
            name: A reading's name.
        """
        base, _, index = name.partition("/")
        return f"{base}/{self.sections.sections[int(index)].name}" if index else name
