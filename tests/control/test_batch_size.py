"""NoiseScaleBatchSize: when it doubles the batch, when it refuses and why, and how the batch really grows."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from gradiometer import (
    EquilibriumLR,
    GradientNoiseScale,
    GrowingBatchSampler,
    MemoryRecorder,
    Monitor,
    NoiseScaleBatchSize,
)
from gradiometer.collect.snapshot import GroupSettings
from gradiometer.control.base import View
from gradiometer.errors import InputError, MeasurementWarning
from gradiometer.record.readings import Reading

nan = math.nan


def view(step, scale, low, *, batch=10, parts=1, size=100_000, resolved=True, sgd=True, lr=0.1):
    reading = Reading("dynamics/noise/scale", scale, 1.0, low=low, resolved=resolved)
    group = GroupSettings("0", lr, 0.0, 0.0, False, 0.0, sgd)
    return View(
        step,
        {"noise/scale": reading},
        [group],
        [lr],
        batch_size=batch,
        micro_batches=parts,
        dataset_size=size,
    )


def play(controller, views):
    state, made, told = controller.start(), [], []
    for one in views:
        decisions, state, message = controller.decide(one, state)
        made += decisions
        told.append(message)
    return made, state, told


def sampler(size=8, examples=640):
    return GrowingBatchSampler(RandomSampler(TensorDataset(torch.zeros(examples))), size, drop_last=True)


def test_it_doubles_at_the_third_check_in_a_row():
    made, state, told = play(NoiseScaleBatchSize(), [view(t, 100.0, 50.0, parts=2) for t in range(3)])
    assert [decision.factor for decision in made] == [1.0, 1.0, 2.0]
    assert made[0].reason == "called for at 1 of the 3 checks in a row that are asked for"
    assert (made[2].before, made[2].after, made[2].knob) == (10.0, 20.0, "batch_size")
    assert NoiseScaleBatchSize().effect(state).accumulation == 4  # twice the two micro-batches
    assert NoiseScaleBatchSize().effect(state).factors == {"": 1.0}
    assert told == ["", "", ""]


def test_a_check_that_calls_for_less_begins_the_count_anew():
    calls = [(100.0, 50.0), (100.0, 50.0), (15.0, 12.0), (100.0, 50.0), (100.0, 50.0), (100.0, 50.0)]
    made, *_ = play(NoiseScaleBatchSize(), [view(t, *pair) for t, pair in enumerate(calls)])
    assert [decision.factor for decision in made] == [1.0] * 5 + [2.0]
    assert made[2].reason == "the noise scale calls for no more than 1.5 times the batch"


def test_an_unresolved_check_neither_counts_nor_begins_the_count_anew():
    unknown = partial(view, scale=nan, low=50.0, resolved=False)
    calls = partial(view, scale=100.0, low=50.0)
    views = [calls(0), unknown(1), calls(2), unknown(3), unknown(4), calls(5)]
    made, *_ = play(NoiseScaleBatchSize(), views)
    assert [decision.factor for decision in made] == [1.0] * 5 + [2.0]


def test_an_estimate_that_is_not_resolved_never_acts():
    views = [
        view(0, 1000.0, 500.0, resolved=False),
        view(1, nan, 500.0, resolved=False),
        view(2, math.inf, 500.0),
        view(3, 1000.0, 9.0),
        view(4, 1000.0, nan),
    ]
    made, state, _ = play(NoiseScaleBatchSize(patience=1), views)
    assert not any(decision.acted for decision in made)
    assert made[0].reason == "the noise scale is not resolved"
    assert made[3].reason == "the lower end of the noise scale's interval is not above the batch"
    assert NoiseScaleBatchSize().effect(state).accumulation is None


def test_a_tenth_of_the_data_and_the_users_limit_hold():
    for controller, size in (
        (NoiseScaleBatchSize(patience=1), 199),
        (NoiseScaleBatchSize(patience=1, max_batch_size=19), None),
        (NoiseScaleBatchSize(patience=1, max_batch_size=19), 100_000),
    ):
        made, *_ = play(controller, [view(0, 1e4, 1e3, size=size)])
        assert not made[0].acted
        assert "above its limit of" in made[0].reason
    assert play(NoiseScaleBatchSize(patience=1), [view(0, 1e4, 1e3, size=200)])[0][0].acted
    assert play(NoiseScaleBatchSize(patience=1, max_batch_size=20), [view(0, 1e4, 1e3, size=None)])[0][
        0
    ].acted


def test_kappa_moves_the_aim():
    seen = view(0, 40.0, 30.0)
    assert play(NoiseScaleBatchSize(patience=1, kappa=0.5), [seen])[0][0].acted
    assert not play(NoiseScaleBatchSize(patience=1, kappa=0.3), [seen])[0][0].acted  # 12 < 15
    assert not play(NoiseScaleBatchSize(patience=1, kappa=0.4), [view(0, 40.0, 24.0)])[0][0].acted  # 9.6 < 10


def test_the_best_rate_for_twice_the_batch():
    """arXiv:1812.06162, eq. 2.7: eps(B) = eps_max / (1 + B_noise / B)."""
    made, state, _ = play(NoiseScaleBatchSize(patience=1, learning_rate="optimal"), [view(0, 40.0, 30.0)])
    best = (1 / (1 + 40 / 20)) / (1 / (1 + 40 / 10))
    assert [decision.knob for decision in made] == ["batch_size", "learning_rate"]
    assert made[1].factor == pytest.approx(best)
    assert state["factor"] == pytest.approx(best)
    adam = view(0, 40.0, 30.0, sgd=False)
    made, *_ = play(NoiseScaleBatchSize(patience=1, learning_rate="optimal"), [adam])
    assert made[1].factor == pytest.approx(math.sqrt(best))


def test_the_noise_of_sgd_stays_the_same_where_the_rate_doubles_too():
    made, state, _ = play(NoiseScaleBatchSize(patience=1, learning_rate="noise"), [view(0, 40.0, 30.0)])
    assert (made[1].factor, made[1].before, made[1].after) == (2.0, 0.1, 0.2)
    assert NoiseScaleBatchSize().effect(state).factors == {"": 2.0}


def test_a_change_that_the_loop_does_not_take_up_is_not_repeated():
    views = [view(t, 1e3, 500.0) for t in range(3)] + [view(3, 1e3, 500.0, batch=20, parts=2)]
    made, state, told = play(NoiseScaleBatchSize(patience=1), views)
    assert [decision.acted for decision in made] == [True, False, False, True]
    assert made[1].reason == "the batch is not yet the 20 examples asked for"
    assert [("read monitor.accumulation" in text) for text in told] == [False, False, True, False]
    assert state["accumulation"] == 4
    with_sampler = NoiseScaleBatchSize(patience=1, sampler=sampler())
    assert "batch_sampler=" in play(with_sampler, views[:3])[2][2]


def test_what_another_way_of_growing_asked_for_is_not_waited_for():
    _, state, _ = play(NoiseScaleBatchSize(patience=1, sampler=sampler()), [view(0, 1e3, 500.0)])
    made, *_ = NoiseScaleBatchSize(patience=1).decide(view(1, 1e3, 500.0), state)
    assert made[0].acted


def test_a_short_last_window_is_not_taken_for_the_usual_one():
    made, *_ = play(NoiseScaleBatchSize(patience=1), [view(0, 1e3, 500.0, parts=0)])
    assert made[0].reason == "this step's batch is not of the usual size"
    made, *_ = play(NoiseScaleBatchSize(patience=1, sampler=sampler()), [view(0, 1e3, 500.0, parts=0)])
    assert made[0].acted


def test_a_loop_that_does_not_say_its_batches_is_refused():
    made, *_ = play(NoiseScaleBatchSize(patience=1), [view(0, 1e3, 500.0, batch=0)])
    assert "monitor.micro_batch" in made[0].reason


def test_a_dry_run_follows_the_rate_there_would_be():
    dry = NoiseScaleBatchSize(patience=1, dry_run=True, sampler=sampler(), learning_rate="noise")
    made, *_ = play(dry, [view(t, 50.0, 40.0) for t in range(2)])
    assert [d.before for d in made if d.knob == "learning_rate"] == [0.1, 0.2]


def test_a_dry_run_goes_on_from_the_batch_there_would_be():
    made, _, told = play(
        NoiseScaleBatchSize(patience=1, dry_run=True, sampler=sampler()),
        [view(t, 50.0, 40.0) for t in range(4)],
    )
    assert [(d.before, d.wanted, d.acted) for d in made] == [
        (10.0, True, False),
        (20.0, True, False),
        (40.0, False, False),
        (40.0, False, False),
    ]
    assert set(told) == {""}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kappa": 0.0}, "kappa must be a number above 0"),
        ({"learning_rate": "linear"}, "unknown learning_rate"),
        ({"check_every": 0}, "check_every must be"),
        ({"patience": 1.5}, "patience must be"),
        ({"max_batch_size": -2}, "max_batch_size must be"),
        ({"kappa": "1"}, "kappa must be a number"),
        ({"dry_run": 1}, "dry_run must be True or False"),
        (
            {"sampler": RandomSampler(TensorDataset(torch.zeros(3)))},
            "must be the loader's GrowingBatchSampler",
        ),
    ],
)
def test_settings_that_no_run_can_use(settings, message):
    with pytest.raises(InputError, match=message):
        NoiseScaleBatchSize(**settings)


def network():
    torch.manual_seed(0)
    net = nn.Linear(64, 2)
    return net, torch.optim.SGD(net.parameters(), lr=1e-4)


def test_a_stream_without_length_needs_a_limit():
    with pytest.raises(InputError, match="max_batch_size=1024"):
        Monitor(*network(), controllers=[NoiseScaleBatchSize()])
    Monitor(*network(), controllers=[NoiseScaleBatchSize(max_batch_size=64)])
    Monitor(*network(), controllers=[NoiseScaleBatchSize()], dataset_size=1000)


def test_one_knob_for_one_controller():
    both = [EquilibriumLR(), NoiseScaleBatchSize(learning_rate="noise")]
    with pytest.raises(InputError, match="the learning rate, got EquilibriumLR and NoiseScaleBatchSize"):
        Monitor(*network(), controllers=both, dataset_size=100)
    with pytest.raises(InputError, match="the batch size"):
        Monitor(*network(), controllers=[NoiseScaleBatchSize(), NoiseScaleBatchSize()], dataset_size=100)
    Monitor(*network(), controllers=[EquilibriumLR(), NoiseScaleBatchSize()], dataset_size=100)


def test_a_loader_with_another_sampler_is_refused():
    data = TensorDataset(torch.zeros(640))
    ours = sampler()
    NoiseScaleBatchSize(sampler=ours).check_loader(DataLoader(data, batch_sampler=ours))
    with pytest.raises(InputError, match="does not draw its batches from the sampler"):
        NoiseScaleBatchSize(sampler=ours).check_loader(DataLoader(data, batch_size=8))
    NoiseScaleBatchSize().check_loader(DataLoader(data, batch_size=8))
    for several in ([DataLoader(data, batch_sampler=ours)], {"a": DataLoader(data, batch_sampler=ours)}):
        with pytest.raises(InputError, match="acts on one training loader, got"):
            NoiseScaleBatchSize(sampler=ours).check_loader(several)


# -- in a loop -------------------------------------------------------------------------------------


def noisy_data(examples=4096):
    """Many inputs that say nothing: much noise about a gradient that lasts, so a large noise scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 64, generator=generator)
    y = (x[:, 0] + torch.randn(examples, generator=generator) > 0).long()
    return TensorDataset(x, y)


