"""What single examples do not show is not measured: never 0, and no scale of a minor part."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import GradientNoiseScale, Monitor


class Gate(nn.Module):
    """A layer of one's own, which single examples do not show."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gate.sigmoid()


def read(model, optimizer, steps=6):
    """The last readings of a run of the default noise scale, and what was said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor = Monitor(model, optimizer, [GradientNoiseScale(schedule=1)], on_error="raise")
        for seed in range(steps):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
            with monitor.micro_batch(x):
                model(x).square().mean().backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        monitor.close()
    return {key.removeprefix("dynamics/noise/"): reading for key, reading in monitor.latest.items()}


@pytest.mark.parametrize(
    "layer", [Gate(8), nn.PReLU(8), nn.Bilinear(8, 8, 8)], ids=["own", "prelu", "bilinear"]
)
def test_a_group_that_nothing_covers_is_not_measured(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer, self.last = nn.Linear(6, 8), layer, nn.Linear(8, 600)

        def forward(self, x):
            h = self.first(x)
            return self.last(self.layer(h, h) if isinstance(self.layer, nn.Bilinear) else self.layer(h))

    torch.manual_seed(0)
    model = Net()
    rest = [p for name, p in model.named_parameters() if not name.startswith("layer")]
    groups = [{"params": rest}, {"params": layer.parameters(), "weight_decay": 0.0}]
    readings = read(model, torch.optim.AdamW(groups, lr=1e-3))
    for name in ("trace", "grad_sq_norm", "scale"):
        assert name == "scale" or readings[f"{name}/0"].is_finite
        unseen = readings[f"{name}/1"]
        assert math.isnan(unseen.value)
        assert not unseen.resolved
        assert "no parameter of this group is seen" in unseen.note
    assert "not measured" not in readings["scale"].note


class OwnLinear(nn.Module):
    """A linear layer of one's own."""

    def __init__(self, width, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, width) / width)

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize(
    ("model", "share"),
    [
        (nn.Sequential(OwnLinear(6, 30), nn.Linear(30, 1)), 31 / 211),
        (nn.Sequential(OwnLinear(6, 3), nn.Linear(3, 30)), 120 / 138),
    ],
    ids=["most is unseen", "little is unseen"],
)
def test_a_scale_of_a_minor_part_of_the_parameters_is_not_read(model, share):
    readings = read(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    if share < 0.5:
        assert math.isnan(readings["scale"].value)
        assert f"not measured: single parts of the batch show {100 * share:.0f} %" in readings["scale"].note
        assert math.isnan(readings["critical_batch_fraction"].value)
        assert readings["trace"].is_finite  # of what is seen, as its note says
    else:
        assert "not measured" not in readings["scale"].note
        assert f"over {100 * share:.0f} % of parameters" in readings["scale"].note
