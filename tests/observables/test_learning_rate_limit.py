"""The limit of the learning rate: closed forms, the recursions themselves, and torch's own optimizers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import (
    LearningRateLimit,
    MemoryRecorder,
    Monitor,
    Snapshot,
    empirical_ntk,
    suggest_learning_rate,
)
from gradiometer.collect.snapshot import GroupSettings, ParameterStep, Probe
from gradiometer.errors import InputError, MeasurementWarning, UnsupportedError
from gradiometer.observables import stability_limit

SETTINGS = [
    ((0.0, 0.0, False), 2.0),
    ((0.0, 0.3, False), 2.0),  # torch makes no use of dampening without momentum
    ((0.9, 0.0, False), 3.8),
    ((0.5, 0.3, False), 4.285714),
    ((0.9, 0.9, False), 38.0),
    ((0.9, 0.0, True), 1.357143),
    ((0.5, 0.0, True), 1.5),
]


def radius(product, momentum, dampening, nesterov):
    """Largest modulus of the eigenvalues of torch's recursion, for curvature times rate."""
    new = 1 - dampening if momentum else 1.0
    buffer = [new * product, momentum]  # b' = mu b + (1 - nu) h theta, in units of 1 / rate
    step = [product + momentum * buffer[0], momentum * buffer[1]] if nesterov else buffer
    matrix = torch.tensor([[1 - step[0], -step[1]], buffer], dtype=torch.float64)
    return torch.linalg.eigvals(matrix).abs().max().item()


@pytest.mark.parametrize(("settings", "expected"), SETTINGS)
def test_the_limit_is_where_the_recursion_begins_to_grow(settings, expected):
    limit = stability_limit(*settings)
    assert limit == pytest.approx(expected, rel=1e-6)
    assert radius(0.999 * limit, *settings) < 1 < radius(1.001 * limit, *settings)


class Quadratic(nn.Module):
    """``theta^T H theta / 2`` for two parameters, whatever the inputs."""

    def __init__(self, hessian):
        super().__init__()
        self.hessian = hessian
        self.a = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

    def forward(self, x):
        theta = torch.cat([self.a, self.b.reshape(-1)])
        return (theta @ self.hessian @ theta / 2).expand(len(x), 1)


def mean(out, y):
    return out.mean()


def quadratic(seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return Quadratic(root @ root.mT)


X = torch.zeros(8, 1, dtype=torch.float64)


def ratio(model, steps, lr=1.0, loss_fn=mean, probe=None):
    """Readings of a hand-made snapshot."""
    observable = LearningRateLimit()
    snapshot = Snapshot(
        step=0,
        model=model,
        groups=(GroupSettings("0", lr, 0.0, 0.0, False, 0.0, True),),
        probe=probe or Probe(X, X),
        parameter_steps=steps,
        loss_fn=loss_fn,
    )
    return observable.readings(observable.levels(snapshot), None)


def recursion(hessian, steps):
    """The matrix of one step of (theta, b), entry by entry of the two parameters."""

    def spread(name):
        sizes = {"a": 2, "b": 4}
        values = {key: torch.as_tensor(getattr(steps[key], name)).double() for key in sizes}
        return torch.cat([v.reshape(-1) if v.ndim else v.expand(sizes[key]) for key, v in values.items()])

    rate, mu, nu, decay, shrinkage = (
        spread(name) for name in ("rate", "momentum", "dampening", "weight_decay", "shrinkage")
    )
    nesterov = spread("nesterov").bool()
    curved = hessian + decay.diag()
    buffer = torch.cat([(1 - nu)[:, None] * curved, mu.diag()], 1)
    ahead = torch.cat([curved, torch.zeros(6, 6)], 1) + mu[:, None] * buffer
    move = rate[:, None] * torch.where(nesterov[:, None], ahead, buffer)
    kept = torch.cat([(1 - shrinkage).diag(), torch.zeros(6, 6)], 1)
    return torch.cat([kept - move, buffer])


MIXED = {
    "two rates": {"a": ParameterStep(1.0), "b": ParameterStep(0.1)},
    "one frozen": {"a": ParameterStep(1.0), "b": ParameterStep(0.0)},
    "two momenta": {"a": ParameterStep(1.0, 0.9), "b": ParameterStep(0.3, 0.5, 0.2)},
    "heavy ball and nesterov": {"a": ParameterStep(1.0, 0.9), "b": ParameterStep(1.0, 0.9, nesterov=True)},
    "l2": {"a": ParameterStep(1.0, 0.9, weight_decay=2.0), "b": ParameterStep(1.0, 0.9)},
    "adam": {
        "a": ParameterStep(torch.tensor([1.0, 3.0]), 0.9, 0.9, weight_decay=0.5),
        "b": ParameterStep(torch.tensor([[0.1, 0.2], [4.0, 1.0]]), 0.9, 0.9),
    },
    "adamw": {"a": ParameterStep(1.0, 0.9, 0.9, shrinkage=3e-2), "b": ParameterStep(2.0, 0.9, 0.9)},
}


@pytest.mark.parametrize("name", MIXED)
def test_the_ratio_is_one_where_the_recursion_begins_to_grow(name):
    """Rates and decoupled decay are scaled to 1 percent on either side of the limit."""
    model, steps = quadratic(), MIXED[name]
    value = float(ratio(model, steps)["lr_over_limit"].value)
    radii = []
    for side in (0.99, 1.01):
        scaled = {
            key: ParameterStep(
                step.rate * side / value,
                step.momentum,
                step.dampening,
                step.nesterov,
                step.weight_decay,
                step.shrinkage * side / value,
            )
            for key, step in steps.items()
        }
        matrix = recursion(model.hessian, scaled)
        if name == "one frozen":  # whose entries stand still, with the eigenvalue 1
            keep = [0, 1, 6, 7]
            matrix = matrix[keep][:, keep]
        radii.append(torch.linalg.eigvals(matrix).abs().max().item())
    assert radii[0] < 1 < radii[1]


def sgd(**options):
    return lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, **options)


