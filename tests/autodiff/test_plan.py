"""A plan is used again only where the network is still the one it was made for."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import empirical_ntk
from gradiometer.autodiff import tape

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Does something else when its switch is turned; the modules stay."""

    def __init__(self, kind="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first = nn.Linear(3, 3, dtype=torch.float64)
        self.second = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.kind == "detached":
            h = h.detach()
        if self.kind == "twice":
            h = torch.tanh(self.first(h))
        out = self.second(h)
        if self.kind == "by hand":
            out = out + x @ self.first.weight
        if self.kind == "tied":
            out = F.linear(h, self.first.weight, self.second.bias)
        return out


@pytest.fixture
def learned(monkeypatch):
    """How often a plan was made."""
    plans = []
    true = tape.learn

    def learn(*arguments):
        plans.append(true(*arguments))
        return plans[-1]

    monkeypatch.setattr(tape, "learn", learn)
    return plans


def test_one_plan_serves_a_training_run(learned):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        fresh = empirical_ntk(copy.deepcopy(model), X)
        assert torch.equal(empirical_ntk(model, X), fresh)
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(learned) == 1 + 5  # and one for each copy


@pytest.mark.parametrize("kind", ["detached", "twice", "by hand", "tied"])
@pytest.mark.parametrize("back", [False, True])
def test_another_course_makes_another_plan(kind, back, learned):
    model = Net(kind if back else "plain")
    empirical_ntk(model, X)
    model.kind = "plain" if back else kind
    with_old_plan = empirical_ntk(model, X, outputs="full")
    jacobian = torch.func.vmap(
        torch.func.jacrev(lambda p, x: torch.func.functional_call(model, p, (x,))), (None, 0)
    )
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    J = torch.cat([j.flatten(2) for j in jacobian(parameters, X).values()], 2)
    torch.testing.assert_close(with_old_plan, torch.einsum("aip,bjp->abij", J, J))
    assert len(learned) == 2


def changes():
    def freeze(model):
        model.first.bias.requires_grad_(False)

    def replace(model):
        model.second = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64))

    def tie(model):
        model.second.weight = model.first.weight

    return [freeze, replace, tie]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_other_parameters_make_another_plan(change, learned):
    model = Net()
    empirical_ntk(model, X)
    change(model)
    assert torch.equal(empirical_ntk(model, X), empirical_ntk(copy.deepcopy(model), X))
    assert len(learned) == 3


def test_examples_of_another_shape_make_another_plan(learned):
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.LazyLinear(1), nn.Flatten())
    model(torch.randn(1, 1, 8))
    pooled = nn.Sequential(model[0], nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(4, 1))
    for length in (8, 12):
        empirical_ntk(pooled, torch.randn(3, 1, length))
    assert len(learned) == 2


def test_a_plan_does_not_keep_its_model_alive():
    before = len(tape._PLANS)
    model = Net()
    empirical_ntk(model, X)
    assert len(tape._PLANS) == before + 1
    del model
    assert len(tape._PLANS) == before
