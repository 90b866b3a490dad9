"""The tangent kernel of many kinds of models against one backward pass per example and output."""

import copy
import gc
import random
import re
import weakref
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradiometer import empirical_ntk, layer_ntks
from gradiometer.errors import InputError, UnsupportedError

from ..zoo import (
    ENTRIES,
    HARD,
    HOOKS,
    Entry,
    batch,
    build,
    build_entry,
    call,
    cast,
    disturb,
    draws,
    error,
    headed,
    jacobian,
    kernel,
    mapped,
    normal,
    owners,
    pick,
)

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

MODES = ("trace", "diagonal", "full")
OTHER = 3  # examples in the second set
SOME = ("mlp", "conv net", "tied layers", "lstm", "language model, shared head, table of positions")


@cache
def reference(name, other=False, dtype=torch.float64):
    """Jacobian on the first or the second set, in float64 with weights and inputs of another precision."""
    x = batch(name, OTHER, 7, dtype) if other else batch(name, dtype=dtype)
    return jacobian(build(name, dtype).double(), cast(x, torch.float64), ENTRIES[name].forward)


def measure(name, x=None, x2=None, *, dtype=torch.float64, layers=False, **arguments):
    model, x = build(name, dtype), batch(name, dtype=dtype) if x is None else x
    kernel = layer_ntks if layers else empirical_ntk
    return kernel(model, x, x2, forward=ENTRIES[name].forward, **arguments)


# -- every model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENTRIES)
def test_kernel_of_one_set(name):
    model, x = build(name), batch(name)
    for outputs in MODES:
        found = empirical_ntk(model, x, outputs=outputs, forward=ENTRIES[name].forward)
        assert found.dtype == torch.float64
        assert not found.requires_grad
        assert error(found, kernel(reference(name), outputs=outputs)) < 1e-10, outputs


@pytest.mark.parametrize("name", ENTRIES)
def test_kernel_between_two_sets(name):
    model, x, x2 = build(name), batch(name), batch(name, OTHER, 7)
    for outputs in MODES:
        expected = kernel(reference(name), reference(name, other=True), outputs)
        assert expected.shape[:2] == (5, OTHER)
        found = empirical_ntk(model, x, x2, outputs=outputs, forward=ENTRIES[name].forward)
        assert error(found, expected) < 1e-10, outputs


@pytest.mark.parametrize("name", ENTRIES)
def test_single_precision(name):
    found = measure(name, dtype=torch.float32, outputs="full")
    assert found.dtype == torch.float64
    assert error(found, kernel(reference(name, dtype=torch.float32), outputs="full")) < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_single_precision_between_two_sets(name):
    x2 = batch(name, OTHER, 7, torch.float32)
    j1, j2 = reference(name, dtype=torch.float32), reference(name, True, torch.float32)
    assert error(measure(name, x2=x2, dtype=torch.float32), kernel(j1, j2)) < 1e-5


@pytest.mark.parametrize("name", ENTRIES)
def test_layers_add_up_and_each_is_that_of_its_own_parameters(name):
    found = measure(name, layers=True)
    assert isinstance(found, dict)
    expected = {}
    for path, names in owners(build(name)).items():
        expected[path] = kernel({each: reference(name)[each] for each in names})
    total = kernel(reference(name))
    assert error(sum(found.values()), total) < 1e-10
    assert set(found) <= set(expected)
    for path, each in expected.items():
        if each.norm() == 0:  # never used: absent or zero
            assert path not in found or found[path].norm() == 0
        else:
            assert (found[path] - each).norm() < 1e-10 * each.norm() + 1e-14 * total.norm(), path


def some_weights(model):
    """A number, a tensor, zero, and nothing for one parameter after the other."""
    weights = {}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for i, (name, p) in enumerate(trained):
        if i % 4 == 0:
            weights[name] = 0.3 + i
        elif i % 4 == 1:
            weights[name] = draws(*p.shape, seed=i).square()
        elif i % 4 == 2:
            weights[name] = 0
    return weights


