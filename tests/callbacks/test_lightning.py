"""The Lightning callback on runs that know nothing of it."""

import ast
import csv
import io
import time
import tokenize
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    NeuralTangentKernel,
    Observable,
    Quantity,
    at,
    every,
    log_spaced,
)
from gradiometer.callbacks import DynamicsMonitor
from gradiometer.errors import InputError, MeasurementWarning

from ..hooks import standing

BATCH, EXAMPLES = 8, 48


@dataclass(frozen=True, kw_only=True)
class GradientNorm(Observable):
    """Squared norm of the unclipped gradient of this very step."""

    group = "own"
    quantities = {"norm": Quantity("loss^2/parameter^2", "Squared norm of the batch gradient.")}
    needs = frozenset({"gradient_parts"})

    def statistics(self, snapshot):
        return {"norm": snapshot.gradient_parts.batch_sq_norm}

    def readings(self, now, reference):
        return {"norm": now["norm"]}


def every_step(*more):
    return [
        NeuralTangentKernel(schedule=2),
        JacobianNorm(schedule=2),
        GradientNoiseScale(schedule=1),
        FluctuationDissipation(schedule=2, sampling=1),
        *more,
    ]


class Examples(Dataset):
    """48 examples as pairs, or as mappings."""

    def __init__(self, keys=None):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(EXAMPLES, 5, generator=generator)
        self.y = torch.randint(3, (EXAMPLES,), generator=generator)
        self.keys = keys

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, i):
        pair = self.x[i], self.y[i]
        return pair if self.keys is None else dict(zip(self.keys, pair, strict=True))


def loader(keys=None):
    return DataLoader(Examples(keys), batch_size=BATCH)


def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


class Plain(pl.LightningModule):
    """As a user would write it."""

    def __init__(self):
        super().__init__()
        self.backbone = body()
        self.losses, self.norms = {}, {}

    def forward(self, x):
        return self.backbone(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        self.losses[self.global_step] = loss.item()
        return loss

    def on_before_optimizer_step(self, optimizer):
        norms = [p.grad.double().square().sum() for p in self.parameters() if p.grad is not None]
        self.norms[self.global_step] = float(sum(norms))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


class Mapped(Plain):
    """Batches are mappings, outputs too."""

    def __init__(self, keys):
        super().__init__()
        self.keys = keys

    def forward(self, x):
        return {"scores": self.backbone(x), "extra": None}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[self.keys[0]])["scores"], batch[self.keys[1]])


class Bare(Plain):
    """No forward."""

    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.backbone(x), y)


