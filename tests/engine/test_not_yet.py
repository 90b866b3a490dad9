"""Steps that do not count and samples that are not there yet are no failures, also where failures raise."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from gradiometer import Mean, MemoryRecorder, Monitor, Observable, Quantity
from gradiometer.observables import Sample


@dataclass(frozen=True, kw_only=True)
class Chosen(Observable):
    """The step's own number where ``answers`` says so: it counts, does not count, or is not there yet."""

    group = "chosen"
    quantities: ClassVar = {"step": Quantity("1", "Mean step."), "samples": Quantity("1", "How many count.")}
    default_estimator = Mean

    answers: str = ""
    with_levels: bool = False
    asked: ClassVar[list] = []

    def statistics(self, snapshot):
        self.asked.append(snapshot.step)
        step = torch.tensor(float(snapshot.step), requires_grad=True)
        return {
            "y": {"step": step},
            "0": Sample({"step": step * torch.nan}, 0),
            "d": Sample({"step": step * torch.nan}, weight=torch.tensor(False)),
            "1": Sample({"step": step}, weight=torch.tensor(1.0)),
            "-": None,
        }[self.answers[snapshot.step]]

    def levels(self, snapshot):
        return {"level": torch.tensor(float(snapshot.step))} if self.with_levels else {}

    def readings(self, now, reference):
        if "step" not in now:
            return {}
        return {"step": now["step"], "samples": reference.samples}


def read(answers, *, on_error="raise", save=None, **settings):
    """What was recorded at which step, without a warning."""
    Chosen.asked.clear()
    model, memory = nn.Linear(2, 1), MemoryRecorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observable = Chosen(answers=answers, **{"schedule": 1, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = Monitor(model, optimizer, [observable], recorders=[memory], on_error=on_error)
        with monitor:
            for step in range(len(answers)):
                with monitor.micro_batch(torch.ones(4, 2)):
                    model(torch.ones(4, 2)).mean().backward()
                monitor.before_step()
                optimizer.step()
                if step == save:
                    monitor.load_state_dict(monitor.state_dict())
    assert Chosen.asked == [step for step in range(len(answers)) if observable.samples(step)]
    means = dict(memory.series("dynamics/chosen/step"))
    samples = dict(memory.series("dynamics/chosen/samples"))
    return {step: (means[step], samples[step]) for step in means}


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_not_yet_adds_nothing_and_reads_nothing(on_error):
    found = read("--yy-y", on_error=on_error)
    assert found == {2: (2.0, 1.0), 3: (2.5, 2.0), 4: (2.5, 2.0), 5: (10 / 3, 3.0)}


@pytest.mark.parametrize("not_counted", "0d")
@pytest.mark.parametrize("counted", "y1")
def test_steps_of_weight_zero_are_in_no_average_and_no_count(counted, not_counted):
    answers = "aabbab".replace("a", not_counted).replace("b", counted)
    assert read(answers) == {2: (2.0, 1.0), 3: (2.5, 2.0), 4: (2.5, 2.0), 5: (10 / 3, 3.0)}


def test_sampled_between_records_and_across_a_checkpoint():
    found = read("-0y1d-1yy0", schedule=3, sampling=1, save=4)
    assert found == {3: (2.5, 2.0), 6: (11 / 3, 3.0), 9: (26 / 5, 5.0)}


def test_readings_that_return_nothing_are_no_failure():
    """With levels there is something to show from the first step on, and nothing to read."""
    assert read("--yyy", with_levels=True) == {3: (3.0, 1.0), 4: (3.5, 2.0)}
