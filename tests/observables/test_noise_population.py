"""Batches without replacement: readings are those of the training set, by enumeration and in live runs."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from gradiometer import GradientNoiseScale, Mean, Monitor, NoiseCurvature, SecondFluctuationDissipation
from gradiometer.collect.snapshot import Curvature, GradientParts, GroupSettings, Snapshot
from gradiometer.errors import InputError
from gradiometer.observables import gradient_noise_scale, noise_curvature, sgd_noise_scale
from gradiometer.observables.noise_resolution import population

N, P = 6, 3
DOUBLE = {"dtype": torch.float64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(count=N, seed=0):
    """One gradient for each example of a training set."""
    return 0.4 + torch.randn(count, P, generator=seeded(seed), **DOUBLE)


def truth(g):
    G = g.mean(0)
    return {"trace": (g - G).square().sum(1).mean(), "grad_sq_norm": G.square().sum()}


def draws(sizes):
    """All ways to hand out distinct examples to parts of these sizes."""
    edges = [0, *itertools.accumulate(sizes)]
    for order in itertools.permutations(range(N), sum(sizes)):
        parts = [order[a:b] for a, b in itertools.pairwise(edges)]
        if all(list(part) == sorted(part) for part in parts):
            yield [list(part) for part in parts]


def averaged(rows):
    return {name: torch.stack([row[name] for row in rows]).mean(0) for name in rows[0]}


def equal(found, expected, rtol=1e-10):
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


# -- by enumeration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (1, 2, 3), (1, 1, 1, 1, 1, 1), (4, 1)], ids=str)
def test_parts_that_share_no_example_show_the_training_set(sizes, reduction):
    g, counts = gradients(), torch.tensor(sizes)
    rows = []
    for parts in draws(sizes):
        means = torch.stack([g[part].mean(0) for part in parts])
        weights = 1 / len(sizes) if reduction == "mean" else counts[:, None]
        contributions = means * weights
        rows.append(
            gradient_noise_scale(
                contributions.square().sum(1),
                counts,
                contributions.sum(0).square().sum(),
                loss_reduction=reduction,
                dataset_size=N,
            )
        )
    equal(averaged(rows), truth(g))


def test_more_examples_than_there_are_cannot_be_without_replacement():
    with pytest.raises(InputError, match=r"got 7 examples, dataset_size=6"):
        gradient_noise_scale(torch.ones(2), torch.tensor([3, 4]), torch.ones(()), dataset_size=6)
    three = torch.ones(3, 3), torch.ones(3, 3, 3), torch.tensor([2, 2, 3])
    with pytest.raises(InputError, match="Leave dataset_size= out"):
        noise_curvature(*three, dataset_size=6)


def curved(*, symmetric):
    """Gradients and Hessians that go together; deviations in pairs of opposite sign have no third moment."""
    generator = seeded(3)
    d = torch.randn(N, P, generator=generator, **DOUBLE)
    A = torch.randn(N, P, P, generator=generator, **DOUBLE)
    E = A + A.mT + 2 * d[:, :, None] * d[:, None, :1] + 2 * d[:, None, :] * d[:, :1, None]
    if symmetric:
        d, E = (torch.cat([part[: N // 2], -part[: N // 2]]) for part in (d, E))
    d, E = d - d.mean(0), E - E.mean(0)
    return 0.6 + d, 2 * torch.eye(P, **DOUBLE) + E


def curved_truth(g, H):
    G, mean = g.mean(0), H.mean(0)
    covariance = (g - G).T @ (g - G) / len(g)
    return {
        "noise_curvature": (mean @ covariance).trace(),
        "gradient_curvature": G @ mean @ G,
        **truth(g),
    }


def products(parts, g, H):
    """Gram matrix and forms of parts, those with a Hessian of the same part in the place that is read."""
    means = torch.stack([g[part].mean(0) for part in parts])
    hessians = torch.stack([H[part].mean(0) for part in parts])
    forms = torch.einsum("ip,jpq,lq->jil", means, hessians, means)
    for j in range(len(parts)):
        forms[j, :, j] = torch.nan
    return means @ means.T, forms


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (2, 2, 2)], ids=str)
def test_curvature_of_noise_is_that_of_the_training_set(sizes):
    g, H = curved(symmetric=True)
    rows = [noise_curvature(*products(p, g, H), torch.tensor(sizes), dataset_size=N) for p in draws(sizes)]
    equal(averaged(rows), curved_truth(g, H))


def test_what_third_moments_leave_of_the_bias():
    g, H = curved(symmetric=False)
    sizes = (1, 2, 1)
    rows = [noise_curvature(*products(p, g, H), torch.tensor(sizes), dataset_size=N) for p in draws(sizes)]
    d, E = g - g.mean(0), H - H.mean(0)
    third = torch.einsum("np,npq,nq->n", d, E, d).mean()
    expected = curved_truth(g, H)
    assert abs(third) > 0.1 * expected["noise_curvature"]  # else nothing is seen of it
    expected["noise_curvature"] -= third / (N - 2)
    expected["gradient_curvature"] -= third / ((N - 1) * (N - 2))
    equal(averaged(rows), expected)


@pytest.mark.parametrize("known", [True, False])
def test_what_a_step_without_replacement_loses_to_the_curvature(known):
    """Half of u^T H u with u = M g + c of a whole batch, over all batches that can be drawn."""
    g, H = curved(symmetric=True)
    M, c = torch.tensor([0.1, 0.2, 0.3], **DOUBLE), torch.tensor([0.05, -0.02, 0.01], **DOUBLE)
    u, sizes, found, expected = g * M + c, (2, 1, 1), [], []
    observable = SecondFluctuationDissipation(allow_shuffled=True)
    group = GroupSettings("0", 0.1, 0.0, 0.0, False, 0.0, True)
    fields = {"replacement": False, "dataset_size": N} if known else {"replacement": False}
    for parts in draws(sizes):
        means, steps = (torch.stack([v[part].mean(0) for part in parts]) for v in (g, u))
        curvature = Curvature(
            gram=steps @ means.T,
            step_gram=steps @ steps.T,
            forms=products(parts, u, H)[1],
            sizes=torch.tensor(sizes),
            noise_share=1 / 4,
            weight=torch.ones(()),
        )
        snapshot = Snapshot(0, batch_size=4, groups=(group,), step_curvature=curvature, **fields)
        statistics = observable.statistics(snapshot).statistics
        assert "left" not in statistics
        found.append(statistics["right"])
        step = u[list(itertools.chain(*parts))].mean(0)
        expected.append(step @ H.mean(0) @ step / 2)
    off = (sum(found) / sum(expected) - 1).abs().item()
    assert off < 1e-10 if known else off > 0.02


def test_processes_that_share_out_the_training_set():
    """Two processes with two micro-batches each: averages of their moments, as they are recorded."""
    g, sizes = gradients(seed=5), (1, 2, 1, 2)
    observable = GradientNoiseScale(estimator=Mean())
    moments = []
    for parts in draws(sizes):
        means = torch.stack([g[part].mean(0) for part in parts])
        for rank in range(2):
            own = slice(2 * rank, 2 * rank + 2)
            snapshot = parts_snapshot(means[own], sizes[own], means.mean(0), processes=2, batch_size=N)
            statistics = observable.statistics(snapshot).statistics
            moments.append({name: statistics[name] for name in ("moments", "source_weight", "example_share")})
    now = {name: value[None] for name, value in averaged(moments).items()}
    trace, signal = observable._total(now, "first")
    equal({"trace": trace[0], "grad_sq_norm": signal[0]}, truth(g))


def parts_snapshot(means, sizes, whole, *, processes=1, **fields):
    parts = GradientParts(
        source="micro-batches",
        sq_norms=means.square().sum(1)[:, None],
        sizes=torch.tensor(sizes),
        shares=torch.full((len(sizes),), 1 / len(sizes), **DOUBLE),
        batch_sq_norm=whole.square().sum()[None],
        weight=torch.ones((), **DOUBLE),
        parameters=torch.tensor([P]),
        coverage=1.0,
        skipped={},
        processes=processes,
    )
    group = GroupSettings("0", 0.1, 0.0, 0.0, False, 0.0, True)
    fields = {"replacement": False, "dataset_size": N} | fields
    return Snapshot(0, gradient_parts=parts, groups=(group,), **fields)


# -- whose noise it is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "share", "words"),
    [
        ({"dataset_size": 50, "replacement": False}, 1 / 50, "of the training set of 50 examples"),
        ({"dataset_size": 50, "replacement": True}, 0.0, "of the training set of 50 examples"),
        ({"replacement": True}, 0.0, "of the training set"),
        ({"replacement": False}, None, "of the distribution the examples are drawn from"),
        ({"dataset_size": 50}, None, "of the distribution the examples are drawn from"),
        ({}, None, "of the distribution the examples are drawn from"),
        ({"dataset_size": 3, "replacement": False}, None, "of the distribution the examples are drawn from"),
    ],
    ids=str,
)
def test_whose_noise_it_is(fields, share, words):
    assert population(Snapshot(0, batch_size=4, **fields)) == (share, words)


# -- in live runs ------------------------------------------------------------------------------------


class Planted(nn.Module):
    """Its loss -w . x has the gradient -x, in two groups of parameters; the weights stay where they are."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(width // 2, **DOUBLE)) for _ in range(2))

    def forward(self, x):
        return -(x @ torch.cat([self.first, self.second]))


