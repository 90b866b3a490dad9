"""The tangent kernel where theory says what it is, and the random estimates of it."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from gradiometer import empirical_ntk, layer_ntks
from gradiometer.observables import relative_drift

from ..zoo import ENTRIES, Entry, batch, build, build_entry, call, draws, error, jacobian, kernel, normal

# -- linear models ---------------------------------------------------------------------------------


def test_linear_model():
    x, x2 = draws(6, 4), draws(3, 4, seed=1)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    assert error(empirical_ntk(model, x), x @ x.mT) < 1e-10
    assert error(empirical_ntk(model, x, x2), x @ x2.mT) < 1e-10
    weight = draws(1, 4, seed=2).square()
    assert error(empirical_ntk(model, x, weights={"weight": weight}), (x * weight) @ x.mT) < 1e-10


def test_every_output_of_a_linear_model_has_a_kernel_of_its_own():
    x = draws(6, 4)
    model = nn.Linear(4, 3, dtype=torch.float64)
    one = x @ x.mT + 1
    assert error(empirical_ntk(model, x), one) < 1e-10
    assert error(empirical_ntk(model, x, outputs="diagonal"), one[..., None].expand(6, 6, 3)) < 1e-10
    expected = torch.einsum("ab,op->abop", one, torch.eye(3, dtype=torch.float64))
    assert error(empirical_ntk(model, x, outputs="full"), expected) < 1e-10
    layers = layer_ntks(nn.Sequential(model), x)
    assert layers.keys() == {"0"}
    assert layer_ntks(model, x).keys() == {""}


def test_deep_linear_model():
    """``f = B A x``: the kernel is ``|B|^2`` times the inner product, and the product of the features."""
    first, second = nn.Linear(4, 5, bias=False).double(), nn.Linear(5, 1, bias=False).double()
    x = draws(6, 4)
    found = layer_ntks(nn.Sequential(first, second), x)
    features = (x @ first.weight.mT).detach()
    assert error(found["0"], second.weight.detach().norm() ** 2 * x @ x.mT) < 1e-10
    assert error(found["1"], features @ features.mT) < 1e-10


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_training_of_a_linear_model_follows_its_constant_kernel(width, bias):
    count, rate = 6, 0.1
    x, y = draws(count, 4), draws(count, width, seed=1)
    model = nn.Linear(4, width, bias=bias, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    first = empirical_ntk(model, x, outputs="full")
    flat = first.permute(0, 2, 1, 3).reshape(count * width, count * width)
    decay = torch.eye(count * width, dtype=torch.float64) - rate / count * flat
    start = model(x).detach()
    for step in range(1, 31):
        loss = (model(x) - y).square().sum() / (2 * count)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rest = torch.linalg.matrix_power(decay, step) @ (start - y).reshape(-1)
        assert (model(x).detach() - y - rest.view(count, width)).abs().max() < 1e-10
    assert (model(x) - start).norm() > 0.1
    assert relative_drift(empirical_ntk(model, x, outputs="full"), first) < 1e-10
    assert relative_drift(empirical_ntk(model, x), kernel(jacobian(model, x))) < 1e-10


# -- three ways to one kernel ----------------------------------------------------------------------

THREE = ("mlp", "conv net", "tied layers", "einsum", "class token", "layer norm with positions", "prelu")


def pure(model):
    """A function of the distinct parameters, which tied modules share."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return lambda p, x: functional_call(model, p, (x,)), parameters


def contracted(model, x):
    function, parameters = pure(model)
    if any(isinstance(module, nn.PReLU) for module in model.modules()):  # cannot be mapped
        rows = [jacrev(function)(parameters, each[None]) for each in x]
        rows = {name: torch.cat([row[name] for row in rows]) for name in parameters}
    else:
        rows = vmap(jacrev(lambda p, each: function(p, each[None])[0]), (None, 0))(parameters, x)
    return sum(torch.einsum("aop,bqp->aboq", row.flatten(2), row.flatten(2)) for row in rows.values())


