"""Small models of every kind, and the slowest plain code that gives their exact tangent kernel.

Inputs have a leading axis of examples. Many shapes are chosen so that another axis is as long as the batch
of five, where code that guesses the axis of the examples goes wrong.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint

COUNT = 5
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Tables of hooks on a module; none may be left behind."""


@dataclass(frozen=True)
class Entry:
    """How to make a model, its inputs for a number of examples, and its outputs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Any]
    forward: Callable[[nn.Module, Any], Tensor] | None = None


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(name, dtype=torch.float64):
    """A model in evaluation mode, no parameter at its special first value, statistics of its own."""
    return build_entry(ENTRIES[name], dtype)


def build_entry(entry, dtype=torch.float64):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = entry.make().double()
    return disturb(model).to(dtype)


def disturb(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def batch(name, count=COUNT, seed=0, dtype=torch.float64):
    return cast(ENTRIES[name].inputs(count, torch.Generator().manual_seed(seed)), dtype)


def mapped(function, x):
    """A function of every tensor of a batch."""
    if isinstance(x, Mapping):
        return {key: mapped(function, each) for key, each in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(mapped(function, each) for each in x)
    return function(x) if isinstance(x, Tensor) else x


def cast(x, dtype):
    return mapped(lambda each: each.to(dtype) if each.is_floating_point() else each, x)


def pick(x, index):
    return mapped(lambda each: each[index], x)


def size(x):
    lengths = []
    mapped(lambda each: lengths.append(len(each)), x)
    return lengths[0]


def call(model, x, forward=None):
    if forward is not None:
        return forward(model, x)
    return model(**x) if isinstance(x, Mapping) else model(x)


# -- the reference ---------------------------------------------------------------------------------


def jacobian(model, x, forward=None):
    """``{name: [N, O, p]}`` from one backward pass per example and output, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for i in range(size(x)):
        out = call(model, pick(x, slice(i, i + 1)), forward)
        assert out.ndim == 2
        assert len(out) == 1
        zeros = [torch.zeros_like(p) for p in named.values()]
        rows.append([])
        for o in range(out.shape[1]):
            found = zeros
            if out.requires_grad:
                found = torch.autograd.grad(
                    out[0, o], list(named.values()), retain_graph=True, allow_unused=True
                )
            rows[-1].append([z if g is None else g for g, z in zip(found, zeros, strict=True)])
    for module, mode in modes:
        module.training = mode
    return {
        name: torch.stack([torch.stack([each[j].to_dense().reshape(-1) for each in row]) for row in rows])
        for j, name in enumerate(named)
    }


def kernel(j1, j2=None, outputs="trace", weights=None):
    """Contract two Jacobians, with weights per parameter."""
    j2 = j1 if j2 is None else j2
    full = 0.0
    for name, a in j1.items():
        w = torch.as_tensor((weights or {}).get(name, 1.0), dtype=a.dtype)
        full = full + torch.einsum("aop,bqp->aboq", a * w.reshape(-1), j2[name])
    if outputs == "full":
        return full
    diagonal = full.diagonal(dim1=2, dim2=3)
    return diagonal if outputs == "diagonal" else diagonal.mean(-1)


def owners(model):
    """``{path: names}``: a parameter belongs to the module of its first name."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def error(found, expected):
    """Relative Frobenius distance."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# -- inputs ----------------------------------------------------------------------------------------


def normal(*shape):
    return lambda count, generator: torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def tokens(vocabulary, *shape):
    return lambda count, generator: torch.randint(vocabulary, (count, *shape), generator=generator)


def together(**inputs):
    """A mapping of keyword arguments; what is not callable is handed on as it is."""

    def make(count, generator):
        return {key: f(count, generator) if callable(f) else f for key, f in inputs.items()}

    return make


def padding(length):
    """True where a sequence has ended; every sequence has at least one position."""

    def make(count, generator):
        ends = torch.randint(1, length + 1, (count, 1), generator=generator)
        return torch.arange(length) >= ends

    return make


# -- layers under a head ---------------------------------------------------------------------------


def headed(*layers, shape, outputs=3):
    """Layers, flattened, under a linear head."""
    body = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        width = body.eval()(torch.zeros(2, *shape)).shape[1]
    return nn.Sequential(body, nn.Linear(width, outputs))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def frozen():
    model = mlp()
    model[2].requires_grad_(False)
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


def frozen_below():
    model = mlp()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4, 3),
    )


def layer(make, *shape):
    """Two layers of one kind where the shapes allow it, else one, under a head."""

    def model():
        first, second = make(), make()
        with torch.no_grad():
            out = first.eval()(torch.zeros(2, *shape))
        layers = [first, nn.Tanh(), second] if out.shape[1:] == shape else [first, nn.Tanh()]
        return headed(*layers, shape=shape)

    return Entry(model, normal(*shape))


