"""Write readings into a TensorBoard run, beside the loss curves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, check_flag, check_kind, shown
from .readings import Decision, Quantity, Reading, make_key, scalars

if TYPE_CHECKING:
    import numpy as np

_IMAGE_EDGE = 256
_SUFFIX = ".gradiometer"
"""Ends the names of event files that are opened here."""


class TensorBoardRecorder:
    """Scalars with their errors, kernels as images, spectra as histograms, decisions as text.

    A run that was interrupted and goes on in its directory repeats steps: what the earlier run wrote there
    from the first of them on is hidden, as ``SummaryWriter(purge_step=...)`` does it.

    Args:
        log_dir: Run directory, or a ``SummaryWriter`` that is already open (it is not closed here). Where the
            script writes its losses into the same directory, pass its writer.
        layout: Also write a custom-scalars layout that groups the curves. A second layout in one run
            replaces the first, so it is off by default.
        prefix: Prefix of the keys in the layout and of the text.

    Raises:
        InputError: If TensorBoard is not installed, or nothing can be written there.

    Example:
        >>> import tempfile
        >>> recorder = TensorBoardRecorder(tempfile.mkdtemp())
        >>> recorder(7, [Reading("dynamics/ntk/drift", 0.5, stderr=0.1)]); recorder.close()
    """

    def __init__(self, log_dir: str | Path | Any, *, layout: bool = False, prefix: str = "dynamics") -> None:
        check_kind("prefix", prefix, str, '"dynamics"')
        check_flag("layout", layout)
        self._owned = isinstance(log_dir, (str, Path))
        if not self._owned and not callable(getattr(log_dir, "add_scalar", None)):
            raise InputError(
                "log_dir must be a folder or an open SummaryWriter",
                got=shown(log_dir),
                fix='Write TensorBoardRecorder("runs/a").',
            )
        self._resumed = isinstance(log_dir, (str, Path)) and any(Path(log_dir).glob(f"*tfevents*{_SUFFIX}"))
        self.writer: Any = _writer(log_dir) if isinstance(log_dir, (str, Path)) else log_dir
        self._prefix, self._layout = prefix, layout
        self._expected: dict[str, Quantity] = {}

    def expect(self, quantities: Mapping[str, Quantity]) -> None:
        """The words for what the run may read, by full key; they make the charts of the layout."""
        self._expected.update(quantities)

    def __call__(self, step: int, readings: Sequence[Reading]) -> None:
        """Write one record, before the first one the layout."""
        self._go_on(step)
        if self._layout:
            words = with_words(self._expected, readings)
            self.writer.add_custom_scalars(custom_scalars_layout(self._prefix, words))
            self._layout = False
        for key, value in scalars(list(readings)).items():
            self.writer.add_scalar(key, value, step)
        write_arrays(self.writer, step, readings)

    def record_decisions(self, decisions: Sequence[Decision]) -> None:
        """Write them as text."""
        for decision in decisions[:1]:
            self._go_on(decision.step)
        write_decisions(self.writer, decisions, self._prefix)

    def _go_on(self, step: int) -> None:
        """Before the first step that is written: hide what an interrupted run left from there on."""
        if self._resumed:
            hide_from(self.writer, step)
            self._resumed = False

    def close(self) -> None:
        """Flush, and close the writer if it was opened here."""
        self.writer.flush()
        if self._owned:
            self.writer.close()


def hide_from(writer: Any, step: int) -> None:
    """Hide what earlier runs wrote into the directory of a writer, from a step on.

    Args:
        writer: A ``SummaryWriter`` that has written nothing from that step on.
        step: The step at which the run goes on.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for _ in range(2):  # TensorBoard takes the first in a directory for the beginning of its run
        writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)


def write_arrays(writer: Any, step: int, readings: Sequence[Reading]) -> None:
    """Kernels as grey images (black is the smallest entry), spectra as histograms.

    Args:
        writer: An open ``SummaryWriter``.
        step: The optimizer step.
        readings: Readings of that step; numbers are left out.
    """
    import numpy as np  # whoever only reads records does not load it

    for reading in readings:
        if isinstance(reading.value, float) or not np.isfinite(reading.value).all():
            continue
        if reading.value.ndim == 2:
            writer.add_image(reading.key, _image(reading.value), step, dataformats="HW")
        elif reading.value.ndim == 1:
            writer.add_histogram(reading.key, reading.value, step)


def write_decisions(writer: Any, decisions: Sequence[Decision], prefix: str = "dynamics") -> None:
    """Decisions as text, one page for each controller's changes and one for its refusals.

    Args:
        writer: An open ``SummaryWriter``.
        decisions: What controllers decided at one step.
        prefix: First part of the tag.
    """
    for decision in decisions:
        name = f"{decision.controller}/{'changes' if decision.wanted else 'refusals'}"
        writer.add_text(make_key(prefix, "control", name), decision.sentence(), decision.step)


def custom_scalars_layout(prefix: str, quantities: Mapping[str, Quantity]) -> dict[str, dict[str, list[Any]]]:
    """A custom-scalars layout: the losses, then the charts that the quantities name, in their order.

    Args:
        prefix: Title of the page's category.
        quantities: The words for every reading that may come, by full key.

    Returns:
        What ``SummaryWriter.add_custom_scalars`` takes.

    Example:
        >>> ratio = Quantity("1", "Left over right.", chart="stationary?")
        >>> custom_scalars_layout("d", {"d/fdr/ratio": ratio})["d"]["stationary?"]
        ['Multiline', ['^d/fdr/ratio$']]
    """
    check_kind("prefix", prefix, str, '"dynamics"')
    check_kind("quantities", quantities, Mapping, '{"dynamics/group/name": Quantity("1", "Drift.")}')
    for key, quantity in quantities.items():
        check_kind("key", key, str, '"dynamics/group/name"')
        check_kind(f"quantities[{key!r}]", quantity, Quantity, 'Quantity("1", "Drift.")')
    charts: dict[str, list[Any]] = {"losses": ["Multiline", [".*loss$"]]}
    for key, quantity in quantities.items():
        if quantity.chart:
            _, patterns = charts.setdefault(quantity.chart, ["Multiline", []])
            patterns.append(f"^{re.escape(key)}$")
    return {prefix: charts}


def with_words(expected: Mapping[str, Quantity], first: Sequence[Reading]) -> dict[str, Quantity]:
    """The words for what a run may read, and for what its first record holds beside that.

    Args:
        expected: What a recorder was told to expect, by full key.
        first: The run's first record; readings of single sections are left out.
    """
    present = {
        reading.key: reading.quantity
        for reading in first
        if reading.quantity is not None and reading.key.count("/") == 2
    }
    return {**expected, **present}


def _writer(log_dir: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "TensorBoardRecorder needs tensorboard", fix="pip install 'gradiometer[tensorboard]'"
        ) from error
    try:
        return SummaryWriter(str(log_dir), filename_suffix=_SUFFIX)
    except (OSError, ValueError) as error:
        raise InputError("cannot write charts there", got=error, fix="Write to another folder.") from error


def _image(matrix: np.ndarray) -> np.ndarray:
    """Scale to 0..255 and enlarge small matrices to whole pixels per entry."""
    import numpy as np

    low, high = float(matrix.min()), float(matrix.max())
    grey = np.zeros_like(matrix) if high == low else (matrix - low) / (high - low)
    factor = max(1, _IMAGE_EDGE // len(matrix))
    return np.kron((255 * grey).astype(np.uint8), np.ones((factor, factor), np.uint8))
