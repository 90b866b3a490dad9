"""Where decisions go: JSON lines, TensorBoard, checkpoints, the closing table."""

import io
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from gradiometer import (
    Controller,
    FluctuationDissipation,
    JSONLinesRecorder,
    Mean,
    MemoryRecorder,
    Monitor,
    Observable,
    Quantity,
    Reading,
    TensorBoardRecorder,
)
from gradiometer.control import Effect, View
from gradiometer.control.panel import QUANTITIES
from gradiometer.errors import CostWarning, InputError, MeasurementWarning, UnsupportedError
from gradiometer.record import read_decisions, read_json_lines
from gradiometer.record.readings import Decision


def decision(step, factor=1.0, **more):
    read = {"fdr/ratio": (1.01, 0.002), "noise/scale": (math.nan, math.nan)}
    return Decision(step, "Some", "learning_rate", "a rule", read, 0.1, factor, "a reason", **more)


@dataclass(frozen=True, kw_only=True)
class Clock(Observable):
    group = "clock"
    quantities = {"step": Quantity("steps", "What time it is.")}

    def levels(self, snapshot):
        return {"step": torch.tensor(float(snapshot.step))}

    def readings(self, now, reference):
        return {"step": now["step"]}


@dataclass(frozen=True)
class EverySecond(Controller):
    """Halves the rate of one group, or of all, at every second check."""

    knobs = ("learning_rate",)
    dry_run: bool = False
    group: str = ""
    rule: str = "an even step"

    def observables(self):
        return (Clock(schedule=1),)

    def start(self):
        return {"next": 2, "factor": 1.0}

    def effect(self, state):
        return Effect({self.group: state["factor"]})

    def decide(self, view, state):
        factor = 0.5 if view.step % 2 == 0 else 1.0
        made = Decision(
            step=view.step,
            controller="EverySecond",
            knob="learning_rate",
            rule=self.rule,
            read=view.seen("clock/step", "clock/nothing"),
            before=view.groups[0].lr,
            factor=factor,
            reason="it is time" if factor < 1 else "it is not time",
            group=self.group,
            dry_run=self.dry_run,
        )
        return [made], {"next": view.step + 1, "factor": state["factor"] * factor}, ""


def network():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    return net, torch.optim.SGD([{"params": [net.weight]}, {"params": [net.bias]}], lr=0.1)


def train(monitor, steps=6):
    for _ in range(steps):
        with monitor.micro_batch(torch.ones(4, 3), torch.zeros(4, dtype=torch.long)):
            F.cross_entropy(monitor.model(torch.ones(4, 3)), torch.zeros(4, dtype=torch.long)).backward()
        monitor.before_step()
        monitor.optimizer.step()
        monitor.optimizer.zero_grad()
    return monitor


def test_a_decision_survives_json_and_says_what_it_is():
    for one in (
        decision(3),
        decision(4, 0.5),
        decision(5, 0.5, dry_run=True),
        decision(6, 0.5, group="head"),
    ):
        back = Decision.from_plain(one.plain())
        assert back.sentence() == one.sentence()
        assert (back.wanted, back.acted, back.after) == (one.wanted, one.acted, one.after)
    assert decision(3).sentence().startswith("step 3: learning_rate stays at 0.1: a reason")
    assert "learning_rate of group head 0.1 -> 0.05" in decision(6, 0.5, group="head").sentence()
    assert "would go 0.1 -> 0.05" in decision(5, 0.5, dry_run=True).sentence()
    assert "fdr/ratio 1.01 ± 0.002" in decision(3).sentence()


