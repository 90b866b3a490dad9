"""Stop, save, load into fresh objects, and the readings go on as if nothing had happened."""

import io
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from gradiometer import (
    Ema,
    FluctuationDissipation,
    GradientNoiseScale,
    HalfRun,
    JacobianNorm,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
    Observable,
    Quantity,
    Window,
)
from gradiometer.callbacks import DynamicsMonitor
from gradiometer.errors import MeasurementWarning

from ..hooks import standing

STEPS = 13


@dataclass(frozen=True, kw_only=True)
class GradientNorm(Observable):
    """A statistic that an exponential average is taken of, sampled more often than recorded."""

    group = "own"
    quantities = {"norm": Quantity("loss^2/parameter^2", "Squared norm of the batch gradient.")}
    needs = frozenset({"gradient_parts"})

    def statistics(self, snapshot):
        return {"norm": snapshot.gradient_parts.batch_sq_norm}

    def readings(self, now, reference):
        return {"norm": now["norm"]}


@dataclass(frozen=True, kw_only=True)
class WeightNorm(Observable):
    """The same over half the run, with a level."""

    group = "weights"
    quantities = {
        "mean": Quantity("parameter^2", "Mean squared norm."),
        "moved": Quantity("parameter^2", "Change of the squared norm in the window."),
    }
    needs = frozenset({"update"})
    level_needs = frozenset({"weights"})

    def statistics(self, snapshot):
        return {"moved": snapshot.update.displacement_sq}

    def levels(self, snapshot):
        return {"norm": snapshot.weights.sq_norm}

    def readings(self, now, reference):
        path = reference.path["norm"].sum(1)
        moved = {"moved": now["moved"].sum(-1)} if "moved" in now else {}
        return {"mean": path.mean(), **moved}


def observables():
    return [
        NeuralTangentKernel(schedule=3, num_projections=2),
        JacobianNorm(schedule=2, num_projections=2),
        GradientNoiseScale(schedule=2, estimator=Window(6)),
        FluctuationDissipation(schedule=4, sampling=2),
        GradientNorm(schedule=3, sampling=1, estimator=Ema(0.7)),
        WeightNorm(schedule=2, sampling=1, estimator=HalfRun()),
    ]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batch(step, size=12):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (size,), generator=generator)


MAKE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def plain(name, parts, saved=None, stop=STEPS):
    """Train from ``saved`` to ``stop``; the records, and a checkpoint in bytes after each step."""
    checkpoints = []
    model, memory = network(), MemoryRecorder()
    optimizer = MAKE[name](model.parameters())
    with Monitor(
        model,
        optimizer,
        observables(),
        recorders=[memory],
        dataset_size=500,
        probe_size=6,
        on_error="raise",
    ) as monitor:
        if saved is not None:
            state = torch.load(io.BytesIO(saved), weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            monitor.load_state_dict(state["monitor"])
        for step in range(monitor.step, stop):
            x, y = batch(step)
            for one, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                with monitor.micro_batch(one, target):
                    (F.cross_entropy(model(one), target) / parts).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
            buffer = io.BytesIO()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "monitor": monitor.state_dict(),
            }
            torch.save(state, buffer)
            checkpoints.append(buffer.getvalue())
    return memory.records, checkpoints


def flat(records):
    """Every value and error but those of the cost, arrays included."""
    return [
        (step, r.key, np.asarray(r.value), r.stderr, r.note, r.unit)
        for step, readings in records
        for r in readings
        if r.key.split("/")[1] != "cost"
    ]


def assert_bit_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a[:2] == b[:2]
        assert a[4:] == b[4:]
        assert np.array_equal(a[2], b[2], equal_nan=True), (a[:2], a[2] - b[2])
        assert np.array_equal(a[3], b[3], equal_nan=True), (a[:2], a[3], b[3])


def leaves_equal(left, right):
    a, b = pytree.tree_flatten(left), pytree.tree_flatten(right)
    assert a[1] == b[1]
    return all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a[0], b[0], strict=True)
    )


@pytest.mark.parametrize(("name", "parts"), [("sgd", 1), ("sgd", 2), ("nesterov", 1), ("adamw", 2)])
def test_plain_loop_resumes_at_any_step_to_the_last_bit(name, parts):
    whole, checkpoints = plain(name, parts)
    assert {r.key.split("/")[1] for _, readings in whole for r in readings} == {
        *("ntk", "jacobian", "noise", "fdr", "own", "weights", "cost")
    }
    end = torch.load(io.BytesIO(checkpoints[-1]), weights_only=True)
    for stop in range(1, STEPS):
        after, finished = plain(name, parts, saved=checkpoints[stop - 1])
        assert_bit_equal(flat(after), [each for each in flat(whole) if each[0] >= stop])
        assert leaves_equal(torch.load(io.BytesIO(finished[-1]), weights_only=True), end)


def test_drift_is_measured_from_the_first_kernel_of_the_run():
    def value(records, at, name):
        readings = next(readings for step, readings in records if step == at)
        (found,) = [r.value for r in readings if r.key == f"dynamics/ntk/{name}"]
        return found

    whole, checkpoints = plain("sgd", 1)
    after, _ = plain("sgd", 1, saved=checkpoints[7])
    drift, kernel, first = value(after, 9, "drift"), value(after, 9, "kernel"), value(whole, 0, "kernel")
    assert drift == pytest.approx(np.linalg.norm(kernel - first) / np.linalg.norm(first), rel=1e-12)
    assert drift > 0


