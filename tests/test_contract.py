"""What every observable and every public function promises."""

import dataclasses
import importlib
import inspect
import io
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradiometer.observables
from gradiometer import (
    Ema,
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    Observable,
    Snapshot,
)
from gradiometer.collect.gradient import PreviousGradientCollector
from gradiometer.collect.registry import COLLECTORS
from gradiometer.control.panel import GROUP, QUANTITIES
from gradiometer.errors import MissingFieldError
from gradiometer.observables import DEFAULT_OBSERVABLES, OBSERVABLES, default_observables
from gradiometer.observables.schedules import Schedule

ROOT = Path(__file__).parents[1]
PLACEHOLDER = re.compile(r"TODO|TBD|FIXME|XXX|\.\.\. *$|lorem|placeholder", re.IGNORECASE | re.MULTILINE)
FUNCTIONS = sorted(
    name
    for name in gradiometer.observables.__all__
    if inspect.isfunction(getattr(gradiometer.observables, name))
    and name not in ("as_schedule", "default_observables", "gather")
)


def sections(thing):
    """Headings of a Google-style docstring, and their texts."""
    text = inspect.getdoc(thing) or ""
    parts = re.split(r"^(\w+):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("kind", OBSERVABLES)
def test_observables_are_documented(kind):
    found = sections(kind)
    for name in ("Args", "Units", "Source", "Shapes", "Example"):
        assert found.get(name, "").strip(), f"the docstring of {kind.__name__} has no section {name}"
        assert not PLACEHOLDER.search(found[name]), name
    assert ">>>" in found["Example"]
    for field in dataclasses.fields(kind):
        assert re.search(rf"^    {field.name}: \S", found["Args"], re.MULTILINE), field.name
    for method in ("statistics", "levels", "note", "readings"):
        assert inspect.getdoc(getattr(kind, method))


@pytest.mark.parametrize("kind", OBSERVABLES)
def test_every_reading_has_a_row_in_the_docs(kind):
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs" / "observables.md").read_text().splitlines()
        if line.startswith("| `dynamics/")
    ]
    assert len({row[0] for row in rows}) == len(rows)
    table = {row[0]: row for row in rows}
    for name, quantity in kind.quantities.items():
        row = table.get(f"`dynamics/{kind.group}/{name}`")
        assert row is not None, name
        assert len(row) == 7
        assert all(cell and not PLACEHOLDER.search(cell) for cell in row), name
        plain = row[2].replace("²", "^2")
        assert plain == quantity.unit, (name, row[2], quantity.unit)
        assert quantity.sentence.endswith(".")
    controllers = {f"`dynamics/{GROUP}/{name}`" for name in QUANTITIES}
    mine = {key for key in table if key.startswith(f"`dynamics/{kind.group}/")} - controllers
    assert mine == {f"`dynamics/{kind.group}/{name}`" for name in kind.quantities}


