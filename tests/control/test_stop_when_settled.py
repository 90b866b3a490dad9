"""The run ends once it has settled, and not before."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradiometer import FluctuationDissipation, Monitor, Reading
from gradiometer.callbacks import DynamicsMonitor
from gradiometer.control.base import View
from gradiometer.control.stop_when_settled import StopWhenSettled
from gradiometer.errors import InputError


def view(step, stationary, resolved=True):
    readings = {"fdr/stationary": Reading("dynamics/fdr/stationary", stationary, resolved=resolved)}
    return View(step=step, readings=readings, groups=(), schedule=[0.1])


def decided(answers, **settings):
    """Decisions and stops at checks with these answers."""
    controller, made, stops = StopWhenSettled(check_every=10, **settings), [], []
    state = controller.start()
    for i, answer in enumerate(answers):
        decisions, state, message = controller.decide(view(10 * i, answer, not math.isnan(answer)), state)
        made += decisions
        stops.append(controller.effect(state).stop)
        assert message == ""
    return made, stops


def test_it_stops_at_the_last_of_several_settled_checks_in_a_row():
    made, stops = decided([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    assert stops == [False] * 5 + [True]
    assert [decision.wanted for decision in made] == stops
    assert made[-1].sentence().startswith("step 50: run ends: settled at 3 of the 3 checks")
    assert made[2].sentence().startswith("step 20: run goes on: the run is still on its way")


def test_what_is_not_known_begins_the_count_anew():
    made, stops = decided([1.0, math.nan, 1.0], patience=2)
    assert not any(stops)
    assert made[1].reason == "whether it has settled is not known yet"


def test_a_loop_that_goes_on_all_the_same_is_told_once():
    made, stops = decided([1.0, 1.0, 1.0], patience=1)
    assert stops == [True, True, True]
    assert len(made) == 1


def test_settings_that_no_run_can_use_are_refused():
    with pytest.raises(InputError, match="patience must be a whole number at least 1"):
        StopWhenSettled(patience=0)
    with pytest.raises(InputError, match="dry_run must be True or False"):
        StopWhenSettled(dry_run="yes")


class Noisy(LightningModule):
    """A noisy quadratic, which settles soon."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.full((20,), 0.1))

    def forward(self, x):
        return self.weight - x

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().sum(-1).mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.01)


def relation():
    return FluctuationDissipation(schedule=20, sampling=1, tolerance=0.5)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_lightning_run_ends_when_it_has_settled(dry_run):
    data = TensorDataset(torch.randn(4000, 20, generator=torch.Generator().manual_seed(0)))
    stop = StopWhenSettled(tolerance=0.5, check_every=40, patience=2, dry_run=dry_run)
    monitor = DynamicsMonitor([relation()], controllers=[stop], print_table=False)
    trainer = Trainer(
        max_steps=900,
        accelerator="cpu",
        logger=False,
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Noisy(), DataLoader(data, batch_size=4, shuffle=True))
    assert any(decision.wanted for decision in monitor.monitor.decisions)
    assert (trainer.global_step < 900) is not dry_run


def test_a_plain_loop_reads_it_and_a_resumed_one_remembers():
    torch.manual_seed(0)

    def build():
        model = nn.Linear(4, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        stop = StopWhenSettled(tolerance=0.5, check_every=40, patience=1)
        return model, optimizer, Monitor(model, optimizer, [relation()], controllers=[stop])

    model, optimizer, monitor = build()
    steps = 0
    while not monitor.should_stop and steps < 2000:
        x = torch.randn(4, 4)
        with monitor.micro_batch(x):
            F.mse_loss(model(x), torch.randn(4, 1)).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    assert 40 <= steps < 2000
    again = build()[2]
    again.load_state_dict(monitor.state_dict())
    assert again.should_stop