@pytest.mark.parametrize("name", ENTRIES)
def test_weights(name):
    weights = some_weights(build(name))
    found = measure(name, weights=weights, outputs="full")
    assert error(found, kernel(reference(name), outputs="full", weights=weights)) < 1e-10


@pytest.mark.parametrize("name", ENTRIES)
def test_chunks_change_nothing(name):
    one, other = reference(name), {each: rows[:1] for each, rows in reference(name, other=True).items()}
    assert error(measure(name, outputs="full", chunk_size=3), kernel(one, outputs="full")) < 1e-10
    x2 = pick(batch(name, OTHER, 7), slice(0, 1))
    assert error(measure(name, x2=x2, chunk_size=1), kernel(one, other)) < 1e-10


@pytest.mark.parametrize("outputs", MODES)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["mlp", "tied layers"])
def test_any_size_of_chunks(name, chunk_size, outputs):
    expected = kernel(reference(name), outputs=outputs)
    assert error(measure(name, outputs=outputs, chunk_size=chunk_size), expected) < 1e-10


@pytest.mark.parametrize("name", ENTRIES)
def test_one_example(name):
    one = {each: rows[:1] for each, rows in reference(name).items()}
    x = pick(batch(name), slice(0, 1))
    assert error(measure(name, x, outputs="full"), kernel(one, outputs="full")) < 1e-10


# what a model in train mode may be told
TRAIN = pytest.mark.filterwarnings("ignore:the model is in train mode")


@TRAIN
@pytest.mark.parametrize(
    "name", ["conv net", "residual net", "batch norm 1d", "folded", "encoder layer", "cross attention"]
)
def test_a_model_in_train_mode_is_measured_in_evaluation_mode(name):
    model = build(name).train()
    found = empirical_ntk(model, batch(name), outputs="full", chunk_size=2)
    assert error(found, kernel(reference(name), outputs="full")) < 1e-10
    assert all(module.training for module in model.modules())


# -- what comes together ---------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", MODES)
@pytest.mark.parametrize("name", SOME)
def test_layers_weights_two_sets_and_chunks_together(name, outputs):
    weights = some_weights(build(name))
    x2 = batch(name, OTHER, 7)
    found = measure(name, x2=x2, outputs=outputs, layers=True, weights=weights, chunk_size=2)
    j1, j2 = reference(name), reference(name, other=True)
    assert error(sum(found.values()), kernel(j1, j2, outputs, weights)) < 1e-10
    for path, names in owners(build(name)).items():
        if all(isinstance(weights.get(each), int) for each in names):
            continue
        mine = [{each: j[each] for each in names} for j in (j1, j2)]
        assert error(found[path], kernel(*mine, outputs, weights)) < 1e-10, path


@pytest.mark.parametrize("name", SOME)
def test_second_set_equal_to_the_first(name):
    x = batch(name)
    clone = mapped(torch.clone, x)
    symmetric = measure(name, x, outputs="full")
    assert error(measure(name, x, clone, outputs="full"), symmetric) < 1e-12
    assert error(measure(name, x, x, outputs="full"), symmetric) < 1e-12
    x2 = batch(name, OTHER, 7)
    swapped = measure(name, x2, x, outputs="full").permute(1, 0, 3, 2)
    assert error(measure(name, x, x2, outputs="full"), swapped) < 1e-12


@pytest.mark.parametrize("name", SOME)
def test_symmetric_and_positive(name):
    found = measure(name, outputs="full", chunk_size=2)
    n, _, o, _ = found.shape
    flat = found.permute(0, 2, 1, 3).reshape(n * o, n * o)
    assert (flat - flat.mT).norm() <= 1e-12 * flat.norm()
    assert torch.linalg.eigvalsh((flat + flat.mT) / 2)[0] > -1e-12 * flat.norm()


