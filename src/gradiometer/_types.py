"""Type aliases shared by the numerical files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch of inputs to outputs ``[N, O]``."""
