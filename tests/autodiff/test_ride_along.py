import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradiometer import GradientNoiseScale, MemoryRecorder, Monitor
from gradiometer.autodiff.ride_along import RideAlong, refusal
from gradiometer.autodiff.rules import RULES
from gradiometer.collect.parameter_hooks import ParameterHooks
from gradiometer.collect.parts_and_whole import foreign
from gradiometer.errors import SampleSkippedError, UnsupportedError
from gradiometer.stats.directions import Directions

from .. import zoo
from ..hooks import standing

BATCH = 5


def shown(tape):
    """Squared norms over all covered parameters, their names, and what is missing."""
    sq_norms, skipped = tape.result()
    return torch.stack(list(sq_norms.values())).double().sum(0), set(sq_norms), skipped


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(model, loss_fn, batch):
    """Squared gradient norm of each example, one backward pass per example."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    squares = []
    for i in range(BATCH):
        gradients = torch.autograd.grad(loss_fn(model, batch[i : i + 1]), parameters, allow_unused=True)
        squares.append(sum(g.square().sum() for g in gradients if g is not None))
    return torch.stack(squares)


def ride(model, loss_fn, batch):
    tape = RideAlong(model, len(batch))
    try:
        loss_fn(model, batch).backward()
    finally:
        tape.detach()
    return tape


def squared(model, x):
    return model(x).square().sum()


def check(model, batch, loss_fn=squared, reference=None):
    expected = loop(reference or model, loss_fn if reference is None else squared, batch)
    norms, covered, skipped = shown(ride(model, loss_fn, batch))
    assert skipped == {}
    assert covered == {name for name, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0)


# -- what it sees ----------------------------------------------------------------------------------


def test_a_module_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.Linear(4, 4), nn.Embedding(6, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, ids):
            x = self.norm(self.layer(self.table(ids))) + self.table(ids.flip(1))
            return self.norm(torch.tanh(self.layer(torch.tanh(x))))

    torch.manual_seed(0)
    check(Twice().double(), torch.randint(6, (BATCH, 3)))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Hardtanh(inplace=True)]
)
def test_in_place_activations(activation):
    model = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 6), activation, nn.Linear(6, 2))
    check(model.double(), draws(BATCH, 4))


def test_frozen_parameters_are_no_part_of_the_norm():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    check(model, draws(BATCH, 4))


def test_keyword_input():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(input=x)

    check(Net().double(), draws(BATCH, 4))


def test_mean_reduction_scales_the_contributions():
    model = nn.Linear(4, 3).double()
    x, y = draws(BATCH, 4), torch.arange(BATCH) % 3
    tape = RideAlong(model, BATCH)
    F.cross_entropy(model(x), y).backward()
    tape.detach()
    expected = []
    for i in range(BATCH):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) / BATCH
        expected.append(sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(shown(tape)[0], torch.stack(expected), rtol=1e-10, atol=0)


def test_the_gradient_itself_is_what_it_would_have_been():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)).double()
    x = draws(BATCH, 4)
    squared(model, x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ride(model, squared, x)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert standing(model) == 0


def test_a_forward_without_gradients_afterwards_is_ignored():
    model, x = nn.Linear(4, 2).double(), draws(BATCH, 4)
    expected = loop(model, squared, x)
    tape = RideAlong(model, BATCH)
    squared(model, x).backward()
    with torch.no_grad():
        model(x)
    model(x).argmax(1)
    tape.detach()
    torch.testing.assert_close(shown(tape)[0], expected, rtol=1e-10, atol=0)


# -- checkpointing ---------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Segments that end in a layer, in an activation that saves its output, and in nothing at all."""

    def __init__(self, last, reentrant=False):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2), *last)
        self.reentrant, self.active = reentrant, True

    def segment(self, part, x):
        return checkpoint(part, x, use_reentrant=self.reentrant) if self.active else part(x)

    def forward(self, x):
        return self.segment(self.head, self.segment(self.body, torch.tanh(self.stem(x))))


