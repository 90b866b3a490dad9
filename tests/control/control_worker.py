"""One rank of a data-parallel run under a controller; prints what it decided."""

import json
import sys
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gradiometer.parallel
from gradiometer import (
    Controller,
    EquilibriumLR,
    GradientNoiseScale,
    GrowingBatchSampler,
    MemoryRecorder,
    Monitor,
    NoiseScaleBatchSize,
    Observable,
    Quantity,
)
from gradiometer.control import Effect
from gradiometer.record.readings import Decision


@dataclass(frozen=True, kw_only=True)
class Local(Observable):
    """A level of this process alone: 1 on rank 0 at every third record, on rank 1 at every second."""

    group = "local"
    quantities: ClassVar = {"value": Quantity("1", "Of this process.")}

    def levels(self, snapshot):
        turn = snapshot.step // 2
        return {"value": torch.tensor(float(turn % (2 if dist.get_rank() else 3) == 0))}

    def readings(self, now, reference):
        return {"value": now["value"]}


@dataclass(frozen=True)
class Halve(Controller):
    """Halves the rate wherever the local reading is 1; in one kind of run it breaks."""

    knobs = ("learning_rate",)
    dry_run: bool = False
    breaks: bool = False

    def observables(self):
        return (Local(schedule=2),)

    def start(self):
        return {"next": 0, "factor": 1.0}

    def effect(self, state):
        return Effect({"": state["factor"]})

    def decide(self, view, state):
        if self.breaks:
            raise RuntimeError("out of luck")
        factor = 0.5 if view.number("local/value") else 1.0
        decision = Decision(view.step, "Halve", "learning_rate", "", view.seen("local/value"), 0.1, factor)
        return [decision], {"next": view.step + 1, "factor": state["factor"] * factor}, ""


def grow(rank):
    """Batches of 4 on each rank, doubled by the noise between them."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(4096, 64), torch.zeros(4096, dtype=torch.long))
    data.tensors[1][:] = (data.tensors[0][:, 0] + torch.randn(4096) > 0).long()
    sampler = GrowingBatchSampler(DistributedSampler(data, num_replicas=2, rank=rank), 4, drop_last=True)
    net = nn.Linear(64, 2)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    growing = NoiseScaleBatchSize(sampler=sampler, check_every=20, patience=2, max_batch_size=32)
    memory = MemoryRecorder()
    observables = [GradientNoiseScale(schedule=10, sampling=1)]
    monitor = Monitor(
        net, optimizer, observables, controllers=[growing], recorders=[memory], dataset_size=len(data)
    )
    sizes = []
    for x, y in DataLoader(data, batch_sampler=sampler):
        with monitor.micro_batch(x, y):
            F.cross_entropy(model(x), y).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(len(x))
    found = {
        "decisions": [decision.plain() for decision in monitor.decisions],
        "in_force": memory.series("dynamics/control/batch_size"),
        "sizes": sizes,
        "weights": [p.tolist() for p in net.parameters()],
        "said": [],
    }
    print(json.dumps(found))


def controllers(kind, rank):
    if kind == "idle":
        return [] if rank == 1 else [Halve()]
    if kind == "equilibrium":
        return [EquilibriumLR(policy="yaida", tolerance=0.9, check_every=20, factor=0.5)]
    return [Halve(breaks=kind == "breaks")]


def main(kind: str, rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    gradiometer.parallel.PATIENCE = 2.0
    if kind == "grow":
        grow(rank)
        dist.barrier()
        dist.destroy_process_group()
        return
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.05)
    in_force = []
    data = torch.Generator().manual_seed(rank)  # every rank sees batches of its own
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = Monitor(net, optimizer, [], controllers=controllers(kind, rank))
        optimizer.register_step_pre_hook(lambda *_: in_force.append(optimizer.param_groups[0]["lr"]))
        for _ in range(1000 if kind == "equilibrium" else 14):
            x = torch.randn(6, 3, generator=data)
            y = (x[:, 0] > 0).long()
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    found = {
        "decisions": [decision.plain() for decision in monitor.decisions],
        "in_force": in_force,
        "weights": [p.tolist() for p in net.parameters()],
        "said": [str(each.message) for each in caught],
    }
    monitor.close()
    print(json.dumps(found))
    dist.barrier()  # gloo aborts a process whose peer leaves in the middle of a message
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
