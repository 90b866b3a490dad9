"""Every argument of every public function, with every kind of wrong value: own errors, or a finite answer.

What the caller's own model, forward or loss raises is the caller's and passes.
"""

import inspect
import math
import traceback
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import gradiometer
from gradiometer import (
    JSONLinesRecorder,
    Quantity,
    Reading,
    control,
    empirical_ntk,
    fluctuation_dissipation,
    gradient_noise_scale,
    jacobian_norms,
    kernel_distance,
    layer_ntks,
    observables,
    optimizers,
    per_example_grad_norms,
    record,
    register_rule,
    suggest_learning_rate,
)
from gradiometer.autodiff import rules
from gradiometer.autodiff.rules import RULES
from gradiometer.callbacks import DynamicsMonitor
from gradiometer.errors import GradiometerError
from gradiometer.observables import (
    best_step,
    harmonicity,
    jacobian_singular_values,
    kernel_alignment,
    noise_curvature,
    projection_stderr,
    relative_drift,
    second_fluctuation_dissipation,
    sgd_noise_scale,
    shuffling_factor,
    stability_limit,
)
from gradiometer.record import read_decisions, read_json_lines

from .wrong_values import NET, POOL, SGD

X, Y = torch.linspace(-1, 1, 12).reshape(4, 3), torch.tensor([0, 1, 1, 0])
ONE, TWO = torch.tensor(1.0), torch.tensor([1.0, 2.0])
KERNEL = torch.tensor([[2.0, 0.5], [0.5, 1.0]])


class Sign(optimizers.Family):
    """A family of no class."""


RIGHT = {  # arguments without a default, as they are rightly given
    "empirical_ntk": {"model": NET, "x": X},
    "layer_ntks": {"model": NET, "x": X},
    "jacobian_norms": {"model": NET, "x": X},
    "jacobian_singular_values": {"model": NET, "x": X},
    "per_example_grad_norms": {"model": NET, "loss_fn": F.cross_entropy, "x": X, "y": Y},
    "suggest_learning_rate": {"model": NET, "x": X, "y": Y, "loss_fn": F.cross_entropy, "fraction": 0.1},
    "fluctuation_dissipation": {
        "displacement_sq": ONE,
        "weight_sq": (ONE, 2 * ONE),
        "steps": 3,
        "lr": 0.1,
    },
    "second_fluctuation_dissipation": {"grad_sq_norm": ONE, "displacement_curvature": ONE, "lr": 0.1},
    "gradient_noise_scale": {"sq_norms": TWO, "sizes": TWO, "batch_sq_norm": ONE},
    "noise_curvature": {
        "gram": torch.eye(3) + 1,
        "forms": torch.ones(3, 3, 3),
        "sizes": torch.ones(3),
    },
    "best_step": {
        "grad_sq_norm": ONE,
        "gradient_curvature": ONE,
        "noise_curvature": ONE,
        "batch_size": 8,
    },
    "kernel_distance": {"k1": KERNEL, "k2": torch.eye(2)},
    "kernel_angle": {"k1": KERNEL, "k2": torch.eye(2)},
    "relative_drift": {"k": KERNEL, "k0": torch.eye(2)},
    "kernel_alignment": {"k": KERNEL, "y": torch.tensor([0, 1])},
    "projection_stderr": {"estimates": TWO, "width": 3},
    "sgd_noise_scale": {"lr": 0.1, "dataset_size": 100, "batch_size": 10},
    "stability_limit": {},
    "harmonicity": {"lrs": [0.1, 0.2, 0.3], "lefts": [1.0, 2.1, 3.2]},
    "shuffling_factor": {"curvature_times_lr": 0.1, "steps_per_epoch": 10},
    "as_schedule": {"schedule": 3},
    "register_rule": {"module_type": nn.Bilinear, "rule": lambda module, a: None},
    "read_json_lines": {"path": "run.jsonl"},
    "read_decisions": {"path": "run.jsonl"},
    "custom_scalars_layout": {"prefix": "d", "quantities": {"d/a/b": Quantity("1", "It.", chart="c")}},
    "check_controllers": {"controllers": ()},
    "register": {"family": Sign()},
    "family_of": {"optimizer": SGD},
    "unwrapped": {"optimizer": SGD},
    "rebuilds": {"optimizer": SGD},
    "step_was_made": {"optimizer": SGD},
    "group_settings": {"optimizer": SGD},
    "default_observables": {},
    "DynamicsMonitor": {},
    "LoggersRecorder": {"loggers": []},
}
ELSEWHERE = {
    "gather": "reads folders of this package",
    "with_needed": "takes what check_controllers and check_settings have passed",
    "displacements": "takes a group of the optimizer's own, in the middle of a step",
    "squared_displacements": "takes a group of the optimizer's own, in the middle of a step",
}
CLASSES = {"DynamicsMonitor": DynamicsMonitor, "LoggersRecorder": record.LoggersRecorder}
"""Constructors beside those of ``test_constructors.py``, which need no folder to be made in."""
HOMES = (gradiometer, observables, control, record, optimizers)
FUNCTIONS = {
    name: function
    for home in HOMES
    for name in home.__all__
    if inspect.isfunction(function := getattr(home, name)) and name not in ELSEWHERE
}
FUNCTIONS |= CLASSES
MAY_BE_NAN = {"best_step", "harmonicity", "suggest_learning_rate"}  # as their pages say
OPTIONS = {"layer_ntks": "empirical_ntk"}  # whose arguments another function takes as **options


