"""The observables, one file each: pure functions, then the class that connects them.

A file that is added to this folder is found by itself: what it lists in ``__all__`` is a name of the folder,
and an observable among that is one of ``OBSERVABLES``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:  # what a type checker knows of this folder; anything else is of any type to it
    from .base import *
    from .fluctuation_dissipation import *
    from .gradient_noise_scale import *
    from .jacobian_norm import *
    from .learning_rate_limit import *
    from .neural_tangent_kernel import *
    from .noise_curvature import *
    from .schedules import *
    from .second_fluctuation_dissipation import *

    def __getattr__(name: str) -> Any: ...


def gather(package: str, folder: Sequence[str]) -> dict[str, Any]:
    """Everything that the files of a folder list in ``__all__``, by name.

    Args:
        package: The folder's name as a package.
        folder: Where it lies, its ``__path__``.

    Raises:
        InputError: If two files list one name.
    """
    names: dict[str, Any] = {}
    for name in sorted(info.name for info in iter_modules(folder)):
        module = import_module(f"{package}.{name}")
        for public in getattr(module, "__all__", ()):
            if public in names and names[public] is not getattr(module, public):
                raise InputError(
                    f"two files of {package} list one name in __all__",
                    got=f"{public!r}, the second time in {name}.py",
                    fix="Rename one of them.",
                )
            names[public] = getattr(module, public)
    return names


_NAMES = gather(__name__, __path__)
globals().update(_NAMES)

DEFAULT_OBSERVABLES: tuple[type[Observable], ...] = tuple(
    _NAMES[name]
    for name in ("NeuralTangentKernel", "JacobianNorm", "GradientNoiseScale", "FluctuationDissipation")
)
"""The default set."""
OBSERVABLES: tuple[type[Observable], ...] = (
    *DEFAULT_OBSERVABLES,
    *(
        value
        for _, value in sorted(_NAMES.items())
        if isinstance(value, type)
        and issubclass(value, Observable)
        and not inspect.isabstract(value)
        and value not in DEFAULT_OBSERVABLES
    ),
)
"""Every observable that ships."""


def default_observables() -> tuple[Observable, ...]:
    """The default set, each at its default cadence.

    Example:
        >>> [observable.group for observable in default_observables()]
        ['ntk', 'jacobian', 'noise', 'fdr']
    """
    return tuple(observable() for observable in DEFAULT_OBSERVABLES)


__all__ = ["DEFAULT_OBSERVABLES", "OBSERVABLES", "default_observables", "gather"]
__all__ += list(_NAMES)
