"""The wheel holds every source file, and nothing else."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sources():
    """Paths inside the wheel of every source file in the tree."""
    found = {
        f"gradiometer/{path.relative_to(ROOT / 'src' / 'gradiometer').as_posix()}"
        for path in (ROOT / "src" / "gradiometer").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    return found | {
        f"gradiometer/callbacks/{path.relative_to(ROOT / 'callbacks').as_posix()}"
        for path in (ROOT / "callbacks").rglob("*.py")
    }


def configuration():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left behind in the tree."""
    folder = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
    for name in ("src", "callbacks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {
            name: archive.read(name).decode() for name in archive.namelist() if not name.endswith("RECORD")
        }


def test_the_wheel_holds_the_tree(wheel):
    files = {name for name in wheel if ".dist-info/" not in name}
    assert files == sources()
    assert "gradiometer/py.typed" in files
    assert "gradiometer/callbacks/lightning.py" in files


def test_the_metadata_is_whole(wheel):
    (metadata,) = [text for name, text in wheel.items() if name.endswith("METADATA")]
    (entry,) = [text for name, text in wheel.items() if name.endswith("entry_points.txt")]
    from gradiometer import __version__

    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "lightning!=2.6.2,!=2.6.3,>=2.4" in metadata
    assert "gradiometer = gradiometer.cli:main" in entry
    assert any("licenses/LICENSE" in name for name in wheel)


def test_the_listed_packages_are_the_folders():
    listed = set(configuration()["options"]["packages"].split())
    folders = {
        ".".join(("gradiometer", *path.parent.relative_to(ROOT / "src" / "gradiometer").parts))
        for path in (ROOT / "src" / "gradiometer").rglob("__init__.py")
    }
    callbacks = {
        ".".join(("gradiometer.callbacks", *path.parent.relative_to(ROOT / "callbacks").parts))
        for path in (ROOT / "callbacks").rglob("__init__.py")
    }
    assert listed == folders | callbacks


def test_every_folder_with_sources_is_a_package():
    for top in (ROOT / "src" / "gradiometer", ROOT / "callbacks"):
        for path in top.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path
