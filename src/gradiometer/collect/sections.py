"""Which parameters are read together: optimizer groups, layers on request, scale-invariant weights apart.

Noise and fluctuation-dissipation are sums over parameters, so each collector gives one number per
section, and every total is a sum of sections.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..record.readings import last_part
from ..stats.linalg import real_numbers

INVARIANT = "scale_invariant"


@dataclass(frozen=True)
class Section:
    """Some parameters of one optimizer group.

    Args:
        name: The last part of the log keys of its own readings.
        group: Index of the optimizer group.
        parameters: How many real numbers it holds.
    """

    name: str
    group: int
    parameters: int


class Sections:
    """The parameters an optimizer trains, divided.

    Args:
        model: The model being trained.
        optimizer: Its optimizer.
        group_names: A name for each of its parameter groups.
        layers: Whether each module that owns parameters is a section.
        invariant: Names of weights whose scale does not change the outputs; sections of their own.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> [section.name for section in Sections(net, sgd, ["0"], layers=True).sections]
        ['layer.0', 'layer.1']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        group_names: Sequence[str],
        *,
        layers: bool = False,
        invariant: Collection[str] = (),
    ) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self.parameters: list[Tensor] = []
        self._section: dict[int, int] = {}
        sizes: dict[tuple[str, int], int] = {}
        for index, (group, group_name) in enumerate(zip(optimizer.param_groups, group_names, strict=True)):
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                name = names.get(id(parameter), "other.parameter").replace("_orig_mod.", "")
                layer = f"layer.{last_part(name.rpartition('.')[0], 'model')}"
                label = layer if layers else group_name
                key = (f"{label}.{INVARIANT}" if name in invariant else label, index)
                sizes[key] = sizes.get(key, 0) + real_numbers(parameter)
                self._section[id(parameter)] = list(sizes).index(key)
                self.parameters.append(parameter)
        labels = [label for label, _ in sizes]
        self.sections = tuple(  # a layer whose parameters are in several groups is as many sections
            Section(f"{label}.{group_names[group]}" if labels.count(label) > 1 else label, group, size)
            for (label, group), size in sizes.items()
        )
        self._lookup: tuple[list[int], Tensor] | None = None

    def cover(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether every parameter that is trained now has a section; frozen ones keep theirs.

        Args:
            optimizer: The optimizer, whose groups may have grown.
        """
        return all(
            id(parameter) in self._section
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        )

    def sums(self, function: Callable[..., Tensor], parameters: Sequence[Tensor], *tensors: Any) -> Tensor:
        """Add one number per parameter within each section.

        Args:
            function: Maps lists of tensors to one number for each.
            parameters: The parameters these belong to.
            tensors: Lists of tensors, as many as parameters.

        Shapes:
            ``[U]``, on the parameters' device, or on the CPU where they are on several.
        """
        if not parameters:
            return torch.zeros(len(self.sections), dtype=torch.float64)
        if len({parameter.device for parameter in parameters}) == 1:
            return self.reduce(parameters, function(*tensors))
        singles = zip(*tensors, strict=True)
        return self.reduce(
            parameters, torch.cat([function(*[[tensor] for tensor in row]).cpu() for row in singles])
        )

    def reduce(self, parameters: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Add rows of numbers within each section.

        Args:
            parameters: The parameter each row belongs to.
            rows: Numbers.

        Shapes:
            rows ``[n, ...]`` -> ``[U, ...]``.
        """
        if len(self.sections) == 1:
            return rows.sum(0, keepdim=True)
        count = len(self.sections)  # what has no section was never trained: its rows go into one more
        members = [self._section.get(id(parameter), count) for parameter in parameters]
        if self._lookup is None or self._lookup[0] != members or self._lookup[1].device != rows.device:
            self._lookup = members, torch.tensor(members, device=rows.device)
        sums = rows.new_zeros(count + 1, *rows.shape[1:])
        return sums.index_add_(0, self._lookup[1], rows)[:count]