def eager(**more):
    return NoiseScaleBatchSize(check_every=10, patience=2, max_batch_size=64, **more)


class Loop:
    """A plain loop that accumulates as often as it is told."""

    def __init__(self, controller, workers=0):
        self.data = noisy_data()
        self.net, self.optimizer = network()
        self.memory = MemoryRecorder()
        self.controller = controller
        self.monitor = Monitor(
            self.net,
            self.optimizer,
            [GradientNoiseScale(schedule=5, sampling=1)],
            controllers=[controller],
            recorders=[self.memory],
            dataset_size=len(self.data),
        )
        generator = torch.Generator().manual_seed(1)
        if controller.sampler is None:
            self.loader = DataLoader(self.data, 8, shuffle=True, generator=generator)
        else:
            controller.sampler.sampler.generator = generator
            self.loader = DataLoader(self.data, batch_sampler=controller.sampler, num_workers=workers)
        self.sizes = []

    def run(self, steps):
        parts, size, done = 0, 0, 0
        while True:
            for x, y in self.loader:
                wanted = self.monitor.accumulation or 1
                with self.monitor.micro_batch(x, y):
                    (F.cross_entropy(self.net(x), y) / wanted).backward()
                parts, size = parts + 1, size + len(x)
                if parts < wanted:
                    continue
                self.monitor.before_step()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.sizes.append(size)
                parts, size, done = 0, 0, done + 1
                if done == steps:
                    return self


