"""An observable of your own, in one class: the size of the weights and how uneven they are.

python examples/new_observable.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradiometer import Ema, MemoryRecorder, Monitor, Observable, Quantity, Snapshot
from gradiometer.stats.estimators import Reference


@dataclass(frozen=True, kw_only=True)
class WeightSpread(Observable):
    """Root mean square and largest size of the weights, averaged over recent steps."""

    group: ClassVar[str] = "weights"
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "rms": Quantity("parameter", "Root mean square of the weights."),
        "crest": Quantity("1", "Largest weight over the root mean square."),
    }

    def statistics(self, snapshot: Snapshot) -> dict[str, Tensor]:
        flat = torch.cat([p.detach().flatten() for p in snapshot.model.parameters()])
        return {"mean_sq": flat.square().mean(), "largest": flat.abs().max()}

    def readings(self, now: Mapping[str, Tensor], reference: Reference) -> dict[str, Tensor]:
        rms = now["mean_sq"].sqrt()  # average first, take the root and divide last
        return {"rms": rms, "crest": now["largest"] / rms}


def main(steps: int = 50) -> MemoryRecorder:
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    memory = MemoryRecorder()
    observables = [WeightSpread(schedule=5, sampling=1, estimator=Ema(0.9))]
    with Monitor(model, optimizer, observables, recorders=[memory]) as monitor:
        for _ in range(steps):
            x = torch.randn(16, 8)
            with monitor.micro_batch(x):
                (model(x) - x[:, :1]).square().mean().backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        print(monitor.table())
    return memory


if __name__ == "__main__":
    main()
