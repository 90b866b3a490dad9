"""Which gradient a Lightning run is measured by: holes in windows, manual optimization, clips, step axes."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradiometer import GradientNoiseScale, JacobianNorm
from gradiometer.callbacks import DynamicsMonitor
from gradiometer.errors import MeasurementWarning
from gradiometer.stats.estimators import Last

BATCH = 8


class Kept(Logger):
    name, version = "kept", "0"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def series(self, key):
        return [(step, row[key]) for step, row in self.rows if key in row]


class Module(pl.LightningModule):
    """Keeps the right trace of each step: that of the single examples, or of the micro-batches it used."""

    def __init__(self, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.automatic_optimization = not manual
        self.used, self.right = [], []

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def note(self):
        """The right trace at these weights, from the batches in ``used``."""
        parts = self.used
        if len(parts) == 1:
            parts = list(zip(parts[0][0].split(1), parts[0][1].split(1), strict=True))
        rows = []
        for part in parts:
            gradient = torch.autograd.grad(self.loss(part), list(self.net.parameters()))
            rows.append(torch.cat([g.flatten() for g in gradient]))
        self.right.append(float(len(parts[0][0]) * torch.stack(rows).var(0).sum()))
        self.used = []

    def training_step(self, batch, index):
        self.used.append(batch)
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer):
        self.note()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(module, observables=None, callbacks=(), batches=12, **settings):
    generator = torch.Generator().manual_seed(3)
    size = batches * BATCH
    data = TensorDataset(
        torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator)
    )
    logger = Kept()
    observables = observables or [GradientNoiseScale(schedule=1, estimator=Last())]
    monitor = DynamicsMonitor(observables=observables, print_table=False)
    pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        callbacks=[*callbacks, monitor],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        **settings,
    ).fit(module, DataLoader(data, BATCH))
    return logger


def traces(logger):
    return [value for _, value in logger.series("dynamics/noise/trace")]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        yield


@pytest.mark.parametrize("empty", [{0}, {1}, {2}, {0, 3}, {2, 3}])
def test_windows_with_batches_that_return_nothing(empty):
    class Holes(Module):
        def training_step(self, batch, index):
            return None if index % 4 in empty else super().training_step(batch, index)

    module = Holes()
    logger = fit(module, accumulate_grad_batches=4)
    assert traces(logger) == pytest.approx(module.right, rel=1e-4)


def test_a_window_without_any_batch_is_no_sample():
    class Hole(Module):
        def training_step(self, batch, index):
            return None if 3 <= index < 6 else super().training_step(batch, index)

        def on_before_optimizer_step(self, optimizer):
            if self.used:
                self.note()

    module = Hole()
    with pytest.warns(MeasurementWarning, match="no parameter has a gradient at this step"):
        logger = fit(module, accumulate_grad_batches=3)
    assert traces(logger) == pytest.approx(module.right, rel=1e-4)


def test_a_short_last_window():
    module = Module()
    logger = fit(module, accumulate_grad_batches=5)  # 5, 5 and 2
    assert traces(logger) == pytest.approx(module.right, rel=1e-4)


def clipped_by_the_module(self):
    self.clip_gradients(self.optimizers(), gradient_clip_val=0.01, gradient_clip_algorithm="norm")


def clipped_by_hand(self):
    nn.utils.clip_grad_norm_(self.parameters(), 0.01)


@pytest.mark.parametrize("clip", [clipped_by_the_module, clipped_by_hand])
def test_clips_of_manual_optimization_are_undone(clip):
    class Manual(Module):
        def training_step(self, batch, index):
            self.optimizers().zero_grad()
            self.used.append(batch)
            self.manual_backward(self.loss(batch))
            clip(self)
            self.optimizers().step()

    module = Manual(manual=True)
    assert traces(fit(module)) == pytest.approx(module.right, rel=1e-4)


def test_a_clip_after_the_backward_pass_is_undone():
    class Clips(Module):
        def on_after_backward(self):
            nn.utils.clip_grad_norm_(self.parameters(), 0.01)

    module = Clips()
    assert traces(fit(module)) == pytest.approx(module.right, rel=1e-4)


def test_a_clip_of_another_callback_is_undone():
    class Clip(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            nn.utils.clip_grad_norm_(module.parameters(), 0.01)

    module = Module()
    assert traces(fit(module, callbacks=[Clip()])) == pytest.approx(module.right, rel=1e-4)


class Steps(Module):
    """Several steps in each batch, or one in several batches."""

    def __init__(self, in_a_batch=1, batches=1):
        super().__init__(manual=True)
        self.in_a_batch, self.batches = in_a_batch, batches

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        for _ in range(self.in_a_batch):
            if index % self.batches == 0:
                optimizer.zero_grad()
            self.used.append(batch)
            loss = self.loss(batch)
            self.manual_backward(loss / self.batches)
            if (index + 1) % self.batches == 0:
                optimizer.step()
        self.log("loss", loss)


@pytest.mark.parametrize(("in_a_batch", "batches"), [(1, 1), (2, 1), (3, 1), (1, 2), (1, 4)])
def test_readings_stand_beside_the_loss_of_their_batch(in_a_batch, batches):
    module = Steps(in_a_batch, batches)
    if in_a_batch > 1:  # the first batch shows that there are several steps
        with pytest.warns(MeasurementWarning, match="no batch of training_step was seen"):
            logger = fit(module)
    else:
        logger = fit(module)
    at = [step for step, _ in logger.series("dynamics/noise/trace")]
    losses = [step for step, _ in logger.series("loss")]
    assert set(at) <= set(losses)
    assert losses[-1] - at[-1] == batches - 1
    seen = [right for number, right in enumerate(module.right) if not 0 < number < in_a_batch]
    assert traces(logger) == pytest.approx(seen, rel=1e-4)


def test_a_cadence_counts_the_steps_of_the_optimizer():
    logger = fit(Steps(1, 2), [JacobianNorm(schedule=2)])
    assert [step for step, _ in logger.series("dynamics/jacobian/frobenius_norm")] == [0, 4, 8]
