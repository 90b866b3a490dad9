"""A drift of the settings goes on in the same window, a jump begins another one."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from gradiometer import FluctuationDissipation, HalfRun, Mean, MemoryRecorder, Monitor
from gradiometer.engine.changes import Settings


def sgd(**settings):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], **({"lr": 0.1} | settings))


def seen(optimizer, batch=8):
    """Settings that know one step of this optimizer."""
    settings = Settings()
    assert not settings.jumped(optimizer, batch)
    return settings


def change(optimizer, **values):
    optimizer.param_groups[0].update(values)


# -- rates and momenta -----------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "jump"), [(1.009, False), (0.991, False), (1.011, True), (0.989, True)])
def test_a_rate_that_moves_by_one_per_cent_jumps(factor, jump):
    optimizer = sgd()
    settings = seen(optimizer)
    change(optimizer, lr=0.1 * factor)
    assert settings.jumped(optimizer, 8) is jump
    assert (settings.changed, settings.drifts) == (True, 1)
    assert not settings.jumped(optimizer, 8)
    assert (settings.changed, settings.drifts) == (False, 1)


def test_a_rate_that_was_zero_jumps_whatever_it_becomes():
    optimizer = sgd(lr=0.0)
    settings = seen(optimizer)
    change(optimizer, lr=1e-9)
    assert settings.jumped(optimizer, 8)


@pytest.mark.parametrize(
    ("kind", "before", "after", "jump"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum": 0.8}, True),
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum": 0.9005}, False),
        # the memory of the buffer, 1 / (1 - momentum), doubles
        (torch.optim.SGD, {"momentum": 0.99}, {"momentum": 0.995}, True),
        (torch.optim.SGD, {"momentum": 0.9}, {"nesterov": True}, True),
        (torch.optim.SGD, {"momentum": 0.9}, {"dampening": 0.5}, True),
        (torch.optim.SGD, {"weight_decay": 0.1}, {"weight_decay": 0.0}, True),
        (torch.optim.SGD, {"weight_decay": 0.1}, {"weight_decay": 0.1005}, False),
        (torch.optim.SGD, {}, {"weight_decay": 1e-9}, True),
        (torch.optim.AdamW, {}, {"betas": (0.9, 0.9995)}, True),
        (torch.optim.AdamW, {}, {"betas": (0.8995, 0.999)}, False),
        (torch.optim.RMSprop, {}, {"alpha": 0.9}, True),
    ],
)
def test_momentum_decay_and_averages_drift_or_jump(kind, before, after, jump):
    optimizer = kind([torch.zeros(1, requires_grad=True)], lr=0.1, **before)
    settings = seen(optimizer)
    change(optimizer, **after)
    assert settings.jumped(optimizer, 8) is jump
    assert settings.changed
    assert not settings.jumped(optimizer, 8)


def test_a_group_more_is_a_jump():
    optimizer = sgd()
    settings = seen(optimizer)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    assert settings.jumped(optimizer, 8)
    assert not settings.jumped(optimizer, 8)
    optimizer.param_groups[1]["lr"] = 0.05
    assert settings.jumped(optimizer, 8)


def test_a_rate_in_a_tensor_is_read():
    rate = torch.tensor(0.1)
    optimizer = sgd(lr=rate)
    settings = seen(optimizer)
    rate.mul_(1.005)
    assert not settings.jumped(optimizer, 8)
    assert (settings.changed, settings.drifts) == (True, 1)
    rate.mul_(0.5)
    assert settings.jumped(optimizer, 8)


def test_a_rate_on_a_device_is_not_waited_for():
    optimizer = sgd()
    change(optimizer, lr=torch.zeros((), device="meta"))  # cannot be read at all
    settings = seen(optimizer)
    assert not settings.jumped(optimizer, 8)
    assert settings.changed  # as far as anyone knows


# -- batches ---------------------------------------------------------------------------------------


def jumps(batches):
    """The positions at which the batch jumps."""
    settings, optimizer = Settings(), sgd()
    return [step for step, batch in enumerate(batches) if settings.jumped(optimizer, batch)]


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([8, 8, 8, 3, 8, 8, 8, 3, 8], []),  # the last one of an epoch
        ([8, 3, 8, 3, 8, 3], []),  # epochs of two steps
        ([8, 8, 16, 16, 16, 16, 16], [4]),  # from its third step on
        ([8, 8, 16, 16, 8, 16, 16, 8], []),
        ([8, 16, 16, 16, 8, 8, 8], [3, 6]),
        ([0, 0, 8, 8, 0, 8], []),  # unknown, before micro_batch was called
        ([8, 7, 9, 6, 11, 7, 9, 10], []),  # batches of some number of tokens
    ],
)
def test_only_a_lasting_change_of_the_batch_is_a_jump(batches, expected):
    assert jumps(batches) == expected


def test_the_usual_batch_is_known():
    settings, optimizer = Settings(), sgd()
    for batch, usual in [(8, 8), (8, 8), (3, 8), (8, 8), (16, 8), (16, 8), (16, 16)]:
        settings.jumped(optimizer, batch)
        assert settings.batch == usual


# -- the state -------------------------------------------------------------------------------------


def test_the_state_goes_on_where_it_was():
    steps = [(0.1, 8), (0.1005, 8), (0.1, 16), (0.1, 16), (0.1, 16), (0.05, 16), (0.0501, 16)]
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

    def play(settings, some):
        found = []
        for rate, batch in some:
            change(optimizer, lr=np.float64(rate))  # as LambdaLR may leave it
            found.append((settings.jumped(optimizer, batch), settings.drifts, settings.batch))
        return found

    whole = play(Settings(), steps)
    assert [jumped for jumped, *_ in whole] == [False, False, False, False, True, True, False]
    for stop in range(1, len(steps)):
        old, new, buffer = Settings(), Settings(), io.BytesIO()
        play(old, steps[:stop])
        torch.save(old.state_dict(), buffer)
        buffer.seek(0)
        new.load_state_dict(torch.load(buffer, weights_only=True))
        assert play(new, steps[stop:]) == whole[stop:]


# -- through the monitor ---------------------------------------------------------------------------


def train(scheduler, observable, *, steps=120, resume_at=None, batch=lambda step: 6, **settings):
    """A plain loop under a scheduler; the record, and per step the squared update and <theta . g>."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, **({"lr": 0.1, "weight_decay": 0.05} | settings))
    schedule, memory = scheduler(optimizer), MemoryRecorder()
    generator = torch.Generator().manual_seed(1)
    work, squares, norms = [], [], []

    def flat(tensors):
        return torch.cat([t.detach().reshape(-1) for t in tensors])

    monitor = Monitor(model, optimizer, [observable], recorders=[memory], on_error="raise")
    for step in range(steps):
        if step == resume_at:
            state = monitor.state_dict()
            monitor.close()
            monitor = Monitor(model, optimizer, [observable], recorders=[memory], on_error="raise")
            monitor.load_state_dict(state)
        x = torch.randn(batch(step), 5, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (len(x),), generator=generator)
        with monitor.micro_batch(x, y):
            F.cross_entropy(model(x), y).backward()
        monitor.before_step()
        before = flat(parameters)
        used = flat([p.grad for p in parameters]) + optimizer.param_groups[0]["weight_decay"] * before
        optimizer.step()
        work.append(float(before @ used))
        squares.append(float((before - flat(parameters)).square().sum()))
        norms.append(float(flat(parameters).square().sum()))
        optimizer.zero_grad()
        schedule.step()
    monitor.close()
    return memory, np.array(work), np.array(squares), norms