def test_functions_of_the_public_table_are_the_expected_ones():
    assert FUNCTIONS == [
        "best_step",
        "empirical_ntk",
        "fluctuation_dissipation",
        "gradient_noise_scale",
        "harmonicity",
        "jacobian_norms",
        "jacobian_singular_values",
        "kernel_alignment",
        "kernel_angle",
        "kernel_distance",
        "noise_curvature",
        "per_example_grad_norms",
        "projection_stderr",
        "relative_drift",
        "second_fluctuation_dissipation",
        "sgd_noise_scale",
        "shuffling_factor",
        "stability_limit",
        "suggest_learning_rate",
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_documented(name):
    function = getattr(gradiometer.observables, name)
    found = sections(function)
    for heading in ("Args", "Returns", "Shapes", "Units", "Raises", "Source", "Example"):
        assert found.get(heading, "").strip(), heading
        assert not PLACEHOLDER.search(found[heading].replace("[N, ...]", "")), heading
    assert ">>>" in found["Example"]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^    {parameter}: \S", found["Args"], re.MULTILINE), parameter
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|JMLR", found["Source"])


def test_few_names_stand_at_top_level():
    assert len(gradiometer.__all__) <= 40


@pytest.mark.parametrize("name", sorted(gradiometer._MOVED))
def test_a_name_that_has_moved_says_where_to(name):
    with pytest.warns(DeprecationWarning, match=rf"write from gradiometer\.\S+ import {name}$"):
        thing = getattr(gradiometer, name)
    home = importlib.import_module(f"gradiometer.{gradiometer._MOVED[name]}")
    assert thing is getattr(home, name)
    assert name not in dir(gradiometer)


@pytest.mark.parametrize("name", sorted(set(gradiometer.__all__) - {"__version__"}))
def test_everything_public_has_a_docstring_and_every_parameter_a_type(name):
    thing = getattr(gradiometer, name)
    assert inspect.getdoc(thing)
    signature = inspect.signature(thing)
    untyped = [
        p.name
        for p in signature.parameters.values()
        if p.annotation is inspect.Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    assert not untyped


@pytest.mark.parametrize("kind", OBSERVABLES)
def test_observables_are_frozen_values_without_state(kind):
    observable = kind()
    assert isinstance(observable, Observable)
    assert isinstance(observable.schedule, Schedule)
    assert observable.group
    assert set(observable.arrays) <= set(observable.quantities)
    known = {*COLLECTORS, *(f.name for f in dataclasses.fields(Snapshot))}
    for thorough in (False, True):
        assert observable.required(thorough) | observable.level_needs <= known
    with pytest.raises(dataclasses.FrozenInstanceError):
        observable.schedule = 3
    assert len({o.group for o in default_observables()}) == len(DEFAULT_OBSERVABLES)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def run(kind, steps=12):
    """A loop that measures one observable at every second step."""
    model, memory = network(), MemoryRecorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"sampling": 1} if kind().sampling is not None else {}
    observable = kind(schedule=2, **arguments)
    before = dict(vars(observable))
    with Monitor(
        model,
        optimizer,
        [observable],
        recorders=[memory],
        dataset_size=100,
        loss_fn=F.cross_entropy,
        on_error="raise",
    ) as monitor:
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
            y = torch.randint(3, (8,), generator=generator)
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    assert vars(observable) == before
    assert observable.estimator.state_dict()["now"] is None
    return memory, monitor


@pytest.mark.parametrize("kind", OBSERVABLES)
def test_readings_are_finite_and_only_those_declared(kind):
    memory, _ = run(kind)
    latest = {key: r for key, r in memory.latest().items() if key.split("/")[1] == kind.group}
    names = {key.split("/")[2] for key in latest}
    # outputs="full", verify=True, source="norm layers", cross_check=
    optional = {"off_diagonal", "residual", "norm_layer_factor", "source_ratio", "shuffling"}
    optional |= {"preconditioned_scale", "preconditioned_trace", "preconditioned_grad_sq_norm"}
    assert names == set(kind.quantities) - optional
    for key, reading in latest.items():
        if isinstance(reading.value, float):
            assert math.isfinite(reading.value) or not reading.resolved, key
        else:
            assert key.split("/")[2] in kind.arrays
            assert reading.value.size > 0
        assert reading.unit == kind.quantities[key.split("/")[2]].unit
        assert not reading.stderr < 0
    assert any(r.note for r in latest.values()), "write note(snapshot): what the numbers rest on"


# -- resumption ------------------------------------------------------------------------------------

LAST = 16


def often(kind, **settings):
    sampling = {"sampling": 1} if kind().sampling is not None else {}
    return kind(schedule=2, **sampling, **settings)


VARIANTS = {
    **{kind.__name__: often(kind) for kind in OBSERVABLES},
    "full kernel": NeuralTangentKernel(schedule=2, outputs="full"),
    "preconditioned kernel": NeuralTangentKernel(schedule=2, preconditioned=True),
    "norm layers": GradientNoiseScale(schedule=4, sampling=1, source="norm layers"),
    "cross-checked": often(GradientNoiseScale, cross_check="split batch"),
    "preconditioned noise": often(GradientNoiseScale, preconditioned=True),
    "verified": FluctuationDissipation(schedule=2, verify=True),
    "centred": FluctuationDissipation(schedule=2, sampling=1, centred=True),
    "averaged": JacobianNorm(schedule=4, sampling=1, estimator=Ema(0.8), num_projections=2),
}


def normalised_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def optimizer_for(observable, model):
    adaptive = getattr(observable, "preconditioned", False)
    if adaptive:
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01)


