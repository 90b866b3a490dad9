"""One JSON object per recording step and per decision, behind a header line with the format version."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .readings import RECORD_FORMAT, RECORD_FORMAT_VERSION, Decision, Reading


class JSONLinesRecorder:
    """Appends records to a file that any program can read.

    Numbers that are not finite become ``null``; arrays become nested lists. A file that exists is
    continued, so a resumed run keeps its history.

    Args:
        path: The file; its folder is made.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> recorder = JSONLinesRecorder(path)
        >>> recorder(7, [Reading("dynamics/ntk/drift", 0.5, stderr=0.1)]); recorder.close()
        >>> [record["step"] for record in read_json_lines(path)]
        [7]
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists() or path.stat().st_size == 0
        self._file = path.open("a", encoding="utf-8")
        if fresh:
            self._write({"format": RECORD_FORMAT, "version": RECORD_FORMAT_VERSION})

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
        self._write({"step": step, "readings": body})

    def record_decisions(self, decisions: Sequence[Decision]) -> None:
        """Append a line for each."""
        for decision in decisions:
            self._write({"step": decision.step, "decision": decision.plain()})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The readings in a file, header checked.

    Args:
        path: A file written by :class:`JSONLinesRecorder`.

    Yields:
        ``{"step": ..., "readings": {key: {"value", "stderr", "low", "high", "resolved", "unit",
        "sentence", "note"}}}``.

    Raises:
        InputError: If the file is something else or of a newer version.
    """
    return (line for line in _lines(path) if "readings" in line)


def read_decisions(path: str | Path) -> Iterator[Decision]:
    """The decisions in a file, header checked.

    Args:
        path: A file written by :class:`JSONLinesRecorder`.

    Yields:
        What controllers decided, refusals included, in the order of the run.

    Raises:
        InputError: If the file is something else or of a newer version.
    """
    return (Decision.from_plain(line["decision"]) for line in _lines(path) if "decision" in line)


def _lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Every line behind the header."""
    with Path(path).open(encoding="utf-8") as lines:
        try:
            header = json.loads(next(lines, "{}"))
        except json.JSONDecodeError:
            header = {}
        readable = isinstance(header, dict) and header.get("format") == RECORD_FORMAT
        if not readable or header["version"] > RECORD_FORMAT_VERSION:
            raise InputError(
                f"not a {RECORD_FORMAT} file of version {RECORD_FORMAT_VERSION} or older",
                got=f"{path}",
                fix="Read it with the version of gradiometer that wrote it.",
            )
        for line in lines:
            yield json.loads(line)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_plain(part) for part in value.tolist()] if hasattr(value, "tolist") else [*map(_plain, value)]
