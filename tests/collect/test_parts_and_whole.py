"""Parts and whole are one gradient: what comes between them is undone, or refused with its own reason."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradiometer import GradientNoiseScale, MemoryRecorder, Monitor
from gradiometer.errors import MeasurementWarning
from gradiometer.stats.estimators import Last

WIDTH, BATCH = 5, 8


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(seed, size=BATCH):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def trace_and_signal(model, parts, loss=entropy):
    """The two numbers from the gradients of equal parts, with nothing of the library."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x, y in parts:
        gradient = torch.autograd.grad(loss(model, x, y), parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradient, parameters, strict=True)]
        rows.append(torch.cat([g.flatten() for g in filled]))
    rows, size = torch.stack(rows), len(parts[0][0])
    trace = float(size * rows.var(0).sum())
    return trace, float(rows.mean(0).square().sum()) - trace / (size * len(rows))


def examples(x, y):
    return list(zip(x.split(1), y.split(1), strict=True))


class Loop:
    """A plain loop of one's own, with the monitor in it."""

    def __init__(self, model=None, **settings):
        self.model = model or network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=settings.pop("lr", 0.0))
        self.memory = MemoryRecorder()
        noise = GradientNoiseScale(schedule=1, estimator=Last(), source=settings.pop("source", "auto"))
        self.monitor = Monitor(self.model, self.optimizer, [noise], recorders=[self.memory], **settings)

    def backward(self, x, y, loss=entropy, factor=1.0):
        with self.monitor.micro_batch(x, y):
            (factor * loss(self.model, x, y)).backward()

    def step(self, **scales):
        self.monitor.before_step(**scales)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def value(self, name):
        return self.memory.latest()[f"dynamics/noise/{name}"].value

    def note(self):
        return self.memory.latest()["dynamics/noise/trace"].note

    def check(self, parts, loss=entropy):
        trace, signal = trace_and_signal(self.model, parts, loss)
        assert self.value("trace") == pytest.approx(trace, rel=1e-9)
        assert self.value("grad_sq_norm") == pytest.approx(signal, rel=1e-9, abs=1e-12)