LAYERS = {
    "linear": layer(lambda: nn.Linear(4, 4), 4),
    "linear on two position axes": layer(lambda: nn.Linear(3, 3), 2, 5, 3),
    "linear where every axis is as long as the batch": layer(lambda: nn.Linear(5, 5), 5, 5),
    "conv1d": layer(lambda: nn.Conv1d(2, 4, 3, stride=2, dilation=2, padding=1), 2, 10),
    "conv1d, same padding": layer(lambda: nn.Conv1d(3, 3, 3, padding="same", dilation=2), 3, 5),
    "conv1d, depthwise": layer(lambda: nn.Conv1d(4, 8, 3, groups=4), 4, 6),
    "conv1d, circular": layer(lambda: nn.Conv1d(5, 5, 3, padding=1, padding_mode="circular"), 5, 5),
    "conv2d": layer(lambda: nn.Conv2d(5, 5, 3, padding=1), 5, 3, 5),
    "conv2d, uneven everything": layer(
        lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2), 2, 6, 7
    ),
    "conv2d, reflect": layer(lambda: nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode="reflect"), 2, 4, 4),
    "conv2d, replicate": layer(
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate", bias=False), 2, 4, 3
    ),
    "conv2d, circular and grouped": layer(
        lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular", groups=2, stride=2), 4, 5, 4
    ),
    "conv3d": layer(lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1), padding=(1, 0, 1)), 2, 3, 4, 3),
    "transposed conv1d": layer(
        lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1, dilation=2), 2, 4
    ),
    "transposed conv2d": layer(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), output_padding=(1, 2), groups=2), 4, 3, 2
    ),
    "transposed conv3d": layer(lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), 2, 1, 2, 2),
    "layer norm": layer(lambda: nn.LayerNorm(6), 6),
    "layer norm with positions": layer(lambda: nn.LayerNorm(5, eps=0.1), 5, 5),
    "layer norm over two axes": layer(lambda: nn.LayerNorm((3, 4)), 2, 3, 4),
    "layer norm without bias": layer(lambda: nn.LayerNorm(6, bias=False), 2, 6),
    "rms norm": layer(lambda: nn.RMSNorm(5), 5),
    "rms norm over two axes": layer(lambda: nn.RMSNorm((2, 3), eps=0.3), 4, 2, 3),
    "group norm": layer(lambda: nn.GroupNorm(2, 6, eps=0.1), 6, 5),
    "instance norm 1d": layer(lambda: nn.InstanceNorm1d(5, affine=True), 5, 5),
    "instance norm 2d": layer(lambda: nn.InstanceNorm2d(3, affine=True, eps=0.2), 3, 4, 2),
    "instance norm 3d": layer(lambda: nn.InstanceNorm3d(2, affine=True), 2, 2, 3, 2),
    "instance norm with statistics": layer(
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), 3, 4, 2
    ),
    "batch norm 1d": layer(lambda: nn.BatchNorm1d(5), 5),
    "batch norm 1d with positions": layer(lambda: nn.BatchNorm1d(4), 4, 5),
    "batch norm 2d": layer(lambda: nn.BatchNorm2d(3, eps=0.1), 3, 4, 2),
    "batch norm 3d": layer(lambda: nn.BatchNorm3d(2), 2, 2, 3, 2),
    "batch norm without parameters": layer(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5)), 4
    ),
    "prelu": layer(lambda: nn.PReLU(), 5),
    "prelu per channel": layer(lambda: nn.PReLU(5, init=0.1), 5, 5),
}


# -- parameters used in plain code -----------------------------------------------------------------


class Shift(nn.Module):
    """A bias and nothing else."""

    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x + self.bias


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Bilinear(3, 4, 5), nn.Linear(5, 3)

    def forward(self, left, right):
        return self.head(torch.tanh(self.mix(left, right)))


class Bare(nn.Module):
    """A parameter at the root."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 5))
        self.norm = nn.LayerNorm(5)

    def forward(self, x):
        return self.norm(x @ self.w)[:, :3] + self.w[0, :3]


class Einsum(nn.Module):
    """A tensor parameter with three axes."""

    def __init__(self):
        super().__init__()
        self.core = nn.Parameter(torch.randn(2, 4, 5))
        self.back = nn.Parameter(torch.randn(2, 5, 3))

    def forward(self, x):
        heads = torch.tanh(torch.einsum("nti,hij->nhtj", x, self.core))
        return torch.einsum("nhtj,hjo->nto", heads, self.back).mean(1)


class ClassToken(nn.Module):
    """A token put in front of every sequence."""

    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        return self.head(torch.tanh(self.mix(x)).prod(1))


class InPlace(nn.Module):
    """Parameters that change activations in place."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.scale, self.shift = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        x = self.first(x)
        x.mul_(self.scale).add_(self.shift).tanh_()
        out = self.head(x)
        out += self.shift[:3]
        return out


