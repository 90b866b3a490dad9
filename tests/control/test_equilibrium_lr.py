"""EquilibriumLR: when it lowers the rate, when it refuses and why; on made-up readings, then on digits."""

import math
import warnings
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from gradiometer import EquilibriumLR, FluctuationDissipation, MemoryRecorder, Monitor
from gradiometer.collect.sections import Section
from gradiometer.collect.snapshot import GroupSettings
from gradiometer.control.base import View
from gradiometer.errors import InputError, MeasurementWarning
from gradiometer.record.readings import Reading

nan = math.nan


def reading(key, value, **more):
    known = not math.isnan(value)
    note = "SGD form; the window holds fewer than 10 records" if not known else "SGD form"
    return Reading(f"dynamics/{key}", value, 0.01, resolved=known, note=note, **more)


def view(step, stationary=1.0, ratio=1.0, *, schedule=(0.1,), decay=(0.01,), factors=None, **ends):
    """One check with these readings; ``ends`` gives those of sections by name."""
    keys = {"": (ratio, stationary)} | {f"/{name}": pair for name, pair in ends.items()}
    readings = {}
    for end, (left_over_right, settled) in keys.items():
        readings[f"fdr/ratio{end}"] = reading(f"fdr/ratio{end}", left_over_right)
        readings[f"fdr/stationary{end}"] = reading(f"fdr/stationary{end}", settled)
    groups = [
        GroupSettings(str(i), rate * (factors or [1.0] * len(schedule))[i], 0.0, 0.0, False, wd, True)
        for i, (rate, wd) in enumerate(zip(schedule, decay, strict=True))
    ]
    sections = [Section(name, int(name[0]), 1) for name in ends]
    return View(step, readings, groups, list(schedule), sections, batch_size=10, dataset_size=10_000)


def play(controller, views):
    """The decisions on a series of checks, and what the user was told."""
    state, made, told = controller.start(), [], []
    for one in views:
        decisions, state, message = controller.decide(one, state)
        made += decisions
        told.append(message)
    return made, state, told


def reasons(controller, views):
    return [decision.reason for decision in play(controller, views)[0]]


def test_the_robust_rule_waits_for_two_checks_in_a_row():
    made, state, told = play(EquilibriumLR(), [view(t) for t in (0, 1, 2)])
    assert [decision.factor for decision in made] == [1.0, 0.1, 1.0]
    assert made[0].reason == "settled at 1 of the 2 checks in a row that are asked for"
    assert made[1].before == 0.1
    assert made[1].after == 0.01
    assert made[1].acted
    assert made[1].read["fdr/ratio"] == (1.0, 0.01)
    assert "tolerance 0.05" in made[1].rule
    assert EquilibriumLR().effect(state).factors == {"": 0.1}
    assert told == ["", "", ""]


def test_a_check_that_is_not_stationary_begins_the_count_anew():
    made, *_ = play(
        EquilibriumLR(), [view(t, settled) for t, settled in enumerate([1, 0.0, 1.0, nan, 1.0, 1.0])]
    )
    assert [decision.factor for decision in made] == [1.0] * 5 + [0.1]
    assert made[1].reason == "the run is still on its way"
    assert made[3].reason == "the window holds fewer than 10 records"


def test_yaida_fires_at_one_check_by_the_ratio_alone():
    controller = EquilibriumLR(policy="yaida", tolerance=0.05, factor=0.5)
    made, state, _ = play(controller, [view(t, 0.0, r) for t, r in enumerate([1.06, 0.94, 1.04, 0.96, nan])])
    assert [decision.factor for decision in made] == [1.0, 1.0, 0.5, 0.5, 1.0]
    assert controller.effect(state).factors == {"": 0.25}
    assert made[-1].reason == "fdr/ratio is not known yet"


def test_sasa_takes_the_answer_of_its_own_test():
    controller = EquilibriumLR(policy="sasa")
    (need,) = controller.observables()
    assert need.test == "sasa"
    assert [d.factor for d in play(controller, [view(0, 0.0), view(1, 1.0)])[0]] == [1.0, 0.1]


