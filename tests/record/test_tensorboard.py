import io
import itertools
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.summary.writer import event_file_writer
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from gradiometer import (
    LearningRateLimit,
    Monitor,
    NeuralTangentKernel,
    Quantity,
    Reading,
    TensorBoardRecorder,
)
from gradiometer.control.panel import QUANTITIES
from gradiometer.engine.words import expected_words
from gradiometer.errors import InputError
from gradiometer.observables import OBSERVABLES, default_observables
from gradiometer.record.loggers import LoggersRecorder
from gradiometer.record.readings import Decision
from gradiometer.record.tensorboard import custom_scalars_layout


def load(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0}).Reload()


def test_scalars_and_their_errors_read_back(tmp_path):
    recorder = TensorBoardRecorder(tmp_path)
    for step in (0, 5, 7):
        recorder(
            step,
            [
                Reading("d/ntk/drift", step / 2, stderr=0.25),
                Reading("d/fdr/ratio/head", 2.0, stderr=math.nan),
            ],
        )
    recorder.close()
    events = load(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("d/ntk/drift")] == [(0, 0.0), (5, 2.5), (7, 3.5)]
    assert [(e.step, e.value) for e in events.Scalars("d/ntk/drift_stderr")] == [
        (0, 0.25),
        (5, 0.25),
        (7, 0.25),
    ]
    assert set(events.Tags()["scalars"]) == {"d/ntk/drift", "d/ntk/drift_stderr", "d/fdr/ratio/head"}


def test_kernels_are_images_black_to_white(tmp_path):
    recorder = TensorBoardRecorder(tmp_path)
    kernel = np.array([[0.0, 1.0], [1.0, 2.0]])
    recorder(3, [Reading("d/ntk/kernel", kernel)])
    recorder(4, [Reading("d/ntk/kernel", np.ones((300, 300)))])
    recorder.close()
    first, second = load(tmp_path).Images("d/ntk/kernel")
    assert (first.step, second.step) == (3, 4)
    pixels = np.asarray(Image.open(io.BytesIO(first.encoded_image_string)).convert("L"))
    assert pixels.shape == (256, 256)
    assert np.array_equal(pixels[::128, ::128], [[0, 127], [127, 255]])
    assert (second.height, second.width) == (300, 300)


def test_spectra_are_histograms(tmp_path):
    recorder = TensorBoardRecorder(tmp_path)
    recorder(2, [Reading("d/ntk/spectrum", np.array([1.0, 2.0, 4.0]))])
    recorder.close()
    (event,) = load(tmp_path).Histograms("d/ntk/spectrum")
    assert event.step == 2
    assert event.histogram_value.num == 3
    assert (event.histogram_value.min, event.histogram_value.max) == (1.0, 4.0)
    assert event.histogram_value.sum == 7.0


def test_arrays_that_are_not_finite_are_left_out(tmp_path):
    recorder = TensorBoardRecorder(tmp_path)
    recorder(0, [Reading("d/ntk/kernel", np.full((2, 2), np.nan)), Reading("d/a/b", 1.0)])
    recorder.close()
    tags = load(tmp_path).Tags()
    assert tags["images"] == []
    assert tags["scalars"] == ["d/a/b"]