def test_every_decision_is_in_every_place(tmp_path):
    memory, lines, board = MemoryRecorder(), JSONLinesRecorder(tmp_path / "run.jsonl"), tmp_path / "board"
    monitor = Monitor(
        *network(),
        [],
        controllers=[EverySecond()],
        recorders=[memory, lines, TensorBoardRecorder(board)],
    )
    train(monitor)
    table = monitor.table()
    monitor.close()
    made = list(monitor.decisions)
    assert [(one.step, one.factor) for one in made] == [(2, 0.5), (3, 1.0), (4, 0.5), (5, 1.0)]
    assert list(memory.decisions) == made
    assert [one.sentence() for one in read_decisions(tmp_path / "run.jsonl")] == [
        one.sentence() for one in made
    ]
    assert [line["step"] for line in read_json_lines(tmp_path / "run.jsonl")] == list(range(6))
    events = EventAccumulator(str(board)).Reload()
    texts = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    changes = texts["dynamics/control/EverySecond/changes/text_summary"]
    assert [event.step for event in changes] == [2, 4]
    assert "0.1 -> 0.05" in changes[0].tensor_proto.string_val[0].decode()
    assert [e.step for e in texts["dynamics/control/EverySecond/refusals/text_summary"]] == [3, 5]
    marks = [(event.step, event.value) for event in events.Scalars("dynamics/control/changes")]
    assert marks == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert [event.value for event in events.Scalars("dynamics/control/learning_rate")] == pytest.approx(
        [0.1, 0.1, 0.1, 0.05, 0.05, 0.025]
    )
    decided = table[table.index("decisions") :]
    assert "step 2: learning_rate 0.1 -> 0.05: it is time" in decided
    assert "EverySecond: the last refusal at step 5:" in decided


def test_rates_of_groups_are_shown_where_they_differ():
    memory = MemoryRecorder()
    train(Monitor(*network(), [], controllers=[EverySecond(group="1")], recorders=[memory]))
    latest = {
        key.partition("control/")[2]: r.value for key, r in memory.latest().items() if "control/" in key
    }
    assert latest["learning_rate"] == latest["learning_rate/0"] == 0.1
    assert latest["learning_rate/1"] == 0.025
    assert (latest["lr_factor/0"], latest["lr_factor/1"]) == (1.0, 0.25)


def test_readings_of_the_engine_have_their_quantities():
    memory = MemoryRecorder()
    train(Monitor(*network(), [], controllers=[EverySecond()], recorders=[memory]))
    own = {key: r for key, r in memory.latest().items() if "/control/" in key}
    assert {key.split("/")[2] for key in own} == set(QUANTITIES)
    for key, reading in own.items():
        assert reading.sentence == QUANTITIES[key.split("/")[2]].sentence
    assert own["dynamics/control/batch_size"].value == 4.0


def test_a_checkpoint_holds_them_and_loads_with_weights_only():
    first = train(Monitor(*network(), [], controllers=[EverySecond()]))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Monitor(*network(), [], controllers=[EverySecond()])
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.decisions == first.decisions
    train(second, 2)
    assert [one.before for one in second.decisions[-2:]] == [0.025, 0.0125]


def test_a_checkpoint_without_the_controller_is_told():
    first = train(Monitor(*network(), [], controllers=[EverySecond()]))
    bare = Monitor(*network(), [Clock(schedule=1)])
    with pytest.warns(
        MeasurementWarning, match="changes made by EverySecond, and this monitor has no such controller"
    ):
        bare.load_state_dict(first.state_dict())
    with pytest.warns(MeasurementWarning, match="does not act on this run"):
        Monitor(*network(), [], controllers=[EverySecond(dry_run=True)]).load_state_dict(first.state_dict())
    unchanged = train(Monitor(*network(), [], controllers=[EverySecond(dry_run=True)]))
    real = Monitor(*network(), [], controllers=[EverySecond()])
    with pytest.warns(MeasurementWarning, match="was a dry run in the checkpoint, and acts now"):
        real.load_state_dict(unchanged.state_dict())
    assert real._measurement.steering.panel.rates.factors == [1.0, 1.0]  # nothing that was only said is done
    Monitor(*network(), [Clock(schedule=1)]).load_state_dict(unchanged.state_dict())


