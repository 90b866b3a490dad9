"""One file says what an optimizer is; wrappers do not hide it, and nobody else asks for its type."""

import ast
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from gradiometer import FluctuationDissipation, GradientNoiseScale, MemoryRecorder, Monitor
from gradiometer.errors import InputError, UnsupportedError
from gradiometer.optimizers import Family, family_of, group_settings, register, unwrapped
from gradiometer.optimizers import base as base_module

SOURCE = Path(__file__).parents[2] / "src" / "gradiometer"


class AcceleratedOptimizer(torch.optim.Optimizer):
    """Of the form of Accelerate's: a subclass that never calls the constructor and hands everything on."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class OtherName(torch.optim.Optimizer):
    """Hands everything on, as the wrappers of frameworks do, under a name that nobody listed."""

    __init__ = AcceleratedOptimizer.__init__
    step, zero_grad = AcceleratedOptimizer.step, AcceleratedOptimizer.zero_grad
    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def fabric(model, optimizer):
    return Fabric(accelerator="cpu", devices=1).setup(model, optimizer)[1]


def read(kind, wrap):
    """Numbers of a short run; ``wrap`` makes of the optimizer what the script holds."""
    model, memory = network(), MemoryRecorder()
    inner = kind(model.parameters())
    optimizer = wrap(model, inner)
    observables = [GradientNoiseScale(schedule=1), FluctuationDissipation(schedule=1, sampling=1)]
    with Monitor(model, optimizer, observables, recorders=[memory], dataset_size=100) as monitor:
        for _ in range(6):
            x, y = torch.randn(8, 5), torch.randint(3, (8,))
            with monitor.micro_batch(x, y):
                nn.functional.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return {
        (step, reading.key): (reading.value.hex(), reading.stderr.hex())
        for step, readings in memory.records
        for reading in readings
        if "/cost/" not in reading.key
    }


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
    ids=["sgd", "adamw", "rmsprop"],
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model, inner: AcceleratedOptimizer(inner),
        fabric,
        lambda model, inner: AcceleratedOptimizer(AcceleratedOptimizer(inner)),
        lambda model, inner: OtherName(inner),
    ],
    ids=["accelerate", "fabric", "twice", "another name"],
)
def test_a_wrapped_optimizer_reads_as_the_one_inside(kind, wrap):
    plain = read(kind, lambda model, inner: inner)
    assert any("/fdr/ratio" in key for _, key in plain)
    assert read(kind, wrap) == plain


def test_a_subclass_that_may_do_something_else_has_no_family():
    class Lookahead(torch.optim.SGD):
        """Holds an optimizer, and does not just hand the step on to it."""

        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, lr=0.1)
            self.optimizer = optimizer

    optimizer = Lookahead(torch.optim.SGD(network().parameters(), lr=0.1))
    assert unwrapped(optimizer) is optimizer
    assert type(family_of(optimizer)) is Family
    assert not group_settings(optimizer)[0].is_sgd


def test_what_nothing_is_known_of_is_refused_by_name():
    optimizer = torch.optim.Adagrad(network().parameters())
    family = family_of(optimizer)
    assert family.refusal(optimizer, optimizer.param_groups[0]) == "no formula for Adagrad"
    with pytest.raises(UnsupportedError, match="no formula for Adagrad"):
        family.move(optimizer, optimizer.param_groups[0], [], {})
    with pytest.raises(UnsupportedError, match="known for Adam and AdamW, got Adagrad"):
        family.metric(optimizer)
    assert family.momentum(optimizer.param_groups[0]) == (0.0, 0.0, False)


def test_where_the_decay_acts():
    parameters = list(network().parameters())
    for kind, expected in ((torch.optim.Adam, False), (torch.optim.AdamW, True)):
        optimizer = kind(parameters)
        assert family_of(optimizer).decoupled(optimizer.param_groups[0]) is expected
        assert family_of(optimizer).decoupled({}) is expected  # before torch 2.7


def test_a_family_registered_twice_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(base_module, "_FAMILIES", dict(base_module._FAMILIES))

    class Mine(Family):
        classes = (torch.optim.SGD,)

    with pytest.raises(InputError, match="SGD has a family of optimizers already, got Mine beside SGDFamily"):
        register(Mine())

    class Rprop(Family):
        classes = (torch.optim.Rprop,)
        linear = True

    assert register(Rprop()) is family_of(torch.optim.Rprop(network().parameters()))


def asks_for_a_type(path):
    """Lines that compare the class of an optimizer."""
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, (ast.Compare, ast.Call)) else ""
        compares = isinstance(node, ast.Compare) and "type(" in text and "ptimizer" in text
        checks = text.startswith("isinstance(") and "optim." in text and "optim.Optimizer" not in text
        if compares or checks:
            yield f"{path.name}:{node.lineno}: {text}"


def test_no_other_file_asks_for_the_type_of_an_optimizer():
    files = [path for path in SOURCE.rglob("*.py") if path.parent.name != "optimizers"]
    assert len(files) > 50
    assert [line for path in files for line in asks_for_a_type(path)] == []
    assert list(asks_for_a_type(SOURCE / "optimizers" / "base.py")) == []  # families are looked up


def test_the_search_can_find_something(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "def f(optimizer):\n    return type(optimizer) is SGD or isinstance(optimizer, torch.optim.Adam)"
    )
    assert len(list(asks_for_a_type(path))) == 2
