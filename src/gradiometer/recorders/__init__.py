"""Where readings go: any callable ``(step, readings) -> None``; these three are at hand."""

from .base import Recorder
from .json_lines import JSONLinesRecorder, read_json_lines
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
    "read_json_lines",
]
