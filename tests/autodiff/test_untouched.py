"""Evaluating a model leaves no trace, whatever kind of state its forward pass moves."""

import contextlib
import random
from collections import Counter, deque

import numpy as np
import pytest
import torch
from torch import nn

from gradiometer import empirical_ntk, jacobian_norms, per_example_grad_norms
from gradiometer.autodiff.functional import fresh
from gradiometer.autodiff.products import hessian_vector_product, loss_gradient, split_gradients
from gradiometer.autodiff.untouched import State, as_training, measuring, original
from gradiometer.errors import UnsupportedError

CALLS = 0
RECENT = []
SOURCE = np.random.default_rng(3)


class Meter:
    """A helper of the model's own package."""

    def __init__(self):
        self.count, self.history, self.generator = 0, deque(maxlen=5), random.Random(1)

    def update(self, value):
        self.count += 1
        self.history.append(value)
        return self.generator.random()


class Bank(list):
    """A list of one's own."""


class Stateful(nn.Module):
    """A linear layer, and one thing that its forward pass moves."""

    class_calls = 0

    def __init__(self, move):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.move = nn.Linear(4, 3), move
        self.meter, self.queue, self.bank = Meter(), torch.zeros(6, 3), Bank()
        self.seen, self.names, self.table = [], set(), {"inner": {"sum": torch.zeros(())}}
        self.tally, self.array, self.calls = Counter(), np.zeros(3), 0
        self.old_style = np.random.RandomState(5)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        return self.layer(x) * (1 + 0.1 * self.move(self, x))


def from_closure():
    generator, log = torch.Generator().manual_seed(1), []

    def move(self, x):
        log.append(1)
        return torch.rand((), generator=generator) + len(log)

    return move, lambda: (generator.get_state().clone(), list(log))


def global_counter(self, x):
    global CALLS
    CALLS += 1
    RECENT.append(CALLS)
    return CALLS + float(SOURCE.normal())


def class_attribute(self, x):
    type(self).class_calls += 1
    return type(self).class_calls


def helper(self, x):
    return self.meter.update(float(x.detach().sum()))


def memory_bank(self, x):
    self.queue[:] = torch.roll(self.queue, 1, 0)
    self.queue.data[0] = x.detach().mean()
    return self.queue.sum()


def list_of_ones_own(self, x):
    self.bank.append(x.detach().mean())
    return len(self.bank)


def containers(self, x):
    self.seen.append(1)
    self.names.add(len(self.seen))
    self.tally["calls"] += 1
    self.table["inner"]["sum"] += x.detach().sum()
    self.table[len(self.table)] = None
    return len(self.names) + self.tally["calls"] + float(self.table["inner"]["sum"])


def arrays(self, x):
    self.array += 1
    self.mean.numpy()[:] += 1
    return float(self.array.sum()) + self.old_style.rand()


def plain_number(self, x):
    self.calls += 1
    return self.calls


def modes(self, x):
    self.layer.eval()
    return 0.0


ELSEWHERE = ("_modules", "_parameters", "_buffers", "move", "meter", "old_style", "queue")


def picture(model):
    """All of a model's state, and what its forward pass moves outside, in words."""
    return repr(
        {
            "attributes": {name: value for name, value in vars(model).items() if name not in ELSEWHERE},
            "meter": (model.meter.count, list(model.meter.history), model.meter.generator.getstate()),
            "old_style": model.old_style.get_state()[1].tolist(),
            "tensors": [model.queue.tolist(), [buffer.tolist() for buffer in model.buffers()]],
            "class": type(model).class_calls,
            "globals": (CALLS, list(RECENT), SOURCE.bit_generator.state),
            "modes": [module.training for module in model.modules()],
        }
    )


MOVES = [
    global_counter,
    class_attribute,
    helper,
    memory_bank,
    list_of_ones_own,
    containers,
    arrays,
    plain_number,
    modes,
]


def entropy(out, y):
    return nn.functional.cross_entropy(out, y)


USES = {
    "kernel": lambda model, x, y: empirical_ntk(model, x),
    "jacobian": lambda model, x, y: jacobian_norms(model.eval(), x),
    "norms": lambda model, x, y: per_example_grad_norms(model, entropy, x, y),
    "gradient": lambda model, x, y: loss_gradient(model, entropy, x, y),
    "parts": lambda model, x, y: split_gradients(model, entropy, x, y, 2),
    "product": lambda model, x, y: hessian_vector_product(
        model, entropy, x, y, [[torch.ones_like(p) for p in model.parameters()]]
    ),
}


