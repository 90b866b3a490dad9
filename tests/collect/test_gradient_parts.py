"""The noise scale from every source, through the engine: exact, and equal between sources."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import GradientNoiseScale, Mean, MemoryRecorder, Monitor
from gradiometer.collect.parameter_hooks import ParameterHooks
from gradiometer.errors import InputError, MeasurementWarning, SampleSkippedError, UnsupportedError
from gradiometer.optimizers import family_of
from gradiometer.stats.directions import Directions

from ..hooks import standing

P = 5


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted():
    """A model whose per-example gradients are its inputs."""
    return nn.Linear(P, 1, bias=False).double()


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(P, 6), *extra, nn.Tanh(), nn.Linear(6, 3)).double()


def mean_output(model, x):
    return model(x).mean()


def entropy(model, x):
    return F.cross_entropy(model(x), (x.sum(1) > 0).long())


def unknown(model, x):
    """The same loss in a form that its graph does not tell."""
    return entropy(model, x).exp().log()


def by_formula(means, sizes, weights=None):
    """Trace and squared gradient from part means, with nothing of the library."""
    means, b = means.double(), torch.as_tensor(sizes).double()
    w = torch.full_like(b, 1 / len(b)) if weights is None else torch.tensor(weights, dtype=torch.float64)
    parts, whole = (w * means.square().sum(1)).sum(), (w @ means).square().sum()
    trace = (parts - whole) / ((w / b).sum() - (w * w / b).sum())
    return trace.item(), (whole - trace * (w * w / b).sum()).item()


def gradient(model, loss, x, factors=None):
    grads = torch.autograd.grad(loss(model, x), list(model.parameters()))
    factors = factors or [1.0] * len(grads)
    return torch.cat([(g * f).reshape(-1) for g, f in zip(grads, factors, strict=True)])


class Loop:
    """A training loop under a monitor."""

    def __init__(self, model, observable=None, *, optimizer=None, reduction="mean", **settings):
        self.model, self.memory, self.reduction = model, MemoryRecorder(), reduction
        self.optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
        observable = observable or GradientNoiseScale(schedule=1, estimator=Mean())
        settings = {"on_error": "raise", **settings}
        self.monitor = Monitor(
            model,
            self.optimizer,
            [observable],
            recorders=[self.memory],
            loss_reduction=reduction,
            **settings,
        )

    def step(self, parts, loss=entropy, *, divisor=None, scale=1.0, given_up=(), before=None):
        """One optimizer step; ``divisor`` is what the loss is really divided by."""
        count = divisor or (len(parts) if self.reduction == "mean" else 1)
        for index, x in enumerate(parts):
            with self.monitor.micro_batch(x):
                value = loss(self.model, x) * (len(x) if self.reduction == "sum" else 1)
                if index not in given_up:
                    (scale * value / count).backward()
        self.monitor.before_step(**(before or {}))
        self.optimizer.step()
        self.model.zero_grad()
        return self

    def value(self, name, group="noise"):
        return self.memory.latest()[f"dynamics/{group}/{name}"].value

    def reading(self, name):
        return self.memory.latest()[f"dynamics/noise/{name}"]

    def check(self, trace, signal, source, rel=1e-10):
        assert self.value("trace") == pytest.approx(trace, rel=rel)
        assert self.value("grad_sq_norm") == pytest.approx(signal, rel=rel, abs=1e-14)
        assert self.reading("trace").note.startswith(source)


def noise(**settings):
    return GradientNoiseScale(**{"schedule": 1, "estimator": Mean(), **settings})


# -- micro-batches ---------------------------------------------------------------------------------

EQUAL, UNEQUAL = [4, 4, 4], [2, 3, 7]


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("make", "loss"), [(planted, mean_output), (network, entropy)])
def test_micro_batches(make, loss, reduction, sizes):
    model, x = make(), draws(12, P)
    parts = x.split(sizes)
    weights = [n / 12 for n in sizes] if reduction == "sum" else None
    expected = by_formula(torch.stack([gradient(model, loss, part) for part in parts]), sizes, weights)
    Loop(model, reduction=reduction).step(parts, loss).check(*expected, "micro-batches")


def test_part_means_of_the_planted_model_are_means_of_its_inputs():
    x = draws(12, P)
    means = torch.stack([part.mean(0) for part in x.split(UNEQUAL)])
    loop = Loop(planted()).step(x.split(UNEQUAL), mean_output)
    loop.check(*by_formula(means, UNEQUAL), "micro-batches")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_short_last_window_is_still_divided_by_the_full_number(reduction):
    model, parts = network(), draws(8, P).split(4)
    means = torch.stack([gradient(model, entropy, part) for part in parts])
    loop = Loop(model, reduction=reduction).step(parts, divisor=5, before={"loss_divisor": 5})
    loop.check(*by_formula(means, [4, 4]), "micro-batches")


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("unscaled", [False, True])
def test_loss_scale(micro_batches, unscaled):
    model, x = network(), draws(12, P)
    sizes = [1] * 12 if micro_batches == 1 else [4] * 3
    expected = by_formula(torch.stack([gradient(model, entropy, part) for part in x.split(sizes)]), sizes)
    loop = Loop(model)
    if unscaled:  # as scaler.unscale_ does before the step
        original = loop.monitor.before_step

        def before_step(**scales):
            for p in model.parameters():
                p.grad /= 1024.0
            original(**scales)

        loop.monitor.before_step = before_step
    scales = {"loss_scale": 1024.0} if unscaled else {"grad_scale": 1024.0}
    loop.step(x.chunk(micro_batches), scale=1024.0, before=scales)
    loop.check(*expected, "per example" if micro_batches == 1 else "micro-batches")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("given_up", [0, 1])
def test_a_micro_batch_that_is_given_up_is_no_part(reduction, given_up):
    model, parts = network(), draws(12, P).split(UNEQUAL)
    kept = [part for i, part in enumerate(parts) if i != given_up]
    sizes = [len(part) for part in kept]
    weights = [n / sum(sizes) for n in sizes] if reduction == "sum" else None
    means = torch.stack([gradient(model, entropy, part) for part in kept])
    loop = Loop(model, reduction=reduction).step(parts, given_up=[given_up])
    trace, signal = by_formula(means, sizes, weights)
    loop.check(trace, signal, "micro-batches")
    batch = sum(sizes)
    assert loop.value("critical_batch_fraction") == pytest.approx(batch / (batch + trace / signal))


def test_all_but_one_given_up_is_no_sample():
    with pytest.raises(SampleSkippedError, match="fewer than two micro-batches of this step had a backward"):
        Loop(network()).step(draws(8, P).split(4), given_up=[1])


# -- single examples -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("make", "loss"), [(planted, mean_output), (network, entropy)])
def test_per_example(make, loss, reduction):
    model, x = make(), draws(9, P)
    expected = by_formula(torch.stack([gradient(model, loss, one) for one in x.split(1)]), [1] * 9)
    Loop(model, reduction=reduction).step([x], loss).check(*expected, "per example")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("divisor", [None, 7])
def test_per_example_of_the_first_of_several_micro_batches(reduction, divisor):
    model, parts = network(), draws(12, P).split(UNEQUAL)
    means = torch.stack([gradient(model, entropy, one) for one in parts[0].split(1)])
    loop = Loop(model, noise(source="per example"), reduction=reduction)
    loop.step(parts, divisor=divisor, scale=8.0, before={"loss_divisor": divisor, "grad_scale": 8.0})
    loop.check(*by_formula(means, [1] * UNEQUAL[0]), "per example")


def test_per_example_and_micro_batches_agree():
    loop = Loop(network(), noise(cross_check="per example"))
    for step in range(150):
        loop.step(draws(24, P, seed=step).split(8))
    ratio = loop.reading("source_ratio")
    assert 0.01 < ratio.stderr < 0.2
    assert abs(ratio.value - 1) < 3 * ratio.stderr
    assert "checked against: per example, over 100 % of parameters" in ratio.note


def test_sources_that_see_other_parameters_are_not_compared():
    loop = Loop(network(nn.PReLU(6)), noise(cross_check="per example"))
    for step in range(2):
        loop.step(draws(12, P, seed=step).split(4))
    ratio = loop.reading("source_ratio")
    assert math.isnan(ratio.value)
    assert "not comparable with: per example, over 90 % of parameters" in ratio.note


def test_accumulating_in_other_ways_gives_the_same_noise_scale():
    found = {}
    for count in (1, 2, 4):
        model = network()
        loop = Loop(model)
        for step in range(60):
            loop.step(draws(64, P, seed=step).chunk(count))
        found[count] = loop.reading("trace"), loop.reading("grad_sq_norm"), loop.reading("scale")
    assert found[1][0].note.startswith("per example")
    for count in (2, 4):
        for one, other in zip(found[1], found[count], strict=True):
            assert abs(one.value - other.value) < 3 * math.hypot(one.stderr, other.stderr)


# -- one batch, split ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_split_batch(reduction):
    model, x = network(), draws(19, P)
    y = (x.sum(1) > 0).long()
    sizes = [2, 2, 3, 2, 2, 3, 2, 3]
    loop = Loop(
        model,
        noise(source="split batch"),
        reduction=reduction,
        loss_fn=lambda out, target: F.cross_entropy(out, target, reduction=reduction),
    )
    with loop.monitor.micro_batch(x, y):
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    before = [p.grad.clone() for p in model.parameters()]
    loop.monitor.before_step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    loop.optimizer.step()
    weights = [n / 19 for n in sizes] if reduction == "sum" else None
    means = torch.stack([gradient(model, entropy, part) for part in x.split(sizes)])
    loop.check(*by_formula(means, sizes, weights), "split batch", rel=1e-9)


def test_auto_splits_a_batch_that_batch_norm_couples():
    model, x = network(nn.BatchNorm1d(6)), draws(16, P)
    y = (x.sum(1) > 0).long()
    loop = Loop(model, loss_fn=F.cross_entropy)
    with loop.monitor.micro_batch(x, y):
        F.cross_entropy(model(x), y).backward()
    statistics = model[1].running_mean.clone()
    loop.monitor.before_step()
    assert torch.equal(model[1].running_mean, statistics)
    loop.optimizer.step()
    means = torch.stack([gradient(model, entropy, part) for part in x.split(8)])  # no fewer are normalised
    loop.check(*by_formula(means, [8] * 2), "split batch", rel=1e-9)


class Functional(nn.Module):
    """A linear map without a rule before one that has one."""

    def __init__(self, hidden):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.head = nn.Parameter(torch.randn(hidden, P)), nn.Linear(hidden, 1, bias=False)
        self.head.requires_grad_(hidden > 1)

    def forward(self, x):
        return self.head(torch.tanh(x @ self.weight.mT))


@pytest.mark.parametrize(
    ("extra", "hidden", "source"),
    [
        (0, 1, "split batch"),  # nothing is seen
        (0, 4, "split batch"),  # 4 of 24
        (20, 4, "per example"),  # 24 of 44
    ],
)
def test_auto_splits_where_single_examples_are_seen_of_less_than_half(extra, hidden, source):
    class Net(Functional):
        def __init__(self):
            super().__init__(hidden)
            self.more = nn.Linear(P, extra // P, bias=False) if extra else None

        def forward(self, x):
            return super().forward(x) + (self.more(x).sum(1, keepdim=True) if self.more else 0.0)

    def mean_square(model, x):
        return F.mse_loss(model(x), x[:, :1])

    model, x = Net().double(), draws(24, P)
    trained = [p for p in model.parameters() if p.requires_grad]
    seen = [p for p in trained if source == "split batch" or p is not model.weight]
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(mean_square(model, part), seen)])
        for part in x.split(3 if source == "split batch" else 1)
    ]
    expected = by_formula(torch.stack(rows), [24 // len(rows)] * len(rows))
    loop = Loop(model, optimizer=torch.optim.SGD(trained, lr=0.0), loss_fn=F.mse_loss)
    with loop.monitor.micro_batch(x, x[:, :1]):
        mean_square(model, x).backward()
    loop.monitor.before_step()
    loop.optimizer.step()
    loop.check(*expected, source, rel=1e-9)


def test_without_the_loss_few_seen_parameters_are_better_than_none():
    loop = Loop(Functional(4).double())
    loop.step([draws(8, P)], mean_output)
    assert "per example, loss_reduction=mean, over 17 % of parameters" in loop.reading("trace").note


def test_without_the_loss_batch_norm_is_refused():
    with pytest.raises(UnsupportedError, match=r"'1' \(BatchNorm1d\) is in train mode and couples"):
        Loop(network(nn.BatchNorm1d(6))).step([draws(8, P)], unknown)


def test_a_batch_of_few_examples_makes_few_pieces():
    model, x = planted(), draws(3, P)
    loop = Loop(model, noise(source="split batch"), loss_fn=lambda out, y: out.mean())
    loop.step([x], mean_output).check(*by_formula(x, [1, 1, 1]), "split batch")


@pytest.mark.parametrize("source", ["auto", "per example", "split batch"])
def test_a_batch_of_one_example_is_no_sample(source):
    loop = Loop(planted(), noise(source=source), loss_fn=lambda out, y: out.mean())
    with pytest.raises(SampleSkippedError, match=r"two parts of a batch, got 1\.|two or more pieces"):
        loop.step([draws(1, P)], mean_output)


# -- norm layers -----------------------------------------------------------------------------------


def test_norm_layers_and_their_calibration():
    model = network(nn.LayerNorm(6))
    norms = [id(p) for p in model[1].parameters()]
    observable = noise(source="norm layers", schedule=3, sampling=1)
    loop = Loop(model, observable)
    moments = {"all": [], "norm": [], "cheap": []}
    for step in range(4):
        x = draws(8, P, seed=step)
        loop.step([x])
        rows = torch.stack([gradient(model, entropy, one) for one in x.split(1)])
        own = torch.cat([torch.full((p.numel(),), id(p) in norms) for p in model.parameters()])
        moments["cheap"].append(by_formula(rows[:, own], [1] * 8))
        if observable.draws.chosen(step):
            moments["all"].append(by_formula(rows, [1] * 8))
            moments["norm"].append(moments["cheap"][-1])
    assert len(moments["all"]) == 2  # at the first step, and at one of the three before the second record
    scales = {name: sum(t for t, _ in each) / sum(s for _, s in each) for name, each in moments.items()}
    factor = scales["all"] / scales["norm"]
    assert loop.value("norm_layer_factor") == pytest.approx(factor, rel=1e-9)
    assert loop.value("trace") == pytest.approx(sum(t for t, _ in moments["all"]) / 2, rel=1e-9)
    expected = factor * scales["cheap"]
    scale = loop.value("scale")
    assert scale == pytest.approx(expected, rel=1e-9) or (math.isnan(scale) and expected < 0)


def test_under_norm_layers_the_batch_gradient_is_still_that_of_all():
    """At the samples for which the others are measured too."""
    model = network(nn.LayerNorm(6))
    observable = noise(source="norm layers", schedule=2, sampling=1)
    loop = Loop(model, observable)
    squares = []
    for step in range(3):
        x = draws(8, P, seed=step)
        if observable.draws.chosen(step):
            squares.append(gradient(model, entropy, x).square().sum().item())
        loop.step([x])
    assert len(squares) == 2
    assert loop.value("batch_grad_sq_norm") == pytest.approx(sum(squares) / 2, rel=1e-9)


def test_a_check_that_cannot_be_compared_takes_nothing_from_the_calibration():
    scales = {}
    for check in (None, "split batch"):
        model = network(nn.LayerNorm(6))
        loop = Loop(model, noise(source="norm layers", cross_check=check), loss_fn=F.cross_entropy)
        for step in range(3):
            x = draws(8, P, seed=step) + 1
            with loop.monitor.micro_batch(x, torch.zeros(8, dtype=torch.long)):
                F.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).backward()
            loop.monitor.before_step()
            loop.optimizer.step()
            model.zero_grad()
        scales[check] = [loop.value(name) for name in ("norm_layer_factor", "scale", "trace")]
    assert math.isnan(loop.value("source_ratio"))
    assert "not comparable with: split batch" in loop.reading("source_ratio").note
    assert all(map(math.isfinite, scales[None]))
    assert scales["split batch"] == pytest.approx(scales[None], rel=1e-12)


def test_batches_per_epoch_are_those_of_the_usual_batch():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    loop = Loop(model, optimizer=optimizer, dataset_size=38, replacement=False)
    for size in (10, 10, 10, 8):
        loop.step([draws(size, P)])
    note = loop.reading("temperature").note
    assert "batches are drawn without replacement; of the training set of 38 examples" in note
    assert note.endswith("; 4 batches per epoch")


def test_the_temperature_is_per_parameter_of_all():
    model = network(nn.LayerNorm(6))
    loop = Loop(model, noise(source="norm layers"), optimizer=torch.optim.SGD(model.parameters(), lr=0.2))
    loop.step([draws(8, P)])
    count = sum(p.numel() for p in model.parameters())
    expected = 0.2 / 16 * loop.value("trace") / count
    assert loop.value("temperature") == pytest.approx(expected, rel=1e-12)


def test_norm_layers_between_records_hook_nothing_else():
    model = network(nn.LayerNorm(6))
    loop = Loop(model, noise(source="norm layers", schedule=5, sampling=1))
    loop.step([draws(8, P)])
    with loop.monitor.micro_batch(draws(8, P)):
        assert [bool(p._backward_hooks) for p in model.parameters()] == [False] * 2 + [True] * 2 + [False] * 2


def test_a_model_without_norm_layers_is_refused():
    with pytest.raises(UnsupportedError, match="the model has none of the layers of source='norm layers'"):
        Loop(network(), noise(source="norm layers")).step([draws(8, P)])


# -- sections --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("how", ["groups", "layers"])
@pytest.mark.parametrize("source", ["auto", "split batch", "norm layers"])
def test_sections_add_up(how, count, source):
    model = network(nn.LayerNorm(6))
    groups = [
        {"params": model[0].parameters(), "name": "stem"},
        {"params": [p for layer in model[1:] for p in layer.parameters()], "name": "rest"},
    ]
    optimizer = torch.optim.SGD(groups if how == "groups" else model.parameters(), lr=0.0)
    loop = Loop(
        model,
        noise(source=source),
        optimizer=optimizer,
        layers=how == "layers",
        loss_fn=lambda out, y: out.square().mean(),
    )
    loop.step(draws(12, P).chunk(count))
    names = ["stem", "rest"] if how == "groups" else ["layer.0", "layer.1", "layer.3"]
    for quantity in ("trace", "grad_sq_norm"):
        parts = [loop.value(f"{quantity}/{name}") for name in names]
        assert sum(parts) == pytest.approx(loop.value(quantity), rel=1e-12)
    if source == "auto" and count == 3:
        own = list(model[0].parameters())
        means = torch.stack(
            [
                torch.cat([g.reshape(-1) for g in torch.autograd.grad(entropy(model, part), own)])
                for part in draws(12, P).chunk(3)
            ]
        )
        trace, _ = by_formula(means, [4] * 3)
        assert loop.value(f"trace/{names[0]}") == pytest.approx(trace, rel=1e-10)


# -- steps that do not count -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_that_are_not_finite_do_not_count(count):
    model = network()
    loop = Loop(model, noise(schedule=4, sampling=1), on_error="warn")
    expected = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(10):
            x = draws(8, P, seed=step)
            sizes = [1] * 8 if count == 1 else [4, 4]
            if step not in (2, 8):  # between records, and at one
                rows = torch.stack([gradient(model, entropy, part) for part in x.split(sizes)])
                expected.append(by_formula(rows, sizes))
            bad = math.nan if step in (2, 8) else 1.0
            loop.step(x.chunk(count), lambda model, x, bad=bad: entropy(model, x) * bad)
            model.load_state_dict(network().state_dict())  # lr = 0 times nan is nan
    assert [step for step, _ in loop.memory.series("dynamics/noise/trace")] == [0, 4, 9]
    traces, signals = zip(*expected, strict=True)
    assert loop.value("trace") == pytest.approx(sum(traces) / 8, rel=1e-10)
    assert loop.value("grad_sq_norm") == pytest.approx(sum(signals) / 8, rel=1e-10)
    assert loop.value("critical_batch_fraction") == pytest.approx(
        8 / (8 + sum(traces) / sum(signals)), nan_ok=True
    )
    said = [str(each.message) for each in caught if issubclass(each.category, MeasurementWarning)]
    assert len(said) == 1
    assert "the gradient is not finite at this step" in said[0]


def test_parameters_that_are_frozen_halfway():
    model = network()
    loop = Loop(model)
    x = draws(8, P)
    loop.step([x])
    model[0].requires_grad_(False)
    own = list(model[2].parameters())
    rows = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(entropy(model, one), own)])
            for one in x.split(1)
        ]
    )
    loop.step([x])
    model[0].requires_grad_(True)
    full, _ = by_formula(torch.stack([gradient(model, entropy, one) for one in x.split(1)]), [1] * 8)
    part, _ = by_formula(rows, [1] * 8)
    assert loop.value("trace") == pytest.approx((full + part) / 2, rel=1e-10)
    assert "over 100 % of parameters" in loop.reading("trace").note


def test_a_group_that_is_added_halfway_begins_a_new_window():
    model, x = network(), draws(8, P)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.0)
    loop = Loop(model, optimizer=optimizer)
    loop.step([x])
    assert "trace/0" not in {key.removeprefix("dynamics/noise/") for key in loop.memory.latest()}
    optimizer.add_param_group({"params": model[0].parameters()})
    loop.step([x])
    full, _ = by_formula(torch.stack([gradient(model, entropy, one) for one in x.split(1)]), [1] * 8)
    assert loop.value("trace") == pytest.approx(full, rel=1e-10)
    assert loop.value("trace/0") + loop.value("trace/1") == pytest.approx(full, rel=1e-10)


class Table(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(7, 4, sparse=sparse), nn.Linear(4, 2)

    def forward(self, ids):
        return self.head(torch.tanh(self.table(ids).sum(1)))


@pytest.mark.parametrize("source", ["auto", "split batch"])
def test_sparse_gradients(source):
    """Micro-batches and pieces read them as the dense ones they stand for."""
    found = []
    for sparse in (False, True):
        model = Table(sparse).double()
        ids = torch.randint(7, (12, 3), generator=torch.Generator().manual_seed(0))
        loop = Loop(model, noise(source=source), loss_fn=lambda out, y: out.square().mean())
        loop.step(ids.chunk(3), lambda model, x: model(x).square().mean())
        found.append((loop.value("trace"), loop.value("grad_sq_norm")))
    assert found[0] == pytest.approx(found[1], rel=1e-10)


def test_a_sparse_table_is_left_out_of_single_examples_by_name():
    loop = Loop(Table(True).double())
    loop.step([torch.randint(7, (6, 3))], lambda model, x: model(x).square().mean())
    assert "skipped: table.weight" in loop.reading("trace").note


# -- reduced precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_autocast_and_a_scaler(kind, count):
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(P, 32), nn.Tanh(), nn.Linear(32, 3))
        loop = Loop(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=half and kind is torch.float16)
        for step in range(8):
            x = draws(32, P, seed=step).float()
            for part in x.chunk(count):
                with loop.monitor.micro_batch(part), torch.autocast("cpu", kind, enabled=half):
                    loss = entropy(model, part) / count
                    scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(loop.optimizer)
                loop.monitor.before_step(loss_scale=scaler.get_scale())
            else:
                loop.monitor.before_step(grad_scale=scaler.get_scale())
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
        found.append((loop.value("trace"), loop.value("grad_sq_norm")))
    assert found[1] == pytest.approx(found[0], rel=0.03)


def test_a_step_that_the_scaler_skips_is_measured_again():
    model = network().float()
    loop = Loop(model, on_error="warn")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)
        for bad in (1.0, math.inf, 1.0):
            x = draws(8, P).float()
            with loop.monitor.micro_batch(x):
                scaler.scale(entropy(model, x) * bad).backward()
            loop.monitor.before_step(grad_scale=scaler.get_scale())
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
    assert [step for step, _ in loop.memory.series("dynamics/noise/trace")] == [0, 1]
    expected = torch.stack([gradient(model, entropy, one) for one in x.split(1)])
    assert loop.value("trace") == pytest.approx(by_formula(expected, [1] * 8)[0], rel=1e-4)


# -- closures --------------------------------------------------------------------------------------


def test_a_closure_that_calls_before_step_is_measured():
    model, x = network(), draws(8, P)
    loop = Loop(model)
    expected = by_formula(torch.stack([gradient(model, entropy, one) for one in x.split(1)]), [1] * 8)

    def closure():
        loop.optimizer.zero_grad()
        with loop.monitor.micro_batch(x):
            loss = entropy(model, x)
            loss.backward()
        loop.monitor.before_step()
        return loss

    loop.optimizer.step(closure)
    loop.check(*expected, "per example")


def test_a_closure_with_before_step_outside_is_told():
    model, x = network(), draws(8, P)
    loop = Loop(model, on_error="warn")

    def closure():
        loop.optimizer.zero_grad()
        with loop.monitor.micro_batch(x):
            loss = entropy(model, x)
            loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loop.monitor.before_step()
            loop.optimizer.step(closure)
    said = [str(each.message) for each in caught]
    assert any("before_step() was not called before optimizer.step()" in text for text in said)
    assert all(math.isnan(value) for _, value in loop.memory.series("dynamics/noise/trace"))
    assert standing(model) == 0


# -- the metric of Adam ----------------------------------------------------------------------------


def adam_factors(optimizer, amsgrad=False):
    """``1 / (sqrt(v_hat) + eps)`` as torch's own step divides, by parameter."""
    [group] = optimizer.param_groups
    factors = []
    for p in group["params"]:
        state = optimizer.state[p]
        second = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        correction = (1 - group["betas"][1] ** state["step"].item()) ** 0.5
        factors.append((second > 0) / (second.sqrt() / correction + group["eps"]))
    return factors


