import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradiometer import MemoryRecorder, Monitor
from gradiometer.collect.snapshot import Probe, Snapshot
from gradiometer.errors import InputError, UnsupportedError
from gradiometer.observables import JacobianNorm, jacobian_norms, jacobian_singular_values

from ..hooks import standing


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def mlp(inputs=4, outputs=3):
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


def conv_net():
    """Outputs [N, 2, 4, 4]; dropout, batch norm and an in-place activation on the way."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(3, 2, 3, padding=1),
    ).double()
    model(1 + draws(6, 1, 4, 4, seed=3))  # running statistics of its own
    return model


def attention():
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)


MODELS = {
    "mlp": (mlp, (4,)),
    "conv net": (conv_net, (1, 4, 4)),
    "attention": (attention, (3, 4)),
}


SAID = pytest.mark.filterwarnings("ignore:the model is in train mode")


def build(name, count=5):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    return make().double(), draws(count, *shape)


def jacobian(model, x):
    """``[N, O, D]`` by ``torch.autograd.functional``, one example at a time, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    rows = [
        torch.autograd.functional.jacobian(lambda one: model(one[None])[0].flatten(), each).flatten(1)
        for each in x
    ]
    for module, mode in modes:
        module.training = mode
    return torch.stack(rows)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=0)


# -- exact values ----------------------------------------------------------------------------------


@SAID
@pytest.mark.parametrize("name", MODELS)
def test_norms_and_singular_values_against_autograd(name):
    model, x = build(name)
    j = jacobian(model, x)
    close(jacobian_norms(model, x), j.flatten(1).norm(dim=1))
    values = torch.linalg.svdvals(j)
    torch.testing.assert_close(jacobian_singular_values(model, x), values, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(jacobian_singular_values(model, x, k=2), values[:, :2], rtol=1e-9, atol=1e-10)


@SAID
@pytest.mark.parametrize("name", ["mlp", "conv net"])
def test_a_full_set_of_projections_is_exact(name):
    model, x = build(name)
    outputs = 3 if name == "mlp" else 32
    close(jacobian_norms(model, x, num_projections=outputs, generator=seeded(4)), jacobian_norms(model, x))


def test_forward_selects_the_outputs():
    model, x = build("mlp")
    expected = jacobian(model, x)[:, 1].norm(dim=1)
    close(jacobian_norms(model, x, forward=lambda model, x: model(x)[:, 1]), expected)


@SAID
@pytest.mark.parametrize("measure", [jacobian_norms, jacobian_singular_values])
def test_the_model_is_as_it_was(measure):
    model, x = build("conv net")
    model[3].eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    x.requires_grad_(False)
    measure(model, x)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not x.requires_grad
    assert x.grad is None
    assert torch.equal(state, torch.get_rng_state())


# -- T12: the projections --------------------------------------------------------------------------

OUTPUTS, INPUTS, EXAMPLES = 6, 4, 20_000


def linear_model(singular_values):
    """A linear layer with 6 outputs and these singular values."""
    values = torch.tensor(singular_values, dtype=torch.float64)
    model = nn.Linear(len(values), OUTPUTS).double()
    with torch.no_grad():
        left = torch.linalg.qr(draws(OUTPUTS, OUTPUTS)).Q[:, : len(values)]
        right = torch.linalg.qr(draws(len(values), len(values), seed=1)).Q
        model.weight.copy_(left * values @ right)
    return model


def projected(k, seed=0):
    """Squares estimated on many copies of one example of a linear model, and A = J J^T."""
    model = linear_model([3.0, 1.0, 1.0, 0.3])
    x = torch.zeros(EXAMPLES, INPUTS, dtype=torch.float64)
    norms = jacobian_norms(model, x, num_projections=k, generator=seeded(seed))
    return norms.square(), (model.weight @ model.weight.mT).detach()


def variance_of_one(a):
    return 2 * OUTPUTS / (OUTPUTS + 2) * ((a @ a).trace() - a.trace().square() / OUTPUTS)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_mean_and_variance_of_the_projected_square(k):
    squares, a = projected(k)
    assert squares.mean().item() == pytest.approx(a.trace().item(), rel=0.02)
    assert (squares.mean() - a.trace()).abs() < 3 * squares.std() / EXAMPLES**0.5
    orthonormal = (OUTPUTS - k) / (OUTPUTS - 1)
    expected = variance_of_one(a) / k * orthonormal
    assert squares.var().item() == pytest.approx(expected.item(), rel=0.1)


def test_projections_need_a_new_generator_to_change():
    model, x = build("mlp")
    first = jacobian_norms(model, x, num_projections=1)
    assert torch.equal(first, jacobian_norms(model, x, num_projections=1))
    generator = seeded(3)
    second = jacobian_norms(model, x, num_projections=1, generator=generator)
    assert not torch.equal(first, second)
    assert not torch.equal(second, jacobian_norms(model, x, num_projections=1, generator=generator))


# -- T13: at initialisation ------------------------------------------------------------------------


def test_expected_square_of_a_random_relu_network():
    """E |J|^2 = O C_W (C_W / 2)^L_h at any width, over seeds."""
    outputs, inputs, width, hidden, c_w, seeds = 5, 7, 16, 3, 1.8, 600
    sizes = [inputs, *[width] * hidden, outputs]
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1]).double()
    generator = seeded()
    squares = []
    for _ in range(seeds):
        with torch.no_grad():
            for layer in layers:
                layer.weight.normal_(generator=generator).mul_((c_w / layer.in_features) ** 0.5)
        x = torch.randn(1, inputs, generator=generator, dtype=torch.float64)
        squares.append(jacobian_norms(model, x).square())
    squares = torch.cat(squares)
    expected = outputs * c_w * (c_w / 2) ** hidden
    error = squares.std() / seeds**0.5
    assert (squares.mean() - expected).abs() < 3 * error
    assert error < 0.05 * expected


