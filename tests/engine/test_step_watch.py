"""An optimizer that is watched and never steps is named once; one that steps rarely is not."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import MemoryRecorder, Monitor


class Lookahead(torch.optim.Optimizer):
    """Hands its step on to an optimizer that it holds under one of several names."""

    def __init__(self, parameters, name):
        super().__init__(list(parameters), {"lr": 0.1})
        setattr(self, name, torch.optim.SGD(self.param_groups, lr=0.1))
        self.name = name

    def advance(self):
        getattr(self, self.name).step()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def run(net, optimizer, advance, *, trained=None, steps=30, announce=None, micro_batch=True):
    """The warnings of a loop in which ``advance(step)`` moves the weights, or not."""
    trained, memory = trained or net, MemoryRecorder()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with Monitor(net, optimizer, recorders=[memory]) as monitor:
            for step in range(steps):
                x, y = torch.randn(8, 5), torch.randint(3, (8,))
                if micro_batch:
                    monitor.begin_micro_batch(x, y)
                F.cross_entropy(trained(x), y).backward()
                monitor.end_micro_batch()
                if announce is None or announce(step):
                    monitor.before_step()
                advance(step)
    return [str(w.message) for w in said], memory


def told(words, ending):
    (text,) = words
    assert text.startswith("optimizer.step() was never seen: this ")
    assert "has not stepped" in text
    assert ending in text


@pytest.mark.parametrize("name", ["base_optimizer", "inner"])
def test_an_optimizer_that_holds_the_one_that_steps(name):
    net = network()
    optimizer = Lookahead(net.parameters(), name)
    words, memory = run(net, optimizer, lambda _: (optimizer.advance(), optimizer.zero_grad()))
    told(words, f"Hand over the SGD that it holds, optimizer.{name}, instead of it.")
    assert not memory.records
    net = network()
    optimizer = Lookahead(net.parameters(), name)
    words, memory = run(net, getattr(optimizer, name), lambda _: (optimizer.advance(), optimizer.zero_grad()))
    assert not words
    assert memory.records


@pytest.mark.parametrize("micro_batch", [True, False])
def test_a_second_optimizer_with_the_same_weights(micro_batch):
    net = network()
    watched, other = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    words, _ = run(net, watched, lambda _: (other.step(), other.zero_grad()), micro_batch=micro_batch)
    told(words, "Its weights move all the same. Hand over the optimizer whose step()")


def test_weights_written_past_autograd():
    net = network()
    watched = torch.optim.Adam(net.parameters(), lr=0.1)

    def advance(_):
        for parameter in net.parameters():
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None

    words, _ = run(net, watched, advance)
    told(words, "this Adam has not stepped")


def test_a_closure_of_another_optimizer_that_accumulates():
    net = network()
    watched, other = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))

    def advance(step):
        if step % 4 == 3:
            other.step(lambda: None)
            other.zero_grad()

    words, _ = run(net, watched, advance, announce=lambda step: step % 4 == 3)
    told(words, "has not stepped")


def test_a_copy_of_the_model():
    net = network()
    trained = copy.deepcopy(net)
    own = torch.optim.SGD(trained.parameters(), lr=0.1)
    words, _ = run(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        lambda _: (own.step(), own.zero_grad()),
        trained=trained,
    )
    told(words, "None of its weights has a gradient: it may hold the weights of another model.")


def test_optimizers_in_the_backward_pass():
    net = network()
    for parameter in net.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def step_at_once(_, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step_at_once)
    words, _ = run(net, torch.optim.SGD(net.parameters(), lr=0.1), lambda _: None)
    told(words, "step inside the backward pass: hand over one of these")


def test_a_step_that_was_forgotten():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    words, _ = run(net, optimizer, lambda _: optimizer.zero_grad(), steps=160)
    told(words, "Its weights have not moved either")


@pytest.mark.parametrize("every", [1, 8, 64])
@pytest.mark.parametrize("each", [True, False], ids=["announced each time", "announced once"])
def test_accumulation_is_not_warned_of(every, each):
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def advance(step):
        if (step + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()

    words, memory = run(
        net, optimizer, advance, steps=3 * every, announce=lambda step: each or (step + 1) % every == 0
    )
    assert not [text for text in words if "never seen" in text]
    assert memory.records


def test_a_state_that_is_loaded_is_not_a_step():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    other = {name: value + 1 for name, value in net.state_dict().items()}

    def advance(step):
        if step == 3:
            net.load_state_dict(other)

    words, _ = run(net, optimizer, advance, steps=40, announce=lambda step: False)
    assert not words
