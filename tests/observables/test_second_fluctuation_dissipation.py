import io
import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import nn

from gradiometer import MemoryRecorder, Monitor, NoiseCurvature, SecondFluctuationDissipation, Snapshot
from gradiometer.errors import InputError, MeasurementWarning, MissingFieldError, UnsupportedError
from gradiometer.observables.gradient_noise_scale import gradient_noise_scale
from gradiometer.observables.noise_curvature import best_step, noise_curvature
from gradiometer.observables.second_fluctuation_dissipation import (
    harmonicity,
    second_fluctuation_dissipation,
    shuffling_factor,
)
from gradiometer.stats.estimators import Mean

H = torch.tensor([0.1, 0.3, 1.0, 3.0], dtype=torch.float64)  # the noisy quadratic of the theory
C = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)

SGD = {
    "plain": {"lr": 0.1},
    "fast": {"lr": 0.5},
    "momentum": {"lr": 0.05, "momentum": 0.9},
    "dampening": {"lr": 0.2, "momentum": 0.5, "dampening": 0.2},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "plain l2": {"lr": 0.1, "weight_decay": 0.05},
    "dampening l2": {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05},
    "nesterov l2": {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def settings_of(options):
    return {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, **options}


# -- the relation, in closed form ------------------------------------------------------------------


def stationary_moments(options, h=H, c=C):
    """What ``second_fluctuation_dissipation`` takes, from the exact covariance of weight and buffer.

    ``b' = mu b + (1 - nu) (k theta + xi)`` with ``k = h + lambda``, and torch's own rule for theta.
    """
    o = settings_of(options)
    eta, mu, nu, decay = o["lr"], o["momentum"], o["dampening"], o["weight_decay"]
    moments = dict.fromkeys(
        ("g2", "uhu", "weight_sq", "displacement_sq", "b_dot_g", "theta_dot_g", "b_dot_theta"), 0.0
    )
    for curvature, noise in zip(h.tolist(), c.tolist(), strict=True):
        k = curvature + decay
        buffer = np.array([(1 - nu) * k, mu]), 1 - nu  # the new buffer: of (theta, b), and of the noise
        if not mu:
            buffer = np.array([k, 0.0]), 1.0
        if o["nesterov"]:
            d, d_noise = np.array([k, 0.0]) + mu * buffer[0], 1 + mu * buffer[1]
        else:
            d, d_noise = buffer
        A = np.stack([np.array([1.0, 0.0]) - eta * d, buffer[0]])
        B = np.array([-eta * d_noise, buffer[1]])
        V = solve_discrete_lyapunov(A, noise * np.outer(B, B))
        d_sq = d @ V @ d + noise * d_noise**2
        moments["g2"] += curvature**2 * V[0, 0]
        moments["uhu"] += curvature * eta**2 * d_sq
        moments["weight_sq"] += V[0, 0]
        moments["displacement_sq"] += eta**2 * d_sq
        moments["b_dot_g"] += curvature * V[0, 1]
        moments["theta_dot_g"] += curvature * V[0, 0]
        moments["b_dot_theta"] += V[0, 1]
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in moments.items()}


def relation(moments, options):
    return second_fluctuation_dissipation(
        moments["g2"],
        moments["uhu"],
        velocity_dot_gradient=moments["b_dot_g"],
        weight_dot_gradient=moments["theta_dot_g"],
        weight_sq=moments["weight_sq"],
        velocity_dot_weight=moments["b_dot_theta"],
        displacement_sq=moments["displacement_sq"],
        **settings_of(options),
    )


@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_both_sides_are_equal_in_a_quadratic_bowl(options):
    both = relation(stationary_moments(options), options)
    torch.testing.assert_close(both.left, both.right, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("options", "grad_sq_norm", "velocity_sq"),
    [
        ({"lr": 0.1}, 0.382608, 5.382608),
        ({"lr": 0.5}, 5.232848, 10.232848),
        ({"lr": 0.05, "momentum": 0.9}, 1.740581, 26.797945),
        ({"lr": 0.2, "momentum": 0.5, "dampening": 0.2}, 1.235647, 4.618140),
    ],
)
def test_the_exact_covariance_is_that_of_the_table(options, grad_sq_norm, velocity_sq):
    found = stationary_moments(options)
    assert found["g2"].item() == pytest.approx(grad_sq_norm, abs=1e-6)
    assert found["displacement_sq"].item() / options["lr"] ** 2 == pytest.approx(velocity_sq, abs=1e-6)


def test_wrong_forms_under_momentum_are_wrong_by_known_factors():
    options = SGD["momentum"]
    moments = stationary_moments(options)
    second_moment = (H * C).sum() + (H**3 * variances(options)).sum()  # Tr H C with the full second moment
    assert (moments["g2"] / relation(moments, options).right).item() == pytest.approx(1.90, abs=0.005)
    plain = 0.5 * options["lr"] * second_moment
    assert (moments["g2"] / plain).item() == pytest.approx(6.46, abs=0.005)


def test_heavy_ball_weights_are_wrong_for_nesterov():
    options = SGD["nesterov"]
    wrong = relation(stationary_moments(options), {**options, "nesterov": False})
    assert abs(wrong.left / wrong.right - 1) > 0.2


def test_groups_add_up_although_the_hessian_couples_them():
    # one group of two weights with a full Hessian, one of the others: u . (H u) is shared out by rows
    generator = seeded(1)
    A = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    matrix, eta = A @ A.T / 4 + torch.eye(4), 0.1
    drift = (torch.eye(4) - eta * matrix).numpy()
    V = torch.from_numpy(solve_discrete_lyapunov(drift, eta**2 * np.diag(C.numpy())))
    gg = matrix @ V @ matrix
    uu = eta**2 * (gg + C.diag())
    square, curved = gg.diagonal(), (matrix @ uu).diagonal()
    groups = [slice(0, 2), slice(2, 4)]
    both = second_fluctuation_dissipation(
        torch.stack([square[g].sum() for g in groups]),
        torch.stack([curved[g].sum() for g in groups]),
        torch.full((2,), eta, dtype=torch.float64),
    )
    torch.testing.assert_close(both.left.sum(), both.right.sum(), rtol=1e-11, atol=0)
    assert abs(both.left[0] / both.right[0] - 1) > 0.01


def test_the_relation_refuses_what_it_cannot_mean():
    one = torch.tensor(1.0)
    with pytest.raises(InputError, match="lr must be a number above 0, got 0"):
        second_fluctuation_dissipation(one, one, 0.0)
    with pytest.raises(InputError, match="no dampening"):
        second_fluctuation_dissipation(one, one, 0.1, momentum=0.9, dampening=0.1, nesterov=True)


def test_settings_keep_the_precision_of_the_averages():
    one = torch.tensor(1.0, dtype=torch.float64)
    found = second_fluctuation_dissipation(one, one, 0.1, momentum=0.9, velocity_dot_gradient=one)
    assert found.left.item() == 1.9
    assert found.left.dtype == torch.float64


# -- the relation, measured ------------------------------------------------------------------------


def variances(options):
    eta, mu, nu = options["lr"], options.get("momentum", 0.0), options.get("dampening", 0.0)
    eta = eta * (1 - nu)
    return eta * C * (1 + mu) / (H * (1 - mu) * (2 * (1 + mu) - eta * H))


def simulate(options, *, replicas=600, burn=600, steps=1500, parts=4):
    """``torch.optim.SGD`` in the noisy quadratic; every product is made as a run would measure it.

    The batch gradient is the mean of independent parts; the square of the true gradient comes from
    their products, everything else from the batch gradient itself.
    """
    generator = seeded(2)
    theta = torch.zeros(replicas, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], **options)
    names = ("g2", "uhu", "weight_sq", "displacement_sq", "b_dot_g", "theta_dot_g", "b_dot_theta", "exact")
    sums = {name: torch.zeros(replicas, dtype=torch.float64) for name in names}
    for step in range(burn + steps):
        noise = torch.randn(parts, replicas, 4, generator=generator, dtype=torch.float64)
        each = H * theta.detach() + (C * parts).sqrt() * noise
        theta.grad = each.mean(0)
        before, g = theta.detach().clone(), theta.grad.clone()
        b = optimizer.state[theta].get("momentum_buffer")
        b = torch.zeros_like(before) if b is None else b.clone()
        optimizer.step()
        if step < burn:
            continue
        u = before - theta.detach()
        squares = (each.sum(0).square() - each.square().sum(0)).sum(-1) / (parts * (parts - 1))
        products = (
            (H * u * u).sum(-1),
            (before * before).sum(-1),
            (u * u).sum(-1),
            (b * g).sum(-1),
            (before * g).sum(-1),
            (b * before).sum(-1),
            (H * before).square().sum(-1),
        )
        for name, value in zip(names, (squares, *products), strict=True):
            sums[name] += value / steps
    return sums