KINDS = [
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"amsgrad": True}),
]


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=["adam", "adamw", "amsgrad"])
@pytest.mark.parametrize("source", ["per example", "first of several", "micro-batches", "split", "norm"])
def test_preconditioned_noise(source, kind, settings):
    """Steps before the first state do not count for these readings, and count for the others."""
    model = network(nn.LayerNorm(6))
    optimizer = kind(model.parameters(), lr=0.01, eps=1e-3, betas=(0.8, 0.9), **settings)
    chosen = {"split": "split batch", "norm": "norm layers", "first of several": "per example"}
    loop = Loop(
        model,
        noise(source=chosen.get(source, "auto"), preconditioned=True),
        optimizer=optimizer,
        loss_fn=lambda out, y: F.cross_entropy(out, y),
    )
    count = 3 if source in ("micro-batches", "first of several") else 1
    traces, signals = [], []
    for step in range(4):
        x = draws(16, P, seed=step)
        parts = x.chunk(count)
        if step:
            factors = adam_factors(optimizer, bool(settings.get("amsgrad")))
            pieces = {"micro-batches": parts, "first of several": parts[0].split(1), "split": x.split(2)}
            pieces = pieces.get(source, x.split(1))
            rows = torch.stack([gradient(model, entropy, part, factors) for part in pieces])
            trace, signal = by_formula(rows, [len(part) for part in pieces])
            traces.append(trace)
            signals.append(signal)
        for part in parts:
            with loop.monitor.micro_batch(part, (part.sum(1) > 0).long()):
                (entropy(model, part) / count).backward()
        loop.monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
        if not step:
            assert math.isnan(loop.value("preconditioned_trace"))
            assert loop.value("trace") > 0
    assert loop.value("preconditioned_grad_sq_norm") == pytest.approx(sum(signals) / 3, rel=1e-9, abs=1e-9)
    assert loop.value("preconditioned_trace") == pytest.approx(sum(traces) / 3, rel=1e-9)
    found = loop.value("preconditioned_scale")  # nan where four steps do not resolve it
    assert math.isnan(found) or found == pytest.approx(sum(traces) / sum(signals), rel=1e-8)


