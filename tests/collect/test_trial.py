"""A network that leaves a trace which cannot be put back is not run in passes of our own."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gradiometer import MemoryRecorder, Monitor
from gradiometer.collect.trial import trace_of_a_pass


class Net(nn.Module):
    """Two layers, and one thing that a forward pass does beside."""

    def __init__(self, kind, norm=nn.Identity):
        super().__init__()
        self.kind, self.count = kind, itertools.count()
        self.first, self.norm, self.last = nn.Linear(6, 8), norm(8), nn.Linear(8, 3)

    def forward(self, x):
        weight = self.last.weight
        if self.kind == "counts its calls":
            x = x * (1 + 0.1 * (next(self.count) % 3))
        elif self.kind == "scales a weight":
            weight.data.mul_(0.99)
        elif self.kind == "scales it in training only" and self.training:
            with torch.no_grad():
                weight.mul_(0.99)
        elif self.kind == "puts another in its place":
            weight.data = nn.functional.normalize(weight.data, dim=0) * 0.9
            self.first.weight.data = self.first.weight.data * 0.99
        elif self.kind == "clamps a weight":
            weight.data.clamp_(-0.1, 0.1)
        return self.last(nn.functional.dropout(torch.tanh(self.norm(self.first(x))), 0.2, self.training))


def train(kind, norm, *, monitored):
    """Weights after eight steps, the finite keys, and what was said."""
    torch.manual_seed(0)
    net, memory = Net(kind, norm), MemoryRecorder()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = Monitor(net, optimizer, recorders=[memory]) if monitored else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            x, y = torch.randn(16, 6), torch.randint(3, (16,))
            if monitor:
                monitor.begin_micro_batch(x, y)
            nn.functional.cross_entropy(net(x), y).backward()
            if monitor:
                monitor.end_micro_batch()
                monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        if monitor:
            monitor.close()
    finite = {key.split("/")[1] for key, r in memory.latest().items() if np.isfinite(r.value).all()}
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    return weights, finite, [str(w.message) for w in caught]


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
@pytest.mark.parametrize(
    "kind", ["scales a weight", "scales it in training only", "puts another in its place"]
)
def test_a_forward_that_writes_to_weights(kind, norm):
    plain, _, _ = train(kind, norm, monitored=False)
    weights, finite, said = train(kind, norm, monitored=True)
    assert torch.equal(weights, plain)
    assert "fdr" in finite
    assert not finite & {"ntk", "jacobian"}
    named = "'first.weight'" if "place" in kind else "'last.weight'"
    refused = [text for text in said if f"its forward pass writes to the weight {named}" in text]
    assert len(refused) == len({text.split()[0] for text in refused}) >= 2
    assert all("change weights after the step" in text for text in refused)


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
@pytest.mark.parametrize("kind", ["nothing", "clamps a weight"])
def test_what_is_the_same_the_second_time_is_measured(kind, norm):
    plain, _, _ = train(kind, norm, monitored=False)
    weights, finite, said = train(kind, norm, monitored=True)
    assert torch.equal(weights, plain)
    assert {"ntk", "jacobian", "noise", "fdr"} <= finite
    assert said == []


def test_a_count_that_cannot_be_put_back_is_advanced_by_the_trial_alone():
    net = Net("counts its calls")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Monitor(net, optimizer) as monitor, pytest.warns(match="it gives another output when it is called"):
        for _ in range(6):
            x, y = torch.randn(16, 6), torch.randint(3, (16,))
            with monitor.micro_batch(x, y):
                nn.functional.cross_entropy(net(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        assert next(net.count) == 6 + 2  # two calls in evaluation mode differ already
        assert "cannot be run in passes of our own" in monitor.table()


def test_weights_and_outputs_that_are_not_finite_or_not_real():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight[0, 0] = math.nan
    assert trace_of_a_pass(net, lambda: [net(torch.ones(3, 2))]) == ""
    wave = nn.Linear(2, 2, dtype=torch.complex64)
    x = torch.ones(3, 2, dtype=torch.complex64)
    assert trace_of_a_pass(wave, lambda: [wave(x)]) == ""
    turns = itertools.cycle([1, 1j])
    assert "another output" in trace_of_a_pass(wave, lambda: [wave(x) * next(turns)])


def test_an_output_of_another_shape_or_of_integers():
    net, sizes, numbers = nn.Linear(2, 2), itertools.cycle([1, 2]), itertools.count()
    assert "another output" in trace_of_a_pass(net, lambda: [net(torch.ones(next(sizes), 2))])
    assert "another output" in trace_of_a_pass(net, lambda: [torch.tensor(next(numbers))])


def test_a_network_that_fails_is_left_to_who_needs_it():
    net = nn.Linear(2, 2)
    assert trace_of_a_pass(net, lambda: [net(torch.ones(3, 5))]) == ""
