"""Every rule against one backward pass per example."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gradiometer.autodiff.ride_along import RideAlong
from gradiometer.autodiff.rules import RULES

BATCH = 3


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(out):
    """A loss whose cotangents differ from output to output and example to example, summed over them."""
    weights = draws(*out.shape[1:], seed=9)
    return (torch.sin(out) * weights + (out * weights).square()).sum()


def one(x, i):
    return x[i : i + 1]


def loop(model, x):
    """Squared gradient norm of each example by name, one backward pass per example: ``[B]`` each."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    squares = {name: [] for name in names}
    for i in range(len(x)):
        gradients = torch.autograd.grad(loss_of(model(one(x, i))), parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            squares[name].append(torch.zeros(()).double() if gradient is None else gradient.square().sum())
    return {name: torch.stack(each) for name, each in squares.items()}


def shown(tape):
    """Squared norms over all covered parameters, their names, and what is missing."""
    sq_norms, skipped = tape.result()
    return torch.stack(list(sq_norms.values())).double().sum(0), set(sq_norms), skipped


def ride(model, x):
    tape = RideAlong(model, len(x))
    try:
        loss_of(model(x)).backward()
    finally:
        tape.detach()
    return shown(tape)


def check(model, x, tolerance=1e-10):
    """The tape's norms, in total and with each parameter alone, are those of the loop."""
    expected = loop(model, x)
    norms, covered, skipped = ride(model, x)
    assert covered == set(expected)
    assert skipped == {}
    total = torch.stack(list(expected.values())).sum(0)
    torch.testing.assert_close(norms, total, rtol=tolerance, atol=0)
    assert total.min() > 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            alone = expected[name]
            others = [q for q in model.parameters() if q is not p and q.requires_grad]
            for q in others:
                q.requires_grad_(False)
            norms, covered, _ = ride(model, x)
            for q in others:
                q.requires_grad_(True)
            assert covered == {name}
            torch.testing.assert_close(norms, alone, rtol=tolerance, atol=1e-12 * total.max().item())


CASES = {
    "linear": (lambda: nn.Linear(4, 5), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 5, bias=False), (4,)),
    "linear, gram branch": (lambda: nn.Linear(9, 8), (2, 9)),
    "linear, outer branch": (lambda: nn.Linear(3, 2), (7, 3)),
    "linear, two position axes": (lambda: nn.Linear(3, 4), (2, 3, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (2, 8)),
    "conv1d, stride and dilation": (lambda: nn.Conv1d(2, 4, 3, stride=2, dilation=2, padding=1), (2, 10)),
    "conv1d, same": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 7)),
    "conv1d, same and dilated": (lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=3), (2, 7)),
    "conv1d, depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), (4, 6)),
    "conv1d, one position": (lambda: nn.Conv1d(2, 4, 5), (2, 5)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(2, 4, 3), (2, 6)),
    "transposed conv1d, one position": (lambda: nn.ConvTranspose1d(2, 4, 5), (2, 1)),
    "transposed conv2d, uneven everything": (
        lambda: nn.ConvTranspose2d(
            4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2, dilation=(1, 2)
        ),
        (4, 3, 4),
    ),
    "transposed conv2d, output padding above the stride": (
        lambda: nn.ConvTranspose2d(2, 3, 2, stride=1, dilation=3, output_padding=2, bias=False),
        (2, 3, 3),
    ),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, padding=1), (2, 2, 3, 2)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 5, 4)),
    "conv2d, uneven everything": (
        lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        (2, 6, 7),
    ),
    "conv2d, stride leaves a rest": (lambda: nn.Conv2d(1, 2, 3, stride=3), (1, 8, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 5, 5)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
    "conv2d, replicate and same": (
        lambda: nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="replicate"),
        (2, 4, 4),
    ),
    "conv2d, gram branch": (lambda: nn.Conv2d(8, 9, 3), (8, 3, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1), padding=(1, 0, 1)), (2, 3, 4, 3)),
    "layer norm": (lambda: nn.LayerNorm(6), (6,)),
    "layer norm with positions": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer norm over two axes": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False, eps=0.1), (2, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (3, 6)),
    "rms norm with eps": (lambda: nn.RMSNorm((2, 3), eps=0.3), (4, 2, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 6, eps=0.1), (6, 5)),
    "group norm, vectors": (lambda: nn.GroupNorm(2, 6), (6,)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(3, affine=True, eps=0.2), (3, 4, 2)),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 3, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CASES)