@pytest.mark.parametrize("name", ["plain", "momentum", "dampening l2", "nesterov l2"])
def test_measured_products_reproduce_both_sides(name):
    options = SGD[name]
    sums = simulate(options)
    both = relation(sums, options)
    exact = relation(stationary_moments(options), options)
    for measured, expected in zip(both, exact, strict=True):
        error = measured.std() / len(measured) ** 0.5
        assert abs(measured.mean() - expected) < 4 * error
        assert error < 0.05 * expected
    right = both.right.mean()
    with_exact_square = relation({**sums, "g2": sums["exact"]}, options).left.mean()
    assert (with_exact_square / right).item() == pytest.approx(1.0, abs=0.01)
    if name == "plain":  # <f> = eta Tr C / 4, with the full second moment |u|^2 / eta^2
        loss, noise = sums["theta_dot_g"].mean() / 2, sums["displacement_sq"].mean() / options["lr"]
        assert (loss / noise).item() == pytest.approx(0.25, rel=0.02)


def test_mean_loss_is_a_quarter_of_the_noise_and_the_two_noise_scales_are_tied():
    eta, batch = 0.1, 8
    V = variances({"lr": eta})
    second_moment = C + H**2 * V
    assert (0.5 * H * V).sum().item() == pytest.approx(eta * second_moment.sum().item() / 4, rel=1e-12)
    signal = (H**2 * V).sum()
    trace, curved = batch * C.sum(), batch * (H * C).sum()  # per example: Sigma = B C
    simple = trace / signal
    leading = 2 * batch / eta * trace / curved
    # exactly: |G|^2 = sum eta h C / (2 - eta h), so the tie is off by less than eta h_max / 2
    assert 1 - eta * H.max() / 2 < simple / leading < 1
    soft = {"lr": 1e-4}
    signal = (H**2 * variances(soft)).sum()
    assert (trace / signal / (2 * batch / 1e-4 * trace / curved)).item() == pytest.approx(1.0, abs=2e-4)