def from_products(model, x):
    """One column per output: back to the parameters and forward again."""
    function, parameters = pure(model)
    out, back = vjp(lambda p: function(p, x), parameters)
    columns = []
    for index in range(out.numel()):
        unit = torch.zeros_like(out).view(-1)
        unit[index] = 1
        (tangent,) = back(unit.view_as(out))
        columns.append(jvp(lambda p: function(p, x), (parameters,), (tangent,))[1])
    return torch.stack(columns).view(*out.shape, *out.shape).permute(0, 2, 1, 3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # inside jvp
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("name", THREE)
def test_three_ways_agree(name, dtype, tolerance):
    model, x = build(name, dtype).eval(), batch(name, dtype=dtype)
    found = empirical_ntk(model, x, outputs="full")
    products, rows = from_products(model, x), contracted(model, x)
    assert error(found, rows) < tolerance
    assert error(found, products) < tolerance
    assert error(products, rows) < tolerance


@pytest.mark.parametrize(
    "name",
    ["tied layers", "lstm", "vision transformer", "language model, functional head, table of positions"],
)
def test_a_small_step_of_gradient_descent(name):
    """``d f / dt = -Theta r / N`` against a central difference along the true gradient."""
    model, x, forward = build(name).eval(), batch(name), ENTRIES[name].forward
    out = call(model, x, forward)
    residual = draws(*out.shape, seed=3)
    gradients = torch.autograd.grad((out * residual).sum() / len(out), list(model.parameters()))
    moved = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= step * g
            moved.append(call(model, x, forward))
            for p, g in zip(model.parameters(), gradients, strict=True):
                p += step * g
    velocity = (moved[0] - moved[1]) / 2e-5
    theta = empirical_ntk(model, x, outputs="full", forward=forward)
    expected = -torch.einsum("aboq,bq->ao", theta, residual) / len(out)
    assert error(velocity, expected) < 1e-6


# -- infinitely wide networks ----------------------------------------------------------------------


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def scaled(inputs, outputs, variance):
    """``sqrt(C_W / fan_in) W x`` with standard normal weights."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    nn.init.normal_(layer.weight)
    return nn.Sequential(Times(math.sqrt(variance / inputs)), layer)


class Erf(nn.Module):
    def forward(self, x):
        return torch.erf(x)


def relu_moments(a, b, c):
    """Means of ``phi(u) phi(v)`` and ``phi'(u) phi'(v)`` for covariance ``[[a, c], [c, b]]``."""
    angle = math.acos(max(-1.0, min(1.0, c / math.sqrt(a * b))))
    product = math.sqrt(a * b) * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    return product, (math.pi - angle) / (2 * math.pi)


def erf_moments(a, b, c):
    size = (1 + 2 * a) * (1 + 2 * b)
    return 2 / math.pi * math.asin(2 * c / math.sqrt(size)), 4 / math.pi / math.sqrt(size - 4 * c * c)


def infinite_width(moments, variance, hidden, overlap):
    """Kernel at one input and between two, both of squared length ``n_0``, by recursion over layers."""
    own, cross = variance, variance * overlap
    theta_own, theta_cross = own, cross
    for _ in range(hidden):
        own_next, own_slope = moments(own, own, own)
        cross_next, cross_slope = moments(own, own, cross)
        own, cross = variance * own_next, variance * cross_next
        theta_own = own + variance * own_slope * theta_own
        theta_cross = cross + variance * cross_slope * theta_cross
    return theta_own, theta_cross


WIDE = {
    "relu, 1 hidden": (nn.ReLU, relu_moments, 2.0, 1, (4.0, 1.884662)),
    "relu, 2 hidden": (nn.ReLU, relu_moments, 2.0, 2, (6.0, 2.702959)),
    "relu, 3 hidden": (nn.ReLU, relu_moments, 2.0, 3, (8.0, 3.475689)),
    "erf, 2 hidden": (Erf, erf_moments, 1.5, 2, (2.392067, 0.843403)),
}


@pytest.mark.parametrize("name", WIDE)
def test_infinite_width_recursion(name):
    _, moments, variance, hidden, expected = WIDE[name]
    assert infinite_width(moments, variance, hidden, 0.5) == pytest.approx(expected, abs=1e-6)
    own, same = infinite_width(moments, variance, hidden, 1.0)
    assert own == pytest.approx(same)


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_wide_networks_approach_the_limit(name):
    """Mean over 16 initialisations, NTK parametrisation, all weights trainable."""
    activation, moments, variance, hidden, _ = WIDE[name]
    inputs, width = 8, 2048
    x = torch.zeros(2, inputs)
    x[0, 0] = math.sqrt(inputs)
    x[1, 0], x[1, 1] = 0.5 * math.sqrt(inputs), math.sqrt(0.75 * inputs)
    mean = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(16):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            layers = [scaled(inputs, width, variance), activation()]
            for _ in range(hidden - 1):
                layers += [scaled(width, width, variance), activation()]
            model = nn.Sequential(*layers, scaled(width, 1, variance))
        mean += empirical_ntk(model, x) / 16
    own, cross = infinite_width(moments, variance, hidden, 0.5)
    expected = torch.tensor([[own, cross], [cross, own]], dtype=torch.float64)
    assert ((mean - expected).abs() < 0.06 * expected).all(), mean


# -- random output projections ---------------------------------------------------------------------


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def unbiased(samples, exact):
    """Largest distance of the mean from the exact value, in standard errors."""
    spread = samples.std(0) / len(samples) ** 0.5
    assert spread.min() > 0
    return ((samples.mean(0) - exact) / spread).abs().max().item()


@pytest.mark.parametrize("name", ["mlp", "tied layers"])
def test_a_full_set_of_projections_is_exact(name):
    model, x = build(name), batch(name)
    exact = kernel(jacobian(model, x))
    assert error(empirical_ntk(model, x, num_projections=3, generator=seeded(5)), exact) < 1e-10
    each = empirical_ntk(model, x, outputs="diagonal", num_projections=3, generator=seeded(5))
    assert error(each.mean(-1), exact) < 1e-10
    assert error(each[..., 0], exact) > 0.01


@pytest.mark.parametrize(("outputs", "count"), [("trace", 1), ("diagonal", 2)])
def test_projections_are_unbiased(outputs, count):
    model, x = build("mlp"), batch("mlp", 3)
    exact = kernel(jacobian(model, x))
    found = torch.stack(
        [
            empirical_ntk(model, x, outputs=outputs, num_projections=count, generator=seeded(seed))
            for seed in range(150)
        ]
    )
    if outputs == "diagonal":
        assert found.shape == (150, 3, 3, count)
        exact = exact[..., None]
    assert unbiased(found, exact) < 4


@pytest.mark.parametrize("arguments", [{}, {"chunk_size": 2}, {"chunk_size": 1}], ids=str)
@pytest.mark.parametrize("x2", [False, True], ids=["one set", "two sets"])
def test_the_trace_is_the_mean_over_the_projections(arguments, x2):
    model, x = build("conv net"), batch("conv net")
    other = batch("conv net", 3, 7) if x2 else None
    each = empirical_ntk(
        model, x, other, outputs="diagonal", num_projections=2, generator=seeded(3), **arguments
    )
    assert each.shape == (5, 3 if x2 else 5, 2)
    trace = empirical_ntk(model, x, other, num_projections=2, generator=seeded(3))
    assert error(each.mean(-1), trace) < 1e-12
    assert error(each[..., 0], each[..., 1]) > 0.01


def test_each_projection_is_one_direction_of_the_outputs():
    """Eigenvalues of the full kernel at one example bound the estimates; weights and layers go along."""
    model, x = build("mlp"), batch("mlp")
    full = kernel(jacobian(model, x), outputs="full")
    each = empirical_ntk(model, x, outputs="diagonal", num_projections=2)
    for i in range(5):
        low, *_, high = torch.linalg.eigvalsh(full[i, i])
        assert (each[i, i] > low - 1e-12).all()
        assert (each[i, i] < high + 1e-12).all()
    layers = layer_ntks(model, x, num_projections=2)
    assert error(sum(layers.values()), each.mean(-1)) < 1e-12


def test_projections_are_the_same_without_a_generator_and_others_with_one():
    model, x = build("mlp"), batch("mlp")
    first = empirical_ntk(model, x, num_projections=1)
    assert torch.equal(first, empirical_ntk(model, x, num_projections=1))
    assert error(empirical_ntk(model, x, num_projections=1, generator=seeded(1)), first) > 1e-3
    generator = seeded(1)
    drawn = [empirical_ntk(model, x, num_projections=1, generator=generator) for _ in range(2)]
    assert error(*drawn) > 1e-3


# -- random features of the gradients --------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "tied layers", "embedding", "bare parameter", "conv net"])
def test_sketches_are_unbiased(name):
    model, x = build(name), batch(name, 3)
    exact = kernel(jacobian(model, x))
    found = torch.stack(
        [empirical_ntk(model, x, sketch_size=8, generator=seeded(seed)) for seed in range(80)]
    )
    assert unbiased(found, exact) < 4


@pytest.mark.parametrize("outputs", ["diagonal", "full"])
def test_sketches_of_every_mode(outputs):
    model, x, x2 = build("mlp"), batch("mlp", 3), batch("mlp", 2, 7)
    exact = kernel(jacobian(model, x), jacobian(model, x2), outputs)
    found = torch.stack(
        [
            empirical_ntk(model, x, x2, outputs=outputs, sketch_size=8, generator=seeded(seed))
            for seed in range(80)
        ]
    )
    assert unbiased(found, exact) < 4


@pytest.mark.parametrize(("features", "deep"), [(4, False), (16, True)], ids=["one layer", "two layers"])
def test_variance_of_a_sketch(features, deep):
    """``(Theta_aa Theta_bb + Theta_ab^2) / k`` for one output, pooled over the entries."""

    def make():
        if deep:
            return nn.Sequential(nn.Linear(40, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False))
        return nn.Linear(40, 1)

    model, x = build_entry(Entry(make, normal(40))), draws(8, 40)
    exact = kernel(jacobian(model, x))
    own = exact.diagonal()
    expected = (own[:, None] * own + exact.square()) / features
    found = torch.stack(
        [empirical_ntk(model, x, sketch_size=features, generator=seeded(seed)) for seed in range(400)]
    )
    ratio = (found - exact).square().mean(0) / expected
    off = ~torch.eye(8, dtype=torch.bool)
    assert ratio[off].mean().item() == pytest.approx(1.0, abs=0.15)
    assert ratio.diagonal().mean().item() == pytest.approx(1.0, abs=0.15)


def test_sketches_have_the_rank_of_their_size():
    model, x = build("mlp"), batch("mlp", 8)
    spectrum = torch.linalg.eigvalsh(empirical_ntk(model, x, sketch_size=3, generator=seeded(0)))
    # three outputs with three features each
    assert (spectrum > 1e-10 * spectrum[-1]).sum() == 8
    one = empirical_ntk(model, x, sketch_size=3, forward=lambda model, x: model(x)[:, :1])
    spectrum = torch.linalg.eigvalsh(one)
    assert (spectrum.abs() > 1e-10 * spectrum[-1]).sum() == 3


@pytest.mark.parametrize(
    "name", ["mlp", "tied layers", "conv net", "lstm", "language model, functional head, table of positions"]
)
def test_sketches_use_one_draw_for_all_examples(name):
    model, x, forward = build(name), batch(name), ENTRIES[name].forward

    def sketch(*inputs, **arguments):
        return empirical_ntk(model, *inputs, sketch_size=4, forward=forward, **arguments)

    symmetric = sketch(x)
    assert torch.equal(symmetric, sketch(x))
    assert error(sketch(x, x.clone()), symmetric) < 1e-10
    assert error(sketch(x, x[2:]), symmetric[:, 2:]) < 1e-10
    assert error(sketch(x[1:3]), symmetric[1:3, 1:3]) < 1e-10
    for chunk_size in (1, 2):
        assert error(sketch(x, chunk_size=chunk_size), symmetric) < 1e-10
    assert error(sketch(x, generator=seeded(1)), symmetric) > 1e-3
    generator = seeded(1)
    assert error(sketch(x, generator=generator), sketch(x, generator=generator)) > 1e-3


def test_weights_of_a_sketch():
    """A weight scales the features of its parameter; without a second one that is all."""
    model, x = build("mlp"), batch("mlp", 3)
    plain = empirical_ntk(model, x, sketch_size=4)
    doubled = empirical_ntk(model, x, sketch_size=4, weights=dict.fromkeys(dict(model.named_parameters()), 2))
    assert error(doubled, 2 * plain) < 1e-10
    weights = {"0.weight": draws(6, 4, seed=3).square(), "4.bias": 0.0}
    exact = kernel(jacobian(model, x), weights=weights)
    found = torch.stack(
        [
            empirical_ntk(model, x, sketch_size=8, weights=weights, generator=seeded(seed))
            for seed in range(80)
        ]
    )
    assert unbiased(found, exact) < 4
