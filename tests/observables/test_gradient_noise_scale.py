import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradiometer import MemoryRecorder, Monitor
from gradiometer.collect.snapshot import GradientParts, GroupSettings, Snapshot
from gradiometer.errors import InputError, SampleSkippedError, UnsupportedError
from gradiometer.observables import (
    GradientNoiseScale,
    fluctuation_dissipation,
    gradient_noise_scale,
    per_example_grad_norms,
    sgd_noise_scale,
)
from gradiometer.observables.gradient_noise_scale import resolved_scale
from gradiometer.stats.estimators import Mean

from ..hooks import standing

P = 50
SIGMA = torch.linspace(0.2, 2, P, dtype=torch.float64)  # trace 55
REPLICAS = 8000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def part_means(replicas, sizes, *, gradient=0.3, seed=0):
    """Mean gradients of parts of the batch, ``[replicas, k, P]``."""
    noise = torch.randn(replicas, len(sizes), P, generator=seeded(seed), dtype=torch.float64)
    return gradient + SIGMA.sqrt() * noise / torch.as_tensor(sizes).double().sqrt()[:, None]


def estimates(contributions, sizes, **arguments):
    """Both estimates for each replica of the parts' contributions to the batch gradient."""
    sizes = torch.as_tensor(sizes)
    sq_norms = contributions.square().sum(-1)
    whole = contributions.sum(1).square().sum(-1)
    each = [gradient_noise_scale(a, sizes, b, **arguments) for a, b in zip(sq_norms, whole, strict=True)]
    return {name: torch.stack([one[name] for one in each]) for name in ("trace", "grad_sq_norm")}


def within(sample, expected, errors=3.0):
    assert (sample.mean() - expected).abs() < errors * sample.std() / len(sample) ** 0.5


# -- T5: the table of two batch sizes --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "b", "sd_trace", "sd_signal"),
    [(2, 16, 12.211, 0.9539), (8, 1, 4.615, 2.2666), (8, 16, 4.615, 0.4063), (32, 4, 2.193, 0.4051)],
)
def test_table_of_means_and_spreads(k, b, sd_trace, sd_signal):
    found = estimates(part_means(REPLICAS, [b] * k) / k, [b] * k)
    within(found["trace"], 55.0)
    within(found["grad_sq_norm"], 4.5)
    assert found["trace"].std().item() == pytest.approx(sd_trace, rel=0.05)
    assert found["grad_sq_norm"].std().item() == pytest.approx(sd_signal, rel=0.05)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_unequal_parts_are_unbiased(reduction):
    sizes = [1, 3, 4, 12]
    means = part_means(REPLICAS, sizes)
    scale = torch.tensor(sizes).double()[:, None] if reduction == "sum" else 1 / len(sizes)
    found = estimates(means * scale, sizes, loss_reduction=reduction)
    within(found["trace"], 55.0)
    within(found["grad_sq_norm"], 4.5)


def test_unequal_parts_in_closed_form():
    # weights 1/2: A -> G^2 + S (1/2 + 1/6)/1, C -> G^2 + S (1/4 + 1/12)
    squares = torch.tensor([5.0, 2.0], dtype=torch.float64)
    found = gradient_noise_scale(squares / 4, torch.tensor([1, 3]), torch.tensor(2.5))
    trace = (3.5 - 2.5) / (2 / 3 - 1 / 3)
    assert found["trace"].item() == pytest.approx(trace, rel=1e-14)
    assert found["grad_sq_norm"].item() == pytest.approx(2.5 - trace / 3, rel=1e-14)


def test_sum_and_mean_reduction_agree_on_equal_parts():
    means = part_means(5, [4] * 3)
    of_mean = estimates(means / 3, [4] * 3)
    of_sum = estimates(means * 4, [4] * 3, loss_reduction="sum")
    for name in of_mean:
        torch.testing.assert_close(of_mean[name], of_sum[name], rtol=1e-12, atol=1e-12)


