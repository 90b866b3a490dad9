"""What one step of each optimizer is, one family a file; see :mod:`.base`.

A new optimizer is one more file in this folder: a subclass of :class:`Family` whose ``classes`` names it, and
``register(...)`` of one instance at the end. Files are found by themselves.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import Family, GroupSettings, ParameterStep, family_of, register, unwrapped
from .updates import displacements, group_settings, rebuilds, squared_displacements, step_was_made

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = [
    "Family",
    "GroupSettings",
    "ParameterStep",
    "displacements",
    "family_of",
    "group_settings",
    "rebuilds",
    "register",
    "squared_displacements",
    "step_was_made",
    "unwrapped",
]