def series(memory, name):
    return dict(memory.series(f"dynamics/fdr/{name}"))


def verified(**arguments):
    return FluctuationDissipation(schedule=10, verify=True, **({"estimator": Mean()} | arguments))


def test_the_window_begins_anew_after_a_drop_of_the_rate():
    memory, work, squares, _ = train(lambda o: StepLR(o, 55, gamma=0.2), verified(), steps=101)
    ratio, residual = series(memory, "ratio"), series(memory, "residual")
    # the first record after the drop at step 55 only begins a window
    assert sorted(ratio) == sorted(residual) == [10, 20, 30, 40, 50, 70, 80, 90, 100]
    assert max(map(abs, residual.values())) < 1e-12
    for step, value in ratio.items():
        start, lr = (1, 0.1) if step < 55 else (61, 0.02)
        own = slice(start, step + 1)
        assert value == pytest.approx(2 * lr * work[own].mean() / squares[own].mean(), rel=1e-9)


def test_a_drop_is_remembered_in_the_state():
    scheduler, arguments = (lambda o: StepLR(o, 55, gamma=0.2)), {"steps": 101}
    whole, *_ = train(scheduler, verified(), **arguments)
    for resume_at in (54, 55, 56, 63):
        resumed, *_ = train(scheduler, verified(), resume_at=resume_at, **arguments)
        assert series(resumed, "ratio") == series(whole, "ratio")


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_the_window_begins_anew_after_a_drop_with_momentum(settings):
    memory, work, *_ = train(lambda o: StepLR(o, 55, gamma=0.2), verified(), steps=101, **settings)
    assert max(map(abs, series(memory, "residual").values())) < 1e-12
    assert series(memory, "left")[50] == pytest.approx(work[1:51].mean(), rel=1e-9)
    assert series(memory, "left")[100] == pytest.approx(work[61:101].mean(), rel=1e-9)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
