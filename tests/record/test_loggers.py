import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradiometer import Reading
from gradiometer.record.base import Recorder
from gradiometer.record.loggers import LoggersRecorder


class Logger:
    def __init__(self):
        self.lines = []

    def log_metrics(self, metrics, step):
        self.lines.append((step, metrics))


READINGS = [
    Reading("dynamics/ntk/drift", 0.5, stderr=0.25),
    Reading("dynamics/fdr/ratio/head", 2.0, stderr=0.5),
    Reading("dynamics/ntk/kernel", np.eye(3)),
]


def test_every_logger_gets_the_numbers_under_the_step():
    loggers = [Logger(), Logger()]
    recorder = LoggersRecorder(loggers)
    assert isinstance(recorder, Recorder)
    recorder(7, READINGS)
    expected = {
        "dynamics/ntk/drift": 0.5,
        "dynamics/ntk/drift_stderr": 0.25,
        "dynamics/fdr/ratio/head": 2.0,
        "dynamics/fdr/ratio_stderr/head": 0.5,
    }
    assert loggers[0].lines == loggers[1].lines == [(7, expected)]


def test_no_logger_is_fine():
    LoggersRecorder([])(0, READINGS)


@pytest.mark.parametrize("layout", [False, True])
def test_tensorboard_also_gets_arrays_and_the_layout(tmp_path, layout):
    board = TensorBoardLogger(tmp_path, name="", version="")
    LoggersRecorder([board], layout=layout)(7, READINGS)
    board.experiment.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Images("dynamics/ntk/kernel")] == [7]
    assert [(e.step, e.value) for e in events.Scalars("dynamics/ntk/drift")] == [(7, 0.5)]
    assert ("custom_scalars__config__" in events.Tags()["tensors"]) == layout