class Assigned(nn.Module):
    """A parameter written into a slice of an activation."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.token = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = self.first(x)
        x[:, 0] = self.token
        return self.head(torch.tanh(x).prod(1))


class OfParameters(nn.Module):
    """A weight that is made from parameters in several steps."""

    def __init__(self):
        super().__init__()
        self.raw, self.log_scale = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.zeros(()))
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x):
        weight = F.softplus(self.raw).T * self.log_scale.exp()
        return torch.tanh(x @ (weight / weight.norm()))[:, :3] * self.log_scale


class Unused(nn.Module):
    """A module that is never called and a parameter that is never used."""

    def __init__(self):
        super().__init__()
        self.net, self.spare = mlp(), nn.Linear(4, 3)
        self.alone = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.net(x)


class Product(torch.autograd.Function):
    """A matrix product with a backward of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.mT @ x


class Rounded(torch.autograd.Function):
    """Rounding with the derivative of the identity."""

    @staticmethod
    def forward(ctx, weight):
        return (8 * weight).round() / 8

    @staticmethod
    def backward(ctx, g):
        return g


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(Product.apply(x, self.weight)))


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, Rounded.apply(self.weight))))


class OwnConvolution(nn.Module):
    """A functional convolution with parameters at the root."""

    def __init__(self):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(3, 2, 3, 3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return torch.tanh(F.conv2d(x, self.kernel, self.shift, stride=2, padding=1)).mean((2, 3))


class Gated(nn.Module):
    """Layers whose gradient is zero at every position of some examples, and at some positions of others."""

    def __init__(self):
        super().__init__()
        self.layer, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        gate = (x[:, :1, :1] > 0) & (x[:, :, 1:2] > 0)
        hidden = torch.tanh(self.second(torch.tanh(self.layer(x)))) * self.scale
        return self.head((hidden * gate).sum(1))


class Expanded(nn.Module):
    """One parameter, once as a view and once as copies with an axis of examples."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        x = torch.tanh(torch.bmm(x, self.w.expand(len(x), -1, -1)))
        return torch.bmm(x, self.w.repeat(len(x), 1, 1)).mean(1)[:, :3]


class Added(nn.Module):
    """A fused product, a list and a dictionary of parameters, and a parameter that is cut in pieces."""

    def __init__(self):
        super().__init__()
        self.shifts = nn.ParameterList([torch.randn(5), torch.randn(3)])
        self.scales = nn.ParameterDict({"inner": torch.randn(5)})
        self.fused = nn.Parameter(torch.randn(9, 5))

    def forward(self, x):
        a, b = self.fused.split([4, 5])
        x = torch.addmm(self.shifts[0], x, a) * self.scales["inner"]
        return torch.addmm(self.shifts[1], torch.tanh(x), b[:, :3])


class Prototypes(nn.Module):
    """Cosines with learned directions at a learned temperature."""

    def __init__(self):
        super().__init__()
        self.embed, self.directions = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 5))
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        cosines = F.normalize(self.embed(x), dim=1) @ F.normalize(self.directions, dim=1).T
        return (cosines * self.log_temperature.exp())[:, :3]


class Looked(nn.Module):
    """Rows of a parameter by plain indexing."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.table[x].sum(1)) * self.table.index_select(0, x[:, 0]))


class LowRank(nn.Module):
    """A frozen layer with a trained low-rank correction, beside it or merged into its weight."""

    def __init__(self, merged):
        super().__init__()
        self.base, self.head = nn.Linear(4, 5).requires_grad_(False), nn.Linear(5, 3)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.merged = merged

    def forward(self, x):
        if self.merged:
            weight = self.base.weight + 2 * self.up.weight @ self.down.weight
            return self.head(torch.tanh(F.linear(x, weight, self.base.bias)))
        return self.head(torch.tanh(self.base(x) + 2 * self.up(self.down(x))))


class Constant(nn.Module):
    """One output moves, one is a constant and one is a copy of the input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return torch.cat([self.layer(x), torch.ones_like(x[:, :1]), x[:, :1]], 1)


class Hypernetwork(nn.Module):
    """The weights of one layer are the outputs of another, for each example its own."""

    def __init__(self):
        super().__init__()
        self.make, self.head = nn.Linear(4, 20), nn.Linear(5, 3)

    def forward(self, x):
        weights = torch.tanh(self.make(x)).view(-1, 5, 4)
        return self.head((weights @ x[:, :, None])[:, :, 0])


class Queries(nn.Module):
    """Modules run on parameters and buffers, which have no axis of examples."""

    def __init__(self):
        super().__init__()
        self.queries, self.norm = nn.Parameter(torch.randn(5, 4)), nn.LayerNorm(4)
        self.key, self.bias, self.head = nn.Linear(4, 4), nn.Linear(1, 5), nn.Linear(4, 3)
        self.register_buffer("grid", torch.linspace(-1, 1, 5)[:, None])

    def forward(self, x):
        scores = self.norm(self.queries) @ self.key(x).mT + self.bias(self.grid)
        return self.head((scores.softmax(-1) @ x).square().mean(1))


class Scalars(nn.Module):
    """Parameters without any axis."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.gain, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.gain * torch.tanh(self.layer(x)) + self.shift


class Pieces(nn.Module):
    """Halves that are not used, and parameters that only some entries meet."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(4, 3)
        self.floor, self.fused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        x, _ = self.layer(torch.where(x > 0, torch.maximum(x, self.floor), self.floor * x)).chunk(2, -1)
        return self.head(torch.tanh(x)) + F.linear(x, self.fused.chunk(2)[0])


class Columns(nn.Module):
    """Examples in the columns."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(3, 5))
        self.shift = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return (self.v @ torch.tanh(self.w @ x.T + self.shift[:, None])).T


class Recurrence(nn.Module):
    """Parameters used at every position."""

    def __init__(self):
        super().__init__()
        self.keep, self.take = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = torch.tanh(self.keep * state + self.take * x[:, t])
        return self.head(state)


class Classes(nn.Module):
    """A matrix for every class, and distances from learned points."""

    def __init__(self):
        super().__init__()
        self.matrices, self.points = nn.Parameter(torch.randn(5, 3, 4)), nn.Parameter(torch.randn(3, 3))

    def forward(self, x, y):
        x = torch.tanh(torch.bmm(self.matrices[y], x[:, :, None])[:, :, 0])
        return torch.cdist(x, self.points).square()


class FunctionalLayers(nn.Module):
    """Layers called as functions of parameters at the root."""

    def __init__(self):
        super().__init__()
        self.table, self.slope = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.full((6,), 0.2))
        self.scales, self.shifts = nn.Parameter(torch.ones(3, 6)), nn.Parameter(torch.zeros(3, 6))
        self.mix = nn.Parameter(torch.randn(3, 6, 6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)

    def forward(self, x):
        x = F.layer_norm(F.embedding(x, self.table), (6,), self.scales[0], self.shifts[0], 0.1).mT
        x = F.group_norm(x, 2, self.scales[1], self.shifts[1], 0.1)
        x = F.batch_norm(x, self.mean, self.var, self.scales[2], self.shifts[2])
        x = F.prelu(x, self.slope).mean(2)
        return torch.tanh(F.bilinear(x, x, self.mix))


class Modulated(nn.Module):
    """A convolution with weights of its own for each example, all in one call by groups."""

    def __init__(self):
        super().__init__()
        self.kernel, self.style = nn.Parameter(torch.randn(3, 2, 3)), nn.Linear(4, 2)

    def forward(self, x, z):
        n, c, t = x.shape
        weight = (self.kernel * self.style(z)[:, None, :, None]).reshape(n * 3, 2, 3)
        return torch.tanh(F.conv1d(x.reshape(1, n * c, t), weight, groups=n).view(n, 3, -1)).mean(2)


PLAIN = {
    "bias only": Entry(
        lambda: nn.Sequential(nn.Linear(5, 5).requires_grad_(False), Shift(5), nn.Tanh(), Shift(5)), normal(5)
    ),
    "scale only": Entry(
        lambda: nn.Sequential(
            nn.LayerNorm(5, bias=False), nn.Linear(5, 3).requires_grad_(False), LayerScale(3)
        ),
        normal(5),
    ),
    "layer scale": Entry(
        lambda: nn.Sequential(LayerScale(5), nn.Linear(5, 5), nn.Tanh(), LayerScale(5), nn.Linear(5, 3)),
        normal(5),
    ),
    "bilinear": Entry(TwoInputs, together(left=normal(3), right=normal(4))),
    "bare parameter": Entry(Bare, normal(4)),
    "einsum": Entry(Einsum, normal(5, 4)),
    "class token": Entry(ClassToken, normal(3, 4)),
    "in place": Entry(InPlace, normal(4)),
    "slice assignment": Entry(Assigned, normal(5, 4)),
    "functions of parameters": Entry(OfParameters, normal(4)),
    "unused": Entry(Unused, normal(4)),
    "own autograd function": Entry(OwnFunction, normal(4)),
    "straight-through rounding": Entry(Quantised, normal(4)),
    "functional convolution": Entry(OwnConvolution, normal(2, 5, 4)),
    "gated": Entry(Gated, normal(5, 4)),
    "expanded parameter": Entry(Expanded, normal(5, 5)),
    "fused product and pieces": Entry(Added, normal(4)),
    "prototypes": Entry(Prototypes, normal(4)),
    "indexed parameter": Entry(Looked, tokens(6, 5)),
    "low rank": Entry(lambda: LowRank(merged=False), normal(4)),
    "low rank, merged": Entry(lambda: LowRank(merged=True), normal(4)),
    "constant outputs": Entry(Constant, normal(4)),
    "hypernetwork": Entry(Hypernetwork, normal(4)),
    "scalars": Entry(Scalars, normal(4)),
    "pieces": Entry(Pieces, normal(4)),
    "columns": Entry(Columns, normal(5)),
    "recurrence": Entry(Recurrence, normal(3, 4)),
    "classes": Entry(Classes, together(x=normal(4), y=tokens(5))),
    "functional layers": Entry(FunctionalLayers, tokens(5, 3)),
    "modulated convolution": Entry(Modulated, together(x=normal(2, 5), z=normal(4))),
    "learned queries": Entry(Queries, normal(5, 4)),
}


# -- tokens, attention, recurrence -----------------------------------------------------------------


class Bags(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(6, 4, **arguments), nn.Linear(4, 3)

    def forward(self, x, per_sample_weights=None):
        return self.head(torch.tanh(self.bag(x, per_sample_weights=per_sample_weights)))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width=4, heads=2, causal=True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x):
        n, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Tied embeddings, by a functional head or a shared parameter; positions as a table or a parameter."""

    def __init__(self, length, functional, table):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.positions = nn.Embedding(length, 4) if table else nn.Parameter(torch.randn(length, 4))
        self.block, self.norm, self.table = Block(), nn.LayerNorm(4), table
        self.head = None if functional else nn.Linear(4, 6, bias=False)
        if not functional:
            self.head.weight = self.embed.weight

    def forward(self, x):
        length = x.shape[1]
        positions = self.positions(torch.arange(length)) if self.table else self.positions[:length]
        x = self.norm(self.block(self.embed(x) + positions))
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


class VisionTransformer(nn.Module):
    """Class token and positions at the root."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.cls, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 5, 4))
        self.block, self.norm, self.head = Block(causal=False), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


class Attention(nn.Module):
    """Self-attention; without ``batch_first`` the sequence is the first axis."""

    def __init__(self, batch_first, **arguments):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=batch_first, **arguments)
        self.head, self.batch_first = nn.Linear(4, 3), batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(self.attend(x, x, x)[0].square().mean(1 if self.batch_first else 0))


