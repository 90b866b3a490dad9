"""One rank of a data-parallel run; writes its readings as JSON lines. Run by test_parallel.py."""

import sys
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    JSONLinesRecorder,
    Monitor,
    NeuralTangentKernel,
)


def main(rank: int, meeting: str, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    observables = [
        NeuralTangentKernel(schedule=4),
        JacobianNorm(schedule=4),
        GradientNoiseScale(schedule=3),
        FluctuationDissipation(schedule=2, sampling=1),
    ]
    data = torch.Generator().manual_seed(rank)  # every rank sees batches of its own
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(net, optimizer, observables, recorders=[JSONLinesRecorder(path)]) as monitor:
            for _ in range(9):
                x, y = torch.randn(6, 3, generator=data), torch.randint(2, (6,), generator=data)
                with monitor.micro_batch(x, y):
                    F.cross_entropy(model(x), y).backward()
                monitor.before_step()
                optimizer.step()
                optimizer.zero_grad()
    print("\n".join(str(each.message) for each in caught))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
