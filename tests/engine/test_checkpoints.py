"""Whatever a checkpoint holds, and whatever has changed since: readings go on, or begin anew and say so."""

import collections
import contextlib
import copy
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gradiometer import (
    Controller,
    Ema,
    EquilibriumLR,
    FluctuationDissipation,
    GradientCosine,
    GradientNoiseScale,
    JacobianNorm,
    Mean,
    Monitor,
    NeuralTangentKernel,
    Window,
)
from gradiometer.adapters.session import Session
from gradiometer.control.base import Effect
from gradiometer.engine.checks import STATE_VERSION
from gradiometer.engine.saved import opened, plain, sealed
from gradiometer.errors import GradiometerError, InputError, MeasurementWarning

PLAIN = {torch.Tensor, int, float, bool, str, type(None)}


def network(width=8, inputs=6, depth=1):
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, width), nn.Tanh()] + [nn.Linear(width, width), nn.Tanh()] * (depth - 1)
    return nn.Sequential(*layers, nn.Linear(width, 3))


def sgd(net, **settings):
    return torch.optim.SGD(net.parameters(), **({"lr": 0.05, "weight_decay": 0.01} | settings))


def all_observables():
    return [
        FluctuationDissipation(schedule=1, sampling=1, centred=True),
        GradientNoiseScale(schedule=1),
        NeuralTangentKernel(schedule=1),
        JacobianNorm(schedule=1),
        GradientCosine(schedule=1, sampling=1),
    ]


def build(observables=None, net=None, optimizer=None, **arguments):
    net = network() if net is None else net
    optimizer = optimizer or sgd(net)
    return Monitor(net, optimizer, all_observables() if observables is None else observables, **arguments)


def batch(inputs=6):
    return torch.randn(8, inputs), torch.randint(3, (8,))


def steps(monitor, count, make=batch):
    for _ in range(count):
        x, y = make()
        with monitor.micro_batch(x, y):
            F.cross_entropy(monitor.model(x), y).backward()
        monitor.before_step()
        monitor.optimizer.step()
        monitor.optimizer.zero_grad()
    return monitor


def said(action):
    """The messages of our warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if issubclass(w.category, MeasurementWarning)]


def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(nest):
    if isinstance(nest, dict):
        assert all(type(key) in (int, str) for key in nest)
        nest = list(nest.values())
    if type(nest) is list:
        for part in nest:
            yield from leaves(part)
    else:
        yield nest


def latest(monitor, key):
    return monitor.latest[f"dynamics/{key}"].value


# -- what goes in ----------------------------------------------------------------------------------

Named = collections.namedtuple("Named", "a ids")


@dataclass
class Sample:
    a: torch.Tensor


class Picture(torch.Tensor):
    pass


class Net(nn.Module):
    """Finds its tensor wherever it is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x=None, a=None, **rest):
        x = a if x is None else x
        while not isinstance(x, torch.Tensor):
            x = x["a"] if isinstance(x, dict) else getattr(x, "a", None) if hasattr(x, "a") else x[0]
        return self.layer(x.as_subclass(torch.Tensor))


def outputs(model, x):
    """Given, so that the probe is what the loop shows."""
    return model(**x) if isinstance(x, dict) else model(x)


