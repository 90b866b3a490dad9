import dataclasses
import re
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    Mean,
    MemoryRecorder,
    Monitor,
    Observable,
    Quantity,
)
from gradiometer.errors import InputError
from gradiometer.observables.schedules import Draws, as_schedule, at, every, log_spaced


def due(schedule, end):
    return [step for step in range(end) if schedule(step)]


def test_every():
    assert due(every(4), 13) == [0, 4, 8, 12]
    assert due(every(1), 3) == [0, 1, 2]


def test_log_spaced_begins_at_zero_and_has_three_steps_in_a_decade():
    assert due(log_spaced(), 6000) == [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]


def test_log_spaced_stops_after_its_end():
    assert due(log_spaced(until=20), 1000) == [0, 1, 2, 5, 10, 20]


def test_at():
    assert due(at([3, 0, 7]), 20) == [0, 3, 7]


def test_schedules_combine():
    assert due(every(6) | at([1]) | log_spaced(until=2), 13) == [0, 1, 2, 6, 12]


def test_schedules_are_frozen_and_compare_by_value():
    assert every(5) == every(5) != every(6)
    assert every(5) | at([1]) == every(5) | at([1])
    with pytest.raises(AttributeError):
        every(5).steps = 6


def test_a_number_is_a_cadence():
    assert as_schedule(50) == every(50)
    schedule = log_spaced()
    assert as_schedule(schedule) is schedule


@pytest.mark.parametrize("steps", [0, -3, 2.5, "10"])
def test_a_cadence_must_be_positive(steps):
    message = "a cadence must be a whole number of steps, at least 1, got " + re.escape(repr(steps))
    with pytest.raises(InputError, match=message):
        every(steps)
    if isinstance(steps, int):
        with pytest.raises(InputError, match=message):
            as_schedule(steps)


def test_log_spaced_refuses_an_end_before_the_beginning():
    with pytest.raises(InputError, match=r"until must be a whole number at least 1, got 0"):
        log_spaced(until=0)


@pytest.mark.parametrize("steps", [[], [5, -1]])
def test_at_refuses_an_empty_list_and_negative_steps(steps):
    with pytest.raises(InputError, match="needs at least one step and none below 0"):
        at(steps)


def test_a_schedule_must_be_one():
    with pytest.raises(InputError, match="a schedule must be a Schedule or a number of steps, got 'daily'"):
        as_schedule("daily")


# -- drawn steps -----------------------------------------------------------------------------------


def drawn(draws, periods, stretch=1):
    length = draws.steps * stretch
    steps = [step for step in range(1, periods * length + 1) if draws.part(step, stretch) is not None]
    return np.array(steps), length


