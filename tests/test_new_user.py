"""What real models and loops do to an instrument: each case once gave a wrong number or broke the run."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    Window,
    empirical_ntk,
    per_example_grad_norms,
)
from gradiometer.adapters.batches import dataset_size_of
from gradiometer.collect.batch import split_batch
from gradiometer.errors import InputError, MeasurementWarning


def batch(step, size=6, width=4):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, width, generator=generator), torch.randint(2, (size,), generator=generator)


def train(model, observables, *, steps=8, optimizer=None, forward_backward=None, **arguments):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    memory = MemoryRecorder()
    with Monitor(model, optimizer, observables, recorders=[memory], on_error="raise", **arguments) as monitor:
        for step in range(steps):
            x, y = batch(step)
            if forward_backward is not None:
                forward_backward(monitor, x, y)
            else:
                with monitor.micro_batch(x, y):
                    F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return memory


class Remembering(nn.Module):
    """Keeps things that its forward computed, in an attribute, a counter and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        self.mean, self.calls = torch.zeros(5), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        hidden = torch.tanh(self.first(x) + 0.1 * self.mean)
        self.mean = hidden.detach().mean(0)
        self.calls += 1
        self.seen += 1
        return self.second(hidden)


def test_attributes_set_by_a_forward_are_put_back():
    plain, measured = Remembering(), Remembering()
    train(plain, [])
    train(
        measured, [NeuralTangentKernel(schedule=2), JacobianNorm(schedule=1), GradientNoiseScale(schedule=1)]
    )
    assert plain.calls == measured.calls == 8
    assert torch.equal(plain.seen, measured.seen)
    assert torch.equal(plain.mean, measured.mean)
    for left, right in zip(plain.parameters(), measured.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_layer_that_merges_weights_in_eval_is_not_merged():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(4, 2)).train()
    train(model, [NeuralTangentKernel(schedule=1), JacobianNorm(schedule=1)], steps=2)
    assert model[0].merged is False
    assert model.training


def test_tokens_do_not_touch_buffers():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, tokens):
            self.n += 1
            return self.head(self.table(tokens).mean(1))

    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, [JacobianNorm(schedule=1)], on_error="raise") as monitor:
        for _ in range(3):
            tokens = torch.randint(5, (6, 7))
            with monitor.micro_batch(tokens):
                model(tokens).square().mean().backward()
            monitor.before_step()
            optimizer.step()
    assert model.n == 3
    x, y = torch.randint(5, (6, 7)), torch.randint(2, (6,))
    per_example_grad_norms(model, F.cross_entropy, x, y)
    assert model.n == 3


def test_a_micro_batch_without_a_backward_is_no_part():
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()

    def run(given_up):
        def forward_backward(monitor, x, y):
            for part in range(3):
                rows = slice(2 * part, 2 * part + 2)
                with monitor.micro_batch(x[rows].double(), y[rows]):
                    if part != given_up:
                        F.cross_entropy(model(x[rows].double()), y[rows]).backward()

        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        observables = [GradientNoiseScale(schedule=1)]
        memory = train(model, observables, steps=1, optimizer=optimizer, forward_backward=forward_backward)
        return memory.latest()["dynamics/noise/trace"].value

    x, y = batch(0)
    gradients = []
    for part in (0, 1):
        rows = slice(2 * part, 2 * part + 2)
        loss = F.cross_entropy(model(x[rows].double()), y[rows])
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        )
    difference = gradients[0] - gradients[1]
    # two parts of two examples: S = b |g_1 - g_2|^2 / 2; a loss is taken to be divided by the three that
    # were begun, so that each part's own gradient is three times what it adds
    assert run(given_up=2) == pytest.approx(9 * difference.square().sum().item(), rel=1e-10)


def test_parameters_that_the_optimizer_does_not_hold_are_left_out():
    def run(zero_all):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
        memory = MemoryRecorder()
        with Monitor(
            model, optimizer, [GradientNoiseScale(schedule=1)], recorders=[memory], on_error="raise"
        ) as monitor:
            for step in range(8):
                x, y = batch(step)
                with monitor.micro_batch(x, y):
                    F.cross_entropy(model(x), y).backward()
                monitor.before_step()
                optimizer.step()
                (model if zero_all else optimizer).zero_grad()
        return memory.latest()["dynamics/noise/trace"]

    left, right = run(zero_all=True), run(zero_all=False)
    assert left.value == right.value > 0
    assert "over 100 % of parameters" in left.note


def test_a_summed_loss_heats_like_the_mean_loss_at_the_same_trajectory():
    def run(reduction, lr):
        torch.manual_seed(0)
        model = nn.Linear(4, 2).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)

        def forward_backward(monitor, x, y):
            with monitor.micro_batch(x.double(), y):
                F.cross_entropy(model(x.double()), y, reduction=reduction).backward()

        memory = train(
            model,
            [GradientNoiseScale(schedule=1)],
            optimizer=optimizer,
            forward_backward=forward_backward,
            loss_reduction=reduction,
            dataset_size=100,
        )
        return memory.latest()

    mean, summed = run("mean", 0.06), run("sum", 0.01)
    for name in ("scale_lower_bound", "trace", "sgd_scale", "temperature"):
        key = f"dynamics/noise/{name}"
        assert summed[key].value == pytest.approx(mean[key].value, rel=1e-9), name


