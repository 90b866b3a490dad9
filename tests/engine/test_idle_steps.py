"""Steps on which nothing is due are looked for ahead, and no step on which something is due is missed."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    at,
    every,
    log_spaced,
)
from gradiometer.errors import MeasurementWarning
from gradiometer.observables import Schedule

KINDS = (NeuralTangentKernel, JacobianNorm, GradientNoiseScale, FluctuationDissipation)
schedules = st.one_of(
    st.integers(1, 60).map(every),
    st.lists(st.integers(0, 200), min_size=1, max_size=5).map(at),
    st.just(log_spaced()),
)


def instruments(observables, stretch):
    net = nn.Linear(2, 1)
    monitor = Monitor(net, torch.optim.SGD(net.parameters(), lr=0.1), observables)
    monitor.close()
    made = monitor._measurement.instruments
    for observable in observables:
        made[observable.group].stretch = stretch
    return made


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(KINDS), unique=True, min_size=1),
    schedules,
    st.integers(1, 3),
    st.lists(st.integers(1, 3) | st.integers(1, 40), min_size=60, max_size=60),
)
def test_the_same_is_due_with_and_without_a_look_ahead(kinds, schedule, stretch, strides):
    observables = [kind(schedule=schedule) for kind in kinds]
    ahead, plain = instruments(observables, stretch), instruments(observables, stretch)
    step = 0
    for stride in strides:
        plain._idle = range(0)
        due, expected = (
            [(t.name, t.recording, t.sampling, t.thorough, t.ahead) for t in each.begin(step)]
            for each in (ahead, plain)
        )
        assert due == expected
        for group in (observable.group for observable in observables):
            assert ahead[group].seen == plain[group].seen
        step += stride


def test_a_record_that_is_owed_is_due_at_once():
    made = instruments([JacobianNorm(schedule=100)], 1)
    takings = made.begin(0)
    assert [taking.recording for taking in takings] == [True]
    made.owe(takings)
    assert [taking.recording for taking in made.begin(1)] == [True]


@dataclass(frozen=True)
class Breaks(Schedule):
    """Raises at one step."""

    step: int
    asked: ClassVar[list] = []

    def __call__(self, step):
        self.asked.append(step)
        if step == self.step:
            raise ZeroDivisionError("no such step")
        return step == 0


@pytest.mark.parametrize("broken", [1, 5, 17, 40])
def test_a_schedule_that_raises_is_said_at_its_own_step(broken):
    net, memory = nn.Linear(2, 1), MemoryRecorder()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Monitor(net, optimizer, [JacobianNorm(schedule=Breaks(broken))], recorders=[memory]) as monitor:
        for step in range(45):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with monitor.micro_batch(torch.ones(4, 2)):
                    net(torch.ones(4, 2)).mean().backward()
                monitor.before_step()
                optimizer.step()
                optimizer.zero_grad()
            said = [str(w.message) for w in caught if w.category is MeasurementWarning]
            assert len(said) == (step == broken)