@pytest.mark.slow
@pytest.mark.parametrize("way", ["accumulation", "sampler", "workers"])
def test_the_true_batch_grows_and_is_reported(way):
    grows = None if way == "accumulation" else sampler(8, 4096)
    loop = Loop(eager(sampler=grows), workers=2 if way == "workers" else 0).run(240)
    changes = [decision for decision in loop.monitor.decisions if decision.acted]
    assert [decision.after for decision in changes] == [16.0, 32.0, 64.0]
    assert sorted(set(loop.sizes)) == [8, 16, 32, 64]
    assert loop.sizes == sorted(loop.sizes)
    reported = dict(loop.memory.series("dynamics/control/batch_size"))
    assert all(loop.sizes[step] == size for step, size in reported.items())
    late = 4 if way == "workers" else 0  # batches drawn in advance
    for decision in changes:
        assert loop.sizes[decision.step] == decision.before
        assert loop.sizes[decision.step + 1 + late] == decision.after
    refusals = [decision.reason for decision in loop.monitor.decisions if not decision.acted]
    assert "the batch would be above its limit of 64" in refusals


@pytest.mark.slow
def test_the_noise_scale_itself_does_not_depend_on_the_batch():
    grown, fixed = (
        Loop(eager(sampler=sampler(8, 4096))).run(300),
        Loop(eager(sampler=sampler(8, 4096), dry_run=True)),
    )
    fixed.run(1200)
    ours, theirs = (one.memory.latest()["dynamics/noise/trace"] for one in (grown, fixed))
    assert ours.value == pytest.approx(theirs.value, rel=0.1)
    assert set(fixed.sizes) == {8}