class Kept(Logger):
    """Keeps what it is given."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def series(self, key):
        return {step: metrics[key] for step, metrics in self.lines if key in metrics}

    def keys(self):
        return {key for _, metrics in self.lines for key in metrics}


def trainer(*callbacks, logger=False, steps=6, **kwargs):
    arguments = {
        "max_steps": steps,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(logger=logger, callbacks=list(callbacks), **(arguments | kwargs))


def quiet(observables=None, **kwargs):
    kwargs = {"print_table": False, "on_error": "raise", "probe_size": 6} | kwargs
    return DynamicsMonitor(every_step() if observables is None else observables, **kwargs)


def groups(keys, prefix="dynamics"):
    return {key.split("/")[1] for key in keys if key.startswith(f"{prefix}/")}


ALL = {"ntk", "jacobian", "noise", "fdr", "cost"}


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_run_that_goes_on_after_a_crash_is_one_line_on_tensorboard(tmp_path):
    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
            if trainer.global_step == 6:
                raise KeyError("power cut")

    def fit(*callbacks, **resume):
        board = TensorBoardLogger(tmp_path, name="run", version=0)
        run = trainer(quiet(), *callbacks, logger=board, steps=9, max_epochs=9)
        run.fit(Plain(), loader(), weights_only=True, **resume)

    with pytest.raises(KeyError):
        fit(Crash())
    time.sleep(1.1)  # event files are named by the second
    with pytest.warns(MeasurementWarning, match="replayed"):
        fit(ckpt_path=tmp_path / "last.ckpt")
    events = EventAccumulator(str(tmp_path / "run" / "version_0"), size_guidance={"scalars": 0}).Reload()
    for key in ("dynamics/cost/seconds", "train_loss"):
        assert [event.step for event in events.Scalars(key)] == list(range(9))


def test_a_logger_that_fails_takes_nothing_from_the_others():
    class Offline(Kept):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("dynamics/") for key in metrics):
                raise ConnectionError("no route to host")

    kept = Kept()
    with pytest.warns(MeasurementWarning, match="ConnectionError: no route to host"):
        trainer(quiet(on_error="warn"), logger=[Offline(), kept]).fit(Plain(), loader())
    assert list(kept.series("dynamics/cost/seconds")) == list(range(6))


# -- batches and models ----------------------------------------------------------------------------


def test_a_run_with_pairs_is_measured_unmodified():
    logger = Kept()
    trainer(quiet(), logger=logger).fit(Plain(), loader())
    assert groups(logger.keys()) == ALL
    assert "dynamics/ntk/alignment" in logger.keys()  # noqa: SIM118
    scale = 0.1 / (2 * 0.1) * (EXAMPLES - BATCH) / BATCH * EXAMPLES / (EXAMPLES - 1)
    found = logger.series("dynamics/noise/sgd_scale").values()  # the data set's size was found
    assert all(value == pytest.approx(scale, rel=1e-12) for value in found)
    assert len(found) == 6


@pytest.mark.parametrize("keys", [("image", "label"), ("input_ids", "labels")])
def test_mappings_under_usual_names_are_understood(keys):
    logger = Kept()
    trainer(quiet(output_key="scores"), logger=logger).fit(Mapped(keys), loader(keys))
    assert groups(logger.keys()) == ALL
    assert "dynamics/ntk/alignment" in logger.keys()  # noqa: SIM118


def test_mappings_under_other_names_are_named():
    logger, keys = Kept(), ("picture", "answer")
    monitor = quiet(input_key="picture", target_key="answer", output_key="scores")
    trainer(monitor, logger=logger).fit(Mapped(keys), loader(keys))
    assert groups(logger.keys()) == ALL
    assert "dynamics/ntk/alignment" in logger.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_key": "photo"}, r"input_key='photo' is not in the batch, got keys"),
        ({"input_key": "picture", "target_key": "no"}, r"target_key='no' is not in the batch, got keys"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for(arguments, message):
    keys = ("picture", "answer")
    with pytest.raises(InputError, match=message):
        trainer(quiet(**arguments)).fit(Mapped(keys), loader(keys))


@pytest.mark.parametrize("arguments", [{}, {"output_key": "scores"}, {"output": "scores"}])
def test_what_the_network_is_called_with_needs_no_name(arguments):
    logger, keys = Kept(), ("picture", "answer")
    trainer(quiet(**arguments), logger=logger).fit(Mapped(keys), loader(keys))
    assert groups(logger.keys()) == ALL
    assert "dynamics/ntk/alignment" in logger.keys()  # noqa: SIM118


def test_a_module_without_forward_is_read_by_its_network():
    logger, module = Kept(), Bare()
    trainer(quiet(), logger=logger).fit(module, loader())
    assert groups(logger.keys()) == ALL
    assert len(module.norms) == 6


def test_naming_the_network_serves():
    logger = Kept()
    trainer(quiet(model="backbone"), logger=logger).fit(Bare(), loader())
    assert groups(logger.keys()) == ALL


def test_a_network_that_is_not_there_is_refused_before_training():
    module = Plain()
    with pytest.raises(InputError, match=r"no submodule 'head', got submodules \['backbone'\]"):
        trainer(quiet(model="head")).fit(module, loader())
    assert not module.norms


# -- the step axis ---------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_readings_stand_beside_the_loss_of_their_own_batch(tmp_path, accumulate):
    module = Plain()
    board = TensorBoardLogger(tmp_path, name="", version="")
    monitor = quiet(every_step(GradientNorm(schedule=2)))
    trainer(monitor, logger=board, accumulate_grad_batches=accumulate).fit(module, loader())
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = {e.step: e.value for e in events.Scalars("train_loss")}
    ours = [tag for tag in events.Tags()["scalars"] if tag.startswith("dynamics/")]
    assert len(ours) > 20
    for tag in ours:
        steps = [e.step for e in events.Scalars(tag)]
        assert set(steps) <= set(losses), tag
        assert len(set(steps)) == len(steps), tag
    assert losses == {step: pytest.approx(loss) for step, loss in module.losses.items()}
    assert {e.step: e.value for e in events.Scalars("dynamics/own/norm")} == {
        step: pytest.approx(module.norms[step], rel=1e-5) for step in (0, 2, 4)
    }
    assert sorted(losses) == list(range(6))


def test_validation_and_the_sanity_check_are_left_alone():
    logger, module = Kept(), Plain()
    run = trainer(
        quiet(), logger=logger, num_sanity_val_steps=2, steps=-1, max_epochs=2, check_val_every_n_epoch=1
    )
    run.fit(module, loader(), loader())
    assert sorted(logger.series("dynamics/noise/trace")) == list(range(12))
    assert sorted(logger.series("dynamics/ntk/drift")) == list(range(0, 12, 2))
    assert "val_loss" in run.callback_metrics


# -- other callbacks, the bar, the table -----------------------------------------------------------


def test_early_stopping_and_checkpoints_can_watch_a_reading(tmp_path):
    class Count(EarlyStopping):
        seen = ()

        def _run_early_stopping_check(self, trainer):
            self.seen = (*self.seen, trainer.callback_metrics["dynamics/fdr/ratio"].item())
            super()._run_early_stopping_check(trainer)

    stop = Count(
        "dynamics/fdr/ratio",
        strict=True,
        check_finite=False,
        stopping_threshold=1e9,
        mode="max",
        check_on_train_epoch_end=True,
    )
    keep = ModelCheckpoint(
        tmp_path,
        monitor="dynamics/fdr/ratio",
        filename="best",
        every_n_epochs=1,
        save_on_train_epoch_end=True,
    )
    run = trainer(quiet(), stop, keep, steps=-1, max_epochs=2, enable_checkpointing=True)
    run.fit(Plain(), loader())
    assert len(stop.seen) == 2
    assert all(abs(value) < 1e9 for value in stop.seen)
    assert keep.best_model_score.item() in stop.seen
    assert (tmp_path / "best.ckpt").exists()


def test_early_stopping_on_a_reading_stops():
    stop = EarlyStopping(
        "dynamics/jacobian/frobenius_norm",
        strict=True,
        divergence_threshold=0.0,
        check_on_train_epoch_end=True,
    )
    run = trainer(quiet(), stop, steps=-1, max_epochs=5)
    run.fit(Plain(), loader())
    assert run.current_epoch == 0 or run.global_step == EXAMPLES // BATCH


def test_readings_are_in_callback_metrics_and_chosen_ones_in_the_bar():
    run = trainer(quiet(progress_bar=["jacobian/spectral_norm", "ntk/drift"]))
    monitor = run.callbacks[0]
    run.fit(Plain(), loader())
    for key, reading in monitor.monitor.latest.items():
        if isinstance(reading.value, float) and "/cost/" not in key:
            if reading.is_finite:
                assert run.callback_metrics[key].item() == pytest.approx(reading.value, rel=1e-6)
            else:  # EarlyStopping takes nan for divergence and would end the run
                assert key not in run.callback_metrics
    shown = {key for key in run.progress_bar_metrics if key.startswith("dynamics/")}
    assert shown == {"dynamics/jacobian/spectral_norm", "dynamics/ntk/drift"}


def test_the_bar_shows_two_readings_by_default():
    run = trainer(quiet())
    run.fit(Plain(), loader())
    shown = {key for key in run.progress_bar_metrics if key.startswith("dynamics/")}
    latest = run.callbacks[0].monitor.latest
    chosen = {"dynamics/noise/scale", "dynamics/fdr/ratio"}
    assert shown == {key for key in chosen if latest[key].is_finite}
    assert "dynamics/fdr/ratio" in shown


def test_another_module_starts_afresh():
    monitor = quiet([NeuralTangentKernel(schedule=4)])
    for _ in range(2):
        module = Plain()
        torch.nn.init.normal_(next(module.parameters()))
        first = trainer(monitor)
        first.fit(module, loader())
        assert monitor.monitor.state_dict()["observables"]["ntk"]["estimator"]["first"]["step"] == 0
        assert standing(module) == 0
    assert monitor.monitor.model is module


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": -1}, "budget must be a number above 0 and below 1, got -1"),
        ({"probe_size": "a"}, "probe_size must be a whole number at least 1, got .a."),
        ({"observables": ["ntk"]}, "observables must be Observable values, got 'ntk'"),
        ({"observables": JacobianNorm()}, "observables must be a list of Observable values"),
        ({"prefix": "a/b"}, "prefix must be one word without a slash"),
        ({"loss_reduction": "avg"}, "unknown loss_reduction, got 'avg'"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(wrong, message):
    with pytest.raises(ValueError, match=message):
        DynamicsMonitor(**wrong)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_closing_table_is_printed(wanted, capsys):
    trainer(quiet(print_table=wanted)).fit(Plain(), loader())
    shown = capsys.readouterr().out
    assert ("what it says" in shown) == wanted
    for word in ("drift", "frobenius_norm", "scale", "ratio", "cost: "):
        assert (word in shown) == wanted


# -- loggers and precision -------------------------------------------------------------------------


def test_csv_logger(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(quiet(), logger=logger).fit(Plain(), loader())
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    drift = {row["step"]: float(row["dynamics/ntk/drift"]) for row in rows if row["dynamics/ntk/drift"]}
    assert sorted(drift) == ["0", "2", "4"]
    assert drift["0"] == 0.0
    assert drift["4"] > 0.0


@pytest.mark.parametrize("arguments", [{"logger": False}, {"logger": [], "fast_dev_run": True}])
def test_without_a_logger_and_in_a_trial_run_it_still_measures(arguments):
    monitor = quiet()
    run = trainer(monitor, **arguments)
    run.fit(Plain(), loader())
    assert groups(monitor.monitor.latest) == ALL
    assert "dynamics/ntk/drift" in run.callback_metrics


@pytest.mark.parametrize("arguments", [{}, {"precision": "bf16-mixed"}], ids=["32", "bf16-mixed"])
def test_accumulation_and_clipping(arguments):
    logger, module = Kept(), Plain()
    monitor = quiet(every_step(GradientNorm(schedule=1)))
    run = trainer(
        monitor, logger=logger, accumulate_grad_batches=2, gradient_clip_val=1e-3, steps=5, **arguments
    )
    run.fit(module, loader())
    latest = monitor.monitor.latest
    assert latest["dynamics/noise/trace"].note.startswith("micro-batches")
    assert latest["dynamics/noise/trace"].is_finite
    assert latest["dynamics/fdr/ratio"].is_finite
    assert logger.series("dynamics/own/norm") == {
        step: pytest.approx(norm, rel=1e-5) for step, norm in module.norms.items()
    }
    assert min(module.norms.values()) > 1e-6  # the norms are those before clipping
    assert latest["dynamics/noise/sgd_scale"].value == pytest.approx(
        0.1 / (2 * 0.1) * (EXAMPLES - 2 * BATCH) / (2 * BATCH) * EXAMPLES / (EXAMPLES - 1)
    )


class Scaled(MixedPrecision):
    """Lightning's scaler on the CPU, autocast aside, so that powers of two cancel exactly."""

    def __init__(self, scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
        super().__init__("16-mixed", "cpu", scaler)

    def forward_context(self):
        return nullcontext()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_scaler_does_not_change_the_readings(accumulate):
    def readings(scale):
        logger = Kept()
        monitor = quiet(every_step(GradientNorm(schedule=1)))
        run = trainer(
            monitor,
            logger=logger,
            plugins=[Scaled(scale)],
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.1,
        )
        run.fit(Plain(), loader())
        return [
            (step, key, float(value).hex())
            for step, metrics in logger.lines
            for key, value in metrics.items()
            if "/cost/" not in key
        ]

    plain = readings(1.0)
    assert len(plain) > 50
    assert readings(2.0**10) == plain


def test_a_step_that_the_scaler_skips_is_measured_at_the_next():
    """Lightning counts such a step, so what was due at it is due no more."""

    class Spoiled(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 2 else loss

    logger = Kept()
    observables = [JacobianNorm(schedule=at([2, 5])), GradientNoiseScale(schedule=2, sampling=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)  # a scaler skips steps as a matter of course
        trainer(quiet(observables, on_error="warn"), logger=logger, plugins=[Scaled(2.0**10)]).fit(
            Spoiled(), loader()
        )
    assert sorted(logger.series("dynamics/jacobian/spectral_norm")) == [3, 5]
    assert sorted(logger.series("dynamics/noise/trace")) == [0, 3, 4]


# -- life ------------------------------------------------------------------------------------------


def test_two_monitors_under_different_prefixes(tmp_path):
    logger = Kept()
    first, second = quiet([JacobianNorm(schedule=1)]), quiet([GradientNoiseScale(schedule=3)], prefix="other")
    run = trainer(first, second, logger=logger)
    run.fit(Plain(), loader())
    assert groups(logger.keys()) == {"jacobian", "cost"}
    assert groups(logger.keys(), "other") == {"noise", "cost"}
    assert sorted(logger.series("other/noise/trace")) == [0, 3]
    run.save_checkpoint(tmp_path / "both.ckpt")
    states = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert {tuple(state["monitor"]["observables"]) for state in states.values()} == {
        ("jacobian",),
        ("noise",),
    }


def test_two_monitors_under_one_prefix_are_refused():
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(quiet(), quiet())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_training_removes_the_hooks(error):
    class Failing(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                assert standing(self) > 0
                raise error("the user's own")
            return loss

    module = Failing()
    run = trainer(quiet())
    expected = SystemExit if error is KeyboardInterrupt else error
    with pytest.raises((expected, error)):
        run.fit(module, loader())
    assert standing(module) == 0
    assert not run.optimizers[0]._optimizer_step_post_hooks


def test_hooks_are_gone_after_a_run_that_ends_well():
    module = Plain()
    run = trainer(quiet())
    run.fit(module, loader())
    assert standing(module) == 0
    assert not run.optimizers[0]._optimizer_step_post_hooks


class Manual(Plain):
    """Two optimizers, driven by hand."""

    automatic_optimization = False

    def __init__(self, count=2):
        super().__init__()
        self.count = count
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        x, y = batch
        for optimizer in optimizers if self.count > 1 else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(x), y))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(self.count)]


def test_two_optimizers_are_warned_about_and_not_measured():
    logger, module = Kept(), Manual()
    run = trainer(quiet(), logger=logger)
    with pytest.warns(UserWarning, match="one optimizer can be measured, got 2: the monitor is off"):
        run.fit(module, loader())
    assert not groups(logger.keys())
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)


