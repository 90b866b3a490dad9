import io
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import MemoryRecorder, Monitor
from gradiometer.collect import update as update_collector
from gradiometer.collect.sections import Section
from gradiometer.collect.snapshot import GroupSettings, Snapshot, Update, Weights
from gradiometer.errors import InputError
from gradiometer.observables import FluctuationDissipation, fluctuation_dissipation
from gradiometer.observables.schedules import Draws, every
from gradiometer.stats.estimators import HalfRun, Last, Mean, Window
from gradiometer.stats.stationarity import sasa_plus


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- T1: the telescoping identity ------------------------------------------------------------------


class Shared(nn.Module):
    """One hidden layer used twice, and a second output layer that every third batch leaves idle."""

    def __init__(self):
        super().__init__()
        self.first, self.hidden = nn.Linear(5, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.hidden(torch.tanh(self.hidden(h))))
        return self.heads[0](h) if self.calls % 3 == 0 else self.heads[0](h) + self.heads[1](h)


def tanh_mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def conv_net():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm1d(4),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


MODELS = {"tanh mlp": tanh_mlp, "conv net": conv_net, "shared layer": Shared}
SGD = {
    "plain": {},
    "l2": {"weight_decay": 0.02},
    "l2 maximize": {"weight_decay": 0.02, "maximize": True},
    "momentum": {"momentum": 0.9},
    "momentum l2": {"momentum": 0.5, "weight_decay": 0.02},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "dampening l2 maximize": {"momentum": 0.5, "dampening": 0.2, "weight_decay": 0.02, "maximize": True},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov l2": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.02},
    "nesterov l2 maximize": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.02, "maximize": True},
}


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


class Trajectory:
    """Weights, used gradients and buffers of every step, per parameter group, in float64."""

    def __init__(self, make_model, make_optimizer, *, steps=25, skip=6, clip=None, halves=1):
        torch.manual_seed(0)
        model = make_model().double()
        parameters = list(model.parameters())
        half = len(parameters) // 2
        groups = [parameters] if halves == 1 else [parameters[:half], parameters[half:]]
        optimizer = make_optimizer([{"params": group} for group in groups])
        x = torch.randn(steps + skip, 7, 5, generator=seeded(1), dtype=torch.float64)
        y = torch.randint(3, (steps + skip, 7), generator=seeded(2))
        self.weights, self.gradients, self.buffers = [], [], []
        for step in range(steps + skip):
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(x[step]), y[step]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            before = [flat(group) for group in groups]
            gradients = []
            for group, settings in zip(groups, optimizer.param_groups, strict=True):
                sign = -1.0 if settings["maximize"] else 1.0
                decay = settings["weight_decay"] if isinstance(optimizer, torch.optim.SGD) else 0.0
                gradients.append(sign * flat([p.grad for p in group]) + decay * flat(group))
            optimizer.step()
            if step >= skip:
                self.weights.append(before)
                self.gradients.append(gradients)
            if step >= skip - 1:
                held = [[optimizer.state[p].get("momentum_buffer") for p in group] for group in groups]
                self.buffers.append([None if b[0] is None else flat(b) for b in held])
        self.weights.append([flat(group) for group in groups])
        self.steps = steps
        self.optimizer = optimizer

    def ends(self, g):
        return self.weights[0][g].square().sum(), self.weights[-1][g].square().sum()

    def updates(self, g):
        return [a[g] - b[g] for a, b in zip(self.weights[:-1], self.weights[1:], strict=True)]

    def mean(self, terms):
        return torch.stack(list(terms)).mean()

    def relation(self, g):
        """The function under test, fed with displacements and end points only."""
        settings = self.optimizer.param_groups[g]
        u = self.updates(g)
        arguments = {}
        if settings["momentum"]:
            first, last = self.buffers[0][g], self.buffers[-1][g]
            arguments = {
                "momentum": settings["momentum"],
                "dampening": settings["dampening"],
                "nesterov": settings["nesterov"],
                "weight_dot_velocity": (self.weights[0][g] @ first, self.weights[-1][g] @ last),
                "displacement_dot_velocity": self.mean(
                    each @ b[g] for each, b in zip(u, self.buffers[1:], strict=True)
                ),
            }
        return fluctuation_dissipation(
            self.mean(each @ each for each in u), self.ends(g), self.steps, settings["lr"], **arguments
        )

    def work(self, g):
        pairs = zip(self.weights, self.gradients, strict=False)
        return self.mean(weights[g] @ gradient[g] for weights, gradient in pairs)


def close(measured, expected, scale, tolerance=1e-9):
    assert (measured - expected).abs() < tolerance * max(expected.abs(), scale)


@pytest.mark.parametrize("settings", SGD.values(), ids=SGD)
@pytest.mark.parametrize("make_model", [MODELS["tanh mlp"], MODELS["conv net"]], ids=["mlp", "conv"])
def test_left_side_from_the_end_points_is_the_mean_of_weights_times_gradient(make_model, settings):
    path = Trajectory(make_model, lambda groups: torch.optim.SGD(groups, lr=0.05, **settings))
    relation = path.relation(0)
    close(relation.left, path.work(0), relation.right)
    assert (relation.left - relation.right).abs() > 1e-6 * relation.right  # no stationary state here