@pytest.mark.parametrize("last", [[], [nn.Tanh()], [nn.Softmax(1)]], ids=["linear", "tanh", "softmax"])
def test_checkpointing_that_is_not_reentrant(last):
    model, x = Checkpointed(last).double(), draws(BATCH, 4)
    model.active = False
    expected = loop(model, squared, x)
    model.active = True
    norms, covered, skipped = shown(ride(model, squared, x))
    assert len(covered) == 10
    assert skipped == {}
    torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0)


def test_a_checkpoint_around_the_whole_model():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2), nn.Sigmoid()).double()
    x = draws(BATCH, 4)
    expected = loop(model, squared, x)

    def loss_fn(model, x):
        return checkpoint(model, x, use_reentrant=False).square().sum()

    norms, covered, _ = shown(ride(model, loss_fn, x))
    assert len(covered) == 4
    torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0)


def test_reentrant_checkpointing_is_refused():
    tape = ride(Checkpointed([], reentrant=True).double(), squared, draws(BATCH, 4))
    message = (
        r"module '\S+' ran without gradients: reentrant checkpointing hides its graph \(use_reentrant=False"
    )
    with pytest.raises(UnsupportedError, match=message):
        tape.result()


# -- what it refuses -------------------------------------------------------------------------------


def test_batch_norm_in_train_mode_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert refusal(model) == ("module '1' (BatchNorm1d) is in train mode and couples the examples of a batch")
    assert refusal(model.eval()) is None


def test_batch_norm_without_running_statistics_is_refused_in_any_mode():
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)).eval()
    assert refusal(model).startswith("module '0' (BatchNorm2d) is in train mode and couples")


def test_instance_and_group_norm_are_not_refused():
    assert refusal(nn.Sequential(nn.InstanceNorm1d(2), nn.GroupNorm(1, 2))) is None


def test_nothing_seen_is_refused_with_the_reason():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tape = RideAlong(model, 3)
    functional = F.linear(torch.ones(3, 2), model[0].weight)  # the modules are never called
    functional.sum().backward()
    tape.detach()
    message = (
        r"none of the model's layers was called inside monitor.micro_batch \(the forward pass was outside "
        r"it, or does not call them\). Put the forward pass inside"
    )
    with pytest.raises(UnsupportedError, match=message):
        tape.result()


def test_no_backward_pass_is_no_sample():
    model = nn.Linear(2, 2)
    tape = RideAlong(model, 3)
    model(torch.ones(3, 2))
    tape.detach()
    with pytest.raises(SampleSkippedError, match=r"no backward pass was made inside monitor.micro_batch"):
        tape.result()


def twice_through_one_graph(model, x):
    loss = squared(model, x)
    loss.backward(retain_graph=True)
    loss.backward()


def two_graphs(model, x):
    squared(model, x).backward()
    (0.5 * model(x).sum()).backward()


def one_pass_over_a_part_of_two_calls(model, x):
    first = squared(model, x)
    first.backward(retain_graph=True)
    (first + model(x).sum()).backward()


TOTALS = {
    twice_through_one_graph: lambda model, x: 2 * squared(model, x),
    two_graphs: lambda model, x: squared(model, x) + 0.5 * model(x).sum(),
    one_pass_over_a_part_of_two_calls: lambda model, x: 2 * squared(model, x) + model(x).sum(),
}