def test_layout_reads_back_and_names_only_readings_that_exist(tmp_path):
    recorder = TensorBoardRecorder(tmp_path, layout=True, prefix="physics")
    expected = expected_words("physics", default_observables())
    recorder.expect(expected)
    control = [
        Reading(f"physics/control/{name}", 1.0, quantity=QUANTITIES[name])
        for name in ("learning_rate", "changes")
    ]
    recorder(0, control)
    recorder(1, [])
    recorder.close()
    events = load(tmp_path)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    assert category.title == "physics"
    titles = [chart.title for chart in category.chart]
    without = list(custom_scalars_layout("physics", expected)["physics"])
    assert titles == [*without, "learning rate", "changes made by controllers"]
    declared = {f"physics/{o.group}/{name}" for o in OBSERVABLES for name in o.quantities}
    declared |= {"physics/cost/fraction", "physics/cost/seconds"}
    declared |= {f"physics/control/{name}" for name in QUANTITIES}
    for chart in category.chart:
        for pattern in chart.multiline.tag:
            if "physics" in pattern:
                assert any(re.search(pattern, key) for key in declared), pattern
    for tag in ("train_loss", "val_loss", "loss"):
        charts = [c.title for c in category.chart if any(re.search(t, tag) for t in c.multiline.tag)]
        assert len(charts) == 1, (tag, charts)
    scales = [c for c in category.chart if any(re.search(t, "physics/noise/scale") for t in c.multiline.tag)]
    others = [
        c for c in category.chart if any(re.search(t, "physics/noise/sgd_scale") for t in c.multiline.tag)
    ]
    assert len(scales) == len(others) == 1
    assert scales[0].title != others[0].title


TITLES = {
    "losses": [".*loss$"],
    "kernel drift": ["ntk/drift"],
    "learning features? (turning beyond scale)": ["ntk/feature_change"],
    "kernel direction": ["ntk/distance", "ntk/alignment"],
    "kernel velocity": ["ntk/velocity"],
    "kernel spectrum": ["ntk/top_eigenvalue", "ntk/smallest_eigenvalue", "ntk/trace"],
    "input sensitivity (Jacobian)": [
        "jacobian/frobenius_norm",
        "jacobian/frobenius_rms",
        "jacobian/spectral_norm",
    ],
    "batch size right? (noise scale)": ["noise/scale"],
    "critical batch fraction": ["noise/critical_batch_fraction"],
    "SGD noise scale": ["noise/sgd_scale"],
    "SGD temperature": ["noise/temperature"],
    "fluctuation and dissipation": ["fdr/left", "fdr/right"],
    "stationary? (fdr ratio)": ["fdr/ratio"],
    "stationary: 1, not: 0": ["fdr/stationary"],
    "cost": ["cost/fraction"],
}


def charts(layout, prefix="d"):
    """Titles and readings of a layout."""
    return {
        title: [re.sub(rf"^\^{prefix}/(.*)\$$", r"\1", tag).replace("\\", "") for tag in tags]
        for title, (_, tags) in layout[prefix].items()
    }


@pytest.mark.parametrize("observables", [default_observables(), (NeuralTangentKernel(preconditioned=True),)])
def test_the_default_page_has_a_chart_for_each_question_in_this_order(observables):
    layout = custom_scalars_layout("d", expected_words("d", observables))
    assert charts(layout) == TITLES
    assert list(charts(layout)) == list(TITLES)


def test_what_else_is_measured_has_its_charts_behind_the_default_ones():
    layout = custom_scalars_layout("d", expected_words("d", [LearningRateLimit()]))
    assert charts(layout) == {**TITLES, "learning rate over its limit": ["control/lr_over_limit"]}


