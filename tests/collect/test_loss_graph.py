"""The loss, read off its graph: confirmed where it is what it seems, and refused by place everywhere else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer.collect.loss_graph import BackwardWatch, FoundLoss, read_loss

N, C, T = 6, 4, 3


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(*shape):
    """A network's output, with a graph."""
    return nn.Linear(shape[-1], shape[-1])(draws(*shape))


CLASSES = torch.tensor([0, 1, 2, 3, 1, 2])
WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0])


def flat(out):
    return out.reshape(-1, C), torch.arange(N * T) % C


KNOWN = {
    "cross entropy": lambda out: F.cross_entropy(out, CLASSES),
    "divided for accumulation": lambda out: F.cross_entropy(out, CLASSES) / 4,
    "scaled": lambda out: torch.tensor(1024.0) * F.cross_entropy(out, CLASSES) * 0.5,
    "smoothed": lambda out: F.cross_entropy(out, CLASSES, label_smoothing=0.1),
    "summed": lambda out: F.cross_entropy(out, CLASSES, reduction="sum"),
    "mean by hand": lambda out: F.cross_entropy(out, CLASSES, reduction="none").mean(),
    "module": lambda out: nn.CrossEntropyLoss()(out, CLASSES),
    "log softmax and nll": lambda out: F.nll_loss(F.log_softmax(out, 1), CLASSES),
    "squares": lambda out: F.mse_loss(out, draws(N, C, seed=1)),
    "squares by hand": lambda out: (draws(N, C, seed=1) - out).square().mean(),
    "power by hand": lambda out: ((out - draws(N, C, seed=1)) ** 2).sum(),
    "absolute": lambda out: F.l1_loss(out, draws(N, C, seed=1)),
    "huber": lambda out: F.huber_loss(out, draws(N, C, seed=1), delta=0.3),
    "smooth absolute": lambda out: F.smooth_l1_loss(out, draws(N, C, seed=1), beta=0.4),
    "logits": lambda out: F.binary_cross_entropy_with_logits(out, (draws(N, C, seed=1) > 0).float()),
    "probabilities": lambda out: F.binary_cross_entropy(out.sigmoid(), (draws(N, C, seed=1) > 0).float()),
    "whole numbers": lambda out: F.mse_loss(out, CLASSES[:, None].float().expand(N, C)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_loss_of_torch_is_known(name):
    out = outputs(N, C)
    root = KNOWN[name](out)
    loss = read_loss(root, [out])
    assert isinstance(loss, FoundLoss), loss
    assert not loss.divides
    factor = (root / loss.function(out, loss.target)).item()
    assert factor == pytest.approx({"divided for accumulation": 0.25, "scaled": 512}.get(name, 1), rel=1e-5)
    assert loss.reduction == ("sum" if name in ("summed", "power by hand") else "mean")
    parts = [loss.function(out[i : i + 1], loss.target[i : i + 1]) for i in range(N)]
    total = torch.stack(parts).sum() if loss.reduction == "sum" else torch.stack(parts).mean()
    torch.testing.assert_close(factor * total, root)


SEQUENCES = {
    "flattened": lambda out, y: F.cross_entropy(out.reshape(-1, C), y.reshape(-1)),
    "view": lambda out, y: F.cross_entropy(out.view(-1, C), y.flatten()),
    "classes moved": lambda out, y: F.cross_entropy(out.transpose(1, 2), y),
    "exchanged": lambda out, y: F.cross_entropy(out.transpose(0, 1).reshape(-1, C), y.T.reshape(-1)),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_targets_of_sequences_lie_as_the_output_does(name):
    out, y = outputs(N, T, C), torch.randint(C, (N, T), generator=torch.Generator().manual_seed(0))
    loss = read_loss(SEQUENCES[name](out, y), [out])
    assert isinstance(loss, FoundLoss), loss
    assert torch.equal(loss.target, y)
    assert loss.class_axis == 2


def test_targets_of_images():
    out, y = nn.Conv2d(1, C, 1)(draws(N, 1, 5, 5)), torch.randint(C, (N, 5, 5))
    loss = read_loss(F.cross_entropy(out, y), [out])
    assert isinstance(loss, FoundLoss)
    assert torch.equal(loss.target, y)
    assert loss.class_axis == 1


@pytest.mark.parametrize(
    ("loss", "divides", "fixed"),
    [
        (lambda out: F.cross_entropy(out, CLASSES, weight=WEIGHT), "class weights", True),
        (lambda out: F.cross_entropy(out, CLASSES, ignore_index=2), "targets that are not ignored", False),
        (lambda out: F.nll_loss(F.log_softmax(out, 1), CLASSES, weight=WEIGHT), "class weights", True),
    ],
)
def test_what_a_loss_divides_by_is_said(loss, divides, fixed):
    out = outputs(N, C)
    shown = read_loss(loss(out), [out])
    assert divides in shown.divides
    assert shown.fixed is fixed


def test_a_weighted_sum_and_equal_weights_divide_by_nothing():
    out = outputs(N, C)
    for loss in (
        F.cross_entropy(out, CLASSES, weight=WEIGHT, reduction="sum"),
        F.cross_entropy(out, CLASSES, weight=torch.full((C,), 2.0)),
    ):
        assert read_loss(loss, [out]).divides == ""


REFUSED = {
    "penalty": (lambda out: F.cross_entropy(out, CLASSES) + out.square().mean(), "sum of several terms"),
    "two losses": (
        lambda out: F.cross_entropy(out, CLASSES) + F.mse_loss(out, out.detach()),
        "several terms",
    ),
    "half of the batch": (lambda out: F.cross_entropy(out[:3], CLASSES[:3]), "stands Slice"),
    "softmax over the batch": (lambda out: F.cross_entropy(out.softmax(0), CLASSES), "stands Softmax"),
    "similarities": (lambda out: F.cross_entropy(out @ out.T, torch.arange(N)), "stands Mm"),
    "own formula": (lambda out: (out.exp() - out).mean(), "none of torch's losses"),
    "weights of examples": (
        lambda out: (F.cross_entropy(out, CLASSES, reduction="none") * torch.rand(N)).mean(),
        "none of torch's losses",
    ),
    "soft labels": (
        lambda out: F.cross_entropy(out, draws(N, C, seed=1).softmax(1)),
        "none of torch's losses",
    ),
    "gathered": (lambda out: F.mse_loss(out.gather(1, CLASSES[:, None]), draws(N, 1)), "stands Gather"),
    "temperature": (lambda out: F.cross_entropy(out / 0.5, CLASSES), "stands Div"),
    "dice": (lambda out: 1 - 2 * out.sigmoid().sum() / (out.sigmoid() + 1).sum(), "none of torch's losses"),
    "broadcast by mistake": (lambda out: F.mse_loss(out[:, 0], draws(N)), "stands Select"),
    "another network": (
        lambda out: F.cross_entropy(outputs(N, C), CLASSES),
        "between the|not made from",
    ),
    "pos_weight": (
        lambda out: F.binary_cross_entropy_with_logits(out, torch.ones(N, C), pos_weight=WEIGHT),
        "pos_weight differs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_its_place(name):
    make, reason = REFUSED[name]
    out = outputs(N, C)
    answer = read_loss(make(out), [out])
    assert isinstance(answer, str), answer
    assert any(part in answer for part in reason.split("|")), answer


def test_an_output_that_was_written_to_afterwards_has_another_value():
    out = outputs(N, C)
    loss = F.cross_entropy(out, CLASSES)
    other = out * 1.0
    with torch.no_grad():
        out.data.add_(torch.arange(N * C).view(N, C))
    assert read_loss(loss, [out]) == "made again from the network's output it has another value"
    assert isinstance(read_loss(F.cross_entropy(other, CLASSES), [other]), FoundLoss)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind):
    out = outputs(N, C).to(kind)
    assert isinstance(read_loss(F.cross_entropy(out.float(), CLASSES), [out]), FoundLoss)


def test_the_watch_sees_each_way_to_differentiate_and_is_gone_afterwards():
    original = torch.autograd.backward
    for differentiate in (
        lambda loss: loss.backward(),
        lambda loss: torch.autograd.backward(loss),
        lambda loss: torch.autograd.backward([loss]),
        lambda loss: loss.backward(retain_graph=True),
    ):
        out = outputs(N, C)
        watch = BackwardWatch(lambda out=out: [out])
        watch.attach()
        differentiate(F.cross_entropy(out, CLASSES))
        watch.detach()
        assert isinstance(watch.loss, FoundLoss)
        assert watch.passes == 1
        assert torch.autograd.backward is original


def test_two_passes_are_no_single_loss():
    out = outputs(N, C)
    watch = BackwardWatch(lambda: [out])
    watch.attach()
    loss = F.cross_entropy(out, CLASSES)
    loss.backward(retain_graph=True)
    loss.backward()
    watch.detach()
    assert watch.loss == "the step makes several backward passes"


def test_watches_may_be_put_around_each_other():
    original, out = torch.autograd.backward, outputs(N, C)
    inner, outer = BackwardWatch(lambda: [out]), BackwardWatch(lambda: [out])
    inner.attach()
    outer.attach()
    F.cross_entropy(out, CLASSES).backward()
    outer.detach()
    inner.detach()
    assert torch.autograd.backward is original
    assert isinstance(inner.loss, FoundLoss)
    assert isinstance(outer.loss, FoundLoss)
