"""The house: who may import whom, read from the sources; and what importing costs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from .quick import affected, house

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gradiometer"


ROWS = house()
ROW = {name: row for row, names in enumerate(ROWS, 1) for name in names}


def files():
    for path in sorted(SOURCE.rglob("*.py")):
        yield path, "gradiometer." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in sorted((ROOT / "callbacks").rglob("*.py")):
        inside = path.relative_to(ROOT / "callbacks").with_suffix("").parts
        yield path, "gradiometer.callbacks." + ".".join(inside)


FILES = {module: path for path, module in files()}


def part(module):
    """The file or folder of the list that a module belongs to."""
    return module.split(".")[1]


def imports(module, path):
    """Absolute names of everything a file imports, wherever in the file."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = [*base, *(node.module.split(".") if node.module else [])]
            if source == ["gradiometer"]:
                yield from (f"gradiometer.{alias.name}" for alias in node.names)
            else:
                yield ".".join(source)


def allowed(importer, imported):
    return importer == imported or ROW[imported] < ROW[importer]


def test_every_file_has_its_place():
    found = {part(module) for module in FILES}
    assert found == set(ROW)


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_only_from_rows_above_its_own_or_its_own_folder(module):
    if module == "gradiometer.__init__":
        return  # re-exports from everywhere; nothing imports it, see below
    for name in imports(module, FILES[module]):
        if name.split(".")[0] != "gradiometer":
            continue
        assert len(name.split(".")) > 1, f"{module} imports the package itself"
        assert part(name) in ROW, f"{module} imports {name}, a re-export"
        assert allowed(part(module), part(name)), f"{module} imports {name}"


def test_the_table_can_be_violated():
    assert not allowed("collect", "engine")
    assert not allowed("record", "observables")
    assert not allowed("errors", "record")
    assert allowed("engine", "collect")


def test_the_quick_tests_are_those_of_a_folder_and_of_all_above_it():
    everything = set(affected(["src/gradiometer/errors.py"]))
    assert {"tests/record", "tests/stats", "tests/callbacks", "tests/test_contract.py"} <= everything
    control = set(affected(["src/gradiometer/control/panel.py"]))
    assert "tests/engine" in control
    assert "tests/observables" not in control
    assert affected(["tests/stats/test_linalg.py"]) == ["tests/stats", "tests/test_layers.py"]
    assert affected(["tests/zoo.py"]) == ["tests"]
    assert affected(["README.md"]) == ["tests/test_docs.py", "tests/test_layers.py"]


def test_the_top_level_is_calm():
    entries = [path for path in SOURCE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 17, sorted(path.name for path in entries)


@pytest.mark.parametrize("module", FILES)
def test_a_file_a_class_and_a_function_can_be_read_in_one_go(module):
    text = FILES[module].read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 400, node.name
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                lines = body[-1].end_lineno - body[0].lineno + 1
                assert lines <= 45, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("module", FILES)
def test_a_local_says_what_it_holds(module):
    empty = {"one", "each", "own", "held", "found", "whole", "known", "kept"}
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assert node.id not in empty, f"{node.id} in line {node.lineno}"
        elif isinstance(node, ast.arg):
            assert node.arg not in empty, f"{node.arg} in line {node.lineno}"


@pytest.mark.parametrize("module", FILES)
def test_frameworks_are_imported_only_where_they_may(module):
    tops = {name.split(".")[0] for name in imports(module, FILES[module])}
    if part(module) not in ("callbacks", "demo"):
        assert not tops & {"lightning", "pytorch_lightning", "lightning_fabric"}
    assert "functorch" not in tops
    assert not any("functorch" in name for name in imports(module, FILES[module]))


@pytest.mark.parametrize("module", [m for m in FILES if part(m) in (*ROWS[0], "record")])
def test_the_ground_and_the_records_are_free_of_torch(module):
    if module == "gradiometer.record.tensorboard":
        return  # imports its writer from torch, when one is opened
    tops = {name.split(".")[0] for name in imports(module, FILES[module])}
    assert "torch" not in tops


def imported_by(code):
    """The modules that are loaded in a fresh interpreter after some code."""
    script = f"import sys; {code}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in out.stdout.split()}


def test_importing_the_package_imports_no_torch():
    loaded = imported_by(
        "import gradiometer, gradiometer.errors, gradiometer.record.readings; dir(gradiometer)"
    )
    assert "gradiometer" in loaded
    assert not loaded & {"torch", "numpy", "lightning"}
    assert "torch" in imported_by("import gradiometer; gradiometer.Monitor")


def test_importing_the_callbacks_imports_no_lightning():
    loaded = imported_by("import gradiometer.callbacks; dir(gradiometer.callbacks)")
    assert not loaded & {"lightning", "pytorch_lightning", "torch"}
    assert "lightning" in imported_by("from gradiometer.callbacks import DynamicsMonitor")


def test_the_command_line_starts_without_torch():
    assert not imported_by("import gradiometer.cli") & {"torch", "lightning"}


def typed(path):
    """``{name: module}`` of the imports under ``if TYPE_CHECKING:``."""
    (block,) = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    names = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "a re-export reads: import X as X"
            names[alias.name] = node.module
    return names


@pytest.mark.parametrize(
    ("package", "path"),
    [("gradiometer", SOURCE / "__init__.py"), ("gradiometer.callbacks", ROOT / "callbacks" / "__init__.py")],
)
def test_the_lazy_table_agrees_with_the_type_checkers_and_with_the_modules(package, path):
    module = importlib.import_module(package)
    assert typed(path) == module._WHERE
    assert set(module.__all__) - {"__version__"} == set(module._WHERE)
    assert dir(module) == sorted(module.__all__)
    assert list(module._WHERE) == sorted(module._WHERE)
    for name, where in module._WHERE.items():
        home = importlib.import_module(f"{package}.{where}")
        assert getattr(module, name) is getattr(home, name)
        public = getattr(home, "__all__", [n for n in vars(home) if not n.startswith("_")])
        assert name in public
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_the_version_is_one():
    import gradiometer
    from gradiometer._version import __version__

    assert gradiometer.__version__ == __version__
