"""Sentences and the closing table say no more than the readings do."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    Reading,
)
from gradiometer.engine.cost import COST_QUANTITIES
from gradiometer.engine.guard import Guard
from gradiometer.errors import MeasurementWarning
from gradiometer.observables import OBSERVABLES
from gradiometer.record.table import sentence, table

WORDS = {
    f"{kind.group}/{name}": quantity for kind in OBSERVABLES for name, quantity in kind.quantities.items()
}


def reading(name, value, stderr=math.nan, **more):
    words = WORDS["/".join(name.split("/")[:2])]
    return Reading(f"d/{name}", value, stderr, quantity=words, **more)


def said(first, *others):
    return sentence(first, {each.key: each for each in (first, *others)})


UNDECIDED = {
    "resolved": False,
    "note": "SGD form; without weight decay the norm may grow for ever; the learning rate changes",
}

# -- has the run settled? --------------------------------------------------------------------------


def test_a_decision_is_said_with_what_to_do():
    assert said(reading("fdr/stationary", 1.0)).startswith("the run has settled: lower the learning rate")
    assert said(reading("fdr/stationary", 0.0)) == "the run is still on its way."


@pytest.mark.parametrize("section", ["", "/head", "/0.scale_invariant"])
def test_no_decision_is_said_with_its_reason(section):
    undecided = reading(f"fdr/stationary{section}", math.nan, **UNDECIDED)
    assert said(undecided) == "not decided: the learning rate changes."


@pytest.mark.parametrize("section", ["", "/head"])
@pytest.mark.parametrize(
    ("decision", "beginning"),
    [
        ({"value": 1.0}, "stationary: the norm of the weights has stopped drifting"),
        ({"value": 0.0}, "transient: the weights are still on their way"),
        ({"value": math.nan, **UNDECIDED}, "not resolved: the learning rate changes."),
    ],
)
def test_the_ratio_says_what_was_decided(decision, beginning, section):
    ratio = reading(f"fdr/ratio{section}", 1.01, 0.01)
    assert said(ratio, reading(f"fdr/stationary{section}", **decision)).startswith(beginning)


def test_a_ratio_far_from_one_is_transient_before_anything_is_decided():
    undecided = reading("fdr/stationary", math.nan, **UNDECIDED)
    assert said(reading("fdr/ratio", 3.0, 0.1), undecided).startswith("transient")
    assert said(reading("fdr/ratio", 3.0, 2.0), undecided).startswith("not resolved")


@pytest.mark.parametrize(
    ("value", "stderr", "beginning"),
    [(1.02, 0.01, "stationary"), (1.5, 0.01, "transient"), (1.02, 0.5, "not resolved: the window")],
)
def test_a_ratio_alone_is_held_against_its_error(value, stderr, beginning):
    assert said(reading("fdr/ratio", value, stderr)).startswith(beginning)


# -- is the batch size right? ----------------------------------------------------------------------

SCALE = {"unit": "samples", "resolved": False, "high": math.inf}


def test_a_scale_that_is_not_resolved_shows_its_lower_bound():
    why = "not resolved, at least 250: the gradient is below its own noise, average longer"
    bounded = reading("noise/scale", math.nan, low=250.0, note=f"per example; {why}", **SCALE)
    assert said(bounded) == f"{why}."
    (row,) = [line for line in table({bounded.key: bounded}, {}).splitlines() if "  scale" in line]
    assert ">= 250 " in row
    assert "nan" not in row


@pytest.mark.parametrize("low", [math.nan, -3.0, 0.0])
def test_a_scale_of_which_nothing_is_known_is_called_so(low):
    unknown = reading("noise/scale", math.nan, low=low, **SCALE)
    text = table({unknown.key: unknown}, {})
    assert "not resolved" in text
    assert ">=" not in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("fraction", "beginning"),
    [(0.05, "noise-limited"), (0.5, "the batch is of the order"), (0.95, "the batch is larger")],
)
def test_a_scale_is_held_against_the_batch(fraction, beginning):
    scale = reading("noise/scale", 100.0, 5.0)
    assert said(scale, reading("noise/critical_batch_fraction", fraction)).startswith(beginning)


@pytest.mark.parametrize("name", ["temperature", "sgd_scale"])
def test_batches_without_replacement_are_warned_of(name):
    sampled = reading(
        f"noise/{name}",
        1e-4,
        sentence="What it is.",
        note="per example; batches are drawn without replacement",
    )
    assert said(sampled).startswith("What it is. Batches are drawn without replacement")
    assert "colder than this" in said(sampled)
    assert said(reading(f"noise/{name}", 1e-4, sentence="What it is.", note="per example")) == "What it is."


# -- from a run ------------------------------------------------------------------------------------


def run(lr, steps, **arguments):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    observables = [FluctuationDissipation(schedule=5, sampling=1), GradientNoiseScale(schedule=5)]
    with Monitor(model, optimizer, observables, on_error="raise", **arguments) as monitor:
        for _ in range(steps):
            x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
            y = torch.randint(3, (8,), generator=generator)
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return monitor


def rows(monitor):
    """The closing table by name of the reading, each with the lines that belong to it."""
    found, name = {}, ""
    for line in monitor.table().splitlines()[2:]:
        name = line.split()[0] if line[:3].strip() else name
        found[name] = f"{found.get(name, '')} {' '.join(line.split())}".strip()
    return found


def test_the_table_of_a_short_run_says_why_nothing_is_decided():
    found = rows(run(0.1, 31, dataset_size=1000, replacement=False))
    assert "not decided: the window holds fewer than 10 records." in found["stationary"]
    assert "not resolved: the window holds fewer than 10 records." in found["ratio"]
    for name in ("temperature", "sgd_scale"):
        assert "Batches are drawn without replacement" in found[name]


def test_the_table_of_noise_alone_shows_a_lower_bound():
    # the targets have nothing to do with the inputs: at the minimum there is no gradient
    monitor = run(0.1, 401)
    scale = monitor.latest["dynamics/noise/scale"]
    assert math.isnan(scale.value)
    assert scale.low > 0
    found = rows(monitor)
    assert f">= {scale.low:.4g} samples not resolved, at least {scale.low:.3g}" in found["scale"]


def test_the_table_where_nothing_moves():
    found = rows(run(0.0, 31))
    assert "not decided: the weights do not move." in found["stationary"]
    assert "not measured" in found["ratio"]
    assert "nan" not in run(0.0, 31).table()


@pytest.mark.parametrize(
    ("value", "stderr", "begins"),
    [
        (1.8, 0.1, "beyond the edge of stability: unless the loss falls all the same, divide"),
        (1.1, 0.1, "at the edge of stability"),
        (0.95, math.nan, "at the edge of stability"),
        (0.5, 0.3, "at the edge of stability"),
        (0.5, 0.1, "stable on the probe at these weights"),
        (-0.1, 0.0, "no curvature is positive"),
    ],
)
def test_the_learning_rate_over_its_limit(value, stderr, begins):
    assert said(reading("control/lr_over_limit", value, stderr)).startswith(begins)


def test_a_limit_that_was_not_found():
    unknown = reading("control/lr_over_limit", math.nan, low=0.4, resolved=False)
    assert said(unknown) == "not resolved, at least 0.4: the largest curvature was not found."


@pytest.mark.parametrize(
    ("turned", "stderr", "begins"),
    [
        (0.001, 0.0, "lazy so far: the kernel is close"),
        (0.01, 0.0, "between lazy and"),
        (0.004, 0.001, "between lazy and"),
        (0.05, 0.01, "learning features"),
        (0.03, 0.01, "between lazy and"),
    ],
)
def test_the_turning_of_the_kernel(turned, stderr, begins):
    assert said(reading("ntk/feature_change", turned, stderr)).startswith(begins)


def test_a_kernel_that_only_grows_is_not_called_close_to_its_first_value():
    turned, drift = reading("ntk/feature_change", 0.001, 0.0), reading("ntk/drift", 30.0)
    assert said(turned, drift) == "lazy so far: the kernel has changed in scale and kept its direction."
    assert said(drift) == drift.sentence


@pytest.mark.parametrize(("share", "size"), [(0.01, "small"), (0.2, "noticeable")])
def test_the_cost_of_measuring(share, size):
    fraction = Reading("d/cost/fraction", share, quantity=COST_QUANTITIES["fraction"])
    assert said(fraction).startswith(f"measuring is a {size} share of the loop")


# -- names of someone else -------------------------------------------------------------------------

NAMES = {
    "escape": ("\x1b[2J\x07head", "\\x1b[2J\\x07head"),
    "line break": ("a\r\nb", "a\\r\\nb"),
    "surrogate": ("\ud800head", "\\ud800head"),
    "right to left": ("head\u202e", "head\\u202e"),
    "slash": ("head/bias", "head.bias"),
    "empty": ("", "0"),
    "blank": (" \t", "\\t"),
    "number": (3, "3"),
}


def two_groups(*names, layers=False, steps=3):
    """A monitor after a few steps on two groups of these names."""
    net = nn.Linear(3, 2)
    groups = [{"params": [p], "name": name} for p, name in zip(net.parameters(), names, strict=True)]
    sgd, memory = torch.optim.SGD(groups, lr=0.1), MemoryRecorder()
    observables = [FluctuationDissipation(schedule=1, sampling=1)]
    monitor = Monitor(net, sgd, observables, recorders=[memory], layers=layers, on_error="raise")
    for _ in range(steps):
        net(torch.randn(4, 3)).square().sum().backward()
        monitor.before_step()
        sgd.step()
    return monitor


@pytest.mark.parametrize(("name", "shown"), NAMES.values(), ids=NAMES)
def test_names_are_shown_as_text_and_are_parts_of_keys(name, shown):
    monitor = two_groups(name, "other")
    assert f"dynamics/fdr/right/{shown}" in monitor.latest
    assert all(line.isprintable() for line in monitor.table().splitlines())
    assert f"  right/{shown} " in monitor.table()


@pytest.mark.parametrize("names", [("a", "a"), ("", ""), ("a\n", "a\\n"), ("1", ""), ("a/b", "a.b")])
def test_groups_of_one_name_have_readings_of_their_own(names):
    monitor = two_groups(*names)
    assert len([key for key in monitor.latest if key.startswith("dynamics/fdr/right/")]) == 2


def test_a_layer_of_any_name_is_shown_as_text():
    net = nn.Sequential()
    net.add_module("in\x1b[2J", nn.Linear(3, 3))
    net.add_module("out/put", nn.Linear(3, 2))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = Monitor(net, sgd, [FluctuationDissipation(schedule=1, sampling=1)], layers=True)
    for _ in range(3):
        net(torch.randn(4, 3)).square().sum().backward()
        monitor.before_step()
        sgd.step()
    assert {"dynamics/fdr/right/layer.in\\x1b[2J", "dynamics/fdr/right/layer.out.put"} <= set(monitor.latest)


@pytest.mark.parametrize("name", ["x" * 300, "word " * 60, "\x07" * 100], ids=["long", "words", "bells"])
def test_a_long_name_is_cut_and_the_lines_stay_short(name):
    monitor = two_groups(name, "other")
    lines = monitor.table().splitlines()
    assert max(map(len, lines)) <= 200
    assert any(line.startswith("  right/") and "..." in line[:82] for line in lines)


def test_whatever_a_reading_says_cannot_reach_the_terminal():
    sly = Reading(
        "d/own/size", 1.0, unit="\x1b[31m" + "u" * 300, sentence="\x9b2J Big.", note="\x1b]0;title\x07"
    )
    text = table({sly.key: sly}, {"own": "\x1b[2J"}, ["\x1b[2J" + "d" * 300])
    assert all(line.isprintable() and len(line) <= 200 for line in text.splitlines())
    assert "\\x9b2J Big." in text


def test_a_warning_shows_what_it_quotes_as_text():
    with pytest.warns(MeasurementWarning) as caught:
        Guard("warn").warn("cannot read\n\x1b[2J\ud800")
    assert str(caught[0].message) == "cannot read\n\\x1b[2J\\ud800"


# -- the last record could not be read -------------------------------------------------------------


def ended(observables, spoil, steps=12, **settings):
    """The closing table of a run that was spoilt half-way."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
    monitor = Monitor(net, sgd, observables, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(steps):
            x, y = torch.randn(8, 4), torch.randint(3, (8,))
            if step >= steps // 2:
                spoil(step, net, sgd)
            with monitor.micro_batch(x, y):
                loss = F.cross_entropy(net(x), y)
                if loss.requires_grad:
                    loss.backward()
            monitor.before_step()
            sgd.step()
            sgd.zero_grad()
        monitor.close()
    return monitor.table()


def freeze(step, net, sgd):
    net.requires_grad_(False)


def spoil_weights(step, net, sgd):
    with torch.no_grad():
        net[0].weight.fill_(math.nan)


def jump(step, net, sgd):
    sgd.param_groups[0]["lr"] *= 0.5


def vanish(step, net, sgd):
    sgd.param_groups[0]["lr"] = 0.0 if step % 2 else 1e-9


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (freeze, "Sequential has no trainable parameter."),
        (spoil_weights, "it is not a finite number."),
        (jump, "its window began anew, because the optimizer's settings"),
        (vanish, "its window began anew, because the optimizer's settings"),
    ],
)
def test_every_group_keeps_its_last_reading_and_says_when_it_was_and_why(spoil, why):
    observables = [
        FluctuationDissipation(schedule=1, sampling=1),
        GradientNoiseScale(schedule=1),
        NeuralTangentKernel(schedule=1),
        JacobianNorm(schedule=1),
    ]
    text = ended(observables, spoil)
    (ratio,) = [line for line in text.splitlines() if line.startswith("  ratio ")]
    assert f"last read at step {9 if spoil is freeze else 5}." in ratio
    assert f"not read lately: {why}" in " ".join(text.split())
    for name in ("ratio", "scale", "drift", "frobenius_norm"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
        assert "not measured" not in line


def test_what_is_read_again_is_no_longer_called_old():
    text = ended([GradientNoiseScale(schedule=1)], lambda step, net, sgd: sgd.zero_grad())
    assert "last read" not in text
    assert "not read lately" not in text


def test_what_was_never_read_is_not_measured():
    never = reading("noise/sgd_scale", math.nan)
    text = table({never.key: never}, {}, past={}, reasons={"noise": "no size."})
    assert "not measured" in text
    assert "last read" not in text