def training_set(count, width, scale, seed):
    """Examples of exact B_simple ``scale``."""
    x = torch.randn(count, width, generator=seeded(seed), **DOUBLE)
    x -= x.mean(0)
    trace = x.square().sum(1).mean()
    direction = torch.randn(width, generator=seeded(seed + 1), **DOUBLE)
    return x + direction / direction.norm() * (trace / scale).sqrt()


def mean_of(out, _):
    return out.mean()


def shuffled_run(data, observable, *, batch, steps, micro_batches=1, seed=0, optimizer=None, **settings):
    """A run over shuffled epochs at weights that are put back after every step."""
    net = Planted(data.shape[1])
    groups = [{"params": [net.first]}, {"params": [net.second]}]
    optimizer = torch.optim.SGD(groups, lr=0.1) if optimizer is None else optimizer(groups)
    monitor = Monitor(net, optimizer, [observable], loss_fn=mean_of, **settings)
    generator, order = seeded(seed), []
    for _ in range(steps):
        if not order:
            order = list(torch.randperm(len(data), generator=generator).split(batch))
            if len(order[-1]) < batch:
                order.pop()
        for part in data[order.pop()].chunk(micro_batches):
            with monitor.micro_batch(part, part[:, 0]):
                (net(part).mean() / micro_batches).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            net.first.zero_(), net.second.zero_()
    monitor.close()
    return {key.removeprefix("dynamics/"): reading for key, reading in monitor.latest.items()}