class CrossAttention(nn.Module):
    """Separate projections of queries, keys and values, extra keys, and a mask."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(
            4, 2, kdim=3, vdim=5, add_bias_kv=True, add_zero_attn=True, batch_first=True, dropout=0.3
        )
        self.head = nn.Linear(4, 3)

    def forward(self, q, k, v, mask):
        return self.head(self.attend(q, k, v, key_padding_mask=mask, need_weights=False)[0].square().mean(1))


class Encoder(nn.Module):
    def __init__(self, norm_first, batch_first):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 6, norm_first=norm_first, batch_first=batch_first, activation="gelu"
        )
        self.head, self.batch_first = nn.Linear(4, 3), batch_first

    def forward(self, x, mask):
        if self.batch_first:
            return self.head(self.layer(x, src_key_padding_mask=mask)[:, 0])
        return self.head(self.layer(x.transpose(0, 1), src_key_padding_mask=mask)[0])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, memory):
        return self.head(self.layer(x, memory)[:, -1])


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first, **arguments):
        super().__init__()
        self.cells = kind(3, 4, batch_first=batch_first, **arguments)
        width = (arguments.get("proj_size") or 4) * (2 if arguments.get("bidirectional") else 1)
        self.head, self.batch_first = nn.Linear(width, 3), batch_first

    def forward(self, x):
        if self.batch_first:
            return self.head(self.cells(x)[0].square().mean(1))
        return self.head(self.cells(x.transpose(0, 1))[0].square().mean(0))


class Cells(nn.Module):
    """A cell called once per position."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class EncoderStack(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

    def forward(self, x, mask):
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])