# -- several learning rates ------------------------------------------------------------------------


def left_sides(lrs, **options):
    both = [relation(stationary_moments({"lr": lr, **options}), {"lr": lr, **options}) for lr in lrs]
    return [each.left.item() for each in both]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "dampening": 0.2},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=str,
)
def test_slope_and_bend_of_a_quadratic_bowl(options):
    lrs = [0.0005, 0.001, 0.002]
    fit = harmonicity(lrs, left_sides(lrs, **options), noise_trace=C.sum().item(), **options)
    assert fit.curvature == pytest.approx(((H * C).sum() / C.sum()).item(), rel=1e-3)
    if not options.get("nesterov"):
        harmonic = (1 - options.get("dampening", 0)) / (2 * (1 + options.get("momentum", 0)))
        expected = harmonic * ((H**2 * C).sum() / (H * C).sum()).item()
        assert fit.bend / fit.slope == pytest.approx(expected, rel=0.02)


def test_errors_of_the_fit_are_those_of_repeated_fits():
    lrs = np.array([0.01, 0.02, 0.05, 0.1])
    errors = np.array([0.002, 0.001, 0.003, 0.004])
    noise = np.random.default_rng(0).normal(size=(4000, 4)) * errors
    fits = [harmonicity(lrs, 3 * lrs + 5 * lrs**2 + each, errors, noise_trace=2.0) for each in noise]
    for name, expected in {"slope": 3.0, "bend": 5.0, "curvature": 3.0}.items():
        values = np.array([getattr(fit, name) for fit in fits])
        assert values.mean() == pytest.approx(expected, abs=4 * values.std() / 4000**0.5)
        assert getattr(fits[0], f"{name}_error") == pytest.approx(values.std(), rel=0.05)
    assert np.mean([fit.chi_square for fit in fits]) == pytest.approx(
        2.0, rel=0.05
    )  # four points, two unknowns


def test_without_errors_they_come_from_the_scatter():
    lrs = np.array([0.01, 0.02, 0.05, 0.1])
    noise = np.random.default_rng(0).normal(size=(4000, 4)) * 0.03 * lrs
    fits = [harmonicity(lrs, 3 * lrs + 5 * lrs**2 + each) for each in noise]
    assert np.std([fit.slope for fit in fits]) == pytest.approx(
        np.mean([fit.slope_error**2 for fit in fits]) ** 0.5, rel=0.05
    )
    assert math.isnan(fits[0].chi_square)
    assert math.isnan(fits[0].curvature)
    two = harmonicity([0.1, 0.2], [1.0, 3.0])
    assert (two.slope, two.bend) == (pytest.approx(5.0), pytest.approx(50.0))
    assert math.isnan(two.slope_error)
    assert harmonicity([0.1, 0.2], [1.0, 3.0], [0.1, 0.1]).slope_error > 0


