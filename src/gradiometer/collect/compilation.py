"""Whether hooks on modules would be compiled into the user's graphs.

The compiler looks at a module's hooks when it compiles, and again at each call: graphs are cut at them, and
each piece draws random numbers of its own. So hooks are put on only where nothing is compiled.
"""

from __future__ import annotations

import sys

from torch import nn

from ..errors import TooEarlyError, UnsupportedError


class CompilerWatch:
    """What the compiler has been asked for in this process, and has done, from step to step.

    Example:
        >>> CompilerWatch().refusal(nn.Linear(2, 2)) is None
        True
    """

    def __init__(self) -> None:
        self._at_last_step: tuple[int, ...] | None = None

    def step_made(self) -> None:
        """A whole step has passed, with no hook of ours where the compiler has been asked for anything."""
        self._at_last_step = _asked_for()

    def refusal(self, model: nn.Module) -> TooEarlyError | UnsupportedError | None:
        """Why no hook may be put on a model's modules now, or ``None``.

        Args:
            model: The module being trained.
        """
        asked_for = _asked_for()
        if not asked_for:
            return None
        if not _has_compiled() and not any(map(_is_compiled, model.modules())):
            if asked_for == self._at_last_step:
                return None  # for something else that has not run either
            return TooEarlyError("whether the model is compiled shows in its first step")
        return UnsupportedError(
            "per-example gradients are not available: torch.compile is at work, and hooks would change what "
            "it compiles",
            fix="Pass loss_fn= to have batches split, or accumulate over two or more micro-batches.",
        )


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def _asked_for() -> tuple[int, ...]:
    """The backends that ``torch.compile`` was called with; none where the compiler is not even loaded."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    backends = None if eval_frame is None else eval_frame.cached_backends
    if not backends:
        return ()
    return tuple(key for key, backend in backends.items() if backend is not None)


def _has_compiled() -> bool:
    """Whether a frame was compiled since the counters were last cleared."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and utils.counters["frames"]["total"] > 0
