import json
import math

import numpy as np
import pytest

from gradiometer import JSONLinesRecorder, Reading
from gradiometer.errors import InputError, MeasurementWarning
from gradiometer.record import read_decisions, read_json_lines
from gradiometer.record.readings import RECORD_FORMAT, RECORD_FORMAT_VERSION, Decision


def readings(value=0.5):
    kernel = np.array([[1.0, math.inf], [math.nan, 2.0]])
    return [
        Reading("d/ntk/drift", value, stderr=0.25, unit="1", sentence="How far.", note="16 examples"),
        Reading("d/ntk/kernel", kernel, unit="output^2/parameter^2"),
    ]


def test_header_names_format_and_version(tmp_path):
    JSONLinesRecorder(tmp_path / "deep" / "run.jsonl").close()
    (line,) = (tmp_path / "deep" / "run.jsonl").read_text().splitlines()
    assert json.loads(line) == {"format": RECORD_FORMAT, "version": RECORD_FORMAT_VERSION}
    assert list(read_json_lines(tmp_path / "deep" / "run.jsonl")) == []


def test_records_read_back_with_everything_a_reading_holds(tmp_path):
    recorder = JSONLinesRecorder(tmp_path / "run.jsonl")
    recorder(3, readings())
    recorder.close()
    (record,) = read_json_lines(tmp_path / "run.jsonl")
    assert record["step"] == 3
    assert record["readings"]["d/ntk/drift"] == {
        "value": 0.5,
        "stderr": 0.25,
        "low": None,
        "high": None,
        "resolved": True,
        "unit": "1",
        "sentence": "How far.",
        "note": "16 examples",
    }
    assert record["readings"]["d/ntk/kernel"]["value"] == [[1.0, None], [None, 2.0]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
    recorder = JSONLinesRecorder(tmp_path / "run.jsonl")
    recorder(0, [Reading("d/ntk/drift", value)])
    recorder.close()
    text = (tmp_path / "run.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (record,) = read_json_lines(tmp_path / "run.jsonl")
    assert record["readings"]["d/ntk/drift"]["value"] is None
    assert record["readings"]["d/ntk/drift"]["stderr"] is None


def test_a_file_that_exists_is_continued_under_one_header(tmp_path):
    for step in (0, 1):
        recorder = JSONLinesRecorder(tmp_path / "run.jsonl")
        recorder(step, readings())
        recorder.close()
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert sum("format" in json.loads(line) for line in lines) == 1
    assert [record["step"] for record in read_json_lines(tmp_path / "run.jsonl")] == [0, 1]


def test_every_record_is_on_disk_at_once(tmp_path):
    recorder = JSONLinesRecorder(tmp_path / "run.jsonl")
    recorder(0, readings())
    assert len(list(read_json_lines(tmp_path / "run.jsonl"))) == 1
    recorder.close()


@pytest.mark.parametrize(
    "first",
    [
        json.dumps({"format": RECORD_FORMAT, "version": RECORD_FORMAT_VERSION + 1}),
        json.dumps({"format": "something else", "version": 1}),
        json.dumps([1, 2]),
        "no json",
        "",
    ],
    ids=["newer", "other format", "no object", "no json", "empty"],
)
def test_other_and_newer_files_are_refused(tmp_path, first):
    (tmp_path / "run.jsonl").write_text(first + "\n" if first else "")
    with pytest.raises(InputError, match=r"version of gradiometer that wrote it"):
        list(read_json_lines(tmp_path / "run.jsonl"))


# -- interrupted, resumed, shared ------------------------------------------------------------------


def decision(step, factor=0.1):
    read = {"fdr/ratio": (1.0, 0.1)}
    return Decision(step, "EquilibriumLR", "learning_rate", "a rule", read, before=0.1, factor=factor)


def write(path, steps, value=0.5, decide=()):
    recorder = JSONLinesRecorder(path)
    for step in steps:
        if step in decide:
            recorder.record_decisions([decision(step)])
        recorder(step, readings(value))
    recorder.close()


def read(path):
    """Steps and drifts."""
    return {line["step"]: line["readings"]["d/ntk/drift"]["value"] for line in read_json_lines(path)}


def half(path, size=40):
    path.write_bytes(path.read_bytes()[:-size])


@pytest.mark.filterwarnings("error")
def test_several_half_lines_are_left_behind_and_each_is_said_once(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, range(3))
    for begin in (2, 5, 8):
        half(path)
        with pytest.warns(MeasurementWarning, match="cut off") as caught:
            write(path, range(begin, begin + 4))
        assert len(caught) == 1
    with pytest.warns(MeasurementWarning, match=r"left out: 4, 8, 12\.") as caught:
        assert sorted(read(path)) == list(range(12))
    assert len(caught) == 1


@pytest.mark.filterwarnings("error")
def test_a_last_line_without_its_newline_is_whole(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, range(3))
    half(path, 1)
    assert sorted(read(path)) == [0, 1, 2]
    with pytest.warns(MeasurementWarning, match="line of its own"):
        write(path, [3])
    assert sorted(read(path)) == [0, 1, 2, 3]


def test_a_record_behind_half_a_line_of_an_older_recorder_is_read(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, range(4))
    header, *lines = path.read_text().splitlines()
    glued = [header, lines[0], lines[1][:60] + lines[2], lines[3], ""]
    path.write_text("\n".join(glued))
    with pytest.warns(MeasurementWarning, match=r"left out: 3\."):
        assert sorted(read(path)) == [0, 2, 3]


@pytest.mark.parametrize(
    "junk",
    [b"\xff\xfe\x80", b"\x00" * 50, b"[" * 100_000, b"5", b'{"step": 3}', b'{"step": 3, "decision": {}}'],
    ids=["no text", "zeros", "deep", "number", "neither", "empty decision"],
)
def test_a_line_that_is_no_record_is_passed_over_by_both_readers(tmp_path, junk):
    path = tmp_path / "run.jsonl"
    write(path, [0, 1], decide=[1])
    with path.open("ab") as file:
        file.write(junk + b"\n")
    write(path, [2], decide=[2])
    with pytest.warns(MeasurementWarning, match=r"left out: 5\."):
        assert sorted(read(path)) == [0, 1, 2]
    with pytest.warns(MeasurementWarning, match=r"left out: 5\."):
        assert list(read_decisions(path)) == [decision(1), decision(2)]


@pytest.mark.parametrize(
    "text",
    ["loss,step\n1,2\n", '{"step": 1}\n', "\x00" * 9, json.dumps({"format": RECORD_FORMAT}) + "\n"],
    ids=["table", "other json", "zeros", "no version"],
)
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"not a gradiometer-records file .* write to another file"):
        JSONLinesRecorder(path)
    assert path.read_text() == text


@pytest.mark.parametrize("size", [0, 1, 30])
def test_a_file_cut_off_in_its_header_begins_anew(tmp_path, size):
    path = tmp_path / "run.jsonl"
    JSONLinesRecorder(path).close()
    path.write_bytes(path.read_bytes()[:size])
    write(path, [0, 1])
    assert sorted(read(path)) == [0, 1]


def test_a_full_disk_costs_the_records_of_that_time_only(tmp_path):
    path = tmp_path / "run.jsonl"
    recorder = JSONLinesRecorder(path)

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 100

        def write(self, data):
            if self.room == 0:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

    recorder(0, readings())
    disk, recorder._file = recorder._file, Full(recorder._file)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space"):
            recorder(step, readings())
    recorder._file = disk
    recorder(3, readings())
    recorder.close()
    with pytest.warns(MeasurementWarning, match=r"left out: 3\."):
        assert sorted(read(path)) == [0, 3]


@pytest.mark.filterwarnings("error")
def test_two_writers_do_not_spoil_each_others_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    left, right = JSONLinesRecorder(path), JSONLinesRecorder(path)
    for step in range(0, 20, 2):
        left(step, readings())
        right(step + 1, readings())
    left.close()
    right.close()
    assert sorted(read(path)) == list(range(20))


@pytest.mark.filterwarnings("error")
def test_two_monitors_that_share_a_file_keep_their_records_of_one_step(tmp_path):
    path = tmp_path / "run.jsonl"
    recorder = JSONLinesRecorder(path)
    for prefix in ("generator", "critic"):
        recorder(3, [Reading(f"{prefix}/ntk/drift", 0.5)])
    recorder.close()
    records = list(read_json_lines(path))
    assert [next(iter(record["readings"])) for record in records] == [
        "generator/ntk/drift",
        "critic/ntk/drift",
    ]


@pytest.mark.filterwarnings("error")
def test_steps_made_again_after_a_crash_are_marked_and_read_once(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, range(15), value=1.0, decide=[4, 12])
    write(path, range(10, 20), value=2.0, decide=[13])
    marked = [json.loads(line).get("replayed") for line in path.read_text().splitlines()]
    assert marked.count(True) == 6
    assert list(read_json_lines(path))[-1]["step"] == 19
    assert read(path) == {**dict.fromkeys(range(10), 1.0), **dict.fromkeys(range(10, 20), 2.0)}
    assert [made.step for made in read_decisions(path)] == [4, 13]


@pytest.mark.filterwarnings("error")
def test_a_run_resumed_twice_further_back_is_read_once_in_order(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, range(15), value=1.0, decide=[12])
    write(path, range(10, 13), value=2.0, decide=[11])
    write(path, range(5, 25, 2), value=3.0, decide=[9])
    assert list(read(path)) == [0, 1, 2, 3, 4, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]
    assert set(list(read(path).values())[5:]) == {3.0}
    assert [made.step for made in read_decisions(path)] == [9]
