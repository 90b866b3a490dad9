"""Acting on readings: controllers, what they decide, and how it reaches the run.

A file that is added to this folder is found by itself: what it lists in ``__all__`` is a name of the folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..observables import gather

if TYPE_CHECKING:  # what a type checker knows of this folder; anything else is of any type to it
    from .base import *
    from .batch_size import *
    from .jacobian_regularizer import *
    from .learning_rate import *
    from .panel import *
    from .rates import *
    from .sampler import *
    from .stop_when_settled import *

    def __getattr__(name: str) -> Any: ...


_NAMES = gather(__name__, __path__)
globals().update(_NAMES)

__all__ = list(_NAMES)