def test_rule_against_a_loop(name):
    make, shape = CASES[name]
    torch.manual_seed(0)
    module = make().double()
    for i, p in enumerate(module.parameters()):  # norm layers begin at one and zero
        p.data.add_(0.3 * draws(*p.shape, seed=20 + i))
    check(module, draws(BATCH, *shape))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 5)),
        (nn.BatchNorm2d(3, eps=0.1), (3, 4, 2)),
        (nn.BatchNorm3d(2), (2, 2, 3, 2)),
    ],
    ids=["1d", "1d with positions", "2d", "3d"],
)
def test_batch_norm_in_evaluation_mode(module, shape):
    module.double()
    module(2 + draws(8, *shape, seed=4))  # running statistics of its own
    module.eval()
    check(module, draws(BATCH, *shape))


@pytest.mark.parametrize("padding", [None, 0, 3])
@pytest.mark.parametrize("shape", [(6,), (2, 4)])
def test_embedding_with_repeated_indices(padding, shape):
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, padding_idx=padding).double()
    ids = torch.randint(5, (BATCH, *shape))
    ids[0] = 2  # one row, many times
    check(table, ids)
    assert (ids == 3).any()
    assert (ids == 0).any()


def test_every_rule_is_tested():
    tested = {type(make()) for make, _ in CASES.values()}
    tested |= {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Embedding}
    assert tested == set(RULES)


# -- random stacks ---------------------------------------------------------------------------------


class Sequence(nn.Module):
    """Layers on ``[B, C, T]``, with the axes turned for those that work on the last one."""

    def __init__(self, names, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.names = names
        self.layers = nn.ModuleList([STACK[name]() for name in names])

    def forward(self, x):
        for name, layer in zip(self.names, self.layers, strict=True):
            x = layer(x.mT).mT if name in ("linear", "layer norm", "rms norm") else layer(x)
        return x


STACK = {
    "linear": lambda: nn.Linear(4, 4),
    "layer norm": lambda: nn.LayerNorm(4),
    "rms norm": lambda: nn.RMSNorm(4),
    "conv": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "dilated": lambda: nn.Conv1d(4, 4, 3, padding="same", dilation=2),
    "grouped": lambda: nn.Conv1d(4, 4, 2, padding=1, stride=2, groups=2),
    "circular": lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True),
    "batch norm": lambda: nn.BatchNorm1d(4).eval(),
    "conv and relu": lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(inplace=True)),
    "norm and relu": lambda: nn.Sequential(nn.GroupNorm(1, 4), nn.ReLU(inplace=True)),
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "pool": lambda: nn.AvgPool1d(3, stride=1, padding=1),
}


@settings(
    max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    names=st.lists(st.sampled_from(sorted(STACK)), min_size=1, max_size=5),
    twice=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_stacks_against_a_loop(names, twice, seed):
    model = Sequence(["conv", *names, "conv"], seed).double()
    if twice:  # the whole stack is called again on its own output
        stack = model
        model = nn.Sequential(stack, nn.Tanh(), stack)
    x = draws(BATCH, 4, 9, seed=seed)
    expected = loop(model, x)
    norms, covered, skipped = ride(model, x)
    assert covered == set(expected)
    assert skipped == {}
    total = torch.stack(list(expected.values())).sum(0)
    torch.testing.assert_close(norms, total, rtol=1e-9, atol=1e-18)


def test_single_precision_and_bfloat16_are_raised_inside():
    model = nn.Linear(4, 300, bias=False)
    x = torch.full((2, 4), 300.0)
    tape = RideAlong(model, 2)
    (model(x) * 1e3).sum().backward()
    tape.detach()
    norms, _, _ = shown(tape)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(
        norms, torch.full((2,), 4 * 9e4 * 300 * 1e6, dtype=torch.float64), rtol=1e-6, atol=0
    )
    half = nn.Linear(4, 300, bias=False).bfloat16()
    tape = RideAlong(half, 2)
    half(x.bfloat16()).sum().backward()
    tape.detach()
    expected = torch.full((2,), 4 * float(torch.tensor(300.0).bfloat16()) ** 2 * 300, dtype=torch.float64)
    torch.testing.assert_close(shown(tape)[0], expected, rtol=1e-6, atol=0)
