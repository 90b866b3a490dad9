"""What a measurement could trip over: a clear message or a number, and the run is as it was."""

import copy
import math
import warnings
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    Mean,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    Observable,
    Quantity,
)
from gradiometer.adapters.batches import dataset_size_of, replacement_of
from gradiometer.callbacks import DynamicsMonitor
from gradiometer.errors import InputError


def network():
    return nn.Sequential(nn.Linear(5, 8, bias=False), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()


class Tokens(nn.Module):
    """A table whose gradient is sparse, and a head."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5, sparse=True), nn.Linear(5, 3)
        self.double()

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1))


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | settings))


def pairs(step, size=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def sentences(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(7, (8, 4), generator=generator), torch.randint(3, (8,), generator=generator)


def everything():
    return [
        NeuralTangentKernel(schedule=3),
        JacobianNorm(schedule=3),
        GradientNoiseScale(schedule=3),
        FluctuationDissipation(schedule=3, verify=True, estimator=Mean()),
    ]


class NoMonitor:
    """Stands in the place of a monitor in the run to compare with."""

    def begin_micro_batch(self, x, y):
        pass

    def end_micro_batch(self):
        pass

    def before_step(self):
        pass

    def close(self):
        pass


def plain_step(step, model, optimizer, monitor, batch):
    x, y = batch(step)
    monitor.begin_micro_batch(x, y)
    F.cross_entropy(model(x), y).backward()
    monitor.end_micro_batch()
    monitor.before_step()
    optimizer.step()
    optimizer.zero_grad()


def run(
    one_step=plain_step,
    *,
    make_model=network,
    make_optimizer=sgd,
    batch=pairs,
    steps=25,
    before=None,
    observables=everything,
):
    """The same run with and without a monitor; what was said, and the latest readings."""
    ends, memory, messages = [], MemoryRecorder(), []
    for watched in (False, True):
        torch.manual_seed(0)
        model = make_model()
        optimizer = make_optimizer(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            monitor = (
                Monitor(model, optimizer, observables(), recorders=[memory], dataset_size=1000)
                if watched
                else NoMonitor()
            )
            for step in range(steps):
                if before is not None:
                    before(step, model, optimizer)
                one_step(step, model, optimizer, monitor, batch)
            monitor.close()
        messages = [str(warning.message) for warning in caught]
        ends.append((copy.deepcopy(model.state_dict()), torch.get_rng_state()))
    (plain, plain_random), (measured, random_state) = ends
    torch.testing.assert_close(measured, plain, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(plain_random, random_state)
    return messages, memory


def residuals(memory):
    return dict(memory.series("dynamics/fdr/residual"))


def finite(memory):
    """Groups with a finite reading."""
    return {key.split("/")[1] for key, reading in memory.latest().items() if reading.is_finite}


ALL = {"ntk", "jacobian", "noise", "fdr", "cost"}


# -- the optimizer ---------------------------------------------------------------------------------


def test_a_state_that_is_cleared_halfway():
    def clear(step, model, optimizer):
        if step == 13:
            optimizer.state.clear()

    messages, memory = run(before=clear)
    assert messages == []
    assert finite(memory) == ALL
    found = residuals(memory)
    assert max(abs(found[step]) for step in (3, 6, 9, 12)) < 1e-9
    assert abs(found[24]) > 1e-3  # velocity was lost: what verify=True is for


def closure_step(step, model, optimizer, monitor, batch):
    x, y = batch(step)

    def closure():
        optimizer.zero_grad()
        monitor.begin_micro_batch(x, y)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        monitor.end_micro_batch()
        monitor.before_step()
        return loss

    optimizer.step(closure)


def test_a_step_that_takes_a_closure():
    messages, memory = run(closure_step)
    plain_messages, plain = run()
    assert messages == plain_messages == []
    for key, reading in plain.latest().items():
        if "cost" not in key and isinstance(reading.value, float):
            assert memory.latest()[key].value == pytest.approx(reading.value, rel=1e-12, nan_ok=True), key


@pytest.mark.slow
def test_a_step_that_calls_its_closure_several_times():
    messages, memory = run(closure_step, make_optimizer=lambda model: torch.optim.LBFGS(model.parameters()))
    assert len(messages) == 1
    assert "LBFGS moves the weights several times in a step" in messages[0]
    assert finite(memory) == ALL - {"fdr"}


@pytest.mark.parametrize("make_optimizer", [sgd, lambda model: torch.optim.AdamW(model.parameters(), lr=0.0)])
def test_a_learning_rate_of_zero(make_optimizer):
    def stop(step, model, optimizer):
        optimizer.param_groups[0]["lr"] = 0.0

    messages, memory = run(make_optimizer=make_optimizer, before=stop, steps=40)
    assert messages == []
    latest = memory.latest()
    for name in ("left", "right"):
        assert latest[f"dynamics/fdr/{name}"].value == 0.0
    assert math.isnan(latest["dynamics/fdr/ratio"].value)
    stationary = latest["dynamics/fdr/stationary"]
    assert math.isnan(stationary.value)
    assert stationary.note.endswith("; the weights do not move")
    assert latest["dynamics/fdr/weight_norm_sq"].value > 0
    assert {"ntk", "jacobian", "noise"} < finite(memory)


@pytest.mark.parametrize("test", ["tolerance", "sasa", "sasa_blocks"])
def test_gradients_that_are_zero(test):
    def one_step(step, model, optimizer, monitor, batch):
        x, y = batch(step)
        monitor.begin_micro_batch(x, y)
        (0.0 * F.cross_entropy(model(x), y)).backward()
        monitor.end_micro_batch()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    messages, memory = run(
        one_step, steps=40, observables=lambda: [FluctuationDissipation(schedule=1, test=test)]
    )
    assert messages == []
    stationary = memory.latest()["dynamics/fdr/stationary"]
    assert math.isnan(stationary.value)
    assert stationary.note.endswith("; the weights do not move")


def test_a_learning_rate_of_zero_in_one_group():
    def make_optimizer(model):
        groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3].parameters()}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    messages, memory = run(make_optimizer=make_optimizer)
    assert messages == []
    assert max(map(abs, residuals(memory).values())) < 1e-9
    latest = memory.latest()
    assert latest["dynamics/fdr/ratio"].value == latest["dynamics/fdr/ratio/1"].value
    assert not any(key.startswith("dynamics/fdr/ratio/0") for key in latest)
    assert latest["dynamics/noise/trace/0.scale_invariant"].is_finite


@pytest.mark.parametrize(
    "settings",
    [{"momentum": 0.0}, {"momentum": 0.9}, {"nesterov": True}],
    ids=["plain", "momentum", "nesterov"],
)
def test_sparse_gradients(settings):
    messages, memory = run(
        make_model=Tokens, make_optimizer=lambda model: sgd(model, **settings), batch=sentences
    )
    assert messages == []
    found = residuals(memory)
    assert sorted(found) == list(range(3, 25, 3))
    assert max(map(abs, found.values())) < 1e-9
    assert memory.latest()["dynamics/noise/trace"].is_finite


def test_a_layer_frozen_and_a_group_added_halfway():
    def change(step, model, optimizer):
        if step == 8:
            model[0].requires_grad_(False)
        if step == 14:
            optimizer.add_param_group({"params": model[3].parameters(), "name": "head", "lr": 0.05})

    def make_optimizer(model):
        return torch.optim.SGD([{"params": [*model[0].parameters(), *model[1].parameters()]}], lr=0.1)

    messages, memory = run(make_optimizer=make_optimizer, before=change)
    assert messages == []
    assert finite(memory) == ALL
    assert max(map(abs, residuals(memory).values())) < 1e-9
    assert memory.latest()["dynamics/fdr/ratio/head"].is_finite


def test_a_group_without_parameters_that_are_trained():
    def freeze(step, model, optimizer):
        if step == 8:
            model.requires_grad_(False)
            model[3].requires_grad_(True)

    def make_optimizer(model):
        groups = [{"params": model[0].parameters()}, {"params": model[3].parameters()}]
        return torch.optim.SGD(groups, lr=0.1)

    messages, memory = run(make_optimizer=make_optimizer, before=freeze)
    assert messages == []
    assert max(map(abs, residuals(memory).values())) < 1e-9


# -- the gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", ["before the guard", "after the guard"])
def test_gradients_that_are_not_finite_and_steps_that_the_user_leaves_out(seen):
    bad = (3, 6, 7, 16)

    def one_step(step, model, optimizer, monitor, batch):
        x, y = batch(step)
        monitor.begin_micro_batch(x, y)
        loss = F.cross_entropy(model(x), y)
        (loss * math.nan if step in bad else loss).backward()
        monitor.end_micro_batch()
        sound = all(parameter.grad.isfinite().all() for parameter in model.parameters())
        if sound or seen == "before the guard":
            monitor.before_step()
        if sound:
            optimizer.step()
        optimizer.zero_grad()

    def often():
        return [GradientNoiseScale(schedule=3, sampling=1) if o.group == "noise" else o for o in everything()]

    messages, memory = run(one_step, observables=often)
    assert messages == []  # a step that was not made has nothing to show
    assert finite(memory) == ALL
    assert max(map(abs, residuals(memory).values())) < 1e-9
    assert max(residuals(memory)) == 18  # 21 steps were made
    _, clean = run(
        steps=25 - len(bad),
        batch=lambda step: pairs([s for s in range(25) if s not in bad][step]),
        observables=often,
    )
    for name in ("left", "right", "ratio", "weight_norm_sq"):
        assert memory.series(f"dynamics/fdr/{name}") == clean.series(f"dynamics/fdr/{name}")


def test_a_run_that_diverges():
    def make_model():
        return nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)).double()

    def one_step(step, model, optimizer, monitor, batch):
        x, _ = batch(step)
        monitor.begin_micro_batch(x, None)
        model(x).square().mean().backward()
        monitor.end_micro_batch()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()

    messages, memory = run(
        one_step,
        make_model=make_model,
        make_optimizer=lambda model: sgd(model, lr=10.0),
        observables=lambda: [FluctuationDissipation(schedule=1), GradientNoiseScale(schedule=1)],
    )
    assert all("the gradient is not finite" in message for message in messages), messages
    norms = [value for _, value in memory.series("dynamics/fdr/weight_norm_sq")]
    assert norms[0] < 100
    assert not math.isfinite(norms[-1])


def test_a_batch_of_one():
    messages, memory = run(batch=lambda step: pairs(step, size=1))
    assert len(messages) == 1
    assert "the noise scale needs at least two parts of a batch" in messages[0]
    assert finite(memory) >= {"ntk", "jacobian", "fdr", "cost"}
    assert max(map(abs, residuals(memory).values())) < 1e-9


def test_a_batch_of_one_under_batch_norm_of_images():
    def make_model():
        return nn.Sequential(
            nn.Unflatten(1, (1, 5)),
            nn.Conv1d(1, 4, 3, bias=False),
            nn.BatchNorm1d(4),
            nn.Flatten(),
            nn.Linear(12, 3),
        ).double()

    messages, memory = run(make_model=make_model, batch=lambda step: pairs(step, size=1))
    assert all("GradientNoiseScale" in message for message in messages), messages
    assert memory.latest()["dynamics/fdr/ratio/0.scale_invariant"].is_finite
    assert max(map(abs, residuals(memory).values())) < 1e-9


# -- the loader ------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Examples without an end."""

    def __iter__(self):
        step = 0
        while True:
            x, y = pairs(step, size=1)
            yield x[0].float(), y[0]
            step += 1


class Lengthless(Stream):
    """As some wrappers of streams do it."""

    def __len__(self):
        raise TypeError("this stream has no length")


@pytest.mark.parametrize("kind", [Stream, Lengthless])
def test_a_loader_without_a_length_has_no_size(kind):
    loader = DataLoader(kind(), batch_size=8)
    assert dataset_size_of(loader) is None
    assert replacement_of(loader) is None


@pytest.mark.parametrize("kind", [Stream, Lengthless])
def test_a_loader_without_a_length_in_lightning(kind):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = network().float()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return sgd(self)

    def fit(*callbacks):
        module = Module()
        trainer = pl.Trainer(
            max_steps=13,
            accelerator="cpu",
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(kind(), batch_size=8))
        return module.state_dict()

    monitor = DynamicsMonitor(everything(), print_table=False, on_error="raise")
    plain, measured = fit(), fit(monitor)
    assert all(torch.equal(tensor, measured[name]) for name, tensor in plain.items())
    latest = monitor.monitor.latest
    assert latest["dynamics/fdr/ratio"].is_finite
    assert latest["dynamics/noise/trace"].is_finite
    assert "dynamics/noise/sgd_scale" not in latest  # it needs the size of the data set


def test_without_the_size_of_the_data_set_everything_else_is_measured():
    torch.manual_seed(0)
    model = network()
    optimizer = sgd(model)
    with Monitor(model, optimizer, everything(), on_error="raise") as monitor:
        for step in range(7):
            plain_step(step, model, optimizer, monitor, pairs)
        latest = monitor.latest
    assert {key.split("/")[1] for key, reading in latest.items() if reading.is_finite} == ALL
    assert "dynamics/noise/sgd_scale" not in latest


def test_an_observable_that_needs_a_field_nobody_supplies_is_refused_at_once():
    @dataclass(frozen=True, kw_only=True)
    class Curious(Observable):
        group = "curious"
        needs = frozenset({"gradients"})
        quantities = {"x": Quantity("1", "Nothing.")}

        def readings(self, now, reference):
            return {}

    model = nn.Linear(2, 1)
    with pytest.raises(InputError, match=r"Curious needs the field 'gradients', and nobody supplies it"):
        Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), [Curious()])
