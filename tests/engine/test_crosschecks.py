"""Two measurements of one quantity: silent where they agree, one warning where they do not."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import FluctuationDissipation, GradientNoiseScale, MemoryRecorder, Monitor, Reading
from gradiometer.collect.snapshot import GroupSettings
from gradiometer.engine.crosschecks import disagreements
from gradiometer.errors import MeasurementWarning
from gradiometer.observables.schedules import every

# -- the rules -------------------------------------------------------------------------------------

PLAIN = GroupSettings("0", 0.1, 0.0, 0.0, False, 0.0, True)
NOTE = "micro-batches, loss_reduction=mean, over 100 % of parameters"


def readings(**changed):
    """A stationary run of plain SGD at learning rate 0.1 and batch 8: right = 0.05 (2 + 80 / 8)."""
    table = {
        "noise/batch_grad_sq_norm": Reading("d/noise/batch_grad_sq_norm", 2 + 80 / 8, 0.2, note=NOTE),
        "fdr/weight_norm_sq": Reading("d/fdr/weight_norm_sq", 50.0),
        "fdr/stationary": Reading("d/fdr/stationary", 1.0),
        "fdr/right": Reading("d/fdr/right", 0.6, 0.006),
    }
    for name, change in changed.items():
        key = name.replace("__", "/")
        if change is None:
            del table[key]
        else:
            table[key] = replace(table[key], **change)
    return {reading.key: reading for reading in table.values()}


def found(table, *groups):
    return disagreements(table, groups or (PLAIN,), [FluctuationDissipation(), GradientNoiseScale()])


def test_readings_that_agree_are_not_mentioned():
    assert found(readings()) == {}
    assert found({}) == {}


@pytest.mark.parametrize("right", [0.5, 0.7])
def test_work_that_the_noise_does_not_do_names_both_readings(right):
    (message,) = found(readings(fdr__right={"value": right})).values()
    assert f"fdr/right, from the update, is {right:.3g} +- 0.006" in message
    assert "noise/batch_grad_sq_norm, from the gradient, gives 0.6 +- 0.01" in message
    assert "clipping after before_step()" in message


def test_four_errors_and_a_twentieth_are_allowed():
    assert found(readings(fdr__right={"value": 0.625})) == {}  # a twentieth is 0.63
    assert found(readings(fdr__right={"value": 0.635, "stderr": 0.0})) == {}  # 3.5 errors
    assert found(readings(fdr__right={"value": 0.645, "stderr": 0.0})) != {}  # 4.5 errors
    assert found(readings(fdr__right={"value": 0.8, "stderr": 0.06})) == {}
    # the gradient is sampled a fifth as often as the update, and so known sqrt(5) times less well at best
    assert found(readings(fdr__right={"value": 0.645, "stderr": 0.005})) == {}
    assert found(readings(fdr__right={"value": 0.645, "stderr": 0.004})) != {}
    assert found(readings(fdr__right={"value": 0.8, "stderr": math.nan})) == {}  # nothing is known of it


def test_decay_acts_on_the_update_alone():
    decayed = replace(PLAIN, weight_decay=0.2)
    # right (1 - eta lambda) = eta/2 (|G|^2 + S/B - lambda^2 |theta|^2)
    right = 0.05 * (2 + 80 / 8 - 0.2**2 * 50) / (1 - 0.1 * 0.2)
    assert found(readings(fdr__right={"value": right, "stderr": 1e-6}), decayed) == {}
    assert found(readings(fdr__right={"value": 0.6}), decayed) != {}


@pytest.mark.parametrize(
    ("changed", "groups"),
    [
        ({}, (replace(PLAIN, momentum=0.9),)),
        ({}, (replace(PLAIN, is_sgd=False),)),
        ({}, (PLAIN, replace(PLAIN, lr=0.01))),
        ({}, (PLAIN, replace(PLAIN, weight_decay=0.1))),
        ({"fdr__stationary": {"value": 0.0}}, (PLAIN,)),
        ({"fdr__stationary": {"value": math.nan}}, (PLAIN,)),
        ({"fdr__stationary": None}, (PLAIN,)),
        ({"noise__batch_grad_sq_norm": None}, (PLAIN,)),
        ({"noise__batch_grad_sq_norm": {"note": NOTE.replace("100", "70")}}, (PLAIN,)),
        ({"noise__batch_grad_sq_norm": {"note": NOTE.replace("mean", "sum")}}, (PLAIN,)),
        ({"noise__batch_grad_sq_norm": {"value": math.nan}}, (PLAIN,)),
    ],
)
def test_where_it_is_no_relation_nothing_is_said(changed, groups):
    wrong = {"fdr__right": {"value": 2.0}}
    assert found(readings(**wrong)) != {}
    assert found(readings(**wrong, **changed), *groups) == {}


@pytest.mark.parametrize(
    ("value", "stderr", "said"),
    [(1.0, 0.0, False), (1.3, 0.1, False), (1.3, 0.05, True), (0.7, 0.05, True), (1.04, 0.001, False)],
)
def test_sources_may_differ_by_four_errors(value, stderr, said):
    ratio = Reading("d/noise/source_ratio", value, stderr, note="per example; checked against: split batch")
    messages = found({ratio.key: ratio})
    assert bool(messages) is said
    for message in messages.values():
        assert "(per example; checked against: split batch)" in message
        assert f"{value:.3g} +- {stderr:.2g} times" in message


# -- real runs -------------------------------------------------------------------------------------

MODES, CURVATURE, NOISE = 40, 0.5, 2.0


class Quadratic(nn.Module):
    """f = h/2 |theta - x|^2: the gradient is that of a quadratic, with noise of variance C per mode."""

    def __init__(self, groups=1):
        super().__init__()
        self.parts = nn.ParameterList(
            [nn.Parameter(torch.zeros(MODES // groups, dtype=torch.float64)) for _ in range(groups)]
        )

    def forward(self, x):
        return CURVATURE / 2 * (torch.cat(list(self.parts)) - x).square().sum(1)


def train(
    meddle=lambda model: None,
    *,
    make=lambda parts: torch.optim.SGD(parts, lr=0.2),
    groups=1,
    steps=1501,
    begin=1.0,
    fdr=20,
    noise=20,
    batch=lambda step: 8,
    lr=lambda step: None,
):
    """A run with two micro-batches per step; what was warned of, and the record."""
    generator, memory = torch.Generator().manual_seed(0), MemoryRecorder()
    model = Quadratic(groups)
    with torch.no_grad():
        # the stationary state of SGD without decay: variance lr C / (B h (2 - lr h))
        deviation = (0.2 * NOISE / 8 / (CURVATURE * (2 - 0.2 * CURVATURE))) ** 0.5
        for part in model.parts:
            part.copy_(begin * deviation * torch.randn(part.shape, generator=generator, dtype=part.dtype))
    optimizer = make(list(model.parts))
    observables = [
        FluctuationDissipation(schedule=fdr, sampling=every(5), tolerance=0.1),
        GradientNoiseScale(schedule=noise, sampling=every(5)),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, optimizer, observables, recorders=[memory]) as monitor:
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = lr(step) or group["lr"]
                x = torch.randn(batch(step), MODES, generator=generator, dtype=torch.float64)
                for part in (x * NOISE**0.5 / CURVATURE).chunk(2):
                    with monitor.micro_batch(part):
                        (model(part).mean() / 2).backward()
                monitor.before_step()
                meddle(model)
                optimizer.step()
                optimizer.zero_grad()
    return [str(warning.message) for warning in caught], memory


def doubled(model):
    for part in model.parts:
        part.grad.mul_(2.0)


def clipped(model):
    nn.utils.clip_grad_norm_(model.parameters(), 2.0)


def declared(memory):
    return [step for step, value in memory.series("dynamics/fdr/stationary") if value == 1.0]


def with_decay(parts):
    return torch.optim.SGD(parts, lr=0.2, weight_decay=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda parts: torch.optim.SGD(parts, lr=0.2), with_decay], ids=["plain", "l2"]
)
def test_a_sound_run_agrees_with_itself(make):
    messages, memory = train(make=make)
    assert messages == []
    assert len(declared(memory)) > 20
    latest = {name: memory.latest()[f"dynamics/{name}"].value for name in ("noise/trace", "fdr/right")}
    assert latest["noise/trace"] == pytest.approx(MODES * NOISE, rel=0.05)
    if make is not with_decay:  # the noisy quadratic: right = h Var
        variance = MODES * 0.2 * NOISE / 8 / (CURVATURE * (2 - 0.2 * CURVATURE))
        assert latest["fdr/right"] == pytest.approx(CURVATURE * variance, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda parts: torch.optim.SGD(parts, lr=0.2), with_decay], ids=["plain", "l2"]
)
@pytest.mark.parametrize("meddle", [doubled, clipped])
def test_a_gradient_that_is_changed_on_the_way_to_the_update_is_said_once(meddle, make):
    messages, memory = train(meddle, make=make)
    assert declared(memory)
    (message,) = messages
    assert "fdr/right, from the update, is" in message
    assert "noise/batch_grad_sq_norm, from the gradient, gives" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda parts: torch.optim.SGD(parts, lr=0.04, momentum=0.8),
        lambda parts: torch.optim.Adam(parts, lr=0.02),
        lambda parts: torch.optim.SGD([{"params": parts[:1], "lr": 0.2}, {"params": parts[1:], "lr": 0.1}]),
    ],
    ids=["momentum", "adam", "two rates"],
)
def test_without_a_relation_nothing_is_said_even_of_a_changed_gradient(make):
    messages, _ = train(doubled, make=make, groups=2)
    assert messages == []


def test_a_transient_run_is_not_checked():
    messages, memory = train(doubled, begin=300.0, steps=31, fdr=1)
    assert not declared(memory)
    assert memory.latest()["dynamics/fdr/stationary"].value == 0.0
    assert messages == []


@pytest.mark.slow
def test_a_short_batch_at_a_record_is_not_taken_for_the_usual_one():
    messages, memory = train(batch=lambda step: 4 if step % 41 == 0 else 8, fdr=20, noise=41)
    assert declared(memory)
    assert messages == []


@pytest.mark.slow
def test_after_a_drop_of_the_rate_old_readings_are_not_compared_with_new_ones():
    messages, memory = train(lr=lambda step: 0.2 if step < 801 else 0.05, noise=10)
    before = [step for step in declared(memory) if step <= 800]
    assert before
    assert before[-1] == 800  # the last word on the old rate stands when the new one begins
    assert messages == []


def test_sources_that_disagree_in_a_run_are_said_once():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    observable = GradientNoiseScale(schedule=1, source="per example", cross_check="split batch")

    def wrong_loss(outputs, targets):
        return 2 * F.cross_entropy(outputs, targets)

    def run(loss_fn, steps=60):
        generator = torch.Generator().manual_seed(1)
        with Monitor(model, optimizer, [observable], loss_fn=loss_fn) as monitor:
            for _ in range(steps):
                x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
                y = torch.randint(3, (16,), generator=generator)
                with monitor.micro_batch(x, y):
                    F.cross_entropy(model(x), y).backward()
                monitor.before_step()
                optimizer.step()
                optimizer.zero_grad()
        return monitor.latest["dynamics/noise/source_ratio"]

    assert run(F.cross_entropy).value == pytest.approx(1.0, abs=0.3)
    with pytest.warns(MeasurementWarning, match="two sources of the noise scale disagree") as caught:
        ratio = run(wrong_loss)
    assert ratio.value == pytest.approx(4.0, rel=0.3)
    (message,) = [str(warning.message) for warning in caught]
    assert "per example" in message
    assert "split" in message
