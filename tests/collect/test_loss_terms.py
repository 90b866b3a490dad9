"""What a loss is divided by: a mean in another form, a sum, or something else of the batch."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import GradientNoiseScale, MemoryRecorder, Monitor
from gradiometer.collect.loss_terms import OTHER, SELECTED, WEIGHTS, read_terms
from gradiometer.errors import MeasurementWarning
from gradiometer.stats.estimators import Last

from ..engine.test_calls import draws

B = 8
MASK = torch.tensor([1, 1, 0, 1, 1, 0, 1, 0]).bool()
Y = draws(B, seed=1)


def squares(out):
    return (out - Y).square()


def terms_of(loss):
    net = nn.Linear(4, 1).double()
    out = net(draws(B, 4))[:, 0]
    shifted = out * 1
    penalty = net.weight.square().sum()
    return dataclasses.replace(read_terms(loss(shifted, penalty), [shifted]), examples=B)


MEANS = {
    "mean": lambda out, _: squares(out).mean(),
    "sum over examples": lambda out, _: squares(out).sum() / len(out),
    "of a library": lambda out, _: F.mse_loss(out, Y, reduction="sum") / torch.tensor(8.0),
    "accumulated": lambda out, _: (squares(out).sum() + out.abs().sum()) / len(out) / 4,
    "with a penalty": lambda out, penalty: squares(out).mean() + penalty,
    "batch mean": lambda out, _: F.kl_div(out, Y.exp(), reduction="batchmean"),
    "equal weights": lambda out, _: (squares(out) * torch.ones(B)).sum() / torch.ones(B).sum(),
    "weights in a mean": lambda out, _: (squares(out) * MASK).mean(),
    "gathered": lambda out, _: squares(out)[torch.arange(B)].mean(),
    "all selected": lambda out, _: squares(out)[torch.ones(B, dtype=torch.bool)].mean(),
}
SUMS = {
    "sum": lambda out, _: squares(out).sum(),
    "two sums": lambda out, _: squares(out).sum() - 0.5 * out.exp().sum(),
    "with a penalty": lambda out, penalty: F.mse_loss(out, Y, reduction="sum") + 0.1 * penalty,
    "accumulated": lambda out, _: squares(out).sum() / 3,
}
NEITHER = {
    "masked": (lambda out, _: (squares(out) * MASK).sum() / MASK.sum(), WEIGHTS),
    "masked floats": (lambda out, _: (squares(out) * MASK.double()).sum() / MASK.sum().item(), WEIGHTS),
    "filled": (lambda out, _: squares(out).masked_fill(~MASK, 0.0).sum() / MASK.sum(), WEIGHTS),
    "where": (lambda out, _: torch.where(MASK, squares(out), 0.0).sum() / MASK.sum(), WEIGHTS),
    "divided beforehand": (lambda out, _: (squares(out) * (MASK / MASK.sum())).sum(), WEIGHTS),
    "indexed": (lambda out, _: squares(out)[MASK].mean(), SELECTED),
    "rows": (lambda out, _: F.mse_loss(out[MASK], Y[MASK]), SELECTED),
    "numbers of rows": (lambda out, _: squares(out)[MASK.nonzero()[:, 0]].mean(), SELECTED),
    "selected": (lambda out, _: squares(out).masked_select(MASK).mean(), SELECTED),
    "positives": (lambda out, _: (squares(out) * out.sigmoid()).sum() / 5, OTHER),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_in_any_form(name):
    terms = terms_of(MEANS[name])
    assert (terms.reduction(micro_batches=1), terms.divides(micro_batches=1)) == ("mean", "")


@pytest.mark.parametrize("name", SUMS)
def test_a_sum(name):
    terms, count = terms_of(SUMS[name]), 3 if name == "accumulated" else 1
    assert (terms.reduction(micro_batches=count), terms.divides(micro_batches=count)) == ("sum", "")


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_the_scale_of_a_scaler_is_taken_out(scale):
    mean, total = (terms_of(lambda out, _, c=c: squares(out).sum() * (scale / c)) for c in (B, 1))
    assert mean.reduction(1, scale) == "mean"
    assert total.reduction(1, scale) == "sum"


@pytest.mark.parametrize("name", NEITHER)
def test_something_else_of_the_batch(name):
    loss, divides = NEITHER[name]
    assert terms_of(loss).divides(micro_batches=1) == divides


class OfRows(nn.Module):
    """Called with a dictionary; its own parameter has no rule, so that the batch is split."""

    def __init__(self, split):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.ones(20 if split else 1))

    def forward(self, batch):
        return self.layer(batch["x"])[:, 0] * self.scale.sum()


def noise(loss, split=False, **settings):
    torch.manual_seed(0)
    net, memory = OfRows(split).double(), MemoryRecorder()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    observables = [GradientNoiseScale(schedule=1, estimator=Last())]
    batch = {"x": draws(B, 4)}
    with Monitor(net, optimizer, observables, recorders=[memory], **settings) as monitor:
        for _ in range(2):
            with monitor.micro_batch(batch):
                loss(net(batch)).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return memory.latest().get("dynamics/noise/trace")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("loss", "times"),
    [
        (lambda out: F.mse_loss(out, Y), 1.0),
        (lambda out: F.mse_loss(out, Y, reduction="sum") / B, 1.0),
        (lambda out: 0.5 * F.mse_loss(out, Y), 0.25),
        (lambda out: F.mse_loss(out, Y, reduction="sum"), 1.0),
    ],
)
def test_all_sources_measure_the_loss_as_it_is_written(loss, times, split):
    plain = noise(lambda out: squares(out).mean(), split=False)
    of_all = plain if not split else noise(lambda out: F.mse_loss(out, Y), split=True)
    reading = noise(loss, split=split)
    assert ("split batch" in reading.note) == split
    assert reading.value == pytest.approx(times * of_all.value, rel=1e-9)


def test_a_constant_in_a_sum_can_be_said():
    def loss(out):
        return (squares(out) * out.sigmoid()).sum() / 5

    with pytest.warns(MeasurementWarning, match='write loss_reduction="sum" or "mean"'):
        assert noise(loss) is None
    assert noise(loss, loss_reduction="sum").is_finite