class Cut(nn.Module):
    """Outputs that are on no graph."""

    def forward(self, x):
        return x.detach() * 2


def frozen():
    return nn.Linear(3, 2).requires_grad_(False)


def broken():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    nn.init.constant_(net[1].weight, math.nan)
    return net


TENSORS = [
    *(torch.zeros(0), torch.zeros(0, 3), torch.zeros(4, 0), torch.zeros(4, 3), torch.ones(2), torch.ones(3)),
    *(X.double(), X.half(), X.bfloat16(), X.long(), X > 0, X.to(torch.cfloat), X.to_sparse(), X.to("meta")),
    *(X[:3], X[None], X[:, :2], X.T, X.clone().requires_grad_(), X / 0, X * math.nan, X.numpy()),
    *([X, X[:3]], {"input": X}, {"x": X}, (X,), [X.numpy()], [1, 0, 1, 0], (x for x in X)),
    *(Y, Y[:3], Y.double(), Y + 10, Y[:, None], torch.full((2,), math.nan), torch.tensor(math.inf)),
    *(torch.eye(2), torch.eye(3), torch.zeros(2, 2), -torch.eye(2), torch.eye(2, dtype=torch.int64)),
    *(np.eye(2), [[1.0, 0.0], [0.0, 1.0]], torch.ones(3, 3, 3), torch.zeros(3, 3, 3), -TWO, TWO.to("meta")),
    *((ONE,), (ONE, ONE), (1.0, 2.0), (TWO, torch.ones(3)), [ONE, None], 1e-300, 1e300, 10**9, np.int64(3)),
]
MODELS = [
    *(nn.Linear, nn.Linear(3, 2, device="meta"), nn.Linear(2, 2), nn.Identity(), nn.Dropout(), frozen()),
    *(
        broken(),
        Cut(),
        nn.Sequential(),
        nn.Module(),
        nn.BatchNorm1d(3),
        nn.Linear(3, 1),
        nn.Bilinear(3, 3, 2),
    ),
    *(nn.Linear(3, 2, dtype=torch.cfloat), nn.Linear(3, 2, dtype=torch.float64), nn.Embedding(20, 3)),
    *(nn.MultiheadAttention(3, 1), nn.LSTM(3, 2), NET.forward, torch.Generator(), [NET]),
    *(nn.Linear(3, 17), nn.Bilinear(3, 3, 2), torch.Generator, nn.Linear(3, 2).eval),
]
CALLABLES = [
    *(nn.MSELoss, nn.MSELoss(), nn.CrossEntropyLoss(reduction="none"), F.mse_loss, F.cross_entropy),
    *(lambda out, y: 0.5, lambda out, y: out.detach().sum(), lambda out, y: out.sum() * 1j),
    *(lambda out, y: out.sum() * math.nan, lambda out, y: out.sum(), lambda out, y: torch.zeros(())),
    *(lambda model, x: x, lambda model, x: model(x)[0], lambda model, x: model(x).T, lambda: 0),
    *(lambda model, x: None, lambda model, x: model(x).flatten(), lambda out, y: out.long().sum()),
    *({"weight": 2.0}, {"weight": "a"}, {"weight": torch.ones(5)}, {"weight": math.nan}, {1: 2.0}),
]
WRONG = [*POOL, *TENSORS, *MODELS, *CALLABLES]