def test_a_monitor_tells_its_recorders_what_to_expect(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class TensorBoardLogger:
        experiment = SummaryWriter(str(tmp_path / "b"))

        def log_metrics(self, metrics, step):
            pass

    recorders = [
        TensorBoardRecorder(tmp_path / "a", layout=True),
        LoggersRecorder([TensorBoardLogger()], layout=True),
    ]
    with Monitor(model, optimizer, recorders=recorders) as monitor, monitor.micro_batch(torch.ones(2, 3)):
        model(torch.ones(2, 3)).sum().backward()
        monitor.before_step()
        optimizer.step()
    TensorBoardLogger.experiment.close()
    for folder in ("a", "b"):
        (event,) = load(tmp_path / folder).Tensors("custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        assert [chart.title for chart in layout.category[0].chart] == list(TITLES)


def test_without_being_told_the_page_shows_what_the_first_record_holds(tmp_path):
    recorder = TensorBoardRecorder(tmp_path, layout=True, prefix="d")
    words = Quantity("1", "A number.", chart="a chart")
    silent = Quantity("1", "A number.")
    readings = [Reading("d/a/b", 1.0, quantity=words), Reading("d/a/b/head", 1.0, quantity=words)]
    recorder(0, [*readings, Reading("d/a/c", 1.0, quantity=silent), Reading("d/a/d", 1.0)])
    recorder.close()
    (event,) = load(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    found = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert found == {"losses": [".*loss$"], "a chart": ["^d/a/b$"]}


def test_without_being_asked_no_layout_is_written(tmp_path):
    recorder = TensorBoardRecorder(tmp_path)
    recorder(0, [Reading("d/a/b", 1.0)])
    recorder.close()
    assert load(tmp_path).Tags()["tensors"] == []


def test_a_writer_of_ones_own_is_used_and_left_open(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    recorder = TensorBoardRecorder(writer)
    recorder(0, [Reading("d/a/b", 1.0)])
    recorder.close()
    writer.add_scalar("mine", 2.0, 1)
    writer.close()
    assert set(load(tmp_path).Tags()["scalars"]) == {"d/a/b", "mine"}


def test_without_tensorboard_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'gradiometer\[tensorboard\]'"):
        TensorBoardRecorder(tmp_path)


# -- resumed ---------------------------------------------------------------------------------------


def steps_of(folder, kind="Scalars", tag="dynamics/ntk/drift"):
    events = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    )
    return [event.step for event in getattr(events.Reload(), kind)(tag)]


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """Event files are named by the second, and read in that order."""
    clock = itertools.count(1_700_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: float(next(clock))))


def write(folder, steps, value=0.5):
    recorder = TensorBoardRecorder(folder)
    for step in steps:
        kernel, spectrum = np.full((2, 2), value), np.full(3, value)
        made = Decision(step, "EquilibriumLR", "learning_rate", "rule", {}, before=0.1, factor=0.1)
        recorder.record_decisions([made])
        recorder(
            step,
            [
                Reading("dynamics/ntk/drift", value),
                Reading("dynamics/ntk/kernel", kernel),
                Reading("dynamics/ntk/spectrum", spectrum),
            ],
        )
    recorder.close()


@pytest.mark.parametrize(
    ("kind", "tag"),
    [
        ("Scalars", "dynamics/ntk/drift"),
        ("Images", "dynamics/ntk/kernel"),
        ("Histograms", "dynamics/ntk/spectrum"),
    ],
)
def test_steps_made_again_after_a_crash_stand_there_once(tmp_path, kind, tag):
    write(tmp_path, range(15))
    write(tmp_path, range(10, 20))
    assert steps_of(tmp_path, kind, tag) == list(range(20))


def test_decisions_made_again_stand_there_once_as_tensorboard_reads_them(tmp_path):
    write(tmp_path, range(15))
    write(tmp_path, range(10, 20))
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    tag = "dynamics/control/EquilibriumLR/changes/text_summary"
    assert [event.step for event in events.Reload().Tensors(tag)] == list(range(20))


def test_a_run_resumed_twice_further_back_is_one_line(tmp_path):
    write(tmp_path, range(15))
    write(tmp_path, range(10, 13))
    write(tmp_path, range(5, 20))
    assert steps_of(tmp_path) == list(range(20))


def test_the_losses_of_the_script_stay_where_a_run_begins(tmp_path):
    with SummaryWriter(str(tmp_path)) as losses:
        for step in range(5):
            losses.add_scalar("loss", 1.0, step)
    write(tmp_path, range(5))
    assert steps_of(tmp_path, tag="loss") == steps_of(tmp_path) == list(range(5))


def test_a_recorder_that_is_never_written_to_can_be_closed(tmp_path):
    write(tmp_path, range(3))
    TensorBoardRecorder(tmp_path).close()
    assert steps_of(tmp_path) == [0, 1, 2]
