import math

import numpy as np
import pytest
import torch
from torch import nn

from gradiometer import MemoryRecorder, Monitor
from gradiometer.collect.snapshot import Probe, Snapshot
from gradiometer.errors import InputError, UnsupportedError
from gradiometer.observables import (
    NeuralTangentKernel,
    empirical_ntk,
    kernel_alignment,
    kernel_angle,
    kernel_distance,
    relative_drift,
)
from gradiometer.stats.estimators import Last
from gradiometer.stats.kernel_geometry import effective_rank, target_kernel

from ..zoo import TwoPaths

# most models here stand in train mode on purpose
pytestmark = pytest.mark.filterwarnings("ignore:the model is in train mode")


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- models ----------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))))


class Tied(nn.Module):
    """Two modules with one Parameter."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 6), nn.Linear(6, 4)
        self.decode.weight = nn.Parameter(self.encode.weight.detach().mT.clone())
        self.again = nn.Linear(4, 6)
        self.again.weight = self.encode.weight

    def forward(self, x):
        return self.again(torch.tanh(self.decode(torch.tanh(self.encode(x)))))


class Keywords(nn.Module):
    """Called with keyword arguments, one of them indices."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, ids, scale):
        return self.head(torch.tanh(self.table(ids).mean(1)) * scale)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.unflatten(1, (2, 4))
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def conv_net():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 2)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def batch_norm():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
    model.double()
    for seed in range(3):
        model(1 + 2 * draws(9, 4, seed=seed))
    return model


MODELS = {
    "mlp": (mlp, 4),
    "conv net": (conv_net, 8),
    "shared module": (Twice, 4),
    "two paths": (TwoPaths, 4),
    "tied": (Tied, 4),
    "frozen": (frozen, 4),
    "batch norm and dropout": (batch_norm, 4),
    "attention": (Attention, 8),
    "keywords": (Keywords, None),
}


def build(name, count=5, seed=0):
    """A model in train mode and inputs for it."""
    make, width = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    if width is None:
        ids = torch.randint(5, (count, 3), generator=torch.Generator().manual_seed(seed))
        return model, {"ids": ids, "scale": draws(count, 1, seed=seed)}
    return model, draws(count, width, seed=seed)


def pick(x, i):
    return {k: v[i : i + 1] for k, v in x.items()} if isinstance(x, dict) else x[i : i + 1]