def close_to(reading, expected, within):
    """Within its error too: five standard errors, or the interval of a ratio."""
    assert reading.resolved
    assert reading.value == pytest.approx(expected, rel=within)
    if reading.key.endswith("scale"):
        assert reading.low < expected < reading.high
    else:
        assert abs(reading.value - expected) < 5 * reading.stderr


@pytest.mark.parametrize(("source", "micro_batches"), [("split batch", 1), ("auto", 3), ("auto", 5)])
def test_a_data_set_of_a_few_noise_scales(source, micro_batches):
    """N = 150 and B_simple = 90: as if the parts were independent it would be 225."""
    data = training_set(150, 40, 90.0, seed=11)
    observable = GradientNoiseScale(schedule=100, sampling=1, estimator=Mean(), source=source)
    found = shuffled_run(
        data,
        observable,
        batch=30,
        steps=601,
        micro_batches=micro_batches,
        dataset_size=150,
        replacement=False,
    )
    close_to(found["noise/scale"], 90.0, 0.2)
    expected = truth(data)
    close_to(found["noise/trace"], expected["trace"].item(), 0.02)
    close_to(found["noise/grad_sq_norm"], expected["grad_sq_norm"].item(), 0.2)
    fraction = found["noise/critical_batch_fraction"]
    close_to(fraction, 30 / (30 + 90), 0.2)
    for u, columns in enumerate((slice(0, 20), slice(20, 40))):
        for name, value in truth(data[:, columns]).items():
            reading = found[f"noise/{name}/{u}"]
            assert abs(reading.value - value) < 5 * reading.stderr
            assert reading.stderr < 0.2 * value
    heat = sgd_noise_scale(0.1, 150, 30, replacement=False)
    assert found["noise/sgd_scale"].value == pytest.approx(heat, rel=1e-12)
    close_to(found["noise/temperature"], heat * expected["trace"].item() / 150 / 40, 0.02)
    assert "of the training set of 150 examples" in found["noise/scale"].note
    assert "cannot be measured" not in found["noise/scale"].note


