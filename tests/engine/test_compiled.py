"""Compiled models: the same bits, and as many graphs as without a monitor, however they are compiled."""

import math
import warnings

import pytest
import torch
import torch._dynamo as dynamo
from torch import nn
from torch.nn import functional as F

from gradiometer import (
    GradientNoiseScale,
    JacobianNorm,
    Monitor,
    NeuralTangentKernel,
    SecondFluctuationDissipation,
    at,
)
from gradiometer.collect.compilation import CompilerWatch
from gradiometer.errors import MeasurementWarning, TooEarlyError, UnsupportedError

STEPS = 7


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def whole(net, **options):
    """Handed to the monitor as it is."""
    compiled = torch.compile(net, **options)
    return compiled, compiled


def outside(net, **options):
    """The loop compiles; the monitor has the original."""
    return torch.compile(net, **options), net


def part(net, **options):
    net.body = torch.compile(net.body, **options)
    return net, net


def in_place(net, **options):
    net.compile(**options)
    return net, net


def part_in_place(net, **options):
    net.body.compile(**options)
    return net, net


def function(net, **options):
    return torch.compile(lambda x: net(x), **options), net


def nothing(net, **options):
    return net, net


CASES = [whole, outside, part, in_place, part_in_place, function, nothing]


def everything():
    return [
        NeuralTangentKernel(schedule=at([0, 3])),
        JacobianNorm(schedule=at([1, 3])),
        GradientNoiseScale(schedule=2),
        SecondFluctuationDissipation(schedule=3),
    ]


def train(case, backend, observables, late=0):
    """Weights, graphs that ran in each step, and the monitor."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    runs = [0]

    def counted(graph, example):
        def run(*arguments):
            runs[0] += 1
            return graph.forward(*arguments)

        return run

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    options = {"backend": counted if backend == "counted" else backend}
    call, watched = (net, net) if late else case(net, **options)
    monitor = None
    if observables is not None:
        monitor = Monitor(watched, optimizer, observables, loss_fn=F.cross_entropy)
    graphs = []
    for step in range(STEPS):
        if late and step == late:
            call, _ = case(net, **options)
        x, y = torch.randn(8 if step != 4 else 12, 6), torch.randint(3, (8 if step != 4 else 12,))
        if monitor:
            monitor.begin_micro_batch(x, y)
        before = runs[0]
        F.cross_entropy(call(x), y).backward()
        graphs.append(runs[0] - before)
        if monitor:
            monitor.end_micro_batch()
            monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
    counters = dynamo.utils.counters
    graphs += [counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())]
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    if monitor:
        monitor.close()
    return weights, graphs, monitor


def compare(case, backend, late=0):
    plain, graphs, _ = train(case, backend, None, late)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        weights, graphs_with_us, monitor = train(case, backend, everything(), late)
    assert torch.equal(weights, plain)
    assert graphs_with_us == graphs
    names = ("ntk/drift", "jacobian/frobenius_norm", "noise/trace", "fdr2/right")
    values = [monitor.latest[f"dynamics/{name}"].value for name in names]
    assert all(map(math.isfinite, values)), values
    return monitor


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("backend", ["counted", "aot_eager"])
def test_the_run_is_the_same(case, backend):
    monitor = compare(case, backend)
    source = monitor.latest["dynamics/noise/trace"].note.partition(",")[0]
    assert source == ("per example" if case is nothing else "split batch")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.__name__)
def test_the_run_is_the_same_under_inductor(case):
    compare(case, "inductor")


@pytest.mark.parametrize("late", [1, 3, 5])
@pytest.mark.parametrize("case", [outside, in_place, function], ids=lambda case: case.__name__)
def test_a_model_that_is_compiled_late(case, late):
    compare(case, "counted", late)


def test_without_the_loss_the_noise_is_refused_by_name():
    dynamo.reset()
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    compiled = torch.compile(net, backend="eager")
    monitor = Monitor(compiled, optimizer, [GradientNoiseScale(schedule=1)])
    with pytest.warns(MeasurementWarning, match=r"torch.compile is at work.*Pass loss_fn= to have") as caught:
        for _ in range(3):
            x, y = torch.randn(8, 6), torch.randint(3, (8,))
            with monitor.micro_batch(x, y):
                F.cross_entropy(compiled(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    assert len(caught) == 1
    monitor.close()


def test_micro_batches_of_a_compiled_model_are_read_without_the_loss():
    dynamo.reset()
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    compiled = torch.compile(net, backend="aot_eager")
    monitor = Monitor(compiled, optimizer, [GradientNoiseScale(schedule=1)])
    for _ in range(3):
        for _ in range(2):
            x, y = torch.randn(8, 6), torch.randint(3, (8,))
            with monitor.micro_batch(x, y):
                (F.cross_entropy(compiled(x), y) / 2).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
    assert monitor.latest["dynamics/noise/trace"].is_finite
    monitor.close()


def test_something_else_that_is_compiled_and_never_runs_does_not_count():
    """A library that decorates functions of its own."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    torch.compile(lambda x: x + 1, backend="eager")
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = Monitor(net, optimizer, [GradientNoiseScale(schedule=3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        for _ in range(3):
            x, y = torch.randn(8, 6), torch.randint(3, (8,))
            with monitor.micro_batch(x, y):
                F.cross_entropy(net(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.latest["dynamics/noise/trace"].note.startswith("per example")
    monitor.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_hooks_wait_for_the_first_step_and_stay_off_what_is_compiled(case):
    dynamo.reset()
    dynamo.utils.counters.clear()
    watch = CompilerWatch()
    call, net = case(Net(), backend="eager")
    early = watch.refusal(net)
    call(torch.randn(2, 6))
    watch.step_made()
    after = watch.refusal(net)
    if case is nothing:
        assert early is None
        assert after is None
    else:
        assert isinstance(after, UnsupportedError)
        assert isinstance(early, (TooEarlyError, UnsupportedError))


def test_the_users_own_stance_is_kept():
    net = Net()
    compiled = torch.compile(net, backend="eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = Monitor(compiled, optimizer, [JacobianNorm(schedule=1)])
    with torch.compiler.set_stance("eager_on_recompile"):
        before = dynamo.eval_frame._stance
        with monitor.micro_batch(torch.randn(8, 6)):
            compiled(torch.randn(8, 6)).sum().backward()
        monitor.before_step()
        optimizer.step()
        assert dynamo.eval_frame._stance == before
    monitor.close()
