"""Which weights stand in front of a normalisation, and the equilibrium that only they have."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import FluctuationDissipation, MemoryRecorder, Monitor, Window
from gradiometer.autodiff.invariance import scale_invariant_weights


def inputs(*shape):
    return torch.randn(6, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens():
    return torch.randint(7, (6, 4), generator=torch.Generator().manual_seed(1))


class Picks(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean(1)


class Tied(nn.Module):
    """One weight in front of the normalisation and behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(5, 5, bias=False), nn.LayerNorm(5)
        self.last = nn.Linear(5, 5, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


class TiedInFront(nn.Module):
    """One weight used twice, each time in front of a normalisation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(self.second(torch.tanh(self.norm(self.first(x))))))


class Residual(nn.Module):
    """The sum of a branch and what went round it is normalised, not the branch."""

    def __init__(self):
        super().__init__()
        self.branch, self.norm, self.head = nn.Linear(5, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(x + self.branch(x)))


class Auxiliary(nn.Module):
    """A head that the outputs know nothing of, and an expert that nothing is sent to."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 3)
        self.auxiliary = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def zeroed(model, *names):
    for name, parameter in model.named_parameters():
        if name in names:
            nn.init.zeros_(parameter)
    return model


MODELS = {
    "conv, batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        ),
        lambda: inputs(2, 4, 4),
        ["0.weight"],  # the mean over the batch takes the bias away, so it need not be scaled along
    ),
    "conv without bias, batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        ),
        lambda: inputs(2, 4, 4),
        ["0.weight"],
    ),
    "linear, layer norm": (
        lambda: nn.Sequential(nn.Linear(5, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)),
        lambda: inputs(5),
        ["0.weight"],
    ),
    "linear with bias, layer norm": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
        lambda: inputs(5),
        [],
    ),
    "group norm": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, bias=False), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
        ),
        lambda: inputs(2, 5),
        ["0.weight"],
    ),
    "rms norm": (
        lambda: nn.Sequential(nn.Linear(5, 8, bias=False), nn.RMSNorm(8), nn.Linear(8, 3)),
        lambda: inputs(5),
        ["0.weight"],
    ),
    "a chain in front of the norm": (
        lambda: nn.Sequential(
            nn.Linear(5, 8, bias=False),
            nn.ReLU(),
            nn.Linear(8, 8, bias=False),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        ),
        lambda: inputs(5),
        ["0.weight", "2.weight"],
    ),
    "dropout": (
        lambda: nn.Sequential(
            nn.Linear(5, 8, bias=False), nn.Dropout(0.5), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 3)
        ),
        lambda: inputs(5),
        ["0.weight"],
    ),
    "tokens": (
        lambda: nn.Sequential(
            nn.Embedding(7, 5), nn.LayerNorm(5), nn.Linear(5, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)
        ),
        tokens,
        ["0.weight", "2.weight"],
    ),
    "tokens, averaged": (
        lambda: nn.Sequential(nn.Embedding(7, 5), Picks(), nn.LayerNorm(5), nn.Linear(5, 3)),
        tokens,
        ["0.weight"],
    ),
    "tied across the norm": (Tied, lambda: inputs(5), []),
    "tied in front of norms": (TiedInFront, lambda: inputs(5), ["first.weight"]),
    "residual": (Residual, lambda: inputs(5), []),
    "unused": (Auxiliary, lambda: inputs(5), ["body.weight"]),
    "a head that begins at zero": (
        lambda: zeroed(
            nn.Sequential(
                nn.Linear(5, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
            ),
            *("4.weight", "4.bias"),
        ),
        lambda: inputs(5),
        ["0.weight"],
    ),
    "a gain that begins at zero": (
        lambda: zeroed(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)), "1.weight"),
        lambda: inputs(5),
        [],
    ),
    "a bias that begins at zero": (
        lambda: zeroed(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)), "0.bias"),
        lambda: inputs(5),
        [],
    ),
}


def build(make):
    torch.manual_seed(0)
    return make().double()


@pytest.mark.parametrize("name", MODELS)
def test_weights_in_front_of_a_norm_are_found(name):
    make, x, expected = MODELS[name]
    assert scale_invariant_weights(build(make), x()) == expected


def test_gradients_of_what_is_found_are_orthogonal_to_it():
    """What the name means; held against all the models above."""
    for make, x, expected in MODELS.values():
        model = build(make)
        outputs = model(x())
        F.cross_entropy(outputs[:, -1] if outputs.ndim == 3 else outputs, torch.arange(6) % 3).backward()
        for name in expected:
            weight = model.get_parameter(name)
            cosine = (weight * weight.grad).sum() / (weight.norm() * weight.grad.norm())
            assert weight.grad.norm() == 0 or abs(cosine) < 1e-3, name


def test_in_evaluation_mode_batch_norm_does_not_normalise():
    make, x, expected = MODELS["conv without bias, batch norm"]
    assert expected == ["0.weight"]
    assert scale_invariant_weights(build(make).eval(), x()) == []


def test_frozen_weights_are_not_named():
    model = build(MODELS["a chain in front of the norm"][0])
    model[0].requires_grad_(False)
    assert scale_invariant_weights(model, inputs(5)) == ["2.weight"]


