"""Full-batch gradient descent ends at the edge of stability: a check of Hessian products on a real run."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from gradiometer.autodiff.products import hessian_vector_product


def squared_error(out, y):
    return (out - y).square().sum(1).mean() / 2


def sharpness(model, x, y, start):
    """Largest eigenvalue of the Hessian, and its eigenvector."""
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]

    def product(vector):
        parts = torch.as_tensor(vector.ravel(), dtype=x.dtype).split(sizes)
        pieces = [part.reshape(p.shape) for part, p in zip(parts, parameters, strict=True)]
        (found,) = hessian_vector_product(model, squared_error, x, y, [pieces])
        return torch.cat([part.reshape(-1) for part in found]).numpy()

    operator = LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.float32)
    values, vectors = eigsh(operator, k=1, which="LA", v0=start, tol=1e-3)
    return values[0], vectors[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.3, 0.4])
def test_sharpness_hovers_at_two_over_the_learning_rate(lr):
    """Cohen et al. 2021, arXiv:2103.00065."""
    digits = load_digits()
    x = torch.tensor(digits.data[:500] / 8 - 1, dtype=torch.float32)
    y = F.one_hot(torch.tensor(digits.target[:500]), 10).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    ratios, start = [], None
    for step in range(3000):
        squared_error(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2000 and step % 100 == 0:
            value, start = sharpness(model, x, y, start)
            ratios.append(value * lr / 2)
    assert 0.95 < np.mean(ratios) < 1.06