def test_a_group_that_comes_later_has_the_factor_of_all():
    net, optimizer = network()
    extra = nn.Parameter(torch.ones(2))
    monitor = train(Monitor(net, optimizer, [], controllers=[EverySecond()]), 4)
    optimizer.add_param_group({"params": [extra], "lr": 0.4})
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([g["lr"] for g in optimizer.param_groups]))
    train(monitor, 1)
    assert seen == [[0.05, 0.05, 0.2]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_a_step_that_is_broken_off_leaves_the_scripts_own_rates_in_checkpoints(error, tensor, monkeypatch):
    def broken(*arguments, **options):
        raise error

    def build():
        net, optimizer = network()
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1) if tensor else 0.1
        return Monitor(net, optimizer, [], controllers=[EverySecond()])

    def rates(optimizer):
        return [pytest.approx(float(group["lr"])) for group in optimizer.param_groups]

    monitor = train(build(), 4)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[torch.optim.SGD.__module__], "sgd", broken)
        with pytest.raises(error):
            train(monitor, 1)
    saved = monitor.optimizer.state_dict()
    assert [float(group["lr"]) for group in saved["param_groups"]] == pytest.approx([0.1, 0.1])
    resumed = build()
    resumed.optimizer.load_state_dict(saved)
    resumed.load_state_dict(monitor.state_dict())
    factors = resumed._measurement.steering.panel.rates.factors
    assert list(factors) == list(monitor._measurement.steering.panel.rates.factors) != [1.0, 1.0]
    seen = []
    resumed.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.extend(rates(optimizer)))
    train(resumed, 1)
    assert seen == [0.1 * factor for factor in factors]
    assert [float(group["lr"]) for group in resumed.optimizer.param_groups] == pytest.approx([0.1, 0.1])


def test_closing_puts_the_rates_back_and_takes_the_hooks_off():
    net, optimizer = network()
    monitor = train(Monitor(net, optimizer, [], controllers=[EverySecond()]))
    monitor.close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_pre_hooks
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    plain = train(Monitor(*network(), [Clock(schedule=1)]), 1)
    assert not plain.optimizer._optimizer_step_pre_hooks
    assert plain.decisions == ()
    assert plain.accumulation is None


def test_a_recorder_that_fails_on_decisions_still_gets_the_records():
    class Picky(MemoryRecorder):
        def record_decisions(self, decisions):
            raise OSError("disk full")

    picky = Picky()
    monitor = Monitor(*network(), [], controllers=[EverySecond()], recorders=[picky])
    with pytest.warns(MeasurementWarning, match="Picky failed: OSError: disk full"):
        train(monitor)
    assert len(monitor.decisions) == 4
    assert [step for step, _ in picky.records] == list(range(6))


def test_decisions_are_recorded_again_after_a_passing_error():
    class Passing(MemoryRecorder):
        failed = False

        def record_decisions(self, decisions):
            if not self.failed:
                self.failed = True
                raise OSError("disk full")
            super().record_decisions(decisions)

    passing = Passing()
    monitor = Monitor(*network(), [], controllers=[EverySecond()], recorders=[passing])
    with pytest.warns(MeasurementWarning, match="Passing failed: OSError: disk full"):
        train(monitor)
    assert list(passing.decisions) == list(monitor.decisions)[1:]


def test_a_recorder_that_knows_no_decisions_is_served_as_before():
    seen = []
    monitor = Monitor(
        *network(), [], controllers=[EverySecond()], recorders=[lambda step, readings: seen.append(step)]
    )
    train(monitor)
    assert seen == list(range(6))


@dataclass(frozen=True)
class Broken(EverySecond):
    """What it decides cannot be carried out."""

    def effect(self, state):
        if state["factor"] != 1.0:
            raise RuntimeError("out of luck")
        return super().effect(state)