@pytest.mark.parametrize("settings", [SGD["l2"], SGD["dampening"], SGD["nesterov"]], ids=str)
def test_identity_holds_for_each_parameter_group_with_clipping(settings):
    def make_optimizer(groups):
        groups[1]["lr"] = 0.01
        return torch.optim.SGD(groups, lr=0.05, **settings)

    path = Trajectory(tanh_mlp, make_optimizer, clip=0.3, halves=2)
    for g in range(2):
        relation = path.relation(g)
        close(relation.left, path.work(g), relation.right)


def test_heavy_ball_formula_breaks_the_identity_under_nesterov():
    path = Trajectory(tanh_mlp, lambda groups: torch.optim.SGD(groups, lr=0.05, **SGD["nesterov"]))
    path.optimizer.param_groups[0]["nesterov"] = False
    relation = path.relation(0)
    assert (relation.left - path.work(0)).abs() > 1e-3 * relation.right


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
        lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5),
    ],
    ids=["adamw", "rmsprop"],
)
def test_master_form_of_any_optimizer(make_optimizer):
    path = Trajectory(tanh_mlp, make_optimizer)
    u = path.updates(0)
    relation = fluctuation_dissipation(path.mean(each @ each for each in u), path.ends(0), path.steps, 0.01)
    work = path.mean(w[0] @ each / 0.01 for w, each in zip(path.weights, u, strict=False))
    close(relation.left, work, relation.right)


def test_relation_of_several_groups_is_elementwise():
    squares = torch.tensor([1.0, 2.0], dtype=torch.float64)
    lr, momentum = torch.tensor([0.1, 0.2]), torch.tensor([0.0, 0.9])
    both = fluctuation_dissipation(squares, (squares, 3 * squares), 7, lr, momentum=momentum)
    for g in range(2):
        one = fluctuation_dissipation(
            squares[g], (squares[g], 3 * squares[g]), 7, lr[g], momentum=momentum[g]
        )
        torch.testing.assert_close(both.left[g], one.left)
        torch.testing.assert_close(both.right[g], one.right)


# -- T1 through the monitor ------------------------------------------------------------------------

OPTIMIZERS = {
    **{name: (torch.optim.SGD, settings) for name, settings in SGD.items()},
    "foreach nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "foreach l2": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.02, "foreach": True}),
    "fused nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
}


def train(make_optimizer, observable, *, steps=61, make_model=tanh_mlp, scheduler=None, halves=1, clip=None):
    """A plain loop under the monitor, and per step what the identity is about."""
    torch.manual_seed(0)
    model = make_model().double()
    parameters = list(model.parameters())
    half = len(parameters) // 2
    groups = [{"params": parameters}]
    if halves == 2:
        groups = [{"params": parameters[:half], "name": "body"}, {"params": parameters[half:], "lr": 0.02}]
    optimizer = make_optimizer(groups)
    schedule = scheduler(optimizer) if scheduler else None
    memory = MemoryRecorder()
    x = torch.randn(steps, 7, 5, generator=seeded(1), dtype=torch.float64)
    y = torch.randint(3, (steps, 7), generator=seeded(2))
    work, squares = [], []
    with Monitor(model, optimizer, [observable], recorders=[memory], on_error="raise") as monitor:
        for step in range(steps):
            with monitor.micro_batch(x[step], y[step]):
                F.cross_entropy(model(x[step]), y[step]).backward()
            monitor.before_step()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            settings = optimizer.param_groups[0]
            sign = -1.0 if settings.get("maximize") else 1.0
            moving = [p for p in parameters if p.grad is not None]
            used = sign * flat([p.grad for p in moving]) + settings["weight_decay"] * flat(moving)
            work.append((flat(moving) @ used).item())
            before = flat(parameters)
            optimizer.step()
            squares.append((before - flat(parameters)).square().sum().item())
            optimizer.zero_grad()
            if schedule:
                schedule.step()
    return memory, work, squares


