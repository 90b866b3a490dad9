"""Digits whose batch grows with the measured noise scale, where the learning rate would have to fall.

python examples/batch_growth.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from gradiometer import GradientNoiseScale, GrowingBatchSampler, MemoryRecorder, Monitor, NoiseScaleBatchSize

STEPS, BATCH, RATE, HELD_OUT = 3600, 8, 0.05, 360


def load() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    x = torch.as_tensor(digits.data, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean()) / x.std())[order], torch.as_tensor(digits.target)[order]


def train(steps: int, *, grow: bool) -> tuple[nn.Module, Monitor, MemoryRecorder]:
    """As many examples as ``steps`` batches of the first size hold."""
    torch.manual_seed(0)
    data = TensorDataset(*(each[HELD_OUT:] for each in load()))
    sampler = GrowingBatchSampler(RandomSampler(data), BATCH)
    loader = DataLoader(data, batch_sampler=sampler)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=1e-3)
    memory = MemoryRecorder()
    monitor = Monitor(
        model,
        optimizer,
        [GradientNoiseScale(schedule=10)],
        controllers=[NoiseScaleBatchSize(sampler=sampler, check_every=50)] if grow else [],
        recorders=[memory],
        dataset_size=len(data),
    )
    left = steps * BATCH
    with monitor:
        while left > 0:
            for x, y in loader:
                with monitor.micro_batch(x, y):
                    F.cross_entropy(model(x), y).backward()
                monitor.before_step()
                optimizer.step()
                optimizer.zero_grad()
                left -= len(x)
                if left <= 0:
                    break
    return model, monitor, memory


def held_out(model: nn.Module) -> tuple[float, float]:
    """Loss and accuracy on digits that were kept back."""
    x, y = (each[:HELD_OUT] for each in load())
    with torch.no_grad():
        logits = model(x)
    return F.cross_entropy(logits, y).item(), (logits.argmax(-1) == y).float().mean().item()


def main(steps: int = STEPS) -> MemoryRecorder:
    same, grown = train(steps, grow=False), train(steps, grow=True)
    _, monitor, memory = grown
    print(monitor.table())
    print(f"\n{'batch':<16} {'updates':>8} {'loss':>8} {'accuracy':>9}")
    for name, (model, run, _) in ((f"{BATCH} throughout", same), ("growing", grown)):
        loss, accuracy = held_out(model)
        print(f"{name:<16} {run.step:>8} {loss:>8.3f} {accuracy:>9.3f}")
    return memory


if __name__ == "__main__":
    main()
