"""An interrupt at any line of a monitored step: nothing of ours is left behind, and training can go on."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradiometer
from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    Monitor,
    NeuralTangentKernel,
)

from ..hooks import standing

SOURCES = str(Path(gradiometer.__file__).parent)


def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    observables = [
        NeuralTangentKernel(schedule=1),
        JacobianNorm(schedule=1),
        GradientNoiseScale(schedule=1),
        FluctuationDissipation(schedule=1),
    ]
    return net, optimizer, Monitor(net, optimizer, observables)


def step(net, optimizer, monitor=None):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)
    if monitor:
        monitor.begin_micro_batch(x, y)
    F.cross_entropy(net(x), y).backward()
    if monitor:
        monitor.end_micro_batch()
        monitor.before_step()
    optimizer.step()
    optimizer.zero_grad()


class Interrupt:
    """Counts our own lines, each the first time it is reached, and interrupts at one of them."""

    def __init__(self, at=None):
        self.at, self.lines = at, {}

    def __call__(self, frame, event, argument):
        del argument
        if (
            not frame.f_code.co_filename.startswith(SOURCES)
            and "__editable__" not in frame.f_code.co_filename
        ):
            return None
        line = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and line not in self.lines:
            self.lines[line] = len(self.lines)
            if self.lines[line] == self.at:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def lines_of_a_step():
    net, optimizer, monitor = build()
    step(net, optimizer, monitor)
    with Interrupt() as all_lines:
        step(net, optimizer, monitor)
    monitor.close()
    return len(all_lines.lines)


def numbers(net):
    return [t.detach().clone() for t in (*net.parameters(), *net.buffers())]


def references():
    """Weights and buffers before and after the second step."""
    net, optimizer, monitor = build()
    step(net, optimizer, monitor)
    first = numbers(net)
    step(net, optimizer, monitor)
    monitor.close()
    return first, numbers(net)


def interrupted_at(number, expected, *, closes):
    """What is not as it should be after an interrupt at this line, in words."""
    net, optimizer, monitor = build()
    step(net, optimizer, monitor)
    try:
        with Interrupt(number):
            step(net, optimizer, monitor)
        return ["the interrupt did not come through"]
    except KeyboardInterrupt:
        pass
    wrong = []
    if not all(module.training for module in net.modules()):
        wrong.append("a mode")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
        wrong.append("a mode of torch")
    for now, *choices in zip(numbers(net), *expected, strict=True):
        if not any(torch.equal(now, choice) for choice in choices):
            wrong.append("weights or buffers")
    if closes:
        monitor.close()
        if standing(net):
            wrong.append("hooks")
    optimizer.zero_grad()
    state, twin = torch.get_rng_state(), copy.deepcopy(net)
    for _ in range(2):
        step(net, optimizer, monitor)
    monitor.close()
    torch.set_rng_state(state)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        step(twin, plain)
    if not all(map(torch.equal, numbers(net), numbers(twin))):
        wrong.append("training goes on otherwise")
    if standing(net) or standing(twin):
        wrong.append("hooks at the end")
    return wrong


def spread(count, below):
    return sorted({round(k * (below - 1) / (count - 1)) for k in range(count)})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gradiometer.errors.MeasurementWarning")
@pytest.mark.parametrize("closes", [True, False])
def test_an_interrupt_at_any_line_leaves_nothing_behind(closes):
    count, expected = lines_of_a_step(), references()
    assert count > 1000
    wrong = {}
    for number in spread(60, count - 20):  # the last lines differ a little from run to run
        found = interrupted_at(number, expected, closes=closes)
        if found:
            wrong[number] = found
    assert wrong == {}