# -- the observable --------------------------------------------------------------------------------


def snapshot_of(model, x, step=0):
    return Snapshot(
        step=step, model=model, forward=lambda model, x: model(x), groups=(), probe=Probe(x), batch_size=1
    )


def test_exact_statistics_of_the_probe():
    model, x = build("mlp")
    j = jacobian(model, x)
    found = JacobianNorm().statistics(snapshot_of(model, x))
    squares = j.flatten(1).square().sum(1)
    close(found["norm"], squares.sqrt().mean())
    close(found["square"], squares.mean())
    close(found["spectral_norm"], torch.linalg.matrix_norm(j, 2).mean())
    assert found["norm_variance"] == found["square_variance"] == 0
    readings = JacobianNorm().readings(found, SimpleNamespace(samples=1.0))
    close(readings["frobenius_norm"].value, squares.sqrt().mean())
    close(readings["frobenius_rms"].value, squares.mean().sqrt())
    close(readings["spectral_norm"], torch.linalg.matrix_norm(j, 2).mean())
    assert readings["frobenius_norm"].stderr == readings["frobenius_rms"].stderr == 0


@pytest.mark.parametrize("k", [2, 4, 6])
def test_reported_variances_are_those_of_the_means(k):
    """Each example has projections of its own, so the variance of a mean is that of one over N."""
    model, x = linear_model([3.0, 1.0, 1.0, 0.3]), torch.zeros(EXAMPLES, INPUTS, dtype=torch.float64)
    found = JacobianNorm(num_projections=k).statistics(snapshot_of(model, x))
    norms = jacobian_norms(model, x, num_projections=k, generator=seeded())  # the same projections
    close(found["square"], norms.square().mean())
    close(found["norm"], norms.mean())
    if k == OUTPUTS:
        assert found["square_variance"] == found["norm_variance"] == 0
        return
    variance = norms.square().var() / EXAMPLES
    assert found["square_variance"].item() == pytest.approx(variance.item(), rel=0.1)
    readings = JacobianNorm().readings(found, SimpleNamespace(samples=1.0))
    expected = variance.sqrt() / (2 * norms.square().mean().sqrt())
    assert float(readings["frobenius_rms"].stderr) == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("k", [2, 4])
