"""Coverage of the stated 95 % intervals on the gradients of a real, frozen network."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from gradiometer.observables.gradient_noise_scale import resolved_scale
from gradiometer.stats.jackknife import correlated_jackknife, t_quantile

REPLICAS, STEPS, PARTS, SIZE, EXAMPLES = 500, 64, 8, 4, 200
BLOCKS = 32


@pytest.fixture(scope="module")
def population():
    """Inner products of the gradients of 200 examples under an MLP that has learnt a little."""
    digits = load_digits()
    x = torch.tensor(digits.data[:EXAMPLES] / 8 - 1)
    y = torch.tensor(digits.target[:EXAMPLES])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = []
    for i in range(EXAMPLES):
        gradients = torch.autograd.grad(
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters())
        )
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    gradients = torch.stack(rows)
    return gradients @ gradients.mT


@pytest.fixture(scope="module")
def averages(population):
    """Trace and squared gradient of every step of every replica, from batches drawn with replacement."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(STEPS):
        drawn = torch.randint(EXAMPLES, (REPLICAS, PARTS, SIZE), generator=generator)
        counts = torch.zeros(REPLICAS, PARTS, EXAMPLES, dtype=torch.float64)
        counts.scatter_add_(2, drawn, torch.full(drawn.shape, 1 / SIZE, dtype=torch.float64))
        parts = ((counts @ population) * counts).sum(-1).mean(1)
        whole = counts.mean(1)
        batch = ((whole @ population) * whole).sum(-1)
        trace = (parts - batch) / (1 / SIZE - 1 / (PARTS * SIZE))
        steps.append(torch.stack([trace, batch - trace / (PARTS * SIZE)]))
    return torch.stack(steps)


def replicates(series):
    """The average over blocks, and the averages that each leave one out."""
    blocks = series.reshape(BLOCKS, -1).mean(1)
    return torch.cat([blocks.mean()[None], (blocks.sum() - blocks) / (BLOCKS - 1)])


def test_intervals_of_a_frozen_networks_noise_cover(population, averages):
    signal = population.mean().item()
    trace = (population.diagonal().mean() - population.mean()).item()
    weights = torch.ones(BLOCKS, dtype=torch.float64)
    covered = {"trace": 0, "grad_sq_norm": 0, "scale": 0}
    for replica in range(REPLICAS):
        rows = torch.stack([replicates(averages[:, i, replica]) for i in (0, 1)], 1)
        error = correlated_jackknife(rows[0], rows[1:], weights)
        for i, (name, truth) in enumerate((("trace", trace), ("grad_sq_norm", signal))):
            half = t_quantile(int(error.groups[i])) * error.stderr[i]
            covered[name] += bool((rows[0, i] - truth).abs() < half)
        scale = resolved_scale(rows[:, 0], rows[:, 1], weights, 1.0)["scale"]
        covered["scale"] += bool(scale.low < trace / signal < scale.high)
    share = {name: count / REPLICAS for name, count in covered.items()}
    assert all(0.92 <= value <= 0.98 for value in share.values()), share
