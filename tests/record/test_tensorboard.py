import io
import math
import re
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from gradiometer import Reading, TensorBoardRecorder
from gradiometer.control.panel import QUANTITIES
from gradiometer.errors import InputError
from gradiometer.observables import OBSERVABLES
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
    control = [Reading(f"physics/control/{name}", 1.0) for name in ("learning_rate", "changes")]
    recorder(0, control)
    recorder(1, [])
    recorder.close()
    events = load(tmp_path)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    assert category.title == "physics"
    titles = [chart.title for chart in category.chart]
    assert titles == list(custom_scalars_layout("physics", control)["physics"])
    without = list(custom_scalars_layout("physics")["physics"])
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
