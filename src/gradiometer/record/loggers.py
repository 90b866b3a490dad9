"""Hand readings and decisions to the loggers of a training framework, whatever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import check_flag, check_kind, check_list, check_number
from .readings import Decision, Quantity, Reading, scalars
from .tensorboard import custom_scalars_layout, hide_from, with_words, write_arrays, write_decisions


class LoggersRecorder:
    """Calls ``log_metrics(dict, step)`` on every logger; TensorBoard also gets arrays and decisions.

    Loggers are told apart by the name of their class, which serves both namespaces of Lightning and
    imports nothing.

    Args:
        loggers: Objects with ``log_metrics``.
        layout: Also write a custom-scalars layout into TensorBoard.
        prefix: Prefix of the keys in the layout and of the text.
        step: The optimizer step at which the run begins; where it goes on in the directory of an interrupted
            one, what that one wrote into TensorBoard from this step on is hidden.

    Raises:
        InputError: If an argument cannot be used.

    Example:
        >>> class Logger:
        ...     def log_metrics(self, metrics, step):
        ...         print(step, metrics)
        >>> LoggersRecorder([Logger()])(7, [Reading("dynamics/ntk/drift", 0.5)])
        7 {'dynamics/ntk/drift': 0.5}
    """

    def __init__(
        self, loggers: Sequence[Any], *, layout: bool = False, prefix: str = "dynamics", step: int = 0
    ) -> None:
        check_list(
            "loggers", loggers, "loggers", lambda log: hasattr(log, "log_metrics"), "TensorBoardLogger()"
        )
        check_flag("layout", layout)
        check_kind("prefix", prefix, str, '"dynamics"')
        check_number("step", step, least=0, integer=True, example="0")
        self._loggers = list(loggers)
        self._prefix, self._layout, self._step = prefix, layout, step
        self._boards = [logger for logger in self._loggers if type(logger).__name__ == "TensorBoardLogger"]
        self._expected: dict[str, Quantity] = {}

    @classmethod
    def apart(cls, loggers: Sequence[Any], **settings: Any) -> list[LoggersRecorder]:
        """A recorder for each logger, so that one that fails takes nothing from the others.

        Args:
            loggers: Objects with ``log_metrics``.
            settings: Further arguments of each.
        """
        return [cls([logger], **settings) for logger in loggers]

    def expect(self, quantities: Mapping[str, Quantity]) -> None:
        """The words for what the run may read, by full key; they make the charts of the layout."""
        for board in self._boards if self._step else ():
            writer = board.experiment
            if len([*Path(writer.log_dir).glob("*tfevents*")]) > 1:  # its own file and an earlier one
                hide_from(writer, self._step)
        self._expected.update(quantities)

    def __call__(self, step: int, readings: Sequence[Reading]) -> None:
        """Log one record, before the first one the layout."""
        for board in self._boards if self._layout else ():
            words = with_words(self._expected, readings)
            board.experiment.add_custom_scalars(custom_scalars_layout(self._prefix, words))
        self._layout = False
        numbers = scalars(list(readings))
        for logger in self._loggers:
            logger.log_metrics(numbers, step=step)
        for board in self._boards:
            write_arrays(board.experiment, step, readings)

    def record_decisions(self, decisions: Sequence[Decision]) -> None:
        """Write them as text where there is a TensorBoard."""
        for board in self._boards:
            write_decisions(board.experiment, decisions, self._prefix)