@pytest.mark.parametrize("missing", ["dataset_size", "replacement"])
def test_nothing_is_corrected_where_it_is_not_known_how_batches_are_drawn(missing):
    data = training_set(150, 40, 90.0, seed=11)
    settings = {"dataset_size": 150, "replacement": False}
    del settings[missing]
    observable = GradientNoiseScale(schedule=100, sampling=1, estimator=Mean(), source="split batch")
    found = shuffled_run(data, observable, batch=30, steps=601, **settings)
    expected = truth(data)
    trace = expected["trace"] * 150 / 149
    assert found["noise/trace"].value == pytest.approx(trace.item(), rel=0.003)
    assert found["noise/scale"].value == pytest.approx(90 / (1 - 90 / 150), rel=0.35)
    assert "of the distribution the examples are drawn from" in found["noise/scale"].note
    assert ("cannot be measured" in found["noise/scale"].note) == (missing == "replacement")


@pytest.mark.slow
def test_intervals_of_shuffled_epochs_hold_the_scale_of_the_training_set():
    data, held = training_set(150, 40, 90.0, seed=11), 0
    for seed in range(40):
        observable = GradientNoiseScale(schedule=20, sampling=1, estimator=Mean(), source="split batch")
        found = shuffled_run(
            data, observable, batch=30, steps=401, seed=seed, dataset_size=150, replacement=False
        )
        reading = found["noise/scale"]
        held += reading.low < 90.0 < reading.high
    assert held >= 35


def test_a_whole_data_set_in_each_batch():
    """Nothing is left to chance: every reading is exact at every step."""
    data = training_set(40, 10, 25.0, seed=2)
    observable = GradientNoiseScale(schedule=4, estimator=Mean(), source="split batch")
    found = shuffled_run(data, observable, batch=40, steps=41, dataset_size=40, replacement=False)
    for name, value in truth(data).items():
        assert found[f"noise/{name}"].value == pytest.approx(value.item(), rel=0.2)
    batch = found["noise/batch_grad_sq_norm"].value
    assert batch == pytest.approx(truth(data)["grad_sq_norm"].item(), rel=1e-9)
    assert found["noise/sgd_scale"].value == 0.0


