"""A factor on the learning rate that every scheduler, scaler and script can live with."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from gradiometer import Controller, FluctuationDissipation, MemoryRecorder, Monitor
from gradiometer.control import ControlPanel, Effect
from gradiometer.control.rates import Rates
from gradiometer.errors import InputError

FACTOR = 0.25

SCHEDULERS = {
    "none": None,
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.5, total_steps=12, cycle_momentum=False),
    "exponential": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 9),
    "step": lambda opt: lr_scheduler.StepLR(opt, 3, 0.5),
    "warm-up": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ConstantLR(opt, 1.0)],
        milestones=[3],
    ),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5),
}


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@dataclass(frozen=True)
class Fixed(Controller):
    """Multiplies the rates from the first step on."""

    factors: tuple[float, ...]
    knobs = ("learning_rate",)
    dry_run: bool = False

    def observables(self):
        return ()

    def start(self):
        return {"next": 0}

    def effect(self, state):
        return Effect({str(i): factor for i, factor in enumerate(self.factors)})

    def decide(self, view, state):
        raise AssertionError("there is nothing to decide by")


class Attached:
    """A panel with these factors in force, and what other hooks of the optimizer see."""

    def __init__(self, optimizer, factors):
        names = [str(i) for i in range(len(optimizer.param_groups))]
        self.panel = ControlPanel([Fixed(tuple(factors))], optimizer, lambda: names)
        self.in_force = []
        optimizer.register_step_post_hook(self.after)

    def after(self, optimizer, *_):
        self.in_force.append([float(group["lr"]) for group in optimizer.param_groups])


def rates_of(make, factors, optimizer_kind=torch.optim.SGD, steps=10, skip=()):
    """The rates that the script sees between steps, and those in force in them."""
    net = network()
    optimizer = optimizer_kind(net.parameters(), lr=0.1)
    scheduler = make(optimizer) if make else None
    attached = Attached(optimizer, factors)
    seen = []
    for step in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        net(torch.ones(4, 3)).sum().backward()
        if step not in skip:  # what a gradient scaler does with a gradient that is not finite
            optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return seen, [rates[0] for rates in attached.in_force]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step\\(\\)")
def test_every_scheduler_goes_on_as_if_there_were_no_factor(name):
    plain, _ = rates_of(SCHEDULERS[name], [1.0])
    seen, in_force = rates_of(SCHEDULERS[name], [FACTOR])
    assert seen == plain
    assert in_force == [FACTOR * rate for rate in plain]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step\\(\\)")
def test_steps_that_are_skipped_in_a_row_leave_nothing_behind(name):
    plain, _ = rates_of(SCHEDULERS[name], [1.0], skip=(3, 4))
    seen, in_force = rates_of(SCHEDULERS[name], [FACTOR], skip=(3, 4))
    assert seen == plain
    assert in_force == [FACTOR * rate for step, rate in enumerate(plain) if step not in (3, 4)]


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_skips_two_steps(fused):
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    attached = Attached(optimizer, [FACTOR])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    moved = []
    for step in range(4):
        before = net.weight.detach().clone()
        loss = net(torch.ones(4, 3)).sum() * (math.inf if step in (1, 2) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(float((before - net.weight.detach())[0, 0]))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**step)
        scheduler.step()
    assert moved[1] == moved[2] == 0.0
    assert moved[0] == pytest.approx(0.1 * FACTOR * 4, rel=1e-5)
    assert moved[3] == pytest.approx(0.1 / 8 * FACTOR * 4, rel=1e-5)
    assert attached.in_force[-1] == [pytest.approx(0.1 / 8 * FACTOR)]


def step(net, optimizer):
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_one_tensor_for_all_groups_is_multiplied_once_and_stays_the_same():
    net = network()
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam([{"params": [net.weight]}, {"params": [net.bias]}], lr=rate)
    attached = Attached(optimizer, [FACTOR, FACTOR])
    for _ in range(3):
        step(net, optimizer)
        assert all(group["lr"] is rate for group in optimizer.param_groups)
        assert rate.item() == pytest.approx(0.1)
    assert attached.in_force == [[pytest.approx(0.1 * FACTOR)] * 2] * 3


class BrokenError(Exception):
    pass


def test_a_closure_that_breaks_leaves_the_scripts_own_rates():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attached = Attached(optimizer, [FACTOR])

    def broken():
        raise BrokenError

    for _ in range(2):
        with pytest.raises(BrokenError):
            optimizer.step(broken)
        assert optimizer.param_groups[0]["lr"] == 0.1
    step(net, optimizer)
    assert attached.in_force == [[0.1 * FACTOR]]


@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize("first", [0.1, torch.tensor(0.1)])
def test_a_closure_sees_and_writes_the_scripts_own_rates(as_keyword, first):
    """As Lightning runs a training step that sets the rate."""
    net = network()
    kind = torch.optim.Adam if isinstance(first, torch.Tensor) else torch.optim.SGD
    optimizer = kind(net.parameters(), lr=first)
    attached = Attached(optimizer, [FACTOR])
    (group,) = optimizer.param_groups

    def closure():
        optimizer.zero_grad()
        group["lr"] = float(group["lr"]) * 0.5
        loss = net(torch.ones(4, 3)).sum()
        loss.backward()
        return loss

    for turn in range(1, 5):
        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert loss.requires_grad
        assert group["lr"] == pytest.approx(0.1 * 0.5**turn)
        assert attached.in_force[-1] == [pytest.approx(0.1 * 0.5**turn * FACTOR)]


def test_a_step_with_several_closures():
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    attached = Attached(optimizer, [FACTOR])
    seen = []

    def closure():
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = net(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(seen) > 1
    assert set(seen) == {0.1}
    assert attached.in_force == [[0.1 * FACTOR]]


def test_two_acting_panels_on_one_optimizer_are_refused():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    first = Attached(optimizer, [FACTOR])
    with pytest.raises(InputError, match="another monitor already turn this optimizer's learning rate"):
        Attached(optimizer, [FACTOR])
    first.panel.close()
    Attached(optimizer, [FACTOR])
    assert len(optimizer._optimizer_step_pre_hooks) == 2  # before and after all others


def test_an_observer_beside_it_sees_the_rates_in_force_whoever_came_first():
    def right(order):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        memory = MemoryRecorder()
        observables = [FluctuationDissipation(schedule=5, sampling=1)]
        for kind in order:
            if kind == "acts":
                Attached(optimizer, [FACTOR])
            else:
                monitor = Monitor(net, optimizer, observables, recorders=[memory])
        for _ in range(21):
            with monitor.micro_batch(torch.ones(4, 3)):
                net(torch.ones(4, 3)).square().sum().backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        return memory.latest()["dynamics/fdr/right"].value

    assert right(["acts", "observes"]) == right(["observes", "acts"])


def test_groups_have_factors_of_their_own():
    net = network()
    optimizer = torch.optim.SGD([{"params": [net.weight], "lr": 0.1}, {"params": [net.bias], "lr": 0.2}])
    rates = Rates(optimizer)
    rates.factors = [1.0, 0.5]
    with rates.in_force():
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
        assert rates.written() == [0.1, 0.2]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
