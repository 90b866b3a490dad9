"""One rank of a data-parallel run; writes its readings as JSON lines. Run by test_parallel.py."""

import json
import sys
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradiometer.parallel
from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    JSONLinesRecorder,
    Mean,
    Monitor,
    NeuralTangentKernel,
)
from gradiometer.errors import UnsupportedError

BATCH = 6


class Fragile(GradientNoiseScale):
    """Cannot be had on the second rank, where the run goes on all the same."""

    group = "fragile"

    def statistics(self, snapshot):
        if dist.get_rank() == 1:
            raise UnsupportedError("no such thing here")
        return super().statistics(snapshot)


def observables(kind, rank):
    if kind == "default":
        return [
            NeuralTangentKernel(schedule=4),
            JacobianNorm(schedule=4),
            GradientNoiseScale(schedule=3),
            FluctuationDissipation(schedule=2, sampling=1),
        ]
    if kind == "idle" and rank == 1:
        return []
    if kind == "fragile":
        return [GradientNoiseScale(schedule=2), Fragile(schedule=2, sampling=1)]
    return [GradientNoiseScale(schedule=1, estimator=Mean())]


def main(kind: str, rank: int, meeting: str, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    gradiometer.parallel.PATIENCE = 2.0
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    model = DistributedDataParallel(net)
    still = kind in ("noise", "accumulate")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0 if still else 0.1, momentum=0.9)
    data = torch.Generator().manual_seed(rank)  # every rank sees batches of its own
    micro_batches = 3 if kind == "accumulate" else 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = None
        if not (kind == "alone" and rank == 1):
            monitor = Monitor(net, optimizer, observables(kind, rank), recorders=[JSONLinesRecorder(path)])
        for _ in range(120 if still else 9):
            for part in range(micro_batches):
                x = torch.randn(BATCH, 3, generator=data)
                y = (x[:, 0] > 0).long()
                with gradiometer_context(monitor, x, y), accumulating(model, part < micro_batches - 1):
                    (F.cross_entropy(model(x), y) / micro_batches).backward()
                if kind == "outside":
                    (0.1 * model(x).square().mean()).backward()
            change(kind, net)
            if monitor is not None:
                monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        if monitor is not None:
            monitor.close()
    weights = [p.tolist() for p in net.parameters()]
    print(json.dumps({"said": [str(each.message) for each in caught], "weights": weights}))
    dist.barrier()  # gloo aborts a process whose peer leaves in the middle of a message
    dist.destroy_process_group()


def change(kind: str, net: nn.Module) -> None:
    """What comes between the backward passes and ``before_step``."""
    if kind == "clipped":
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    elif kind == "summed":
        for parameter in net.parameters():
            parameter.grad *= dist.get_world_size()


class Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def gradiometer_context(monitor, x, y):
    return Nothing() if monitor is None else monitor.micro_batch(x, y)


def accumulating(model, more):
    return model.no_sync() if more else Nothing()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