@pytest.mark.parametrize("quartic", [0.0, 1.0])
def test_a_quartic_well_bends_more_than_any_quadratic_bowl_can(quartic):
    # f = theta^2 / 2 + q theta^4 / 4: a = C / 2, c = C / 4 + 3 q C^2 / 4 to leading order
    lrs = torch.tensor([0.01, 0.02, 0.03, 0.05], dtype=torch.float64)[:, None]
    generator = seeded(4)
    theta = torch.randn(4, 20000, generator=generator, dtype=torch.float64) * (lrs / 2).sqrt()
    mean = torch.zeros(4, dtype=torch.float64)
    for step in range(900):
        slope = theta + quartic * theta**3
        if step >= 300:
            mean += slope.square().mean(-1) / 600
        theta -= lrs * (slope + torch.randn(20000, generator=generator, dtype=torch.float64))
    fit = harmonicity(lrs[:, 0].tolist(), mean.tolist(), noise_trace=1.0)
    assert fit.curvature == pytest.approx(1.0, abs=0.02)
    assert fit.bend == pytest.approx(0.25 + 0.75 * quartic, abs=0.15)
    assert (fit.bend / fit.slope > 0.5 + 0.3) == bool(quartic)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1, 0.2], [1.0]), "sequences of one length"),
        (([[0.1, 0.2]], [[1.0, 1.0]]), "lrs must be a sequence of finite numbers"),
        (([0.1, 0.1], [1.0, 1.0]), "two or more different learning rates"),
        (([0.0, 0.1], [1.0, 1.0]), "must be positive"),
        (([0.1, 0.2], [1.0, 1.0], [0.1, 0.0]), "must be positive"),
    ],
)
def test_the_fit_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        harmonicity(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must lie"),
        ({"momentum": 0.9, "nesterov": True, "dampening": 0.1}, "no dampening"),
    ],
)
def test_the_fit_refuses_settings_that_sgd_does_not_have(options, message):
    with pytest.raises(InputError, match=message):
        harmonicity([0.1, 0.2], [1.0, 2.0], noise_trace=1.0, **options)


# -- T4: epoch shuffling -----------------------------------------------------------------------------

TABLE = {0.002: 0.0073, 0.01: 0.0359, 0.03: 0.1037, 0.1: 0.3026, 0.3: 0.6494, 0.9: 0.9781}


@pytest.mark.parametrize(("x", "ratio"), TABLE.items())
def test_table_of_shuffled_variances(x, ratio):
    assert shuffling_factor(x, 10) == pytest.approx(ratio, abs=5e-5)


def test_shuffled_variances_of_a_simulation():
    M, x = 10, torch.tensor([*TABLE, 1.5], dtype=torch.float64)[:, None]
    generator = seeded(3)
    population = torch.randn(M, generator=generator, dtype=torch.float64)
    population = (population - population.mean()) / population.std(correction=0)
    theta = torch.zeros(len(x), 4000, dtype=torch.float64)
    variance = torch.zeros(len(x), dtype=torch.float64)
    burn, epochs = 150, 60
    for epoch in range(burn + epochs):
        noise = population[torch.rand(4000, M, generator=generator).argsort(-1)].T
        for one in noise:
            if epoch >= burn:
                variance += theta.square().mean(-1) / (epochs * M)
            theta = (1 - x) * theta - x * one
    measured = variance / (x / (2 - x))[:, 0]
    expected = torch.tensor([shuffling_factor(each, M) for each in x[:, 0].tolist()], dtype=torch.float64)
    assert (measured / expected - 1).abs().max() < 0.05
    assert expected[-1] > 1  # steps that overshoot


@pytest.mark.parametrize("M", [2, 10, 1000])
def test_small_arguments_of_the_shuffling_factor(M):
    for x in (1e-3 / M, 1e-5 / M, 1e-7 / M):
        assert shuffling_factor(x, M) == pytest.approx(x * (M + 1) / 3, rel=2 * x * M + 1e-6)


def test_shuffling_does_not_matter_to_directions_that_relax_within_a_step_or_an_epoch():
    assert shuffling_factor(1.0, 10) == pytest.approx(1.0, rel=1e-12)
    assert shuffling_factor(0.5, 10**5) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("x", "M"), [(0.0, 10), (2.0, 10), (-0.1, 10), (0.1, 1), (float("nan"), 10)])
def test_the_shuffling_factor_refuses(x, M):
    with pytest.raises(InputError):
        shuffling_factor(x, M)


# -- the curvature of the noise ----------------------------------------------------------------------

P, EXAMPLES, BATCH = 4, 40, [2, 3, 3, 4]


def population():
    """Examples with losses ``(theta - c) A (theta - c) / 2``: gradients and Hessians that go together."""
    generator = seeded(7)
    A = torch.randn(EXAMPLES, P, P, generator=generator, dtype=torch.float64)
    A = A @ A.mT / P
    c = torch.randn(EXAMPLES, P, generator=generator, dtype=torch.float64)
    return torch.einsum("npq,nq->np", A, 0.7 - c), A