def values(memory, name):
    return dict(memory.series(f"dynamics/fdr/{name}"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_monitor_verifies_the_identity_on_the_update_really_made(name):
    kind, settings = OPTIMIZERS[name]
    observable = FluctuationDissipation(schedule=20, verify=True, estimator=Mean())
    memory, work, squares = train(lambda groups: kind(groups, lr=0.05, **settings), observable)
    residual = values(memory, "residual")
    assert sorted(residual) == [20, 40, 60]
    assert max(map(abs, residual.values())) < 1e-9
    if kind is torch.optim.SGD:  # from the step after the first record on
        expected = sum(work[1:]) / 60
        scale = max(abs(expected), values(memory, "right")[60])
        assert abs(values(memory, "left")[60] - expected) < 1e-9 * scale
    mean_square = sum(squares[1:]) / 60
    momentum, dampening = settings.get("momentum", 0.0), settings.get("dampening", 0.0)
    if kind is not torch.optim.SGD:
        momentum = 0.0
    if not settings.get("nesterov"):
        right = (1 + momentum) / (2 * (1 - dampening)) * mean_square / 0.05
        assert values(memory, "right")[60] == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("estimator", [HalfRun(), Window(15)], ids=["half run", "window"])
def test_monitor_verifies_over_a_moving_window(estimator):
    observable = FluctuationDissipation(schedule=5, verify=True, estimator=estimator)
    memory, work, _ = train(lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9), observable)
    residual = values(memory, "residual")
    assert sorted(residual) == list(range(5, 65, 5))
    assert max(map(abs, residual.values())) < 1e-9
    start = 30 if isinstance(estimator, HalfRun) else 45
    expected = sum(work[start + 1 : 61]) / (60 - start)
    assert values(memory, "left")[60] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("settings", [SGD["momentum l2"], SGD["nesterov"]], ids=["momentum", "nesterov"])
def test_monitor_verifies_with_layers_shared_and_idle(settings):
    observable = FluctuationDissipation(schedule=7, verify=True, estimator=Mean())
    memory, work, _ = train(
        lambda groups: torch.optim.SGD(groups, lr=0.05, **settings), observable, make_model=Shared, steps=57
    )
    assert max(map(abs, values(memory, "residual").values())) < 1e-9
    assert values(memory, "left")[56] == pytest.approx(sum(work[1:]) / 56, rel=1e-9)


def test_monitor_verifies_each_group_under_clipping():
    observable = FluctuationDissipation(schedule=20, verify=True, estimator=Mean())
    memory, _, squares = train(
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), observable, halves=2, clip=0.2
    )
    for name in ("residual", "residual/body", "residual/1"):
        assert max(map(abs, values(memory, name).values())) < 1e-9
    for name in ("left", "right", "weight_norm_sq"):
        parts = values(memory, f"{name}/body")[60] + values(memory, f"{name}/1")[60]
        assert values(memory, name)[60] == pytest.approx(parts, rel=1e-12)
    assert values(memory, "ratio/1")[60] != pytest.approx(values(memory, "ratio/body")[60], rel=1e-3)
    assert sum(squares) > 0


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
def test_master_form_takes_over_while_the_learning_rate_changes(settings):
    observable = FluctuationDissipation(schedule=20, verify=True, estimator=Mean())
    memory, _, squares = train(
        lambda groups: torch.optim.SGD(groups, lr=0.05, **settings),
        observable,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400),
    )
    assert max(map(abs, values(memory, "residual").values())) < 1e-9
    lr = sum(0.025 * (1 + math.cos(math.pi * t / 400)) for t in (0, 20, 40, 60)) / 4  # at the records
    expected = sum(squares[1:]) / 60 / (2 * lr)
    assert values(memory, "right")[60] == pytest.approx(expected, rel=1e-9)


def test_the_residual_has_the_error_of_the_steps_that_are_not_sampled():
    """None where every step is; blocks whose ends are not their own would scatter like the norm itself."""

    def residual(stretch):
        observable = FluctuationDissipation(schedule=20, verify=True, estimator=Mean())
        object.__setattr__(observable, "draws", Draws(20, 20 // stretch))  # as a budget does it
        memory, _, _ = train(
            lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9), observable, steps=401
        )
        return memory.latest()["dynamics/fdr/residual"]

    exact, sampled = residual(1), residual(4)
    assert exact.stderr < 1e-12
    assert exact.low < exact.value < exact.high
    assert abs(sampled.value) > 1e-3
    assert 1e-3 < sampled.stderr < 1.0
    assert abs(sampled.value) < 4 * sampled.stderr


def test_verifying_does_not_change_the_ratio():
    def ratio(**arguments):
        observable = FluctuationDissipation(schedule=10, estimator=Mean(), **arguments)
        memory, _, _ = train(lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9), observable)
        return values(memory, "ratio")[60]

    assert ratio(sampling=1) == pytest.approx(ratio(verify=True), rel=1e-12)


# -- T2: the noisy quadratic -----------------------------------------------------------------------

CURVATURE = torch.tensor([0.1, 0.3, 1.0, 3.0], dtype=torch.float64)
NOISE = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
TABLE = [  # lr, momentum, dampening, variances, O_L = O_R, <|grad f|^2>, <|v|^2>
    (0.1, 0.0, 0.0, (0.502513, 0.084602, 0.105263, 0.029412), 0.269130, 0.382608, 5.382608),
    (0.5, 0.0, 0.0, (2.564103, 0.450450, 0.666667, 0.500000), 2.558212, 5.232848, 10.232848),
    (0.05, 0.9, 0.0, (2.503294, 0.418318, 0.506667, 0.130137), 1.272902, 1.740581, 26.797945),
    (0.2, 0.5, 0.2, (1.608579, 0.271003, 0.338028, 0.095238), 0.865901, 1.235647, 4.618140),
]


class Quadratic:
    """Replicas of SGD on f = 1/2 sum h theta^2 with independent gradient noise, begun stationary."""

    def __init__(self, replicas, lr, variance, *, curvature=CURVATURE, noise=NOISE, seed=0, **settings):
        self.generator = seeded(seed)
        start = torch.randn(replicas, len(curvature), generator=self.generator, dtype=torch.float64)
        self.theta = nn.Parameter(start * torch.as_tensor(variance, dtype=torch.float64).sqrt())
        self.curvature, self.noise = curvature, noise.sqrt()
        self.optimizer = torch.optim.SGD([self.theta], lr=lr, **settings)

    def step(self):
        """One step; weights before it, gradient and update."""
        old = self.theta.detach().clone()
        draw = torch.randn(old.shape, generator=self.generator, dtype=torch.float64)
        gradient = self.curvature * old + self.noise * draw
        self.theta.grad = gradient.clone()
        self.optimizer.step()
        return old, gradient, old - self.theta.detach()

    @property
    def buffer(self):
        return self.optimizer.state[self.theta].get("momentum_buffer")