def test_a_model_without_normalisation_is_not_run():
    class Never(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            raise AssertionError

    assert scale_invariant_weights(Never(), inputs(5)) == []


def test_outputs_are_those_of_the_forward_that_is_given():
    model = nn.ModuleDict({"body": build(MODELS["linear, layer norm"][0])})
    assert scale_invariant_weights(model, inputs(5), lambda model, x: model["body"](x)) == ["body.0.weight"]


class Random(nn.Module):
    """Masks from three global generators, and running statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(8, 3)
        self.resting = nn.Dropout(0.5).eval()
        self.register_buffer("calls", torch.zeros(()))
        self.last = 0.0

    def forward(self, x):
        self.calls += 1
        self.last = random.random() + float(np.random.rand())  # noqa: NPY002
        return self.head(self.resting(self.dropout(self.norm(self.first(x))))) * (1 + self.last)


def test_the_model_and_the_random_state_are_left_as_found():
    model = build(Random)
    model(inputs(5))

    def look():
        generators = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [(id(module), module.training) for module in model.modules()]
        return generators, state, modes, model.last, [(id(p), p.grad) for p in model.parameters()]

    before = look()
    assert scale_invariant_weights(model, inputs(5)) == ["first.weight"]  # the masks are the same each time
    after = look()
    assert torch.equal(before[0][0], after[0][0])
    assert before[0][1:] == after[0][1:]
    assert all(torch.equal(tensor, after[1][name]) for name, tensor in before[1].items())
    assert before[2:] == after[2:]


# -- through the monitor ---------------------------------------------------------------------------


def measured(model, x, *, steps=3, schedule=1, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    memory = MemoryRecorder()
    observable = FluctuationDissipation(schedule=schedule, sampling=1)
    with Monitor(model, optimizer, [observable], recorders=[memory]) as monitor:
        for _ in range(steps):
            with monitor.micro_batch(x, torch.arange(len(x)) % 3):
                F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return memory.latest()


def test_looking_for_them_leaves_the_run_bit_identical():
    def run(watched):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        model = Random().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        monitor = Monitor(model, optimizer, [FluctuationDissipation(schedule=1)]) if watched else None
        for _ in range(4):
            x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
            if monitor is not None:
                monitor.begin_micro_batch(x, y)
            F.cross_entropy(model(x), y).backward()
            if monitor is not None:
                monitor.end_micro_batch()
                monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        return copy.deepcopy(model.state_dict())

    plain, watched = run(False), run(True)
    assert all(torch.equal(tensor, watched[name]) for name, tensor in plain.items())


def test_they_are_read_apart():
    model = build(MODELS["linear, layer norm"][0])
    latest = measured(model, inputs(5))
    key = "dynamics/fdr/weight_norm_sq"
    assert latest[f"{key}/0.scale_invariant"].value == pytest.approx(
        float(model[0].weight.detach().square().sum()), rel=1e-12
    )
    assert latest[key].value == pytest.approx(
        latest[f"{key}/0"].value + latest[f"{key}/0.scale_invariant"].value, rel=1e-12
    )


LR, DECAY, WIDTH = 0.05, 0.02, 40


class OnTheSphere(nn.Module):
    """Linear in the direction of a weight; and a shift, whose scale does matter."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(WIDTH, 1, dtype=torch.float64)
        self.weight = nn.Parameter(norm * weight / weight.norm())
        self.norm = nn.RMSNorm(WIDTH, elementwise_affine=False, eps=1e-30)
        self.shift = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return x @ self.norm(self.weight.T).T / WIDTH**0.5 + self.shift**2  # x . w / |w|


def sphere(norm, steps, schedule, window=10**6):
    """SGD with L2; the record, and the mean squared gradient at unit norm of every step."""
    model, memory, squares = OnTheSphere(norm), MemoryRecorder(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(3)
    observable = FluctuationDissipation(schedule=schedule, sampling=5, estimator=Window(window))
    with Monitor(model, optimizer, [observable], recorders=[memory], on_error="raise") as monitor:
        for _ in range(steps):
            x = torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)
            with monitor.micro_batch(x):
                model(x).sum().backward()
            squares.append(float((model.weight.grad * model.weight.detach().norm()).square().sum()))
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return memory, np.array(squares)


def series(memory, name):
    values = dict(memory.series(f"dynamics/fdr/{name}"))
    return np.array(list(values)), np.array(list(values.values()))


@pytest.mark.slow
def test_the_norm_of_a_scale_invariant_weight_comes_to_its_equilibrium():
    # relaxation time 1 / (4 lr decay) = 250 steps; |g|^2 fluctuates from step to step by a fifth
    memory, squares = sphere(8.0, steps=6001, schedule=100, window=3000)
    name = "0.scale_invariant"
    steps, norms = series(memory, f"weight_norm_sq/{name}")
    expected = math.sqrt(LR * squares[3000:].mean() / (2 * DECAY - LR * DECAY**2))
    assert norms[0] > 4 * expected
    assert norms[steps >= 3000].mean() == pytest.approx(expected, rel=0.01)
    _, ratio = series(memory, f"ratio/{name}")
    assert ratio[-1] == pytest.approx(1.0, abs=0.01)
    assert ratio[0] > 3
    _, decisions = series(memory, f"stationary/{name}")
    assert (decisions[9], decisions[-1]) == (0.0, 1.0)


def test_its_relaxation_time_is_a_quarter_of_that_of_the_decay():
    start = 8.0
    memory, squares = sphere(start, steps=1001, schedule=50)
    steps, norms = series(memory, "weight_norm_sq/0.scale_invariant")
    fixed = LR * squares.mean() / (2 * DECAY - LR * DECAY**2)
    # a step adds lr^2 |g|^2 / |w|^2 to |w|^2 and takes 2 lr decay |w|^2: |w|^4 relaxes at the rate 4 lr decay
    predicted = np.sqrt(fixed + (start**4 - fixed) * np.exp(-4 * LR * DECAY * steps))
    np.testing.assert_allclose(norms, predicted, rtol=0.05)
    assert norms[0] / norms[-1] > 2
    halved = np.sqrt(fixed + (start**4 - fixed) * np.exp(-2 * LR * DECAY * steps))
    assert np.abs(norms / halved - 1).max() > 0.2  # so the line above can fail