def expectations(g, A):
    G, matrix = g.mean(0), A.mean(0)
    covariance = (g - G).T @ (g - G) / len(g)
    return {
        "noise_curvature": (matrix @ covariance).trace(),
        "gradient_curvature": G @ matrix @ G,
        "trace": covariance.trace(),
        "grad_sq_norm": G @ G,
    }


def part_products(replicas, sizes, seed=0):
    """``gram`` and ``forms`` of parts that are drawn with replacement."""
    g, A = population()
    generator = seeded(seed)
    index = [torch.randint(EXAMPLES, (replicas, size), generator=generator) for size in sizes]
    means = torch.stack([g[each].mean(1) for each in index], 1)
    hessians = torch.stack([A[each].mean(1) for each in index], 1)
    gram = torch.einsum("rip,rlp->ril", means, means)
    return gram, torch.einsum("rip,rjpq,rlq->rjil", means, hessians, means)


@pytest.mark.parametrize("sizes", [[3, 3, 3], BATCH, [1] * 6], ids=str)
def test_noise_and_signal_are_unbiased_where_hessians_vary(sizes):
    found = noise_curvature(*part_products(40000, sizes), torch.tensor(sizes))
    for name, expected in expectations(*population()).items():
        error = found[name].std() / 40000**0.5
        assert abs(found[name].mean() - expected) < 3.5 * error, name
        assert error < 0.05 * abs(expected), name


def test_hessians_of_the_same_part_are_biased():
    _, forms = part_products(40000, BATCH)
    same = torch.eye(4, dtype=torch.bool)
    naive = forms[:, same[:, :, None] & same[:, None, :]].mean(-1)
    share = (1 / torch.tensor(BATCH).double()).mean()
    values = expectations(*population())
    honest = values["gradient_curvature"] + share * values["noise_curvature"]
    assert naive.mean() - honest > 20 * naive.std() / 40000**0.5
    assert naive.mean() > 1.2 * honest


def test_entries_with_a_hessian_of_the_same_part_are_not_used():
    gram, forms = part_products(3, BATCH)
    spoilt = forms.clone()
    for j in range(4):
        spoilt[:, j, j] = spoilt[:, j, :, j] = torch.nan  # independent draws need neither of them
    expected = noise_curvature(gram, forms, torch.tensor(BATCH))
    found = noise_curvature(gram, spoilt, torch.tensor(BATCH))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_curvature_it_is_the_gradient_noise_scale():
    gram, forms = part_products(1, [3] * 5)
    found = noise_curvature(gram[0], forms[0], torch.full((5,), 3))
    other = gradient_noise_scale(gram[0].diagonal() / 25, torch.full((5,), 3), gram[0].mean())
    for name, value in other.items():
        torch.testing.assert_close(found[name], value)


def test_parts_that_cannot_be_used():
    gram, forms = part_products(1, [2] * 4)
    with pytest.raises(InputError, match="at least three parts, got 2"):
        noise_curvature(gram[..., :2, :2], forms[..., :2, :2, :2], torch.ones(2))
    with pytest.raises(InputError, match="must hold an example"):
        noise_curvature(gram, forms, torch.tensor([2, 2, 2, 0]))
    with pytest.raises(InputError, match="Pass what split_curvature returns"):
        noise_curvature(gram, gram, torch.full((4,), 2))


# -- T7: the best single step ------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_the_best_step_and_its_gain_by_monte_carlo(batch):
    g, A = population()
    values = expectations(g, A)
    G, matrix = g.mean(0), A.mean(0)
    index = torch.randint(EXAMPLES, (200000, batch), generator=seeded(8))
    step = g[index].mean(1)
    gain, cost = (step @ G).mean(), 0.5 * torch.einsum("rp,pq,rq->r", step, matrix, step).mean()
    best = best_step(values["grad_sq_norm"], values["gradient_curvature"], values["noise_curvature"], batch)
    assert best.lr.item() == pytest.approx((gain / (2 * cost)).item(), rel=0.02)
    assert best.decrease.item() == pytest.approx((gain**2 / (4 * cost)).item(), rel=0.02)
    noise = values["noise_curvature"] / values["gradient_curvature"]
    largest = values["grad_sq_norm"] / values["gradient_curvature"]
    torch.testing.assert_close(best.lr, largest / (1 + noise / batch))
    torch.testing.assert_close(best.decrease, 0.5 * largest * values["grad_sq_norm"] / (1 + noise / batch))


def test_there_is_no_best_step_down_a_saddle():
    one = torch.tensor(1.0)
    assert best_step(one, -one, one / 2, 1.0).lr.isnan()
    with pytest.raises(InputError, match="batch_size must be a number above 0"):
        best_step(one, one, one, 0)


# -- the observables, on a live run ------------------------------------------------------------------


