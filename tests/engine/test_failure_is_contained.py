"""Measuring never ends the run: one warning, ``nan``, and training goes on."""

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradiometer.collect.registry
import gradiometer.engine.monitor
from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    Observable,
    Quantity,
    Reading,
)
from gradiometer.autodiff import ride_along
from gradiometer.collect.gradient_parts import AutoSource
from gradiometer.engine.guard import Guard
from gradiometer.engine.output import Output
from gradiometer.errors import InputError, MeasurementWarning, UnsupportedError
from gradiometer.observables.schedules import Schedule, every

from ..hooks import standing

STEPS = 6
FIX = "Turn the crank the other way."
STUCK = InputError("the crank is stuck", fix=FIX)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


class Recurrent(nn.Module):
    """``torch.func`` cannot map nn.GRU over examples."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.gru(x[:, None].expand(-1, 3, -1))[0][:, -1])


def batch(step, size=16):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator)


@dataclass(frozen=True, kw_only=True)
class Broken(Observable):
    """Raises in one of its methods, at some of the steps."""

    group = "broken"
    quantities = {"value": Quantity("1", "A number."), "other": Quantity("1", "Another one.")}

    where: str = "statistics"
    error: Exception = STUCK
    steps: tuple[int, ...] = tuple(range(100))

    def _perhaps(self, where, step):
        if where == self.where and step in self.steps:
            raise self.error

    def statistics(self, snapshot):
        self._perhaps("statistics", snapshot.step)
        return {"one": torch.ones(())}

    def levels(self, snapshot):
        self._perhaps("levels", snapshot.step)
        return {"step": torch.tensor(float(snapshot.step))}

    def note(self, snapshot):
        self._perhaps("note", snapshot.step)
        return "noted"

    def readings(self, now, reference):
        self._perhaps("readings", reference.step)
        return {"value": now["step"], "other": now["step"] + 1}


def others():
    return [
        NeuralTangentKernel(schedule=1),
        JacobianNorm(schedule=1),
        GradientNoiseScale(schedule=1),
        FluctuationDissipation(schedule=1, sampling=1),
    ]


def train(observables, *, model=None, recorders=(), on_error="warn", steps=STEPS):
    """Final weights, what was recorded, and every warning that was issued."""
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    memory = MemoryRecorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(
            model, optimizer, observables, recorders=[*recorders, memory], on_error=on_error
        ) as monitor:
            for step in range(steps):
                x, y = batch(step)
                with monitor.micro_batch(x, y):
                    F.cross_entropy(model(x), y).backward()
                monitor.before_step()
                optimizer.step()
                optimizer.zero_grad()
    assert standing(model) == 0
    assert not optimizer._optimizer_step_post_hooks
    ours = [w for w in caught if "LeafSpec" not in str(w.message)]
    assert all(issubclass(w.category, MeasurementWarning) for w in ours)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return weights, memory, [str(w.message) for w in ours]


def numbers(memory, groups=("ntk", "jacobian", "noise", "fdr")):
    return [
        (step, r.key, r.value, r.stderr)
        for step, readings in memory.records
        for r in readings
        if isinstance(r.value, float) and r.key.split("/")[1] in groups
    ]


def assert_same(left, right):
    assert [each[:2] for each in left] == [each[:2] for each in right]
    a, b = (torch.tensor([each[2:] for each in side], dtype=torch.float64) for side in (left, right))
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def healthy():
    weights, memory, messages = train(others())
    assert messages == []
    return weights, memory


@pytest.mark.parametrize("where", ["statistics", "levels", "readings", "note"])
def test_an_observable_that_raises_is_warned_about_once_and_retired(where, healthy):
    weights, memory, messages = train([Broken(schedule=1, where=where), *others()])
    assert len(messages) == 1
    assert messages[0].startswith("Broken at step 0: the crank is stuck. " + FIX)
    assert "after 3 failures in a row" in messages[0]
    for name in ("value", "other"):
        values = [
            (step, r.value)
            for step, readings in memory.records
            for r in readings
            if r.key == f"dynamics/broken/{name}"
        ]
        assert [step for step, _ in values] == [0, 1, 2]
        assert all(math.isnan(value) for _, value in values)
    assert torch.equal(weights, healthy[0])
    assert_same(numbers(memory), numbers(healthy[1]))


def test_an_observable_that_recovers_is_kept():
    _, memory, messages = train([Broken(schedule=1, steps=(0, 1, 3))])
    assert len(messages) == 1
    values = [r.value for _, readings in memory.records for r in readings if r.key.endswith("broken/value")]
    assert [math.isnan(value) for value in values] == [True, True, False, True, False, False]
    assert values[2] == 2.0


def test_what_can_never_be_measured_is_retired_at_once():
    error = UnsupportedError("this crank has no handle", fix=FIX)
    _, memory, messages = train([Broken(schedule=1, error=error)])
    assert len(messages) == 1
    assert "no handle" in messages[0]
    assert "It is left out from here on. Training goes on." in messages[0]
    assert len([1 for _, readings in memory.records for r in readings if r.key.endswith("value")]) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("boom"), "RuntimeError: boom. It reads nan"),
        (MemoryError(), "MemoryError. Pass a smaller probe_size="),
        (torch.OutOfMemoryError("no room."), "no room. Pass a smaller probe_size="),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_errors_of_any_kind_are_named(error, said, healthy):
    weights, memory, messages = train([Broken(schedule=1, error=error), *others()])
    assert len(messages) == 1
    assert messages[0].startswith("Broken at step 0: ")
    assert said in messages[0]
    assert torch.equal(weights, healthy[0])
    assert_same(numbers(memory), numbers(healthy[1]))


def test_an_interrupt_is_the_users_and_passes_through():
    with pytest.raises(KeyboardInterrupt):
        train([Broken(schedule=1, error=KeyboardInterrupt())])


def test_statistics_that_change_their_shape_are_contained(healthy):
    @dataclass(frozen=True, kw_only=True)
    class Shifty(Broken):
        where: str = "nowhere"

        def statistics(self, snapshot):
            return {"one": torch.ones(2 + snapshot.step % 3)}

    weights, memory, messages = train([Shifty(schedule=4, sampling=every(1)), *others()])
    assert messages
    assert all(message.startswith("Shifty at step") for message in messages)
    assert torch.equal(weights, healthy[0])
    assert_same(numbers(memory), numbers(healthy[1]))


def test_a_reading_that_was_not_declared_is_contained(healthy):
    @dataclass(frozen=True, kw_only=True)
    class Undeclared(Broken):
        where: str = "nowhere"

        def readings(self, now, reference):
            return {"surprise": now["step"]}

    _, memory, messages = train([Undeclared(schedule=1), *others()])
    assert len(messages) == 1
    assert "Undeclared at step 0: Undeclared has no words for its reading 'surprise'" in messages[0]
    assert 'Add to its quantities: "surprise": Quantity("unit", "What the number is.").' in messages[0]
    assert_same(numbers(memory), numbers(healthy[1]))


def test_a_schedule_that_raises_is_contained(healthy):
    class Worn(Schedule):
        def __call__(self, step):
            raise ValueError("worn out")

    weights, memory, messages = train([Broken(schedule=Worn(), where="nowhere"), *others()])
    assert len(messages) == 1
    assert "Broken at step 0: ValueError: worn out" in messages[0]
    assert torch.equal(weights, healthy[0])
    assert_same(numbers(memory), numbers(healthy[1]))


# -- collectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["__init__", "enter", "exit", "before_step", "result", "close"])
def test_a_collector_that_raises_takes_only_its_own_observables_along(stage, healthy, monkeypatch):
    def stuck(self, *args):
        if stage in ("exit", "close"):
            getattr(AutoSource, stage)(self)
        raise RuntimeError("the collector is stuck")

    monkeypatch.setitem(
        gradiometer.collect.registry.COLLECTORS,
        "gradient_parts",
        type("Stuck", (AutoSource,), {stage: stuck}),
    )
    weights, memory, messages = train(others())
    assert torch.equal(weights, healthy[0])
    kept = ("ntk", "jacobian", "fdr")
    assert_same(numbers(memory, kept), numbers(healthy[1], kept))
    if stage == "close":  # everything had been measured before
        assert_same(numbers(memory, ("noise",)), numbers(healthy[1], ("noise",)))
    else:
        assert len(messages) == 1
        assert "GradientNoiseScale at step 0: RuntimeError: the collector is stuck." in messages[0]
        assert all(math.isnan(value) for _, _, value, _ in numbers(memory, ("noise",)))


def test_errors_inside_parameter_hooks_do_not_reach_the_backward_pass(healthy, monkeypatch):
    """Micro-batches, whose norms are taken in hooks on the parameters."""
    real = torch.linalg.vector_norm

    def stuck(*args, **kwargs):
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError("stuck in a hook")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "vector_norm", stuck)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = MemoryRecorder()
    with (
        pytest.warns(MeasurementWarning, match="GradientNoiseScale at step 0.*stuck in a hook") as caught,
        Monitor(model, optimizer, [GradientNoiseScale(schedule=1)], recorders=[memory]) as monitor,
    ):
        for step in range(3):
            x, y = batch(step)
            for part in (slice(0, 8), slice(8, 16)):
                with monitor.micro_batch(x[part], y[part]):
                    F.cross_entropy(model(x[part]), y[part]).backward()
            monitor.before_step()
            optimizer.step()
    assert len(caught) == 1
    assert len(memory.records) == 3


def test_errors_inside_layer_hooks_do_not_reach_the_backward_pass(healthy, monkeypatch):
    """Single examples, whose norms are taken by riding along."""

    def stuck(module, a):
        raise RuntimeError("stuck in a rule")

    monkeypatch.setattr(ride_along, "RULES", {**ride_along.RULES, nn.Linear: stuck})
    weights, memory, messages = train(others())
    assert len(messages) == 1
    assert "GradientNoiseScale at step 0: RuntimeError: stuck in a rule." in messages[0]
    assert torch.equal(weights, healthy[0])
    kept = ("ntk", "jacobian", "fdr")
    assert_same(numbers(memory, kept), numbers(healthy[1], kept))


def test_errors_inside_forward_hooks_do_not_reach_the_forward_pass(healthy, monkeypatch):
    def stuck(*args):
        raise RuntimeError("stuck in the forward")

    monkeypatch.setattr(ride_along, "_cannot", stuck)
    weights, _, messages = train(others())
    assert len(messages) == 1
    assert "GradientNoiseScale at step 0: RuntimeError: stuck in the forward." in messages[0]
    assert torch.equal(weights, healthy[0])


def test_a_recurrent_model_loses_only_its_share_of_the_noise(monkeypatch):
    """GRU has no batching rule: where the loss is not known either, its per-example norms are left out."""

    def recurrent():
        torch.manual_seed(0)
        return Recurrent()

    monkeypatch.setattr(F, "cross_entropy", lambda out, y: F.nll_loss(out.log_softmax(1), y).exp().log())
    plain, _, _ = train([], model=recurrent())
    weights, memory, messages = train(others(), model=recurrent())
    assert torch.equal(weights, plain)
    assert messages == []
    latest = memory.latest()
    for key in ("ntk/drift", "jacobian/frobenius_norm", "noise/trace", "fdr/ratio"):
        assert math.isfinite(latest[f"dynamics/{key}"].value), key
    assert "skipped: gru.bias_hh_l0, gru.bias_ih_l0" in latest["dynamics/noise/trace"].note


def test_a_first_batch_that_is_no_good_for_the_kernel_is_said_with_the_fix(healthy):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(MeasurementWarning, match=r"NeuralTangentKernel at step 0: inputs must be finite") as w,
        Monitor(model, optimizer, [NeuralTangentKernel(schedule=1)]) as monitor,
    ):
        for step in range(4):
            x, y = batch(step)
            x = torch.full_like(x, math.inf) if step == 0 else x
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).nan_to_num().backward()
            monitor.before_step()
            model.zero_grad(set_to_none=False)
            optimizer.step()
    assert len(w) == 1
    assert "pass another one with probe=" in str(w[0].message)


def test_what_the_loop_shows_may_be_anything_where_the_network_is_seen_to_be_called():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = MemoryRecorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, optimizer, others(), recorders=[memory]) as monitor:
            for step in range(STEPS):
                x, y = batch(step)
                with monitor.micro_batch("a string", y):
                    F.cross_entropy(model(x), y).backward()
                monitor.before_step()
                optimizer.step()
                optimizer.zero_grad()
    assert not caught
    for name in ("jacobian/frobenius_norm", "noise/trace", "fdr/ratio"):
        assert memory.latest()[f"dynamics/{name}"].is_finite


# -- recorders -------------------------------------------------------------------------------------


class BrokenRecorder:
    """Raises at some of its calls."""

    def __init__(self, *broken, error=OSError):
        self.broken, self.error = broken, error
        self.calls, self.steps, self.closed = 0, [], False

    def __call__(self, step, readings):
        self.calls += 1
        if self.calls - 1 in self.broken:
            raise self.error(f"disk full at call {self.calls}")
        self.steps.append(step)

    def close(self):
        self.closed = True


@pytest.mark.parametrize("error", [OSError, ConnectionError, KeyError, RecursionError])
def test_a_recorder_that_raises_once_misses_one_record_and_the_others_none(healthy, error):
    recorder = BrokenRecorder(1, error=error)
    weights, memory, messages = train(others(), recorders=[recorder])
    (message,) = messages
    assert "BrokenRecorder failed: " + error.__name__ in message
    assert "disk full at call 2" in message
    assert "asked again at later records" in message
    assert recorder.steps == [step for step, _ in memory.records if step != memory.records[1][0]]
    assert torch.equal(weights, healthy[0])
    assert_same(numbers(memory), numbers(healthy[1]))


def record(recorder, records):
    """A recorder's steps after so many records, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = Output("d", [recorder], Guard("warn"), [])
        for step in range(records):
            output.add(step, [Reading("d/own/number", 1.0)], [])
        output.close()
    return recorder.steps, [str(warning.message) for warning in caught]


