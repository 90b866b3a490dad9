"""Every reading without an answer gives the reason that holds."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import (
    Ema,
    FluctuationDissipation,
    GradientNoiseScale,
    LearningRateLimit,
    Monitor,
    NoiseCurvature,
    Reading,
    SecondFluctuationDissipation,
)
from gradiometer.observables.noise_resolution import resolved_scale
from gradiometer.record.table import sentence


def run(steps, *, lr=1e-4, shift=5.0, observables=None, net=None, batch=64, noise=0.1):
    """A regression on a plane and a constant: its gradient is large until the constant is learned."""
    torch.manual_seed(0)
    net = net or nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    observables = observables or [GradientNoiseScale(schedule=10)]
    monitor = Monitor(net, optimizer, observables, loss_fn=F.mse_loss)
    for _ in range(steps):
        x = torch.randn(batch, 8)
        y = x.sum(1, keepdim=True) * (shift != 0) + noise * torch.randn(batch, 1) + shift
        with monitor.micro_batch(x, y):
            F.mse_loss(net(x), y).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
    return monitor


def scale_of(monitor, name="scale"):
    reading = monitor.latest[f"dynamics/noise/{name}"]
    return reading, sentence(reading, monitor.latest)


def test_few_records_are_called_few_records():
    reading, words = scale_of(run(21))
    assert words == "not resolved: too few records yet, an error needs 4."
    assert not reading.resolved


def test_a_gradient_that_falls_is_not_called_noise():
    monitor = run(121, lr=0.02)
    reading, words = scale_of(monitor)
    assert not reading.resolved
    assert "changes" in words
    assert "below its own noise" not in words


def test_an_average_over_the_last_records_says_so():
    monitor = run(401, observables=[GradientNoiseScale(schedule=10, estimator=Ema(0.3))])
    assert "the average rests on its last few records" in scale_of(monitor)[1]


def test_noise_alone_is_called_noise():
    still = nn.Linear(8, 1)
    torch.nn.utils.vector_to_parameters(torch.zeros(9), still.parameters())
    monitor = run(401, lr=1e-9, shift=0.0, noise=1.0, net=still)
    reading, words = scale_of(monitor)
    assert not reading.resolved
    assert "the gradient is below its own noise, average longer" in words
    squared, trace = (monitor.latest[f"dynamics/noise/{name}"].value for name in ("grad_sq_norm", "trace"))
    assert squared < trace / 64


def test_what_is_out_of_reach_is_called_so():
    class Scaled(nn.Module):
        """Most parameters are used by a function of their own."""

        def __init__(self):
            super().__init__()
            self.head, self.table = nn.Linear(8, 1), nn.Parameter(torch.zeros(500, 8))

        def forward(self, x):
            return self.head(x) + (x @ self.table.T).mean(1, keepdim=True)

    seen = [GradientNoiseScale(schedule=10, source="per example")]
    reading, words = scale_of(run(101, net=Scaled(), observables=seen))
    assert not reading.resolved
    assert words.startswith("not measured: single parts of the batch show")


def test_the_share_of_the_batch_gives_the_reason_of_its_scale():
    reading, words = scale_of(run(21), "critical_batch_fraction")
    assert not reading.resolved
    assert words.startswith("not resolved: too few records yet")


@pytest.mark.parametrize(
    ("trace", "signal", "reason"),
    [
        ([1.0, 1.1, 0.9, 1.0, 1.1], [0.0] * 5, "the gradient is zero"),
        ([0.0] * 5, [1.0, 1.1, 0.9, 1.0, 1.1], "no noise is seen in the gradient"),
        ([math.inf, 1.0, 1.0, 1.0, 1.0], [1.0] * 5, "the gradient is not finite"),
        ([1.0] * 3, [1.0, 1.1, 0.9], "too few records yet, an error needs 4"),
    ],
)
def test_each_reason(trace, signal, reason):
    def rows(values):
        values = torch.tensor(values, dtype=torch.float64)
        return torch.cat([values.mean()[None], (values.sum() - values) / (len(values) - 1)])

    scale = resolved_scale(rows(trace), rows(signal), torch.ones(len(trace)), 8.0)["scale"]
    assert not scale.resolved
    assert scale.note.endswith(f": {reason}")


def test_no_reading_of_a_short_run_is_without_a_reason():
    """Every unresolved reading of every observable ends its note with one, and says it."""
    observables = [
        GradientNoiseScale(schedule=5),
        FluctuationDissipation(schedule=5, sampling=1),
        SecondFluctuationDissipation(schedule=5),
        NoiseCurvature(schedule=5),
        LearningRateLimit(schedule=5),
    ]
    for lr in (0.0, 1e-3):
        monitor = run(16, lr=lr, observables=observables if lr else observables[:-1])
        unresolved = [reading for reading in monitor.latest.values() if not reading.resolved]
        assert unresolved
        for reading in unresolved:
            assert ": " in reading.why, reading
            words = sentence(reading, monitor.latest)
            assert reading.why.partition(": ")[2] in words


def test_why_is_the_last_part_of_the_note():
    assert Reading("d/g/a", 1.0, note="per example; near").why == ""
    assert Reading("d/g/a", math.nan, note="per example").why == "not measured"
    assert Reading("d/g/a", math.nan, note="per example; not measured: no").why == "not measured: no"
    assert Reading("d/g/a", 2.0, note="a; the rate changes", resolved=False).why == (
        "not resolved: the rate changes"
    )
    assert Reading("d/g/a", math.nan, resolved=False).why == "not resolved"