class Shared(nn.Module):
    """Convolution, table, positions, groups: every form of factor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 4)
        self.mix, self.wide = nn.Linear(4, 6), nn.Linear(6, 40)
        self.conv = nn.Conv1d(40, 8, 3, groups=2)
        self.up, self.norm, self.head = nn.ConvTranspose1d(8, 4, 2), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, ids):
        x = torch.tanh(self.wide(torch.tanh(self.mix(self.table(ids)))))
        return self.head(torch.tanh(self.norm(self.up(self.conv(x.mT)))).mean(2))


def test_preconditioned_norms_of_every_form_of_factor():
    model = Shared().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loop = Loop(model, noise(preconditioned=True), optimizer=optimizer)

    def loss(model, ids):
        return F.cross_entropy(model(ids), ids[:, 0] % 3)

    for step in range(2):
        ids = torch.randint(9, (6, 7), generator=torch.Generator().manual_seed(step))
        if step:
            factors = adam_factors(optimizer)
            rows = torch.stack([gradient(model, loss, one, factors) for one in ids.split(1)])
        loop.step([ids], loss)
    trace, signal = by_formula(rows, [1] * 6)
    assert loop.value("preconditioned_trace") == pytest.approx(trace, rel=1e-8)
    assert loop.value("preconditioned_grad_sq_norm") == pytest.approx(signal, rel=1e-7)


def test_scaling_a_layer_changes_the_plain_scale_and_not_the_preconditioned_one():
    """A weight in units ``c`` times as large: gradients of that layer times ``1 / c``."""
    found = {}
    for units in (0.03, 30.0):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(P, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        model[0].weight.data *= units
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.99), eps=1e-12)
        loop = Loop(model, noise(preconditioned=True), optimizer=optimizer)

        def loss(model, x, units=units):
            hidden = torch.tanh(F.linear(x, model[0].weight / units, model[0].bias))
            return F.cross_entropy(model[2](hidden), (x.sum(1) > 0).long())

        for step in range(60):
            loop.step(draws(32, P, seed=step).split(8), loss)
        found[units] = loop.value("scale"), loop.value("preconditioned_scale")
    assert found[0.03][0] != pytest.approx(found[30.0][0], rel=0.1)
    assert found[0.03][1] == pytest.approx(found[30.0][1], rel=1e-6)


def test_a_group_without_a_state_leaves_its_first_step_out():
    model = network()
    optimizer = torch.optim.Adam(model[2].parameters(), lr=0.01)
    loop = Loop(model, noise(preconditioned=True), optimizer=optimizer)
    loop.step([draws(8, P)])
    optimizer.add_param_group({"params": model[0].parameters()})
    loop.step([draws(8, P)])
    assert math.isnan(loop.value("preconditioned_trace"))
    loop.step([draws(8, P)])
    assert math.isfinite(loop.value("preconditioned_trace"))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_other_optimizers_have_no_such_metric(kind):
    model = network()
    optimizer = kind(model.parameters(), lr=0.1)
    message = (
        rf"known for Adam and AdamW, got {kind.__name__}. Write GradientNoiseScale\(preconditioned=False"
    )
    with pytest.raises(UnsupportedError, match=message):
        Loop(model, noise(preconditioned=True), optimizer=optimizer).step([draws(8, P)])
    with pytest.raises(UnsupportedError, match=message):
        family_of(optimizer).metric(optimizer)


EXTRAS = [
    ({"preconditioned": True}, ["preconditioned_trace"], "known for Adam and AdamW, got SGD"),
    ({"cross_check": "split batch"}, ["source_ratio"], "can only be split where the loss is known"),
    ({"cross_check": "norm layers"}, ["source_ratio"], "none of the layers of source='norm layers'"),
]


@pytest.mark.parametrize(("settings", "names", "message"), EXTRAS)
def test_an_extra_that_cannot_be_had_is_left_out_alone(settings, names, message):
    plain, wanting = Loop(network()), Loop(network(), noise(**settings), on_error="warn")
    with pytest.warns(MeasurementWarning, match=message) as caught:
        for step in range(3):
            wanting.step([draws(8, P, seed=step)], unknown)
    assert len(caught) == 1
    assert "What rests on it is left out; the rest is read." in str(caught[0].message)
    for step in range(3):
        plain.step([draws(8, P, seed=step)], unknown)
    for name in ("trace", "grad_sq_norm", "batch_grad_sq_norm"):
        assert wanting.value(name) == plain.value(name)
    for name in names:
        assert len(wanting.memory.series(f"dynamics/noise/{name}")) == 3
        assert math.isnan(wanting.value(name))


def test_where_the_scale_itself_fails_only_what_was_asked_for_is_unknown():
    loop = Loop(network(nn.BatchNorm1d(6)), noise(cross_check="per example"), on_error="warn")
    with pytest.warns(MeasurementWarning, match="couples the examples") as caught:
        loop.step([draws(8, P)], unknown)
    assert len(caught) == 1
    found = {key.rpartition("/")[2] for key in loop.memory.latest() if "/noise/" in key}
    absent = {name for name in GradientNoiseScale.quantities if name.startswith("preconditioned")}
    assert found == set(GradientNoiseScale.quantities) - absent - {"norm_layer_factor"}


def test_the_metric_ends_with_its_step():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loop = Loop(model, noise(preconditioned=True, schedule=2), optimizer=optimizer)
    for _ in range(2):
        loop.step([draws(8, P)])
        assert loop.monitor._step is None


# -- gradients that are not their examples' sum ----------------------------------------------------


class TiedByHand(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)

    def forward(self, ids):
        return F.linear(torch.tanh(self.mix(self.table(ids).mean(1))), self.table.weight)


def test_a_head_tied_by_hand_is_left_out_and_stays_out():
    model = TiedByHand().double()
    loop = Loop(model)
    for step in range(3):
        ids = torch.randint(7, (6, 3), generator=torch.Generator().manual_seed(step))
        loop.step([ids], lambda model, x: F.cross_entropy(model(x), x[:, 0]))
        assert "over 50 % of parameters; skipped: table.weight" in loop.reading("trace").note
    own = list(model.mix.parameters())
    rows = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(F.cross_entropy(model(i), i[:, 0]), own)])
            for i in ids.split(1)
        ]
    )
    assert len(loop.memory.series("dynamics/noise/trace")) == 3
    assert by_formula(rows, [1] * 6)[0] > 0
    reason = "its gradient is not all from its module's calls (tied by hand, a penalty)"
    assert loop.monitor._measurement.memories["gradient_parts"]["unaccounted"] == {
        "table.weight": reason,
        "mix.weight": "",
        "mix.bias": "",
    }


@pytest.mark.parametrize("count", [1, 3])
def test_a_penalty_is_noticed(count):
    """Also among several micro-batches, whose sum is not compared."""
    model = network()
    loop = Loop(model, noise(source="per example"))

    def loss(model, x):
        return entropy(model, x) + 0.01 * model[2].weight.square().sum()

    loop.step(draws(12, P).chunk(count), loss)
    assert "skipped: 2.weight" in loop.reading("trace").note


def test_a_penalty_on_everything_is_refused():
    model = network()

    def loss(model, x):
        return entropy(model, x) + 0.01 * sum(p.square().sum() for p in model.parameters())

    loop = Loop(model)
    for kind in (SampleSkippedError, SampleSkippedError, UnsupportedError):
        with pytest.raises(kind, match=r"more than the sum over the examples \(a penalty in the loss"):
            loop.step([draws(8, P)], loss)
        loop.optimizer.step()
        model.zero_grad()


def test_what_could_not_be_judged_is_looked_at_again():
    """A gate that begins at zero hides what lies before it."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.gate, self.head = nn.Linear(P, P), nn.Linear(P, P, bias=False), nn.Linear(P, 3)
            nn.init.zeros_(self.gate.weight)

        def forward(self, x):
            return self.head(x + self.gate(self.inner(x) @ self.inner.weight))

    model = Gated().double()
    loop = Loop(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    loop.step([draws(8, P)])
    assert "inner.weight" not in loop.monitor._measurement.memories["gradient_parts"]["unaccounted"]
    loop.step([draws(8, P)])
    assert "skipped: inner.weight" in loop.reading("trace").note
    assert loop.monitor._measurement.memories["gradient_parts"]["unaccounted"]["inner.bias"] == ""


# -- hooks -----------------------------------------------------------------------------------------


def test_attaching_twice_leaves_no_hook_behind():
    net = planted()
    hooks = ParameterHooks(dict(net.named_parameters()), Directions())
    hooks.attach(2)
    hooks.attach(2)
    hooks.detach()
    net(draws(2, P)).sum().backward()
    assert [received.norms for received in hooks.micro_batches] == [{}, {}]


def test_a_source_is_not_checked_against_itself():
    with pytest.raises(InputError, match="a source cannot be checked against itself, got 'auto'"):
        noise(cross_check="auto")