def test_a_recorder_that_keeps_failing_is_asked_after_longer_and_longer_pauses():
    steps, messages = record(BrokenRecorder(1, 2, 3, 4), 40)
    assert steps == [0, *range(16, 40)]  # asked in vain at 1, 2, 4 and 8
    assert len(messages) == 1


def test_pauses_begin_anew_after_a_success():
    steps, _ = record(BrokenRecorder(1, 2, 4), 12)
    assert steps == [0, 4, 6, 7, 8, 9, 10, 11]  # call 4 is step 5


def test_pauses_do_not_grow_without_end():
    steps, _ = record(BrokenRecorder(*range(20)), 64 * 16)  # the last pauses are of 64 records
    assert len(steps) > 20


def test_an_error_at_the_last_record_is_contained_and_the_recorder_is_closed():
    recorder = BrokenRecorder(4)
    steps, messages = record(recorder, 5)
    assert (steps, recorder.closed, len(messages)) == ([0, 1, 2, 3], True, 1)


def test_a_recorder_that_could_not_be_told_what_to_expect_is_told_later():
    class Page(BrokenRecorder):
        told = 0

        def expect(self, words):
            self.told += 1
            if self.told < 3:
                raise ConnectionError("no page")

    page = Page()
    steps, messages = record(page, 5)
    assert (steps, page.told, len(messages)) == ([0, 1, 2, 3, 4], 3, 1)


