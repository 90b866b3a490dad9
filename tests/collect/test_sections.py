"""Readings by parameter group, by layer, and of scale-invariant weights: parts that make up the whole."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import FluctuationDissipation, GradientNoiseScale, Mean, MemoryRecorder, Monitor
from gradiometer.collect.sections import Sections
from gradiometer.errors import MeasurementWarning
from gradiometer.stats.linalg import inner_products, squared_norms


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)
    ).double()


def two_groups(model, **settings):
    rest = [p for name, p in model.named_parameters() if not name.startswith("4")]
    return [{"params": rest, "name": "body"}, {"params": model[4].parameters(), "lr": 0.02, **settings}]


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.02)


def batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 5, generator=generator, dtype=torch.float64), torch.randint(
        3, (size,), generator=generator
    )


def verified(schedule=10):
    return FluctuationDissipation(schedule=schedule, verify=True, estimator=Mean())


def train(model, optimizer, observables, *, steps=41, before=None, **arguments):
    memory = MemoryRecorder()
    arguments = {"on_error": "raise"} | arguments
    with Monitor(model, optimizer, observables, recorders=[memory], **arguments) as monitor:
        for step in range(steps):
            if before is not None:
                before(step, model, optimizer)
            x, y = batch(step)
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return memory


def series(memory, name):
    return dict(memory.series(f"dynamics/fdr/{name}"))


def sections_of(memory, name="fdr/weight_norm_sq"):
    return {key.split("/", 3)[3] for key in memory.latest() if key.startswith(f"dynamics/{name}/")}


# -- which parameters belong together --------------------------------------------------------------


def divided(model, groups, names, **arguments):
    found = Sections(model, torch.optim.SGD(groups, lr=0.1), names, **arguments).sections
    return [(section.name, section.group, section.parameters) for section in found]


def test_sections_are_groups_or_layers_with_scale_invariant_weights_apart():
    model = network()
    everything = [{"params": model.parameters()}]
    invariant = ["2.weight"]
    assert divided(model, everything, ["0"]) == [("0", 0, 155)]
    assert divided(model, everything, ["0"], invariant=invariant) == [
        ("0", 0, 91),
        ("0.scale_invariant", 0, 64),
    ]
    assert divided(model, two_groups(model), ["body", "1"], invariant=invariant) == [
        ("body", 0, 64),
        ("body.scale_invariant", 0, 64),
        ("1", 1, 27),
    ]
    assert divided(model, everything, ["0"], layers=True, invariant=invariant) == [
        ("layer.0", 0, 48),
        ("layer.2.scale_invariant", 0, 64),
        ("layer.3", 0, 16),
        ("layer.4", 0, 27),
    ]


def test_one_layer_in_two_groups_is_two_sections():
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    assert divided(model, groups, ["a", "b"], layers=True) == [
        ("layer.model.a", 0, 6),
        ("layer.model.b", 1, 2),
    ]


def test_frozen_parameters_have_no_section_and_tied_ones_have_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)

    model = Tied()
    assert divided(model, [{"params": model.parameters()}], ["0"], layers=True) == [
        ("layer.first", 0, 16),
        ("layer.second", 0, 4),
    ]


def test_parameters_that_are_not_in_the_model_stand_under_other():
    model, temperature = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
    groups = [{"params": [*model.parameters(), temperature]}]
    assert divided(model, groups, ["0"]) == [("0", 0, 10)]
    assert divided(model, groups, ["0"], layers=True) == [("layer.model", 0, 8), ("layer.other", 0, 2)]


def test_sums_are_those_of_each_sections_own_parameters():
    model = network()
    sections = Sections(model, sgd(two_groups(model)), ["body", "1"], layers=True)
    parameters, generator = list(model.parameters()), torch.Generator().manual_seed(0)
    order = torch.randperm(len(parameters), generator=generator).tolist()
    some = [parameters[i] for i in order][1:]
    values = [p.detach() for p in some]
    for function, tensors in ((squared_norms, [values]), (inner_products, [values, values])):
        expected = [
            sum(float(p.detach().square().sum()) for p in some if any(p is q for q in layer.parameters()))
            for layer in (model[0], model[2], model[3], model[4])
        ]
        found = sections.sums(function, some, *tensors)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert sections.sums(squared_norms, [], []).tolist() == [0.0] * 4


# -- readings --------------------------------------------------------------------------------------

OPTIMIZERS = {
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.02),
    "nesterov": lambda groups: torch.optim.SGD(
        groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.02
    ),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, weight_decay=0.1),
}


@pytest.mark.parametrize("layers", [False, True], ids=["groups", "layers"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_identity_holds_in_every_section_and_parts_add_up(name, layers):
    model = network()
    memory = train(model, OPTIMIZERS[name](two_groups(model)), [verified()], layers=layers)
    sections = (
        {"layer.0", "layer.2.scale_invariant", "layer.3", "layer.4"}
        if layers
        else {"body", "body.scale_invariant", "1"}
    )
    assert sections_of(memory) == sections_of(memory, "fdr/residual") == sections
    for section in ("", *(f"/{name}" for name in sections)):
        residual = series(memory, f"residual{section}")
        assert sorted(residual) == [10, 20, 30, 40]
        assert max(map(abs, residual.values())) < 1e-9
    for quantity in ("left", "right", "weight_norm_sq"):
        for step, total in series(memory, quantity).items():
            parts = sum(series(memory, f"{quantity}/{section}")[step] for section in sections)
            assert parts == pytest.approx(total, rel=1e-12)
    ratios = [series(memory, f"ratio/{section}")[40] for section in sections]
    assert len({round(ratio, 3) for ratio in ratios}) == len(sections)
    norm = sum(float(p.detach().square().sum()) for p in model.parameters())
    assert series(memory, "weight_norm_sq")[40] == pytest.approx(norm, rel=1e-12)


def test_noise_of_the_layers_adds_up():
    model = network()
    memory = train(model, sgd(two_groups(model)), [GradientNoiseScale(schedule=10)], layers=True)
    latest, sections = memory.latest(), sections_of(memory, "noise/trace")
    assert sections == {"layer.0", "layer.2.scale_invariant", "layer.3", "layer.4"}
    for quantity in ("trace", "grad_sq_norm"):
        parts = sum(latest[f"dynamics/noise/{quantity}/{section}"].value for section in sections)
        assert latest[f"dynamics/noise/{quantity}"].value == pytest.approx(parts, rel=1e-12)


def test_dividing_into_layers_does_not_change_the_totals():
    def totals(layers):
        model = network()
        memory = train(model, sgd(two_groups(model)), [verified()], layers=layers)
        return {name: series(memory, name)[40] for name in ("ratio", "left", "right", "resolution")}

    together, apart = totals(False), totals(True)
    for name in ("ratio", "left", "right"):
        assert apart[name] == pytest.approx(together[name], rel=1e-12)


# -- parameters come and go ------------------------------------------------------------------------


def test_a_layer_that_is_frozen_halfway_stays_exact():
    def freeze(step, model, optimizer):
        if step == 17:
            model[0].requires_grad_(False)

    model = network()
    memory = train(model, sgd(two_groups(model)), [verified()], before=freeze, layers=True)
    residuals = {name: series(memory, f"residual/{name}") for name in sections_of(memory)}
    assert set(residuals) == {"layer.0", "layer.2.scale_invariant", "layer.3", "layer.4"}
    for residual in (series(memory, "residual"), *residuals.values()):
        assert sorted(residual) == [10, 20, 30, 40]  # no window was cut
        assert max(map(abs, residual.values())) < 1e-9
    norms = series(memory, "weight_norm_sq/layer.0")
    assert norms[20] == norms[30] == norms[40] != norms[10]


def test_a_layer_that_is_unfrozen_halfway_gets_a_section_of_its_own():
    def unfreeze(step, model, optimizer):
        if step == 15:
            model[0].requires_grad_(True)

    model = network()
    model[0].requires_grad_(False)
    memory = train(model, sgd(two_groups(model)), [verified()], before=unfreeze, layers=True)
    assert sections_of(memory) == {"layer.0", "layer.2.scale_invariant", "layer.3", "layer.4"}
    assert sorted(series(memory, "residual")) == [10, 30, 40]  # a window begins at 20
    assert sorted(series(memory, "residual/layer.4")) == [10, 30, 40]
    assert sorted(series(memory, "residual/layer.0")) == [30, 40]
    for name in ("residual", "residual/layer.0", "residual/layer.4", "residual/layer.3"):
        assert max(map(abs, series(memory, name).values())) < 1e-9
    assert series(memory, "weight_norm_sq/layer.0")[40] == pytest.approx(
        sum(float(p.detach().square().sum()) for p in model[0].parameters()), rel=1e-12
    )


def test_a_weight_that_is_unfrozen_halfway_may_be_scale_invariant():
    def unfreeze(step, model, optimizer):
        if step == 15:
            model[2].requires_grad_(True)

    model = network()
    model[2].requires_grad_(False)
    memory = train(model, sgd([{"params": model.parameters()}]), [verified()], before=unfreeze)
    assert sections_of(memory) == {"0", "0.scale_invariant"}
    assert series(memory, "weight_norm_sq/0.scale_invariant")[40] == pytest.approx(
        float(model[2].weight.detach().square().sum()), rel=1e-12
    )


def test_a_group_that_is_added_halfway_is_read_under_its_name():
    def add(step, model, optimizer):
        if step == 15:
            optimizer.add_param_group({"params": model[4].parameters(), "name": "head", "lr": 0.01})
            model.zero_grad()  # the optimizer has not seen to the head so far

    model = network()
    rest = [p for name, p in model.named_parameters() if not name.startswith("4")]
    observables = [verified(), GradientNoiseScale(schedule=10)]
    memory = train(model, sgd([{"params": rest, "name": "body"}]), observables, before=add)
    assert sections_of(memory) == {"body", "body.scale_invariant", "head"}
    assert sections_of(memory, "noise/trace") == {"body", "body.scale_invariant", "head"}
    assert sorted(series(memory, "residual")) == sorted(series(memory, "residual/body")) == [10, 30, 40]
    assert sorted(series(memory, "residual/head")) == [30, 40]
    for section in ("", "/body", "/body.scale_invariant", "/head"):
        assert max(map(abs, series(memory, f"residual{section}").values())) < 1e-9
    parts = sum(series(memory, f"left/{name}")[40] for name in ("body", "body.scale_invariant", "head"))
    assert series(memory, "left")[40] == pytest.approx(parts, rel=1e-12)


def test_a_group_that_was_added_halfway_is_known_after_a_resume():
    def run(resume):
        model, memory = network(), MemoryRecorder()
        rest = [p for name, p in model.named_parameters() if not name.startswith("4")]
        optimizer = sgd([{"params": rest, "name": "body"}])
        monitor = Monitor(model, optimizer, [verified()], recorders=[memory], on_error="raise")
        for step in range(41):
            if step == 15:
                optimizer.add_param_group({"params": model[4].parameters(), "name": "head", "lr": 0.01})
            if step == 25 and resume:
                state = monitor.state_dict()
                monitor.close()
                monitor = Monitor(model, optimizer, [verified()], recorders=[memory], on_error="raise")
                monitor.load_state_dict(state)
            x, y = batch(step)
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        monitor.close()
        return [
            (step, reading.key, reading.value)
            for step, readings in memory.records
            for reading in readings
            if reading.is_finite and "cost" not in reading.key
        ]

    assert run(resume=True) == run(resume=False)


def test_a_resume_with_other_parameters_begins_the_windows_anew():
    model, memory = network(), MemoryRecorder()
    optimizer = sgd([{"params": model.parameters()}])
    monitor = Monitor(model, optimizer, [verified()], recorders=[memory], on_error="raise")
    for step in range(41):
        if step == 15:
            model[0].requires_grad_(False)
        if step == 25:  # what was frozen in the run before is not trained in this one at all
            state = monitor.state_dict()
            monitor.close()
            monitor = Monitor(model, optimizer, [verified()], recorders=[memory], on_error="raise")
            with pytest.warns(MeasurementWarning, match=r"anew: fdr \(other parameters are read together\)"):
                monitor.load_state_dict(state)
        x, y = batch(step)
        with monitor.micro_batch(x, y):
            F.cross_entropy(model(x), y).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    assert sorted(series(memory, "residual")) == [10, 20, 40]  # a window begins at 30
    assert max(map(abs, series(memory, "residual").values())) < 1e-9


def test_tied_parameters_are_counted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.second.weight = self.first.weight
            self.double()

        def forward(self, x):
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    model = Tied()
    memory = train(model, sgd(model.parameters()), [verified()], layers=True)
    assert sections_of(memory) == {"layer.first", "layer.second", "layer.head"}
    norm = sum(float(p.detach().square().sum()) for p in model.parameters())
    assert series(memory, "weight_norm_sq")[40] == pytest.approx(norm, rel=1e-12)
    assert series(memory, "weight_norm_sq/layer.second")[40] == pytest.approx(
        float(model.second.bias.detach().square().sum()), rel=1e-12
    )
    for name in ("residual", "residual/layer.first", "residual/layer.second"):
        assert max(map(abs, series(memory, name).values())) < 1e-9


@pytest.mark.parametrize("centred", [False, True])
def test_parameters_outside_the_model_are_measured_and_survive_a_resume(centred):
    def run(resume_at):
        model, memory = network(), MemoryRecorder()
        temperature = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
        optimizer = sgd([{"params": [*model.parameters(), temperature]}])
        observable = FluctuationDissipation(schedule=5, sampling=1, estimator=Mean(), centred=centred)

        def build():
            return Monitor(model, optimizer, [observable], recorders=[memory], on_error="raise", layers=True)

        monitor = build()
        for step in range(31):
            if step == resume_at:
                state = monitor.state_dict()
                monitor.close()
                monitor = build()
                monitor.load_state_dict(state)
            x, y = batch(step)
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x) * temperature, y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
        monitor.close()
        assert series(memory, "weight_norm_sq/layer.other")[30] == pytest.approx(
            float(temperature.detach().square().sum()), rel=1e-12
        )
        return series(memory, "left/layer.other")

    assert run(resume_at=12) == run(resume_at=None)


def test_an_optimizer_whose_parameters_are_all_frozen_for_now_does_no_harm():
    model = network()
    optimizer = sgd(model[4].parameters())
    model[4].requires_grad_(False)

    def thaw(step, model, optimizer):
        if step == 12:
            model[4].requires_grad_(True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory = train(model, optimizer, [verified()], before=thaw)
    assert sorted(series(memory, "ratio")) == [10, 30, 40]
    assert math.isnan(series(memory, "ratio").pop(10))  # nothing moves
    assert max(abs(series(memory, "residual")[step]) for step in (30, 40)) < 1e-9