@pytest.mark.parametrize("adam", [torch.optim.Adam, torch.optim.AdamW])
def test_the_preconditioned_scale_of_shuffled_epochs(adam):
    data, second = training_set(60, 20, 50.0, seed=21), torch.linspace(0.1, 2, 20, **DOUBLE)

    def optimizer(groups):
        made = adam(groups, lr=0.1, eps=0.0, betas=(0.9, 1 - 1e-9))
        for parameter, square in zip(
            (groups[0]["params"] + groups[1]["params"]), second.chunk(2), strict=True
        ):
            zero, steps = torch.zeros_like(square), torch.tensor(1e12)
            made.state[parameter] = {"step": steps, "exp_avg": zero, "exp_avg_sq": square.clone()}
        return made

    observable = GradientNoiseScale(
        schedule=100, sampling=1, estimator=Mean(), source="split batch", preconditioned=True
    )
    found = shuffled_run(
        data, observable, batch=12, steps=601, optimizer=optimizer, dataset_size=60, replacement=False
    )
    expected = truth(data / second.sqrt())
    close_to(found["noise/preconditioned_trace"], expected["trace"].item(), 0.02)
    close_to(found["noise/preconditioned_grad_sq_norm"], expected["grad_sq_norm"].item(), 0.2)
    ratio = expected["trace"] / expected["grad_sq_norm"]
    close_to(found["noise/preconditioned_scale"], ratio.item(), 0.25)