def test_several_learning_rates_have_no_single_sgd_scale():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.01}]
    memory = train(
        model, [GradientNoiseScale(schedule=1)], optimizer=torch.optim.SGD(groups), dataset_size=100
    )
    assert "dynamics/noise/scale" in memory.latest()
    assert "dynamics/noise/sgd_scale" not in memory.latest()
    assert "dynamics/noise/temperature" not in memory.latest()


def test_a_group_at_rest_does_not_blur_the_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[1].parameters(), "lr": 0.1}]
    relation = [FluctuationDissipation(schedule=2, sampling=1, estimator=Window(100))]
    latest = train(model, relation, optimizer=torch.optim.SGD(groups)).latest()
    assert math.isfinite(latest["dynamics/fdr/ratio"].value)
    assert latest["dynamics/fdr/ratio"].value == latest["dynamics/fdr/ratio/1"].value
    assert "dynamics/fdr/ratio/0" not in latest


def test_a_forward_without_gradients_in_the_same_step_does_no_harm():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)

    def forward_backward(monitor, x, y):
        with monitor.micro_batch(x, y):
            with torch.no_grad():
                model(x)
            F.cross_entropy(model(x), y).backward()

    extra = train(model, [GradientNoiseScale(schedule=1)], forward_backward=forward_backward)
    torch.manual_seed(0)
    plain = train(nn.Linear(4, 2), [GradientNoiseScale(schedule=1)])
    for name in ("trace", "grad_sq_norm"):
        assert extra.series(f"dynamics/noise/{name}") == plain.series(f"dynamics/noise/{name}")


def test_half_precision_kernels_are_added_in_single_precision():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1)), torch.randn(4, 64)
    half = model.bfloat16()
    kernel = empirical_ntk(half, x.bfloat16())
    exact = empirical_ntk(model.float(), x.bfloat16().float())
    assert kernel.dtype == torch.float64
    assert ((kernel - exact).norm() / exact.norm()).item() < 4e-3  # the Jacobian's own rounding, 2^-8


def test_an_averaged_jacobian_norm_has_a_smaller_error():
    torch.manual_seed(0)
    model = nn.Linear(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    observables = [JacobianNorm(schedule=1, num_projections=2, estimator=Window(100))]
    memory = train(model, observables, steps=16, optimizer=optimizer)
    errors = [error for _, error in memory.series("dynamics/jacobian/frobenius_norm_stderr")]
    assert errors[-1] == pytest.approx(errors[0] / 4, rel=0.4)


def test_a_batch_of_three_has_no_targets():
    x, weight, y = torch.zeros(4, 2), torch.ones(4), torch.zeros(4)
    assert split_batch((x, weight, y))[1] is None
    assert split_batch((x, y))[1] is y


def test_a_subset_is_as_large_as_its_sampler():
    data = torch.utils.data.TensorDataset(torch.zeros(256, 2))
    sampler = torch.utils.data.SubsetRandomSampler(range(64))
    assert dataset_size_of(torch.utils.data.DataLoader(data, sampler=sampler)) == 64
    assert dataset_size_of(torch.utils.data.DataLoader(data, shuffle=True)) == 256


def test_a_probe_of_ones_own_is_not_replaced_by_the_checkpoints():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = Monitor(model, optimizer, [JacobianNorm()], probe=batch(0, size=8))
    new = Monitor(model, optimizer, [JacobianNorm()], probe=batch(1, size=5))
    with pytest.warns(MeasurementWarning, match="the probe given to Monitor is used"):
        new.load_state_dict(old.state_dict())
    assert len(new.state_dict()["probe"]["inputs"]) == 5
    old.close()
    new.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"recorders": MemoryRecorder()}, "recorders must be a list of callables"),
        ({"forward": "x"}, "forward must be a callable"),
        ({"dataset_size": -5}, "dataset_size must be a whole number at least 1, got -5"),
        ({"probe_size": 3.5}, "probe_size must be a whole number at least 1, got 3.5"),
        ({"budget": "0.05"}, "budget must be a number above 0 and below 1, got '0.05'"),
        ({"prefix": 3}, "prefix must be one word without a slash, got 3"),
    ],
)
def test_arguments_of_the_wrong_kind_get_a_message(wrong, message):
    model = nn.Linear(4, 2)
    with pytest.raises(InputError, match=message):
        Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), [], **wrong)


def test_model_and_optimizer_in_the_wrong_order_get_a_message():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"got SGD and Linear. Write Monitor\(model, optimizer\)"):
        Monitor(optimizer, model)