def needed(name, **arguments):
    """The number of bytes that the refusal of too little memory asks for."""
    with pytest.raises(InputError) as caught:
        measure(name, max_memory=1, **arguments)
    assert "max_memory" in str(caught.value)
    return max(
        int(each.replace(",", "").replace("_", "")) for each in re.findall(r"\d[\d,_]*", str(caught.value))
    )


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        *((name, "trace") for name in (*SOME, "residual net", "vision transformer")),
        ("mlp", "diagonal"),
        ("mlp", "full"),
        ("conv net", "full"),
    ],
)
def test_little_memory_changes_nothing(name, outputs):
    least = needed(name, outputs=outputs)
    assert least > 1
    for factor in (1.0, 1.7, 4.0):
        found = measure(name, outputs=outputs, max_memory=int(factor * least))
        assert error(found, kernel(reference(name), outputs=outputs)) < 1e-10
    with pytest.raises(InputError, match=r"max_memory"):
        measure(name, outputs=outputs, max_memory=least - 1)


@pytest.mark.parametrize("name", ["mlp", "tied layers", "lstm"])
def test_little_memory_with_two_sets_and_layers(name):
    x2 = batch(name, OTHER, 7)
    least = needed(name, x2=x2, layers=True)
    for factor in (1, 3):
        found = measure(name, x2=x2, layers=True, max_memory=factor * least)
        assert error(sum(found.values()), kernel(reference(name), reference(name, other=True))) < 1e-10


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and alive at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.alive = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {
            id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)
        }
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and id(each.untyped_storage()) not in self.alive | given:
                storage = each.untyped_storage()
                self.alive.add(id(storage))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.freed, id(storage), storage.nbytes())
        return out

    def freed(self, key, size):
        self.alive.discard(key)
        self.now -= size


@pytest.mark.slow
@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize(
    "entry",
    [
        Entry(
            lambda: headed(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), shape=(3, 8, 8)),
            normal(3, 8, 8),
        ),
        Entry(
            lambda: headed(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), shape=(32, 16)), normal(32, 16)
        ),
    ],
    ids=["convolution", "sequence"],
)
def test_memory_stays_below_the_limit(entry, outputs):
    model, x = build_entry(entry), entry.inputs(16, torch.Generator().manual_seed(0))
    with Peak() as without:
        expected = empirical_ntk(model, x, outputs=outputs)
    limit = without.most // 2
    with Peak() as within:
        found = empirical_ntk(model, x, outputs=outputs, max_memory=limit)
    assert error(found, expected) < 1e-10
    assert 0 < within.most <= limit


def test_any_forward_selects_the_outputs():
    full = kernel(reference("mlp"), outputs="full")
    found = empirical_ntk(build("mlp"), batch("mlp"), forward=lambda model, x: model(x)[:, 1:2])
    assert error(found, full[:, :, 1, 1]) < 1e-10
    found = empirical_ntk(build("mlp"), batch("mlp"), forward=lambda model, x: model(x).sum(1, keepdim=True))
    assert error(found, full.sum((2, 3))) < 1e-10


def test_parameters_of_a_part_only():
    """The forward may use a part of the model; the others count nothing."""
    model, x = build("mlp"), batch("mlp")

    def lower(model, x):
        return model[2](model[1](model[0](x)))

    assert error(empirical_ntk(model, x, forward=lower), kernel(jacobian(model, x, lower))) < 1e-10


def test_more_parameters_of_a_wide_model_than_examples():
    """Layers wide enough, and sequences long enough, for every way to contract to be the cheaper one."""
    for width, length in ((40, 2), (3, 40)):
        make = lambda width=width: nn.Sequential(  # noqa: E731
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 2),
            nn.AdaptiveAvgPool2d((1, 2)),
            nn.Flatten(),
        )
        entry = Entry(make, normal(length, width))
        model, x = build_entry(entry), entry.inputs(4, torch.Generator().manual_seed(0))
        expected = kernel(jacobian(model, x), outputs="full")
        assert error(empirical_ntk(model, x, outputs="full"), expected) < 1e-10
        assert error(empirical_ntk(model, x, x[:2].clone()), kernel(jacobian(model, x))[:, :2]) < 1e-10


