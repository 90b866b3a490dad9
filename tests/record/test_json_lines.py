import json
import math

import numpy as np
import pytest

from gradiometer import JSONLinesRecorder, Reading
from gradiometer.errors import InputError
from gradiometer.record import read_json_lines
from gradiometer.record.readings import RECORD_FORMAT, RECORD_FORMAT_VERSION


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
