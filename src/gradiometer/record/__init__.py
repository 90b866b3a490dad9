"""Where readings and decisions go: any callable ``(step, readings) -> None``; these three are at hand."""

from .base import Recorder
from .json_lines import JSONLinesRecorder, read_decisions, read_json_lines
from .loggers import LoggersRecorder
from .memory import MemoryRecorder
from .tensorboard import TensorBoardRecorder, custom_scalars_layout

__all__ = [
    "JSONLinesRecorder",
    "LoggersRecorder",
    "MemoryRecorder",
    "Recorder",
    "TensorBoardRecorder",
    "custom_scalars_layout",
    "read_decisions",
    "read_json_lines",
]