def test_under_a_cosine_the_identity_holds_and_nothing_is_decided(settings):
    memory, *_ = train(lambda o: CosineAnnealingLR(o, 1000), verified(), steps=201, **settings)
    assert sorted(series(memory, "residual")) == list(range(10, 201, 10))  # no window was cut
    assert max(map(abs, series(memory, "residual").values())) < 1e-12
    reading = memory.latest()["dynamics/fdr/stationary"]
    assert math.isnan(reading.value)
    assert not reading.resolved
    assert reading.note.endswith("; the learning rate changes")


def test_a_rate_that_is_back_at_every_record_has_moved_all_the_same():
    def scheduler(optimizer):
        return LambdaLR(optimizer, lambda step: 1 + 0.009 * abs(5 - step % 10))  # by less than 1 % per step

    memory, *_ = train(scheduler, verified(), steps=101, momentum=0.9)
    assert sorted(series(memory, "residual")) == list(range(10, 101, 10))
    assert max(map(abs, series(memory, "residual").values())) < 1e-12
    assert memory.latest()["dynamics/fdr/stationary"].note.endswith("; the learning rate changes")


@pytest.mark.parametrize("cycle_momentum", [False, True])
def test_one_cycle_is_a_drift_of_the_momentum_too(cycle_momentum):
    def scheduler(optimizer):
        return OneCycleLR(
            optimizer, 0.1, total_steps=4000, div_factor=2, cycle_momentum=cycle_momentum, pct_start=0.5
        )

    memory, *_ = train(scheduler, verified(), steps=101, momentum=0.9)
    assert sorted(series(memory, "residual")) == list(range(10, 101, 10))
    assert max(map(abs, series(memory, "residual").values())) < 1e-12


def test_a_warm_up_is_over_once_it_has_left_the_window():
    def scheduler(optimizer):
        return LambdaLR(optimizer, lambda step: min(1.0, 0.8 + step / 200))  # 0.5 to 0.6 % per step

    memory, *_ = train(scheduler, verified(estimator=HalfRun()), steps=401)
    notes = {
        step: reading.note.rpartition("; ")[2]
        for step, readings in memory.records
        for reading in readings
        if reading.key == "dynamics/fdr/stationary"
    }
    assert notes[60] == "the learning rate changes"
    assert "the learning rate changes" not in notes[400]
    assert max(map(abs, series(memory, "residual").values())) < 1e-12


def test_a_rate_in_a_tensor_that_drops_begins_the_window_anew():
    class Halving:
        def __init__(self, optimizer):
            self.optimizer, self.calls = optimizer, 0

        def step(self):
            self.calls += 1
            if self.calls == 55:
                self.optimizer.param_groups[0]["lr"].mul_(0.2)

    rate = torch.tensor(0.1, dtype=torch.float64)
    memory, work, squares, _ = train(Halving, verified(), steps=101, lr=rate)
    assert max(map(abs, series(memory, "residual").values())) < 1e-12
    own = slice(61, 101)
    expected = 2 * 0.02 * work[own].mean() / squares[own].mean()
    assert series(memory, "ratio")[100] == pytest.approx(expected, rel=1e-9)


def test_a_larger_batch_begins_the_window_anew_and_a_short_one_does_not():
    def ratios(batch):
        memory, work, squares, _ = train(lambda o: StepLR(o, 1000), verified(), steps=101, batch=batch)
        mean = [work[start:101].mean() / squares[start:101].mean() * 0.2 for start in (1, 61)]
        return series(memory, "ratio")[100], *mean

    ratio, whole, _ = ratios(lambda step: 3 if step % 7 == 6 else 6)
    assert ratio == pytest.approx(whole, rel=1e-9)
    ratio, whole, new = ratios(lambda step: 6 if step < 55 else 12)
    assert ratio == pytest.approx(new, rel=1e-9)
    assert ratio != pytest.approx(whole, rel=1e-3)
