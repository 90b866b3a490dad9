"""Gradients, steps and Hessians of the parts of a step's own batch, against explicit ones."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from gradiometer import MemoryRecorder, Monitor, NoiseCurvature, Observable, SecondFluctuationDissipation
from gradiometer.collect.base import Step, Training
from gradiometer.collect.own_batch import OwnBatch
from gradiometer.collect.registry import COLLECTORS
from gradiometer.collect.sections import Sections
from gradiometer.errors import MeasurementWarning, SampleSkippedError, UnsupportedError
from gradiometer.record.readings import Quantity

from ..engine.test_non_interference import augmented_batch, build, gradients, look, random_states, same

SGD = {
    "plain": {"lr": 0.1},
    "l2": {"lr": 0.1, "weight_decay": 0.3},
    "heavy ball": {"lr": 0.05, "momentum": 0.9},
    "dampening": {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05},
    "nesterov": {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
}
SEEN = []


@dataclass(frozen=True, kw_only=True)
class Spy(Observable):
    """Keeps what the collectors supply."""

    group = "spy"
    needs = frozenset({"curvature", "step_curvature"})
    quantities = {"nothing": Quantity("1", "Nothing.")}

    def statistics(self, snapshot):
        SEEN.append((snapshot.curvature, snapshot.step_curvature))
        return {"nothing": torch.zeros(())}

    def readings(self, now, reference):
        return {"nothing": now["nothing"]}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches(steps, accumulation=1, size=7):
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (
                torch.randn(size, 3, generator=generator, dtype=torch.float64),
                torch.randint(2, (size,), generator=generator),
            )
            for _ in range(accumulation)
        ]
        for _ in range(steps)
    ]


def measured(model, optimizer, steps, reduction="mean", divisor=None, accumulation=1):
    """What is seen at the last of some steps, and the run as it stood right before it."""
    SEEN.clear()
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    divided_by = divisor or (accumulation if reduction == "mean" else 1)
    monitor = Monitor(
        model, optimizer, [Spy(schedule=1)], loss_fn=loss_fn, loss_reduction=reduction, on_error="raise"
    )
    with monitor:
        for step in batches(steps, accumulation):
            optimizer.zero_grad()
            for x, y in step:
                with monitor.micro_batch(x, y):
                    (loss_fn(model(x), y) / divided_by).backward()
            before = copy.deepcopy((model, optimizer.state_dict()))
            monitor.before_step(loss_divisor=divisor)
            optimizer.step()
    return *SEEN[-1], before, step[-1]


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def explicit_parts(model, x, y):
    """Gradient and Hessian of the mean loss of each of three parts."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    gradients, hessians = [], []
    for part in (slice(0, 2), slice(2, 4), slice(4, 7)):

        def loss(vector, part=part):
            pieces = vector.split([shape.numel() for shape in shapes])
            values = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
            return F.cross_entropy(torch.func.functional_call(model, values, x[part]), y[part])

        theta = flat(p.detach() for p in model.parameters())
        gradients.append(torch.autograd.functional.jacobian(loss, theta))
        hessians.append(torch.autograd.functional.hessian(loss, theta))
    return torch.stack(gradients), torch.stack(hessians)