def groups(model, lr):
    return torch.optim.SGD(
        [
            {"params": [model.b], "lr": lr, "momentum": 0.5, "weight_decay": 1.0},
            {"params": [model.a], "lr": 0.2 * lr, "momentum": 0.9, "nesterov": True},
        ],
        lr=lr,
    )


def settled(kind, **options):
    """Adam whose second moment stands still, different for every entry."""

    def make(model, lr):
        optimizer = kind(model.parameters(), lr=lr, betas=(0.9, 1 - 1e-9), eps=0.1, **options)
        for i, p in enumerate(model.parameters()):
            root = 0.5 + i + torch.arange(p.numel(), dtype=torch.float64).view_as(p)
            second = {"max_exp_avg_sq": root**2} if options.get("amsgrad") else {}
            optimizer.state[p] = {
                "step": torch.tensor(1e12),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": root**2,
                **second,
            }
        return optimizer

    return make


OPTIMIZERS = {
    "plain": sgd(),
    "l2": sgd(weight_decay=3.0),
    "heavy ball": sgd(momentum=0.9),
    "dampening": sgd(momentum=0.5, dampening=0.3, weight_decay=0.5),
    "nesterov": sgd(momentum=0.9, nesterov=True),
    "groups": groups,
    "adam": settled(torch.optim.Adam, weight_decay=1.0),
    "amsgrad": settled(torch.optim.Adam, amsgrad=True),
    "adamw": settled(torch.optim.AdamW, weight_decay=0.3),
}


def descend(make, lr, steps, small=1.0, reduction="mean", **options):
    """Full-batch descent on the quadratic; readings and the norm of the weights."""
    model = quadratic()
    with torch.no_grad():
        for p in model.parameters():
            p *= small
    optimizer, memory = make(model, lr), MemoryRecorder()
    loss_fn = mean if reduction == "mean" else lambda out, y: out.sum()
    monitor = Monitor(
        model,
        optimizer,
        [LearningRateLimit(schedule=1000)],
        recorders=[memory],
        loss_fn=loss_fn,
        loss_reduction=reduction,
        on_error="raise",
        **options,
    )
    norms = []
    with monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            with monitor.micro_batch(X, X):
                loss_fn(model(X), X).backward()
            monitor.before_step()
            optimizer.step()
            norms.append(math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters())))
    return {key.rpartition("/")[2]: r for key, r in memory.latest().items() if "control" in key}, norms


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_own_optimizers_converge_below_the_limit_and_diverge_above(name):
    """Small weights, so that Adam's second moment stands still."""
    make = OPTIMIZERS[name]
    readings, _ = descend(make, 1e-3, 1)
    limit = readings["lr_limit"].value
    assert readings["lr_over_limit"].value == pytest.approx(1e-3 / limit)
    below = descend(make, 0.97 * limit, 600, small=1e-9)
    above = descend(make, 1.03 * limit, 600, small=1e-9)
    assert below[0]["lr_over_limit"].value == pytest.approx(0.97, abs=2e-3)
    assert above[0]["lr_over_limit"].value == pytest.approx(1.03, abs=2e-3)
    assert below[1][-1] < below[1][300] < below[1][0]
    assert max(above[1]) > 1e3 * above[1][0]
    assert below[0]["lr_over_limit"].stderr == pytest.approx(0, abs=1e-9)  # examples are all alike