# -- never wrong without a word --------------------------------------------------------------------


def hard(name, count=5, seed=0):
    return HARD[name].inputs(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", HARD)
def test_exact_or_refused(name):
    model, x, x2 = build_entry(HARD[name]), hard(name), hard(name, 3, 1)
    j1, j2 = jacobian(model, x), jacobian(model, x2)
    for other, expected in ((None, kernel(j1, outputs="full")), (x2, kernel(j1, j2, "full"))):
        try:
            found = empirical_ntk(model, x, other, outputs="full")
        except UnsupportedError:
            continue
        assert error(found, expected) < 1e-10


@pytest.mark.parametrize("name", HARD)
def test_single_examples_where_a_refusal_advises_them(name):
    model, x = build_entry(HARD[name]), hard(name)
    try:
        empirical_ntk(model, x)
    except UnsupportedError as refusal:
        advised = "chunk_size=1" in str(refusal)
    else:
        advised = False
    try:
        found = empirical_ntk(model, x, chunk_size=1)
    except UnsupportedError:
        assert not advised
    else:
        assert error(found, kernel(jacobian(model, x))) < 1e-10


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "conv net"])
def test_half_precision(name, kind):
    """Against the same rounded weights in double precision, to the rounding of the passes themselves."""
    model, x = build(name).to(kind), batch(name).to(kind)
    expected = kernel(jacobian(copy.deepcopy(model).double(), x.double()), outputs="full")
    found = empirical_ntk(model, x, outputs="full")
    assert found.dtype == torch.float64
    assert error(found, expected) < 8 * torch.finfo(kind).eps


def test_parameters_of_several_precisions():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3).double()
            self.scale = nn.Parameter(torch.tensor([0.5, 2.0, 1.5], dtype=torch.bfloat16))

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)).double()) * self.scale.double()

    model, x = Mixed(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    rows = {name: row.double() for name, row in jacobian(model, x).items()}
    expected = kernel(rows, outputs="full")
    # gradients of the bfloat16 parameter are rounded to it, here as in any training step
    assert error(empirical_ntk(model, x, outputs="full"), expected) < 1e-2
    model.scale.requires_grad_(False)
    expected = kernel({name: row for name, row in rows.items() if name != "scale"}, outputs="full")
    assert error(empirical_ntk(model, x, outputs="full"), expected) < 1e-6


def test_a_model_that_remembers_is_the_same_for_each_example():
    """Its one parameter is reached example by example, and no example sees what the one before left."""

    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(4, 3)), torch.zeros(3)

        def forward(self, x):
            out = torch.stack([row @ self.weight for row in x])
            out = out * (1 + self.last.sum())
            self.last = out.detach()[0]
            return out

    torch.manual_seed(0)
    model, x = Remembering().double(), torch.randn(5, 4).double()
    expected = torch.einsum("na,ma->nm", x, x)
    torch.testing.assert_close(empirical_ntk(model, x), expected, rtol=1e-10, atol=1e-10)


# -- nothing is left behind ------------------------------------------------------------------------