class Refusal(str):
    """The words of an own error."""


def is_of_the_callers_own(error):
    """Whether an error was raised in a model, or in a function that the caller has handed over."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "gradiometer" not in frame.filename]
    return any(frame.name in ("_call_impl", "<lambda>") or frame.filename == F.__file__ for frame in inside)


def numbers_in(result):
    """Every number and tensor of a result, as tensors."""
    if isinstance(result, dict):
        result = tuple(result.values())
    if isinstance(result, tuple):
        return [number for part in result for number in numbers_in(part)]
    numbers = result if isinstance(result, (int, float, torch.Tensor)) else []
    return [torch.as_tensor(numbers, dtype=torch.float64)]


def arguments_of(name):
    parameters = inspect.signature(FUNCTIONS[OPTIONS.get(name, name)]).parameters
    return sorted({*parameters} - {"layers", "options"})


def answer(name, chosen):
    """What the function returns for its right arguments but those chosen, or its refusal."""
    before = dict(RULES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = FUNCTIONS[name](**{**RIGHT[name], **chosen})
            return list(result) if inspect.isgenerator(result) else result
    except GradiometerError as error:
        return Refusal(error)
    except Exception as error:
        if not is_of_the_callers_own(error):
            raise
        return Refusal(f"{error}.")
    finally:
        RULES.clear()
        RULES.update(before)
        rules._unverified.discard(nn.Bilinear)


def complaint(name, chosen):
    """What is wrong with what a function makes of some arguments; empty where nothing is."""
    try:
        result = answer(name, chosen)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(result, Refusal):
        return "" if result.endswith((".", ":")) else f"no sentence: {result}"
    finite = all(bool(number.isfinite().all()) for number in numbers_in(result))
    return "" if finite or name in MAY_BE_NAN else f"silent {result}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with a file of records in it."""
    monkeypatch.chdir(tmp_path)
    recorder = JSONLinesRecorder("run.jsonl")
    recorder(3, [Reading("a/b/c", 1.0)])
    recorder.close()


def test_every_public_function_is_here():
    public = {n for home in HOMES for n in home.__all__ if inspect.isfunction(getattr(home, n))}
    assert public == {*RIGHT, *ELSEWHERE} - {*CLASSES}


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_not_refused(name):
    assert not isinstance(answer(name, {}), Refusal)


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("name", [name for name in RIGHT if arguments_of(name)])
def test_every_wrong_value_in_every_place(name):
    wrong = {(argument, place): value for argument in arguments_of(name) for place, value in enumerate(WRONG)}
    complaints = {key: complaint(name, {key[0]: value}) for key, value in wrong.items()}
    said = {f"{name}({key[0]}={wrong[key]!r}): {text}" for key, text in complaints.items() if text}
    assert not said, "\n".join(said)


PAIRS = [name for name in RIGHT if len(arguments_of(name)) > 1 and name != "suggest_learning_rate"]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("name", PAIRS)
@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_several_wrong_values_at_once(name, data):
    values = st.sampled_from(WRONG)
    chosen = data.draw(st.dictionaries(st.sampled_from(arguments_of(name)), values, min_size=2, max_size=3))
    assert not complaint(name, chosen), chosen


def logits(out, y):
    return F.cross_entropy(out, y)