class Bowl(nn.Module):
    """The noisy quadratic as a model: the noise is the data, ``f = h theta^2 / 2 + xi . theta``."""

    def __init__(self, copies):
        super().__init__()
        self.register_buffer("h", H.repeat(copies))
        self.theta = nn.Parameter(torch.zeros(4 * copies, dtype=torch.float64))

    def forward(self, noise):
        return 0.5 * (self.h * self.theta.square()).sum() + noise @ self.theta


def mean_loss(outputs, targets):
    return outputs.mean()


def bowl_run(
    options, observables, *, steps, burn=400, batch=6, accumulation=1, copies=2000, data=None, **kwargs
):
    """Readings at the end of a run in the bowl, begun in its stationary state.

    The batch gradient has the covariance C; with ``data`` it is drawn from these examples, reshuffled
    every epoch.
    """
    generator = seeded(5)
    model = Bowl(copies)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    o = settings_of(options)
    rate, k, mu = o["lr"] * (1 - o["dampening"]), model.h + o["weight_decay"], o["momentum"]
    noise = C.repeat(copies)
    spread = (rate * noise * (1 + mu) / (k * (1 - mu) * (2 * (1 + mu) - rate * k))).sqrt()
    model.theta.data.copy_(spread * torch.randn(4 * copies, generator=generator, dtype=torch.float64))

    def loader():
        while True:
            if data is None:
                yield (batch * noise).sqrt() * torch.randn(
                    batch, 4 * copies, generator=generator, dtype=torch.float64
                )
            else:
                yield from data[torch.randperm(len(data), generator=generator)].split(batch)

    memory, monitor, source = MemoryRecorder(), None, loader()
    for step in range(burn + steps):
        if step == burn:
            monitor = Monitor(
                model,
                optimizer,
                observables,
                recorders=[memory],
                loss_fn=mean_loss,
                on_error="raise",
                **kwargs,
            )
        optimizer.zero_grad()
        for part in next(source).chunk(accumulation):
            if monitor is not None:
                monitor.begin_micro_batch(part)
            (model(part).mean() / accumulation).backward()
            if monitor is not None:
                monitor.end_micro_batch()
        if monitor is not None:
            monitor.before_step()
        optimizer.step()
    monitor.close()
    return {key.partition("/")[2]: reading for key, reading in memory.latest().items()}


def second(schedule=10, **kwargs):
    return SecondFluctuationDissipation(schedule=schedule, sampling=1, estimator=Mean(), **kwargs)


def agree(reading, expected, within):
    assert abs(reading.value - expected) < 4 * reading.stderr
    assert abs(reading.value / expected - 1) < within


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accumulation"),
    [("plain", 1), ("momentum", 1), ("nesterov", 1), ("nesterov l2", 1), ("dampening l2", 2)],
)
def test_both_sides_agree_at_the_stationary_state_of_a_live_run(name, accumulation):
    options = SGD[name]
    found = bowl_run(options, [second()], steps=300, accumulation=accumulation, replacement=True)
    exact = relation(stationary_moments(options), options)
    expected = 2000 * options["lr"] * exact.right.item()
    agree(found["fdr2/ratio"], 1.0, 0.06)
    agree(found["fdr2/left"], expected, 0.06)
    agree(found["fdr2/right"], expected, 0.01)
    assert found["fdr2/ratio"].stderr < 0.03
    stiffness = ((H + options.get("weight_decay", 0.0)) * C).sum() / C.sum()
    agree(found["fdr2/curvature"], stiffness.item(), 0.01)
    assert found["fdr2/ratio"].note == "batches drawn with replacement; of the training set"


@pytest.mark.slow
def test_without_the_buffer_the_relation_fails_under_momentum():
    found = bowl_run(SGD["momentum"], [second(), NoiseCurvature(schedule=10, sampling=1)], steps=200)
    agree(found["fdr2/ratio"], 1.0, 0.06)
    # the relation of plain SGD says that the best step is half the learning rate
    wrong = 2 * found["noise_curvature/best_lr"].value / SGD["momentum"]["lr"]
    assert wrong == pytest.approx(6.46, rel=0.05)


def test_a_run_on_its_way_down_gains_more_than_it_loses():
    model = Bowl(50)
    model.theta.data.fill_(3.0)
    optimizer, memory, generator = torch.optim.SGD(model.parameters(), lr=0.02), MemoryRecorder(), seeded(6)
    with Monitor(model, optimizer, [second()], recorders=[memory], loss_fn=mean_loss) as monitor:
        for _ in range(41):
            x = torch.randn(6, 200, generator=generator, dtype=torch.float64)
            with monitor.micro_batch(x):
                model(x).mean().backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    assert memory.latest()["dynamics/fdr2/ratio"].value > 5