def test_the_trace_of_single_examples_is_the_sample_covariance():
    gradients = part_means(1, [1] * 9)
    expected = gradients[0].var(0).sum()
    found = estimates(gradients / 9, [1] * 9)
    torch.testing.assert_close(found["trace"][0], expected, rtol=1e-12, atol=0)


def test_finite_population_bias_is_exact():
    """T6: over all pairs without replacement, S -> S_pop N/(N-1) and G^2 -> |G|^2 - S_pop/(N-1)."""
    population = part_means(1, [1] * 7, seed=3)[0]
    count = len(population)
    centre = population.mean(0)
    spread = (population - centre).square().sum(1).mean()
    pairs = torch.stack([population[list(pair)] for pair in itertools.combinations(range(count), 2)])
    found = estimates(pairs / 2, [1, 1])
    torch.testing.assert_close(found["trace"].mean(), spread * count / (count - 1), rtol=1e-12, atol=0)
    expected = centre.square().sum() - spread / (count - 1)
    torch.testing.assert_close(found["grad_sq_norm"].mean(), expected, rtol=1e-11, atol=0)


def test_right_side_of_the_fluctuation_relation_is_half_the_lr_times_signal_plus_noise_over_batch():
    """T21: O_R = eta/2 (G^2_est + S_est/B), exact for plain SGD."""
    k, b, lr = 4, 3, 0.07
    means = part_means(6, [b] * k)
    whole = means.mean(1).square().sum(1)
    found = estimates(means / k, [b] * k)
    one = torch.ones((), dtype=torch.float64)
    for replica in range(6):
        right = fluctuation_dissipation(lr**2 * whole[replica], (one, one), 1, lr).right
        expected = lr / 2 * (found["grad_sq_norm"][replica] + found["trace"][replica] / (k * b))
        torch.testing.assert_close(right, expected, rtol=1e-12, atol=0)


def parts_snapshot(contributions, sizes, **fields):
    """Contributions to the mean gradient of a batch, of equal weight."""
    k = len(contributions)
    parts = GradientParts(
        source="per example",
        sq_norms=(k * contributions).square().sum(-1)[:, None],
        sizes=torch.as_tensor(sizes),
        shares=torch.full((k,), 1 / k),
        batch_sq_norm=contributions.sum(0).square().sum()[None],
        weight=torch.ones(()),
        parameters=torch.tensor([P]),
        coverage=1.0,
        skipped={},
    )
    group = GroupSettings("0", 0.1, 0.0, 0.0, False, 0.0, True)
    defaults = {"model": nn.Linear(1, 1), "groups": (group,), "batch_size": sum(map(int, sizes))}
    return Snapshot(step=0, gradient_parts=parts, **{**defaults, **fields})


def read(observable, estimator):
    """Value of each reading from the window's averages."""
    rows, _ = estimator.replicates()
    values = observable.readings(rows | estimator.levels(), estimator.reference())
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    return {name: torch.as_tensor(value).reshape(-1)[0].item() for name, value in values.items()}


def average_over_steps(contributions, sizes, **fields):
    observable, estimator = GradientNoiseScale(), Mean()
    for one in contributions:
        estimator.add(*observable.statistics(parts_snapshot(one, sizes, **fields)))
    estimator.close(0)
    return read(observable, estimator)


def test_averages_are_divided_last():
    """|G|^2 = 3.5: B_simple is 15.7, and 4 % of the single estimates of |G|^2 at b = 1 are negative."""
    gradient = (3.5 / P) ** 0.5
    single = estimates(part_means(REPLICAS, [1] * 8, gradient=gradient) / 8, [1] * 8)
    negative = (single["grad_sq_norm"] < 0).double().mean()
    assert negative.item() == pytest.approx(0.04, abs=0.01)
    means = part_means(1000, [4] * 8, gradient=gradient)
    found = average_over_steps(means / 8, [4] * 8)
    assert found["scale"] == pytest.approx(55 / 3.5, abs=0.3)  # 15.7, three spreads of 0.10
    each = estimates(means / 8, [4] * 8)
    ratio = each["trace"].mean() / each["grad_sq_norm"].mean()
    assert found["scale"] == pytest.approx(ratio.item(), rel=1e-12)
    wrong = (each["trace"] / each["grad_sq_norm"]).mean()
    assert wrong.item() > 1.02 * ratio.item()


