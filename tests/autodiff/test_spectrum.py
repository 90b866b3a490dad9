"""The top eigenvalue of a batch's curvature, against dense matrices in float64 and closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import empirical_ntk
from gradiometer.autodiff.spectrum import TOLERANCE, Curvature, top_eigenpair
from gradiometer.autodiff.untouched import as_training
from gradiometer.errors import InputError, UnsupportedError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(size=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def half_squares(out, y):
    return (out - y).square().sum(1).mean() / 2


def dense_hessian(model, loss_fn, x, y):
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def loss(vector):
        pieces = zip(names, model.parameters(), vector.split(sizes), strict=True)
        return loss_fn(torch.func.functional_call(model, {n: v.view(p.shape) for n, p, v in pieces}, x), y)

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, theta)


def dense(model, loss_fn, x, y, **options):
    """The matrix whose columns the products are."""
    with as_training(model):
        product = Curvature(model, loss_fn, **options).of(x, y)
        size = sum(p.numel() for p in model.parameters())
        return torch.stack([product(row) for row in torch.eye(size, dtype=torch.float64)])


def top(model, loss_fn, x, y, **options):
    with as_training(model):
        return Curvature(model, loss_fn, **options).top(x, y)


@pytest.mark.parametrize("size", [1, 5, 12, 13, 300])
def test_the_largest_eigenvalue_of_a_matrix_is_found(size):
    """Up to 12 the matrix is made in full; the largest by size is negative, and not meant."""
    generator = torch.Generator().manual_seed(size)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    spectrum = torch.linspace(-5, 3, size, dtype=torch.float64) if size > 1 else torch.tensor([3.0]).double()
    matrix = q * spectrum @ q.mT
    pair = top_eigenpair(lambda v: matrix @ v, torch.ones(size, dtype=torch.float64))
    assert pair.residual <= TOLERANCE * pair.value
    assert 3 - 0.03 <= pair.value <= 3 + 1e-12
    assert pair.vector.norm().item() == pytest.approx(1)
    measured = (matrix @ pair.vector - pair.value * pair.vector).norm().item()
    assert measured == pytest.approx(pair.residual, rel=1e-6, abs=1e-12)
    assert pair.products < 40


def test_a_large_negative_eigenvalue_and_no_gap_do_not_mislead_it_in_float32():
    spectrum = torch.cat([torch.tensor([-1e4]), torch.linspace(0, 1, 3000), torch.tensor([1.1])])
    pair = top_eigenpair(lambda v: spectrum * v, torch.ones(3002))
    assert pair.value == pytest.approx(1.1, rel=TOLERANCE)
    assert pair.vector.dtype == torch.float32
    assert pair.vector.norm().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("most", [3, 8])
def test_an_iteration_that_is_stopped_gives_a_lower_bound(most):
    spectrum = torch.linspace(0, 1, 2000, dtype=torch.float64) ** 0.1
    pair = top_eigenpair(lambda v: spectrum * v, torch.ones(2000, dtype=torch.float64), max_products=most)
    assert pair.products == most
    assert spectrum.mean() <= pair.value < 1
    assert pair.residual == math.inf


def test_nothing_nan_and_negative():
    zero = top_eigenpair(lambda v: 0 * v, torch.ones(5))
    assert (zero.value, zero.residual) == (0.0, 0.0)
    zero = top_eigenpair(lambda v: 0 * v, torch.ones(30))
    assert (zero.value, zero.residual, zero.vector.norm().item()) == (0.0, 0.0, pytest.approx(1))
    assert math.isnan(top_eigenpair(lambda v: v * math.nan, torch.ones(3)).value)
    assert math.isnan(top_eigenpair(lambda v: v * math.inf, torch.ones(3)).value)
    assert top_eigenpair(lambda v: -v, torch.ones(3)).value == pytest.approx(-1)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, lambda out, y: half_squares(out, F.one_hot(y, 3))])
def test_products_with_the_hessian(loss_fn):
    expected = dense_hessian(network(), loss_fn, *batch())
    torch.testing.assert_close(dense(network(), loss_fn, *batch()), expected, rtol=1e-10, atol=1e-12)
    pair = top(network(), loss_fn, *batch())
    assert pair.value == pytest.approx(torch.linalg.eigvalsh(expected)[-1].item(), rel=1e-3)


def full_kernel(model, x):
    kernel = empirical_ntk(model.eval(), x, outputs="full")
    n, _, o, _ = kernel.shape
    return kernel.permute(0, 2, 1, 3).reshape(n * o, n * o)


@pytest.mark.parametrize(
    ("loss_fn", "factor"), [(half_squares, 1 / 20), (nn.MSELoss(), 2 / 60), (nn.MSELoss(reduction="sum"), 2)]
)
def test_the_gauss_newton_matrix_of_squares_has_the_spectrum_of_the_kernel(loss_fn, factor):
    """Half the mean squared error: over N. ``nn.MSELoss``: a mean over outputs too, and no half."""
    (x, y), model = batch(), network()
    targets = F.one_hot(y, 3).double()
    expected = torch.linalg.eigvalsh(full_kernel(model, x)) * factor
    found = torch.linalg.eigvalsh(dense(model, loss_fn, x, targets, kind="gauss_newton"))
    count = min(len(found), len(expected))
    torch.testing.assert_close(found[-count:], expected[-count:], rtol=1e-8, atol=1e-10)


def test_the_gauss_newton_matrix_of_cross_entropy():
    """``J^T (diag(p) - p p^T) J / N``, at most half the kernel's top eigenvalue over N."""
    (x, y), model = batch(), network()
    jacobian = torch.func.jacrev(lambda values: torch.func.functional_call(model, values, x).reshape(-1))(
        dict(model.named_parameters())
    )
    flat = torch.cat([j.detach().reshape(60, -1) for j in jacobian.values()], 1)
    p = model(x).softmax(1).detach()
    block = torch.block_diag(*[q.diag() - q.outer(q) for q in p]) / 20
    found = dense(model, F.cross_entropy, x, y, kind="gauss_newton")
    torch.testing.assert_close(found, flat.mT @ block @ flat, rtol=1e-9, atol=1e-12)
    bound = torch.linalg.eigvalsh(full_kernel(model, x))[-1].item() / 40
    value = top(model, F.cross_entropy, x, y, kind="gauss_newton").value
    assert 0.2 * bound < value < bound