def test_a_controller_whose_effect_fails_changes_nothing_and_ends_nothing():
    monitor = Monitor(*network(), [], controllers=[Broken()])
    with pytest.warns(MeasurementWarning, match="Broken could not decide: RuntimeError: out of luck"):
        train(monitor, 4)
    assert monitor.optimizer.param_groups[0]["lr"] == 0.1
    assert [decision for decision in monitor.decisions if decision.wanted] == []


@dataclass(frozen=True)
class Unprintable(EverySecond):
    """Its decision cannot be written down."""

    def decide(self, view, state):
        (made,), after, message = super().decide(view, state)
        return [replace(made, read={"clock/step": ("three", "four")})], after, message


def test_a_decision_that_cannot_be_recorded_leaves_the_memory_as_it_was():
    monitor = Monitor(*network(), [], controllers=[Unprintable()])
    with pytest.warns(MeasurementWarning, match="Unprintable could not decide: TypeError"):
        train(monitor, 4)
    assert monitor.state_dict()["control"]["controllers"]["Unprintable"]["memory"]["factor"] == 1.0


@dataclass(frozen=True)
class Halved(EverySecond):
    """Begins with half the rate."""

    def start(self):
        return {"next": 100, "factor": 0.5}


def test_what_a_controller_begins_with_is_in_force_from_the_first_step():
    memory = MemoryRecorder()
    train(Monitor(*network(), [], controllers=[Halved()], recorders=[memory]), 2)
    assert [rate for _, rate in memory.series("dynamics/control/learning_rate")] == [0.05, 0.05]


def test_two_of_one_class_are_refused_also_where_one_is_a_dry_run():
    with pytest.raises(InputError, match="two controllers of one class"):
        Monitor(*network(), [], controllers=[EverySecond(), EverySecond(dry_run=True)])
    Monitor(*network(), [], controllers=[EverySecond(), Halved(dry_run=True)])


class FailingClock(Clock):
    def levels(self, snapshot):
        raise UnsupportedError("there is no time")


def test_a_controller_whose_reading_is_retired_is_named():
    with pytest.warns(MeasurementWarning, match="Controllers that decide by it do nothing from here on"):
        train(Monitor(*network(), [FailingClock(schedule=1)], controllers=[EverySecond()]), 3)


def test_what_feeds_a_controller_is_exempt_from_the_budget():
    monitor = Monitor(*network(), [], controllers=[EverySecond()], budget=1e-9)
    train(monitor, 30)
    instrument = monitor._measurement.instruments["clock"]
    assert instrument.stretch == 1
    with pytest.warns(CostWarning, match="clock is measured half as often"):
        train(Monitor(*network(), [Clock(schedule=1)], budget=1e-9), 30)


@dataclass(frozen=True)
class Slightly(EverySecond):
    """A change that is too small to be seen as a jump."""

    def decide(self, view, state):
        (made,), after, message = super().decide(view, state)
        if made.wanted:
            made, after = replace(made, factor=0.995), {**after, "factor": 0.995 * state["factor"]}
        return [made], {**after, "next": 10**9}, message


def test_a_change_begins_windows_anew_also_where_the_run_stops_right_after_it():
    relation = FluctuationDissipation(schedule=2, sampling=1, estimator=Mean())

    def monitor():
        return Monitor(*network(), [relation], controllers=[Slightly()])

    whole = train(monitor(), 12)
    first = train(monitor(), 3)  # decided after step 2, in force from step 3
    second = monitor()
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    train(second, 9)
    for key in ("dynamics/fdr/right", "dynamics/fdr/ratio"):
        assert second.latest[key].value == whole.latest[key].value
    assert whole._measurement.instruments["fdr"].estimator.reference().path_steps.tolist() == [4, 6, 8, 10]


def test_the_controller_in_the_documents_runs():
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().partition("## Add a controller\n")[2]
    names = {"__name__": "example"}
    exec(compile(page.split("```python\n")[1].partition("```")[0], "CONTRIBUTING.md", "exec"), names)
    monitor = train(Monitor(*network(), [], controllers=[names["StopWhenLazy"](below=1.0)]), 1001)
    (decision,) = monitor.decisions
    assert (decision.step, decision.acted, monitor.should_stop) == (1000, True, True)
    assert "it is" in decision.reason


