"""No controller is silent: it is asked, or refused when the monitor is made, or a warning gives its name."""

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import Controller, GradientNoiseScale, Monitor, at
from gradiometer.control import Effect
from gradiometer.errors import InputError, MeasurementWarning
from gradiometer.observables import Observable
from gradiometer.record.readings import Decision, Quantity


@dataclass(frozen=True, kw_only=True)
class Level(Observable):
    """A number that is there from a step on, or never."""

    group = "level"
    level_needs = frozenset()
    quantities = {"value": Quantity("1", "A level.")}
    known_from: int = 10**9

    def levels(self, snapshot):
        return {"value": torch.tensor(1.0 if snapshot.step >= self.known_from else math.nan)}

    def readings(self, now, reference):
        return {"value": now["value"]}


@dataclass(frozen=True)
class Act(Controller):
    """Lowers the rate, or ends the run, at a step of its own or where a reading is there."""

    needs: tuple = ()
    key: str = ""
    first: int = 7
    knob: str = "learning_rate"
    names: tuple = ("",)
    forgets: bool = False
    dry_run: bool = False

    def turns(self):
        return frozenset({self.knob} - {""})

    def observables(self):
        return self.needs

    def start(self):
        return {"next": self.first, "done": False}

    def effect(self, memory):
        done = memory["done"]
        if self.knob == "run":
            return Effect({}, stop=done)
        return Effect(dict.fromkeys(self.names, 0.1) if done else {})

    def decide(self, view, memory):
        later = {**memory, "next": view.step + 1}
        if self.key and math.isnan(view.number(self.key)):
            return [], later, ""
        if memory["done"]:
            return [], later, ""
        decision = Decision(view.step, "Act", self.knob, "-", {}, 1.0, 0.0 if self.knob == "run" else 0.1)
        return [decision], {**later, "done": not self.forgets}, ""


def run(controller, steps=30, observables=(), micro_batch=True):
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    in_force = []
    optimizer.register_step_pre_hook(lambda *_: in_force.append(optimizer.param_groups[0]["lr"]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        monitor = Monitor(net, optimizer, list(observables), controllers=[controller])
        for _ in range(steps):
            x, y = torch.randn(8, 4), torch.randint(2, (8,))
            if micro_batch:
                monitor.begin_micro_batch(x, y)
            F.cross_entropy(net(x), y).backward()
            monitor.end_micro_batch()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return monitor, in_force, [str(w.message) for w in said if issubclass(w.category, MeasurementWarning)]


@pytest.mark.parametrize(
    ("observables", "micro_batch"),
    [([], True), ([], False), ([GradientNoiseScale(schedule=5)], True)],
    ids=["nothing", "no micro-batch", "noise"],
)
def test_one_that_needs_no_reading_is_asked_at_its_own_step(observables, micro_batch):
    monitor, in_force, said = run(Act(), observables=observables, micro_batch=micro_batch)
    assert [decision.step for decision in monitor.decisions] == [7]
    assert in_force == pytest.approx([0.1] * 8 + [0.01] * 22)
    assert not said
    assert monitor.latest["dynamics/control/learning_rate"].value == pytest.approx(0.01)


def test_one_that_needs_no_reading_ends_the_run():
    monitor, _, said = run(Act(knob="run"))
    assert monitor.should_stop
    assert not said


def test_one_whose_readings_never_come_is_refused():
    with pytest.raises(
        InputError, match=r"Act is never asked: .* at step 7, .*\['level'\] is recorded.*Write"
    ):
        run(Act(needs=(Level(schedule=at([0, 3])),)))
    run(Act(needs=(Level(schedule=at([0, 3, 9])),)))


@pytest.mark.parametrize(
    ("key", "reason"),
    [("level/value", "not measured"), ("level/valeu", "not recorded")],
    ids=["nan", "absent"],
)
def test_one_whose_readings_are_nan_is_named_once(key, reason):
    monitor, in_force, said = run(Act(needs=(Level(schedule=2),), key=key))
    assert not monitor.decisions
    assert said == [f"Act has decided nothing at 5 checks in a row, for want of {key} ({reason})."]
    assert set(in_force) == {0.1}


def test_one_whose_readings_come_later_is_not_called_silent():
    monitor, _, said = run(Act(needs=(Level(schedule=2, known_from=12),), key="level/value"))
    assert [decision.step for decision in monitor.decisions] == [12]
    assert not said


@pytest.mark.parametrize("knob", ["momentum", ""])
def test_a_knob_that_nothing_turns_is_refused(knob):
    with pytest.raises(InputError, match=r"Act must turn what there is to turn, got knobs .*'learning_rate'"):
        run(Act(knob=knob))


def test_a_group_that_is_not_there_is_said():
    _, in_force, said = run(Act(names=("head",)))
    assert set(in_force) == {0.1}
    (text,) = said
    assert "parameter groups ['head'], which this optimizer does not have: its groups are ['0']" in text


@pytest.mark.parametrize("knob", ["learning_rate", "run"])
def test_a_change_that_the_memory_does_not_hold_is_said(knob):
    monitor, in_force, said = run(Act(knob=knob, forgets=True))
    assert set(in_force) == {0.1}
    assert not monitor.should_stop
    (text,) = said
    assert text.startswith(f"Act decided on another {knob}, and nothing turns it")