def test_softmax_without_preference():
    """At p = 1/O the matrix is ``J^T J / (N O)`` for outputs with their mean taken off."""
    (x, y), model = batch(), network()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    centre = torch.eye(3, dtype=torch.float64) - 1 / 3
    spread = torch.block_diag(*[centre] * 20)
    expected = torch.linalg.eigvalsh(spread @ full_kernel(model, x) @ spread)[-1].item() / 60
    found = top(model, F.cross_entropy, x, y, kind="gauss_newton").value
    assert found == pytest.approx(expected, rel=1e-3)


def test_both_are_one_for_a_linear_model():
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(4, 3).double(), batch()
    matrices = [dense(model, F.cross_entropy, x, y, kind=kind) for kind in ("hessian", "gauss_newton")]
    torch.testing.assert_close(*matrices, rtol=1e-10, atol=1e-13)


def test_a_linear_model_with_squares_has_the_covariance_of_its_inputs():
    torch.manual_seed(0)
    model, (x, _) = nn.Linear(4, 1, bias=False).double(), batch()
    found = top(model, half_squares, x, torch.zeros(20, 1))
    assert found.value == pytest.approx(torch.linalg.eigvalsh(x.mT @ x / 20)[-1].item(), rel=1e-3)


def test_gains_and_shifts_make_a_metric():
    """``D^{1/2} H D^{1/2} + S``, with numbers and with tensors."""
    (x, y), model = batch(), network()
    generator = torch.Generator().manual_seed(2)
    gains = [torch.rand(6, 4, generator=generator).double(), 0.5, 0.0, torch.rand(3, generator=generator)]
    shifts = [0.1, torch.rand(6, generator=generator).double(), 0.0, 0.3]

    def flat(factors):
        shapes = [p.shape for p in model.parameters()]
        return torch.cat(
            [torch.as_tensor(f).double().expand(s).reshape(-1) for f, s in zip(factors, shapes, strict=True)]
        )

    root = flat(gains).sqrt()
    expected = root[:, None] * dense_hessian(model, F.cross_entropy, x, y) * root + flat(shifts).diag()
    found = dense(model, F.cross_entropy, x, y, gains=gains, shifts=shifts)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_a_summed_loss_is_divided():
    mean = dense(network(), F.cross_entropy, *batch())
    summed = dense(
        network(), lambda out, y: F.cross_entropy(out, y, reduction="sum"), *batch(), loss_reduction="sum"
    )
    torch.testing.assert_close(summed, mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_outputs_may_be_a_nest_and_parameters_idle(kind):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()
            self.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x):
            out = self.inner(x)
            return {"hidden": [out.square()], "logits": out, "size": 3}

    found = dense(Nested(), lambda out, y: F.cross_entropy(out["logits"], y), *batch(), kind=kind)
    plain = dense(network(), F.cross_entropy, *batch(), kind=kind)
    torch.testing.assert_close(found, F.pad(plain, (2, 0, 2, 0)), rtol=1e-12, atol=1e-14)