def taken(x):
    """A monitor whose probe comes from this batch, and what was said by two saves."""
    monitor = build([NeuralTangentKernel(schedule=1)], Net(), forward=outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such a batch may not be measurable, which is another matter
        with monitor.micro_batch(x, torch.zeros(8)):
            (monitor.model(**x) if isinstance(x, dict) else monitor.model(x)).sum().backward()
        monitor.before_step()
        monitor.optimizer.step()
    return monitor, said(lambda: (monitor.state_dict(), monitor.state_dict()))


A = torch.randn(8, 6)
STORED = {
    "tensor": A,
    "tuple": (A, torch.zeros(8)),
    "list": [A, [torch.zeros(8)]],
    "nested": {"a": A, "more": {"mask": torch.ones(8), "pair": (torch.ones(8), None)}},
    "array": {"a": A, "ids": np.arange(8)},
    "subclass": A.as_subclass(Picture),
}
LEFT_OUT = {
    "named tuple": Named(A, None),
    "data class": Sample(A),
    "function": {"a": A, "ids": len},
    "path": {"a": A, "ids": Path("x")},
    "strings in an array": {"a": A, "ids": np.array(["u"] * 8)},
    "objects in an array": {"a": A, "ids": np.array([None] * 8)},
    "set": {"a": A, "ids": {1, 2}},
    "type": {"a": A, "ids": torch.float32},
}


@pytest.mark.parametrize("x", STORED.values(), ids=STORED)
def test_a_probe_of_tensors_goes_through_a_checkpoint(x):
    monitor, messages = taken(x)
    assert messages == []
    state = reloaded(monitor.state_dict())
    assert {type(leaf) for leaf in leaves(state)} <= PLAIN
    other = build([NeuralTangentKernel(schedule=1)], Net())
    other.load_state_dict(state)
    left, right = (m._measurement.probe.inputs for m in (monitor, other))
    assert type(left) is type(right) or isinstance(left, Picture)
    assert {type(leaf) for leaf in leaves(plain(state["probe"]))} <= PLAIN


@pytest.mark.parametrize("x", LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_probe_of_other_things_is_left_out_and_said_once(x):
    monitor, messages = taken(x)
    if monitor._measurement.probe is None:  # such a batch was refused before
        return
    state = reloaded({"model": monitor.model.state_dict(), "monitor": monitor.state_dict()})["monitor"]
    assert {type(leaf) for leaf in leaves(state)} <= PLAIN
    assert state["probe"] is None
    (message,) = messages
    assert message.startswith("the checkpoint is made without the probe: a checkpoint holds tensors, numbers")
    other = build([NeuralTangentKernel(schedule=1)], Net())
    (message,) = said(lambda: other.load_state_dict(state))
    assert "What begins anew: ntk (the probe is not in the checkpoint)" in message


def test_a_probe_that_nothing_rests_on_is_not_saved():
    monitor = steps(build([FluctuationDissipation(), GradientNoiseScale(schedule=1)]), 2)
    assert monitor.state_dict()["probe"] is None


def test_a_checkpoint_is_as_large_as_what_is_in_it():
    state = plain({"row": torch.zeros(1000, 1000)[3]})
    assert state["row"].untyped_storage().nbytes() == 4000
    monitor = steps(build([NeuralTangentKernel(schedule=1)], probe_size=2), 3)
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    assert len(file.getvalue()) < 20_000


@dataclass(frozen=True)
class Keeper(Controller):
    """Keeps something in its memory."""

    knobs = ("learning_rate",)
    thing: object = None

    def observables(self):
        return (JacobianNorm(schedule=1),)

    def start(self):
        return {"next": 0, "thing": self.thing}

    def effect(self, state):
        return Effect({"": 1.0 + 0.0 * len(str(state["thing"]))})

    def decide(self, view, state):
        return [], {**state, "next": view.step + 1}, ""


@pytest.mark.parametrize("thing", [Path("x"), torch.float32, {1}, object()], ids=lambda t: type(t).__name__)
def test_a_controllers_memory_that_cannot_be_saved_is_left_out_and_said(thing):
    monitor = steps(build([], controllers=[Keeper(thing)]), 2)
    states = []
    (message,) = said(lambda: states.append(reloaded(monitor.state_dict())))
    assert message.startswith("the checkpoint is made without the controllers' memory: a checkpoint holds")
    assert states[0]["control"] is None
    monitor.close()


@pytest.mark.parametrize("thing", [np.float64(0.5), np.int64(3), (1, 2), [None, "a"]], ids=repr)
def test_numbers_of_numpy_are_saved_as_numbers(thing):
    monitor = steps(build([], controllers=[Keeper(thing)]), 2)
    assert {type(leaf) for leaf in leaves(reloaded(monitor.state_dict()))} <= PLAIN
    monitor.close()


def test_an_average_that_cannot_be_saved_is_left_out_and_said_once():
    class Secretive(Mean):
        def state_dict(self):
            raise RuntimeError("it is nobody's business")

    monitor = steps(build([GradientNoiseScale(schedule=1, estimator=Secretive()), JacobianNorm()]), 2)
    (message,) = said(lambda: (monitor.state_dict(), monitor.state_dict()))
    assert "made without noise: RuntimeError: it is nobody's business." in message
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(monitor.state_dict()["observables"]) == ["jacobian"]


def test_a_seal_holds_for_what_was_sealed():
    part = {"a": [1, 2.0, None, "x", math.nan], "t": torch.zeros(2), "d": {3: True}}
    assert list(opened(sealed(part))) == list(part)
    for name, value in [
        ("a", [1, 2.0]),
        ("t", torch.zeros(3)),
        ("t", torch.zeros(2).double()),
        ("d", {3: 1}),
    ]:
        assert opened({**sealed(part), name: value}) is None
    assert opened(part) is None
    assert opened({**sealed(part), "more": 1}) is None
    assert opened(None) is opened([1]) is None


# -- what has changed ------------------------------------------------------------------------------


def resume(before, after):
    """Readings of a run that goes on from another one's state, and what was said on loading."""
    state = reloaded(steps(before, 6).state_dict())
    messages = said(lambda: after.load_state_dict(state))
    assert after.step == 6
    rest = said(lambda: steps(after, 6))
    assert rest == []
    return messages


SETTINGS = {
    "projections": (NeuralTangentKernel(schedule=1), NeuralTangentKernel(schedule=1, num_projections=2)),
    "seed": (JacobianNorm(schedule=1), JacobianNorm(schedule=1, seed=1)),
    "outputs": (NeuralTangentKernel(schedule=1), NeuralTangentKernel(schedule=1, outputs="diagonal")),
    "verify": (
        FluctuationDissipation(schedule=1, sampling=1, verify=True),
        FluctuationDissipation(schedule=1, sampling=1),
    ),
    "centred": (
        FluctuationDissipation(schedule=1, sampling=1),
        FluctuationDissipation(schedule=1, sampling=1, centred=True),
    ),
    "source": (GradientNoiseScale(schedule=1), GradientNoiseScale(schedule=1, source="per example")),
    "cross check": (
        GradientNoiseScale(schedule=1),
        GradientNoiseScale(schedule=1, cross_check="per example"),
    ),
    "window": (GradientCosine(schedule=1), GradientCosine(schedule=1, estimator=Window(7))),
    "average": (GradientCosine(schedule=1, estimator=Mean()), GradientCosine(schedule=1, estimator=Ema(0.9))),
}


@pytest.mark.parametrize(("before", "after"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("back", [False, True])
def test_other_settings_begin_anew_and_say_so(before, after, back):
    before, after = (after, before) if back else (before, after)
    monitor = build([after])
    (message,) = resume(build([before]), monitor)
    assert f"anew: {after.group} (it was measured with other settings)" in message
    finite = [reading for reading in monitor.latest.values() if reading.is_finite]
    assert {reading.key.split("/")[1] for reading in finite} == {after.group, "cost"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (NeuralTangentKernel(schedule=1), NeuralTangentKernel(schedule=3, max_memory=10**9)),
        (
            FluctuationDissipation(schedule=1, sampling=1),
            FluctuationDissipation(schedule=1, sampling=2, tolerance=0.1, test="sasa"),
        ),
        (GradientNoiseScale(schedule=1, sampling=1), GradientNoiseScale(schedule=2)),
    ],
)
def test_settings_that_no_average_rests_on_may_change(before, after):
    assert resume(build([before]), build([after])) == []


def reordered(net):
    last, first = [*net[2].parameters()], [*net[0].parameters()]
    return torch.optim.SGD([{"params": last}, {"params": first}], lr=0.05, weight_decay=0.01)


def renamed():
    net = network()
    return nn.Sequential(collections.OrderedDict(one=net[0], two=net[1], three=net[2]))


CHANGES = {
    "wider": (lambda: build(net=network(width=20)), "another model", 5),
    "deeper": (lambda: build(net=network(depth=2)), "another model", 5),
    "renamed": (lambda: build(net=renamed()), "another model", 5),
    "optimizer": (lambda: build(optimizer=torch.optim.AdamW), "another optimizer", 3),
    "subclass": (lambda: build(optimizer=type("Mine", (torch.optim.SGD,), {})), "another optimizer", 3),
    "groups": (lambda: build(optimizer=reordered), "other parameter groups", 3),
    "data": (lambda: build(dataset_size=100), "a data set of another size", 3),
    "drawing": (lambda: build(replacement=True), "batches drawn in another way", 3),
    "loss": (lambda: build(loss_reduction="sum"), "another loss_reduction", 3),
}


@pytest.mark.parametrize(("make", "reason", "count"), CHANGES.values(), ids=CHANGES)
def test_another_run_begins_anew_where_its_averages_rest_on_the_change(monkeypatch, make, reason, count):
    init = Monitor.__init__

    def with_optimizer(self, net, optimizer, *args, **kwargs):
        if not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer(net) if optimizer is reordered else optimizer(net.parameters(), lr=0.01)
        init(self, net, optimizer, *args, **kwargs)

    monkeypatch.setattr(Monitor, "__init__", with_optimizer)
    monitor = make()
    (message,) = resume(build(), monitor)
    assert f"the checkpoint is of {reason}" in message
    names = message.partition("anew: ")[2].partition(" (")[0].split(", ")
    assert len(names) == count
    assert all(math.isfinite(latest(monitor, key)) for key in ("ntk/drift", "fdr/right", "noise/trace"))


def test_drift_starts_from_nothing_on_another_model():
    wide = build([NeuralTangentKernel(schedule=1)], network(width=32))
    state = steps(build([NeuralTangentKernel(schedule=1)]), 4).state_dict()
    assert len(said(lambda: wide.load_state_dict(state))) == 1
    steps(wide, 1)
    assert latest(wide, "ntk/drift") == 0.0


def test_another_size_of_inputs_begins_anew_on_another_probe():
    state = steps(build(), 4).state_dict()
    other = build(net=network(inputs=4))
    (message,) = said(lambda: other.load_state_dict(state))
    assert "another model" in message
    assert said(lambda: steps(other, 4, lambda: batch(4))) == []
    assert math.isfinite(latest(other, "ntk/drift"))


def test_a_compiled_model_goes_on_from_the_state_of_the_plain_one():
    state = steps(build(), 4).state_dict()
    net = network()
    compiled = torch.compile(net, backend="eager")
    assert said(lambda: Monitor(compiled, sgd(net), all_observables()).load_state_dict(state)) == []


def test_the_same_probe_given_again_goes_on_and_another_one_does_not():
    x = torch.randn(5, 6)
    state = steps(build([NeuralTangentKernel(schedule=1)], probe=x), 3).state_dict()
    assert (
        said(lambda: build([NeuralTangentKernel(schedule=1)], probe=x.clone()).load_state_dict(state)) == []
    )
    other = build([NeuralTangentKernel(schedule=1)], probe=x + 1)
    (message,) = said(lambda: other.load_state_dict(state))
    assert "ntk (the probe given to Monitor is used, not the one in the checkpoint)" in message
    steps(other, 1)
    assert latest(other, "ntk/drift") == 0.0


@pytest.mark.parametrize(("probe", "kept"), [(None, True), ("forget", False)])
def test_a_probe_to_be_forgotten_is_in_no_checkpoint(probe, kept):
    x, y = batch()

    def examples_in(state):
        tensors = [leaf for leaf in leaves(plain(state)) if isinstance(leaf, torch.Tensor)]
        return any(torch.isin(x, tensor.to(x.dtype)).any() for tensor in tensors)

    monitor = steps(build(probe=probe), 4, lambda: (x, y))
    state = reloaded(monitor.state_dict())
    assert examples_in(state) is kept
    other = build(probe=probe)
    messages = said(lambda: other.load_state_dict(state))
    assert any("(the probe is not in the checkpoint)" in text for text in messages) is not kept
    steps(other, 2)
    assert math.isfinite(latest(other, "ntk/trace"))
    assert examples_in(other.state_dict()) is kept


@pytest.mark.parametrize("build_one", [build, Session])
def test_another_word_for_a_probe_is_refused(build_one):
    with pytest.raises(InputError, match=r"'forgt'. Write probe=\(x, y\) or probe=.forget"):
        build_one(probe="forgt")


def test_a_controller_that_has_become_another_one_begins_anew():
    monitor = steps(build([], controllers=[Keeper("x")]), 2)
    state = copy.deepcopy(monitor.state_dict())
    monitor.close()
    state["control"]["controllers"]["Keeper"]["memory"] = {"next": 3}
    other = build([], controllers=[Keeper("x")])
    (message,) = said(lambda: other.load_state_dict(state))
    assert "Keeper cannot go on from the checkpoint, and begins anew: 'thing'" in message
    assert said(lambda: steps(other, 3)) == []
    other.close()


# -- what is damaged -------------------------------------------------------------------------------


def test_what_is_no_state_is_refused_and_nothing_has_changed():
    good = steps(build(), 3).state_dict()
    wrong = [None, 3, "state", [], {}, {"version": STATE_VERSION}, {"step": 3}, {**good, "step": "x"}]
    wrong += [{**good, "step": step} for step in (None, 1.5, True, -1, torch.tensor(3))]
    wrong += [{key: part for key, part in good.items() if key != name} for name in good]
    wrong += [{**good, "observables": [1]}, {**good, "memories": None}, {**good, "version": "5"}]
    monitor = steps(build(), 2)
    before = monitor.state_dict()
    for state in wrong:
        with pytest.raises(InputError, match=r"Pass what monitor\.state_dict\(\) returned"):
            monitor.load_state_dict(state)
        assert repr(monitor.state_dict()) == repr(before)
    assert said(lambda: steps(monitor, 2)) == []


@pytest.mark.parametrize("group", ["fdr", "noise", "ntk", "jacobian", "gradient_cosine"])
def test_one_damaged_part_begins_anew_and_the_others_go_on(group):
    state = steps(build(), 4).state_dict()
    state["observables"][group]["estimator"]["span"] = "x"
    monitor = build()
    (message,) = said(lambda: monitor.load_state_dict(state))
    assert f"anew: {group} (its part of the checkpoint is damaged)." in message
    others = set(state["observables"]) - {group}
    for name in others:
        assert repr(monitor.state_dict()["observables"][name]) == repr(state["observables"][name])
    assert said(lambda: steps(monitor, 3)) == []


STATE = None


def real_state():
    global STATE
    if STATE is None:
        monitor = steps(build(controllers=[EquilibriumLR(check_every=1)], dataset_size=50), 5)
        STATE = monitor.state_dict()
        monitor.close()
    return copy.deepcopy(STATE)


def paths(nest, path=()):
    inside = nest.items() if isinstance(nest, dict) else enumerate(nest) if isinstance(nest, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from paths(part, (*path, key))


ODD = [
    *(None, True, -1, 10**12, 0.5, math.nan, "x", [], {}, [None], {"a": 1}, (1, 2), object(), {1}, len),
    *(torch.zeros(()), torch.zeros(3), torch.zeros(2, 2), torch.tensor([math.nan]), np.zeros(3), b"x"),
]


def damage(state, path, value):
    """Put a value somewhere; take away what is there where the value is ``del``."""
    *above, last = path
    for key in above:
        state = state[key]
    if isinstance(value, str) and value == "del":
        del state[last]
    else:
        state[last] = value


@settings(max_examples=200, derandomize=True, deadline=None)
@given(data=st.data())
def test_random_damage_ends_no_loop(data):
    state = real_state()
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([*paths(state)] or [()]))
        if path:
            damage(state, path, data.draw(st.sampled_from(["del", *ODD])))
    monitor = build(controllers=[EquilibriumLR(check_every=1)], dataset_size=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(GradiometerError):
            monitor.load_state_dict(state)
        first = monitor.step
        steps(monitor, 2)
        assert monitor.step == first + 2
        monitor.table()
        reloaded(monitor.state_dict())
        monitor.close()
    assert all(math.isfinite(latest(monitor, key)) for key in ("noise/trace", "ntk/drift"))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_session_starts_with_any_state(data):
    state = {"monitor": real_state(), "batches": 3}
    path = data.draw(st.sampled_from([*paths(state)]))
    damage(state, path, data.draw(st.sampled_from(["del", *ODD])))
    net = network()
    session = Session(controllers=[EquilibriumLR(check_every=1)], observables=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session.load_state_dict(state)
        session.start(net, [sgd(net)])
        session.begin(batch(), step=7, logged=7, index=0)
        session.end()
        session.close()


@pytest.mark.parametrize(
    "state",
    [{"monitor": {}, "batches": 0}, {"monitor": None}, {"other": 1}, {"monitor": {"version": 99, "step": 3}}],
)
def test_a_session_says_that_it_cannot_go_on(state):
    net, session = network(), Session(observables=[JacobianNorm(schedule=1)])

    def run():
        session.load_state_dict(state)
        session.start(net, [sgd(net)])

    (message,) = said(run)
    assert "everything that is measured begins anew" in message
    steps(session.monitor, 2)
    session.close()