def quadratic_means(quadratic, steps, warm_up):
    """Time and replica means of everything the table lists, and the relation over the run."""
    for _ in range(warm_up):
        quadratic.step()
    sums = {}
    first = None
    for _ in range(steps):
        if first is None:
            b = quadratic.buffer
            first = quadratic.theta.detach().clone(), None if b is None else b.clone()
        old, gradient, update = quadratic.step()
        b = quadratic.buffer
        terms = {
            "variance": old.square().mean(0),
            "work": (old * gradient).sum(1).mean(),
            "gradient_sq": (quadratic.curvature * old).square().sum(1).mean(),
            "update_sq": update.square().sum(1).mean(),
            "update_dot_buffer": torch.zeros(()) if b is None else (update * b).sum(1).mean(),
            "buffer_sq": torch.zeros(()) if b is None else b.square().sum(1).mean(),
        }
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value / steps
    theta, b = quadratic.theta.detach(), quadratic.buffer
    sums["ends"] = tuple(each.square().sum(1).mean() for each in (first[0], theta))
    if b is not None:
        sums["dots"] = ((first[0] * first[1]).sum(1).mean(), (theta * b).sum(1).mean())
    return sums


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "momentum", "dampening", "variance", "side", "gradient_sq", "v_sq"), TABLE)
def test_noisy_quadratic_table(lr, momentum, dampening, variance, side, gradient_sq, v_sq):
    quadratic = Quadratic(256, lr, variance, momentum=momentum, dampening=dampening)
    # ten relaxation times of the softest mode, 1 / (lr h) over (1 - momentum)
    slowest = (1 - momentum) / (lr * (1 - dampening) * 0.1)
    means = quadratic_means(quadratic, 6000, int(5 * slowest) + 100)
    right = fluctuation_dissipation(
        means["update_sq"],
        means["ends"],
        6000,
        lr,
        momentum=momentum,
        dampening=dampening,
        weight_dot_velocity=means.get("dots", (0.0, 0.0)),
    ).right
    assert abs(means["work"] / right - 1) < 1e-3
    torch.testing.assert_close(
        means["variance"], torch.tensor(variance, dtype=torch.float64), rtol=0.03, atol=0
    )
    assert means["work"].item() == pytest.approx(side, rel=0.01)
    assert right.item() == pytest.approx(side, rel=0.01)
    assert means["gradient_sq"].item() == pytest.approx(gradient_sq, rel=0.01)
    velocity_sq = means["buffer_sq"] if momentum else means["update_sq"] / lr**2
    assert velocity_sq.item() == pytest.approx(v_sq, rel=0.01)


@pytest.mark.slow
def test_nesterov_form_on_the_noisy_quadratic():
    lr, momentum = 0.05, 0.9
    quadratic = Quadratic(256, lr, TABLE[2][3], momentum=momentum, nesterov=True)
    means = quadratic_means(quadratic, 6000, 2000)
    arguments = {
        "momentum": momentum,
        "weight_dot_velocity": means["dots"],
        "displacement_dot_velocity": means["update_dot_buffer"],
    }
    window = (means["ends"], 6000, lr)
    right = fluctuation_dissipation(means["update_sq"], *window, nesterov=True, **arguments).right
    assert abs(means["work"] / right - 1) < 1e-3
    # the heavy-ball formula, with the buffer as the velocity: 7 % off, so the line above can fail
    heavy_ball = fluctuation_dissipation(lr**2 * means["buffer_sq"], *window, **arguments).right
    assert (means["work"] / heavy_ball).item() == pytest.approx(1.07, abs=0.01)


# -- the observable on replicas: every parameter group is one ---------------------------------------


def replica_estimators(quadratic, steps, record, cadences):
    """Feed one half-run estimator for each sampling cadence, a parameter group for each replica."""
    settings = quadratic.optimizer.param_groups[0]
    group = GroupSettings(
        "", settings["lr"], settings["momentum"], settings["dampening"], settings["nesterov"], 0.0, True
    )
    groups = (group,) * len(quadratic.theta)
    observables = [
        FluctuationDissipation(schedule=every(record), sampling=every(cadence)) for cadence in cadences
    ]
    estimators = [HalfRun() for _ in cadences]
    zero = torch.zeros(len(groups), dtype=torch.float64)
    model = nn.Linear(1, 1)
    for step in range(steps + 1):
        _, _, update = quadratic.step()
        samples = [observable.samples(step) for observable in observables]
        if not any(samples) and step % record:
            continue
        theta, b = quadratic.theta.detach(), quadratic.buffer
        snapshot = Snapshot(
            step=step,
            model=model,
            groups=groups,
            sections=tuple(Section(str(g), g, 1) for g in range(len(groups))),
            update=Update(update.square().sum(1)),
            weights=Weights(
                theta.square().sum(1),
                zero if b is None else (theta * b).sum(1),
                torch.tensor(step + 1.0, dtype=torch.float64),
            ),
        )
        for observable, estimator, due in zip(observables, estimators, samples, strict=True):
            if due:
                estimator.add(observable.statistics(snapshot))
            if observable.due(step):
                estimator.close(step, observable.levels(snapshot))
    return zip(observables, estimators, strict=True)


def replica_readings(observable, estimator, replicas):
    """Readings of each replica, the errors of ratio and left side among them."""
    rows, _ = estimator.replicates()
    values = observable.readings(rows | estimator.levels(), estimator.reference())

    def column(read):
        return torch.stack([torch.as_tensor(read(g)).reshape(-1)[0] for g in range(replicas)])

    return {
        "ratio": column(lambda g: values[f"ratio/{g}"].value),
        "ratio_stderr": column(lambda g: values[f"ratio/{g}"].stderr),
        "right": column(lambda g: values[f"right/{g}"]),
        "left": column(lambda g: values[f"left/{g}"].value),
        "left_stderr": column(lambda g: values[f"left/{g}"].stderr),
    }