@pytest.mark.parametrize("passes", TOTALS)
def test_several_backward_passes_add_up(passes):
    """The gradients of all passes add up, and their norms do not: so what they show is held."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = draws(BATCH, 4)
    tape = RideAlong(model, BATCH)
    passes(model, x)
    tape.detach()
    with pytest.raises(SampleSkippedError, match=r"the gradient came in several backward passes. From the"):
        tape.result()
    assert tape.came_again
    tape = RideAlong(model, BATCH, several=True)
    passes(model, x)
    tape.detach()
    norms, _, skipped = shown(tape)
    assert skipped == {}
    torch.testing.assert_close(norms, loop(model, TOTALS[passes], x), rtol=1e-10, atol=0)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_that_is_only_asked_for_does_not_count(create_graph):
    """``torch.autograd.grad`` adds nothing to ``.grad``."""
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double(), draws(BATCH, 4)
    hooks = ParameterHooks(dict(model.named_parameters()), Directions())
    hooks.attach(BATCH)
    tape = RideAlong(model, BATCH)
    loss = squared(model, x)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, create_graph=create_graph)
    loss.backward()
    tape.detach()
    hooks.detach()
    [received] = hooks.micro_batches
    assert len(received.passes) == 1
    sq_norms, _ = tape.result(received.passes)
    norms = torch.stack(list(sq_norms.values())).sum(0)
    torch.testing.assert_close(norms, loop(model, squared, x), rtol=1e-10, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(received.norms[name][0], p.grad.norm(), rtol=1e-10, atol=0)


# -- what it leaves out, by name -------------------------------------------------------------------


def left_out(model, batch, loss_fn=squared):
    norms, covered, skipped = shown(ride(model, loss_fn, batch))
    assert covered.isdisjoint(skipped)
    assert covered | set(skipped) == {name for name, p in model.named_parameters() if p.requires_grad}
    return norms, covered, skipped


def test_tied_weights_are_left_out_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model[2].weight = model[0].weight
    x = draws(BATCH, 4)
    norms, covered, skipped = left_out(model, x)
    assert skipped == {"0.weight": "it is tied to another module"}
    assert covered == {"0.bias", "2.bias", "3.weight", "3.bias"}
    model[0].weight.requires_grad_(False)
    torch.testing.assert_close(norms, loop(model, squared, x), rtol=1e-10, atol=0)


def test_an_attention_layer_is_not_covered():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.attend(x, x, x)[0])

    model, x = Net().double(), draws(BATCH, 3, 4)
    norms, covered, skipped = left_out(model, x)
    assert covered == {"head.weight", "head.bias"}
    assert set(skipped) == {
        f"attend.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    assert set(skipped.values()) == {"its module has no rule, or was not called"}
    model.attend.requires_grad_(False)
    torch.testing.assert_close(norms, loop(model, squared, x), rtol=1e-10, atol=0)


def test_a_subclass_with_a_forward_of_its_own_is_not_served_by_its_parent():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 2)).double()
    _, covered, skipped = left_out(model, draws(BATCH, 4))
    assert covered == {"1.weight", "1.bias"}
    assert set(skipped) == {"0.weight", "0.bias"}


def test_a_branch_that_is_not_called_is_left_out():
    model = nn.Sequential(nn.Linear(4, 2))
    model.spare = nn.Linear(4, 2)
    _, covered, skipped = left_out(model.double(), draws(BATCH, 4), lambda model, x: squared(model[0], x))
    assert covered == {"0.weight", "0.bias"}
    assert skipped == dict.fromkeys(
        ("spare.weight", "spare.bias"), "its module has no rule, or was not called"
    )


def test_an_input_without_the_examples_in_front_is_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.time_first(x.transpose(0, 1)).transpose(0, 1))

    _, covered, skipped = left_out(Net().double(), draws(BATCH, 3, 4))
    assert covered == {"head.weight", "head.bias"}
    reason = "its input [3, 5, 4] does not begin with the 5 examples"
    assert skipped == dict.fromkeys(("time_first.weight", "time_first.bias"), reason)


def test_positions_without_a_batch_are_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x + self.places(torch.arange(5)))

    _, covered, skipped = left_out(Net().double(), draws(BATCH, 5, 4))
    assert covered == {"head.weight", "head.bias"}
    assert skipped == {"places.weight": "one-dimensional indices may be positions rather than examples"}


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(5, 4, max_norm=1.0), "an Embedding with max_norm or scale_grad_by_freq has no"),
        (nn.Embedding(5, 4, scale_grad_by_freq=True), "an Embedding with max_norm or scale_grad_by_freq"),
        (nn.Embedding(5, 4, sparse=True), "an Embedding with sparse gradients has no rule"),
        (
            nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
            "an InstanceNorm with running statistics has no rule",
        ),
        (nn.Conv1d(BATCH, BATCH, 2), "an unbatched convolution has no rule"),
    ],
    ids=["max_norm", "scale_grad_by_freq", "sparse", "instance norm", "unbatched"],
)
def test_settings_without_a_rule_are_left_out(module, reason):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.special, self.head = module, nn.Linear(4, 2)

        def forward(self, x):
            if isinstance(self.special, nn.Embedding):
                return self.head(x + self.special(torch.ones(BATCH, 1, dtype=torch.int64)))
            if isinstance(self.special, nn.Conv1d):
                return self.head(x[:, 0]) + self.special(x[:, 0]).sum()
            return self.head(self.special(x.mT).mT)

    _, covered, skipped = left_out(Net().double(), draws(BATCH, 3, 4))
    assert covered == {"head.weight", "head.bias"}
    assert set(skipped) == {f"special.{name}" for name, _ in module.named_parameters()}
    assert all(each.startswith(reason) for each in skipped.values())


def test_an_input_changed_in_place_is_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.first, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.first.weight.requires_grad_(False)  # or autograd itself would complain

        def forward(self, ids):
            embedded = self.table(ids)
            out = self.first(embedded)
            embedded.mul_(2)
            return self.head(torch.tanh(out + embedded))

    torch.manual_seed(0)
    model, ids = Net().double(), torch.randint(6, (BATCH, 3))
    norms, covered, skipped = left_out(model, ids)
    assert covered == {"table.weight", "head.weight", "head.bias"}
    assert skipped == {"first.bias": "the input of 'first' was changed in place after its forward"}
    model.first.bias.requires_grad_(False)
    torch.testing.assert_close(norms, loop(model, squared, ids), rtol=1e-10, atol=0)


def test_coverage_is_counted_in_parameters():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.PReLU(8), nn.Linear(8, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = MemoryRecorder()
    x = torch.randn(BATCH, 4)
    with Monitor(
        model, optimizer, [GradientNoiseScale(schedule=1)], recorders=[memory], on_error="raise"
    ) as monitor:
        with monitor.micro_batch(x):
            model(x).square().mean().backward()
        monitor.before_step()
        optimizer.step()
    note = memory.latest()["dynamics/noise/trace"].note
    assert "over 83 % of parameters; skipped: 1.weight" in note  # 40 of 48


# -- errors stay out of the user's pass ------------------------------------------------------------


def test_an_error_in_a_rule_is_raised_by_result_and_not_by_backward(monkeypatch):
    def broken(module, a):
        raise ZeroDivisionError("broken rule")

    monkeypatch.setitem(RULES, nn.Linear, broken)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    tape = RideAlong(model, BATCH)
    squared(model, torch.randn(BATCH, 4)).backward()
    tape.detach()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ZeroDivisionError, match="broken rule"):
        tape.result()


def test_detaching_removes_every_hook():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    tape = RideAlong(model, BATCH)
    assert standing(model) > 0
    tape.detach()
    assert standing(model) == 0
    tape.detach()


def test_time_in_hooks_is_counted():
    model = nn.Linear(4, 3)
    tape = RideAlong(model, BATCH)
    assert tape.seconds == 0.0
    squared(model, torch.randn(BATCH, 4)).backward()
    assert tape.seconds > 0.0


# -- what does not add up --------------------------------------------------------------------------

ADDED_TO = {
    "language model, functional head, parameter of positions": {"embed.weight"},
    "language model, functional head, table of positions": {"embed.weight"},
    "weight used again": {"layer.weight"},
}


def compared(model, loss_fn, batch, size=BATCH):
    """Parameters whose gradient is more than the sum over the examples, and those that could be judged."""
    directions = Directions()
    hooks = ParameterHooks({n: p for n, p in model.named_parameters() if p.requires_grad}, directions)
    hooks.attach(size)
    tape = RideAlong(model, size, directions=directions)
    try:
        loss_fn(model, batch).backward()
    finally:
        tape.detach()
        hooks.detach()
    with contextlib.suppress(UnsupportedError, SampleSkippedError):
        tape.result()
    names, apart, judged = foreign(tape.expected, hooks.micro_batches[0])
    return (
        {name for name, is_apart in zip(names, apart.tolist(), strict=True) if is_apart},
        {name for name, says_something in zip(names, judged.tolist(), strict=True) if says_something},
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_comparison_knows_the_models_of_the_zoo(kind):
    """It leaves out what is used outside its module's calls, and nothing else."""
    found = {}
    judged = 0
    for name, entry in zoo.ENTRIES.items():
        model, x = zoo.build(name, kind), zoo.batch(name, dtype=kind)

        def loss_fn(model, x, forward=entry.forward):
            return zoo.call(model, x, forward).square().sum()

        if refusal(model) is None:
            found[name], says_something = compared(model, loss_fn, x, zoo.size(x))
            judged += len(says_something)
    assert {name: names for name, names in found.items() if names} == ADDED_TO
    assert judged > 400


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_the_comparison_allows_for_the_rounding_of_half_precision(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 16, 3), nn.GELU(), nn.Flatten(), nn.Linear(96, 64), nn.LayerNorm(64))
    x = draws(64, 3, 8).float()

    def loss_fn(model, x):
        with torch.autocast("cpu", kind):
            return 1024 * model(x).square().mean()

    assert compared(model, loss_fn, x, 64)[0] == set()
    whole = model.to(kind)
    assert compared(whole, lambda model, x: model(x).square().mean(), x.to(kind), 64)[0] == set()


