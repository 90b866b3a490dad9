"""Whether features are learned is read from the kernel's direction, whatever happens to its scale."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from gradiometer import Monitor, NeuralTangentKernel, at, layer_ntks
from gradiometer.record.table import sentence
from gradiometer.stats.kernel_geometry import kernel_distance, rescaled_parts


def features(width=48):
    return nn.Sequential(nn.Linear(12, width), nn.ReLU()).requires_grad_(False)


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.readout = features(), nn.Linear(48, 4)
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return self.readout(self.features(x)) * self.log_scale.exp()


def normalised_weights():
    return nn.Sequential(features(192), weight_norm(nn.Linear(192, 4)))


def last_layer_grows():
    net = nn.Sequential(nn.Linear(12, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 4))
    with torch.no_grad():
        net[-1].weight.mul_(0.03)
    return net


def without_biases():
    return nn.Sequential(nn.Linear(12, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))


def deep():
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


def train(net, steps=300, lr=0.3, only_last=False, decay=0.0, schedule=50):
    """Classes that a few directions of the inputs decide; the readings of the last record."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 12, generator=generator)
    y = (x[:, :2] @ torch.randn(2, 4, generator=generator) + x[:, :1] * x[:, 1:2]).argmax(1)
    last = [*net.parameters()][-2:]
    trained = last if only_last else [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, weight_decay=decay)
    with Monitor(net, optimizer, [NeuralTangentKernel(schedule=schedule)], on_error="raise") as monitor:
        for _ in range(steps + 1):
            index = torch.randint(256, (32,), generator=generator)
            with monitor.micro_batch(x[index], y[index]):
                (F.cross_entropy(net(x[index]), y[index]) * (not decay)).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return monitor.latest


def number(latest, name):
    return latest[f"dynamics/ntk/{name}"].value


def said(latest):
    return sentence(latest["dynamics/ntk/feature_change"], latest)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Temperature, {}),
        (normalised_weights, {}),
        (last_layer_grows, {"only_last": True}),
        (without_biases, {"decay": 0.01}),
    ],
    ids=["temperature", "weight norm", "last layer", "decay"],
)
def test_a_change_of_scale_is_not_called_feature_learning(make, options):
    torch.manual_seed(0)
    latest = train(make(), **options)
    assert number(latest, "drift") > 0.3
    assert number(latest, "feature_change") < 0.003
    assert said(latest) == "lazy so far: the kernel has changed in scale and kept its direction."


def test_the_share_of_a_last_layer_that_grows_turns_the_kernel_and_teaches_it_nothing():
    torch.manual_seed(0)
    latest = train(last_layer_grows(), only_last=True)
    assert number(latest, "distance") > 0.1


def test_features_that_are_learned_are_called_so():
    torch.manual_seed(0)
    latest = train(deep())
    assert number(latest, "feature_change") > 0.05
    assert said(latest).startswith("learning features")


def warm(momentum=0.1):
    return nn.Sequential(features(), nn.BatchNorm1d(48, momentum=momentum), nn.Linear(48, 4))


def test_running_statistics_that_warm_up_give_no_answer():
    torch.manual_seed(0)
    net = warm()
    latest = train(net)
    assert number(latest, "feature_change") > 0.05
    assert not latest["dynamics/ntk/feature_change"].resolved
    assert said(latest).startswith("cannot tell: batch norm's running statistics had not warmed up")


def test_the_advice_on_running_statistics_gives_an_answer():
    torch.manual_seed(0)
    latest = train(warm(), schedule=at([100, 200, 300]))
    assert latest["dynamics/ntk/feature_change"].resolved
    assert not said(latest).startswith(("cannot tell", "learning features"))


def test_a_larger_probe_and_other_modes_read_it_on_the_first_examples():
    torch.manual_seed(0)
    net = deep()
    x = torch.randn(40, 12)
    readings = {}
    for probe, options in ((x[:32], {}), (x, {}), (x[:32], {"outputs": "full"})):
        torch.manual_seed(1)
        net = deep()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        observables = [NeuralTangentKernel(schedule=5, **options)]
        with Monitor(net, optimizer, observables, probe=probe, on_error="raise") as monitor:
            for _ in range(6):
                with monitor.micro_batch(x):
                    net(x).square().mean().backward()
                monitor.before_step()
                optimizer.step()
                optimizer.zero_grad()
        readings[len(probe), str(options)] = number(monitor.latest, "feature_change")
    first, *others = readings.values()
    assert first > 1e-6
    assert others == pytest.approx([first, first], rel=1e-3)


def test_rescaled_layers_are_reached_exactly():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 2, bias=False)), None
    net, x = net.double().eval(), torch.randn(9, 5, dtype=torch.float64)
    parts = torch.stack([*layer_ntks(net, x).values()])
    with torch.no_grad():
        net[2].weight.mul_(6.0)
    now = torch.stack([*layer_ntks(net, x).values()]).sum(0)
    assert kernel_distance(now, parts.sum(0)) > 0.005
    assert kernel_distance(now, rescaled_parts(now, parts)) < 1e-24


def test_a_kernel_that_is_not_finite_has_no_nearest_sum():
    parts = torch.full((2, 3, 3), math.nan)
    assert rescaled_parts(torch.eye(3), parts).isnan().all()