def torch_step(model, state, make_optimizer, gradient):
    """What torch's own optimizer subtracts for a gradient."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    optimizer.load_state_dict(copy.deepcopy(state))
    parameters = list(model.parameters())
    for p, piece in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p).clone()
    before = flat(p.detach().clone() for p in parameters)
    optimizer.step()
    return before - flat(p.detach() for p in parameters)


def check(make_optimizer, steps, scale=1.0, **kwargs):
    """Both fields against torch's own steps, explicit gradients and explicit Hessians."""
    model = network()
    optimizer = make_optimizer(model)
    plain, along, (before, state), (x, y) = measured(model, optimizer, steps, **kwargs)
    g, H = explicit_parts(before, x, y)
    close(plain, g, g, g, H)
    u = torch.stack([torch_step(before, state, make_optimizer, scale * each) for each in g])
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    assert sum(sizes) == g.shape[1]
    decays = [group["weight_decay"] / scale for group in groups]
    decay = torch.tensor(decays, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    theta = flat(p.detach() for p in before.parameters())
    close(along, u, u, g + decay * theta, H + decay.diag())
    return plain, along


def close(found, u, v, g, H):
    torch.testing.assert_close(found.gram, u @ g.T, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.step_gram, u @ v.T, rtol=1e-9, atol=1e-13)
    forms = torch.einsum("ip,jpq,lq->jil", u, H, v)
    same = torch.eye(3, dtype=torch.bool)
    used = ~same[:, :, None] & ~same[:, None, :]
    torch.testing.assert_close(found.forms[used], forms[used], rtol=1e-8, atol=1e-13)
    assert found.sizes.tolist() == [2, 2, 3]
    assert found.weight == 1


@pytest.mark.parametrize("steps", [1, 3], ids=["first step", "later"])
@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_steps_are_those_that_torch_makes_of_each_parts_gradient(options, steps):
    check(lambda model: torch.optim.SGD(model.parameters(), **options), steps)


def test_groups_have_settings_of_their_own():
    def make(model):
        return torch.optim.SGD(
            [
                {"params": model[0].parameters(), "lr": 0.1, "momentum": 0.9, "nesterov": True},
                {"params": model[2].parameters(), "lr": 0.02, "weight_decay": 0.4},
            ],
            lr=0.1,
        )

    check(make, 3)


@pytest.mark.parametrize(
    ("reduction", "accumulation", "divisor", "scale", "share"),
    [
        ("mean", 2, None, 1.0, 1 / 14),
        ("mean", 2, 1.0, 2.0, 1 / 14),
        ("sum", 1, None, 7.0, 1 / 7),
        ("sum", 2, 14.0, 1.0, 1 / 14),
        ("sum", 2, None, 14.0, 1 / 14),
    ],
)
def test_everything_is_on_the_scale_of_the_mean_loss(reduction, accumulation, divisor, scale, share):
    plain, _ = check(
        lambda model: torch.optim.SGD(model.parameters(), **SGD["dampening"]),
        3,
        scale,
        reduction=reduction,
        accumulation=accumulation,
        divisor=divisor,
    )
    assert plain.noise_share == pytest.approx(share)


def test_the_share_of_the_noise_in_unequal_micro_batches_and_on_several_processes(monkeypatch):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = Step(0, Sections(model, optimizer, ["0"]), sizes=[2, 6])
    collector = COLLECTORS["curvature"](Training(model, optimizer), step, {})
    assert collector._noise_share() == pytest.approx((1 / 2 + 1 / 6) / 4)
    monkeypatch.setattr("gradiometer.parallel.world_size", lambda: 3)
    assert collector._noise_share() == pytest.approx((1 / 2 + 1 / 6) / 12)
    step.reduction = "sum"
    assert collector._noise_share() == pytest.approx(1 / 24)


# -- what is refused -------------------------------------------------------------------------------


def own(batch, loss_fn):
    return None if loss_fn is None else OwnBatch(*batch, loss_fn)


def collected(name, *, model=None, optimizer=None, loss_fn=F.cross_entropy, size=7, backward=True):
    """The result of one collector on one step."""
    model = model or network()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    ((batch,),) = batches(1, size=size)
    if backward:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
    step = Step(0, Sections(model, optimizer, ["0"]), sizes=[size], recording=True, batch=own(batch, loss_fn))
    collector = COLLECTORS[name](Training(model, optimizer, loss_fn=loss_fn), step, {})
    collector.before_step()
    return collector.result()


@pytest.mark.parametrize("name", ["curvature", "step_curvature"])
def test_what_cannot_be_measured_is_refused_with_the_reason(name):
    with pytest.raises(UnsupportedError, match="Pass loss_fn="):
        collected(name, loss_fn=None)
    with pytest.raises(SampleSkippedError, match="micro-batch of 3 or more examples, got 2"):
        collected(name, size=2)
    with pytest.raises(SampleSkippedError, match="no parameter has a gradient"):
        collected(name, backward=False)
    broken = network()
    nn.init.constant_(broken[2].weight, torch.nan)
    with pytest.raises(SampleSkippedError, match="not finite"):
        collected(name, model=broken)
    model = network()
    training = Training(model, torch.optim.SGD(model.parameters()), loss_fn=F.cross_entropy)
    with pytest.raises(SampleSkippedError, match="no micro-batch was seen"):
        COLLECTORS[name](training, Step(0, None), {}).before_step()
    with pytest.raises(SampleSkippedError, match=r"Call monitor\.before_step"):
        COLLECTORS[name](training, Step(0, None), {}).result()


def test_between_records_what_is_not_finite_does_not_count():
    model = network()
    nn.init.constant_(model[2].weight, torch.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ((batch,),) = batches(1)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    step = Step(0, Sections(model, optimizer, ["0"]), sizes=[7], batch=own(batch, F.cross_entropy))
    collector = COLLECTORS["curvature"](Training(model, optimizer, loss_fn=F.cross_entropy), step, {})
    collector.before_step()
    found = collector.result()
    assert found.weight == 0
    assert not found.gram.any()
    assert not found.forms.any()


def test_steps_are_known_for_sgd_on_the_models_own_parameters_only():
    model = network()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(UnsupportedError, match=r"torch\.optim\.SGD only, got Adam"):
        collected("step_curvature", model=model, optimizer=adam)
    assert collected("curvature", model=model, optimizer=adam).weight == 1
    other = nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(2)
    model = network()
    both = torch.optim.SGD([*model.parameters(), other], lr=0.1)
    with pytest.raises(UnsupportedError, match="not the model's"):
        collected("step_curvature", model=model, optimizer=both)
    assert collected("curvature", model=model, optimizer=both).weight == 1


def test_a_run_uphill_is_refused():
    model = network()
    uphill = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    with pytest.raises(UnsupportedError, match="got maximize=True"):
        collected("step_curvature", model=model, optimizer=uphill)
    assert collected("curvature", model=model, optimizer=uphill).weight == 1


def test_frozen_and_idle_parameters_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    few = collected("step_curvature", model=model, optimizer=optimizer)
    model[0].requires_grad_(True)
    model.zero_grad()
    assert (
        few.gram.diagonal() < collected("step_curvature", model=model, optimizer=optimizer).gram.diagonal()
    ).all()


# -- the run is left alone -------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw"])
def test_the_run_is_bit_identical_with_and_without(name, accumulation, clip):
    def train(watched):
        model, optimizer = build(name)
        memory, monitor = MemoryRecorder(), None
        if watched:
            observables = [NoiseCurvature(schedule=1)]
            if name != "adamw":
                observables.append(SecondFluctuationDissipation(schedule=1))
            monitor = Monitor(
                model,
                optimizer,
                observables,
                loss_fn=F.cross_entropy,
                recorders=[memory],
                on_error="raise",
            )
        for _ in range(5):
            found = look(model)
            for _ in range(accumulation):
                x, y = augmented_batch()
                if monitor is not None:
                    monitor.begin_micro_batch(x, y)
                (F.cross_entropy(model(x), y) / accumulation).backward()
                if monitor is not None:
                    monitor.end_micro_batch()
            if monitor is not None:
                before = random_states(), gradients(model)
                monitor.before_step()
                assert same((random_states(), gradients(model)), before)
                assert look(model) == found
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        if monitor is not None:
            monitor.close()
        final = model.state_dict(), optimizer.state_dict(), random_states()
        return copy.deepcopy(final), memory

    plain, _ = train(watched=False)
    final, memory = train(watched=True)
    assert same(pytree.tree_leaves(plain), pytree.tree_leaves(final))
    assert len(memory.records) == 5
    groups = {key.split("/")[1] for key, reading in memory.latest().items() if reading.is_finite}
    assert "noise_curvature" in groups
    assert ("fdr2" in groups) == (name != "adamw")


def test_a_monitor_without_the_loss_warns_once_and_training_goes_on():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = MemoryRecorder()
    monitor = Monitor(model, optimizer, [NoiseCurvature(schedule=1)], recorders=[memory])
    with pytest.warns(MeasurementWarning, match="Pass loss_fn=") as caught:
        for ((x, y),) in batches(3):
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).exp().log().backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    assert len(caught) == 1
    assert memory.series("dynamics/noise_curvature/scale") != []
    monitor.close()