@pytest.mark.parametrize("steps", [400, 2000])
def test_every_tenth_step_gives_the_ratio_of_every_step(steps):
    lr, momentum, _, variance, *_ = TABLE[2]
    replicas = 64
    quadratic = Quadratic(replicas, lr, variance, momentum=momentum, seed=1)
    every_step, every_tenth = (
        replica_readings(*pair, replicas) for pair in replica_estimators(quadratic, steps, 50, [1, 10])
    )
    rms = (every_tenth["ratio"] / every_step["ratio"] - 1).square().mean().sqrt()
    assert 0 < rms < 0.02
    # the right side is sampled, the distance to the left is exact
    drift = (every_step["ratio"] - 1) * every_step["right"]
    torch.testing.assert_close((every_tenth["ratio"] - 1) * every_tenth["right"], drift, rtol=0, atol=1e-12)
    assert drift.abs().max() > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_error_of_the_ratio_is_that_of_replicas(momentum):
    replicas, modes, lr = 256, 10, 0.1 * (1 - momentum)
    curvature = torch.linspace(0.5, 2.0, modes, dtype=torch.float64)
    noise = torch.ones(modes, dtype=torch.float64)
    variance = lr * (1 + momentum) / (curvature * (1 - momentum) * (2 * (1 + momentum) - lr * curvature))
    quadratic = Quadratic(replicas, lr, variance, curvature=curvature, noise=noise, momentum=momentum, seed=2)
    for _ in range(300):
        quadratic.step()
    ((observable, estimator),) = replica_estimators(quadratic, 3000, 50, [10])
    readings = replica_readings(observable, estimator, replicas)
    ratio, error = readings["ratio"], readings["ratio_stderr"]
    spread = (ratio - 1).square().mean().sqrt()
    assert (error.mean() / spread).item() == pytest.approx(1.0, abs=0.3)
    assert ((ratio - 1).abs() < 2 * error).double().mean() > 0.85


@pytest.mark.parametrize(
    ("lr", "momentum", "cadence", "share"),
    [(0.01, 0.0, 1, (0.2, 0.35)), (0.02, 0.0, 10, (0.7, 0.95)), (0.1, 0.5, 10, (0.95, 1.0))],
    ids=["end points", "both", "right side"],
)
def test_error_of_the_left_side_is_that_of_replicas(lr, momentum, cadence, share):
    """It scatters as the right side and as the end points do; ``share`` is the part of the former."""
    replicas, modes, curvature = 256, 20, 0.5
    lr, ones = lr * (1 - momentum), torch.ones(modes, dtype=torch.float64)
    variance = lr * (1 + momentum) / (curvature * (1 - momentum) * (2 * (1 + momentum) - lr * curvature))
    quadratic = Quadratic(
        replicas, lr, variance * ones, curvature=curvature * ones, noise=ones, momentum=momentum, seed=3
    )
    for _ in range(300):
        quadratic.step()
    ((observable, estimator),) = replica_estimators(quadratic, 2000, 50, [cadence])
    readings = replica_readings(observable, estimator, replicas)
    truth = modes * curvature * variance  # <O_L> = <O_R> = sum h Var
    away, error = readings["left"] - truth, readings["left_stderr"]
    spread = away.square().mean().sqrt()
    of_right = (readings["right"] - truth).square().mean().sqrt() / spread
    assert share[0] < of_right.item() < share[1]
    assert 0.85 < (error.mean() / spread).item() < 1.45
    assert 0.85 < (away.abs() < 2 * error).double().mean() < 0.99


# -- the whole way: the noisy quadratic under the monitor ------------------------------------------


class NoisyQuadratic(nn.Module):
    """f = 1/2 h |theta - centre|^2; the gradient noise comes with the inputs."""

    def __init__(self, centre, begin, modes=40):
        super().__init__()
        start = torch.randn(modes, generator=seeded(7), dtype=torch.float64)
        self.theta, self.centre = nn.Parameter(centre + begin * start), centre

    def forward(self, x):
        away = self.theta - self.centre
        return 0.25 * away.square().sum() + x @ away  # curvature 0.5


def simulate(
    observables, *, centre=0.0, begin=0.33, steps=1501, lr=lambda step: 0.2, resume_at=None, **settings
):
    """One run under several monitors, whose prefixes are the names of the observables."""
    model, memories = NoisyQuadratic(centre, begin), {name: MemoryRecorder() for name in observables}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr(0), **settings)
    generator, path = seeded(8), []

    def build():
        return {
            name: Monitor(model, optimizer, [each], recorders=[memories[name]], prefix=name, on_error="raise")
            for name, each in observables.items()
        }

    monitors = build()
    for step in range(steps):
        if step == resume_at:
            buffer = io.BytesIO()
            torch.save({name: monitor.state_dict() for name, monitor in monitors.items()}, buffer)
            buffer.seek(0)
            for monitor in monitors.values():
                monitor.close()
            monitors = build()
            for name, state in torch.load(buffer, weights_only=True).items():
                monitors[name].load_state_dict(state)
        optimizer.param_groups[0]["lr"] = lr(step)
        x = torch.randn(1, len(model.theta), generator=generator, dtype=torch.float64)
        for monitor in monitors.values():
            monitor.begin_micro_batch(x)
        model(x).mean().backward()
        for monitor in monitors.values():
            monitor.end_micro_batch()
            monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
        path.append(model.theta.detach().clone())
    for monitor in monitors.values():
        monitor.close()
    return {name: Kept(memory, name) for name, memory in memories.items()}, path


