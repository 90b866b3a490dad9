"""The cosine of two steps' gradients: planted ones, a slow twin, every resumption, and the step before."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradiometer import MemoryRecorder, Monitor, Window
from gradiometer.errors import MeasurementWarning
from gradiometer.observables import GradientCosine


class Planted(nn.Module):
    """The gradient of a batch is its mean row."""

    def __init__(self, size=3):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight


def run(gradients, observable, *, on_error="raise", state=None, first=0, skip=()):
    model, memory = Planted(gradients.shape[1]), MemoryRecorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, [observable], recorders=[memory], on_error=on_error) as monitor:
        if state is not None:
            monitor.load_state_dict(state)
        for i, gradient in enumerate(gradients[first:], first):
            with monitor.micro_batch(gradient[None]):
                model(gradient[None]).sum().backward()
            monitor.before_step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            if i not in skip:
                optimizer.step()
            optimizer.zero_grad()
    return memory, monitor


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64)


def by_hand(gradients, steps):
    pairs = [(gradients[t], gradients[t - 1]) for t in steps]
    dot = sum(a @ b for a, b in pairs)
    norms = [sum(v @ v for v in vectors) for vectors in zip(*pairs, strict=True)]
    return float(dot / (norms[0] * norms[1]).sqrt())


def test_planted_gradients_at_every_step():
    gradients = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 2, 0], [0, -3, 0]], dtype=torch.float64)
    memory, _ = run(gradients, GradientCosine(schedule=1, estimator=Window(1)))
    series = dict(memory.series("dynamics/gradient_cosine/cosine"))
    assert list(series) == [1, 2, 3]  # there is no step before the first, and that is no failure
    assert list(series.values()) == pytest.approx([1 / math.sqrt(2), 1 / math.sqrt(2), -1.0], abs=1e-12)


def test_sampled_steps_are_compared_with_the_step_before_and_not_with_the_sample_before():
    gradients = draws(13)
    observable = GradientCosine(schedule=6, sampling=3)
    memory, monitor = run(gradients, observable)
    drawn = [step for step in range(1, 13) if observable.samples(step)]
    assert [(step - 1) // 3 for step in drawn] == [0, 1, 2, 3]
    assert memory.series("dynamics/gradient_cosine/cosine")[-1] == (
        12,
        pytest.approx(by_hand(gradients, drawn), abs=1e-12),
    )
    kept = monitor._measurement.memories["previous_gradient"]
    assert kept["step"] == drawn[-1] < 12  # nothing was copied at steps that are neither drawn nor before one
    assert monitor._measurement.memories["gradient"] == {}


@pytest.mark.slow
def test_independent_noise_around_a_gradient_reads_its_share_of_signal():
    gradients = 0.2 * draws(4000, seed=1) + torch.tensor([0.3, 0.0, 0.0], dtype=torch.float64)
    memory, _ = run(gradients, GradientCosine(schedule=1000, sampling=1, estimator=Window(4000)))
    (*_, (_, reading)) = [(s, r) for s, rs in memory.records for r in rs if r.key.endswith("/cosine")]
    share = 0.09 / (0.09 + 3 * 0.04)
    assert abs(reading.value - share) < 4 * reading.stderr if math.isfinite(reading.stderr) else 0.05
    assert abs(reading.value - share) < 0.05


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_run_remembers_the_gradient_before(stop):
    gradients = draws(12)
    observable = GradientCosine(schedule=2, sampling=1)
    whole, _ = run(gradients, observable)
    _, monitor = run(gradients[:stop], observable)
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    again, _ = run(gradients, observable, state=state, first=stop)
    expected = [pair for pair in whole.series("dynamics/gradient_cosine/cosine") if pair[0] >= stop]
    assert again.series("dynamics/gradient_cosine/cosine") == expected


def test_a_step_that_was_skipped_is_not_the_step_before():
    gradients = draws(5)
    memory, _ = run(gradients, GradientCosine(schedule=1, estimator=Window(1)), skip=[2])
    made = gradients[[0, 1, 3, 4]]
    expected = [by_hand(made, [t]) for t in (1, 2, 3)]
    found = [value for _, value in memory.series("dynamics/gradient_cosine/cosine")]
    assert found == pytest.approx(expected, abs=1e-12)


def test_without_before_step_it_says_what_to_call():
    model = Planted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, [GradientCosine(schedule=1)])
    with pytest.warns(MeasurementWarning, match=r"monitor\.before_step\(\) was not called"):
        for gradient in draws(2):
            with monitor.micro_batch(gradient[None]):
                model(gradient[None]).sum().backward()
            optimizer.step()


def test_sections_and_a_parameter_without_gradient():
    torch.manual_seed(0)
    model, memory = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), MemoryRecorder()
    idle = nn.Parameter(torch.zeros(2))
    groups = [{"params": [*model[0].parameters(), idle]}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    grads = []
    with Monitor(model, optimizer, [GradientCosine(schedule=1)], recorders=[memory]) as monitor:
        for _ in range(2):
            x = torch.randn(5, 3)
            with monitor.micro_batch(x):
                F.mse_loss(model(x), torch.zeros(5, 2)).backward()
            grads.append([p.grad.flatten().clone() for p in model.parameters()])
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    latest = memory.latest()
    for name, part in (("", slice(0, 4)), ("/0", slice(0, 2)), ("/1", slice(2, 4))):
        a, b = (torch.cat(step[part]).double() for step in grads)
        expected = float(a @ b / (a.norm() * b.norm()))
        assert latest[f"dynamics/gradient_cosine/cosine{name}"].value == pytest.approx(expected, rel=1e-5)
