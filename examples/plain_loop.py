"""The monitor in a plain loop: accumulation, clipping, three recorders.

python examples/plain_loop.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    JSONLinesRecorder,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    TensorBoardRecorder,
    every,
    log_spaced,
)

STEPS, ACCUMULATE, BATCH = 400, 2, 32


def main(steps: int = STEPS, log_dir: str = "runs/plain_loop") -> MemoryRecorder:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.as_tensor(digits.data, dtype=torch.float32) / 8 - 1
    y = torch.as_tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    memory = MemoryRecorder()
    monitor = Monitor(
        model,
        optimizer,
        observables=[
            NeuralTangentKernel(schedule=log_spaced() | every(100)),
            JacobianNorm(schedule=50),
            GradientNoiseScale(schedule=10),
            FluctuationDissipation(schedule=20, sampling=5),
        ],
        recorders=[memory, TensorBoardRecorder(log_dir), JSONLinesRecorder(f"{log_dir}/dynamics.jsonl")],
        dataset_size=len(x),
    )
    for _ in range(steps):
        for _ in range(ACCUMULATE):
            batch = torch.randint(len(x), (BATCH,))
            with monitor.micro_batch(x[batch], y[batch]):
                loss = F.cross_entropy(model(x[batch]), y[batch]) / ACCUMULATE
                loss.backward()
        monitor.before_step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    print(monitor.table())
    return memory


if __name__ == "__main__":
    main()