def test_batch_norm_is_measured_in_the_mode_it_is_in():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = batch()
    x = 3 * x + 1
    values = {}
    for training in (True, False):
        model.train(training)
        expected = torch.linalg.eigvalsh(dense_hessian(model, F.cross_entropy, x, y))[-1].item()
        model[1].reset_running_stats()  # the dense one has moved them
        values[training] = top(model, F.cross_entropy, x, y).value
        assert model[1].num_batches_tracked == 0
        assert model.training is training
        assert values[training] == pytest.approx(expected, rel=1e-3)
    assert abs(values[True] / values[False] - 1) > 0.02


def test_one_set_of_dropout_masks_serves_all_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Tanh(), nn.Linear(50, 3)).double()
    before = torch.get_rng_state()
    with as_training(model):
        product = Curvature(model, F.cross_entropy).of(*batch())
        vector = torch.randn(403, dtype=torch.float64)
        first, second = product(vector), product(vector)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_attention_and_embeddings(kind):
    from gradiometer.demo.characters import CharacterTransformer

    torch.manual_seed(0)
    model = CharacterTransformer(layers=1, width=8, heads=2).double()
    tokens = torch.randint(101, (4, 6))

    def loss_fn(out, y):
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    with as_training(model):
        metric = Curvature(model, loss_fn, kind=kind)
        pair = metric.top(tokens, tokens.roll(1, 1))
        product = metric.of(tokens, tokens.roll(1, 1))
        residual = (product(pair.vector) - pair.value * pair.vector).norm().item()
    assert residual == pytest.approx(pair.residual, rel=1e-4)
    assert residual < TOLERANCE * pair.value


def linear_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x * torch.tensor([2.0, 1.0, 0.5, 0.5])


def test_the_error_is_that_of_leaving_out_eighths():
    """To first order, against eigenvalues computed anew, for a jackknife over eight parts."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1, bias=False).double(), linear_rows(400, 0)
    y = torch.zeros(400, 1).double()
    with as_training(model):
        metric = Curvature(model, half_squares)
        found = metric.stderr(x, y, metric.top(x, y))
    parts = x.view(8, 50, 4)
    keep = [parts[torch.arange(8) != i].reshape(350, 4) for i in range(8)]
    tops = torch.stack([torch.linalg.eigvalsh(k.mT @ k / 350)[-1] for k in keep])
    jackknife = (7 / 8 * (tops - tops.mean()).square().sum()).sqrt().item()
    assert found == pytest.approx(jackknife, rel=0.05)


def test_the_error_is_the_spread_over_samples():
    """Gaussian inputs of variance 4 along the top direction: the square has a deviation of 4 sqrt 2."""
    torch.manual_seed(0)
    model, y = nn.Linear(4, 1, bias=False).double(), torch.zeros(200, 1).double()
    errors = []
    with as_training(model):
        metric = Curvature(model, half_squares)
        for seed in range(40):
            x = linear_rows(200, seed)
            errors.append(metric.stderr(x, y, metric.top(x, y)))
    assert sum(errors) / 40 == pytest.approx(4 * math.sqrt(2) / math.sqrt(200), rel=0.15)


def test_too_few_examples_have_no_error():
    model, (x, y) = network(), batch(7)
    with as_training(model):
        metric = Curvature(model, F.cross_entropy)
        assert math.isnan(metric.stderr(x, y, metric.top(x, y)))
        assert metric.stderr(*batch(8), metric.top(*batch(8))) > 0


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.Dropout(0.5)])
def test_where_parts_do_not_add_up_there_is_no_error(layer):
    """Batch norm that normalises within each part, masks that differ: in evaluation mode they do."""
    model, (x, y) = network().insert(1, layer.double()), batch(32)
    errors = {}
    for training in (True, False):
        model.train(training)
        with as_training(model):
            metric = Curvature(model, F.cross_entropy)
            errors[training] = metric.stderr(x, y, metric.top(x, y))
    assert math.isnan(errors[True])
    assert errors[False] > 0


def test_bad_inputs():
    with pytest.raises(InputError, match=r"unknown curvature, got 'fisher'.*gauss_newton"):
        Curvature(network(), F.cross_entropy, kind="fisher")
    with pytest.raises(InputError, match=r"linear in the model's outputs.*curvature=\"hessian\""):
        top(network(), lambda out, y: out.mean(), *batch(), kind="gauss_newton")
    with pytest.raises(InputError, match="loss_fn must return one number"):
        top(network(), lambda out, y: out, *batch(), kind="gauss_newton")
    with pytest.raises(InputError, match="inputs must be finite"):
        top(network(), F.cross_entropy, batch()[0] * math.nan, batch()[1], kind="gauss_newton")

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return Once.apply(self.inner(x))

    for kind in ("hessian", "gauss_newton"):
        with pytest.raises(UnsupportedError, match="once_differentiable"):
            top(Wrapped(), F.cross_entropy, *batch(), kind=kind)