class Kept:
    """The readings of one monitor as arrays over the steps at which they were recorded."""

    def __init__(self, memory, prefix):
        self.memory, self.prefix = memory, prefix

    def __call__(self, name, since=0):
        series = self.memory.series(f"{self.prefix}/fdr/{name}")
        return np.array([value for step, value in series if step >= since])

    def note(self, name="stationary"):
        return self.memory.latest()[f"{self.prefix}/fdr/{name}"].note


def relation(**arguments):
    return FluctuationDissipation(**({"schedule": 20, "sampling": 1} | arguments))


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"weight_decay": 0.01}], ids=str)
def test_a_stationary_run_is_declared_and_a_transient_one_is_not(settings):
    kept, _ = simulate({"s": relation()}, **settings)
    decisions = kept["s"]("stationary", since=800)
    assert decisions[-1] == 1.0
    assert np.nanmean(decisions) > 0.8
    assert kept["s"]("ratio")[-1] == pytest.approx(1.0, abs=0.05)
    kept, _ = simulate({"t": relation(schedule=3)}, begin=300.0, steps=61, lr=lambda step: 0.05, **settings)
    decisions = kept["t"]("stationary")
    assert decisions[-1] == 0.0
    assert not (decisions == 1.0).any()


def test_the_tolerance_is_what_the_decision_is_held_to():
    tolerances = {"narrow": 1e-4, "middle": 0.02, "wide": 0.5}
    kept, _ = simulate(
        {name: relation(tolerance=tolerance, schedule=5) for name, tolerance in tolerances.items()}, steps=801
    )
    resolution = kept["middle"]("resolution")[-1]
    assert 1e-4 < resolution < 0.02
    assert np.isnan(kept["narrow"]("stationary")[-1])
    assert kept["narrow"].note().endswith("the window is too short to resolve a tolerance of 0.0001")
    assert (kept["middle"]("stationary")[-1], kept["wide"]("stationary")[-1]) == (1.0, 1.0)
    first = [np.flatnonzero(kept[name]("stationary") == 1.0)[0] for name in ("wide", "middle")]
    assert first[0] < first[1]


def test_the_tests_of_sasa_are_those_of_the_levels():
    observables = {
        "points": relation(test="sasa", estimator=Mean()),
        "blocks": relation(test="sasa_blocks", estimator=Mean()),
    }
    kept, path = simulate(observables, steps=601)
    steps = np.arange(0.0, 601.0, 20.0)
    level = np.array([float(path[int(step)].square().sum()) / (2 * 0.2) for step in steps])
    for name, errors in (("points", "end_points"), ("blocks", "blocks")):
        expected = [sasa_plus(steps[: k + 1], level[: k + 1], errors=errors).value for k in range(9, 31)]
        assert kept[name]("stationary", since=180).tolist() == expected
        assert kept[name]("stationary", since=180).max() == 1.0
    kept, _ = simulate(observables, begin=300.0, steps=221, lr=lambda step: 0.02)
    for name in observables:
        assert kept[name]("stationary", since=180).tolist() == [0.0, 0.0, 0.0]


# -- relative to where the window began ------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}], ids=["plain", "momentum"])
def test_centred_weights_fluctuate_less_about_the_same_ratio(settings):
    # about a large mean, |theta|^2 fluctuates with its product with the mean, 2 theta_c . d
    kept, _ = simulate({"plain": relation(), "centred": relation(centred=True)}, centre=5.0, **settings)
    plain, centred = (kept[name]("ratio", since=500) - 1 for name in ("plain", "centred"))
    assert np.sqrt(np.mean(centred**2)) < 0.3 * np.sqrt(np.mean(plain**2))
    assert abs(centred.mean()) < 0.02
    assert kept["centred"]("resolution")[-1] < 0.3 * kept["plain"]("resolution")[-1]
    assert kept["centred"]("weight_norm_sq").tolist() == kept["plain"]("weight_norm_sq").tolist()
    assert kept["centred"]("right").tolist() == kept["plain"]("right").tolist()
    assert kept["centred"]("stationary")[-1] == 1.0


def centred_excess(path, start, stop, lr, centre):
    """Left less right over a window, from the weights themselves."""
    ends = [(path[step] - path[centre]).square().sum() for step in (start, stop)]
    return float(ends[0] - ends[1]) / (2 * lr * (stop - start))


def test_the_centre_is_where_the_window_began_and_begins_anew_after_a_jump():
    kept, path = simulate(
        {"c": relation(centred=True, estimator=Mean())},
        centre=5.0,
        steps=201,
        lr=lambda step: 0.2 if step < 90 else 0.05,
    )
    left, right = kept["c"]("left"), kept["c"]("right")
    steps = [step for step, _ in kept["c"].memory.series("c/fdr/left")]
    assert steps == [20, 40, 60, 80, 120, 140, 160, 180, 200]
    for step, found in zip(steps, left - right, strict=True):
        start, lr = (0, 0.2) if step < 90 else (100, 0.05)
        assert found == pytest.approx(centred_excess(path, start, step, lr, start), rel=1e-9)
    assert centred_excess(path, 100, 200, 0.05, 0) != pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("resume_at", [7, 20, 61, 90, 115])
