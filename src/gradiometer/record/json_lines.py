"""One JSON object per recording step and per decision, behind a header line with the format version."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, MeasurementWarning, check_kind
from .readings import RECORD_FORMAT, RECORD_FORMAT_VERSION, Decision, Reading

_HEADER = {"format": RECORD_FORMAT, "version": RECORD_FORMAT_VERSION}
_BEGINNING = b'{"step": '
"""Every line behind the header begins so; inside a string the quotes would be escaped."""


class JSONLinesRecorder:
    """Appends records to a file that any program can read.

    Numbers that are not finite become ``null``; arrays become nested lists. A file that exists is
    continued, so a resumed run keeps its history. Where a resumed run repeats steps, their lines carry
    ``"replayed": true``, and :func:`read_json_lines` gives each step once. A line that was cut off, because
    the process was killed or the disk was full, is left behind as it is, and the next one begins anew.

    Args:
        path: The file; its folder is made.

    Raises:
        InputError: If there is a file of another kind, or of a newer version.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> recorder = JSONLinesRecorder(path)
        >>> recorder(7, [Reading("dynamics/ntk/drift", 0.5, stderr=0.1)]); recorder.close()
        >>> [record["step"] for record in read_json_lines(path)]
        [7]
    """

    def __init__(self, path: str | Path) -> None:
        path = _checked(path)
        self._replayed_to, self._cut_off = -1, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            begun = path.exists() and not _is_beginning_of_header(path)
            if begun:
                self._go_on(path)
            self._file = path.open("ab", buffering=0)  # each line goes to the end, whoever else writes
            if not begun:
                self._file.truncate(0)
                self._write(_HEADER)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError("cannot write records there", got=error, fix="Write to another file.") from error

    def _go_on(self, path: Path) -> None:
        """Look at what is there already."""
        lines = _Lines(path)
        self._replayed_to = max((line["step"] for _, line in lines), default=-1)
        self._cut_off = lines.cut_off
        if self._cut_off:
            _say(f"the last line of {path} was cut off: the next record begins on a line of its own.")

    def __call__(self, step: int, readings: Sequence[Reading]) -> None:
        """Append one line."""
        body = {
            r.key: {
                "value": _plain(r.value),
                "stderr": _plain(r.stderr),
                "low": _plain(r.low),
                "high": _plain(r.high),
                "resolved": r.resolved,
                "unit": r.unit,
                "sentence": r.sentence,
                "note": r.note,
            }
            for r in readings
        }
        self._append(step, {"readings": body})

    def record_decisions(self, decisions: Sequence[Decision]) -> None:
        """Append a line for each."""
        for decision in decisions:
            self._append(decision.step, {"decision": decision.plain()})

    def _append(self, step: int, content: dict[str, Any]) -> None:
        mark = {"replayed": True} if step <= self._replayed_to else {}
        self._write({"step": step, **mark, **content})

    def _write(self, line: dict[str, Any]) -> None:
        """Write one line at once, behind whatever is left of one that failed."""
        rest = b"\n" * self._cut_off + json.dumps(line, allow_nan=False).encode() + b"\n"
        self._cut_off = True
        while rest:
            rest = rest[self._file.write(rest) :]
        self._cut_off = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The readings in a file, header checked, in the order of their steps.

    Of a step that a resumed run has repeated, the latest record counts; what an interrupted run wrote from
    there on is left out. Lines that cannot be read are passed over, and a warning says which.

    Args:
        path: A file written by :class:`JSONLinesRecorder`.

    Yields:
        ``{"step": ..., "readings": {key: {"value", "stderr", "low", "high", "resolved", "unit",
        "sentence", "note"}}}``.

    Raises:
        InputError: If the file cannot be read, is something else or of a newer version.
    """
    return (line for line in _run(*_opened(path)) if "readings" in line)


def read_decisions(path: str | Path) -> Iterator[Decision]:
    """The decisions in a file, header checked; repeated steps and broken lines as for the readings.

    Args:
        path: A file written by :class:`JSONLinesRecorder`.

    Yields:
        What controllers decided, refusals included, in the order of the run.

    Raises:
        InputError: If the file is something else or of a newer version.
    """
    return (Decision.from_plain(line["decision"]) for line in _run(*_opened(path)) if "decision" in line)