def test_a_summed_loss_counts_its_examples():
    """Eight of them: an eighth of the learning rate."""
    make = sgd(momentum=0.9, weight_decay=3.0)
    mean_loss, _ = descend(sgd(momentum=0.9, weight_decay=3.0 / 8), 1e-3, 1)
    summed, _ = descend(make, 1e-3, 1, reduction="sum")
    assert mean_loss["lr_limit"].value == pytest.approx(8 * summed["lr_limit"].value, rel=1e-4)


def accumulated(lr, divisor):
    """One step of two micro-batches of mean losses."""
    model, memory = quadratic(), MemoryRecorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    observables = [LearningRateLimit(schedule=1)]
    with Monitor(
        model, optimizer, observables, recorders=[memory], loss_fn=mean, on_error="raise"
    ) as monitor:
        for _ in range(2):
            with monitor.micro_batch(X, X):
                (mean(model(X), X) / (divisor or 2)).backward()
        monitor.before_step(loss_divisor=divisor)
        optimizer.step()
    return memory.latest()["dynamics/control/lr_over_limit"].value


def test_micro_batches_that_are_not_averaged_add_up():
    assert accumulated(1e-3, 1) == pytest.approx(2 * accumulated(1e-3, None))


def test_a_loop_that_shows_no_batch():
    model, memory = quadratic(), MemoryRecorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    observables = [LearningRateLimit(schedule=1)]
    with Monitor(
        model, optimizer, observables, recorders=[memory], loss_fn=mean, probe=(X, X), on_error="raise"
    ) as monitor:
        mean(model(X), X).backward()
        monitor.before_step()
        optimizer.step()
    expected = 1e-3 * torch.linalg.eigvalsh(model.hessian)[-1].item() / 2
    assert memory.latest()["dynamics/control/lr_over_limit"].value == pytest.approx(expected, rel=1e-3)


def test_parameters_that_adam_does_not_move_do_not_count():
    """They are not shrunk either, though others of their group are."""
    model, memory = quadratic(), MemoryRecorder()
    model.idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=100.0)
    observables = [LearningRateLimit(schedule=1)]
    model.hessian *= 0
    with Monitor(
        model, optimizer, observables, recorders=[memory], loss_fn=mean, probe=(X, X), on_error="raise"
    ) as monitor:
        for rest in (0.0, 1.0):
            optimizer.param_groups[0]["params"] = [model.idle] if rest == 0.0 else list(model.parameters())
            mean(model(X), X).backward()
            monitor.before_step()
            optimizer.step()
    values = [value for _, value in memory.series("dynamics/control/lr_over_limit")]
    assert values == pytest.approx([0.0, 0.05])


def network(norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(12), nn.Dropout(0.2)] if norm else [nn.LayerNorm(12)]
    return nn.Sequential(nn.Linear(4, 12), *middle, nn.Tanh(), nn.Linear(12, 3))


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, 4, generator=generator), torch.randint(3, (32,), generator=generator))
        for _ in range(steps)
    ]


def run(observables, kind=torch.optim.SGD, steps=4, norm=False, **options):
    model, memory = network(norm), MemoryRecorder()
    optimizer = kind(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, observables, recorders=[memory], **options) as monitor:
        for x, y in batches(steps):
            optimizer.zero_grad()
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
    return memory.latest(), copy.deepcopy(model.state_dict()), torch.get_rng_state()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_run_is_bit_identical_with_it(kind, norm):
    """With batch norm and dropout in train mode there is no error."""
    readings, weights, state = run([LearningRateLimit(schedule=1)], kind, norm=norm, loss_fn=F.cross_entropy)
    _, alone, other = run([], kind, norm=norm)
    assert all(torch.equal(weights[key], alone[key]) for key in alone)
    assert torch.equal(state, other)
    found = readings["dynamics/control/lr_over_limit"]
    limit = readings["dynamics/control/lr_limit"]
    assert 0 < found.value < 10
    assert limit.value == pytest.approx(0.01 / found.value)
    if norm:
        assert math.isnan(found.stderr)
    else:
        assert 0 < found.stderr < found.value
        assert limit.stderr / limit.value == pytest.approx(found.stderr / found.value)
    assert "Hessian of the loss on 32 probe examples; " in found.note
    assert found.note.endswith(" Hessian products")


def test_without_a_loss_it_says_so():
    with pytest.warns(MeasurementWarning, match=r"where the loss is known.*Pass loss_fn="):
        readings, _, _ = run([LearningRateLimit(schedule=1)], steps=1)
    assert math.isnan(readings["dynamics/control/lr_over_limit"].value)