# -- per-example norms -----------------------------------------------------------------------------


def loop_norms(model, loss_fn, x, y):
    """One backward pass per example, eval mode."""
    model.eval()
    norms = []
    for i in range(len(y)):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        norms.append(torch.cat([g.reshape(-1) for g in gradients]).norm())
    return torch.stack(norms)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_per_example_norms_against_a_loop(reduction):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1),
        nn.BatchNorm1d(3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(15, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 4),
    ).double()
    model(torch.randn(6, 2, 5).double())  # running statistics of its own
    x, y = torch.randn(6, 2, 5).double(), torch.randint(4, (6,))
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    modes = [module.training for module in model.modules()]
    norms = per_example_grad_norms(model, loss_fn, x, y)
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert standing(model) == 0
    torch.testing.assert_close(norms, loop_norms(model, loss_fn, x, y), rtol=1e-10, atol=0)


def test_per_example_norms_of_a_mapping():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, ids, scale):
            return self.head(self.table(ids).mean(1) * scale)

    model = Net().double()
    x = {"ids": torch.randint(5, (4, 6)), "scale": torch.rand(4, 1).double()}
    y = torch.tensor([0, 1, 1, 0])
    norms = per_example_grad_norms(model, F.cross_entropy, x, y)
    for i in range(4):
        loss = F.cross_entropy(model(x["ids"][i : i + 1], x["scale"][i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = torch.cat([g.reshape(-1) for g in gradients]).norm()
        torch.testing.assert_close(norms[i], expected, rtol=1e-10, atol=0)


def test_per_example_norms_feed_the_noise_scale():
    """Trace and signal from norms equal the covariance of the gradients themselves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(9, 4).double(), torch.randint(3, (9,))
    norms = per_example_grad_norms(model, F.cross_entropy, x, y)
    parameters = list(model.parameters())
    rows = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(F.cross_entropy(out, target), parameters)])
            for out, target in ((model(x[i : i + 1]), y[i : i + 1]) for i in range(9))
        ]
    )
    whole = rows.mean(0).square().sum()
    found = gradient_noise_scale((norms / 9).square(), torch.ones(9), whole)
    torch.testing.assert_close(found["trace"], rows.var(0).sum(), rtol=1e-10, atol=0)
    expected = whole - rows.var(0).sum() / 9
    torch.testing.assert_close(found["grad_sq_norm"], expected, rtol=1e-9, atol=0)


# -- SGD's own noise scale -------------------------------------------------------------------------


def test_sgd_noise_scale_values():
    assert sgd_noise_scale(0.1, 1000, 10) == pytest.approx(0.1 * 1000 / 20)
    assert sgd_noise_scale(0.1, 1000, 10, momentum=0.9) == pytest.approx(50.0)
    without = 0.05 * (990 / 10) * (1000 / 999)
    assert sgd_noise_scale(0.1, 1000, 10, replacement=False) == pytest.approx(without)
    assert sgd_noise_scale(0.1, 1000, 10, 0.5, replacement=False) == pytest.approx(2 * without)


def test_sgd_noise_scale_of_the_full_batch_is_zero():
    assert sgd_noise_scale(0.1, 50, 50, 0.9, replacement=False) == 0.0
    assert sgd_noise_scale(0.1, 1, 1, replacement=False) == 0.0
    assert sgd_noise_scale(0.1, 50, 50) == pytest.approx(0.05)


def test_factor_without_replacement_is_the_covariance_of_a_batch_mean():
    """Over all batches of B among N: Cov = (F/B) (N - B)/(N - 1), F the population covariance."""
    values = torch.randn(6, generator=seeded(), dtype=torch.float64)
    for b in (1, 2, 3, 6):
        means = torch.stack([values[list(s)].mean() for s in itertools.combinations(range(6), b)])
        ratio = means.var(correction=0) * 6 / values.var(correction=0)
        expected = 2 * sgd_noise_scale(1.0, 6, b, replacement=False)
        assert ratio.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


# -- the observable --------------------------------------------------------------------------------


def test_readings_in_closed_form():
    contributions = part_means(1, [4] * 8)[0] / 8
    group = GroupSettings("0", 0.2, 0.5, 0.0, False, 0.0, True)
    found = average_over_steps(contributions[None], [4] * 8, groups=(group,), dataset_size=320)
    one = estimates(contributions[None], [4] * 8)
    trace, signal = one["trace"].item(), one["grad_sq_norm"].item()
    assert found["trace"] == pytest.approx(trace)
    assert found["grad_sq_norm"] == pytest.approx(signal)
    assert found["scale"] == pytest.approx(trace / signal)
    assert found["critical_batch_fraction"] == pytest.approx(32 / (32 + trace / signal))
    finite = (320 - 32) / (320 - 1)  # batches of a finite data set, without replacement
    assert found["temperature"] == pytest.approx(0.2 / 0.5 * trace / P / 64 * finite)
    assert found["sgd_scale"] == pytest.approx(sgd_noise_scale(0.2, 320, 32, 0.5, replacement=False))


def test_sgd_readings_need_sgd_and_the_size_of_the_data_set():
    contributions = part_means(1, [4] * 8) / 8
    assert "sgd_scale" not in average_over_steps(contributions, [4] * 8)
    assert "temperature" in average_over_steps(contributions, [4] * 8)
    adam = GroupSettings("0", 0.2, 0.0, 0.0, False, 0.0, False)
    found = average_over_steps(contributions, [4] * 8, groups=(adam,), dataset_size=320)
    assert not {"sgd_scale", "temperature"} & set(found)


def test_scale_is_nan_where_the_signal_is_not_resolved():
    contributions = torch.eye(4, P, dtype=torch.float64)
    contributions[1] = -contributions[0]
    contributions[3] = -contributions[2]  # the batch gradient is zero, its estimate negative
    found = average_over_steps(contributions[None], [1] * 4)
    assert found["grad_sq_norm"] < 0
    assert found["trace"] > 0
    assert found["scale"] != found["scale"]
    assert found["critical_batch_fraction"] != found["critical_batch_fraction"]


def test_without_a_resolved_signal_and_a_bound_the_note_says_so():
    def scale(trace, batch=4.0):
        rows = torch.tensor(trace, dtype=torch.float64), torch.tensor([0.1, -1.0, 1.0, -0.5, 1.0])
        without = [(5 * series.mean() - series) / 4 for series in rows]
        both = (torch.cat([series.mean()[None], left]) for series, left in zip(rows, without, strict=True))
        return resolved_scale(*both, torch.ones(5), batch)["scale"]

    none, some = scale([-20.0, 20.0, 30.0, -30.0, 1.0]), scale([20.0, 21.0, 20.5, 20.0, 21.0])
    reason = "the gradient is below its own noise, average longer"
    erratic = "the gradient changes too much from record to record"
    assert (none.note, none.low, none.resolved) == (f"not resolved, without a bound: {erratic}", 0.0, False)
    assert some.low > 1
    assert some.note == f"not resolved, at least {some.low:.3g}: {reason}"
    assert scale([20.0, 21.0, 20.5, 20.0, 21.0], batch=1000.0).note.endswith(erratic)


EXTRAS = {"norm_layer_factor", "source_ratio"}
EXTRAS |= {"preconditioned_scale", "preconditioned_trace", "preconditioned_grad_sq_norm"}


@pytest.mark.parametrize(
    ("settings", "extras"),
    [
        ({}, set()),
        ({"source": "norm layers"}, {"norm_layer_factor"}),
        ({"cross_check": "split batch"}, {"source_ratio"}),
        ({"preconditioned": True}, {name for name in EXTRAS if name.startswith("preconditioned")}),
    ],
)
def test_names_are_those_that_the_settings_ask_for(settings, extras):
    observable = GradientNoiseScale(**settings)
    assert set(observable.quantities) - observable.names == EXTRAS - extras
    assert observable.names <= set(observable.quantities)


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({}, {"preconditioner"}),
        ({"cross_check": "split batch"}, {"preconditioner", "split_parts"}),
        ({"source": "norm layers", "cross_check": "per example"}, {"preconditioner", "example_parts"}),
        ({"source": "norm layers", "cross_check": "auto"}, {"preconditioner"}),  # it calibrates, too
    ],
)
def test_what_the_scale_can_do_without(settings, fields):
    assert GradientNoiseScale(**settings).optional == fields


def test_without_its_extras_the_scale_stands():
    contributions = part_means(1, [4] * 8)[0] / 8
    found = {}
    for settings in ({}, {"preconditioned": True, "cross_check": "split batch"}):
        observable, estimator = GradientNoiseScale(**settings), Mean()
        snapshot = parts_snapshot(contributions, [4] * 8)
        estimator.add(*observable.statistics(snapshot))
        estimator.close(0)
        assert "split" not in observable.note(snapshot)
        found[bool(settings)] = read(observable, estimator)
    for name, value in found[True].items():
        if name in EXTRAS:
            assert value != value, name
        else:
            assert value == found[False][name] == value, name
    assert found[True].keys() - found[False].keys() == EXTRAS - {"norm_layer_factor"}


def test_note_names_source_reduction_coverage_and_what_is_missing():
    snapshot = parts_snapshot(torch.ones(2, P), [1, 1])
    assert GradientNoiseScale().note(snapshot) == (
        "per example, loss_reduction=mean, over 100 % of parameters; "
        "of the distribution the examples are drawn from"
    )
    parts = dataclasses.replace(
        snapshot.gradient_parts, source="micro-batches", coverage=0.5, skipped={"a.weight": "x"}
    )
    note = GradientNoiseScale().note(snapshot.replace(gradient_parts=parts, loss_reduction="sum"))
    text = "micro-batches, loss_reduction=sum, over 50 % of parameters; skipped: a.weight"
    assert note == f"{text}; of the distribution the examples are drawn from"


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_monitor_reads_the_covariance_of_the_gradients(reduction, micro_batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    memory = MemoryRecorder()
    monitor = Monitor(
        model,
        optimizer,
        [GradientNoiseScale(schedule=1)],
        recorders=[memory],
        loss_reduction=reduction,
        on_error="raise",
    )
    parts = list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True))
    with monitor:
        for a, b in parts:
            with monitor.micro_batch(a, b):
                loss = F.cross_entropy(model(a), b, reduction=reduction)
                (loss / micro_batches if reduction == "mean" else loss).backward()
        monitor.before_step()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # after before_step: not seen
        optimizer.step()
    rows = []
    groups = parts if micro_batches > 1 else [(x[i : i + 1], y[i : i + 1]) for i in range(12)]
    for a, b in groups:
        gradients = torch.autograd.grad(F.cross_entropy(model(a), b), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    means = torch.stack(rows)
    trace = means.var(0).sum() * (12 // len(rows))  # equal parts of b examples: S = b times the spread
    signal = means.mean(0).square().sum() - trace / 12
    found = memory.latest()
    assert found["dynamics/noise/trace"].value == pytest.approx(trace.item(), rel=1e-9)
    assert found["dynamics/noise/grad_sq_norm"].value == pytest.approx(signal.item(), rel=1e-8)
    source = "micro-batches" if micro_batches > 1 else "per example"
    assert found["dynamics/noise/trace"].note.startswith(source)


# -- steps and sources that do not count -----------------------------------------------------------


def moments_by_hand(observable, snapshots, field):
    """Trace and squared gradient of one source from plain means over the steps that have it."""
    sums = []
    for snapshot in snapshots:
        parts = getattr(snapshot, field)
        b, w = parts.sizes.double(), parts.shares.double()
        noise = (w / b).sum(), (w**2 / b).sum()
        sums.append([(w[:, None] * parts.sq_norms).sum(), parts.batch_sq_norm.sum(), *noise])
    a, c, single, batch = torch.tensor(sums, dtype=torch.float64).mean(0).tolist()
    trace = (a - c) / (single - batch)
    return trace, c - trace * batch


def test_a_source_has_no_part_in_the_steps_without_it():
    """The norm layers at every step, the other sources at some, and one step that is not finite."""
    observable = GradientNoiseScale(source="norm layers", cross_check="per example")
    estimator, counted, full, checked = Mean(), [], [], []
    group = GroupSettings("0", 0.1, 0.0, 0.0, False, 0.0, False)
    for step in range(12):
        fields = {}
        for name, every in (("norm_layer_parts", 1), ("gradient_parts", 2), ("example_parts", 3)):
            if step % every == 0:
                means = part_means(1, [4] * 8, gradient=0.3 + every, seed=10 * step + every)[0]
                fields[name] = parts_snapshot(means / 8, [4] * 8).gradient_parts
        if step in (5, 6):  # the first source, or all of this step
            fields["norm_layer_parts"] = dataclasses.replace(
                fields["norm_layer_parts"],
                sq_norms=torch.full((8, 1), 1e9, dtype=torch.float64),
                weight=torch.zeros(()),
            )
        settings = {
            "model": nn.Linear(1, 1),
            "groups": (group,),
            "batch_size": 32 if step not in (5, 6) else 10**6,
        }
        snapshot = Snapshot(step=step, **settings, **fields)
        estimator.add(*observable.statistics(snapshot))
        if step % 3 == 2:
            estimator.close(step)
        if step not in (5, 6):
            counted.append(snapshot)
            full += [snapshot] if "gradient_parts" in fields else []
            checked += [snapshot] if "example_parts" in fields else []
    found = read(observable, estimator)
    trace, signal = moments_by_hand(observable, full, "gradient_parts")
    assert found["trace"] == pytest.approx(trace, rel=1e-12)
    assert found["grad_sq_norm"] == pytest.approx(signal, rel=1e-12)
    at_full, all_steps = (moments_by_hand(observable, s, "norm_layer_parts") for s in (full, counted))
    factor = trace / signal / (at_full[0] / at_full[1])
    assert found["norm_layer_factor"] == pytest.approx(factor, rel=1e-12)
    assert found["scale"] == pytest.approx(factor * all_steps[0] / all_steps[1], rel=1e-12)
    assert found["critical_batch_fraction"] == pytest.approx(32 / (32 + found["scale"]), rel=1e-12)
    check, at_check = (moments_by_hand(observable, checked, f) for f in ("example_parts", "norm_layer_parts"))
    assert found["source_ratio"] == pytest.approx(check[0] / at_check[0], rel=1e-12)
    assert estimator.reference().samples == 10


def test_settings_of_a_step_that_does_not_count_are_not_read():
    observable, estimator = GradientNoiseScale(), Mean()
    for lr, weight in ((0.1, 1.0), (0.1, 1.0), (7.0, 0.0)):
        snapshot = parts_snapshot(part_means(1, [4] * 8)[0] / 8, [4] * 8, dataset_size=320)
        parts = dataclasses.replace(snapshot.gradient_parts, weight=torch.tensor(weight))
        groups = (dataclasses.replace(snapshot.groups[0], lr=lr),)
        estimator.add(*observable.statistics(snapshot.replace(gradient_parts=parts, groups=groups)))
    estimator.close(2)
    assert read(observable, estimator)["sgd_scale"] == pytest.approx(
        sgd_noise_scale(0.1, 320, 32, replacement=False), rel=1e-6
    )
    assert estimator.reference().samples == 2


# -- errors ----------------------------------------------------------------------------------------


def test_fewer_than_two_parts_are_refused():
    with pytest.raises(InputError, match=r"needs at least two parts of a batch, got 1. Accumulate over"):
        gradient_noise_scale(torch.ones(1), torch.ones(1), torch.ones(()))


def test_an_empty_part_is_refused():
    with pytest.raises(InputError, match=r"every part must hold an example, got \[2, 0\]"):
        gradient_noise_scale(torch.ones(2), torch.tensor([2, 0]), torch.ones(()))


def test_unknown_reductions_are_refused():
    message = r"unknown loss_reduction, got 'none'. Write \"mean\" or \"sum\""
    with pytest.raises(InputError, match=message):
        gradient_noise_scale(torch.ones(2), torch.ones(2), torch.ones(()), loss_reduction="none")


def test_a_loss_that_is_no_number_is_refused():
    model = nn.Linear(3, 2)
    loss_fn = nn.MSELoss(reduction="none")
    with pytest.raises(InputError, match=r"must return one number, got shape \[1, 2\]"):
        per_example_grad_norms(model, loss_fn, torch.ones(4, 3), torch.zeros(4, 2))
    assert standing(model) == 0


def test_per_example_norms_reach_parameters_without_a_rule():
    """PReLU has none, a penalty's second use of a weight is not a layer, a head may be tied by hand."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.act, self.mix = nn.Embedding(5, 3), nn.PReLU(), nn.Linear(3, 3)

        def forward(self, ids):
            hidden = self.act(self.mix(self.table(ids).mean(1)))
            return F.linear(hidden, self.table.weight) + self.mix.weight.square().sum()

    model = Net().double()
    x, y = torch.randint(5, (4, 6)), torch.tensor([0, 1, 1, 0])
    norms = per_example_grad_norms(model, F.cross_entropy, x, y)
    torch.testing.assert_close(norms, loop_norms(model, F.cross_entropy, x, y), rtol=1e-10, atol=0)


def test_per_example_norms_name_the_parameter_they_miss():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(checkpoint(self.inner, x.requires_grad_(), use_reentrant=True))

    with pytest.raises(UnsupportedError, match=r"miss 2 of the parameters, first 'inner.bias': its gradient"):
        per_example_grad_norms(Net(), lambda out, y: out.mean(), torch.ones(3, 2), torch.zeros(3))


def test_per_example_norms_refuse_unusable_inputs():
    model, y = nn.Linear(2, 2), torch.zeros(3)
    with pytest.raises(InputError, match="at least one example"):
        per_example_grad_norms(model, lambda out, y: out.mean(), torch.ones(0, 2), y)
    with pytest.raises(InputError, match="inputs must be finite, got NaN or infinity"):
        per_example_grad_norms(model, lambda out, y: out.mean(), torch.full((3, 2), torch.nan), y)


@pytest.mark.parametrize(("size", "batch"), [(0, 1), (10, 0), (10, 11)])
def test_sgd_noise_scale_refuses_impossible_sizes(size, batch):
    with pytest.raises(InputError, match=f"got batch_size={batch}, dataset_size={size}"):
        sgd_noise_scale(0.1, size, batch)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_sgd_noise_scale_refuses_impossible_momentum(momentum):
    with pytest.raises(InputError, match=r"momentum must lie in \[0, 1\), got"):
        sgd_noise_scale(0.1, 10, 1, momentum)


def test_a_step_with_one_part_is_left_out():
    with pytest.raises(SampleSkippedError, match=r"at least two parts of a batch, got 1. This step is left"):
        GradientNoiseScale().statistics(parts_snapshot(torch.ones(1, P), [1]))
