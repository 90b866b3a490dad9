import re

import pytest

from gradiometer.errors import InputError
from gradiometer.observables.schedules import as_schedule, at, every, log_spaced


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