def data():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_state_is_put_back(move, use):
    model, (x, y) = Stateful(move), data()
    model(x)  # something is there to be changed
    model.train(use != "jacobian")
    before = picture(model)
    with contextlib.suppress(UnsupportedError):  # some couple the examples of a batch
        USES[use](model, x, y)
    assert picture(model) == before


@pytest.mark.parametrize("use", ["kernel", "gradient"])
def test_what_a_closure_holds_is_put_back(use):
    move, held = from_closure()
    model, (x, y) = Stateful(move), data()
    model(x)
    before = held()
    USES[use](model, x, y)
    after = held()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


class WritesToInput(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.sub_(1.0).mul_(0.5))


class WritesToPair(WritesToInput):
    def forward(self, pair):
        a, b = pair
        return self.layer(a.mul_(0.5) + b.add_(1.0))


def writes_to_targets(out, y):
    return nn.functional.mse_loss(out, y.div_(2.0))


@pytest.mark.parametrize("use", USES)
def test_inputs_are_not_written_to(use):
    x, y = data()
    before = x.clone()
    with torch.random.fork_rng():
        USES[use](WritesToInput(), x, y)
    assert torch.equal(x, before)


def test_a_nest_of_inputs_is_not_written_to():
    x, _ = data()
    pair = (x.clone(), x.clone())
    empirical_ntk(WritesToPair(), pair)
    assert torch.equal(pair[0], x)
    assert torch.equal(pair[1], x)


@pytest.mark.parametrize("use", [loss_gradient, per_example_grad_norms])
def test_targets_are_not_written_to(use):
    x, _ = data()
    targets = torch.ones(6, 3)
    use(nn.Linear(4, 3), writes_to_targets, x, targets)
    assert torch.equal(targets, torch.ones(6, 3))


class Frozen(nn.Module):
    """Stays in evaluation mode, as a pretrained part does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x)

    def train(self, mode=True):
        return super().train(False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("context", [measuring, as_training])
def test_modes_of_scripts_and_of_parts_that_stay_as_they_are(context):
    block = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)))
    traced = torch.jit.trace(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval(), torch.ones(2, 8))
    held = nn.Dropout(0.5).eval()
    net = nn.Sequential(block, traced, Frozen(), held, nn.Linear(8, 3))
    before = [module.training for module in net.modules()]
    with context(net):
        net(torch.ones(2, 6))
    assert [module.training for module in net.modules()] == before


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_frozen_script_has_no_mode():
    frozen = torch.jit.freeze(torch.jit.script(nn.Linear(6, 8)).eval())
    net = nn.Sequential(frozen, nn.Linear(8, 3))
    with measuring(net):
        assert not net[1].training
    assert net[1].training


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupt_puts_everything_back(error):
    model, (x, _) = Stateful(helper), data()
    before = picture(model)

    def broken_off():
        with measuring(model):
            model(x)
            raise error

    with pytest.raises(error):
        broken_off()
    assert picture(model) == before


def test_a_graph_that_waits_for_its_backward_pass_is_not_disturbed():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    x, _ = data()
    loss = net(x).square().sum()
    with as_training(net):
        net(x)
    loss.backward()


class OnDemand(dict):
    """Gives something else each time it is asked, as a registry of classes does."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


def test_a_registry_that_makes_what_it_gives_is_left_alone():
    net = nn.Linear(2, 2)
    net.registry = OnDemand(a=nn.Tanh)
    state = State(net)
    net(torch.ones(1, 2))
    state.restore()
    assert type(net.registry["a"]) is nn.Tanh


def test_copies_are_of_the_values():
    x = {"a": torch.ones(2), "b": [torch.zeros(1), "text"]}
    copied = fresh(x)
    copied["a"].zero_()
    assert x["a"].tolist() == [1.0, 1.0]
    assert copied["b"][1] == "text"


def test_the_original_of_a_compiled_module():
    net = nn.Linear(2, 2)
    assert original(net) is net
    assert original(torch.compile(net, backend="eager")) is net