def test_the_state_is_tensors_and_plain_values_only():
    _, checkpoints = plain("adamw", 2, stop=9)
    state = torch.load(io.BytesIO(checkpoints[-1]), weights_only=True)["monitor"]
    kinds = {type(leaf) for leaf in pytree.tree_leaves(state)}
    assert kinds <= {torch.Tensor, int, float, bool, str, type(None)}


def test_a_saved_state_does_not_change_while_training_goes_on():
    model = network()
    optimizer = MAKE["sgd"](model.parameters())
    with Monitor(model, optimizer, observables(), dataset_size=500) as monitor:
        state = kept = None
        for step in range(9):
            x, y = batch(step)
            with monitor.micro_batch(x, y):
                F.cross_entropy(model(x), y).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
            if step == 5:
                state = monitor.state_dict()
                buffer = io.BytesIO()
                torch.save(state, buffer)
                kept = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert leaves_equal(state, kept)


# -- Lightning -------------------------------------------------------------------------------------

PER_EPOCH = 5


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return MAKE["sgd"](self.parameters())


class Loader:
    """A loader that remembers where it is, as torchdata's StatefulDataLoader does."""

    def __init__(self):
        self.position = 0
        self.dataset = range(500)

    def __len__(self):
        return PER_EPOCH

    def __iter__(self):
        while self.position < PER_EPOCH:
            self.position += 1
            yield batch(self.position)
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def stock():
    return torch.utils.data.DataLoader([batch(i) for i in range(1, PER_EPOCH + 1)], batch_size=None)


class Kept(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.lines = []

    name = "kept"
    version = 0

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def readings(self):
        return [
            (step, key, float(value).hex())
            for step, metrics in self.lines
            for key, value in metrics.items()
            if key.startswith("dynamics/") and not key.startswith("dynamics/cost")
        ]


class Peek(Callback):
    """The monitor's state when training starts."""

    def __init__(self, monitor):
        self.monitor, self.state = monitor, None

    def on_train_start(self, trainer, pl_module):
        self.state = self.monitor.monitor.state_dict()


class Save(Callback):
    """Saves a checkpoint where Lightning's own ModelCheckpoint does, without a state of its own."""

    def __init__(self, path, step=None, epoch_end=False):
        self.path, self.step, self.epoch_end = path, step, epoch_end

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step and not self.epoch_end:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, *args):
        if trainer.global_step == self.step and self.epoch_end:
            trainer.save_checkpoint(self.path)


def fit(loader, *callbacks, resume=None, **length):
    """Train; what was logged, and the state that training began with."""
    monitor, logger = DynamicsMonitor(observables(), probe_size=6, print_table=False), Kept()
    peek = Peek(monitor)
    trainer = pl.Trainer(
        **(length or {"max_steps": 13}),
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor, peek, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader, ckpt_path=resume, weights_only=True)
    return logger.readings(), peek.state


def saved_state(path):
    states = torch.load(path, weights_only=True)["callbacks"]
    return next(state for key, state in states.items() if key.startswith("DynamicsMonitor"))


@pytest.mark.parametrize("stop", [2, 7, 10])
def test_lightning_resumes_in_the_middle_of_an_epoch_with_a_loader_that_can(tmp_path, stop):
    path = tmp_path / "stopped.ckpt"
    whole, _ = fit(Loader(), Save(path, stop))
    after, state = fit(Loader(), resume=path)
    assert after == [line for line in whole if line[0] >= stop]
    assert len(after) > 20
    assert leaves_equal(state, saved_state(path)["monitor"])


def test_lightning_resumes_at_the_end_of_an_epoch_with_a_stock_loader(tmp_path):
    # under max_steps= alone, Lightning 2.6 replays one batch when it resumes from an epoch's end
    path = tmp_path / "stopped.ckpt"
    whole, _ = fit(stock(), Save(path, PER_EPOCH, epoch_end=True), max_epochs=3)
    after, state = fit(stock(), resume=path, max_epochs=3)
    assert after == [line for line in whole if line[0] >= PER_EPOCH]
    assert len(after) > 20
    assert leaves_equal(state, saved_state(path)["monitor"])


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_lightning_in_the_middle_of_an_epoch_with_a_stock_loader_goes_on_from_the_state_and_says_so(
    tmp_path,
):
    path = tmp_path / "stopped.ckpt"
    fit(stock(), Save(path, 7))
    with pytest.warns(MeasurementWarning, match="replayed") as caught:
        after, state = fit(stock(), resume=path)
    assert leaves_equal(state, saved_state(path)["monitor"])
    ours = [str(each.message) for each in caught if issubclass(each.category, MeasurementWarning)]
    assert len(ours) == 1
    assert "saved 2 batches into an epoch" in ours[0]
    assert "readings go on from the saved state" in ours[0]
    assert min(step for step, _, _ in after) >= 7


def test_a_second_fit_of_one_trainer_goes_on(tmp_path):
    monitor, logger = DynamicsMonitor(observables(), probe_size=6, print_table=False), Kept()
    module = Module()
    trainer = pl.Trainer(
        max_steps=5,
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, stock())
    first = monitor.state_dict()["monitor"]["observables"]["ntk"]["estimator"]["first"]
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 3, 10
    trainer.fit(module, stock())
    second = monitor.state_dict()["monitor"]["observables"]["ntk"]["estimator"]["first"]
    assert leaves_equal(first, second)
    assert max(step for step, _, _ in logger.readings()) > 5
    assert standing(module) == 0