class BiasedAttention(nn.Module):
    """Fused attention with a learned bias of relative positions, and over learned tokens."""

    def __init__(self):
        super().__init__()
        self.qkv, self.tokens = nn.Linear(4, 12), nn.Parameter(torch.randn(5, 4))
        self.bias, self.project, self.head = nn.Parameter(torch.randn(9, 2)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4)
        offsets = torch.arange(t)[:, None] - torch.arange(t) + t - 1
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[offsets].permute(2, 0, 1))
        x = x.transpose(1, 2).reshape(n, t, d)
        tokens = self.project(self.tokens.expand(n, -1, -1))
        return self.head(F.scaled_dot_product_attention(x, tokens, tokens).mean(1))


class FirstState(nn.Module):
    """Learned first states, with the examples on their second axis."""

    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)
        self.h, self.c = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        first = self.h.expand(-1, len(x), -1).contiguous(), self.c.repeat(1, len(x), 1)
        return self.head(self.cells(x, first)[0][:, -1])


class Masked(nn.Module):
    """A mean over the positions that are not padding."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, mask):
        x = torch.tanh(self.first(x)).masked_fill(mask[..., None], 0.0)
        return self.head(x.sum(1) / (~mask).sum(1, keepdim=True))


def last(model, x):
    return model(x)[:, -1]


SEQUENCES = {
    "embedding": Entry(
        lambda: nn.Sequential(nn.Embedding(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)), tokens(6, 5)
    ),
    "embedding with padding": Entry(
        lambda: nn.Sequential(nn.Embedding(4, 4, padding_idx=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        tokens(4, 3),
    ),
    "embedding of one index": Entry(
        lambda: nn.Sequential(nn.Embedding(3, 4), nn.Tanh(), nn.Linear(4, 3)), tokens(3)
    ),
    "embedding bag": Entry(lambda: Bags(mode="mean", padding_idx=2), tokens(6, 4)),
    "embedding bag, largest": Entry(lambda: Bags(mode="max"), tokens(6, 4)),
    "embedding bag, weighted": Entry(
        lambda: Bags(mode="sum"), together(x=tokens(6, 4), per_sample_weights=normal(4))
    ),
    "language model, functional head, table of positions": Entry(
        lambda: LanguageModel(5, True, True), tokens(6, 5), last
    ),
    "language model, functional head, parameter of positions": Entry(
        lambda: LanguageModel(5, True, False), tokens(6, 5), last
    ),
    "language model, shared head, table of positions": Entry(
        lambda: LanguageModel(7, False, True), tokens(6, 4), last
    ),
    "language model, shared head, parameter of positions": Entry(
        lambda: LanguageModel(7, False, False), tokens(6, 4), last
    ),
    "vision transformer": Entry(VisionTransformer, normal(1, 4, 4)),
    "attention": Entry(lambda: Attention(batch_first=True), normal(5, 4)),
    "attention, sequence first": Entry(lambda: Attention(batch_first=False), normal(5, 4)),
    "attention without bias": Entry(lambda: Attention(batch_first=True, bias=False), normal(3, 4)),
    "cross attention": Entry(
        CrossAttention, together(q=normal(2, 4), k=normal(5, 3), v=normal(5, 5), mask=padding(5))
    ),
    "encoder layer": Entry(lambda: Encoder(False, True), together(x=normal(5, 4), mask=padding(5))),
    "encoder layer, pre-norm, sequence first": Entry(
        lambda: Encoder(True, False), together(x=normal(5, 4), mask=padding(5))
    ),
    "decoder layer": Entry(Decoder, together(x=normal(3, 4), memory=normal(5, 4))),
    "lstm": Entry(lambda: Recurrent(nn.LSTM, True), normal(5, 3)),
    "lstm, sequence first": Entry(lambda: Recurrent(nn.LSTM, False), normal(5, 3)),
    "lstm, both directions, two layers": Entry(
        lambda: Recurrent(nn.LSTM, True, bidirectional=True, num_layers=2, dropout=0.5), normal(3, 3)
    ),
    "lstm, projected": Entry(lambda: Recurrent(nn.LSTM, True, proj_size=2), normal(3, 3)),
    "gru": Entry(lambda: Recurrent(nn.GRU, True), normal(4, 3)),
    "gru, sequence first": Entry(lambda: Recurrent(nn.GRU, False, bias=False), normal(5, 3)),
    "rnn": Entry(lambda: Recurrent(nn.RNN, True), normal(4, 3)),
    "rnn, sequence first, relu": Entry(
        lambda: Recurrent(nn.RNN, False, nonlinearity="relu", bidirectional=True), normal(3, 3)
    ),
    "lstm cell": Entry(lambda: Cells(nn.LSTMCell), normal(3, 3)),
    "gru cell": Entry(lambda: Cells(nn.GRUCell), normal(3, 3)),
    "encoder of two layers": Entry(EncoderStack, together(x=normal(5, 4), mask=padding(5))),
    "attention with a learned bias": Entry(BiasedAttention, normal(5, 4)),
    "lstm with a learned first state": Entry(FirstState, normal(3, 3)),
    "mask": Entry(Masked, together(x=normal(5, 4), mask=padding(5))),
}


# -- sharing, structure and odd ways to be called --------------------------------------------------


class Reused(nn.Module):
    """One layer called several times."""

    def __init__(self, times):
        super().__init__()
        self.first, self.shared, self.norm = nn.Linear(4, 5), nn.Linear(5, 5), nn.LayerNorm(5)
        self.head, self.times = nn.Linear(5, 3), times

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.times):
            x = self.norm(torch.tanh(self.shared(x)))
        return self.head(x)


class TwoShapes(nn.Module):
    """One layer on vectors and on sequences of vectors."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        pooled = self.shared(torch.tanh(self.shared(x)).mean(1))
        return self.head(torch.tanh(pooled) + self.shared(x)[:, 0])