@pytest.mark.parametrize("stretch", [1, 4])
@pytest.mark.parametrize(
    ("length", "count"), [(10, 1), (50, 5), (12, 2), (15, 2), (7, 3), (13, 13), (1, 1)], ids=str
)
def test_each_step_of_a_period_is_drawn_as_often_as_the_others(length, count, stretch):
    steps, period = drawn(Draws(length, count), 4000 // stretch, stretch)
    places = np.bincount((steps - 1) % period, minlength=period)
    expected = (4000 // stretch) * count / period
    error = np.sqrt(expected * max(1 - count / period, 1e-9))
    # the step that two parts share may be drawn for both, and is then sampled once
    assert (abs(places - expected) < 5 * error + 0.04 * expected).all()
    parts = np.bincount((steps - 1) // period)
    assert parts.min() >= max(count - 1, 1)
    if period % count == 0:
        assert set(parts) == {count}


@pytest.mark.parametrize("epoch", [2, 5, 10, 20, 25, 30, 100])
@pytest.mark.parametrize(("length", "count"), [(10, 1), (50, 5), (100, 1), (20, 1)], ids=str)
def test_drawn_steps_do_not_keep_to_a_place_in_the_epoch(length, count, epoch):
    steps, _ = drawn(Draws(length, count), 3000)
    phases = np.bincount(steps % epoch, minlength=epoch)
    expected = len(steps) / epoch
    assert ((phases - expected) ** 2 / expected).sum() < epoch + 5 * np.sqrt(2 * epoch)


def test_the_chosen_step_is_one_of_those_drawn_and_any_of_them():
    draws, chosen = Draws(50, 5), []
    for period in range(2000):
        steps = range(period * 50 + 1, period * 50 + 51)
        (step,) = (step for step in steps if draws.chosen(step))
        chosen.append(draws.part(step))
    assert np.bincount(chosen) == pytest.approx([400] * 5, abs=90)


def test_draws_depend_on_the_step_alone_and_begin_with_step_0():
    draws = Draws(10)
    forward = [draws.part(step) for step in range(500)]
    assert [draws.part(step) for step in reversed(range(500))] == forward[::-1]
    assert draws.part(0) == 0
    assert draws.chosen(0)
    steps = [step for step in range(1, 51) if draws.part(step) is not None]
    assert steps == [7, 15, 30, 35, 47]  # on every machine, with every release


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Draws(50, 5)),
        ({"schedule": 20, "sampling": 50}, Draws(20, 1)),
        ({"schedule": 12, "sampling": every(10)}, Draws(12, 2)),
        ({"schedule": 30, "sampling": None}, Draws(30, 1)),
        ({"schedule": 7, "sampling": 1}, Draws(7, 7)),
        ({"schedule": 7, "verify": True}, Draws(7, 7)),
        ({"schedule": log_spaced(), "sampling": 10}, Draws(10, 1)),
        ({"schedule": log_spaced(), "sampling": None}, None),
        ({"schedule": 10, "sampling": at([3])}, None),
    ],
    ids=str,
)
def test_what_draws_the_samples_of_an_observable_of_the_batch(settings, expected):
    observable = FluctuationDissipation(**settings)
    assert observable.draws == expected
    assert dataclasses.replace(observable, tolerance=0.1).draws == expected
    assert [step for step in range(1000) if observable.due(step)] == [
        step for step in range(1000) if as_schedule(settings.get("schedule", 50))(step)
    ]


def test_an_observable_of_the_weights_is_sampled_at_its_records_unless_told():
    assert JacobianNorm(schedule=10).draws is None
    assert [step for step in range(31) if JacobianNorm(schedule=10).samples(step)] == [0, 10, 20, 30]
    assert JacobianNorm(schedule=10, sampling=5).draws == Draws(10, 2)


# -- drawn steps in a run --------------------------------------------------------------------------