def test_a_gradient_that_cancels_is_not_taken_for_a_foreign_one():
    """Where examples, or positions of one example, all but cancel, rounding is what is left."""
    model = nn.Linear(4, 3)
    x = draws(BATCH, 6, 4).float()
    both = torch.cat([x, x.flip(1)], 1) * 1e4
    sign = torch.tensor([1.0] * 6 + [-1.0] * 6)[:, None]
    apart = compared(model, lambda model, x: (model(x) * sign).sum() + 1e-6 * model(x).sum(), both)
    assert apart == (set(), {"weight", "bias"})


def penalised(strength):
    def loss_fn(model, x):
        return squared(model, x) + strength * model[0].weight.square().sum()

    return loss_fn


def test_a_penalty_is_noticed():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    apart = compared(model, penalised(1.0), draws(BATCH, 4))
    assert apart == ({"0.weight"}, {"0.weight", "0.bias", "2.weight", "2.bias"})


def test_a_hook_that_changes_a_gradient_is_noticed():
    model = nn.Linear(4, 2).double()
    handle = model.weight.register_hook(lambda grad: 0 * grad)
    assert compared(model, squared, draws(BATCH, 4))[0] == {"weight"}
    handle.remove()
    assert compared(model, squared, draws(BATCH, 4))[0] == set()