@pytest.mark.slow
def test_groups_with_rates_of_their_own_add_up():
    class Pair(Bowl):
        """The bowl turned by a quarter: the Hessian couples its two parameters."""

        def __init__(self, copies):
            super().__init__(copies)
            self.other = nn.Parameter(torch.zeros_like(self.theta))

        def forward(self, noise):
            bend = (self.theta.square() + self.other.square() + self.theta * self.other).sum() / 2
            return bend + noise @ torch.cat([self.theta, self.other])

    model, memory, generator = Pair(500), MemoryRecorder(), seeded(9)
    optimizer = torch.optim.SGD(
        [{"params": [model.theta], "momentum": 0.5}, {"params": [model.other], "lr": 0.4}], lr=0.1
    )
    monitor = None
    for step in range(500):
        if step == 150:
            monitor = Monitor(model, optimizer, [second()], recorders=[memory], loss_fn=mean_loss)
        x = torch.randn(6, 4000, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        if monitor is not None:
            monitor.begin_micro_batch(x)
        model(x).mean().backward()
        if monitor is not None:
            monitor.end_micro_batch()
            monitor.before_step()
        optimizer.step()
    monitor.close()
    latest = memory.latest()
    agree(latest["dynamics/fdr2/ratio"], 1.0, 0.06)
    assert "dynamics/fdr2/shuffling" not in latest  # which rate would it be


def test_shuffled_epochs_break_the_relation_and_are_refused():
    data = 6**0.5 * torch.randn(60, 4 * 200, generator=seeded(7), dtype=torch.float64)
    data -= data.mean(0)
    arguments = {"copies": 200, "data": data, "dataset_size": 60}
    options = {"lr": 0.02}
    found = bowl_run(options, [second(allow_shuffled=True)], steps=60, replacement=False, **arguments)
    ratio, curvature = found["fdr2/ratio"], found["fdr2/curvature"].value
    for name in ("left", "ratio"):  # parts of a batch would say 1.6 +- 0.3, and the loss has stopped falling
        assert math.isnan(found[f"fdr2/{name}"].value)
        assert not found[f"fdr2/{name}"].resolved
        assert "not measured: the weights know the batches of this epoch so far" in found[f"fdr2/{name}"].note
    assert "without replacement: soft directions are colder" in ratio.note
    assert "of the training set of 60 examples" in ratio.note
    assert f"M = 10 steps per epoch, eta h_eff M / (1 - mu) = {0.2 * curvature:.3g}" in ratio.note
    expected = shuffling_factor(options["lr"] * curvature, 10)
    assert found["fdr2/shuffling"].value == pytest.approx(expected, rel=1e-9)
    with pytest.raises(
        UnsupportedError, match=r"drawn without replacement\. .* or write allow_shuffled=True"
    ):
        bowl_run(options, [second()], steps=1, replacement=False, **arguments)
    unknown = bowl_run(options, [second()], steps=21, **arguments)
    assert "how these are drawn is not known" in unknown["fdr2/ratio"].note
    assert "fdr2/shuffling" not in unknown


@pytest.mark.parametrize(
    ("options", "gain"), [("momentum", 10.0), ("nesterov l2", 5.0), ("dampening l2", 5.0)]
)
def test_the_relaxation_rate_in_the_note_is_that_of_the_momentum(options, gain):
    options = SGD[options]
    found = bowl_run(
        options,
        [second(allow_shuffled=True)],
        steps=21,
        copies=50,
        burn=5,
        replacement=False,
        dataset_size=60,
    )
    rate = gain * options["lr"] * (1 - options.get("dampening", 0.0)) * found["fdr2/curvature"].value
    assert found["fdr2/shuffling"].value == pytest.approx(shuffling_factor(rate, 10), rel=1e-9)


def test_other_optimizers_and_runs_without_the_loss_are_refused():
    for make, loss_fn, message in (
        (torch.optim.Adam, mean_loss, r"torch\.optim\.SGD only, got Adam"),
        (torch.optim.SGD, None, "Pass loss_fn="),
    ):
        model, memory = Bowl(2), MemoryRecorder()
        optimizer = make(model.parameters(), lr=0.01)
        monitor = Monitor(model, optimizer, [second()], recorders=[memory], loss_fn=loss_fn)
        with pytest.warns(MeasurementWarning, match=message) as caught:
            for _ in range(12):
                with monitor.micro_batch(torch.randn(6, 8, dtype=torch.float64)):
                    model(torch.randn(6, 8, dtype=torch.float64)).mean().backward()
                monitor.before_step()
                optimizer.step()
        monitor.close()
        assert len(caught) == 1
        assert all(math.isnan(memory.latest()[f"dynamics/fdr2/{name}"].value) for name in ("left", "ratio"))


@pytest.mark.parametrize("kind", [SecondFluctuationDissipation, NoiseCurvature])
def test_a_missing_field_is_named_with_the_call_that_supplies_it(kind):
    with pytest.raises(MissingFieldError, match=r"Monitor\(loss_fn=\.\.\.\) and monitor\.micro_batch"):
        kind().statistics(Snapshot(step=7))


class Regression(nn.Module):
    """Least squares; the Hessian of each example is its own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.8, -0.3, 0.4, 1.1], dtype=torch.float64))

    def forward(self, x):
        return x @ self.w


def least_squares(outputs, targets):
    return 0.5 * (outputs - targets).square().mean()


def regression_data():
    generator = seeded(11)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64) * H.sqrt()
    return x, torch.randn(30, generator=generator, dtype=torch.float64)


def regression_run(observables, *, steps, state=None, lr=0.0, reduction="mean", accumulation=2):
    """A run on least squares with batches of 12, drawn with replacement; with lr = 0 it stays where it is."""
    x, y = regression_data()
    model, memory = Regression(), MemoryRecorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    generator = seeded(12)

    def loss_fn(outputs, targets):
        return least_squares(outputs, targets) * (len(outputs) if reduction == "sum" else 1)

    monitor = Monitor(
        model,
        optimizer,
        observables,
        recorders=[memory],
        loss_fn=loss_fn,
        loss_reduction=reduction,
        on_error="raise",
    )
    begin = 0
    if state is not None:
        monitor.load_state_dict(state["monitor"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        begin = monitor.step
    for _ in range(begin, steps):
        optimizer.zero_grad()
        for index in torch.randint(30, (12,), generator=generator).chunk(accumulation):
            with monitor.micro_batch(x[index], y[index]):
                divisor = accumulation if reduction == "mean" else 1
                (loss_fn(model(x[index]), y[index]) / divisor).backward()
        monitor.before_step()
        optimizer.step()
    state = {
        "monitor": monitor.state_dict(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
    }
    monitor.close()
    return memory, state


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_noise_as_the_curvature_sees_it_in_a_linear_regression(reduction):
    memory, _ = regression_run(
        [NoiseCurvature(schedule=20, sampling=1, estimator=Mean())], steps=900, reduction=reduction
    )
    x, y = regression_data()
    w = Regression().w.detach()
    exact = expectations(x * (x @ w - y)[:, None], x[:, :, None] * x[:, None, :])
    noise = (exact["noise_curvature"] / exact["gradient_curvature"]).item()
    found = {key.rpartition("/")[2]: reading for key, reading in memory.latest().items()}
    assert found["scale"].low < noise < found["scale"].high
    assert found["scale"].value == pytest.approx(noise, rel=0.15)
    assert found["scale_lower_bound"].value == found["scale"].low
    agree(found["curvature"], (exact["noise_curvature"] / exact["trace"]).item(), 0.05)
    cost = exact["gradient_curvature"] + exact["noise_curvature"] / 12
    agree(found["best_lr"], (exact["grad_sq_norm"] / cost).item(), 0.1)
    assert found["scale"].note == f"3 parts of 2 or more examples, loss_reduction={reduction}; " + (
        "of the distribution the examples are drawn from"
    )


def test_a_noise_scale_without_a_signal_is_not_resolved():
    found = bowl_run({"lr": 1e-9}, [NoiseCurvature(schedule=2, sampling=1)], steps=33, burn=1, copies=2)
    scale = found["noise_curvature/scale"]
    assert not scale.resolved
    reason = "the curvature along the gradient is below its own noise, average longer"
    assert scale.note.endswith(f"not resolved, without a bound: {reason}")
    assert found["noise_curvature/scale_lower_bound"].value == scale.low == 0.0


@pytest.mark.parametrize("kind", [SecondFluctuationDissipation, NoiseCurvature])
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(kind):
    arguments = {"lr": 0.05, "accumulation": 1}
    straight, _ = regression_run([kind(schedule=5, sampling=2)], steps=40, **arguments)
    first, state = regression_run([kind(schedule=5, sampling=2)], steps=23, **arguments)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    second_half, _ = regression_run([kind(schedule=5, sampling=2)], steps=40, state=state, **arguments)
    whole = first.records + second_half.records
    assert [step for step, _ in whole] == [step for step, _ in straight.records] == list(range(0, 40, 5))
    for (_, left), (_, right) in zip(whole, straight.records, strict=True):
        for a, b in zip(left, right, strict=True):
            if "/cost/" not in a.key:
                assert (a.key, a.value.hex(), a.stderr.hex()) == (b.key, b.value.hex(), b.stderr.hex())


def test_a_weight_that_rests_has_no_relation():
    memory, _ = regression_run([second()], steps=12)
    ratio = memory.latest()["dynamics/fdr2/ratio"]
    assert math.isnan(ratio.value)
    assert not ratio.resolved
