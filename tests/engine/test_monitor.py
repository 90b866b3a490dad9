"""The engine in a plain loop."""

import math
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradiometer.engine.monitor
from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    Mean,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    Observable,
    Quantity,
    at,
    every,
)
from gradiometer.collect.gradient_parts import AutoSource
from gradiometer.engine.cost import CostLedger
from gradiometer.errors import CostWarning, InputError, MeasurementWarning


def network(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()


def batch(step, size=16):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **kwargs})


def loop(observables, *, steps=6, parts=1, make=sgd, model=None, divide=True, **kwargs):
    """Train on ``batch(step)`` cut into ``parts``; returns what was recorded."""
    model = model or network()
    optimizer, memory = make(model), MemoryRecorder()
    with Monitor(
        model, optimizer, observables, recorders=[memory], dataset_size=1000, on_error="raise", **kwargs
    ) as monitor:
        for step in range(steps):
            x, y = batch(step)
            for one, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                with monitor.micro_batch(one, target):
                    loss = F.cross_entropy(model(one), target)
                    (loss / parts if divide else loss).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return memory


def values(memory, without=("cost",)):
    """Steps, keys, values and errors of the numbers."""
    return [
        (step, r.key, r.value, r.stderr)
        for step, readings in memory.records
        for r in readings
        if r.key.split("/")[1] not in without and isinstance(r.value, float)
    ]