def test_gradients_that_say_nothing_are_not_judged():
    model = nn.Sequential(nn.Linear(4, 2)).double()
    for factor in (0.0, torch.nan):
        apart = compared(model, lambda model, x, factor=factor: squared(model, x) * factor, draws(BATCH, 4))
        assert apart == (set(), set())


def test_the_comparison_leaves_the_random_state_and_no_hooks():
    model = nn.Linear(4, 2).double()
    before = torch.get_rng_state()
    compared(model, squared, draws(BATCH, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert standing(model) == 0


def test_weighted_norms_where_the_weight_is_known():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double(), draws(BATCH, 4)
    weights = {model[0].weight: draws(6, 4, seed=1).square(), model[2].bias: draws(2, seed=2).square()}
    tape = RideAlong(model, BATCH, metric=weights.get)
    squared(model, x).backward()
    tape.detach()
    assert set(tape.weighted) == {"0.weight", "2.bias"}
    for name, parameter in (("0.weight", model[0].weight), ("2.bias", model[2].bias)):
        for n in range(BATCH):
            [grad] = torch.autograd.grad(squared(model, x[n : n + 1]), [parameter])
            expected = (weights[parameter] * grad.square()).sum()
            torch.testing.assert_close(tape.weighted[name][n], expected, rtol=1e-10, atol=0)
