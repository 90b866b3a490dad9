"""Controllers under Lightning: rates, accumulation, resumption, and what cannot be acted on."""

from dataclasses import dataclass
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset

from gradiometer import (
    Controller,
    EquilibriumLR,
    GrowingBatchSampler,
    NoiseScaleBatchSize,
    Observable,
    Quantity,
)
from gradiometer.callbacks import DynamicsMonitor
from gradiometer.control import Effect
from gradiometer.errors import InputError, MeasurementWarning
from gradiometer.record.readings import Decision

BATCH, EXAMPLES = 8, 80
GENERATOR = torch.Generator().manual_seed(3)
DATA = TensorDataset(
    torch.randn(EXAMPLES, 5, generator=GENERATOR), torch.randint(3, (EXAMPLES,), generator=GENERATOR)
)


class Module(pl.LightningModule):
    """A linear model that notes the gradient and the rate of each of its steps."""

    def __init__(self, scheduler=None, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(5, 3)
        self.scheduler, self.lr = scheduler, lr
        self.gradients, self.rates, self.sizes = [], [], []
        self.seen = 0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        self.seen += len(x)
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, index):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.net.weight.grad.clone())
        self.sizes.append(self.seen)
        self.seen = 0

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=0.05)
        sgd.register_step_post_hook(lambda *_: self.rates.append(sgd.param_groups[0]["lr"]))
        if self.scheduler is None:
            return sgd
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": self.scheduler(sgd), "interval": "step"}}


@dataclass(frozen=True, kw_only=True)
class Clock(Observable):
    group = "clock"
    quantities: ClassVar = {"step": Quantity("steps", "What time it is.")}

    def levels(self, snapshot):
        return {"step": torch.tensor(float(snapshot.step))}

    def readings(self, now, reference):
        return {"step": now["step"]}


@dataclass(frozen=True)
class Doubling(Controller):
    """Accumulates over twice as many micro-batches from step 3 on, and again from step 7 on."""

    knobs = ("batch_size",)
    dry_run: bool = False

    def observables(self):
        return (Clock(schedule=1),)

    @property
    def accumulates(self):
        return True

    def start(self):
        return {"next": 2, "accumulation": 1}

    def effect(self, state):
        return Effect({}, state["accumulation"] if state["accumulation"] > 1 else None)

    def decide(self, view, state):
        factor = 2.0 if view.step in (2, 6) else 1.0
        decision = Decision(view.step, "Doubling", "batch_size", "the time", {}, view.batch_size, factor)
        after = {"next": view.step + 1, "accumulation": state["accumulation"] * int(factor)}
        return [decision], after, ""


def loader(**more):
    return DataLoader(DATA, BATCH, **more)


def fit(
    module,
    controllers,
    folder,
    loaders=None,
    *,
    ckpt_path=None,
    callbacks=(),
    val_dataloaders=None,
    **arguments,
):
    callback = DynamicsMonitor([], controllers=controllers, print_table=False)
    trainer = pl.Trainer(
        **{"max_epochs": 4, "logger": False, "enable_checkpointing": False} | arguments,
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[callback, *callbacks],
    )
    train = loaders if loaders is not None else loader()
    trainer.fit(module, train, val_dataloaders, ckpt_path=ckpt_path)
    return trainer, callback


def eager(**more):
    return EquilibriumLR(policy="yaida", tolerance=5.0, factor=0.5, check_every=100, **more)


@pytest.mark.slow
def test_the_rate_is_lowered_under_a_schedule_and_shown_as_both_wrote_it(tmp_path):
    def warm(sgd):
        return torch.optim.lr_scheduler.LinearLR(sgd, 0.5, total_iters=20)

    plain = Module(warm)
    fit(plain, [], tmp_path, max_epochs=130)
    module, rates = Module(warm), LearningRateMonitor("step")
    logger = TensorBoardLogger(tmp_path, "run")
    trainer, callback = fit(module, [eager()], tmp_path, max_epochs=130, logger=logger, callbacks=[rates])
    drops = [decision.step for decision in callback.monitor.decisions if decision.acted]
    assert drops
    factors = [0.5 ** sum(step > drop for drop in drops) for step in range(len(plain.rates))]
    ratio = [ours / theirs for ours, theirs in zip(module.rates, plain.rates, strict=True)]
    assert ratio == pytest.approx(factors)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)
    events = EventAccumulator(logger.log_dir, {"scalars": 0}).Reload()
    assert all(event.value == pytest.approx(0.1) for event in events.Scalars("lr-SGD")[30:])
    in_force = {event.step: event.value for event in events.Scalars("dynamics/control/learning_rate")}
    assert in_force[max(in_force)] == pytest.approx(0.1 * factors[-1])
    assert "dynamics/control/EquilibriumLR/changes/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.filterwarnings("ignore:the checkpoint was saved .* batches into an epoch")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("at", [1200, 1203])