def test_reported_variance_of_the_mean_norm_to_first_order(k):
    """Where the square is known to 20 %, which first order needs: singular values of one size."""
    model, x = linear_model([1.0, 0.9, 0.8, 1.0, 1.1, 1.0]), torch.zeros(EXAMPLES, 6, dtype=torch.float64)
    found = JacobianNorm(num_projections=k).statistics(snapshot_of(model, x))
    norms = jacobian_norms(model, x, num_projections=k, generator=seeded())
    assert found["norm_variance"].item() == pytest.approx(norms.var().item() / EXAMPLES, rel=0.05)


def test_one_projection_has_no_error():
    model, x = build("mlp")
    found = JacobianNorm(num_projections=1).statistics(snapshot_of(model, x))
    assert found["square_variance"].isnan()
    assert found["square"].isfinite()


def test_many_outputs_are_projected_and_iterated():
    torch.manual_seed(0)
    model = mlp(4, 20).double()
    x = draws(64, 4)
    j = jacobian(model, x)
    found = JacobianNorm().statistics(snapshot_of(model, x))
    assert found["square_variance"] > 0
    exact = j.flatten(1).square().sum(1).mean()
    assert (found["square"] - exact).abs() < 4 * found["square_variance"].sqrt()
    largest = torch.linalg.matrix_norm(j, 2).mean()
    assert found["spectral_norm"] <= largest * (1 + 1e-12)  # a lower bound
    assert found["spectral_norm"] > 0.985 * largest


def test_iteration_of_rank_one_is_exact():
    model = nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 30)).double()
    x = draws(4, 5)
    found = JacobianNorm().statistics(snapshot_of(model, x))
    close(found["spectral_norm"], torch.linalg.matrix_norm(jacobian(model, x), 2).mean())


def test_projections_change_with_the_step_and_not_with_the_call():
    model, x = build("mlp")
    observable = JacobianNorm(num_projections=2)
    first = observable.statistics(snapshot_of(model, x, 10))["square"]
    assert torch.equal(first, observable.statistics(snapshot_of(model, x, 10))["square"])
    assert not torch.equal(first, observable.statistics(snapshot_of(model, x, 11))["square"])


class Tokens(nn.Module):
    """The table is used twice; the Jacobian is with respect to its first output."""

    def __init__(self, outputs=3):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(7, 4), nn.Linear(8, 5), nn.Linear(5, outputs)

    def forward(self, ids):
        return self.after(self.table(ids), ids)

    def after(self, embedded, ids):
        h = torch.tanh(self.hidden(embedded.flatten(1)))
        return self.head(h) * self.table(ids).mean((1, 2))[:, None]


@pytest.mark.parametrize("training", [False, True])
def test_tokens_are_differentiated_at_the_first_embedding(training):
    torch.manual_seed(0)
    model = Tokens().double().train(training)
    ids = torch.randint(7, (5, 2))
    embedded = model.table(ids).detach()
    j = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda e, i=i: model.after(e[None], ids[i : i + 1])[0], embedded[i]
            ).flatten(1)
            for i in range(5)
        ]
    )
    snapshot = snapshot_of(model, ids)
    found = JacobianNorm().statistics(snapshot)
    close(found["square"], j.flatten(1).square().sum(1).mean())
    close(found["norm"], j.flatten(1).norm(dim=1).mean())
    close(found["spectral_norm"], torch.linalg.matrix_norm(j, 2).mean())
    assert JacobianNorm().note(snapshot) == "with respect to the output of 'table'"
    assert standing(model) == 0
    assert all(module.training is training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_hooks_are_gone_after_a_failure():
    model = Tokens()

    def broken(model, ids):
        model(ids)
        raise RuntimeError("broken")

    snapshot = snapshot_of(model, torch.zeros(2, 2, dtype=torch.int64)).replace(forward=broken)
    with pytest.raises(RuntimeError, match="broken"):
        JacobianNorm().statistics(snapshot)
    assert standing(model) == 0
    assert model.training


def test_monitor_reads_norms_of_the_probe():
    model, x = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = MemoryRecorder()
    expected = jacobian(model, x).flatten(1).norm(dim=1).mean().item()
    with Monitor(
        model, optimizer, [JacobianNorm(schedule=2)], recorders=[memory], on_error="raise"
    ) as monitor:
        for _ in range(3):
            with monitor.micro_batch(x):
                model(x).square().mean().backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    (step, first), (last, _) = memory.series("dynamics/jacobian/frobenius_norm")
    assert (step, last) == (0, 2)
    assert first == pytest.approx(expected, rel=1e-10)
    assert memory.latest()["dynamics/jacobian/frobenius_norm"].stderr == 0
    assert memory.latest()["dynamics/jacobian/frobenius_norm"].note == "with respect to the inputs"


# -- errors ----------------------------------------------------------------------------------------

both = pytest.mark.parametrize("measure", [jacobian_norms, jacobian_singular_values])


@both
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 2, dtype=torch.int64), "needs one tensor of floating-point inputs, got torch.int64"),
        ({"x": torch.ones(2, 2)}, "needs one tensor of floating-point inputs, got dict"),
        (torch.ones(0, 2), "must hold at least one example, got 0"),
        (torch.full((2, 2), torch.inf), "inputs must be finite, got NaN or infinity"),
        (torch.ones(2, 2, device="meta"), "must be on one device, got inputs on meta, model on cpu"),
    ],
    ids=["integer", "mapping", "empty", "infinite", "device"],
)
def test_unusable_inputs_are_refused(measure, x, message):
    with pytest.raises(InputError, match=message):
        measure(nn.Linear(2, 2), x)