def equal(left, right):
    assert [each[:2] for each in left] == [each[:2] for each in right]
    torch.testing.assert_close(
        torch.tensor([each[2:] for each in left], dtype=torch.float64),
        torch.tensor([each[2:] for each in right], dtype=torch.float64),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@dataclass(frozen=True, kw_only=True)
class Seen(Observable):
    """Counts its samples and remembers what it was shown."""

    group = "seen"
    quantities = {"samples": Quantity("1", "Number of samples.")}
    needs = frozenset({"gradient_parts"})
    shown = []

    def statistics(self, snapshot):
        self.shown.append((snapshot.step, snapshot.gradient_parts))
        return {"one": torch.ones(())}

    def readings(self, now, reference):
        return {"samples": reference.samples}


# -- steps and schedules ---------------------------------------------------------------------------


def test_readings_stand_under_the_steps_of_their_schedules():
    memory = loop(
        [
            NeuralTangentKernel(schedule=at([0, 3])),
            JacobianNorm(schedule=every(4)),
            GradientNoiseScale(schedule=every(3)),
            FluctuationDissipation(schedule=every(5), sampling=every(2)),
        ],
        steps=11,
    )
    steps = {
        key: [step for step, _ in memory.series(f"dynamics/{key}")]
        for key in ("ntk/drift", "jacobian/frobenius_norm", "noise/trace", "fdr/weight_norm_sq")
    }
    assert steps == {
        "ntk/drift": [0, 3],
        "jacobian/frobenius_norm": [0, 4, 8],
        "noise/trace": [0, 3, 6, 9],
        "fdr/weight_norm_sq": [0, 5, 10],
    }
    assert [step for step, _ in memory.series("dynamics/fdr/right")] == [5, 10]  # two ends are needed
    records = [step for step, _ in memory.records]
    assert [step for step, _ in memory.series("dynamics/cost/seconds")] == records
    assert [step for step, _ in memory.series("dynamics/cost/fraction")] == records[1:]


def test_samples_between_recordings_are_averaged():
    Seen.shown.clear()
    memory = loop([Seen(schedule=5, sampling=every(2), estimator=Mean())], steps=11)
    assert [step for step, _ in Seen.shown] == [0, 1, 3, 4, 6, 8, 10]  # three drawn of every five
    assert memory.series("dynamics/seen/samples") == [(0, 1.0), (5, 4.0), (10, 7.0)]


# not read by the default observables
OPTIONAL = {"off_diagonal", "norm_layer_factor", "source_ratio"}
OPTIONAL |= {"preconditioned_scale", "preconditioned_trace", "preconditioned_grad_sq_norm"}


def test_every_default_reading_becomes_finite():
    memory = loop(
        [
            NeuralTangentKernel(schedule=2),
            JacobianNorm(schedule=2),
            GradientNoiseScale(schedule=1),
            FluctuationDissipation(schedule=1, sampling=1, verify=True),
        ],
        steps=8,
    )
    latest = memory.latest()
    for observable in (NeuralTangentKernel, JacobianNorm, GradientNoiseScale, FluctuationDissipation):
        for name in set(observable.quantities) - observable.arrays - OPTIONAL:
            reading = latest[f"dynamics/{observable.group}/{name}"]
            assert math.isfinite(reading.value) or not reading.resolved, name
    assert latest["dynamics/ntk/kernel"].value.shape == (16, 16)
    assert latest["dynamics/ntk/spectrum"].value.shape == (16,)
    assert abs(latest["dynamics/fdr/residual"].value) < 1e-12
    assert latest["dynamics/ntk/drift"].stderr > 0


def test_kernel_and_jacobian_are_those_of_the_weights_before_the_step():
    model = network()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    memory = loop([JacobianNorm(schedule=at([0]))], steps=2, model=model)
    fresh = network()
    fresh.load_state_dict(first)
    x, _ = batch(0)
    jacobian = torch.func.vmap(torch.func.jacrev(fresh))(x)
    expected = jacobian.flatten(1).norm(dim=1).mean().item()
    assert memory.series("dynamics/jacobian/frobenius_norm") == [(0, pytest.approx(expected, rel=1e-12))]


def test_probe_is_the_beginning_of_the_first_batch_unless_one_is_given():
    def probe_of(**kwargs):
        model = network()
        monitor = Monitor(model, sgd(model), [JacobianNorm()], **kwargs)
        x, y = batch(0)
        with monitor.micro_batch(x, y):
            F.cross_entropy(model(x), y).backward()
        monitor.close()
        return monitor.state_dict()["probe"]

    x, y = batch(0)
    assert torch.equal(probe_of(probe_size=3)["inputs"], x[:3])
    assert torch.equal(probe_of(probe_size=3)["targets"], y[:3])
    other, targets = batch(7)
    assert torch.equal(probe_of(probe=other)["inputs"], other)
    assert torch.equal(probe_of(probe=(other, targets))["targets"], targets)


# -- gathering -------------------------------------------------------------------------------------


def test_nothing_is_gathered_where_nothing_is_due_and_nothing_twice(monkeypatch):
    made = []

    class Counting(AutoSource):
        def __init__(self, training, step, memory):
            made.append(step.updates)
            super().__init__(training, step, memory)

    monkeypatch.setitem(gradiometer.collect.registry.COLLECTORS, "gradient_parts", Counting)
    Seen.shown.clear()
    noise = GradientNoiseScale(schedule=2)
    memory = loop([noise, Seen(schedule=4)], steps=7)
    sampled = [step for step in range(7) if noise.samples(step)]
    assert len(sampled) == 4
    assert made == sorted({*sampled, 4})
    assert [step for step, _ in Seen.shown] == [0, 4]
    assert len(memory.series("dynamics/noise/trace")) == 4


def test_observables_that_share_a_need_are_shown_the_same_object():
    Seen.shown.clear()
    other_shown = []

    @dataclass(frozen=True, kw_only=True)
    class Other(Seen):
        group = "other"
        shown = other_shown

    loop([Seen(schedule=1), Other(schedule=1)], steps=2)
    assert len(other_shown) == 2
    assert all(a[1] is b[1] for a, b in zip(Seen.shown, other_shown, strict=True))


# -- the noise scale from micro-batches ------------------------------------------------------------


def test_trace_from_micro_batches_equals_the_two_batch_estimators_written_out():
    memory = loop([GradientNoiseScale(schedule=at([0]))], steps=1, parts=4)
    model = network()
    x, y = batch(0)

    def gradient(one, target):
        grads = torch.autograd.grad(F.cross_entropy(model(one), target), list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    small = torch.stack([gradient(*p) for p in zip(x.chunk(4), y.chunk(4), strict=True)])
    small_sq, big_sq = small.square().sum(1).mean(), gradient(x, y).square().sum()
    trace = (small_sq - big_sq) / (1 / 4 - 1 / 16)  # arXiv:1812.06162, A.3
    signal = (16 * big_sq - 4 * small_sq) / (16 - 4)  # A.2
    latest = memory.latest()
    assert latest["dynamics/noise/trace"].value == pytest.approx(trace.item(), rel=1e-12)
    assert latest["dynamics/noise/grad_sq_norm"].value == pytest.approx(signal.item(), rel=1e-12)
    assert latest["dynamics/noise/scale"].note.startswith("micro-batches, loss_reduction=mean, over 100 %")


@pytest.mark.parametrize("parts", [2, 4])
def test_noise_scale_does_not_depend_on_dividing_the_loss_by_the_micro_batches(parts):
    """Only the first step: later ones differ because the update does."""

    def reading(divide):
        memory = loop([GradientNoiseScale(schedule=at([0]))], steps=1, parts=parts, divide=divide)
        return memory.latest()["dynamics/noise/scale"].value

    assert math.isfinite(reading(True))
    assert reading(True) == pytest.approx(reading(False), rel=1e-10)


def test_accumulation_may_begin_and_end_during_the_run():
    model, memory = network(), MemoryRecorder()
    optimizer = sgd(model)
    counts = [1, 4, 4, 1, 1]
    with (
        pytest.warns(MeasurementWarning, match="one micro-batch where the last had several") as caught,
        Monitor(model, optimizer, [GradientNoiseScale(schedule=1)], recorders=[memory]) as monitor,
    ):
        for step, parts in enumerate(counts):
            x, y = batch(step)
            for one, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                with monitor.micro_batch(one, target):
                    (F.cross_entropy(model(one), target) / parts).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    assert len(caught) == 1
    notes = {step: readings[0].note.split(",")[0] for step, readings in memory.records}
    assert notes == {0: "per example", 1: "micro-batches", 2: "micro-batches", 4: "per example"}


# -- loss scaling and skipped steps ----------------------------------------------------------------


def scaled_loop(scale, *, unscale_first, spoil=(), observables=None):
    """A loop under torch's own scaler; the loss of the steps in ``spoil`` becomes infinite."""
    model, memory = network(), MemoryRecorder()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    observables = observables or [
        NeuralTangentKernel(schedule=2),
        GradientNoiseScale(schedule=1),
        FluctuationDissipation(schedule=2, sampling=1, verify=True),
    ]
    with Monitor(model, optimizer, observables, recorders=[memory], dataset_size=1000) as monitor:
        for step in range(6):
            parts = 2
            x, y = batch(step)
            for one, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                with monitor.micro_batch(one, target):
                    factor = math.inf if step in spoil else 1.0
                    scaler.scale(F.cross_entropy(model(one), target) / parts * factor).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
                monitor.before_step(loss_scale=scaler.get_scale())
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            else:
                monitor.before_step(grad_scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return memory


@pytest.mark.parametrize("unscale_first", [False, True], ids=["scaled", "unscaled, clipped"])
def test_loss_scaling_does_not_change_the_readings(unscale_first):
    plain = scaled_loop(1.0, unscale_first=unscale_first)
    assert len(plain.records) == 6
    equal(values(scaled_loop(2.0**12, unscale_first=unscale_first)), values(plain))


def test_a_step_that_the_scaler_skips_is_measured_at_the_next():
    """What is left equals a run that never saw the spoiled batch, shifted by one step."""
    observables = [
        NeuralTangentKernel(schedule=2),
        GradientNoiseScale(schedule=2, sampling=1, estimator=Mean()),
        FluctuationDissipation(schedule=2, sampling=1),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)  # a scaler skips steps as a matter of course
        memory = scaled_loop(2.0**12, unscale_first=False, spoil=[2], observables=observables)
    model, clean = network(), MemoryRecorder()
    optimizer = sgd(model)
    with Monitor(model, optimizer, observables, recorders=[clean], dataset_size=1000) as monitor:
        for step in (0, 1, 3, 4, 5):
            x, y = batch(step)
            for one, target in zip(x.chunk(2), y.chunk(2), strict=True):
                with monitor.micro_batch(one, target):
                    (F.cross_entropy(model(one), target) / 2).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    assert [step for step, _ in memory.records] == [0, 2, 4]
    equal(values(memory), values(clean))


def test_a_step_that_the_user_leaves_out_is_measured_at_the_next():
    model, memory = network(), MemoryRecorder()
    optimizer = sgd(model)
    with Monitor(model, optimizer, [JacobianNorm(schedule=at([1]))], recorders=[memory]) as monitor:
        for trial in range(4):
            x, y = batch(trial)
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            if trial != 1:
                optimizer.step()
            optimizer.zero_grad()
    assert [step for step, _ in memory.records] == [1]
    assert memory.latest()["dynamics/jacobian/spectral_norm"].is_finite
    assert monitor.step == 3


# -- gradients that are missing or not finite ------------------------------------------------------


def test_parameters_without_a_gradient_are_left_out_of_the_coverage():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = network(), nn.Linear(5, 3).double()

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    for parts in (1, 2):
        memory = loop(None, model=Half(), parts=parts, steps=3)
        latest = memory.latest()
        assert math.isfinite(latest["dynamics/noise/trace"].value)
        assert math.isfinite(latest["dynamics/fdr/weight_norm_sq"].value)
        assert f"over {100 * 75 / 93:.0f} % of parameters" in latest["dynamics/noise/trace"].note


def test_a_step_without_any_gradient_is_left_out_with_one_warning():
    model, memory = network(), MemoryRecorder()
    optimizer = sgd(model)
    with (
        pytest.warns(MeasurementWarning, match="no parameter has a gradient at this step") as caught,
        Monitor(
            model, optimizer, [GradientNoiseScale(schedule=2, sampling=1)], recorders=[memory]
        ) as monitor,
    ):
        for step in range(6):
            x, y = batch(step)
            with monitor.micro_batch(x, y):
                loss = F.cross_entropy(model(x), y)
                if step not in (2, 4):
                    loss.backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    assert len(caught) == 1
    assert [step for step, _ in memory.series("dynamics/noise/trace")] == [0, 3, 5]


@pytest.mark.parametrize("parts", [1, 2], ids=["per example", "micro-batches"])
def test_a_gradient_that_is_not_finite_is_left_out_with_one_warning(parts):
    def run(bad, schedule):
        model, memory = network(), MemoryRecorder()
        optimizer = sgd(model)
        observables = [GradientNoiseScale(schedule=schedule, estimator=Mean())]
        with Monitor(model, optimizer, observables, recorders=[memory]) as monitor:
            for step in range(8):
                x, y = batch(step)
                for one, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    with monitor.micro_batch(one, target):
                        loss = F.cross_entropy(model(one), target) / parts
                        (loss * math.nan if step in bad else loss).backward()
                monitor.before_step()
                if step not in bad:
                    optimizer.step()
                else:  # the user's own guard: nothing is updated, but the step is made
                    optimizer.zero_grad()
                    optimizer.step()
                optimizer.zero_grad()
        return memory

    drawn = [step for step in range(1, 7) if GradientNoiseScale(schedule=2).samples(step)]
    assert drawn == [1, 3, 6]
    for bad, recorded in (((1, 3), [0, 2, 4, 6]), ((1, 2), [0, 3, 4, 6]), ((1, 2, 6), [0, 3, 4, 7])):
        with pytest.warns(MeasurementWarning, match="the gradient is not finite") as caught:
            memory = run(bad, every(2))
        assert len(caught) == 1
        assert [step for step, _ in memory.records] == recorded
        equal(values(memory), values(run(bad, at(recorded))))


# -- forgotten calls -------------------------------------------------------------------------------


def forgetful_loop(observables=None, *, micro_batch=True, before_step=True, steps=4, make=sgd):
    model, memory = network(), MemoryRecorder()
    optimizer = make(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, optimizer, observables, recorders=[memory]) as monitor:
            for step in range(steps):
                x, y = batch(step)
                if micro_batch:
                    monitor.begin_micro_batch(x, y)
                F.cross_entropy(model(x), y).backward()
                if micro_batch:
                    monitor.end_micro_batch()
                if before_step:
                    monitor.before_step()
                optimizer.step()
                optimizer.zero_grad()
    return memory, [str(w.message) for w in caught]


EACH_STEP = (
    NeuralTangentKernel(schedule=1),
    JacobianNorm(schedule=1),
    GradientNoiseScale(schedule=1),
    FluctuationDissipation(schedule=1, sampling=1),
)


@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.AdamW(model.parameters())])
def test_forgetting_before_step_is_said_once(make):
    memory, messages = forgetful_loop(EACH_STEP, before_step=False, make=make)
    assert len(messages) == 1
    assert "monitor.before_step() was not called before optimizer.step()" in messages[0]
    assert all(math.isnan(value) for _, value in memory.series("dynamics/noise/trace"))
    assert len(memory.series("dynamics/ntk/drift")) == 4


def test_forgetting_before_step_is_said_also_when_only_the_kernel_is_due():
    _, messages = forgetful_loop([NeuralTangentKernel(schedule=1)], before_step=False)
    assert len(messages) == 1
    assert "weights after it" in messages[0]


def test_forgetting_micro_batch_is_said_once_and_by_name():
    memory, messages = forgetful_loop(EACH_STEP, micro_batch=False)
    assert len(messages) == 1
    assert "no micro-batch was seen" in messages[0]
    assert "with monitor.micro_batch(x, y):" in messages[0]
    assert memory.latest()["dynamics/fdr/left"].is_finite
    assert all(math.isnan(value) for _, value in memory.series("dynamics/ntk/drift"))


def test_a_sample_that_never_comes_is_tried_at_most_three_more_times_after_each_due_step():
    model, memory, tries = network(), MemoryRecorder(), []

    class Counting(GradientNoiseScale):
        def statistics(self, snapshot):
            tries.append(snapshot.step)
            return super().statistics(snapshot)

    optimizer = sgd(model)
    with (
        Monitor(model, optimizer, [Counting(schedule=8)], recorders=[memory]) as monitor,
        pytest.warns(MeasurementWarning, match="at least two parts of a batch"),
    ):
        for step in range(16):
            x, y = batch(step)
            with monitor.micro_batch(x[:1], y[:1]):  # single examples, nothing to compare
                F.cross_entropy(model(x[:1]), y[:1]).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    assert tries == [0, 1, 2, 3, 8, 9, 10, 11, 13]  # the last one was drawn for the next record
    assert [step for step, _ in memory.series("dynamics/noise/scale")] == [3, 11]
    assert all(math.isnan(value) for _, value in memory.series("dynamics/noise/scale"))


def test_a_probe_of_ones_own_serves_where_micro_batch_is_left_out():
    model, memory = network(), MemoryRecorder()
    optimizer = sgd(model)
    with Monitor(
        model, optimizer, [JacobianNorm(schedule=1)], recorders=[memory], probe=batch(3)[0], on_error="raise"
    ) as monitor:
        F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        monitor.before_step()
        optimizer.step()
    assert memory.latest()["dynamics/jacobian/frobenius_norm"].is_finite


# -- arguments -------------------------------------------------------------------------------------


def frozen():
    return network().requires_grad_(False)


class Loss:
    group = "loss"


BAD = {
    "no trainable parameters": (frozen, {}, "has no trainable parameter.*requires_grad_"),
    "probe empty": (network, {"probe": torch.zeros(0, 5)}, "at least one example.*x\\[:32\\]"),
    "probe without tensors": (network, {"probe": ()}, "must hold a tensor whose first dimension"),
    "probe not finite": (
        network,
        {"probe": torch.full((2, 5), torch.nan).double()},
        "inputs must be finite",
    ),
    "probe of the wrong shape": (
        network,
        {"probe": torch.zeros(2, 4).double()},
        r"cannot be called with the probe, got inputs of shape \[\[2, 4\]\].*probe=\(x, y\)",
    ),
    "probe on another device": (
        network,
        {"probe": torch.zeros(2, 5, device="meta")},
        r"one device, got inputs on meta, model on cpu\. Write x.to\('cpu'\)",
    ),
    "probe_size": (network, {"probe_size": 0}, "probe_size must be a whole number at least 1, got 0"),
    "prefix with a slash": (network, {"prefix": "a/b"}, "one word without a slash, got 'a/b'"),
    "prefix empty": (network, {"prefix": ""}, "one word without a slash, got ''"),
    "duplicate groups": (
        network,
        {"observables": [JacobianNorm(), JacobianNorm(schedule=3)]},
        r"same keys, got \['jacobian'\].*prefix=",
    ),
    "loss_reduction": (network, {"loss_reduction": "max"}, 'loss_reduction, got \'max\'.*"mean" or "sum"'),
    "on_error": (network, {"on_error": "ignore"}, 'on_error, got \'ignore\'.*"warn" or "raise"'),
    "budget zero": (
        network,
        {"budget": 0.0},
        "budget must be a number above 0 and below 1, got 0.0.*budget=0.05",
    ),
    "budget in per cent": (network, {"budget": 5}, "budget must be a number above 0 and below 1, got 5"),
    "name in place of an observable": (
        network,
        {"observables": ["ntk"]},
        r"must be Observable values, got 'ntk'.*NeuralTangentKernel\(\)",
    ),
    "class in place of an observable": (
        network,
        {"observables": [JacobianNorm]},
        "must be Observable values, got <class",
    ),
    "something else with a group": (network, {"observables": [Loss()]}, "must be Observable values"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_with_the_line_to_write(case):
    make, arguments, message = BAD[case]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=message):
        Monitor(model, optimizer, **arguments)
    assert not optimizer._optimizer_step_post_hooks


# -- budget ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Slow(Observable):
    """Takes a while."""

    group = "slow"
    quantities = {"one": Quantity("1", "One.")}

    def statistics(self, snapshot):
        began = gradiometer.engine.monitor.perf_counter()
        while gradiometer.engine.monitor.perf_counter() - began < 0.003:
            pass
        return {"one": torch.ones(())}

    def readings(self, now, reference):
        return {"one": now["one"]}


def budget_loop(budget, steps=40, state=None):
    model, memory = network(), MemoryRecorder()
    optimizer = sgd(model)
    observables = [Slow(schedule=1), JacobianNorm(schedule=at([0]))]
    with Monitor(model, optimizer, observables, recorders=[memory], budget=budget) as monitor:
        if state is not None:
            monitor.load_state_dict(state)
        for step in range(monitor.step, monitor.step + steps):
            x, y = batch(step)
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return [step for step, _ in memory.series("dynamics/slow/one")], monitor.state_dict()


def test_above_the_budget_the_cadence_doubles_and_the_state_remembers():
    with pytest.warns(CostWarning, match=r"above budget=0.01: slow is measured half as often") as caught:
        steps, state = budget_loop(0.01)
    assert len(caught) == 1
    gaps = [b - a for a, b in pairwise(steps)]
    assert gaps == sorted(gaps)
    stretch = state["observables"]["slow"]["stretch"]
    assert stretch >= 8
    assert stretch & (stretch - 1) == 0
    assert len(steps) < 12
    assert state["observables"]["jacobian"]["stretch"] == 1
    later, after = budget_loop(None, steps=3 * stretch, state=state)
    assert {b - a for a, b in pairwise(later)} == {stretch}
    assert after["observables"]["slow"]["stretch"] == stretch


def test_without_a_budget_the_cadence_stays():
    steps, state = budget_loop(None)
    assert steps == list(range(40))
    assert state["observables"]["slow"]["stretch"] == 1


def test_a_budget_that_holds_changes_nothing():
    class Patient(nn.Sequential):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)

    @dataclass(frozen=True, kw_only=True)
    class Quick(Seen):
        group = "quick"
        needs = frozenset()

        def statistics(self, snapshot):
            return {"one": torch.ones(())}

    memory = loop([Quick(schedule=2)], model=Patient(*network()), steps=12, budget=0.5)
    assert [step for step, _ in memory.records] == list(range(0, 12, 2))


# -- what the engine tells -------------------------------------------------------------------------


def test_prefix_groups_and_group_names_are_in_the_keys():
    def make(model):
        layers = [{"params": model[0].parameters(), "name": "body"}, {"params": model[2].parameters()}]
        return torch.optim.SGD(layers, lr=0.1)

    memory = loop([FluctuationDissipation(schedule=1)], make=make, steps=4, prefix="physics")
    keys = set(memory.latest())
    assert {"physics/fdr/ratio", "physics/fdr/ratio/body", "physics/fdr/ratio/1"} <= keys
    assert {key.split("/")[0] for key in keys} == {"physics"}


def test_take_new_gives_each_reading_once():
    model = network()
    optimizer = sgd(model)
    with Monitor(model, optimizer, [JacobianNorm(schedule=1)]) as monitor:
        x, y = batch(0)
        with monitor.micro_batch(x, y):
            F.cross_entropy(model(x), y).backward()
        monitor.before_step()
        assert monitor.take_new() == []
        optimizer.step()
        keys = {reading.key for reading in monitor.take_new()}
        assert "dynamics/jacobian/frobenius_norm" in keys
        assert monitor.take_new() == []
        assert "frobenius_norm" in monitor.table()


def test_batches_may_be_mappings():
    model, memory = network(), MemoryRecorder()
    optimizer = sgd(model)
    with Monitor(
        model,
        optimizer,
        [GradientNoiseScale(schedule=1), JacobianNorm()],
        recorders=[memory],
        on_error="raise",
    ) as monitor:
        for step in range(2):
            x, y = batch(step)
            monitor.begin_batch({"picture": x, "label": y}, "picture")
            F.cross_entropy(model(x), y).backward()
            monitor.end_micro_batch()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(monitor.state_dict()["probe"]["targets"], batch(0)[1])
    assert len(memory.series("dynamics/noise/trace")) == 2


@pytest.mark.parametrize(
    ("version", "advice"), [(3, "install .* gradiometer 0.1.0"), (4, "that wrote it"), (6, "that wrote it")]
)
def test_a_state_of_another_version_begins_anew(version, advice):
    model = network()
    with Monitor(model, sgd(model)) as monitor:
        state = {"version": version, "step": 7, "whatever": {"it": "holds"}}
        with pytest.warns(MeasurementWarning, match=f"state of version {version}, .* begins anew.*{advice}"):
            monitor.load_state_dict(state)
        assert monitor.step == 7


def test_a_state_with_other_observables_is_taken_as_far_as_it_goes():
    model = network()
    with Monitor(model, sgd(model), [JacobianNorm()]) as monitor:
        state = monitor.state_dict()
    with (
        Monitor(model, sgd(model), [GradientNoiseScale()]) as other,
        pytest.warns(MeasurementWarning, match=r"also holds \['jacobian'\]"),
    ):
        other.load_state_dict(state)


def test_a_schedule_that_thins_out_counts_with_its_present_cadence():
    """Else the first steps of a log-spaced schedule would be charged to the whole run."""
    ledger = CostLedger()
    for step in range(1001):
        due = step in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
        if due:
            ledger.spent("ntk", step, 5.0)
        ledger.step_done(1.0, 5.0 if due else 0.0)
    assert ledger.shares()["ntk"] == pytest.approx(5 / 500)
    assert "1 % of the loop" in ledger.describe()["ntk"]
    for _ in range(5000):  # it was left out
        ledger.step_done(1.0, 0.0)
    assert "0.1 % of the loop" in ledger.describe()["ntk"]
