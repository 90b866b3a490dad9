"""Every argument of every public class, with every kind of wrong value: own errors, or nothing."""

import contextlib
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import gradiometer
from gradiometer import (
    Ema,
    FluctuationDissipation,
    GradientNoiseScale,
    HalfRun,
    JacobianNorm,
    Monitor,
    NeuralTangentKernel,
    Quantity,
    Reading,
    SecondFluctuationDissipation,
    Window,
    at,
    every,
    log_spaced,
)
from gradiometer.errors import GradiometerError, InputError
from gradiometer.observables import NoiseCurvature
from gradiometer.observables.schedules import either

from .wrong_values import NET, POOL, SAMPLER, SGD, arguments_of

CLASSES = {
    name: kind
    for name in gradiometer.__all__
    if inspect.isclass(kind := getattr(gradiometer, name)) and not inspect.isabstract(kind)
}
NEEDED = {  # arguments without a default, as they are rightly given
    "model": NET,
    "optimizer": SGD,
    "sampler": SAMPLER,
    "batch_size": 4,
    "steps": 3,
    "strength": 0.1,
    "unit": "1",
    "sentence": "What it is.",
    "key": "dynamics/ntk/drift",
    "value": 0.5,
    "step": 3,
}


def make(kind, chosen, folder):
    """An object, with what it cannot do without and the arguments chosen."""
    needed = {
        name: {"log_dir": folder, "path": folder / "run.jsonl", **NEEDED}[name]
        for name, default in arguments_of(kind).items()
        if default is inspect.Parameter.empty
    }
    if kind is at:
        needed["steps"] = [3]
    made = kind(**{**needed, **chosen})
    if {"path", "log_dir", "model"} & arguments_of(kind).keys():
        made.close()
    return made


@pytest.mark.parametrize("name", CLASSES)
@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_only_errors_of_the_package_come_out_of_a_constructor(name, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "a" is a path
    names = sorted(arguments_of(CLASSES[name]))
    chosen = data.draw(
        st.dictionaries(st.sampled_from(names), st.sampled_from(POOL), max_size=2) if names else st.just({})
    )
    with contextlib.suppress(GradiometerError):
        assert isinstance(make(CLASSES[name], chosen, tmp_path), CLASSES[name])


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_needed_is_enough(name, tmp_path):
    assert isinstance(make(CLASSES[name], {}, tmp_path), CLASSES[name])


WRONG = {
    "estimator without parentheses": (lambda: JacobianNorm(estimator=HalfRun), r"estimator=Last\(\)"),
    "estimator in words": (
        lambda: NoiseCurvature(estimator="mean"),
        "estimator must be a Estimator, got 'mean'",
    ),
    "schedule without parentheses": (
        lambda: JacobianNorm(schedule=log_spaced),
        r"Write schedule=every\(50\)",
    ),
    "schedule that is true": (lambda: JacobianNorm(schedule=True), "number of steps, got True"),
    "every true step": (lambda: every(True), "whole number of steps"),
    "steps in words": (lambda: at("123"), "steps must be"),
    "half a schedule": (lambda: either(every(3), 5), "schedule must be a Schedule, got 5"),
    "float for a window": (lambda: Window(1e3), "whole number"),
    "true decay": (lambda: Ema(True), "decay must be a number"),
    "nan": (
        lambda: FluctuationDissipation(tolerance=math.nan),
        "tolerance must be a number above 0, got nan",
    ),
    "infinite": (
        lambda: FluctuationDissipation(tolerance=math.inf),
        "tolerance must be a number above 0, got inf",
    ),
    "number for a flag": (lambda: FluctuationDissipation(verify=1), "verify must be True or False, got 1"),
    "word for a flag": (lambda: SecondFluctuationDissipation(allow_shuffled="no"), "True or False, got 'no'"),
    "float for a seed": (lambda: NeuralTangentKernel(seed=0.5), "seed must be a whole number at least 0"),
    "no memory": (lambda: NeuralTangentKernel(max_memory=0), "max_memory must be a whole number at least 1"),
    "unknown source": (
        lambda: GradientNoiseScale(source="full"),
        'Write "auto", "per example", .* or "split',
    ),
    "list for a word": (lambda: GradientNoiseScale(source=["auto"]), "unknown source, got"),
    "value in words": (lambda: Reading("a/b/c", "0.5"), "value must be a number, got '0.5'"),
    "short key": (lambda: Reading("drift", 0.5), "three parts, got 'drift'"),
    "unit that is a number": (lambda: Quantity(1, "What it is."), "unit must be a str, got 1"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_refused_with_what_to_write(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    "net",
    [
        nn.LazyLinear(2),
        nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d()),
        nn.Sequential(nn.LazyConv2d(2, 3)),
    ],
    ids=["lone", "behind another", "convolution"],
)
def test_a_lazy_module_is_refused_before_it_has_run(net):
    with pytest.raises(InputError, match=r"lazy modules.* Call the model on a batch first"):
        Monitor(net, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))


def test_a_lazy_module_that_has_run_is_measured():
    net = nn.LazyLinear(2)
    net(torch.zeros(1, 3))
    Monitor(net, torch.optim.SGD(net.parameters(), lr=0.1)).close()


def test_whole_numbers_are_read_as_numbers():
    assert Reading("a/b/c", 3).number == 3.0
    assert Reading("a/b/c", np.float32(0.5)).is_finite