def test_the_next_check_is_an_epoch_away_and_at_least_200_steps():
    assert play(EquilibriumLR(), [view(50)])[1]["next"] == 50 + 1000  # 10,000 examples in batches of 10
    assert play(EquilibriumLR(check_every=7), [view(50)])[1]["next"] == 57
    short = View(50, {}, view(0).groups, [0.1], batch_size=100, dataset_size=10_000)
    assert play(EquilibriumLR(), [short])[1]["next"] == 250
    stream = View(50, {}, view(0).groups, [0.1], batch_size=100)
    assert play(EquilibriumLR(), [stream])[1]["next"] == 1050
    assert EquilibriumLR(warmup_steps=700).start()["next"] == 700
    assert EquilibriumLR().start()["next"] == 200
    assert EquilibriumLR(check_every=9).start()["next"] == 9


def test_guards_say_what_holds_them():
    controller = EquilibriumLR(patience=1, max_drops=2)
    assert reasons(controller, [view(t) for t in range(3)])[-1].endswith("2 times, max_drops")
    controller = EquilibriumLR(patience=1, min_lr=0.02)
    made, *_ = play(controller, [view(0)])
    assert made[0].reason == "the rate would fall below min_lr = 0.02"
    assert not made[0].acted
    for rate in (0.1, 3e-4, 6e-4, 0.7):  # a tenth of it is not below a tenth, whatever the rounding
        lowest = EquilibriumLR(patience=1, min_lr=rate / 10)
        assert play(lowest, [view(0, schedule=(rate,))])[0][0].acted
    assert play(EquilibriumLR(patience=1, min_lr=3e-5), [view(0, schedule=(3e-4,))])[0][0].acted


def test_groups_that_do_not_move_neither_block_nor_count():
    still = partial(view, schedule=(0.0, 0.1), decay=(0.01, 0.01))
    made, *_ = play(EquilibriumLR(patience=1, min_lr=0.01), [still(0)])
    assert (made[0].before, made[0].acted) == (0.1, True)
    none = view(0, schedule=(0.0,))
    assert reasons(EquilibriumLR(patience=1), [none]) == ["the rate is 0 already"]
    frozen = partial(view, schedule=(0.1, 0.1), decay=(0.01, 0.01), **{"0": (1.0, 1.0), "00": (1.0, 1.0)})
    made, *_ = play(EquilibriumLR(patience=1, per_group=True), [frozen(0)])  # no section of group 1
    assert [(d.group, d.acted, d.reason) for d in made[1:]] == [
        ("1", False, "its parameters are not trained")
    ]


def test_a_missing_reading_is_a_refusal():
    bare = View(0, {}, view(0).groups, [0.1])
    assert reasons(EquilibriumLR(), [bare]) == ["fdr/stationary was not recorded at this step"]


def test_without_weight_decay_it_never_acts_and_says_why():
    made, _, told = play(EquilibriumLR(), [view(t, decay=(0.0,)) for t in range(4)])
    assert {decision.factor for decision in made} == {1.0}
    assert "weight_decay is 0" in told[0]
    assert "without weight decay" in made[0].reason
    in_loss = EquilibriumLR(decay_in_loss=True)
    made, _, told = play(in_loss, [view(t, decay=(0.0,)) for t in range(2)])
    assert made[-1].acted
    assert told == ["", ""]


def test_a_schedule_that_keeps_falling_is_named_once_it_is_sure():
    falling = [view(t, schedule=(0.1 * 0.99**t,)) for t in range(6)]
    made, _, told = play(EquilibriumLR(patience=1), falling)
    assert [decision.acted for decision in made] == [True] + [False] * 5
    assert {d.reason for d in made[1:]} == {"the schedule has changed the learning rate since the last check"}
    assert [("keeps changing" in text) for text in told] == [False] * 3 + [True] * 3
    rising = [view(t, schedule=(0.01 * 1.5**t,)) for t in range(6)]
    assert set(play(EquilibriumLR(), rising)[2]) == {""}  # a warm-up


def test_one_step_of_a_schedule_only_begins_the_count_anew():
    steps = [view(0), view(1, schedule=(0.05,)), view(2, schedule=(0.05,)), view(3, schedule=(0.05,))]
    made, _, told = play(EquilibriumLR(), steps)
    assert [decision.factor for decision in made] == [1.0, 1.0, 1.0, 0.1]
    assert set(told) == {""}