class Linear(nn.Module):
    """Squared errors of a linear model: Hessians that differ from example to example."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 1, bias=False, **DOUBLE)
        nn.init.constant_(self.layer.weight, 0.3)

    def forward(self, x):
        return self.layer(x)[:, 0]


def squared_error(out, y):
    return (out - y).square().mean() / 2


def regression(count, width, seed):
    x = torch.randn(count, width, generator=seeded(seed), **DOUBLE)
    y = x.sum(1) * 0.1 + 2 * torch.randn(count, generator=seeded(seed + 1), **DOUBLE)
    return x, y


def residual_gradients(x, y):
    return (0.3 * x.sum(1) - y)[:, None] * x, x[:, :, None] * x[:, None, :]


def third_moment(x, y):
    d, E = (part - part.mean(0) for part in residual_gradients(x, y))
    return torch.einsum("np,npq,nq->n", d, E, d).mean()


def frozen_regression(observable, x, y, *, batch, steps, replacement=False):
    net = Linear(x.shape[1])
    start = net.layer.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    settings = {"dataset_size": len(x), "replacement": replacement, "loss_fn": squared_error}
    monitor = Monitor(net, optimizer, [observable], **settings)
    generator = seeded(1)
    for step in range(steps):
        if step % (len(x) // batch) == 0:
            order = torch.randperm(len(x), generator=generator).split(batch)
        rows = order[step % (len(x) // batch)]
        if replacement:
            rows = torch.randint(len(x), (batch,), generator=generator)
        with monitor.micro_batch(x[rows], y[rows]):
            squared_error(net(x[rows]), y[rows]).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            net.layer.weight.copy_(start)
    monitor.close()
    readings = {key.removeprefix("dynamics/"): reading for key, reading in monitor.latest.items()}
    return readings, curved_truth(*residual_gradients(x, y))


@pytest.mark.parametrize("source", ["per example", "split batch"])
@pytest.mark.parametrize("replacement", [True, False])
def test_examples_of_a_linear_model(source, replacement):
    x, y = regression(80, 8, seed=4)
    observable = GradientNoiseScale(schedule=20, sampling=1, estimator=Mean(), source=source)
    found, expected = frozen_regression(observable, x, y, batch=16, steps=501, replacement=replacement)
    for name in ("trace", "grad_sq_norm"):
        close_to(found[f"noise/{name}"], expected[name].item(), 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("replacement", [True, False])
def test_curvature_of_noise_in_a_live_run(replacement):
    x, y = regression(36, 5, seed=6)
    observable = NoiseCurvature(schedule=50, sampling=1, estimator=Mean())
    found, expected = frozen_regression(observable, x, y, batch=12, steps=1201, replacement=replacement)
    scale = (expected["noise_curvature"] / expected["gradient_curvature"]).item()
    close_to(found["noise_curvature/scale"], scale, 0.25)
    curvature = (expected["noise_curvature"] / expected["trace"]).item()
    assert found["noise_curvature/curvature"].value == pytest.approx(curvature, rel=0.1)
    assert "of the training set of 36 examples" in found["noise_curvature/scale"].note


@pytest.mark.slow
def test_the_second_relation_of_frozen_weights_over_shuffled_epochs():
    x, y = regression(36, 5, seed=6)
    observable = SecondFluctuationDissipation(schedule=50, sampling=1, estimator=Mean(), allow_shuffled=True)
    found, expected = frozen_regression(observable, x, y, batch=12, steps=1201)
    third = third_moment(x, y).item()  # what is left of the bias
    noise = (expected["noise_curvature"].item() - third / 34) / 12 * (36 - 12) / 35
    right = 0.01 / 2 * (expected["gradient_curvature"].item() - third / (35 * 34) + noise)
    reading = found["fdr2/right"]
    assert abs(reading.value - right) < 4 * reading.stderr
    assert reading.stderr < 0.05 * right
    assert math.isnan(found["fdr2/left"].value)


@pytest.mark.slow
def test_norm_layers_over_shuffled_epochs():
    """The factor and the scale rest on four moments; all are those of the training set."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)).double()
    x, y = torch.randn(60, 6, generator=seeded(8), **DOUBLE), torch.arange(60) % 2
    x[:, 0] += y  # a signal
    loss_fn = nn.functional.cross_entropy
    start = [p.detach().clone() for p in net.parameters()]
    rows = []
    for a, b in zip(x, y, strict=True):
        grads = torch.autograd.grad(loss_fn(net(a[None]), b[None]), list(net.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    g = torch.stack(rows)
    scales = [(t["trace"] / t["grad_sq_norm"]).item() for t in (truth(g), truth(g[:, :12]))]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    observable = GradientNoiseScale(schedule=2, sampling=1, estimator=Mean(), source="norm layers")
    monitor = Monitor(net, optimizer, [observable], dataset_size=60, replacement=False)
    generator = seeded(9)
    for step in range(1201):
        if step % 3 == 0:
            order = torch.randperm(60, generator=generator).split(20)
        part = order[step % 3]
        with monitor.micro_batch(x[part], y[part]):
            loss_fn(net(x[part]), y[part]).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, value in zip(net.parameters(), start, strict=True):
                p.copy_(value)
    monitor.close()
    found = {key.removeprefix("dynamics/noise/"): reading for key, reading in monitor.latest.items()}
    close_to(found["scale"], scales[0], 0.25)
    assert found["norm_layer_factor"].value == pytest.approx(scales[0] / scales[1], rel=0.3)
    assert math.isfinite(found["norm_layer_factor"].value)


@pytest.mark.slow
def test_a_frozen_network_over_shuffled_epochs():
    """Against gradients that are taken one example at a time."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(120, 5, generator=seeded(1), **DOUBLE), torch.randint(3, (120,), generator=seeded(2))
    loss_fn = nn.functional.cross_entropy
    rows = []
    for a, b in zip(x, y, strict=True):
        grads = torch.autograd.grad(loss_fn(net(a[None]), b[None]), list(net.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    expected = truth(torch.stack(rows))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    observable = GradientNoiseScale(schedule=50, sampling=1, estimator=Mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor = Monitor(net, optimizer, [observable], dataset_size=120, replacement=False)
        generator = seeded(4)
        for step in range(1201):
            if step % 6 == 0:
                order = torch.randperm(120, generator=generator).split(20)
            part = order[step % 6]
            with monitor.micro_batch(x[part], y[part]):
                loss_fn(net(x[part]), y[part]).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        monitor.close()
    found = {key.removeprefix("dynamics/noise/"): reading for key, reading in monitor.latest.items()}
    close_to(found["trace"], expected["trace"].item(), 0.05)
    close_to(found["grad_sq_norm"], expected["grad_sq_norm"].item(), 0.3)
