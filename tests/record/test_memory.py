import pytest

from gradiometer import MemoryRecorder, Reading
from gradiometer.errors import InputError


def test_only_the_last_records_are_kept():
    recorder = MemoryRecorder(max_records=3)
    for step in range(10):
        recorder(step, [Reading("d/ntk/drift", float(step), stderr=0.5)])
    assert recorder.series("d/ntk/drift") == [(7, 7.0), (8, 8.0), (9, 9.0)]
    assert recorder.series("d/ntk/drift_stderr") == [(7, 0.5), (8, 0.5), (9, 0.5)]
    assert recorder.series("d/ntk/other") == []


def test_latest_is_the_last_reading_of_every_key():
    recorder = MemoryRecorder()
    recorder(0, [Reading("d/a/x", 1.0), Reading("d/b/y", 2.0)])
    recorder(1, [Reading("d/a/x", 3.0)])
    assert {key: r.value for key, r in recorder.latest().items()} == {"d/a/x": 3.0, "d/b/y": 2.0}


def test_it_keeps_its_own_list():
    recorder, mine = MemoryRecorder(), [Reading("d/a/x", 1.0)]
    recorder(0, mine)
    mine.clear()
    assert recorder.series("d/a/x") == [(0, 1.0)]


def test_an_empty_memory_is_refused():
    with pytest.raises(InputError, match=r"max_records must be a whole number at least 1 .*, got 0"):
        MemoryRecorder(max_records=0)
