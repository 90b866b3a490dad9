"""The words of a reading: refused where they are missing, carried to where they are shown."""

import copy
import math
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from gradiometer import (
    FluctuationDissipation,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    Observable,
    Quantity,
    Reading,
)
from gradiometer.errors import InputError, MeasurementWarning
from gradiometer.record.readings import quantity_of, sibling
from gradiometer.record.table import sentence


@pytest.mark.parametrize("words", [("", "A number."), ("1", ""), (" ", "A number."), ("1", "\n")])
def test_a_quantity_needs_a_unit_and_a_sentence(words):
    with pytest.raises(InputError, match=r"needs a unit and a sentence, got Quantity\(.*Write Quantity"):
        Quantity(*words)


def test_an_observable_without_them_cannot_be_written():
    with pytest.raises(InputError, match="a quantity needs a unit and a sentence"):

        class Silent(Observable):
            quantities = {"size": Quantity("1", "")}


@pytest.mark.parametrize("section", ["", "/head", "/layer.0/weight"])
def test_a_sibling_keeps_group_and_section(section):
    assert sibling(f"d/fdr/ratio{section}", "stationary") == f"d/fdr/stationary{section}"


def test_the_key_of_a_reading_is_checked():
    assert FluctuationDissipation.key("ratio/head") == "fdr/ratio/head"
    with pytest.raises(InputError, match=r"FluctuationDissipation has no words for its reading 'ration'"):
        FluctuationDissipation.key("ration")
    with pytest.raises(InputError, match="Owner has no words for its reading 'a'"):
        quantity_of("a/head", {}, "Owner")


def _twice(reading, others):
    return f"twice is {2 * reading.number:g}."


def test_words_do_not_make_readings_differ_and_travel_with_them():
    words = Quantity("1", "A number.", verdict=_twice)
    plain = Reading("d/a/b", 3.0, stderr=0.5)
    spoken = replace(plain, quantity=words)
    assert spoken == plain
    assert hash(spoken) == hash(plain)
    assert repr(spoken) == repr(plain)
    for twin in (copy.deepcopy(spoken), pickle.loads(pickle.dumps(spoken))):
        assert sentence(twin, {}) == "twice is 6."
    assert sentence(replace(spoken, value=math.nan, sentence="A number."), {}) == "not measured. A number."


# -- in a run --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Weights(Observable):
    """Reads a name too many, at some of the steps."""

    group = "weights"
    quantities = {"sum": Quantity("parameter", "Sum of the weights.", verdict=_twice)}
    too_many: tuple[str, ...] = ()

    def statistics(self, snapshot):
        return {"sum": sum(p.detach().sum() for p in snapshot.model.parameters())}

    def readings(self, now, reference):
        return {"sum": now["sum"], **dict.fromkeys(self.too_many, now["sum"])}


def run(observable, steps=1, **arguments):
    torch.manual_seed(0)
    model, memory = nn.Linear(3, 2), MemoryRecorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, [observable], recorders=[memory], **arguments) as monitor:
        for _ in range(steps):
            x = torch.ones(4, 3)
            with monitor.micro_batch(x):
                model(x).sum().backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return memory, monitor


def test_a_run_says_what_the_observable_makes_of_its_number():
    memory, monitor = run(Weights(schedule=1), on_error="raise")
    reading = memory.latest()["dynamics/weights/sum"]
    assert reading.quantity is Weights.quantities["sum"]
    assert f"twice is {2 * reading.value:g}." in monitor.table()


@pytest.mark.parametrize("name", ["mean", "mean/0"])
def test_a_reading_without_words_is_one_error_with_the_line_to_write(name):
    message = (
        r"Weights has no words for its reading 'mean', got quantities for \['sum'\]\. "
        r'Add to its quantities: "mean": Quantity\("unit", "What the number is\."\)\.'
    )
    with pytest.raises(InputError, match=message):
        run(Weights(schedule=1, too_many=(name,)), on_error="raise")
    with pytest.warns(MeasurementWarning, match=message) as caught:
        memory, _ = run(Weights(schedule=1, too_many=(name,)), steps=5)
    assert len([w for w in caught if "has no words" in str(w.message)]) == 1
    assert math.isnan(memory.latest()["dynamics/weights/sum"].value)


def _fails(*arguments):
    raise RuntimeError("no idea")


@dataclass(frozen=True, kw_only=True)
class Confused(Weights):
    quantities = {"sum": Quantity("parameter", "Sum of the weights.", verdict=_fails)}
    checks = {"sum": _fails}


def test_a_verdict_or_a_check_that_fails_costs_neither_the_record_nor_the_table():
    with pytest.warns(MeasurementWarning, match="RuntimeError: no idea. Training goes on") as caught:
        memory, monitor = run(Confused(schedule=1), steps=3)
    assert len(caught) == 1
    assert [step for step, _ in memory.series("dynamics/weights/sum")] == [0, 1, 2]
    table = " ".join(monitor.table().split())
    assert "Sum of the weights. (Its verdict failed: RuntimeError: no idea)" in table
    with pytest.raises(RuntimeError, match="no idea"):
        run(Confused(schedule=1), on_error="raise")


def test_a_check_of_a_reading_without_words_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Strange(Weights):
        checks = {"mean": _fails}

    with pytest.raises(InputError, match="Strange has no words for its reading 'mean'"):
        run(Strange(schedule=1))


def test_a_recorder_is_told_once_what_may_come_and_one_that_fails_is_left_out():
    class Page:
        def __init__(self, error=None):
            self.told, self.steps, self.error = [], [], error

        def expect(self, quantities):
            if self.error:
                raise self.error
            self.told.append(quantities)

        def __call__(self, step, readings):
            self.steps.append(step)

    sound, broken = Page(), Page(RuntimeError("no page"))
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observables = [Weights(schedule=1)]
    with pytest.warns(MeasurementWarning, match="Page failed: RuntimeError: no page"):
        monitor = Monitor(model, optimizer, observables, recorders=[broken, sound])
    with monitor:
        for _ in range(3):
            with monitor.micro_batch(torch.ones(4, 3)):
                model(torch.ones(4, 3)).sum().backward()
            monitor.before_step()
            optimizer.step()
    (words,) = sound.told
    assert words["dynamics/weights/sum"] is Weights.quantities["sum"]
    assert words["dynamics/fdr/ratio"] is FluctuationDissipation.quantities["ratio"]
    assert (sound.steps, broken.steps) == ([0, 1, 2], [0, 1, 2])


def test_the_kernel_of_the_optimizers_steps_is_not_called_lazy():
    plain, scaled = NeuralTangentKernel(), NeuralTangentKernel(preconditioned=True)
    assert set(plain.quantities) == set(scaled.quantities)
    assert plain.quantities["feature_change"].verdict is not None
    assert "feature_change" in plain.names - scaled.names
    assert all(words.verdict is None and not words.chart for words in scaled.quantities.values())