def test_the_centre_survives_a_resume_bit_for_bit(resume_at):
    def run(resume_at):
        kept, _ = simulate(
            {"c": relation(centred=True)},
            centre=5.0,
            steps=141,
            lr=lambda step: 0.2 if step < 90 else 0.05,
            resume_at=resume_at,
        )
        return [kept["c"](name).tolist() for name in ("left", "right", "ratio", "weight_norm_sq")]

    assert run(resume_at) == run(None)


# -- the update that was really made ---------------------------------------------------------------

FDR = ("left", "right", "ratio", "weight_norm_sq")


def equal_readings(one, other, rel=1e-10):
    for name in FDR:
        found, expected = values(one, name), values(other, name)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=rel), name


@pytest.mark.parametrize("name", ["plain", "l2", "nesterov", "adamw", "rmsprop"])
@pytest.mark.parametrize("clip", [None, 0.2], ids=["unclipped", "clipped"])
def test_accumulation_does_not_change_the_readings(name, clip):
    kind, settings = OPTIMIZERS[name]

    def accumulated(parts):
        torch.manual_seed(0)
        model, memory = tanh_mlp().double(), MemoryRecorder()
        optimizer = kind(model.parameters(), lr=0.01, **settings)
        observable = FluctuationDissipation(schedule=5, sampling=1)
        with Monitor(model, optimizer, [observable], recorders=[memory], on_error="raise") as monitor:
            for step in range(31):
                x = torch.randn(64, 5, generator=seeded(step), dtype=torch.float64)
                y = torch.randint(3, (64,), generator=seeded(100 + step))
                for some, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    with monitor.micro_batch(some, targets):
                        (F.cross_entropy(model(some), targets) / parts).backward()
                monitor.before_step()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        return memory

    whole = accumulated(1)
    assert sorted(values(whole, "ratio")) == [5, 10, 15, 20, 25, 30]
    for parts in (2, 4):
        equal_readings(accumulated(parts), whole)