def test_a_loop_that_does_not_listen_is_told_once():
    loop = Loop(eager())
    data = iter(DataLoader(loop.data, 8))
    with pytest.warns(MeasurementWarning, match="asked for a batch of 16, and it is still 8") as caught:
        for _ in range(200):
            x, y = next(data)
            with loop.monitor.micro_batch(x, y):
                F.cross_entropy(loop.net(x), y).backward()
            loop.monitor.before_step()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert len(caught) == 1
    assert sum(decision.acted for decision in loop.monitor.decisions) == 1


@pytest.mark.parametrize("way", ["accumulation", "sampler"])
def test_stopped_and_resumed_the_batch_is_what_it_was(way):
    def controller():
        return eager(sampler=sampler(8, 4096) if way == "sampler" else None, learning_rate="optimal")

    first = Loop(controller()).run(120)
    second = Loop(controller())
    second.net.load_state_dict(first.net.state_dict())
    second.monitor.load_state_dict(first.monitor.state_dict())
    assert second.monitor.decisions == first.monitor.decisions
    assert second.monitor.accumulation == first.monitor.accumulation
    if way == "sampler":
        assert second.controller.sampler.batch_size == first.controller.sampler.batch_size > 8
    else:
        assert second.monitor.accumulation > 1
    second.run(20)
    assert second.sizes[0] == first.sizes[-1]
    factor = dict(second.memory.series("dynamics/control/lr_factor"))[120]
    assert factor == math.prod(d.factor for d in first.monitor.decisions if d.knob == "learning_rate") > 1.0