@pytest.fixture(autouse=True)
def no_warning():
    """Where nothing is refused nothing is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        yield


def said(loop, message):
    """The step is refused with this message."""
    with pytest.warns(MeasurementWarning, match=message):
        loop.step()
    assert "dynamics/noise/trace" not in loop.memory.latest() or math.isnan(loop.value("trace"))


# -- changed between the backward pass and before_step() -------------------------------------------


def clip_by_norm(parameters):
    nn.utils.clip_grad_norm_(parameters, 0.05)


def times(factor, parameters):
    for p in parameters:
        p.grad *= factor


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("change", [clip_by_norm, partial(times, 0.3), partial(times, 7)])
def test_one_factor_on_all_gradients_is_undone(change, count):
    loop, (x, y) = Loop(), batch(1)
    parts = list(zip(x.chunk(count), y.chunk(count), strict=True))
    for part in parts:
        loop.backward(*part, factor=1 / count)
    change(list(loop.model.parameters()))
    loop.step()
    loop.check(parts if count > 1 else examples(x, y))
    assert "before before_step(), which is undone" in loop.note()


def test_micro_batches_may_be_averaged_after_their_backward_passes():
    loop = Loop()
    parts = [batch(seed) for seed in range(3)]
    for part in parts:
        loop.backward(*part)
    times(1 / 3, list(loop.model.parameters()))
    loop.step()
    loop.check(parts)
    assert "undone" not in loop.note()


def by_value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.01)


def layer_by_layer(parameters):
    for p in parameters:
        nn.utils.clip_grad_norm_([p], 0.05)


def private(parameters):
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.grad += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def decayed(parameters):
    for p in parameters:
        p.grad += 0.1 * p.detach()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("change", [by_value, layer_by_layer, private, decayed])
def test_any_other_change_is_refused(change, count):
    loop, (x, y) = Loop(), batch(1)
    for part in zip(x.chunk(count), y.chunk(count), strict=True):
        loop.backward(*part, factor=1 / count)
    change(list(loop.model.parameters()))
    said(loop, r"\.grad is not the sum of what this step's backward passes gave: it was changed")


@pytest.mark.parametrize("count", [1, 2])
def test_a_scale_that_was_taken_out_in_silence_is_asked_for(count):
    loop, (x, y) = Loop(), batch(1)
    for part in zip(x.chunk(count), y.chunk(count), strict=True):
        loop.backward(*part, factor=2.0**16 / count)
    times(2.0**-16, list(loop.model.parameters()))
    said(loop, r"as after unscaling, got a factor of 1.52588e-05. Under a gradient scaler write")


# -- gradients of something else -------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_left_over_from_an_earlier_step_are_named(count):
    loop, (x, y) = Loop(), batch(1)
    entropy(loop.model, *batch(2)).backward()
    for part in zip(x.chunk(count), y.chunk(count), strict=True):
        loop.backward(*part, factor=1 / count)
    said(loop, r"gradients of an earlier step were still in \.grad")


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_zeroed_within_the_micro_batch_are_not_left_over(to_none):
    loop = Loop()
    for seed in range(3):
        x, y = batch(seed)
        with loop.monitor.micro_batch(x, y):
            loop.optimizer.zero_grad(set_to_none=to_none)
            entropy(loop.model, x, y).backward()
        loop.monitor.before_step()
        loop.optimizer.step()
        loop.check(examples(x, y))


@pytest.mark.parametrize("count", [1, 2])
def test_a_backward_pass_outside_the_micro_batch_is_noticed(count):
    loop, (x, y) = Loop(), batch(1)
    for part in zip(x.chunk(count), y.chunk(count), strict=True):
        loop.backward(*part, factor=1 / count)
    entropy(loop.model, *batch(2)).backward()
    said(loop, r"or a backward pass was made outside monitor.micro_batch")


def ridge(model, x, y, strength=0.1):
    return entropy(model, x, y) + strength * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("every", [3, 4])
def test_a_penalty_on_some_steps_leaves_the_others_alone(every):
    """As in lazy regularisation; the first step, without it, tells nothing of what will come."""
    loop = Loop()
    for step in range(1, 9):
        x, y = batch(step)
        lazy = step % every == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MeasurementWarning)
            loop.backward(x, y, ridge if lazy else entropy)
            loop.step()
        if lazy:
            assert loop.memory.records[-1][0] != step - 1
        else:
            loop.check(examples(x, y))


def test_a_penalty_that_is_warmed_up_is_refused_when_it_comes():
    loop = Loop()
    loop.backward(*batch(0), partial(ridge, strength=0.0))
    loop.step()
    loop.check(examples(*batch(0)))
    for step in range(1, 5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MeasurementWarning)
            loop.backward(*batch(step), partial(ridge, strength=0.01 * step))
            loop.step()
        if step == 1:
            assert "more than the sum over the examples (a penalty" in str(caught[0].message)
    assert math.isnan(loop.value("trace"))


def test_micro_batches_hold_their_penalty():
    loop, parts = Loop(), [batch(1), batch(2)]
    for part in parts:
        loop.backward(*part, ridge, factor=0.5)
    loop.step()
    loop.check(parts, ridge)


# -- micro-batches that are given up ---------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_that_is_tried_again_counts_once(count, to_none):
    loop, parts = Loop(), [batch(seed) for seed in range(count)]
    for attempt in range(2):
        try:
            for index, part in enumerate(parts):
                with loop.monitor.micro_batch(*part):
                    (entropy(loop.model, *part) / count).backward()
                    if attempt == 0 and index == count - 1:
                        raise MemoryError
        except MemoryError:
            loop.optimizer.zero_grad(set_to_none=to_none)
    loop.step()
    loop.check(parts if count > 1 else examples(*parts[0]))


@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_that_is_not_finite_is_left_out_and_its_step_too(count):
    loop = Loop()
    for seed in range(6):
        parts = [batch(10 * seed + index) for index in range(count)]
        bad = math.nan if seed == 2 else 1.0
        for part in parts:
            loop.backward(*part, factor=bad / count)
        if seed == 2:
            loop.optimizer.zero_grad()
            continue
        loop.step()
        loop.check(parts if count > 1 else examples(*parts[0]))


def test_a_micro_batch_that_never_ended_is_followed_by_another():
    loop = Loop()
    for seed in range(2):
        x, y = batch(seed)
        loop.monitor.begin_micro_batch(x, y)
        entropy(loop.model, x, y).backward()
    loop.model.zero_grad()
    x, y = batch(5)
    loop.monitor.begin_micro_batch(x, y)
    entropy(loop.model, x, y).backward()
    loop.step()
    loop.check(examples(x, y))
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in loop.model.parameters())


@pytest.mark.parametrize("skipped", [{0}, {2}, {0, 1}])
def test_micro_batches_without_a_backward_pass_are_no_part(skipped):
    loop, parts = Loop(), [batch(seed) for seed in range(4)]
    for index, part in enumerate(parts):
        with loop.monitor.micro_batch(*part):
            if index not in skipped:
                (entropy(loop.model, *part) / 4).backward()
    loop.step(loss_divisor=4)
    loop.check([part for index, part in enumerate(parts) if index not in skipped])


# -- several backward passes -----------------------------------------------------------------------


def squares(model, x, y):
    return 0.1 * (model(x) - F.one_hot(y, 3)).square().mean()


def both(model, x, y):
    return entropy(model, x, y) + squares(model, x, y)


def one_graph(model, x, y):
    out = model(x)
    F.cross_entropy(out, y).backward(retain_graph=True)
    (0.1 * (out - F.one_hot(y, 3)).square().mean()).backward()


def two_graphs(model, x, y):
    entropy(model, x, y).backward()
    squares(model, x, y).backward()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("passes", [one_graph, two_graphs])
def test_two_losses_of_one_batch_are_one_gradient(passes, count):
    loop = Loop()
    for step in range(3):
        parts = [batch(10 * step + index) for index in range(count)]
        for part in parts:
            with loop.monitor.micro_batch(*part):
                passes(loop.model, *part)
        if step == 0:
            with pytest.warns(MeasurementWarning, match="in several pieces .several backward passes"):
                loop.step(loss_divisor=1)
        else:
            loop.step(loss_divisor=1)
            trace, signal = trace_and_signal(loop.model, parts if count > 1 else examples(*parts[0]), both)
            assert loop.value("trace") == pytest.approx(trace, rel=1e-9)
            assert loop.value("grad_sq_norm") == pytest.approx(signal, rel=1e-9)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_that_is_only_looked_at_does_not_count(create_graph, count):
    loop = Loop()
    parts = [batch(index) for index in range(count)]
    for part in parts:
        with loop.monitor.micro_batch(*part):
            loss = entropy(loop.model, *part) / count
            torch.autograd.grad(
                loss, list(loop.model.parameters()), retain_graph=True, create_graph=create_graph
            )
            loss.backward()
    loop.step()
    loop.check(parts if count > 1 else examples(*parts[0]))


def test_a_gradient_penalty_is_told_apart_from_a_second_backward_pass():
    loop, (x, y) = Loop(), batch(0)
    x.requires_grad_(True)
    with loop.monitor.micro_batch(x, y):
        loss = entropy(loop.model, x, y)
        [slope] = torch.autograd.grad(loss, [x], create_graph=True)
        (loss + slope.square().sum()).backward()
    said(loop, r"a derivative of the gradient")


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = x.clone().requires_grad_(True)
        for _ in range(2):
            x = checkpoint(lambda x: torch.tanh(self.inner(x)), x, use_reentrant=True)
        return self.head(x)


def unchecked(model, x, y):
    plain = nn.Sequential(model.inner, nn.Tanh(), model.inner, nn.Tanh(), model.head)
    return F.cross_entropy(plain(x), y)


def test_pieces_of_a_checkpointed_model_are_added_up():
    """One layer in two checkpointed segments receives its gradient in two pieces."""
    loop = Loop(Reentrant().double())
    for step in range(2):
        parts = [batch(10 * step), batch(10 * step + 1)]
        for part in parts:
            loop.backward(*part, factor=0.5)
        if step == 0:
            with pytest.warns(MeasurementWarning, match="or a checkpointed part of the model"):
                loop.step()
        else:
            loop.step()
            loop.check(parts, unchecked)


# -- branches --------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(WIDTH, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.frozen = nn.Linear(6, 3).requires_grad_(False)

    def forward(self, x):
        head = self.heads[int(x[0, 0] > 0)]
        hidden = torch.tanh(self.trunk(x))
        return head(hidden) + self.frozen(hidden)


def test_a_branch_that_a_micro_batch_does_not_use_has_no_gradient_there():
    loop, parts = Loop(Branches().double()), [batch(seed) for seed in range(6)]
    assert len({bool(x[0, 0] > 0) for x, _ in parts}) == 2
    for part in parts:
        loop.backward(*part, factor=1 / 6)
    loop.step()
    loop.check(parts)


# -- steps that are not made -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_steps_of_a_wrapper_that_only_waits_join_the_next_one(count):
    """A flat loop around a prepared optimizer, which forwards only the last step of a window."""
    loop = Loop()
    for window in range(3):
        parts = [batch(10 * window + index) for index in range(count)]
        for index, part in enumerate(parts):
            loop.backward(*part, factor=1 / count)
            loop.monitor.before_step()
            if index == count - 1:
                loop.optimizer.step()
                loop.optimizer.zero_grad()
        loop.check(parts)
    assert [step for step, _ in loop.memory.series("dynamics/noise/trace")] == [0, 1, 2]


def test_a_step_that_is_left_out_by_name_is_gone():
    loop = Loop()
    loop.backward(*batch(0))
    loop.monitor.before_step()
    loop.monitor.skip_step()
    loop.model.zero_grad(set_to_none=False)
    loop.backward(*batch(1))
    loop.step()
    loop.check(examples(*batch(1)))
