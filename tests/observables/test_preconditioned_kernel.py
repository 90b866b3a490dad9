"""The kernel under the optimizer's own steps predicts how a step moves the outputs."""

import pytest
import torch
from torch import nn

from gradiometer import MemoryRecorder, Monitor, NeuralTangentKernel, empirical_ntk, every, layer_ntks
from gradiometer.errors import InputError, MeasurementWarning
from gradiometer.observables import projection_stderr


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(5, 4, generator=generator, dtype=torch.float64),
        torch.randn(5, 3, generator=generator, dtype=torch.float64),
    )


def measured(model, optimizer, steps=1, **options):
    """Readings of the last of a few steps, and the optimizer's state after it."""
    x, y = batch()
    memory = MemoryRecorder()
    observable = NeuralTangentKernel(schedule=every(1), preconditioned=True, **options)
    with Monitor(model, optimizer, [observable], recorders=[memory], on_error="raise") as monitor:
        for _ in range(steps):
            with monitor.micro_batch(x, y):
                nn.functional.mse_loss(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return {key.rpartition("/")[2]: reading for key, reading in memory.latest().items() if "ntk" in key}


def test_groups_count_with_their_relative_rates():
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.05}]
    found = measured(model, torch.optim.SGD(groups))["kernel"].value
    layers = layer_ntks(model.eval(), batch()[0])
    torch.testing.assert_close(torch.as_tensor(found), layers["0"] + 0.5 * layers["2"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_counts_with_the_root_of_its_second_moment(kind, amsgrad):
    model = network()
    optimizer = kind(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-6, amsgrad=amsgrad)
    found = measured(model, optimizer, steps=3)["kernel"].value
    weights = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        second = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"] / (1 - 0.95**3)
        weights[name] = 1 / (second.sqrt() + 1e-6)
    expected = empirical_ntk(model.eval(), batch()[0], weights=weights)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-10, atol=0)


def test_weights_that_never_had_a_gradient_do_not_count():
    """Adam has no scale for them yet, and 1 / eps would drown all others."""
    model = nn.Linear(3, 1, bias=False).double()
    optimizer, memory = torch.optim.Adam(model.parameters(), lr=0.01), MemoryRecorder()
    x = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0]], dtype=torch.float64)
    probe = torch.ones(1, 3, dtype=torch.float64)
    observable = NeuralTangentKernel(schedule=1, preconditioned=True)
    with Monitor(
        model, optimizer, [observable], recorders=[memory], probe=probe, on_error="raise"
    ) as monitor:
        with monitor.micro_batch(x):
            model(x).mean().backward()
        monitor.before_step()
        optimizer.step()
    found = memory.latest()["dynamics/preconditioned_ntk/kernel"].value
    assert found.item() == pytest.approx(1 / 2 + 1 / 1.5, rel=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_frozen_layers_do_not_count(kind):
    """Whether or not the optimizer holds them."""
    model = network()
    model[0].requires_grad_(False)
    found = measured(model, kind(model.parameters(), lr=0.1))["kernel"].value
    weights = {}
    if kind is torch.optim.Adam:
        before, (x, y) = network(), batch()  # the first second moment is the squared gradient itself
        grads = torch.autograd.grad(nn.functional.mse_loss(before(x), y), list(before[2].parameters()))
        weights = {f"2.{n}": 1 / (g.abs() + 1e-8) for n, g in zip(("weight", "bias"), grads, strict=True)}
    expected = empirical_ntk(model.eval(), batch()[0], weights=weights)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-10, atol=0)


def test_it_predicts_what_a_small_step_does_to_the_outputs():
    """``df_a = - eta sum_b Theta_ab dL/df_b`` to first order, with one rate per group."""
    model = network()
    x, y = batch()
    rates = {"0.weight": 1.0, "0.bias": 1.0, "2.weight": 0.3, "2.bias": 0.0}
    kernel = empirical_ntk(model.eval(), x, outputs="full", weights=rates)
    before = model(x)
    slope = torch.autograd.grad(nn.functional.mse_loss(before, y), before, retain_graph=True)[0]
    grads = torch.autograd.grad(nn.functional.mse_loss(before, y), list(model.parameters()))
    small = 1e-6
    with torch.no_grad():
        for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
            p -= small * rates[name] * grad
    moved = (model(x) - before).detach() / small
    torch.testing.assert_close(moved, -torch.einsum("nmop,mp->no", kernel, slope), rtol=1e-4, atol=1e-7)


def test_both_kernels_can_be_recorded_at_once():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = MemoryRecorder()
    x, y = batch()
    observables = [NeuralTangentKernel(schedule=1), NeuralTangentKernel(schedule=1, preconditioned=True)]
    with Monitor(model, optimizer, observables, recorders=[memory], on_error="raise") as monitor:
        with monitor.micro_batch(x, y):
            nn.functional.mse_loss(model(x), y).backward()
        monitor.before_step()
        optimizer.step()
    assert {"dynamics/ntk/trace", "dynamics/preconditioned_ntk/trace"} <= set(memory.latest())


def test_other_optimizers_are_refused_once():
    model = network()
    x, y = batch()
    optimizer = torch.optim.Adagrad(model.parameters())
    observable = NeuralTangentKernel(schedule=1, preconditioned=True)
    with (
        pytest.warns(MeasurementWarning, match="known for SGD, Adam and AdamW, got Adagrad") as caught,
        Monitor(model, optimizer, [observable]) as monitor,
    ):
        for _ in range(3):
            with monitor.micro_batch(x, y):
                nn.functional.mse_loss(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
    assert len(caught) == 1


def test_projections_are_part_of_the_error_of_the_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 40)).double()
    x = batch()[0]

    def trace(**options):
        memory = MemoryRecorder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        observable = NeuralTangentKernel(schedule=1, **options)
        with Monitor(model, optimizer, [observable], recorders=[memory], on_error="raise") as monitor:
            with monitor.micro_batch(x, torch.zeros(5)):
                model(x).sum().backward()
            monitor.before_step()
            optimizer.step()
        return memory.latest()["dynamics/ntk/trace"]

    exact, projected = trace(num_projections=40), trace()
    assert projected.stderr > exact.stderr
    assert abs(projected.value - exact.value) < 4 * projected.stderr


@pytest.mark.parametrize("k", [2, 8, 32])
def test_the_error_of_projections_is_that_of_their_mean(k):
    """Also where most of the outputs are used up, which drawing with replacement would not know."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 40)).double().eval()
    x = batch()[0]
    means, errors = [], []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        each = empirical_ntk(model, x, outputs="diagonal", num_projections=k, generator=generator)
        traces = each.diagonal().mean(-1)
        means.append(traces.mean())
        errors.append(projection_stderr(traces, 40).square())
    exact = empirical_ntk(model, x).diagonal().mean()
    spread = torch.stack(means).std()
    assert (torch.stack(means).mean() - exact).abs() < 4 * spread / 200**0.5
    assert torch.stack(errors).mean().sqrt().item() == pytest.approx(spread.item(), rel=0.2)


def test_an_error_needs_two_projections():
    with pytest.raises(InputError, match="at least two projections, got 1"):
        projection_stderr(torch.ones(3, 1), 10)