def photograph(model):
    """Everything that a measurement must leave as it is, by identity where that is possible."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "parameters": {
            name: (id(p), type(p), p.requires_grad, p.is_leaf, id(p.grad), id(p._backward_hooks))
            for name, p in parameters.items()
        },
        "buffers": {name: id(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "modules": {
            name: (id(module), type(module), module.training, sorted(vars(module)))
            for name, module in model.named_modules(remove_duplicate=False)
        },
        "hooks": {
            name: [list(getattr(module, each)) for each in HOOKS] for name, module in model.named_modules()
        },
        "global": [
            len(v)
            for k, v in sorted(vars(nn.modules.module).items())
            if k.startswith("_global_") and isinstance(v, dict)
        ],
        "post": {name: id(p._post_accumulate_grad_hooks) for name, p in parameters.items()},
        "modes": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()),
    }


def states():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002


@TRAIN
@pytest.mark.parametrize("name", ENTRIES)
def test_the_model_is_as_it_was_and_still_trains(name):
    model, x = build(name).train(), batch(name)
    next(iter(model.children()), model).eval()  # modes are restored one by one
    for i, p in enumerate(model.parameters()):
        p.grad = draws(*p.shape, seed=i) if i % 2 else None
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    before, values = photograph(model), {k: v.clone() for k, v in model.state_dict().items()}
    inputs, random_states = mapped(torch.clone, x), states()
    layer_ntks(model, x, outputs="full", forward=ENTRIES[name].forward)
    assert photograph(model) == before
    after = model.state_dict()
    assert after.keys() == values.keys()
    assert all(torch.equal(after[k], v) for k, v in values.items())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is None or torch.equal(p.grad, gradient)
    for a, b in zip(states(), random_states, strict=True):
        assert np.array_equal(a, b) if not isinstance(a, tuple) else a == b
    same = []
    mapped(lambda each: same.append(each), x)
    kept = []
    mapped(lambda each: kept.append(each), inputs)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(same, kept, strict=True))
    model.eval()
    model.zero_grad()
    call(model, x, ENTRIES[name].forward).square().sum().backward()
    used = {each for each, rows in reference(name).items() if rows.norm() > 0}
    trained = {each for each, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    assert trained == used


@pytest.mark.parametrize("name", [*SOME, "residual net", "checkpoint", "weight norm"])
def test_a_graph_that_waits_for_its_backward_pass_is_not_disturbed(name):
    model, x = build(name).eval(), batch(name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = call(model, x, ENTRIES[name].forward)
    expected = torch.autograd.grad(out.sin().sum(), parameters, retain_graph=True)
    empirical_ntk(model, x, forward=ENTRIES[name].forward)
    found = torch.autograd.grad(out.sin().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Counting(nn.Module):
    """Writes to a buffer and to itself in its forward, and may fail there."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.fails = None, False

    def forward(self, x):
        self.calls += 1
        self.seen = self.norm(self.layer(x))
        if self.fails:
            raise ValueError("broken on purpose")
        return torch.tanh(self.seen)


@TRAIN
def test_what_a_forward_writes_is_undone():
    model, x = disturb(Counting().double()).train(), draws(5, 4)
    model(x).sum().backward()
    before, seen = photograph(model), model.seen
    statistics = model.norm.running_mean.clone()
    expected = kernel(jacobian(model, x))
    model.calls.fill_(1)
    model.seen = seen
    assert error(empirical_ntk(model, x), expected) < 1e-10
    assert photograph(model) == before
    assert model.calls == 1
    assert model.seen is seen
    assert torch.equal(model.norm.running_mean, statistics)


@TRAIN
def test_a_failure_in_the_model_leaves_nothing_behind():
    model, x = disturb(Counting().double()).train(), draws(5, 4)
    model.fails = True
    before, random_state = photograph(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="broken on purpose"):
        empirical_ntk(model, x)
    assert photograph(model) == before
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    model.fails = False
    assert error(empirical_ntk(model, x), kernel(jacobian(model, x))) < 1e-10