def jacobian(model, x, count=5):
    """``[N, O, P]`` by one backward pass per example and output, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(count):
        one = pick(x, i)
        out = (model(**one) if isinstance(one, dict) else model(one))[0]
        gradients = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in out]
        rows.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g).reshape(-1)
                            for g, p in zip(each, parameters, strict=True)
                        ]
                    )
                    for each in gradients
                ]
            )
        )
    for module, mode in modes:
        module.training = mode
    return torch.stack(rows)


def brute_force(j1, j2, outputs):
    full = torch.einsum("aop,bqp->aboq", j1, j2)
    if outputs == "full":
        return full
    diagonal = full.diagonal(dim1=2, dim2=3)
    return diagonal if outputs == "diagonal" else diagonal.mean(-1)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


# -- against the brute force -----------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["trace", "diagonal", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_kernel_against_one_backward_pass_per_example_and_output(name, outputs):
    model, x = build(name)
    expected = brute_force(jacobian(model, x), jacobian(model, x), outputs)
    close(empirical_ntk(model, x, outputs=outputs), expected)


@pytest.mark.parametrize("outputs", ["trace", "diagonal", "full"])
@pytest.mark.parametrize("name", ["mlp", "conv net", "keywords"])
def test_kernel_between_two_sets(name, outputs):
    model, x = build(name)
    _, x2 = build(name, count=3, seed=7)
    expected = brute_force(jacobian(model, x), jacobian(model, x2, 3), outputs)
    kernel = empirical_ntk(model, x, x2, outputs=outputs)
    assert kernel.shape[:2] == (5, 3)
    close(kernel, expected)


@pytest.mark.parametrize("outputs", ["trace", "diagonal", "full"])
@pytest.mark.parametrize(
    "arguments",
    [*({"chunk_size": n} for n in (1, 2, 3, 4, 5, 6)), {"max_memory": 6000}, {"max_memory": 20000}],
    ids=str,
)
def test_chunks_change_nothing(arguments, outputs):
    model, x = build("mlp")
    expected = brute_force(jacobian(model, x), jacobian(model, x), outputs)
    close(empirical_ntk(model, x, outputs=outputs, **arguments), expected)
    x2 = draws(4, 4, seed=3)
    expected = brute_force(jacobian(model, x), jacobian(model, x2, 4), outputs)
    close(empirical_ntk(model, x, x2, outputs=outputs, **arguments), expected)


def test_full_kernel_is_symmetric_and_positive():
    model, x = build("conv net")
    kernel = empirical_ntk(model, x, outputs="full", chunk_size=2)
    flat = kernel.permute(0, 2, 1, 3).reshape(15, 15)
    close(flat, flat.mT)
    assert torch.linalg.eigvalsh(flat)[0] > -1e-10 * flat.abs().max()


def test_forward_selects_the_outputs():
    model, x = build("mlp")
    full = empirical_ntk(model, x, outputs="full")
    chosen = empirical_ntk(model, x, forward=lambda model, x: model(x)[:, 1:2])
    close(chosen, full[:, :, 1, 1])


def test_single_precision_model():
    model, x = build("mlp")
    expected = empirical_ntk(model, x)
    kernel = empirical_ntk(model.float(), x.float())
    assert kernel.dtype == torch.float64
    torch.testing.assert_close(kernel, expected, rtol=1e-5, atol=1e-5)


# -- random output projections ---------------------------------------------------------------------


def test_a_full_set_of_projections_is_exact():
    model, x = build("mlp")
    kernel = empirical_ntk(model, x, num_projections=3, generator=torch.Generator().manual_seed(5))
    close(kernel, empirical_ntk(model, x))


@pytest.mark.parametrize("projections", [1, 2])
def test_projections_are_unbiased(projections):
    model, x = build("mlp", count=3)
    exact = empirical_ntk(model, x)
    generator = torch.Generator().manual_seed(0)
    found = torch.stack(
        [empirical_ntk(model, x, num_projections=projections, generator=generator) for _ in range(300)]
    )
    errors = (found.mean(0) - exact) / (found.std(0) / 300**0.5)
    assert errors.abs().max() < 3
    assert found.std(0).min() > 0.01 * exact.abs().min()


def test_projections_with_chunks_and_little_memory():
    model, x = build("mlp")
    kernels = [
        empirical_ntk(model, x, num_projections=2, generator=torch.Generator().manual_seed(1), **arguments)
        for arguments in ({}, {"chunk_size": 2}, {"max_memory": 6000})
    ]
    close(kernels[1], kernels[0])
    close(kernels[2], kernels[0])


def test_projections_are_the_same_without_a_generator():
    model, x = build("mlp")
    first = empirical_ntk(model, x, num_projections=1)
    assert torch.equal(first, empirical_ntk(model, x, num_projections=1))
    assert not torch.allclose(first, empirical_ntk(model, x))


# -- nothing is left behind ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_as_it_was_and_still_trains(name):
    """``functional_call`` with tied weights would leave the passed tensors in place of Parameters."""
    model, x = build(name)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters(remove_duplicate=False)}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    empirical_ntk(model, x, num_projections=1)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    for n, p in after.items():
        assert isinstance(p, nn.Parameter)
        assert id(p) == before[n][0]
        assert torch.equal(p, before[n][1])
        assert p.grad is None
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    out = model(**x) if isinstance(x, dict) else model(x)
    out.square().sum().backward()
    optimizer.step()
    trained = [n for n, p in after.items() if p.requires_grad and p.grad.abs().sum() > 0]
    assert trained
    assert all(not torch.equal(after[n], before[n][1]) for n in trained)
    moved = model.eval()(**x) if isinstance(x, dict) else model.eval()(x)
    assert not torch.equal(moved, out)


# -- T8: the linear model --------------------------------------------------------------------------


def test_linear_model_has_a_constant_kernel_and_closed_form_dynamics():
    x, y = draws(6, 4), draws(6, seed=1)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    lr, count = 0.1, 6
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    first = empirical_ntk(model, x)
    close(first, x @ x.mT)
    start = model(x)[:, 0].detach()
    decay = torch.eye(count, dtype=torch.float64) - lr / count * first
    for step in range(1, 31):
        loss = (model(x)[:, 0] - y).square().mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        predicted = y + torch.linalg.matrix_power(decay, step) @ (start - y)
        torch.testing.assert_close(model(x)[:, 0].detach(), predicted, rtol=0, atol=1e-10)
    assert relative_drift(empirical_ntk(model, x), first) < 1e-10
    assert kernel_distance(empirical_ntk(model, x), first) < 1e-10


# -- comparing kernels -----------------------------------------------------------------------------


def rotated(angle):
    """Two kernels at a known angle, of different scale."""
    a = draws(5, 5)
    b = draws(5, 5, seed=1)
    a = a / a.norm()
    b = b - (a * b).sum() * a
    b = b / b.norm()
    return 3.0 * a, 0.2 * (math.cos(angle) * a + math.sin(angle) * b)


@pytest.mark.parametrize("angle", [1e-6, 1e-4, 0.01, 0.3, 1.0, math.pi / 2])
def test_angle_and_distance_of_rotated_kernels(angle):
    k1, k2 = rotated(angle)
    assert kernel_angle(k1, k2).item() == pytest.approx(angle, rel=1e-6)
    assert kernel_distance(k1, k2).item() == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=2e-6)
    assert kernel_distance(k1, k2).item() == pytest.approx(1 - math.cos(angle), abs=1e-14)


def test_distance_is_blind_to_scale_and_drift_is_not():
    k1, k2 = rotated(0.3)
    assert kernel_distance(7 * k1, 0.1 * k2).item() == pytest.approx(
        kernel_distance(k1, k2).item(), rel=1e-12
    )
    assert kernel_distance(k1, 5 * k1).item() < 1e-30
    assert relative_drift(5 * k1, k1).item() == pytest.approx(4.0, rel=1e-14)


def test_drift_in_closed_form():
    k0 = torch.diag(torch.tensor([3.0, 4.0]))
    k = torch.diag(torch.tensor([3.0, 4.5]))
    assert relative_drift(k, k0).item() == pytest.approx(0.1)
    assert relative_drift(k0, k0).item() == 0.0


def test_distance_is_half_the_square_of_the_turning_part_of_the_drift():
    k0, _ = rotated(0.0)
    k1 = k0 + 1e-4 * rotated(math.pi / 2)[1] / 0.2 * k0.norm()
    assert relative_drift(k1, k0).item() == pytest.approx(1e-4, rel=1e-9)
    assert kernel_distance(k1, k0).item() == pytest.approx(0.5e-8, rel=1e-6)


@pytest.mark.parametrize(
    "targets",
    [torch.tensor([0, 2, 2, 1, 0, 1]), draws(6, 3), draws(6)],
    ids=["classes", "vectors", "numbers"],
)
def test_alignment_against_numpy(targets):
    features = draws(6, 4, seed=5)
    k = features @ features.mT
    y = np.eye(3)[targets] if targets.dtype == torch.int64 else targets.numpy().reshape(6, -1)
    centre = np.eye(6) - np.ones((6, 6)) / 6
    a, b = centre @ k.numpy() @ centre, centre @ (y @ y.T) @ centre
    expected = (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))
    assert kernel_alignment(k, targets).item() == pytest.approx(expected, rel=1e-12)
    assert kernel_alignment(target_kernel(targets), targets).item() == pytest.approx(1.0, abs=1e-14)
    assert kernel_alignment(5 * k + 3, targets).item() == pytest.approx(expected, rel=1e-10)


def test_alignment_of_classes_equals_that_of_one_hot_vectors():
    y = torch.tensor([0, 2, 2, 1, 0, 1])
    k = draws(6, 6)
    k = k @ k.mT
    one_hot = nn.functional.one_hot(y).double()
    assert kernel_alignment(k, y).item() == pytest.approx(kernel_alignment(k, one_hot).item(), rel=1e-14)


def test_alignment_with_unrelated_targets_is_zero():
    y = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    other = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    assert abs(kernel_alignment(other[:, None] * other, y).item()) < 1e-15


def test_effective_rank():
    assert effective_rank(torch.ones(7)).item() == pytest.approx(7.0)
    assert effective_rank(torch.tensor([0.0, 0.0, 5.0])).item() == pytest.approx(1.0)
    assert effective_rank(torch.tensor([1.0, 3.0])).item() == pytest.approx(1.6)


# -- the observable --------------------------------------------------------------------------------


def records(observable, model, probe, moves):
    """Readings before and after each change of the model."""
    estimator, found = Last(), []
    for step, move in enumerate([None, *moves]):
        if move is not None:
            move(model)
        snapshot = Snapshot(
            step=10 * step, model=model, forward=lambda model, x: model(x), groups=(), probe=probe
        )
        estimator.add(observable.statistics(snapshot))
        estimator.close(10 * step, observable.levels(snapshot))
        rows, _ = estimator.replicates()
        found.append(observable.readings(rows | estimator.levels(), estimator.reference()))
    return found


def number(reading):
    return torch.as_tensor(getattr(reading, "value", reading)).reshape(-1)[0].item()


def disturb(model):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.1 * draws(*p.shape, seed=i)


def test_readings_in_closed_form():
    model, x = build("mlp", count=8)
    y = torch.arange(8) % 3
    kernels = [empirical_ntk(model, x)]

    def move(model):
        disturb(model)
        kernels.append(empirical_ntk(model, x))

    first, second, third = records(NeuralTangentKernel(), model, Probe(x, y), [move, move])
    assert number(first["drift"]) == number(first["distance"]) == 0.0
    assert "velocity" not in first
    for found, k, previous in ((second, *kernels[1::-1]), (third, *kernels[2:0:-1])):
        assert number(found["drift"]) == pytest.approx(relative_drift(k, kernels[0]).item(), rel=1e-10)
        assert number(found["distance"]) == pytest.approx(kernel_distance(k, kernels[0]).item(), rel=1e-9)
        assert number(found["velocity"]) == pytest.approx(kernel_angle(k, previous).item() / 10, rel=1e-8)
        assert number(found["alignment"]) == pytest.approx(kernel_alignment(k, y).item(), rel=1e-10)
        assert number(found["trace"]) == pytest.approx(k.diagonal().mean().item(), rel=1e-10)
        spectrum = torch.linalg.eigvalsh(k)
        assert number(found["top_eigenvalue"]) == pytest.approx(spectrum[-1].item(), rel=1e-10)
        smallest = spectrum[0].item()
        assert number(found["smallest_eigenvalue"]) == pytest.approx(
            smallest, abs=1e-10 * spectrum[-1].item()
        )
        assert number(found["effective_rank"]) == pytest.approx(effective_rank(spectrum).item(), rel=1e-10)
        close(found["kernel"], k)
        # the jackknife error of a mean
        expected = k.diagonal().std().item() / 8**0.5
        assert float(found["trace"].stderr) == pytest.approx(expected, rel=1e-8)
        assert float(found["drift"].stderr) > 0


def test_off_diagonal_share_of_the_full_kernel():
    model, x = build("mlp")
    (found,) = records(NeuralTangentKernel(outputs="full"), model, Probe(x), [])
    full = empirical_ntk(model, x, outputs="full")
    mask = ~torch.eye(3, dtype=torch.bool)
    expected = (full[:, :, mask].norm() / full.norm()).item()
    assert number(found["off_diagonal"]) == pytest.approx(expected, rel=1e-9)
    flat = full.permute(0, 2, 1, 3).reshape(15, 15)
    close(found["spectrum"], torch.linalg.eigvalsh(flat), 1e-9)
    assert "alignment" not in found


def test_a_linear_layer_has_no_off_diagonal_blocks():
    model = nn.Linear(4, 3).double()
    (found,) = records(NeuralTangentKernel(outputs="full"), model, Probe(draws(5, 4)), [])
    assert number(found["off_diagonal"]) < 1e-7


@pytest.mark.parametrize("outputs", ["diagonal", "full"])
def test_every_mode_reads_the_same_trace_and_alignment(outputs):
    model, x = build("mlp", count=8)
    probe = Probe(x, torch.arange(8) % 3)
    (trace,) = records(NeuralTangentKernel(), model, probe, [])
    (other,) = records(NeuralTangentKernel(outputs=outputs), model, probe, [])
    for name in ("trace", "alignment"):
        assert number(other[name]) == pytest.approx(number(trace[name]), rel=1e-10)


def test_many_outputs_are_projected_by_default():
    model = nn.Linear(3, 17).double()
    snapshot = Snapshot(
        step=0, model=model, forward=lambda model, x: model(x), groups=(), probe=Probe(draws(4, 3))
    )
    # every output of a linear layer has the same kernel, so any projections are exact
    close(NeuralTangentKernel().levels(snapshot)["kernel"], draws(4, 3) @ draws(4, 3).mT + 1)
    curved = snapshot.replace(model=nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 17)).double())
    kernel = NeuralTangentKernel().levels(curved)["kernel"]
    generator = torch.Generator().manual_seed(0)
    close(kernel, empirical_ntk(curved.model, draws(4, 3), num_projections=8, generator=generator))
    assert not torch.allclose(kernel, empirical_ntk(curved.model, draws(4, 3)))


def targets_kept(model, forward, x, y):
    snapshot = Snapshot(step=0, model=model.double(), forward=forward, groups=(), probe=Probe(x, y))
    return NeuralTangentKernel().levels(snapshot)["targets"]


def test_targets_of_a_sequence_are_those_of_its_last_position():
    y = torch.tensor([[9, 0], [8, 0], [7, 1], [6, 1]])
    tokens = torch.randint(5, (4, 2), generator=torch.Generator().manual_seed(0))
    kept = targets_kept(nn.Embedding(5, 3), lambda model, x: model(x)[:, -1], tokens, y)
    assert torch.equal(kept, target_kernel(torch.tensor([0, 0, 1, 1])))


def test_targets_of_several_labels_are_kept_whole():
    y = torch.tensor([[9, 0], [8, 0], [9, 0], [6, 1]])
    kept = targets_kept(nn.Linear(3, 2), lambda model, x: model(x), draws(4, 3), y)
    assert torch.equal(kept, target_kernel(y))
    assert kept[0, 2] == 1
    assert kept[0, 1] == 0


def test_linear_model_does_not_drift_under_the_monitor():
    model = nn.Linear(4, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = MemoryRecorder()
    x = draws(8, 4)
    with Monitor(
        model, optimizer, [NeuralTangentKernel(schedule=2)], recorders=[memory], on_error="raise"
    ) as monitor:
        for _ in range(5):
            with monitor.micro_batch(x):
                model(x).square().mean().backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    drift = memory.series("dynamics/ntk/drift")
    assert [step for step, _ in drift] == [0, 2, 4]
    assert max(value for _, value in drift) < 1e-10
    (_, trace), *_ = memory.series("dynamics/ntk/trace")
    assert trace == pytest.approx((x.square().sum(1) + 1).mean().item(), rel=1e-12)


# -- errors ----------------------------------------------------------------------------------------


def test_unknown_mode_is_refused():
    message = "unknown outputs, got 'sum'. Write .trace., .full. or .diagonal."
    with pytest.raises(InputError, match=message):
        empirical_ntk(nn.Linear(2, 1), torch.ones(2, 2), outputs="sum")
    with pytest.raises(InputError, match=message):
        NeuralTangentKernel(outputs="sum")


def test_projections_need_the_trace_kernel():
    with pytest.raises(InputError, match=r"projections estimate the trace kernel only, got outputs='full'"):
        empirical_ntk(nn.Linear(2, 2), torch.ones(2, 2), outputs="full", num_projections=1)


@pytest.mark.parametrize("number", [0, 3])
def test_impossible_numbers_of_projections_are_refused(number):
    with pytest.raises(InputError, match=f"must lie between 1 and the 2 outputs, got {number}"):
        empirical_ntk(nn.Linear(2, 2), torch.ones(2, 2), num_projections=number)


def test_chunk_size_must_be_positive():
    with pytest.raises(InputError, match="chunk_size must be a whole number at least 1, got 0"):
        empirical_ntk(nn.Linear(2, 2), torch.ones(2, 2), chunk_size=0)


def test_a_frozen_model_is_refused():
    with pytest.raises(InputError, match=r"Linear has no trainable parameter. Call model.requires_grad_"):
        empirical_ntk(nn.Linear(2, 2).requires_grad_(False), torch.ones(2, 2))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(0, 2), "a batch must hold at least one example, got 0"),
        (torch.ones(()), "a tensor whose first dimension counts the examples, got a scalar tensor"),
        (torch.full((2, 2), torch.nan), "inputs must be finite, got NaN or infinity"),
        (torch.ones(2, 2, device="meta"), "must be on one device, got inputs on meta, model on cpu"),
    ],
    ids=["empty", "scalar", "nan", "device"],
)
def test_unusable_inputs_are_refused(x, message):
    with pytest.raises(InputError, match=message):
        empirical_ntk(nn.Linear(2, 2), x)
    with pytest.raises(InputError, match=message):
        empirical_ntk(nn.Linear(2, 2), torch.ones(2, 2), x)


def test_outputs_must_be_a_matrix():
    model = nn.Unflatten(1, (2, 1))
    with pytest.raises(
        InputError, match=r"must have shape \[N, O\] with N = 1, got \[1, 2, 1\]. Pass forward="
    ):
        empirical_ntk(nn.Sequential(nn.Linear(2, 2), model), torch.ones(3, 2))
    with pytest.raises(InputError, match=r"must have shape \[N, O\] with N = 1, got \[\]"):
        empirical_ntk(nn.Linear(2, 2), torch.ones(3, 2), forward=lambda model, x: model(x).sum())


@pytest.mark.parametrize("compare", [kernel_distance, kernel_angle, relative_drift])
def test_kernels_of_different_probes_are_not_compared(compare):
    with pytest.raises(InputError, match=r"only on one probe, got shapes \[2, 2\] and \[3, 3\]"):
        compare(torch.eye(2), torch.eye(3))


@pytest.mark.parametrize(
    ("k", "y"), [(torch.eye(3), torch.arange(2)), (torch.ones(3, 3, 2), torch.arange(3))], ids=["N", "mode"]
)
def test_alignment_needs_a_kernel_over_the_examples_of_the_targets(k, y):
    with pytest.raises(InputError, match=r"alignment needs a kernel \[N, N\] and N targets, got a kernel"):
        kernel_alignment(k, y)


def test_a_model_whose_branch_depends_on_the_batch_is_refused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x) * (1 if x.sum().item() > 0 else 2)

    x = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-9.0, -9.0]])
    with pytest.raises(UnsupportedError, match=r"change with the others in the batch"):
        empirical_ntk(Branching(), x)


def test_inputs_made_in_inference_mode():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    x = draws(5, 4)
    with torch.inference_mode():
        unusable = x.clone()
        inside = empirical_ntk(model, unusable)
    close(inside, empirical_ntk(model, x))
    close(empirical_ntk(model, unusable, unusable), inside)