def test_groups_together_or_each_by_itself():
    two = partial(view, schedule=(0.1, 0.2), decay=(0.01, 0.01))
    ends = {"0": (1.0, 1.0), "1": (3.0, 0.0)}
    together = play(EquilibriumLR(), [two(t, 0.0, **ends) for t in range(2)])[0]
    assert [(d.group, d.acted) for d in together] == [("", False), ("", False)]
    made, state, _ = play(EquilibriumLR(per_group=True), [two(t, 0.0, **ends) for t in range(2)])
    assert [(d.group, d.acted) for d in made[2:]] == [("0", True), ("1", False)]
    assert EquilibriumLR().effect(state).factors == {"0": 0.1, "1": 1.0}
    invariant = {"0": (1.0, 1.0), "0.scale_invariant": (2.0, 0.0)}  # all of a group's sections
    made, *_ = play(EquilibriumLR(per_group=True), [view(t, **invariant) for t in range(2)])
    assert not any(decision.acted for decision in made)


def test_a_factor_reached_for_all_groups_stays_when_they_are_decided_apart():
    two = partial(view, schedule=(0.1, 0.2), decay=(0.01, 0.01), **{"0": (1.0, 1.0), "1": (3.0, 0.0)})
    _, state, _ = play(EquilibriumLR(patience=1), [two(0)])
    apart = EquilibriumLR(per_group=True, patience=1)
    _, state, _ = apart.decide(two(1), state)
    assert apart.effect(state).factors == {"": 0.1, "0": 0.1, "1": 1.0}


def test_a_group_without_decay_is_left_alone_by_name():
    two = view(0, schedule=(0.1, 0.1), decay=(0.01, 0.0), **{"0": (1.0, 1.0), "1": (1.0, 1.0)})
    made, _, told = play(EquilibriumLR(per_group=True, patience=1), [two])
    assert [(d.group, d.acted) for d in made] == [("0", True), ("1", False)]
    assert "does not act on 1:" in told[0]
    assert set(play(EquilibriumLR(), [two])[2]) == {""}  # one group with decay is enough for the whole


def test_a_dry_run_calls_for_one_drop_and_then_says_that_it_was_not_made():
    made, *_ = play(EquilibriumLR(dry_run=True), [view(t) for t in range(5)])
    assert [decision.wanted for decision in made] == [False, True, False, False, False]
    assert not any(decision.acted for decision in made)
    assert "would go 0.1 -> 0.01" in made[1].sentence()
    assert "called for earlier" in made[-1].reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "sasa+"}, "unknown policy"),
        ({"factor": 1.0}, r"factor must be a number above 0 and below 1, got 1\.0"),
        ({"factor": 0}, "factor must be a number above 0"),
        ({"factor": "0.1"}, r"factor must be a number .*, got '0\.1'"),
        ({"tolerance": 0.0}, "tolerance must be a number above 0, got 0.0"),
        ({"tolerance": nan}, "tolerance must be a number above 0"),
        ({"patience": 0}, "patience must be a whole number at least 1"),
        ({"patience": True}, "patience must be a whole number"),
        ({"check_every": 2.5}, "check_every must be"),
        ({"warmup_steps": -1}, "warmup_steps must be"),
        ({"warmup_steps": None}, "warmup_steps must be"),
        ({"max_drops": 0}, "max_drops must be"),
        ({"min_lr": -1.0}, "min_lr must be a number at least 0"),
        ({"min_lr": None}, "min_lr must be a number"),
        ({"dry_run": "no"}, "dry_run must be True or False, got 'no'"),
    ],
)
def test_settings_that_no_run_can_use(settings, message):
    with pytest.raises(InputError, match=message):
        EquilibriumLR(**settings)


# -- in a monitor ----------------------------------------------------------------------------------


def tiny(decay=0.01):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    return net, torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=decay)


def test_its_observable_is_added_or_takes_the_place_of_the_default():
    alone = Monitor(*tiny(), [], controllers=[EquilibriumLR()])._measurement.instruments
    assert [observable.group for observable in alone.observables] == ["fdr"]
    loose = Monitor(*tiny(), controllers=[EquilibriumLR(tolerance=0.2)])
    assert loose._measurement.instruments["fdr"].observable.tolerance == 0.2
    assert len(loose._measurement.instruments.observables) == 4


def test_an_observable_that_decides_otherwise_is_refused():
    own = FluctuationDissipation(tolerance=0.02, schedule=10)
    with pytest.raises(InputError, match=r"or write FluctuationDissipation\(tolerance=0.1\)"):
        Monitor(*tiny(), [own], controllers=[EquilibriumLR(tolerance=0.1)])
    Monitor(*tiny(), [own], controllers=[EquilibriumLR(tolerance=0.02)])
    Monitor(*tiny(), [own], controllers=[EquilibriumLR(policy="yaida")])
    with pytest.raises(InputError, match=r"test='sasa'"):
        Monitor(*tiny(), [own], controllers=[EquilibriumLR(policy="sasa")])


