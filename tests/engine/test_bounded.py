"""Twenty thousand steps: neither the checkpoint nor the number of objects grows."""

import gc
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from gradiometer import (
    Ema,
    FluctuationDissipation,
    GradientNoiseScale,
    HalfRun,
    JacobianNorm,
    Mean,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    Observable,
    Quantity,
    Window,
)

STEPS, WARM = 20_000, 5_000
SPACING = 50


def cheap(name, kind, at):
    """An observable with a statistic and a level, recorded every ``at`` steps."""

    @dataclass(frozen=True, kw_only=True)
    class Cheap(Observable):
        group = name
        quantities = {"value": Quantity("1", "A number.")}

        def statistics(self, snapshot):
            return {"x": torch.ones(3)}

        def levels(self, snapshot):
            return {"y": torch.ones(2)}

        def readings(self, now, reference):
            return {"value": now["y"][0]}

    return Cheap(schedule=at, estimator=kind)


class Narrow(HalfRun):
    """Full well before the first look."""

    max_blocks = 32


@pytest.fixture(scope="module")
def looks():
    """Size of each observable's pickled state, and number of tracked objects."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    observables = [
        NeuralTangentKernel(schedule=1000),
        JacobianNorm(schedule=1000),
        GradientNoiseScale(schedule=50, estimator=Window(1000)),
        FluctuationDissipation(schedule=50, sampling=10, estimator=Narrow()),
        cheap("mean", Mean(), 40),
        cheap("ema", Ema(0.9), 40),
        cheap("window", Window(500), 25),
    ]
    recorders = [MemoryRecorder(max_records=50)]
    found = []
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    with Monitor(
        model, optimizer, observables, recorders=recorders, probe_size=2, on_error="raise"
    ) as monitor:
        for step in range(STEPS):
            with monitor.micro_batch(x, y):
                loss = (model(x) - y + 0.1 * torch.randn(4, 2)).square().mean()
                loss.backward()
            del loss
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % SPACING == 0:
                state = monitor.state_dict()
                for name, own in state.pop("observables").items():
                    found.append((step + 1, name, len(pickle.dumps(own))))
                found.append((step + 1, "the rest", len(pickle.dumps(state))))
                del state, own
                if (step + 1) % 1000 == 0:
                    gc.collect()
                    found.append((step + 1, "objects", len(gc.get_objects())))
    return found


def largest(looks, name):
    """Between steps 2,500 and 5,000, and from then on."""
    sizes = [(step, size) for step, each, size in looks if each == name]
    early = max(size for step, size in sizes if WARM // 2 <= step <= WARM)
    return early, max(size for step, size in sizes if step > WARM)


@pytest.mark.slow
def test_the_checkpoint_does_not_grow(looks):
    names = {name for _, name, _ in looks} - {"objects"}
    assert len(names) == 8
    for name in sorted(names):
        early, late = largest(looks, name)
        print(f"{name}: at most {early} bytes until step {WARM}, {late} after")
        assert late <= 1.03 * early, name  # merging makes a saw-tooth; without it, twice as much and more


def test_the_number_of_objects_does_not_grow(looks):
    early, late = largest(looks, "objects")
    print(f"tracked objects: at most {early} until step {WARM}, {late} after")
    assert late <= early + 50
