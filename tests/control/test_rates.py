"""A factor on the learning rate that every scheduler, scaler and script can live with."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from gradiometer.control.rates import Rates

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


class Attached:
    """Rates driven by an optimizer's hooks, as the engine drives them."""

    def __init__(self, optimizer, factors):
        self.rates = Rates(optimizer)
        self.rates.factors = factors
        self.in_force = []
        optimizer.register_step_pre_hook(lambda *_: self.rates.multiply())
        optimizer.register_step_post_hook(self.after)

    def after(self, optimizer, *_):
        self.in_force.append([float(group["lr"]) for group in optimizer.param_groups])
        self.rates.restore()


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
    plain, _ = rates_of(SCHEDULERS[name], [])
    seen, in_force = rates_of(SCHEDULERS[name], [FACTOR])
    assert seen == plain
    assert in_force == [FACTOR * rate for rate in plain]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step\\(\\)")
def test_steps_that_are_skipped_in_a_row_leave_nothing_behind(name):
    plain, _ = rates_of(SCHEDULERS[name], [], skip=(3, 4))
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


def test_a_rate_in_a_tensor_stays_the_same_tensor():
    net = network()
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    attached = Attached(optimizer, [FACTOR])
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert attached.in_force == [[pytest.approx(0.1 * FACTOR)]]
    assert rate.item() == pytest.approx(0.1)


def test_a_step_that_breaks_is_put_right_at_the_next():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attached = Attached(optimizer, [FACTOR])

    def broken():
        raise RuntimeError("out of luck")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="luck"):
            optimizer.step(broken)
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert attached.in_force == [[0.1 * FACTOR]]
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_rate_written_while_the_factors_are_in_force_is_multiplied_too():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attached = Attached(optimizer, [FACTOR])

    def closure():  # as Lightning runs a training step that sets the rate
        optimizer.param_groups[0]["lr"] = 0.4
        with attached.rates.in_force():
            assert optimizer.param_groups[0]["lr"] == 0.4 * FACTOR
        net(torch.ones(4, 3)).sum().backward()

    optimizer.step(closure)
    assert attached.in_force == [[0.4 * FACTOR]]
    assert optimizer.param_groups[0]["lr"] == 0.4
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert attached.in_force[-1] == [0.2 * FACTOR]


def test_groups_have_factors_of_their_own():
    net = network()
    optimizer = torch.optim.SGD([{"params": [net.weight], "lr": 0.1}, {"params": [net.bias], "lr": 0.2}])
    rates = Rates(optimizer)
    rates.factors = [1.0, 0.5]
    with rates.in_force(), rates.in_force():
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
        assert rates.written() == [0.1, 0.2]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