def _opened(path: str | Path) -> tuple[Path, _Lines]:
    """The file and its lines, refused at once where they cannot be read."""
    path = _checked(path)
    try:
        return path, _Lines(path)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            "cannot read records there", got=error, fix="Pass the path that JSONLinesRecorder was given."
        ) from error


def _run(path: Path, lines: _Lines) -> Iterator[dict[str, Any]]:
    """The lines of one run, by step: what was written before a resumption and again after it comes once."""
    places: dict[tuple[Any, ...], tuple[int, int]] = {}
    before, replaying = -1, False
    for place, line in lines:
        step, replayed = line["step"], "replayed" in line
        if replayed and not (replaying and step >= before):  # a resumption, which begins at this step
            places = {key: written for key, written in places.items() if key[0] < step}
        places[_identity(line)] = place
        before, replaying = step, replayed
    if lines.broken:
        numbers = ", ".join(map(str, lines.broken[:5])) + ", ..." * (len(lines.broken) > 5)
        _say(f"{path} holds lines that cannot be read, and they are left out: {numbers}.")
    with path.open("rb") as file:
        for _, (begin, end) in sorted(places.items(), key=lambda item: item[0][0]):
            file.seek(begin)
            yield json.loads(file.read(end - begin))


def _identity(line: dict[str, Any]) -> tuple[Any, ...]:
    """What a later line of the same step takes the place of: the same monitor's, the same controller's."""
    if "readings" in line:
        return line["step"], next(iter(line["readings"]), "").partition("/")[0]
    decision = Decision.from_plain(line["decision"])
    return line["step"], decision.controller, decision.knob, decision.group


class _Lines:
    """Every line behind the header that can be read, with where it stands in the file.

    Args:
        path: The file.

    Raises:
        InputError: If the header is of something else or of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.broken: list[int] = []
        """Numbers of the lines that could not be read, from 1."""
        with path.open("rb") as file:
            header = _parsed(file.readline())
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            self.cut_off = file.read() != b"\n"
            """Whether the file ends in the middle of a line."""
        readable = isinstance(header, dict) and header.get("format") == RECORD_FORMAT
        version = header.get("version") if isinstance(header, dict) else None
        if not readable or not isinstance(version, int) or version > RECORD_FORMAT_VERSION:
            raise InputError(
                f"not a {RECORD_FORMAT} file of version {RECORD_FORMAT_VERSION} or older",
                got=f"{path}",
                fix="Read it with the version of gradiometer that wrote it, or write to another file.",
            )

    def __iter__(self) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        with self._path.open("rb") as file:
            end = len(file.readline())
            for number, raw in enumerate(file, 2):
                begin, end = end, end + len(raw)
                line = _parsed(raw)
                if line is None:  # two writers, or an older recorder: a good line behind half a one
                    cut = raw.rfind(_BEGINNING)
                    begin, line = begin + max(cut, 0), _parsed(raw[cut:]) if cut > 0 else None
                    self.broken += [number] * bool(raw.strip())
                if line is not None and _fits(line):
                    yield (begin, end), line
                elif line is not None and line != _HEADER:  # which two writers at once write twice
                    self.broken.append(number)


def _parsed(raw: bytes) -> Any:
    """A line's content; ``None`` where it is not JSON."""
    try:
        return json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None


def _fits(line: Any) -> bool:
    """Whether a line is a record or a decision."""
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return False
    if "readings" in line:
        return isinstance(line["readings"], dict)
    try:
        Decision.from_plain(line["decision"])
    except (KeyError, TypeError, AttributeError):
        return False
    return True


def _is_beginning_of_header(path: Path) -> bool:
    """Whether a file is empty, or was cut off in its first line, so that nothing is lost with it."""
    with path.open("rb") as file:
        first = file.readline()
    header = json.dumps(_HEADER).encode()
    return header.startswith(first)


def _checked(path: str | Path) -> Path:
    check_kind("path", path, (str, Path), '"run.jsonl"')
    return Path(path)


def _say(message: str) -> None:
    warnings.warn(message, MeasurementWarning, stacklevel=3)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_plain(part) for part in value.tolist()] if hasattr(value, "tolist") else [*map(_plain, value)]