def test_one_optimizer_driven_by_hand_is_measured():
    logger = Kept()
    trainer(quiet(), logger=logger).fit(Manual(1), loader())
    assert groups(logger.keys()) == ALL
    assert sorted(logger.series("dynamics/noise/trace")) == list(range(6))


def test_steps_that_the_user_skips_do_not_confuse_it():
    class Skipping(Plain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    logger, module = Kept(), Skipping()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(quiet(on_error="warn"), logger=logger).fit(module, loader())
    ours = [str(w.message) for w in caught if issubclass(w.category, MeasurementWarning)]
    assert len(ours) <= 1
    assert sorted(logger.series("dynamics/noise/trace")) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_weights_are_bit_identical_with_and_without_it(name, accumulate):
    class Watched(Plain):
        def configure_optimizers(self):
            return getattr(torch.optim, name)(self.parameters(), lr=0.05)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((x + torch.randn_like(x), y), batch_idx)

    def final(*callbacks):
        module = Watched()
        run = trainer(*callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
        torch.manual_seed(5)
        run.fit(module, DataLoader(Examples(), batch_size=BATCH, shuffle=True))
        state = run.optimizers[0].state_dict()["state"]
        tensors = [*module.state_dict().values(), torch.get_rng_state()]
        return tensors + [v for own in state.values() for v in own.values() if isinstance(v, torch.Tensor)]

    plain, watched = final(), final(quiet())
    assert len(plain) == len(watched)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


# -- configuration from a file ---------------------------------------------------------------------

YAML = """
seed_everything: 1
trainer:
  max_steps: 3
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: gradiometer.callbacks.DynamicsMonitor
      init_args:
        prefix: physics
        probe_size: 4
        progress_bar: [ntk/drift]
        print_table: false
        on_error: raise
        observables:
          - class_path: gradiometer.NeuralTangentKernel
            init_args:
              outputs: full
              schedule:
                class_path: gradiometer.log_spaced
                init_args: {until: 100}
          - class_path: gradiometer.GradientNoiseScale
            init_args:
              schedule: 20
              estimator:
                class_path: gradiometer.Window
                init_args: {steps: 500}
          - class_path: gradiometer.FluctuationDissipation
            init_args:
              schedule:
                class_path: gradiometer.every
                init_args: {steps: 2}
              sampling: 1
"""


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()


@pytest.fixture
def configure(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])

    def configured(text):
        (tmp_path / "config.yaml").write_text(text)
        arguments = [f"--config={tmp_path / 'config.yaml'}"]
        return LightningCLI(Plain, Data, args=arguments, run=False, save_config_callback=None)

    return configured


def test_the_monitor_can_be_written_in_a_configuration_file(configure):
    cli = configure(YAML)
    (monitor,) = [c for c in cli.trainer.callbacks if isinstance(c, DynamicsMonitor)]
    kernel, noise, relation = monitor.session.arguments["observables"]
    assert isinstance(kernel, NeuralTangentKernel)
    assert (kernel.outputs, kernel.schedule) == ("full", log_spaced(until=100))
    assert (noise.schedule, noise.estimator.steps) == (every(20), 500)
    assert (relation.schedule, relation.sampling) == (every(2), every(1))
    cli.trainer.fit(cli.model, cli.datamodule)
    latest = monitor.monitor.latest
    assert groups(latest, "physics") == {"ntk", "noise", "fdr", "cost"}
    assert latest["physics/ntk/off_diagonal"].is_finite
    assert latest["physics/ntk/kernel"].value.shape == (12, 12)
    assert "physics/ntk/drift" in cli.trainer.progress_bar_metrics


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("outputs: full", "outputs: everything"),
        ("schedule: 20", "schedule: often"),
        ("probe_size: 4", "probe_size: many"),
        ("on_error: raise", "on_error: ignore"),
        ("gradiometer.GradientNoiseScale", "gradiometer.Window"),
        ("prefix: physics", "prefixed: physics"),
    ],
)
def test_bad_values_in_a_configuration_file_are_refused(configure, right, wrong, capsys):
    assert YAML.count(right) == 1
    with pytest.raises(SystemExit) as end:
        configure(YAML.replace(right, wrong))
    assert end.value.code == 2
    assert "DynamicsMonitor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("schedule: 20", "schedule: 0", "a cadence must be a whole number of steps, at least 1, got 0"),
        ("init_args: {steps: 2}", "init_args: {steps: 0}", "a cadence must be a whole number"),
        ("init_args: {steps: 500}", "init_args: {steps: 0}", "at least 1, got 0"),
    ],
)
def test_values_of_the_right_type_are_refused_by_their_class(configure, right, wrong, message):
    assert YAML.count(right) == 1
    with pytest.raises((SystemExit, ValueError), match=message):
        configure(YAML.replace(right, wrong))