def test_other_optimizers_are_refused():
    with pytest.warns(MeasurementWarning, match=r"known for SGD, Adam and AdamW, got RMSprop"):
        run([LearningRateLimit(schedule=1)], torch.optim.RMSprop, steps=1, loss_fn=F.cross_entropy)

    def uphill(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, maximize=True)

    with pytest.warns(MeasurementWarning, match="maximize=True"):
        run([LearningRateLimit(schedule=1)], uphill, steps=1, loss_fn=F.cross_entropy)


def test_weights_that_are_not_finite_are_left_out():
    model = quadratic()
    with torch.no_grad():
        model.hessian *= math.nan
    with pytest.raises(Exception, match="curvature is not finite"):
        ratio(model, MIXED["two rates"])


def test_a_limit_that_is_not_known_gives_a_bound():
    levels = {"top": 2.0, "residual": 0.1, "stderr": 0.1, "products": 100.0, "lr": 0.5}
    readings = LearningRateLimit().readings({k: torch.tensor(v) for k, v in levels.items()}, None)
    over, limit = readings["lr_over_limit"], readings["lr_limit"]
    assert math.isnan(over.value)
    assert math.isnan(limit.value)
    assert over.low == 2.0
    assert not over.resolved
    assert not limit.resolved
    assert over.note == "100 Hessian products; not resolved: the largest curvature was not found"


def test_where_no_curvature_is_positive_there_is_no_limit():
    model = Quadratic(-torch.eye(6, dtype=torch.float64))
    found = ratio(model, MIXED["two rates"])
    assert float(found["lr_over_limit"].value) == pytest.approx(-0.05)
    assert math.isnan(float(found["lr_limit"].value))
    assert not found["lr_limit"].resolved


def half_squares(out, y):
    return (out - y).square().sum(1).mean() / 2


def regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(4, 2, generator=generator, dtype=torch.float64)
    y += 0.3 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    return nn.Linear(4, 2, bias=False).double(), x, y


@pytest.mark.filterwarnings("ignore:no learning rate is suggested")
@pytest.mark.parametrize(("settings", "constant"), SETTINGS)
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_suggestion_for_a_linear_model(settings, constant, curvature):
    """``2 N / lambda_max(X^T X)`` and its like; half of it is suggested."""
    model, x, y = regression()
    names = dict(zip(("momentum", "dampening", "nesterov"), settings, strict=True))
    found = suggest_learning_rate(model, x, y, loss_fn=half_squares, curvature=curvature, **names)
    top = torch.linalg.eigvalsh(x.mT @ x / 50)[-1].item()
    assert found.top_eigenvalue == pytest.approx(top, rel=1e-3)
    assert found.residual < 0.01 * top
    assert found.limit == pytest.approx(constant / top, rel=1e-3)
    if settings == (0.0, 0.0, False):
        assert found.suggestion == found.limit / 2
    else:  # eight examples at a time are steeper than all
        assert math.isnan(found.suggestion) or 0 < found.suggestion <= found.limit / 2


