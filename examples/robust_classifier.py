"""Digits that are read under noise: training with and without the Jacobian regulariser.

python examples/robust_classifier.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradiometer import JacobianNorm, JacobianRegularizer, MemoryRecorder, Monitor, jacobian_norms

STEPS, BATCH, HELD_OUT, NOISE = 600, 100, 360, 1.0


def load() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    x = torch.as_tensor(digits.data, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean()) / x.std())[order], torch.as_tensor(digits.target)[order]


def train(strength: float, steps: int) -> tuple[nn.Module, Monitor, MemoryRecorder]:
    torch.manual_seed(0)
    x, y = (each[HELD_OUT:] for each in load())
    layers = [nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    regularizer = JacobianRegularizer(strength)
    memory = MemoryRecorder()
    with Monitor(model, optimizer, [JacobianNorm(schedule=20)], recorders=[memory]) as monitor:
        for _ in range(steps):
            batch = torch.randint(len(x), (BATCH,))
            inputs, targets = x[batch].requires_grad_(), y[batch]
            with monitor.micro_batch(inputs, targets):
                logits = model(inputs)
                loss = F.cross_entropy(logits, targets) + regularizer(inputs, logits)
                loss.backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return model, monitor, memory


def held_out(model: nn.Module) -> tuple[float, float, float]:
    """Accuracy on clean digits, under noise, and the mean norm of the Jacobian."""
    x, y = (each[:HELD_OUT] for each in load())
    noise = NOISE * torch.randn(20, *x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        clean, noisy = ((model(inputs).argmax(-1) == y).float().mean().item() for inputs in (x, x + noise))
    return clean, noisy, jacobian_norms(model, x).mean().item()


def main(steps: int = STEPS) -> MemoryRecorder:
    runs = {strength: train(strength, steps) for strength in (0.0, 0.01)}
    _, monitor, memory = runs[0.01]
    print(monitor.table())
    print(f"\n{'strength':>8} {'accuracy':>9} {'under noise':>12} {'mean |J|':>9}")
    for strength, (model, _, _) in runs.items():
        clean, noisy, norm = held_out(model)
        print(f"{strength:8} {clean:9.3f} {noisy:12.3f} {norm:9.2f}")
    return memory


if __name__ == "__main__":
    main()