def test_a_recorder_that_raises_on_closing_is_contained(healthy):
    class Stubborn:
        def __call__(self, step, readings):
            pass

        def close(self):
            raise OSError("disk full")

    closed = []

    class Good(Stubborn):
        def close(self):
            closed.append(True)

    weights, _, messages = train(others(), recorders=[Stubborn(), Good()])
    assert len(messages) == 1
    assert "closing Stubborn" in messages[0]
    assert "disk full" in messages[0]
    assert closed == [True]
    assert torch.equal(weights, healthy[0])


# -- on_error="raise" ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["statistics", "levels", "readings", "note"])
def test_raise_raises(where):
    with pytest.raises(InputError, match="the crank is stuck"):
        train([Broken(schedule=1, where=where)], on_error="raise")


def test_raise_raises_for_recorders_too():
    with pytest.raises(OSError, match="disk full"):
        train([JacobianNorm(schedule=1)], recorders=[BrokenRecorder(1)], on_error="raise")


def test_raise_leaves_no_hook_behind_once_closed():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(
        model, optimizer, [Broken(schedule=1), GradientNoiseScale(schedule=1)], on_error="raise"
    )
    x, y = batch(0)
    with monitor.micro_batch(x, y):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(InputError):
        monitor.before_step()
    monitor.close()
    assert standing(model) == 0
    assert not optimizer._optimizer_step_post_hooks
