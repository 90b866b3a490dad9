"""What the user reads: short causes, no contents of tensors, and the words of the framework at hand."""

import ast
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradiometer
from gradiometer import GradientNoiseScale, JacobianNorm, Monitor, NeuralTangentKernel, Reading
from gradiometer.callbacks.lightning_words import LIGHTNING
from gradiometer.engine.causes import LONGEST, description_of
from gradiometer.engine.guard import Guard
from gradiometer.errors import InputError, UnsupportedError
from gradiometer.record.table import table

# -- causes ----------------------------------------------------------------------------------------

LONG = (
    "Could not run 'aten::as_strided' with arguments from the 'SparseCPU' backend. " + "This could be. " * 90
)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
            "Pass a probe= or forward=",
        ),
        (TypeError("forward() missing 1 required positional argument: 'b'"), "Pass forward="),
        (NotImplementedError(LONG), "dense probe="),
        (RuntimeError("Expected all tensors to be on the same device, but found two"), "on one device"),
        (torch.OutOfMemoryError("CUDA out of memory."), "Pass a smaller probe_size= or max_memory=."),
        (KeyError("image"), "KeyError: 'image'."),
        (ZeroDivisionError(), "ZeroDivisionError."),
        (InputError("too wide", got="x" * 2000, fix="Write less."), "too wide, got ..."),
        (UnsupportedError("no such layer", fix="Leave it out."), "no such layer. Leave it out."),
    ],
)
def test_a_cause_is_short_and_says_what_to_do(error, says):
    text = description_of(error)
    assert says in text
    assert len(text) <= LONGEST + 150
    assert "\n" not in text


def test_no_contents_of_tensors():
    for value in (torch.randn(4, 4), {"x": torch.arange(3)}, nn.Parameter(torch.ones(2))):
        text = description_of(ValueError(f"bad batch: {value!r}"))
        assert "bad batch" in text
        assert "tensor(" not in text
        assert not re.search(r"\d", text)


# -- a run ------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, a, b=None):
        if isinstance(a, dict):
            return self.layer(a["values"])
        return self.layer(a if b is None else a + b)


class Dense(Pair):
    def forward(self, x):
        return self.layer(x.to_dense())


def said(net, x, call, observables):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = Monitor(net, optimizer, observables, forward=call)
        for _ in range(2):
            with monitor.micro_batch(x, torch.zeros(6, 1)):
                F.mse_loss(call(net, x), torch.zeros(6, 1)).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return monitor, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("x", "call"),
    [
        ((torch.ones(6, 4), torch.ones(6, 4)), lambda net, x: net(*x)),
        ([torch.ones(6, 4)], lambda net, x: net(x[0])),
        ({"values": torch.ones(6, 4), "mask": torch.ones(6)}, lambda net, x: net(x)),
    ],
    ids=["pair", "list", "dictionary"],
)
def test_the_jacobian_of_several_inputs_is_that_of_all_of_them(x, call):
    monitor, words = said(Pair(), x, call, [JacobianNorm()])
    assert words == []
    assert monitor.latest["dynamics/jacobian/frobenius_norm"].is_finite


def test_sparse_batches_are_called_sparse_and_the_rest_is_read():
    x = torch.ones(6, 4).to_sparse()
    observables = [NeuralTangentKernel(), JacobianNorm(), GradientNoiseScale(schedule=1)]
    monitor, words = said(Dense(), x, lambda net, x: net(x), observables)
    assert all("no micro-batch was seen" not in text for text in words)
    assert sum("sparse inputs have no Jacobian" in text for text in words) == 1
    (line,) = [line for line in monitor.table().splitlines() if line.startswith("jacobian")]  # one row
    assert "not measured" in line
    assert "sparse inputs have no Jacobian" in " ".join(monitor.table().split())
    assert monitor.latest["dynamics/ntk/trace"].is_finite


def test_a_group_that_was_never_read_has_a_row_with_the_reason():
    net = nn.Linear(3, 1)
    monitor = Monitor(net, torch.optim.SGD(net.parameters(), lr=0.1), [GradientNoiseScale(schedule=1)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with monitor.micro_batch(torch.ones(1, 3)):
            net(torch.ones(1, 3)).sum().backward()
        monitor.before_step()
        monitor.optimizer.step()
    (line,) = [line for line in monitor.table().splitlines() if line.startswith("noise")]
    assert "not measured" in line
    assert "at least two parts of a batch" in " ".join(monitor.table().split())


def test_a_group_is_one_row_only_where_all_of_it_is_missing_for_one_reason():
    why = "not measured: the layer is not known"
    missing = {f"d/a/{n}": Reading(f"d/a/{n}", math.nan, note=why) for n in ("x", "y")}
    text = table(missing, {"a": "2 ms"}, reasons={"b": "not yet: this is the first step"})
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines()[2:]]
    assert rows[0][:2] == ["a", "not measured"]
    assert rows[0][-1].startswith("the layer is not known. cost: 2 ms")
    assert rows[1] == ["b", "not yet", "this is the first step."]
    some = missing | {"d/a/z": Reading("d/a/z", 1.0)}
    assert len(table(some, {}).splitlines()) == 6


# -- under a framework -------------------------------------------------------------------------------

LOOP = re.compile(r"micro_batch\(|before_step|\bMonitor\(|\bmonitor\.(?!accumulation)\w|inside: with")
HERE = Path(gradiometer.__file__).parent


def messages():
    """All strings of the package that speak of a plain loop, docstrings and names of attributes aside."""
    for folder in ("autodiff", "collect", "control", "engine", "observables", "stats", "optimizers"):
        for path in sorted((HERE / folder).glob("*.py")):
            tree = ast.parse(path.read_text())
            bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                text = getattr(node, "value", None) if id(node) not in bare else None
                if isinstance(text, str) and " " in text and LOOP.search(text):
                    yield path.name, text


EXEMPT = {
    "checks.py",  # arguments that the callback makes itself
    "snapshot.py",  # for who writes an observable
}


def test_under_lightning_no_message_speaks_of_a_plain_loop():
    guard = Guard("warn")
    guard.vocabulary = LIGHTNING
    texts = [(name, text) for name, text in messages() if name not in EXEMPT]
    assert len(texts) > 8
    left = [(name, guard.translated(text)) for name, text in texts if LOOP.search(guard.translated(text))]
    assert not [(name, text) for name, text in left if "DynamicsMonitor(" not in text], left


def test_every_phrase_of_the_vocabulary_is_said_somewhere():
    strings = " ".join(
        node.value
        for path in HERE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and path.name != "lightning_words.py"
    )
    assert not [phrase for phrase in LIGHTNING if phrase not in strings]


def test_a_warning_is_given_in_the_words_of_the_framework():
    guard = Guard("warn")
    guard.vocabulary = {"Call monitor.before_step().": "Step it."}
    with pytest.warns(UserWarning, match=r"^The gradient was not seen\. Step it\.$"):
        guard.warn("The gradient was not seen. Call monitor.before_step().")
