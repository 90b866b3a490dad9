"""A learning rate that is suggested trains; where the limit at initialisation is no guide, none is."""

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from gradiometer import suggest_learning_rate
from gradiometer.errors import MeasurementWarning


def digits():
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:256, None] / 16, torch.tensor(data.target)[:256]


def convolutions(channels=16, norm=False):
    layers = []
    for before in (1, channels, channels):
        layers += [nn.Conv2d(before, channels, 3, padding=1), *([nn.BatchNorm2d(channels)] * norm), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))


def layers(depth, width, activation=nn.ReLU, scale=1.0):
    widths = [64] + [width] * depth
    hidden = [m for pair in pairwise(widths) for m in (nn.Linear(*pair), activation())]
    net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    return net


def kaiming(net):
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def dead():
    net = layers(2, 32)
    nn.init.constant_(net[1].bias, -50.0)
    return net


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "batch norm": lambda: convolutions(norm=True),
    "kaiming": lambda: kaiming(layers(5, 48)),
    "large": lambda: layers(3, 48, scale=3.0),
    "two layers": lambda: layers(2, 64),
    "tanh": lambda: layers(3, 64, nn.Tanh),
    "convolutions": convolutions,
    "deep": lambda: layers(8, 48),
    "deep tanh": lambda: layers(8, 48, nn.Tanh),
    "narrow": lambda: layers(3, 6),
    "small": lambda: layers(3, 48, scale=0.3),
    "dead": dead,
}
SUGGESTED = {"linear", "batch norm", "kaiming", "large"}
REFUSED = {"convolutions", "deep", "deep tanh", "narrow", "small", "dead"}


def suggested(net, x, y, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = suggest_learning_rate(net, x, y, loss_fn=F.cross_entropy, **options)
    assert math.isnan(found.suggestion) == bool(said)
    return found.suggestion


def loss_after(net, x, y, rate, momentum, steps=300):
    trained, generator = copy.deepcopy(net), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(trained.parameters(), lr=rate, momentum=momentum)
    for _ in range(steps):
        index = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(trained(x[index]), y[index]).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(trained(x), y).item()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_at_the_suggestion_lowers_the_loss_by_half(name, momentum):
    x, y = digits()
    torch.manual_seed(0)
    net = NETWORKS[name]()
    rate = suggested(net, x, y, momentum=momentum)
    if name in SUGGESTED:
        assert math.isfinite(rate)
    if name in REFUSED:
        assert math.isnan(rate)
    if math.isfinite(rate):
        assert loss_after(net, x, y, rate, momentum) < math.log(10) / 2


def test_the_warning_says_what_was_tried():
    x, y = digits()
    torch.manual_seed(0)
    with pytest.warns(MeasurementWarning, match="no learning rate is suggested: at rates from"):
        found = suggest_learning_rate(convolutions(), x, y, loss_fn=F.cross_entropy, momentum=0.9)
    assert found.limit > 5


@pytest.mark.parametrize("fraction", [0.02, 0.5, 1.0])
def test_a_fraction_does_not_make_a_rate_train(fraction):
    x, y = digits()
    torch.manual_seed(0)
    net = NETWORKS["linear"]()
    found = suggest_learning_rate(net, x, y, loss_fn=F.cross_entropy, fraction=fraction)
    assert 0 < found.suggestion <= fraction * found.limit
    assert math.isnan(suggested(layers(8, 48), x, y, fraction=fraction))


def test_targets_of_another_form_take_the_whole_batch():
    x, y = digits()
    torch.manual_seed(0)
    net = NETWORKS["linear"]()
    found = suggest_learning_rate(
        net, x, {"targets": [y]}, loss_fn=lambda out, y: F.cross_entropy(out, y["targets"][0])
    )
    scalar = suggest_learning_rate(
        net, x, torch.tensor(0.1), loss_fn=lambda out, e: F.cross_entropy(out, y, label_smoothing=float(e))
    )
    assert found.suggestion > 0
    assert scalar.suggestion > 0