def part(observable, first, last, saved=None):
    """Steps of one training run, from a checkpoint on; its readings, and a checkpoint at the end."""
    model, memory = normalised_network(), MemoryRecorder()
    optimizer = optimizer_for(observable, model)
    monitor = Monitor(
        model, optimizer, [observable], recorders=[memory], dataset_size=100, loss_fn=F.cross_entropy
    )
    if saved is not None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        monitor.load_state_dict(state["monitor"])
    with monitor:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
            y = torch.randint(3, (8,), generator=generator)
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        parts = {"model": model, "optimizer": optimizer, "monitor": monitor}
        buffer = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
    return readings_of(memory), buffer.getvalue()


def readings_of(memory):
    """Every bit of what was read, by step and key; times are left out."""
    bits = {}
    for step, readings in memory.records:
        for r in readings:
            if "/cost/" not in r.key:
                value = r.value.hex() if isinstance(r.value, float) else r.value.tobytes()
                bits[step, r.key] = (value, r.stderr.hex(), r.resolved, r.note)
    return bits


def lost_by_resuming(observable, stop):
    """Readings after a stop that a resumed run does not repeat to the last bit."""
    whole, _ = part(observable, 0, LAST)
    _, saved = part(observable, 0, stop)
    resumed, _ = part(observable, stop, LAST, saved)
    expected = {where: bits for where, bits in whole.items() if where[0] >= stop}
    assert expected
    return sorted(where for where in expected | resumed if expected.get(where) != resumed.get(where))


@pytest.mark.parametrize("stop", [5, 8, 11])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_reads_what_the_uninterrupted_one_reads(name, stop):
    assert lost_by_resuming(VARIANTS[name], stop) == []


def test_a_memory_outside_the_checkpoint_is_noticed(monkeypatch):
    """The comparison has teeth: a collector that keeps something aside is found out."""

    class Forgetful(PreviousGradientCollector):
        saved = frozenset()

    monkeypatch.setitem(COLLECTORS, "previous_gradient", Forgetful)
    assert lost_by_resuming(VARIANTS["GradientCosine"], 8)


NEEDS = {
    "probe": r"Monitor\(probe=\.\.\.\) or the first call of monitor\.micro_batch",
    "gradient_parts": r"monitor\.micro_batch\(x, y\) around each forward and backward",
    "curvature": r"Monitor\(loss_fn=\.\.\.\)",
    "step_curvature": r"Monitor\(loss_fn=\.\.\.\)",
    "gradient": r"monitor\.before_step\(\) before",
    "previous_gradient": r"monitor\.before_step\(\) before",
    "update": r"monitor\.before_step\(\) before the optimizer's step",
    "weights": r"the optimizer's step itself",
    "parameter_steps": r"the optimizer's step itself",
}


@pytest.mark.parametrize("kind", OBSERVABLES)
def test_a_missing_field_is_named_with_the_call_that_supplies_it(kind):
    observable = kind()
    named = set()
    for method, needs in (
        (observable.statistics, observable.required(False)),
        (observable.levels, kind.level_needs),
    ):
        fields = {"model": network()}
        for _ in needs:
            with pytest.raises(MissingFieldError, match=r"the snapshot of step 7 has no '(\w+)'") as caught:
                method(Snapshot(step=7, **fields))  # every field of needs, before it returns None
            field = re.search(r"no '(\w+)'", str(caught.value)).group(1)
            fields[field] = None
            named.add(field)
            assert re.search(NEEDS[field], str(caught.value))
    assert named == observable.required(True) | observable.level_needs
