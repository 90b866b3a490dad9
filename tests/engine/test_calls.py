"""What the network is really called with: twelve shapes of scripts, each against gradients taken by hand."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import (
    GradientNoiseScale,
    JacobianNorm,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    empirical_ntk,
    jacobian_norms,
)
from gradiometer.errors import MeasurementWarning
from gradiometer.stats.estimators import Last

B, T, V = 8, 5, 6


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Script:
    """A network, how the script calls it, and the same for one example by hand.

    Args:
        net: The network.
        shown: What the script gives to ``micro_batch``.
        loss: The script's own loss.
        one: The loss of one example.
        inputs: What kernels are taken at, examples first.
        outputs: Maps network and such inputs to outputs ``[N, O]``.
    """

    net: nn.Module
    shown: object
    loss: object
    one: object
    inputs: object
    outputs: object
    without: str = "nothing"
    """Parameters that per-example gradients do not see, by the beginning of their names."""


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(12, 2)

    def forward(self, a, b):
        return self.out(torch.tanh(torch.cat([self.a(a), self.b(b)], 1)))


def two_inputs():
    net, a, b, y = TwoInputs().double(), draws(B, 4), draws(B, 3, seed=1), whole(2, B)
    return Script(
        net,
        (a, b),
        lambda: F.cross_entropy(net(a, b), y),
        lambda i: F.cross_entropy(net(a[i : i + 1], b[i : i + 1]), y[i : i + 1]),
        [a, b],
        lambda net, x: net(*x),
    )


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch):
        return {"scores": torch.tanh(self.layer(batch["values"])), "size": len(batch["values"])}


def dictionary():
    net, x, y = Keyed().double(), draws(B, 4), draws(B, 3, seed=1)
    return Script(
        net,
        {"values": x, "answer": y},
        lambda: F.mse_loss(net({"values": x, "answer": y})["scores"], y),
        lambda i: F.mse_loss(net({"values": x[i : i + 1]})["scores"], y[i : i + 1]),
        x,
        lambda net, x: net({"values": x})["scores"],
    )


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, values, *, mask, scale=1.0):
        hidden = torch.tanh(self.layer(values)) * mask[:, :, None] * scale
        return self.out(hidden.sum(1) / mask.sum(1, keepdim=True))


def keywords():
    net, x, y = Masked().double(), draws(B, T, 4), whole(3, B)
    mask = (torch.arange(T) < whole(T, B, seed=3)[:, None] + 1).double()
    return Script(
        net,
        x,
        lambda: F.cross_entropy(net(values=x, mask=mask, scale=2.0), y),
        lambda i: F.cross_entropy(net(x[i : i + 1], mask=mask[i : i + 1], scale=2.0), y[i : i + 1]),
        [x, mask],
        lambda net, x: net(x[0], mask=x[1], scale=2.0),
    )


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, y):
        logits = torch.tanh(self.layer(x))
        return logits, F.cross_entropy(logits, y)


def logits_and_loss():
    net, x, y = WithLoss().double(), draws(B, 4), whole(3, B)
    return Script(
        net,
        (x, y),
        lambda: net(x, y)[1],
        lambda i: net(x[i : i + 1], y[i : i + 1])[1],
        [x, y],
        lambda net, x: net(*x)[0],
    )


class Teacher(nn.Module):
    """Is given the target so far."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Linear(4, 6), nn.Embedding(V, 6)
        self.out = nn.Linear(6, V)

    def forward(self, x, target):
        return self.out(torch.tanh(self.source(x)[:, None] + self.target(target).cumsum(1)))


def teacher_forcing():
    net, x, y = Teacher().double(), draws(B, 4), whole(V, B, T + 1)
    return Script(
        net,
        x,
        lambda: F.cross_entropy(net(x, y[:, :-1]).reshape(-1, V), y[:, 1:].reshape(-1)),
        lambda i: F.cross_entropy(net(x[i : i + 1], y[i : i + 1, :-1])[0], y[i, 1:]),
        [x, y[:, :-1]],
        lambda net, x: net(*x)[:, -1],
    )


class Recurrent(nn.Module):
    """Batches [T, B, F], as nn.LSTM takes them by default."""

    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 5), nn.Linear(5, V)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


def sequence_first_lstm():
    net, x, y = Recurrent().double(), draws(T, B, 4), whole(V, T, B)
    return Script(
        net,
        x,
        lambda: F.cross_entropy(net(x).reshape(-1, V), y.reshape(-1)),
        lambda i: F.cross_entropy(net(x[:, i : i + 1])[:, 0], y[:, i]),
        x.transpose(0, 1),
        lambda net, x: net(x.transpose(0, 1))[-1],
    )