def test_hooks_of_the_user_stay_and_an_optimizer_in_the_backward_pass_does_not_step():
    model, x, seen = build("mlp"), batch("mlp"), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))

    def step(p):
        raise AssertionError("a gradient was accumulated")

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = photograph(model)
    assert error(empirical_ntk(model, x), kernel(reference("mlp"))) < 1e-10
    assert photograph(model) == before
    assert seen
    with pytest.raises(AssertionError, match="was accumulated"):
        model(x).sum().backward()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes_around_the_call_do_not_matter(around):
    model, x = build("tied layers"), batch("tied layers")
    with around():
        found = empirical_ntk(model, x)
        assert torch.is_grad_enabled() == (around is torch.enable_grad)
    assert error(found, kernel(reference("tied layers"))) < 1e-10


def test_autocast_around_the_call_does_not_matter():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measure("mlp", dtype=torch.float32)
    assert error(found, kernel(reference("mlp", dtype=torch.float32))) < 1e-5


def test_inputs_that_need_gradients_get_none():
    model, x = build("mlp"), batch("mlp").requires_grad_()
    assert error(empirical_ntk(model, x), kernel(reference("mlp"))) < 1e-10
    assert x.grad is None
    assert x.requires_grad
    upstream = (2 * x).sin()  # on a graph of its own
    expected = kernel(jacobian(model, upstream.detach()))
    assert error(empirical_ntk(model, upstream), expected) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "language model, shared head, table of positions"])
def test_the_model_is_freed(name):
    model = build(name)
    empirical_ntk(model, batch(name), forward=ENTRIES[name].forward)
    alive = weakref.ref(model)
    weights = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert alive() is None
    assert all(each() is None for each in weights)


# -- random stacks ---------------------------------------------------------------------------------


class Turned(nn.Module):
    """A layer that works on ``[N, T, 4]``."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.mT).mT


class Along(nn.Module):
    """A layer that works on ``[T, N, 4]`` or on ``[N T, 4]``."""

    def __init__(self, fold):
        super().__init__()
        self.layer, self.fold = nn.Linear(4, 4), fold

    def forward(self, x):
        if self.fold:
            return self.layer(x.mT.reshape(-1, 4)).view(len(x), -1, 4).mT
        return self.layer(x.permute(2, 0, 1)).permute(1, 2, 0)


class Self(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0]


class First(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(4, 4, batch_first=True)

    def forward(self, x):
        return self.cells(x)[0]


class Plus(nn.Module):
    """A parameter without an axis of examples, used in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.p, self.way = nn.Parameter(torch.zeros(4)), way

    def forward(self, x):
        p = self.p[:, None]
        if self.way == "scale":
            return x * (1 + p)
        if self.way == "shift in place":
            return x.clone().add_(p)
        return torch.cat([p.expand(len(x), 4, 1), x], 2)