def test_a_configuration_that_was_saved_can_be_read_again(configure):
    cli = configure(YAML)
    saved = cli.parser.dump(cli.config, skip_none=False)
    assert " object at 0x" not in saved
    again = configure(saved)
    for one, other in zip(
        *([c for c in each.trainer.callbacks if isinstance(c, DynamicsMonitor)] for each in (cli, again)),
        strict=True,
    ):
        for left, right in zip(
            one.session.arguments["observables"], other.session.arguments["observables"], strict=True
        ):
            assert type(left) is type(right)
            assert (left.schedule, left.sampling) == (right.schedule, right.sampling)
            assert vars(left.estimator).get("steps") == vars(right.estimator).get("steps")
            assert type(left.estimator) is type(right.estimator)


def test_every_argument_is_explained_on_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit):
        LightningCLI(
            Plain,
            args=["--trainer.callbacks.help=gradiometer.callbacks.DynamicsMonitor"],
            run=False,
            save_config_callback=None,
        )
    shown = capsys.readouterr().out
    for word in ("observables", "input_key", "probe_size", "budget", "progress_bar", "print_table"):
        assert word in shown
    assert "Number of examples of the first batch" in " ".join(shown.split())


# -- size ------------------------------------------------------------------------------------------


def code_lines(source):
    """Lines that hold code: no blank lines, comments or docstrings."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
        *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def test_lines_of_code_are_counted_rightly():
    source = (
        '"""Two\nlines."""\n\n# three\nx = [\n    1,\n]\n\n\ndef f():\n    """One."""\n    return x  # y\n'
    )
    assert code_lines(source) == 5


def test_the_callback_is_thin():
    path = Path(__file__).parents[2] / "callbacks" / "lightning.py"
    assert code_lines(path.read_text()) < 100