@dataclass(frozen=True)
class Odd(EverySecond):
    """Goes wrong at the second check, in one of several ways."""

    way: str = ""

    @property
    def knobs(self):
        return ("run",) if self.way == "no knob" else ("learning_rate",)

    def effect(self, state):
        bad = {"nan": math.nan, "zero": 0.0}.get(self.way, 0.5)
        return Effect({"": 1.0 if state["factor"] == 1.0 else bad})

    def decide(self, view, state):
        made, after, _ = super().decide(view, state)
        if self.way == "no next":
            del after["next"]
        return made, after, ""

    def apply(self, state):
        if self.way == "apply" and state["factor"] != 1.0:
            raise OSError("no such sampler")


@pytest.mark.parametrize("way", ["nan", "zero", "no next", "no knob"])
def test_a_memory_that_cannot_be_carried_out_is_refused(way):
    memory = MemoryRecorder()
    monitor = Monitor(*network(), [], controllers=[Odd(way=way)], recorders=[memory])
    with pytest.warns(MeasurementWarning, match="the memory of Odd cannot be carried out"):
        train(monitor, 5)
    assert not any(factor != 1.0 for factor in monitor._measurement.steering.panel.rates.factors)
    assert not any(decision.wanted for decision in monitor.decisions)
    assert [step for step, _ in memory.records] == list(range(5))  # readings go on
    with pytest.raises(InputError, match="cannot be carried out"):
        train(Monitor(*network(), [], controllers=[Odd(way=way)], on_error="raise"), 5)


def test_what_cannot_be_applied_is_told_and_the_record_is_kept():
    memory = MemoryRecorder()
    monitor = Monitor(*network(), [], controllers=[Odd(way="apply")], recorders=[memory])
    with pytest.warns(MeasurementWarning, match="Odd could not act: OSError: no such sampler"):
        train(monitor, 4)
    assert [decision.step for decision in memory.decisions if decision.acted] == [2]
    assert [step for step, _ in memory.records] == list(range(4))


def test_factors_of_groups_that_are_gone_are_named():
    first = train(Monitor(*network(), [], controllers=[EverySecond(group="1")]))
    net, _ = network()
    other = torch.optim.SGD([{"params": [net.weight], "name": "body"}, {"params": [net.bias]}], lr=0.1)
    Monitor(net, other, [], controllers=[EverySecond(group="1")]).load_state_dict(first.state_dict())
    alone = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = Monitor(net, alone, [], controllers=[EverySecond(group="1")])
    with (
        pytest.warns(
            MeasurementWarning, match=r"parameter groups \['1'\], which this optimizer does not have"
        ),
        pytest.warns(
            MeasurementWarning, match=r"anew: clock \(the checkpoint is of other parameter groups\)"
        ),
    ):
        monitor.load_state_dict(first.state_dict())


def test_the_latest_changes_and_refusals_are_kept():
    monitor = train(Monitor(*network(), [], controllers=[EverySecond()]), 620)
    kept = monitor.decisions
    assert [one.step for one in kept if one.wanted] == list(range(220, 620, 2))
    assert [one.step for one in kept if not one.wanted] == list(range(221, 620, 2))
    assert [one.step for one in kept] == sorted(one.step for one in kept)
    assert monitor._measurement.steering.panel.changes == 309


def test_a_controller_may_look_at_what_is_not_there():
    reading = Reading("dynamics/clock/step", 3.0)
    view = View(0, {"clock/step": reading}, [], [])
    assert view.number("clock/step") == 3.0
    assert math.isnan(view.number("clock/nothing"))
    assert list(view.seen("clock/step", "clock/nothing")) == ["clock/step"]
