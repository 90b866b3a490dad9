"""T22: measuring leaves the run as it was, to the last bit."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    at,
)
from gradiometer.errors import MeasurementWarning

from ..hooks import standing
from ..zoo import HOOKS

STEPS = 5
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "foreach nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


class Awkward(nn.Module):
    """Everything that a careless measurement would disturb."""

    def __init__(self, norm=True):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
        self.activation = nn.ReLU(inplace=True)
        self.shared = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.3)
        self.fixed = nn.Linear(8, 8)
        self.resting = nn.Sequential(nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        self.fixed.requires_grad_(False)
        self.first.weight.register_hook(lambda grad: None)
        self.head.register_forward_hook(lambda module, args, out: None)

    def forward(self, x):
        x = self.activation(self.norm(self.first(x)))
        x = self.shared(self.activation(self.shared(x)))
        return self.head(self.resting(self.dropout(self.fixed(x))))


def everything(schedule=1, **kwargs):
    return [
        NeuralTangentKernel(schedule=schedule),
        JacobianNorm(schedule=schedule),
        GradientNoiseScale(schedule=schedule),
        FluctuationDissipation(schedule=schedule, sampling=schedule, **kwargs),
    ]


def build(name="sgd", norm=True):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generators are what is watched
    random.seed(0)
    model = Awkward(norm)
    model.resting.eval()
    return model, OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])


def augmented_batch():
    """A batch that depends on all three global generators."""
    x = torch.randn(8, 6) + float(np.random.normal()) + random.gauss(0, 1)  # noqa: NPY002
    return x, torch.randint(3, (8,))


def random_states():
    numpy_state = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state(), numpy_state[1].copy(), numpy_state[2], random.getstate()]


def look(model):
    """What must be the same after a measurement as before."""
    return {
        "modules": [(name, id(m), m.training) for name, m in model.named_modules()],
        "hooks": [list(getattr(m, kind).items()) for m in model.modules() for kind in HOOKS],
        "parameters": [
            (name, id(p), p.requires_grad, p.is_leaf, list((p._backward_hooks or {}).items()))
            for name, p in model.named_parameters()
        ],
        "standing": standing(model),
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
    }


def gradients(model):
    return [
        None if p.grad is None else (id(p.grad), p.grad.clone(), p.grad.requires_grad)
        for p in model.parameters()
    ]


def same(left, right):
    a, b = pytree.tree_leaves(left), pytree.tree_leaves(right)
    if len(a) != len(b):
        return False
    return all(
        torch.equal(x, y)
        if isinstance(x, torch.Tensor)
        else np.array_equal(x, y)
        if isinstance(x, np.ndarray)
        else x == y
        for x, y in zip(a, b, strict=True)
    )


def train(name, accumulation, clip, observables, norm=True, steps=STEPS, check=True):
    """The plain loop; with ``observables=None`` nothing of ours is in it."""
    model, optimizer = build(name, norm)
    memory, monitor = MemoryRecorder(), None
    if observables is not None:
        monitor = Monitor(model, optimizer, observables, recorders=[memory], dataset_size=100)
    for _ in range(steps):
        found = look(model)
        for _ in range(accumulation):
            x, y = augmented_batch()
            if monitor is not None:
                before = gradients(model), random_states()
                monitor.begin_micro_batch(x, y)
                assert not check or same((gradients(model), random_states()), before)
                assert not check or look(model)["modules"] == found["modules"]
            (F.cross_entropy(model(x), y) / accumulation).backward()
            if monitor is not None:
                monitor.end_micro_batch()
        if monitor is not None:
            weights = [p.detach().clone() for p in model.parameters()]
            before = gradients(model), random_states()
            monitor.before_step()
            assert not check or same((gradients(model), random_states()), before)
            assert not check or same([p.detach() for p in model.parameters()], weights)
            assert not check or look(model)["modules"] == found["modules"]
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = [None if p.grad is None else id(p.grad) for p in model.parameters()]
        optimizer.step()
        assert [None if p.grad is None else id(p.grad) for p in model.parameters()] == before
        assert look(model) == found
        optimizer.zero_grad()
    if monitor is not None:
        assert len(optimizer._optimizer_step_post_hooks) == 1
        monitor.close()
        monitor.close()
        assert look(model) == found
    for hooks in (optimizer._optimizer_step_post_hooks, optimizer._optimizer_step_pre_hooks):
        assert not hooks
    final = (model.state_dict(), optimizer.state_dict(), random_states())
    return copy.deepcopy(final), memory


def measured(memory):
    """Groups with a finite reading."""
    return {key.split("/")[1] for key, r in memory.latest().items() if r.is_finite}


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_is_bit_identical_with_every_observable_at_every_step(name, accumulation, clip):
    plain, _ = train(name, accumulation, clip, None)
    verify = {"verify": True}
    if accumulation == 1:
        with pytest.warns(MeasurementWarning, match="couples the examples|two or more pieces of 8") as caught:
            watched, memory = train(name, accumulation, clip, everything(**verify))
        assert len(caught) == 1
        assert measured(memory) == {"ntk", "jacobian", "fdr", "cost"}
    else:
        watched, memory = train(name, accumulation, clip, everything(**verify))
        assert measured(memory) == {"ntk", "jacobian", "noise", "fdr", "cost"}
    assert same(plain, watched)
    assert len(memory.records) == STEPS


def test_riding_along_for_single_examples_leaves_the_run_as_it_was():
    plain, _ = train("nesterov", 1, True, None, norm=False)
    watched, memory = train("nesterov", 1, True, everything(), norm=False)
    assert same(plain, watched)
    assert "noise" in measured(memory)
    assert memory.latest()["dynamics/noise/scale"].note.startswith("per example")


def test_the_comparison_can_fail():
    plain, _ = train("sgd", 1, False, None)
    model, optimizer = build()
    for _ in range(STEPS):
        x, y = augmented_batch()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(plain[0], model.state_dict())
    random.random()
    assert not same(plain, (model.state_dict(), optimizer.state_dict(), random_states()))


def test_no_hook_is_standing_while_nothing_is_due():
    model, optimizer = build(norm=False)
    found = look(model)
    monitor = Monitor(model, optimizer, everything(at([3])))
    seen = []
    for _ in range(6):
        x, y = augmented_batch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MeasurementWarning)  # batch norm, at step 3
            with monitor.micro_batch(x, y):
                seen.append(look(model) == found)
                F.cross_entropy(model(x), y).backward()
            seen[-1] &= look(model) == found
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        assert look(model) == found
    assert seen == [True, True, True, False, True, True]
    assert len(optimizer._optimizer_step_post_hooks) == 1
    monitor.close()
    assert not optimizer._optimizer_step_post_hooks


def test_hooks_are_gone_after_a_loop_that_broke_in_the_middle_of_a_step():
    model, optimizer = build()
    found = look(model)

    def broken_loop():
        with Monitor(model, optimizer, everything()) as monitor:
            x, y = augmented_batch()
            with monitor.micro_batch(x, y):
                assert look(model) != found
                raise KeyError("the user's own")

    with pytest.raises(KeyError, match="own"):
        broken_loop()
    assert look(model) == found
    assert not optimizer._optimizer_step_post_hooks


def test_the_users_tensors_are_not_held_on_to():
    """The probe is a copy: writing into the batch afterwards does not change it."""
    model, optimizer = build(norm=False)
    monitor = Monitor(model, optimizer, everything())
    x, y = augmented_batch()
    with monitor.micro_batch(x, y):
        F.cross_entropy(model(x), y).backward()
    expected = x.clone()
    x.zero_()
    assert torch.equal(monitor.state_dict()["probe"]["inputs"], expected)
    monitor.close()