def test_resumed_in_lightning_it_decides_the_same(tmp_path, at):
    whole = Module()
    _, reference = fit(whole, [eager()], tmp_path, max_steps=1500, max_epochs=-1)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=at, save_top_k=-1)
    fit(
        Module(),
        [eager()],
        tmp_path,
        max_steps=at,
        max_epochs=-1,
        callbacks=[saving],
        enable_checkpointing=True,
    )
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    module = Module()
    _, resumed = fit(module, [eager()], tmp_path, max_steps=1500, max_epochs=-1, ckpt_path=path)
    assert any(decision.acted for decision in reference.monitor.decisions)
    if at % (EXAMPLES // BATCH) == 0:  # else the epoch is replayed with other batches
        assert resumed.monitor.decisions == reference.monitor.decisions
        assert torch.equal(module.net.weight, whole.net.weight)
    first = [d for d in resumed.monitor.decisions if d.step < at]
    assert first == [d for d in reference.monitor.decisions if d.step < at]
    assert any(decision.acted for decision in first)
    assert module.rates[0] == whole.rates[at] < module.lr


@dataclass(frozen=True)
class Tenth(Controller):
    """Lowers the rate to a tenth after step 20."""

    knobs = ("learning_rate",)
    dry_run: bool = False

    def observables(self):
        return (Clock(schedule=1),)

    def start(self):
        return {"next": 20, "factor": 1.0}

    def effect(self, state):
        return Effect({"": state["factor"]})

    def decide(self, view, state):
        factor = 0.1 if view.step == 20 else 1.0
        made = Decision(view.step, "Tenth", "learning_rate", "the time", {}, view.groups[0].lr, factor)
        return [made], {"next": view.step + 1, "factor": state["factor"] * factor}, ""


class OwnSchedule(Module):
    """Sets its rate by hand, in one of the places where scripts do."""

    def __init__(self, where):
        super().__init__()
        self.where, self.seen_rates = where, []

    def turn(self, where):
        if where == self.where:
            (group,) = self.trainer.optimizers[0].param_groups
            self.seen_rates.append(group["lr"])
            group["lr"] *= 0.99

    def training_step(self, batch, index):
        self.turn("training step")
        return super().training_step(batch, index)

    def on_before_zero_grad(self, optimizer):
        self.turn("before zero grad")

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.turn("before optimizer step")

    def on_train_batch_start(self, batch, index):
        self.turn("batch start")


@pytest.mark.parametrize(
    "where", ["training step", "before zero grad", "before optimizer step", "batch start"]
)
def test_a_script_that_sets_its_rate_by_hand_finds_what_it_wrote(where, tmp_path):
    module = OwnSchedule(where)
    fit(module, [Tenth()], tmp_path, max_steps=40, max_epochs=-1)
    assert module.seen_rates == pytest.approx([0.1 * 0.99**step for step in range(40)])
    factors = [1.0] * 21 + [0.1] * 19
    assert module.rates == pytest.approx([0.1 * 0.99 ** (s + 1) * f for s, f in enumerate(factors)])


def test_a_second_run_of_the_same_callback_begins_anew_and_a_longer_one_goes_on(tmp_path):
    callback = DynamicsMonitor([], controllers=[Tenth()], print_table=False)
    module = Module()

    def trainer(steps):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        plain = {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "max_epochs": -1}
        return pl.Trainer(max_steps=steps, callbacks=[callback], default_root_dir=tmp_path, **quiet, **plain)

    first = trainer(30)
    first.fit(module, loader())
    first.fit_loop.epoch_loop.max_steps = 35
    first.fit(module, loader())
    assert module.rates[-5:] == pytest.approx([0.01] * 5)
    trainer(10).fit(module, loader())
    assert module.rates[-10:] == [0.1] * 10


def by_hand(module, windows):
    """Steps over these numbers of micro-batches and with these divisors of the loss."""
    sgd = module.configure_optimizers()
    batches = [batch for _ in range(20) for batch in loader()]
    for parts, divisor in windows:
        for _ in range(parts):
            x, y = batches.pop(0)
            (F.cross_entropy(module(x), y) / divisor).backward()
        sgd.step()
        sgd.zero_grad()
    return module


def test_accumulation_grows_between_two_windows_and_no_gradient_is_mixed(tmp_path):
    module = Module()
    trainer, callback = fit(module, [Doubling()], tmp_path, max_steps=9, max_epochs=-1)
    assert trainer.accumulate_grad_batches == 4
    sizes = [size // BATCH for size in module.sizes]
    assert sizes == [1, 1, 1, 1, 2, 2, 2, 4, 4]  # from batch 4 on, a multiple of 2, and the next epoch
    reference = by_hand(Module(), zip(sizes, sizes, strict=True))
    assert torch.equal(module.net.weight, reference.net.weight)
    assert [int(d.after) for d in callback.monitor.decisions if d.acted] == [16, 32]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resumed_accumulation_goes_on_as_it_was(tmp_path):
    saving = ModelCheckpoint(
        tmp_path / "saved", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
    )
    fit(Module(), [Doubling()], tmp_path, max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    path = sorted((tmp_path / "saved").glob("*.ckpt"))[-1]
    module = Module()
    trainer, callback = fit(module, [Doubling()], tmp_path, max_epochs=3, ckpt_path=path)
    assert callback.monitor.accumulation == trainer.accumulate_grad_batches == 4
    assert [size // BATCH for size in module.sizes] == [4, 4, 2]


def test_a_strategy_that_accumulates_by_itself_is_refused(tmp_path, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
    with pytest.raises(InputError, match=r"SingleDeviceStrategy\. Give it a sampler="):
        fit(Module(), [Doubling()], tmp_path)
    fit(Module(), [eager()], tmp_path, max_steps=2)


def test_a_scheduler_of_accumulation_is_refused(tmp_path):
    with pytest.raises(InputError, match="something else does, got GradientAccumulationScheduler"):
        fit(Module(), [Doubling()], tmp_path, callbacks=[GradientAccumulationScheduler({1: 2})])


@dataclass(frozen=True)
class Growing(Controller):
    """Doubles a sampler's batches after steps 14 and 17."""

    sampler: GrowingBatchSampler
    knobs = ("batch_size",)
    dry_run: bool = False

    def observables(self):
        return (Clock(schedule=1),)

    def start(self):
        return {"next": 14, "size": BATCH}

    def effect(self, state):
        return Effect({})

    def apply(self, state):
        self.sampler.batch_size = state["size"]

    def decide(self, view, state):
        factor = 2.0 if view.step in (14, 17) else 1.0
        made = Decision(view.step, "Growing", "batch_size", "the time", {}, view.batch_size, factor)
        return [made], {"next": view.step + 1, "size": int(state["size"] * factor)}, ""


def growing(workers=0):
    sampler = GrowingBatchSampler(SequentialSampler(DATA), BATCH)
    several = {"num_workers": workers, "prefetch_factor": 1} if workers else {}
    return Growing(sampler), DataLoader(DATA, batch_sampler=sampler, **several)


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_goes_on_in_every_epoch_after_the_batch_has_grown(tmp_path, workers):
    controller, train = growing(workers)
    epochs = []
    module = Module()
    module.on_validation_end = lambda: epochs.append(module.current_epoch)
    held_out = DataLoader(DATA, EXAMPLES)
    trainer, _ = fit(
        module, [controller], tmp_path, train, max_epochs=5, num_sanity_val_steps=0, val_dataloaders=held_out
    )
    assert epochs == [0, 1, 2, 3, 4]
    assert trainer.num_training_batches == 3  # 80 examples in batches of 32
    assert module.sizes[-3:] == [32, 32, 16]
    assert sum(module.sizes) == 5 * EXAMPLES  # nothing lost, nothing twice


@pytest.mark.parametrize(
    ("limit", "interval", "validations"),
    [
        (0.5, 1.0, [5, 10, 15, 17, 19]),
        (8, 1.0, [8, 16, 20, 23, 26]),
        (1.0, 0.5, [5, 10, 15, 18, *range(19, 28)]),
        (1.0, 8, [8, 18, 21, 24, 27]),
    ],
)
def test_limits_and_intervals_count_the_batches_there_are(tmp_path, limit, interval, validations):
    controller, train = growing()
    found = []
    module = Module()
    module.on_validation_end = lambda: found.append(module.global_step)
    fit(
        module,
        [controller],
        tmp_path,
        train,
        max_epochs=5,
        num_sanity_val_steps=0,
        limit_train_batches=limit,
        val_check_interval=interval,
        val_dataloaders=DataLoader(DATA, EXAMPLES),
    )
    assert found == validations


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_begins_with_the_batch_there_was(tmp_path, workers):
    controller, train = growing(workers)
    saving = ModelCheckpoint(
        tmp_path / "saved", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
    )
    fit(Module(), [controller], tmp_path, train, max_epochs=3, callbacks=[saving], enable_checkpointing=True)
    path = sorted((tmp_path / "saved").glob("epoch=2*.ckpt"))[-1]
    controller, train = growing(workers)
    module = Module()
    fit(module, [controller], tmp_path, train, max_epochs=4, ckpt_path=path)
    assert module.sizes == [32, 32, 16]


def test_a_loader_with_a_sampler_of_its_own_is_refused(tmp_path):
    sampler = GrowingBatchSampler(RandomSampler(DATA), BATCH)
    with pytest.raises(InputError, match="does not draw its batches from the sampler"):
        fit(Module(), [NoiseScaleBatchSize(sampler=sampler)], tmp_path)


def test_a_stream_without_length_is_refused_with_what_to_write(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(DATA)

    with pytest.raises(InputError, match="max_batch_size=1024"):
        fit(Module(), [NoiseScaleBatchSize()], tmp_path, DataLoader(Stream(), BATCH))
    stream = DataLoader(Stream(), BATCH)
    fit(Module(), [NoiseScaleBatchSize(max_batch_size=32), eager()], tmp_path, stream, max_steps=3)


class TwoOptimizers(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([parameter], lr=0.1) for parameter in self.parameters()]


def test_several_optimizers_are_left_alone_with_a_warning(tmp_path):
    with pytest.warns(MeasurementWarning, match="got 2: the monitor and its controllers are off"):
        _, callback = fit(TwoOptimizers(), [eager()], tmp_path, max_epochs=1)
    assert callback.monitor is None


def test_two_controllers_on_one_knob_are_refused_before_training():
    with pytest.raises(InputError, match="one knob"):
        DynamicsMonitor(controllers=[eager(), EquilibriumLR()])
    with pytest.raises(InputError, match="controllers must be a list"):
        DynamicsMonitor(controllers=eager())


def test_a_configuration_file_can_hold_a_controller(tmp_path, monkeypatch):
    file = tmp_path / "given.yaml"
    file.write_text(
        """
seed_everything: 0
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: gradiometer.callbacks.DynamicsMonitor
      init_args:
        observables: []
        print_table: false
        controllers:
          - class_path: gradiometer.EquilibriumLR
            init_args:
              policy: yaida
              factor: 0.3
"""
    )
    monkeypatch.chdir(tmp_path)  # where the command line saves what it was given
    monkeypatch.setattr("sys.argv", ["train", "fit", "--config", str(file)])
    cli = LightningCLI(Plain, Loaders)
    (callback,) = (one for one in cli.trainer.callbacks if isinstance(one, DynamicsMonitor))
    assert callback.session.controllers == [EquilibriumLR(policy="yaida", factor=0.3)]


class Plain(Module):
    def __init__(self):
        super().__init__()


class Loaders(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()
