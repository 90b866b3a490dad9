"""A file that is added to the folder of observables is found by itself."""

import sys

import pytest

from gradiometer.errors import InputError
from gradiometer.observables import OBSERVABLES, gather


def folder(tmp_path, monkeypatch, **files):
    package = tmp_path / "quantities"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "quantities", raising=False)
    return [str(package)]


def test_what_files_list_are_names_of_the_folder(tmp_path, monkeypatch):
    path = folder(tmp_path, monkeypatch, a="__all__ = ['X']\nX, Y = 1, 2", b="__all__ = ['Z']\nZ = 3")
    assert gather("quantities", path) == {"X": 1, "Z": 3}


def test_two_files_may_not_list_one_name(tmp_path, monkeypatch):
    path = folder(tmp_path, monkeypatch, c="__all__ = ['X']\nX = [1]", d="__all__ = ['X']\nX = [2]")
    with pytest.raises(InputError, match=r"list one name in __all__, got 'X', the second time in d\.py"):
        gather("quantities", path)


def test_the_default_set_comes_first():
    names = [kind.__name__ for kind in OBSERVABLES]
    assert names[:4] == [
        "NeuralTangentKernel",
        "JacobianNorm",
        "GradientNoiseScale",
        "FluctuationDissipation",
    ]
    assert names[4:] == sorted(names[4:])