class Causal(nn.Module):
    """Tokens [T, B] and a mask [T, T], flattened scores: PyTorch's own example of a language model."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.out = nn.Linear(8, V)

    def forward(self, x, mask):
        return self.out(self.layer(self.embed(x), src_mask=mask)).view(-1, V)


def sequence_first_transformer():
    net, x, y = Causal().double(), whole(V, T, B), whole(V, T, B, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    return Script(
        net,
        x,
        lambda: F.cross_entropy(net(x, mask), y.reshape(-1)),
        lambda i: F.cross_entropy(net(x[:, i : i + 1], mask), y[:, i]),
        x.T,
        lambda net, x: net(x.T, mask).view(T, -1, V)[-1],
        without="layer.self_attn",
    )


def autoencoder():
    net = nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 16)).double()
    images = draws(B, 1, 4, 4)
    flat = images.view(B, -1)
    return Script(
        net,
        images,
        lambda: F.mse_loss(net(images.view(B, -1)), images.view(B, -1)),
        lambda i: F.mse_loss(net(flat[i : i + 1]), flat[i : i + 1]),
        flat,
        lambda net, x: net(x),
    )


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        return self.up(torch.cat([x, torch.relu(self.down(x))], 1))


def segmentation_of_dictionaries():
    net = Segmenter().double()
    batch = {"image": draws(B, 1, 2, 2), "mask": whole(2, B, 2, 2)}
    x, y = batch["image"], batch["mask"]
    return Script(
        net,
        batch,
        lambda: F.cross_entropy(net(x), y),
        lambda i: F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]),
        x,
        lambda net, x: net(x).flatten(1),
    )


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.out = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, a, b):
        return self.out((torch.tanh(self.shared(a)) - torch.tanh(self.shared(b))).abs())


def siamese():
    net, a, b = Siamese().double(), draws(B, 4), draws(B, 4, seed=1)
    y = whole(2, B).double()[:, None]
    return Script(
        net,
        (a, b, y),
        lambda: F.binary_cross_entropy_with_logits(net(a, b), y),
        lambda i: F.binary_cross_entropy_with_logits(net(a[i : i + 1], b[i : i + 1]), y[i : i + 1]),
        [a, b],
        lambda net, x: net(*x),
    )


class Diffusion(nn.Module):
    """Returns its loss; the network inside is called with noisy inputs and times."""

    def __init__(self):
        super().__init__()
        self.net = TwoInputs()
        self.x, self.t, self.noise = draws(B, 4, seed=5), draws(B, 3, seed=6), draws(B, 2, seed=7)

    def forward(self, x):
        return F.mse_loss(self.net(x + self.x, self.t), self.noise)


def diffusion():
    model, x = Diffusion().double(), draws(B, 4)
    noisy, t, noise = x + model.x, model.t, model.noise
    return Script(
        model,
        x,
        lambda: model(x),
        lambda i: F.mse_loss(model.net(noisy[i : i + 1], t[i : i + 1]), noise[i : i + 1]),
        [noisy, t],
        lambda model, x: model.net(*x),
    )


class Images(nn.Module):
    """Returns a named tuple; several outputs of which the first is looked at."""

    def __init__(self):
        super().__init__()
        self.inner, self.mean, self.spread = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x):
        hidden = torch.tanh(self.inner(x))
        return self.mean(hidden), self.spread(hidden)


def several_outputs():
    net, x, y = Images().double(), draws(B, 4), draws(B, 2, seed=1)
    net.spread.requires_grad_(False)
    return Script(
        net,
        (x, y),
        lambda: F.smooth_l1_loss(net(x)[0], y),
        lambda i: F.smooth_l1_loss(net(x[i : i + 1])[0], y[i : i + 1]),
        x,
        lambda net, x: net(x)[0],
    )


SCRIPTS = [
    two_inputs,
    dictionary,
    keywords,
    logits_and_loss,
    teacher_forcing,
    sequence_first_lstm,
    sequence_first_transformer,
    autoencoder,
    segmentation_of_dictionaries,
    siamese,
    diffusion,
    several_outputs,
]


def train(script, steps=3, **settings):
    optimizer = torch.optim.SGD([p for p in script.net.parameters() if p.requires_grad], lr=0.0)
    memory = MemoryRecorder()
    observables = [
        NeuralTangentKernel(schedule=1),
        JacobianNorm(schedule=1),
        GradientNoiseScale(schedule=1, estimator=Last()),
    ]
    with Monitor(script.net, optimizer, observables, recorders=[memory], **settings) as monitor:
        for _ in range(steps):
            with monitor.micro_batch(script.shown):
                script.loss().backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return memory


@pytest.mark.parametrize("make", SCRIPTS, ids=lambda make: make.__name__)
def test_readings_are_those_of_what_the_network_is_called_with(make):
    torch.manual_seed(0)
    script = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        latest = train(script).latest()
    named = script.net.named_parameters()
    trained = [p for name, p in named if p.requires_grad and not name.startswith(script.without)]
    rows = []
    for i in range(B):
        gradient = torch.autograd.grad(script.one(i), trained, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradient, trained, strict=True)]
        rows.append(torch.cat([g.flatten() for g in filled]))
    rows = torch.stack(rows)
    assert latest["dynamics/noise/trace"].value == pytest.approx(float(rows.var(0).sum()), rel=1e-9)
    kernel = empirical_ntk(script.net, script.inputs, forward=script.outputs)
    assert latest["dynamics/ntk/trace"].value == pytest.approx(float(kernel.diagonal().mean()), rel=1e-9)
    if isinstance(script.inputs, torch.Tensor) and script.inputs.is_floating_point():
        norm = jacobian_norms(script.net, script.inputs, forward=script.outputs, num_projections=None)
        right = float(norm.mean()) if norm.ndim else float(norm)
        assert latest["dynamics/jacobian/frobenius_norm"].value == pytest.approx(right, rel=0.3)
    assert latest["dynamics/jacobian/frobenius_norm"].is_finite