class Phased(nn.Module):
    """Gradients of a known norm; the update of step t is that of its place in the epoch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def phased_run(observables, steps, epoch, *, begin=0, earlier=None, stretch=1):
    """A loop whose squared update is 1 + 10 (t mod epoch) at step t; rate 2, so that it is the right side."""
    model = Phased() if earlier is None else earlier.model
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    memory = MemoryRecorder()
    monitor = Monitor(model, optimizer, observables, recorders=[memory])
    monitor.step = begin
    if earlier is not None:
        monitor.load_state_dict(earlier.state_dict())
    for observable in observables:
        monitor._measurement.instruments[observable.group].stretch *= stretch
    for step in range(monitor.step, monitor.step + steps):
        sign = -1.0 if step % 2 else 1.0
        model.weight.grad = torch.full_like(model.weight, sign * (1.0 + 10 * (step % epoch)) ** 0.5 / 2)
        monitor.before_step()
        optimizer.step()
    monitor.close()
    return memory, monitor


def right(memory, observable):
    key = f"dynamics/{observable.group}/right"
    return memory.latest()[key]


@pytest.mark.parametrize(
    ("schedule", "sampling", "epoch", "stretch"),
    [(50, 10, 10, 1), (20, 4, 8, 1), (12, None, 12, 1), (12, 10, 6, 1), (10, 5, 20, 4), (6, None, 24, 4)],
    ids=str,
)
def test_samples_see_every_place_of_the_epoch(schedule, sampling, epoch, stretch):
    observable = FluctuationDissipation(schedule=schedule, sampling=sampling, estimator=Mean())
    length = schedule * stretch
    memory, _ = phased_run([observable], 150 * length + 1, epoch, stretch=stretch)
    values = 1 + 10 * np.arange(epoch)
    samples = 150 * (observable.draws.count if sampling else 1)
    away = abs(right(memory, observable).value - values.mean() / 4)
    assert away < 4 * values.std() / 4 / np.sqrt(samples)
    assert [step for step, _ in memory.records] == list(range(0, 150 * length + 1, length))


def test_every_record_has_a_sample_also_in_a_run_that_is_joined_half_way():
    taken = []

    class Kept(FluctuationDissipation):
        def statistics(self, snapshot):
            taken.append(snapshot.step)
            return super().statistics(snapshot)

    observable = Kept(schedule=10, estimator=Mean(), sampling=None)
    begin = 1 + next(step for step in range(21, 100) if observable.samples(step) and step % 10)
    memory, _ = phased_run([observable], 40, 7, begin=begin)
    records = [step for step, _ in memory.records]
    assert records == [step for step in range(begin, begin + 40) if step % 10 == 0]
    assert taken[0] == records[0]  # what was drawn for this record has gone by
    for a, b in pairwise(records):
        assert sum(a < step <= b for step in taken) == 1


def test_a_resumed_run_draws_the_same_steps():
    observables = [FluctuationDissipation(schedule=20, estimator=Mean()), Noted(schedule=15)]
    straight, _ = phased_run(observables, 200, 7)
    for stop in (33, 40, 41, 55):
        first, monitor = phased_run(observables, stop, 7)
        second, _ = phased_run(observables, 200 - stop, 7, earlier=monitor)
        joined = first.records + second.records
        assert [step for step, _ in joined] == [step for step, _ in straight.records]
        for (_, left), (_, other) in zip(joined, straight.records, strict=True):
            assert facts(left) == facts(other)


def facts(readings):
    return [(r.key, float(r.value).hex(), r.note) for r in readings if "/cost/" not in r.key]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noted(Observable):
    """Says in its note at which step the sample was taken."""

    group = "noted"
    of_batch = True
    quantities: ClassVar = {"step": Quantity("1", "Step of the sample.")}

    def statistics(self, snapshot):
        return {"step": torch.tensor(float(snapshot.step))}

    def note(self, snapshot):
        return f"sampled at {snapshot.step}"

    def readings(self, now, reference):
        return {"step": now["step"]}


def test_a_reading_and_its_note_are_of_the_sample_and_not_of_the_step_of_the_record():
    observable = Noted(schedule=15)
    memory, _ = phased_run([observable], 100, 7)
    for step, value in memory.series("dynamics/noted/step"):
        assert observable.samples(int(value))
        assert step - 15 < value <= step
    reading = memory.latest()["dynamics/noted/step"]
    assert reading.note == f"sampled at {int(reading.value)}"


def test_the_noise_of_a_batch_is_sampled_at_every_place_of_the_epoch():
    """Examples whose gradients scatter by the place in the epoch: 4 of them at +-(1 + place)."""
    epoch, observable = 10, GradientNoiseScale(schedule=10, estimator=Mean())
    net = nn.Linear(1, 1, bias=False).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    monitor = Monitor(net, optimizer, [observable])
    signs = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    for step in range(1501):
        with monitor.micro_batch(signs):
            net(signs * (1 + step % epoch)).mean().backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
    traces = 4 / 3 * (1 + np.arange(epoch)) ** 2
    found = monitor.latest["dynamics/noise/trace"]
    assert abs(found.value - traces.mean()) < 4 * traces.std() / np.sqrt(150)