def test_without_a_loss_it_is_the_limit_of_the_tangent_kernel():
    """arXiv:1902.06720: ``2 N / lambda_max(Theta)`` for half the squared error; softmax bears twice that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    kernel = empirical_ntk(model, x, outputs="full").permute(0, 2, 1, 3).reshape(36, 36)
    top = torch.linalg.eigvalsh(kernel)[-1].item()
    with pytest.warns(MeasurementWarning, match=r"without a loss none can be tried: pass y and loss_fn="):
        found = suggest_learning_rate(model, x, momentum=0.9)
    assert found.limit == pytest.approx(3.8 * 12 / top, rel=0.01)
    assert math.isnan(found.suggestion)
    softmax = suggest_learning_rate(model, x, y, loss_fn=F.cross_entropy, curvature="gauss_newton")
    assert softmax.limit > 4 * found.limit / 3.8
    with pytest.raises(InputError, match=r"the Hessian is that of a loss\. Write loss_fn="):
        suggest_learning_rate(model, x, curvature="hessian")


class Wrapped(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


def test_without_a_loss_outputs_are_one_tensor():
    model, x = Wrapped(4, 2), torch.randn(5, 4)
    with pytest.raises(InputError, match=r"one tensor of outputs \[N, ...\], got dict\. Pass loss_fn="):
        suggest_learning_rate(model, x)
    found = suggest_learning_rate(model, x, loss_fn=lambda out, y: out["logits"].square().mean())
    assert 0 < found.suggestion < found.limit


def test_suggestion_with_decay_weights_and_a_fraction():
    model, x, y = regression()
    weights = {"weight": torch.tensor([[1.0, 2.0, 0.0, 0.5]]).expand(2, 4).double()}
    root = weights["weight"][0].sqrt()
    matrix = root[:, None] * (x.mT @ x / 50 + 0.3 * torch.eye(4)) * root
    found = suggest_learning_rate(
        model, x, y, loss_fn=half_squares, weight_decay=0.3, weights=weights, fraction=0.25
    )
    top = torch.linalg.eigvalsh(matrix)[-1].item()
    assert found.limit == pytest.approx(2 / top, rel=1e-3)
    assert found.suggestion == found.limit / 4


def test_descent_on_squares_converges_below_the_limit_and_diverges_above():
    model, x, y = regression()
    limit = suggest_learning_rate(model, x, y, loss_fn=half_squares).limit
    losses = {}
    for side in (0.98, 1.02):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=side * limit)
        for _ in range(400):
            optimizer.zero_grad()
            half_squares(trained(x), y).backward()
            optimizer.step()
        losses[side] = half_squares(trained(x), y).item()
    best = half_squares(x @ torch.linalg.lstsq(x, y).solution, y).item()
    assert losses[0.98] == pytest.approx(best, rel=1e-3)
    assert losses[1.02] > 10 * best


@pytest.mark.filterwarnings("ignore:no learning rate is suggested")
def test_asking_changes_nothing():
    model, (x, y) = network(norm=True), batches(1)[0]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    suggest_learning_rate(model, x, y, loss_fn=F.cross_entropy)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_what_has_not_converged_is_no_suggestion():
    with pytest.warns(MeasurementWarning, match="the largest curvature was not found"):
        found = suggest_learning_rate(network(), *batches(1)[0], loss_fn=F.cross_entropy, max_products=2)
    with pytest.warns(MeasurementWarning, match="no learning rate is suggested"):  # its labels are noise
        exact = suggest_learning_rate(network(), *batches(1)[0], loss_fn=F.cross_entropy)
    assert math.isnan(found.suggestion)
    assert math.isnan(found.limit)
    assert 0 < found.top_eigenvalue < exact.top_eigenvalue
    assert found.residual > 0.01 * found.top_eigenvalue


def test_a_loss_without_positive_curvature_has_no_limit():
    model, x, y = regression()
    with pytest.warns(MeasurementWarning, match="no curvature is positive here"):
        found = suggest_learning_rate(model, x, y, loss_fn=lambda out, y: -half_squares(out, y))
    assert found.limit == math.inf
    assert math.isnan(found.suggestion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"fraction must lie above 0 and not above 1, got 0.0\. Write fraction=0.5"),
        ({"fraction": 1.5}, "fraction must lie above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be a number at least 0, got -1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be a number at least 0, got nan"),
        ({"max_products": 0}, "max_products must be a whole number at least 1, got 0"),
        ({"momentum": 1.0}, r"at least 0 and below 1, got momentum=1.0, dampening=0.0"),
        ({"momentum": 0.9, "dampening": -0.1}, "at least 0 and below 1"),
        ({"nesterov": True}, "Nesterov's momentum needs momentum and no dampening"),
        ({"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "Nesterov's momentum needs momentum"),
        ({"curvature": "fisher"}, r"unknown curvature, got 'fisher'"),
        ({"weights": {"nothing": 1.0}}, r"not trained, got 'nothing'.*such as 'weight'"),
        ({"weights": {"weight": -1.0}}, "finite and not negative"),
        ({"weights": {"weight": torch.ones(3)}}, r"must be a number or have its shape \[2, 4\], got \[3\]"),
    ],
)
def test_bad_arguments(options, message):
    model, x, y = regression()
    with pytest.raises(InputError, match=message):
        suggest_learning_rate(model, x, y, loss_fn=half_squares, **options)


def test_bad_runs():
    model, x, y = regression()
    with pytest.raises(InputError, match="inputs must be finite"):
        suggest_learning_rate(model, x * math.nan, y, loss_fn=half_squares)
    with pytest.raises(InputError, match="curvature is not finite at these weights"):
        suggest_learning_rate(model, x, y, loss_fn=lambda out, y: (out * math.inf).square().mean())
    with pytest.raises(InputError, match="no trainable parameter"):
        suggest_learning_rate(model.requires_grad_(False), x, y, loss_fn=half_squares)
    with pytest.raises(UnsupportedError, match="where the loss is known"):
        ratio(quadratic(), MIXED["two rates"], loss_fn=None)