class TwoPaths(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Sequential(nn.Tanh(), self.left, nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return self.right(self.left(x))


class TiedLayers(nn.Module):
    """One parameter in three modules, transposed in one of them, and one bias in two."""

    def __init__(self):
        super().__init__()
        self.encode, self.again, self.out = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.again.weight = self.encode.weight
        self.norm = nn.LayerNorm(5)
        self.norm.bias = self.encode.bias

    def forward(self, x):
        x = torch.tanh(F.linear(torch.tanh(self.encode(x)), self.encode.weight.T))
        return self.out(self.norm(torch.tanh(self.again(x))))


class UsedAgain(nn.Module):
    """A layer's weight is also used outside of the layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)) * self.layer.weight.norm() + self.layer.weight[:, 0])


class Residual(nn.Module):
    """In-place activations and an in-place sum."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.relu, self.down = nn.ReLU(inplace=True), None
        if inside != outside:
            self.down = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += identity
        return self.relu(out)


def residual_net():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        Residual(2, 2),
        Residual(2, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


class SequenceFirst(nn.Module):
    """Layers that see ``[T, N, d]``."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.norm(torch.tanh(self.first(x.transpose(0, 1)))) * self.scale
        return self.head(torch.tanh(x)).mean(0)


class Folded(nn.Module):
    """Layers that see ``[N T, d]`` or ``[T N, d]``."""

    def __init__(self, positions_first):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.positions_first = positions_first

    def forward(self, x):
        x = x.transpose(0, 1) if self.positions_first else x
        flat = x.reshape(-1, 3)
        out = self.second(torch.tanh(self.norm(self.first(flat)))).unflatten(0, x.shape[:2])
        return out.square().mean(0 if self.positions_first else 1)


class TwoAxes(nn.Module):
    """One layer, first with the examples on the first axis and then on the second."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        turned = torch.tanh(self.shared(x)).transpose(0, 1)
        return self.head(torch.tanh(self.shared(turned)).mean(0))


class Siamese(nn.Module):
    """Both halves of every example in one batch, one half behind the other."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        left, right = (torch.tanh(self.layer(torch.cat([x[:, 0], x[:, 1]]))) * self.scale).chunk(2)
        return left * right


class FoldedChannels(nn.Module):
    """A convolution over every channel by itself, ``[N C, 1, T]``."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 2, 3), nn.Linear(2, 3)

    def forward(self, x):
        n, c, t = x.shape
        out = torch.tanh(self.conv(x.view(n * c, 1, t))).view(n, c, 2, t - 2)
        return self.head(out.mean((1, 3)))


class Keywords(nn.Module):
    """Called with keyword arguments, among them indices and a plain value."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, ids, scale, squared):
        out = self.head(input=torch.tanh(self.table(ids).mean(1)) * scale)
        return out.square() if squared else out


class WithoutGradients(nn.Module):
    """The same layer with and without gradients."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            scale = 1 + self.body(x).square().mean(1, keepdim=True)
        return self.head(torch.tanh(self.body(x)) / scale) * self.head(self.body(x).detach()).detach()


class Checkpointed(nn.Module):
    """Segments whose activations are computed again in the backward pass."""

    def __init__(self, reentrant=False, active=True):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.reentrant, self.active = reentrant, active

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        x = checkpoint(self.body, x, use_reentrant=self.reentrant) if self.active else self.body(x)
        return self.head(x)


class CheckpointedWhole(nn.Module):
    """A checkpoint around everything, with a parameter that the segment takes from outside."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = mlp(), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return checkpoint(lambda x: self.net(x) * self.scale, x, use_reentrant=False)


class Tripled(nn.Linear):
    """A known layer with a forward of its own."""

    def forward(self, x):
        return 3 * super().forward(x.square())


def hooked():
    model = mlp()
    model[0].register_forward_hook(lambda module, args, out: 2 * out.square())
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def normed_weights():
    first, second = nn.Linear(4, 5), nn.Conv1d(2, 2, 3, padding=1)
    return nn.Sequential(
        parametrizations.weight_norm(first),
        nn.Tanh(),
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 2, 1),
        parametrizations.weight_norm(second, dim=0),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(10, 3),
    )


def spectral_weights():
    first = parametrizations.spectral_norm(nn.Linear(4, 5))
    return nn.Sequential(first, nn.Tanh(), parametrizations.orthogonal(nn.Linear(5, 3)))


STRUCTURES = {
    "mlp": Entry(mlp, normal(4)),
    "one output": Entry(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), normal(4)),
    "frozen layers": Entry(frozen, normal(4)),
    "frozen lower layers": Entry(frozen_below, normal(4)),
    "conv net": Entry(conv_net, normal(1, 4, 4)),
    "residual net": Entry(residual_net, normal(1, 4, 4)),
    "used twice": Entry(lambda: Reused(2), normal(4)),
    "used three times": Entry(lambda: Reused(3), normal(4)),
    "used on two shapes": Entry(TwoShapes, normal(5, 4)),
    "two paths": Entry(TwoPaths, normal(4)),
    "tied layers": Entry(TiedLayers, normal(4)),
    "weight used again": Entry(UsedAgain, normal(4)),
    "sequence first": Entry(SequenceFirst, normal(3, 3)),
    "sequence first, as long as the batch": Entry(SequenceFirst, normal(5, 3)),
    "folded": Entry(lambda: Folded(False), normal(4, 3)),
    "folded, positions first": Entry(lambda: Folded(True), normal(4, 3)),
    "folded, positions first, as long as the batch": Entry(lambda: Folded(True), normal(5, 3)),
    "first and second axis": Entry(TwoAxes, normal(5, 4)),
    "siamese": Entry(Siamese, normal(2, 4)),
    "folded channels": Entry(FoldedChannels, normal(5, 5)),
    "keywords": Entry(Keywords, together(ids=tokens(5, 3), scale=normal(1), squared=True)),
    "tuple": Entry(TwoInputs, lambda n, g: (normal(3)(n, g), normal(4)(n, g)), lambda model, x: model(*x)),
    "branch without gradients": Entry(WithoutGradients, normal(4)),
    "checkpoint": Entry(Checkpointed, normal(4)),
    "checkpoint around everything": Entry(CheckpointedWhole, normal(4)),
    "subclass of a layer": Entry(lambda: nn.Sequential(Tripled(4, 5), nn.Tanh(), Tripled(5, 3)), normal(4)),
    "hooks that change activations": Entry(hooked, normal(4)),
    "weight norm": Entry(normed_weights, normal(4)),
    "spectral and orthogonal weights": Entry(spectral_weights, normal(4)),
}


# -- models for which a refusal would do -----------------------------------------------------------


class Routed(nn.Module):
    """Every position goes to one of two experts, so that examples are mixed in one batch."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x):
        out, to = x.new_zeros(*x.shape[:-1], 3), x[..., 0] > 0
        for expert, chosen in zip(self.experts, (to, ~to), strict=True):
            out[chosen] = torch.tanh(expert(x[chosen]))
        return out.sum(1)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, mask):
        lengths = (~mask).sum(1)
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.cells(packed)[1][0])


class Mapped(nn.Module):
    """The model maps over the examples itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.func.vmap(lambda each: torch.tanh(self.layer(each)))(x)


class Filtered(nn.Module):
    """A learned filter in Fourier space."""

    def __init__(self):
        super().__init__()
        self.response = nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        response = torch.view_as_complex(self.response)
        return torch.fft.irfft(torch.fft.rfft(x) * response, n=6)[:, :3].square()


class Solved(nn.Module):
    """Examples in the columns of a linear system."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        system = self.matrix + 4 * torch.eye(4, dtype=x.dtype)
        return torch.linalg.solve(system, x.T).T[:, :3].tanh()


class Sorted(nn.Module):
    """The batch is put in another order and back."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        out = torch.tanh(self.layer(x[order]))
        return self.head(out)[order.argsort()]


class Reversed(nn.Module):
    """A layer that sees the examples in reversed order."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.tanh(self.layer(x.flip(0)) * self.scale).flip(0)


class Looped(nn.Module):
    """The layer is called for one example after the other, and never on a batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.stack([torch.tanh(self.layer(each)) for each in x]))


class Unpadded(nn.Module):
    """Only the positions that are no padding, without an axis of examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, mask):
        out = x.new_zeros(*mask.shape, 3)
        out[~mask] = torch.tanh(self.layer(x[~mask]))
        return out.sum(1)