@pytest.mark.parametrize("clip", [None, 0.2], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rebuilt_updates_read_as_copies_do(name, clip, monkeypatch):
    kind, settings = OPTIMIZERS[name]

    def run():
        return train(
            lambda groups: kind(groups, lr=0.05, **settings),
            FluctuationDissipation(schedule=5, sampling=2),
            steps=31,
            halves=2,
            clip=clip,
        )[0]

    asked, rebuilds = [], update_collector.rebuilds

    def never(optimizer):
        asked.append(rebuilds(optimizer))
        return False

    rebuilt = run()
    monkeypatch.setattr(update_collector, "rebuilds", never)
    copied = run()
    assert all(asked)
    assert len(asked) > 10
    equal_readings(copied, rebuilt)
    for section in ("body", "1"):
        assert values(copied, f"ratio/{section}") == pytest.approx(
            values(rebuilt, f"ratio/{section}"), rel=1e-9
        )


def forgetful(make_optimizer, forgets):
    """A run that calls ``before_step`` only where it does not forget to; what was said, and the record."""
    torch.manual_seed(0)
    model, memory = tanh_mlp().double(), MemoryRecorder()
    optimizer = make_optimizer(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(
            model, optimizer, [FluctuationDissipation(schedule=4, sampling=1)], recorders=[memory]
        ) as monitor:
            for step in range(33):
                x = torch.randn(8, 5, generator=seeded(step), dtype=torch.float64)
                y = torch.randint(3, (8,), generator=seeded(100 + step))
                with monitor.micro_batch(x, y):
                    F.cross_entropy(model(x), y).backward()
                if not forgets(step):
                    monitor.before_step()
                optimizer.step()
                optimizer.zero_grad()
    return [str(each.message) for each in caught], memory


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_rebuilt_updates_do_not_need_before_step(kind):
    messages, memory = forgetful(lambda p: kind(p, lr=0.01), lambda step: True)
    (message,) = messages
    assert "monitor.before_step() was not called" in message
    _, whole = forgetful(lambda p: kind(p, lr=0.01), lambda step: False)
    equal_readings(memory, whole, rel=1e-12)


def test_an_update_that_cannot_be_rebuilt_waits_for_before_step():
    messages, memory = forgetful(lambda p: torch.optim.Adagrad(p, lr=0.01), lambda step: step < 14)
    (message,) = messages
    assert "monitor.before_step() was not called" in message
    known = [step for step, value in values(memory, "ratio").items() if math.isfinite(value)]
    assert known == [16, 20, 24, 28, 32]  # the record owed since step 12 is made at 14, and begins the window


def test_an_update_that_can_never_be_seen_is_not_called_unsupported():
    messages, memory = forgetful(lambda p: torch.optim.Adagrad(p, lr=0.01), lambda step: True)
    assert len(messages) == 1
    assert all(math.isnan(value) for value in values(memory, "ratio").values())


# -- gradient scalers ------------------------------------------------------------------------------


SCALED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
}


def scaled(make_optimizer, dtype, spoiled, *, unscale=False, steps=24):
    """A run under a loss scaler; batches that are spoiled overflow, and are left out where there are none."""
    torch.manual_seed(0)
    model, memory = tanh_mlp(), MemoryRecorder()
    optimizer = make_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    observable = FluctuationDissipation(schedule=3, sampling=1, estimator=Mean())
    with Monitor(model, optimizer, [observable], recorders=[memory], on_error="raise") as monitor:
        for step in range(steps):
            if spoiled is None and step in SPOILED:
                continue
            x = torch.randn(8, 5, generator=seeded(step))
            y = torch.randint(3, (8,), generator=seeded(100 + step))
            with monitor.micro_batch(x, y):
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    loss = F.cross_entropy(model(x).float(), y)
                scaler.scale(loss * (math.inf if step in (spoiled or ()) else 1.0)).backward()
            if unscale:
                scaler.unscale_(optimizer)
                monitor.before_step(loss_scale=scaler.get_scale())
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            else:
                monitor.before_step(grad_scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return memory, scaler.get_scale()


SPOILED = (1, 5, 6, 13, 20)  # not the first: fused SGD would go on from a buffer that was never written


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled and clipped"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", SCALED)
def test_steps_that_the_scaler_skips_are_in_no_series(name, dtype, unscale):
    skipping, scale = scaled(SCALED[name], dtype, SPOILED, unscale=unscale)
    clean, full = scaled(SCALED[name], dtype, None, unscale=unscale)
    assert scale == full / 2 ** len(SPOILED)
    assert sorted(values(clean, "ratio")) == [3, 6, 9, 12, 15, 18]
    equal_readings(skipping, clean, rel=1e-6 if dtype is not torch.float16 else 1e-3)


# -- readings --------------------------------------------------------------------------------------


def test_no_side_before_the_window_has_two_ends():
    memory, _, _ = train(
        lambda groups: torch.optim.SGD(groups, lr=0.05), FluctuationDissipation(schedule=20), steps=25
    )
    first, second = memory.records
    assert [r.key for r in first[1] if r.key.startswith("dynamics/fdr") and r.is_finite] == [
        "dynamics/fdr/weight_norm_sq"
    ]
    assert {"dynamics/fdr/left", "dynamics/fdr/right", "dynamics/fdr/ratio"} < {
        r.key for r in second[1] if r.is_finite
    }


def test_a_ratio_without_an_error_is_not_resolved():
    memory, _, _ = train(
        lambda groups: torch.optim.SGD(groups, lr=0.05, weight_decay=0.1),
        FluctuationDissipation(schedule=5, estimator=Mean()),
    )
    found = [{r.key.rpartition("/")[2]: r for r in readings} for _, readings in list(memory.records)[1:]]
    few, enough = found[7], found[8]  # 9 and 10 ends of blocks
    for name in ("ratio", "resolution"):
        assert math.isnan(few[name].stderr)
        assert not few[name].resolved
        assert few[name].note.endswith("; the window holds fewer than 10 records")
        assert enough[name].resolved
        assert "fewer" not in enough[name].note
    assert math.isfinite(few["ratio"].value)
    assert enough["ratio"].stderr == enough["resolution"].value > 0


def test_weights_that_do_not_move_have_no_ratio():
    memory, _, _ = train(
        lambda groups: torch.optim.SGD(groups, lr=0.0), FluctuationDissipation(schedule=5), steps=61
    )
    ratio, resolution = (memory.latest()[f"dynamics/fdr/{name}"] for name in ("ratio", "resolution"))
    assert math.isnan(ratio.value)
    assert (ratio.resolved, resolution.resolved) == (True, False)
    assert ratio.note.endswith("; not measured: the weights do not move")


def test_note_names_the_form():
    group = GroupSettings("", 0.1, 0.0, 0.0, False, 0.0, True)
    snapshot = Snapshot(step=0, model=nn.Linear(1, 1), groups=(group,))
    observable = FluctuationDissipation()
    assert observable.note(snapshot).startswith("SGD form")
    other = snapshot.replace(groups=(group, GroupSettings("", 0.1, 0.0, 0.0, False, 0.0, False)))
    assert observable.note(other).startswith("master form")


def test_the_residual_is_a_name_where_it_is_asked_for():
    assert FluctuationDissipation(verify=True).names == set(FluctuationDissipation.quantities)
    assert FluctuationDissipation().names == set(FluctuationDissipation.quantities) - {"residual"}


def test_verifying_samples_every_step():
    assert [step for step in range(4) if FluctuationDissipation(verify=True).samples(step)] == [0, 1, 2, 3]
    drawn = [step for step in range(1, 101) if FluctuationDissipation().samples(step)]
    assert [(step - 1) // 10 for step in drawn] == list(range(10))  # one of every ten


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, torch.tensor([5, 0])])
def test_a_window_without_steps_is_refused(steps):
    one = torch.ones(2)
    with pytest.raises(InputError, match=r"a window needs at least one step, got .* Record twice"):
        fluctuation_dissipation(one, (one, one), steps, 0.1)


def test_nesterov_with_dampening_is_refused():
    one = torch.ones(())
    with pytest.raises(InputError, match=r"Nesterov momentum has no dampening, got 0.1"):
        fluctuation_dissipation(one, (one, one), 1, 0.1, momentum=0.9, dampening=0.1, nesterov=True)


def test_an_estimator_without_a_window_is_refused():
    with pytest.raises(InputError, match=r"compares the two ends of a window, got Last\(\)"):
        FluctuationDissipation(estimator=Last())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tolerance": 0.0}, r"tolerance must be a number above 0, got 0.0. Leave tolerance= out"),
        ({"tolerance": -1.0}, r"tolerance must be a number above 0, got -1.0"),
        ({"tolerance": math.nan}, r"tolerance must be a number above 0, got nan"),
        ({"test": "t-test"}, r"unknown test, got 't-test'. Write .* or .sasa_blocks."),
        ({"centred": True, "verify": True}, r"the identity is verified for the weights themselves"),
        ({"schedule": 0}, r"a cadence must be a whole number of steps"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        FluctuationDissipation(**wrong)