@both
@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_model_has_the_same_jacobian(measure, name):
    model, x = build(name)
    model.eval()
    trained = measure(model, x)
    assert torch.equal(measure(model.requires_grad_(False), x), trained)


@both
@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)])
def test_train_mode_is_said_where_it_makes_a_difference(measure, layer):
    model, x = nn.Sequential(nn.Linear(4, 4), layer).train(), torch.randn(5, 4)
    with pytest.warns(
        UserWarning, match=f"where {type(layer).__name__} computes something else: the Jacobian"
    ):
        measure(model, x)
    measure(model.eval(), x)


@both
@pytest.mark.parametrize(
    ("forward", "found"),
    [(lambda m, x: m(x).sum(), "[]"), (lambda m, x: m(x)[:1], "[1, 2]"), (lambda m, x: (m(x),), "tuple")],
    ids=["scalar", "one", "tuple"],
)
def test_outputs_must_be_one_per_example(measure, forward, found):
    message = "must return one output, of any shape, per example, got " + re.escape(found)
    with pytest.raises(InputError, match=message):
        measure(nn.Linear(2, 2), torch.ones(3, 2), forward=forward)


@both
def test_outputs_must_depend_on_the_inputs(measure):
    with pytest.raises(InputError, match="outputs do not depend on the inputs through differentiable"):
        measure(nn.Linear(2, 2), torch.ones(3, 2), forward=lambda model, x: model(x).argmax(1))


@pytest.mark.parametrize("k", [0, 3])
def test_impossible_numbers_of_projections_are_refused(k):
    with pytest.raises(InputError, match=f"must lie between 1 and the 2 outputs, got {k}"):
        jacobian_norms(nn.Linear(2, 2), torch.ones(3, 2), num_projections=k)


@pytest.mark.parametrize("k", [0, 3])
def test_impossible_numbers_of_singular_values_are_refused(k):
    with pytest.raises(InputError, match=rf"between 1 and min\(outputs, inputs\) = 2, got {k}"):
        jacobian_singular_values(nn.Linear(5, 2), torch.ones(3, 5), k=k)


def test_the_observable_refuses_no_projection():
    with pytest.raises(InputError, match="num_projections must be a whole number at least 1, got 0"):
        JacobianNorm(num_projections=0)


def test_integers_without_an_embedding_are_refused():
    snapshot = snapshot_of(nn.Linear(2, 2), torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match=r"integer inputs have no Jacobian and the model has no"):
        JacobianNorm().statistics(snapshot)


def test_an_embedding_that_is_not_called_is_refused():
    model = nn.ModuleDict({"table": nn.Embedding(3, 2), "head": nn.Linear(2, 2)})
    snapshot = snapshot_of(model, torch.ones(2, 2, dtype=torch.int64))
    snapshot = snapshot.replace(forward=lambda model, x: model["head"](x.float()))
    with pytest.raises(UnsupportedError, match=r"first nn.Embedding was not called in its forward"):
        JacobianNorm().statistics(snapshot)