class Force(nn.Module):
    """The outputs are the gradient of a scalar function of the inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.energy = nn.Linear(4, 5), nn.Linear(5, 1, bias=False)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(torch.tanh(self.first(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0][:, :3]


class Split(nn.Module):
    """Each half of the batch is called by itself, and the first half with reversed order."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        half = len(x) // 2
        parts = [self.layer(x[:half].flip(0)).flip(0), self.layer(x[half:])]
        return self.head(torch.tanh(torch.cat(parts)))


HARD = {
    "routed": Entry(Routed, normal(5, 4)),
    "packed sequences": Entry(Packed, together(x=normal(5, 3), mask=padding(5))),
    "maps over the examples": Entry(Mapped, normal(4)),
    "complex filter": Entry(Filtered, normal(6)),
    "linear system": Entry(Solved, normal(4)),
    "sorted batch": Entry(Sorted, normal(4)),
    "reversed batch": Entry(Reversed, normal(4)),
    "loop over the examples": Entry(Looped, normal(4)),
    "padding taken out": Entry(Unpadded, together(x=normal(5, 4), mask=padding(5))),
    "gradient of an energy": Entry(Force, normal(4)),
    "split batch": Entry(Split, normal(4)),
    "sparse embedding": Entry(
        lambda: nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        tokens(4, 3),
    ),
    "embedding scaled by frequency": Entry(
        lambda: nn.Sequential(
            nn.Embedding(4, 4, scale_grad_by_freq=True), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
        ),
        tokens(4, 3),
    ),
}

ENTRIES = {**STRUCTURES, **LAYERS, **PLAIN, **SEQUENCES}