@pytest.mark.parametrize("wrong", [EquilibriumLR(), [3], None, "lr"])
def test_what_is_no_list_of_controllers_is_refused(wrong):
    with pytest.raises(InputError, match="controllers must be"):
        Monitor(*tiny(), controllers=wrong)


def test_two_controllers_on_one_knob_are_refused():
    with pytest.raises(InputError, match="two controllers would turn one knob, the learning rate"):
        Monitor(*tiny(), controllers=[EquilibriumLR(), EquilibriumLR(policy="yaida")])


# -- digits ----------------------------------------------------------------------------------------

DECAY, RATE, BATCH = 0.01, 0.1, 10


def digits():
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    x = (x - x[train].mean()) / x[train].std()
    return x[train], y[train], x[test], y[test]


X, Y, X_TEST, Y_TEST = digits()
EPOCH = -(-len(X) // BATCH)


def perceptron(seed, xavier=True):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    for layer in net if xavier else ():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


class Training:
    """Digits with batches of 10, resumable in the middle of an epoch."""

    def __init__(self, net, controllers=(), decay=DECAY, seed=0, scheduler=None, observables=()):
        self.net, self.seed, self.step = net, seed, 0
        self.optimizer = torch.optim.SGD(net.parameters(), lr=RATE, weight_decay=decay)
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.memory = MemoryRecorder()
        self.monitor = None
        if controllers:
            self.monitor = Monitor(
                net,
                self.optimizer,
                observables,
                controllers=controllers,
                recorders=[self.memory],
                dataset_size=len(X),
            )

    def batch(self):
        epoch, index = divmod(self.step, EPOCH)
        if index == 0 or not hasattr(self, "order"):
            generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
            self.order = torch.randperm(len(X), generator=generator)
        members = self.order[index * BATCH : (index + 1) * BATCH]
        return X[members], Y[members]

    def run(self, steps):
        for _ in range(steps):
            x, y = self.batch()
            if self.monitor is not None:
                self.monitor.begin_micro_batch(x, y)
            F.cross_entropy(self.net(x), y).backward()
            if self.monitor is not None:
                self.monitor.end_micro_batch()
                self.monitor.before_step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler is not None:
                self.scheduler.step()
            self.step += 1
        return self

    @property
    def drops(self):
        return [decision for decision in self.monitor.decisions if decision.wanted]

    def epochs_of_drops(self):
        return [decision.step / EPOCH for decision in self.drops]

    @torch.no_grad()
    def score(self):
        norm = sum(float(p.square().sum()) for p in self.net.parameters())
        loss = float(F.cross_entropy(self.net(X), Y)) + DECAY / 2 * norm
        return loss, float((self.net(X_TEST).argmax(1) == Y_TEST).float().mean())


@pytest.mark.slow
def test_yaidas_rule_drops_once_settled_and_ends_lower():
    """arXiv:1810.00004: at a constant rate the loss stays at the level of its own noise."""
    gains, accuracies = [], []
    for seed in range(4):
        constant = Training(perceptron(seed), seed=seed).run(70 * EPOCH).score()
        yaida = EquilibriumLR(policy="yaida", tolerance=0.05, factor=0.1, check_every=EPOCH)
        dropped = Training(perceptron(seed), [yaida], seed=seed).run(70 * EPOCH)
        assert 22 <= dropped.epochs_of_drops()[0] <= 40
        loss, accuracy = dropped.score()
        gains.append(constant[0] - loss)
        accuracies.append(accuracy - constant[1])
    assert min(gains) > 0.004
    assert sum(accuracies) / 4 >= 0


@pytest.mark.slow
def test_the_robust_rule_does_not_fire_where_the_ratio_only_passes_through_1():
    """From PyTorch's own initialisation the norm of the weights rises, turns and falls again."""

    def run(controller, epochs):
        dense = FluctuationDissipation(schedule=10, sampling=5)
        return Training(perceptron(0, xavier=False), [controller], observables=[dense]).run(epochs * EPOCH)

    published = run(EquilibriumLR(policy="yaida", check_every=48), 8)
    assert published.drops, "there is a false crossing to fall for"
    robust = run(EquilibriumLR(check_every=48), 16)
    assert robust.drops == []
    ratios = [value for _, value in robust.memory.series("dynamics/fdr/ratio")]
    assert ratios[40] < 1 < max(ratios[80:])


@pytest.mark.slow
def test_the_robust_rule_fires_in_the_end():
    robust = Training(perceptron(1), [EquilibriumLR()], seed=1).run(45 * EPOCH)
    (drop,) = robust.drops
    assert 25 < drop.step / EPOCH < 45
    assert robust.optimizer.param_groups[0]["lr"] == RATE  # the script's own rate stands as it wrote it
    assert robust.memory.latest()["dynamics/control/learning_rate"].value == pytest.approx(0.1 * RATE)
    factors = dict(robust.memory.series("dynamics/control/lr_factor"))
    assert {value for step, value in factors.items() if step <= drop.step} == {1.0}
    assert {value for step, value in factors.items() if step > drop.step} == {0.1}
    changes = dict(robust.memory.series("dynamics/control/changes"))
    assert (changes[drop.step - 50], changes[drop.step]) == (0.0, 1.0)  # a mark beside the curves
    assert "EquilibriumLR: " in robust.monitor.table()


@pytest.mark.slow
def test_without_weight_decay_growing_norms_are_not_taken_for_a_stationary_state():
    with pytest.warns(MeasurementWarning, match="weight_decay is 0") as caught:
        free = Training(perceptron(0), [EquilibriumLR()], decay=0.0).run(40 * EPOCH)
    assert len([each for each in caught if issubclass(each.category, MeasurementWarning)]) == 1
    assert free.drops == []
    norms = [value for _, value in free.memory.series("dynamics/fdr/weight_norm_sq")]
    assert norms[-1] > norms[len(norms) // 2]


@pytest.mark.slow
def test_a_dry_run_changes_no_bit():
    eager = partial(EquilibriumLR, policy="yaida", tolerance=0.5, check_every=50)
    plain = Training(perceptron(0)).run(2500)
    dry = Training(perceptron(0), [eager(dry_run=True)]).run(2500)
    wet = Training(perceptron(0), [eager()]).run(2500)
    assert len(dry.drops) == 1
    assert dry.drops[0].step == wet.drops[0].step
    for ours, theirs, changed in zip(
        dry.net.parameters(), plain.net.parameters(), wet.net.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert not torch.equal(changed, theirs)


@pytest.mark.slow
def test_a_cosine_is_left_alone_with_one_warning():
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4000)
    with pytest.warns(MeasurementWarning, match="keeps changing the learning rate") as caught:
        run = Training(perceptron(0), [EquilibriumLR(tolerance=0.9)], scheduler=cosine).run(4000)
    assert len(caught) == 1
    assert run.drops == []


def test_one_cycle_is_left_alone_too():
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=3000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Training(perceptron(0), [EquilibriumLR(tolerance=0.9)], scheduler=cycle).run(2990)
    assert run.drops == []
    assert sum("keeps changing" in str(each.message) for each in caught) == 1


def test_warm_up_and_then_a_constant_rate_works_as_before():
    warm = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.1, total_iters=300)
    loose = partial(EquilibriumLR, tolerance=0.5, max_drops=1)
    run = Training(perceptron(0), [loose()], scheduler=warm).run(20 * EPOCH)
    (drop,) = run.drops
    assert drop.step > 300
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(RATE)


@pytest.mark.slow
@pytest.mark.parametrize("at", [700, 1650, 2501])
def test_stopped_and_resumed_it_decides_the_same_at_the_same_steps(at):
    eager = partial(EquilibriumLR, policy="yaida", tolerance=0.5, check_every=50, factor=0.5)
    whole = Training(perceptron(0), [eager()]).run(3200)
    first = Training(perceptron(0), [eager()]).run(at)
    saved = {
        "net": first.net.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "monitor": first.monitor.state_dict(),
    }
    first.monitor.close()
    second = Training(perceptron(5), [eager()])
    second.net.load_state_dict(saved["net"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.monitor.load_state_dict(saved["monitor"])
    second.step = at
    second.run(3200 - at)
    assert len(whole.drops) >= 2
    assert second.monitor.decisions == whole.monitor.decisions
    for ours, theirs in zip(second.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