REFUSED = {
    "a class for a model": (lambda: empirical_ntk(nn.Linear, X), r"model must be a Module, .*parentheses"),
    "a function for a model": (lambda: jacobian_norms(NET.forward, X), "model must be a Module"),
    "a lazy model": (lambda: empirical_ntk(nn.LazyLinear(2), X), "lazy modules.* Call the model on a batch"),
    "a model on meta": (
        lambda: jacobian_norms(nn.Linear(3, 2, device="meta"), X),
        "the parameters of Linear hold no numbers, got some on the device meta. Write model.to_empty",
    ),
    "a model of NaN": (lambda: empirical_ntk(broken(), X), "the kernel is not finite at these weights"),
    "a model of NaN, Jacobian": (lambda: jacobian_singular_values(broken(), X), "the Jacobian is not finite"),
    "an array": (lambda: empirical_ntk(NET, X.numpy()), "must hold a tensor .*got ndarray"),
    "an array in a nest": (lambda: layer_ntks(NET, [X, X.numpy()]), r"x must hold tensors.*from_numpy"),
    "a generator of batches": (lambda: empirical_ntk(NET, (x for x in X)), "must hold a tensor .*generator"),
    "sparse beside dense": (lambda: empirical_ntk(NET, X, X.to_sparse()), r"both sparse.* x2.to_dense\(\)"),
    "sparse inputs of a Jacobian": (lambda: jacobian_norms(NET, X.to_sparse()), r"sparse .*x.to_dense\(\)"),
    "half a chunk": (lambda: empirical_ntk(NET, X, chunk_size=0.5), "chunk_size must be a whole number"),
    "projections in words": (
        lambda: layer_ntks(NET, X, num_projections="all"),
        "num_projections must be a wh",
    ),
    "a seed for a generator": (
        lambda: jacobian_norms(NET, X, num_projections=1, generator=3),
        r"generator must be .*got 3. Write generator=torch.Generator\(\)",
    ),
    "a module for a forward": (lambda: empirical_ntk(NET, X, forward=NET), "forward must be a callable"),
    "a forward without the model": (
        lambda: empirical_ntk(NET, X, forward=NET.forward),
        r"forward must be a callable .*\(too many positional arguments\). Write forward=lambda model, x",
    ),
    "weights in a list": (lambda: empirical_ntk(NET, X, weights=[1.0]), "weights must be a Mapping"),
    "a weight in words": (
        lambda: empirical_ntk(NET, X, weights={"bias": "2"}),
        "number or a tensor, got '2'",
    ),
    "a class for a loss": (
        lambda: per_example_grad_norms(NET, nn.MSELoss, X, Y),
        r"loss_fn must be a callable .*parentheses are missing.* Write loss_fn=F.cross_entropy",
    ),
    "too few targets": (lambda: per_example_grad_norms(NET, logits, X, Y[:3]), "dimensions 4 and 3"),
    "one target": (lambda: per_example_grad_norms(NET, logits, X, Y[0]), "first dimensions 4 and none"),
    "targets in an array": (lambda: per_example_grad_norms(NET, logits, X, Y.numpy()), "y must hold tensors"),
    "a loss that is no tensor": (
        lambda: per_example_grad_norms(NET, lambda o, y: 1.0, X, Y),
        "return one num",
    ),
    "a loss on no graph": (
        lambda: per_example_grad_norms(NET, lambda out, y: out.detach().sum(), X, Y),
        "the loss does not depend on the outputs. Leave no detach",
    ),
    "losses": (
        lambda: per_example_grad_norms(NET, nn.CrossEntropyLoss(reduction="none"), X, Y),
        "loss_fn must return one number, got shape",
    ),
    "a momentum in words": (
        lambda: suggest_learning_rate(NET, X, momentum="0.9"),
        "momentum must be a number",
    ),
    "an unknown curvature": (lambda: suggest_learning_rate(NET, X, curvature="fisher"), "unknown curvature"),
    "arrays for kernels": (lambda: kernel_distance(np.eye(2), KERNEL), r"k1 .*Write torch.as_tensor\(k1\)"),
    "whole numbers for kernels": (lambda: kernel_distance(KERNEL, Y.view(2, 2)), r"Write k2.double\(\)"),
    "a kernel of zeros": (lambda: kernel_distance(0 * KERNEL, KERNEL), "k1 is 0 and has no direction"),
    "a first kernel of zeros": (lambda: relative_drift(KERNEL, 0 * KERNEL), "k0 is 0 and has no direction"),
    "targets of one class": (
        lambda: kernel_alignment(KERNEL, torch.tensor([1, 1])),
        "y to tell examples apart",
    ),
    "more projections than outputs": (lambda: projection_stderr(TWO, 1), "got 2 estimates, width=1"),
    "sizes that do not fit": (
        lambda: gradient_noise_scale(TWO, torch.ones(3), ONE),
        r"\[2\], \[3\] and \[\]",
    ),
    "half an example": (lambda: gradient_noise_scale(TWO, TWO * 1.3, ONE), "sizes must be a whole number"),
    "negative squares": (
        lambda: gradient_noise_scale(-TWO, TWO, ONE),
        "sq_norms must be a number at least 0",
    ),
    "moments that are NaN": (
        lambda: best_step(ONE, ONE, ONE * math.nan, 8),
        "noise_curvature must be finite",
    ),
    "gradients that are NaN": (
        lambda: noise_curvature(torch.eye(3) * math.nan, torch.ones(3, 3, 3), torch.ones(3)),
        "must be finite",
    ),
    "a rate of 0": (lambda: fluctuation_dissipation(ONE, (ONE, ONE), 3, 0.0), "lr must be a number above 0"),
    "a negative square": (
        lambda: fluctuation_dissipation(ONE, (ONE, -ONE), 3, 0.1),
        "weight_sq must be a number at least 0, got -1",
    ),
    "a module for an optimizer": (lambda: optimizers.step_was_made(NET), "optimizer must be a Optimizer"),
    "half a data set": (lambda: sgd_noise_scale(0.1, 99.5, 10), "dataset_size must be a whole number"),
    "one end": (
        lambda: fluctuation_dissipation(ONE, ONE, 3, 0.1),
        r"weight_sq .*\(at_the_start, at_the_end\)",
    ),
    "groups that do not fit": (
        lambda: fluctuation_dissipation(TWO, (TWO, TWO), 3, torch.ones(3)),
        r"shapes must go together, got displacement_sq \[2\], lr \[3\]",
    ),
    "a number for a flag": (
        lambda: second_fluctuation_dissipation(ONE, ONE, 0.1, nesterov=1),
        "nesterov must be True or False, got 1",
    ),
    "rates in words": (lambda: harmonicity("12", [1.0, 2.0]), "lrs must be a sequence of finite numbers"),
    "an infinite rate": (
        lambda: sgd_noise_scale(math.inf, 100, 10),
        "lr must be a number at least 0, got inf",
    ),
    "several momenta": (lambda: stability_limit(TWO / 4), r"momentum must be one number, got shape \[2\]"),
    "half a step": (lambda: shuffling_factor(0.1, 2.5), "steps_per_epoch must be a whole number"),
    "a rule in words": (lambda: register_rule(nn.Bilinear, "linear"), "a rule is a function"),
    "no file": (lambda: read_json_lines("nowhere.jsonl"), "cannot read records there, got .*nowhere.jsonl"),
    "a folder": (lambda: read_decisions("."), "cannot read records there"),
    "words without a key": (
        lambda: record.custom_scalars_layout("d", {"d/a/b": "drift"}),
        r"quantities\['d/a/b'\] must be a Quantity",
    ),
    "no optimizer": (lambda: optimizers.group_settings(NET), "optimizer must be a Optimizer, got Linear"),
    "a class of optimizers": (lambda: optimizers.register(torch.optim.SGD), "family must be a Family"),
    "three for a progress bar": (
        lambda: DynamicsMonitor(progress_bar=3),
        "progress_bar must be a list of keys",
    ),
    "a word for a progress bar": (
        lambda: DynamicsMonitor(progress_bar="noise/scale"),
        r'got \'noise/scale\'. Write progress_bar=\["noise/scale"\]',
    ),
    "a module for a name": (lambda: DynamicsMonitor(model=NET), 'Write model="backbone"'),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_call_is_refused_with_what_to_write(wrong, message):
    with pytest.raises(GradiometerError, match=message):
        wrong()


def test_what_the_caller_raises_passes_as_it_is():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        jacobian_norms(NET, X[:, :2])
    with pytest.raises(ZeroDivisionError):
        empirical_ntk(NET, X, forward=lambda model, x: model(x) / (1 // 0))
    with pytest.raises(IndexError, match="Target 10 is out of bounds"):
        per_example_grad_norms(NET, F.cross_entropy, X, Y + 10)
    with pytest.raises(AttributeError, match="no attribute 'size'"):
        suggest_learning_rate(NET, X, "targets", loss_fn=F.mse_loss)