class Around(nn.Module):
    """A residual connection."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x)


STACK = {
    "linear": lambda: Turned(nn.Linear(4, 4)),
    "sequence first": lambda: Along(fold=False),
    "folded": lambda: Along(fold=True),
    "layer norm": lambda: Turned(nn.LayerNorm(4, eps=0.1)),
    "rms norm": lambda: Turned(nn.RMSNorm(4, eps=0.1)),
    "conv": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "dilated": lambda: nn.Conv1d(4, 4, 3, padding="same", dilation=2),
    "grouped": lambda: nn.Conv1d(4, 4, 2, padding=1, stride=2, groups=2),
    "circular": lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose1d(4, 4, 3, padding=1, groups=2),
    "group norm": lambda: nn.GroupNorm(2, 4, eps=0.1),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True, eps=0.1),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "prelu": lambda: nn.PReLU(4),
    "conv and relu": lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(inplace=True)),
    "residual": lambda: Around(nn.Sequential(nn.Conv1d(4, 4, 1), nn.Tanh())),
    "attention": lambda: Turned(Self()),
    "gru": lambda: Turned(First(nn.GRU)),
    "scale": lambda: Plus("scale"),
    "shift": lambda: Plus("shift in place"),
    "token": lambda: Plus("token"),
    "tanh": nn.Tanh,
    "dropout": lambda: nn.Dropout(0.5),
    "pool": lambda: nn.AvgPool1d(3, stride=1, padding=1),
}


class Stack(nn.Module):
    """Layers on ``[N, 4, T]``, each new or one of those before; some frozen."""

    def __init__(self, steps, frozen, tied):
        super().__init__()
        made = []
        for kind, again in steps:
            same = [layer for other, layer in made if other == kind]
            made.append((kind, same[0] if again and same else STACK[kind]()))
        self.layers = nn.ModuleList([layer for _, layer in made])
        self.stem, self.head = nn.Conv1d(4, 4, 1), nn.Linear(4, 2)
        if tied:
            self.other = nn.Linear(4, 2)
            self.other.weight = self.head.weight
        for i in frozen:
            if i < len(made):
                self.layers[i].requires_grad_(False)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        out = self.head(torch.tanh(x).mean(2))
        return out + self.other(x[:, :, 0]).tanh() if hasattr(self, "other") else out


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STACK)), st.booleans()), min_size=1, max_size=6),
    frozen=st.sets(st.integers(0, 5), max_size=2),
    tied=st.booleans(),
    count=st.integers(1, 5),
    length=st.integers(4, 6),
    other=st.sampled_from([None, 1, 3]),
    chunk_size=st.sampled_from([None, 1, 2, 4]),
    outputs=st.sampled_from(MODES),
)
def test_random_stacks(steps, frozen, tied, count, length, other, chunk_size, outputs):
    entry = Entry(lambda: Stack(steps, frozen, tied), normal(4, length))
    model = build_entry(entry)
    x = entry.inputs(count, torch.Generator().manual_seed(0))
    x2 = None if other is None else entry.inputs(other, torch.Generator().manual_seed(1))
    j1 = jacobian(model, x)
    j2 = None if other is None else jacobian(model, x2)
    found = layer_ntks(model, x, x2, outputs=outputs, chunk_size=chunk_size)
    assert error(sum(found.values()), kernel(j1, j2, outputs)) < 1e-9
    for path, names in owners(model).items():
        mine = [None if j is None else {each: j[each] for each in names} for j in (j1, j2)]
        expected = kernel(*mine, outputs)
        if expected.norm() > 0:
            assert (found[path] - expected).norm() < 1e-9 * expected.norm() + 1e-13 * sum(
                found.values()
            ).norm()


# -- the reference itself --------------------------------------------------------------------------


def test_the_reference_sees_that_every_parameter_is_used():
    """Only what is meant to be unused has no gradient, so that no entry tests nothing."""
    silent = {
        (name, each) for name in ENTRIES for each, rows in reference(name).items() if rows.abs().max() == 0
    }
    assert silent == {
        ("unused", "spare.weight"),
        ("unused", "spare.bias"),
        ("unused", "alone"),
        ("functions of parameters", "spare"),
    }


def test_the_reference_in_closed_form():
    x = draws(5, 4)
    model = nn.Linear(4, 2).double()
    rows = jacobian(model, x)
    assert error(kernel(rows), x @ x.mT + 1) < 1e-14
    expected = torch.einsum("ab,op->abop", x @ x.mT + 1, torch.eye(2, dtype=torch.float64))
    assert error(kernel(rows, outputs="full"), expected) < 1e-14
    weights = {"weight": torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2), "bias": 0.0}
    scaled = x @ torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64)) @ x.mT
    assert error(kernel(rows, weights=weights), scaled) < 1e-14


def test_the_table_of_models_names_every_layer_it_promises():
    kinds = {type(module) for name in ENTRIES for module in build(name).modules()}
    promised = {
        nn.Linear,
        nn.Bilinear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.GroupNorm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.PReLU,
        nn.Embedding,
        nn.EmbeddingBag,
        nn.MultiheadAttention,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
        nn.LSTM,
        nn.GRU,
        nn.RNN,
        nn.LSTMCell,
        nn.GRUCell,
    }
    assert promised <= kinds
