"""A script with a warm-up and then a constant learning rate, and a line that lowers it once it has settled.

python examples/equilibrium.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradiometer import EquilibriumLR, MemoryRecorder, Monitor

STEPS, BATCH, RATE, DECAY, WARM_UP, HELD_OUT = 8000, 10, 0.1, 0.01, 100, 360


def load() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    x = torch.as_tensor(digits.data, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean()) / x.std())[order], torch.as_tensor(digits.target)[order]


def train(steps: int, *, settle: bool) -> tuple[nn.Module, Monitor, MemoryRecorder]:
    torch.manual_seed(0)
    x, y = (each[HELD_OUT:] for each in load())
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=DECAY)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=WARM_UP)
    memory = MemoryRecorder()
    monitor = Monitor(
        model,
        optimizer,
        controllers=[EquilibriumLR()] if settle else [],  # the line
        recorders=[memory],
        dataset_size=len(x),
    )
    with monitor:
        for _ in range(steps):
            batch = torch.randint(len(x), (BATCH,))
            with monitor.micro_batch(x[batch], y[batch]):
                F.cross_entropy(model(x[batch]), y[batch]).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
            warm_up.step()
    return model, monitor, memory


def scores(model: nn.Module) -> tuple[float, float]:
    """The loss that is minimised, decay included, and the accuracy on digits that were kept back."""
    x, y = load()
    with torch.no_grad():
        logits = model(x)
        norm = sum(parameter.square().sum() for parameter in model.parameters())
    loss = F.cross_entropy(logits[HELD_OUT:], y[HELD_OUT:]) + DECAY / 2 * norm
    return loss.item(), (logits[:HELD_OUT].argmax(-1) == y[:HELD_OUT]).float().mean().item()


def main(steps: int = STEPS) -> MemoryRecorder:
    constant, settled = train(steps, settle=False), train(steps, settle=True)
    _, monitor, memory = settled
    print(monitor.table())
    print(f"\n{'learning rate':<16} {'training loss':>14} {'accuracy':>9}")
    for name, (model, _, _) in (("constant", constant), ("EquilibriumLR", settled)):
        loss, accuracy = scores(model)
        print(f"{name:<16} {loss:>14.4f} {accuracy:>9.3f}")
    return memory


if __name__ == "__main__":
    main()
