"""The tables of docs/observables.md are what the code says; a key is spelled where its reading is made."""

import ast
import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gradiometer import JacobianRegularizer, Monitor, Quantity, empirical_ntk
from gradiometer.autodiff import rules
from gradiometer.collect.base import Step, Training
from gradiometer.collect.sections import Sections
from gradiometer.control import panel
from gradiometer.engine import cost
from gradiometer.errors import GradiometerError
from gradiometer.observables import OBSERVABLES
from gradiometer.optimizers import base as families
from gradiometer.optimizers import rebuilds, squared_displacements

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def limits():
    spec = importlib.util.spec_from_file_location("limits", ROOT / "docs" / "limits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_refusal_of_the_code_stands_on_the_page(limits):
    page = limits.PAGE.read_text(encoding="utf-8")
    assert limits.written(page) == page, "docs/limits.md is out of date. Run: make docs-tables"


def test_a_new_refusal_has_a_row(limits):
    source = """
PLAN_B = "Use pencil."
def check(x):
    raise UnsupportedError(f"no {x} today", got=x, fix=PLAN_B)
def refusal(model) -> str | None:
    return "it is | Tuesday"
def weather() -> str:
    return ""
    return "it rains today"
def name(model) -> str:
    return "not a reason"
"""
    found = list(limits.refusals(source, "a.py"))
    assert found == [
        limits.Refusal("UnsupportedError", "no … today", "Use pencil.", "a.py"),
        limits.Refusal("return", "it is | Tuesday", "", "a.py"),
        limits.Refusal("return", "it rains today", "", "a.py"),
    ]
    assert "| no … today | Use pencil. | `a.py` |\n" in limits.table("never on this run", found)
    assert "| it is / Tuesday | `a.py` |\n" in limits.table("reasons", found)


def test_a_table_that_is_missing_is_named(limits):
    page = limits.PAGE.read_text(encoding="utf-8").replace("<!-- table: warnings -->", "")
    with pytest.raises(SystemExit, match=r"limits.md has tables of .*'warnings'"):
        limits.written(page)


def test_every_kind_of_refusal_is_collected(limits):
    kinds = {error.__name__ for error in everything_below(GradiometerError)}
    assert kinds == set().union(*limits.TABLES.values()) - {"warn", "_say", "return"}
    for name, collected in limits.TABLES.items():
        assert {refusal.kind for refusal in limits.everything()} >= collected, name


def everything_below(kind):
    """All subclasses of this package."""
    below = {error for error in kind.__subclasses__() if error.__module__ == "gradiometer.errors"}
    return below.union(*map(everything_below, below))


USUAL = [
    *("torch.compile", "torch.jit", "Join", "manual optimization", "wrapped optimizers", "SAM"),
    *("optimizer in the backward pass", "complex weights", "GradScaler", "gradient clipping", "FSDP", "DDP"),
    *("class weights", "ignore_index", "sequence-first", "batch norm", "several inputs", "graph batches"),
]


@pytest.mark.parametrize("words", USUAL)
def test_what_comes_up_in_practice_has_a_row(words):
    text = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8").partition("## Every refusal")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    first = [row.split("|")[1].replace("`", "") for row in rows]
    assert any(words in cell for cell in first)
    assert all(row.count("|") == 5 for row in rows)


def test_the_limits_of_the_readme_are_rows_of_the_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    limits = text.partition("## Limits\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in limits.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 12
    assert "(docs/limits.md)" in limits
    page = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    assert [row for row in rows if f"\n| {row} |" not in page] == []


def test_the_tables_are_what_make_docs_tables_would_write(tables):
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.written(page) == page, "docs/observables.md is out of date. Run: make docs-tables"


def test_the_command_writes_the_page(tables, tmp_path, monkeypatch):
    page = tables.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "observables.md")
    emptied = tables.MARKED.sub(lambda match: match[1] + match[3], page)
    assert "| `dynamics/" not in emptied
    tables.PAGE.write_text(emptied, encoding="utf-8")
    tables.main()
    assert tables.PAGE.read_text(encoding="utf-8") == page


def test_words_in_the_code_change_the_page(tables, monkeypatch):
    page = tables.PAGE.read_text(encoding="utf-8")
    group, quantities = tables.TABLES["JacobianNorm"]
    changed = replace(quantities["frobenius_norm"], tells="something else")
    monkeypatch.setitem(tables.TABLES, "JacobianNorm", (group, {**quantities, "frobenius_norm": changed}))
    assert "| something else |" in tables.written(page)


def test_a_row_shows_powers_and_dashes(tables):
    words = Quantity("loss^2", "A number.", formula="x", tells="a thing")
    assert tables.row("g", "n", words) == "| `dynamics/g/n` | x | loss² | – | – | a thing | – |"


def test_a_bar_would_break_the_table(tables):
    with pytest.raises(SystemExit, match=r"g/n: a table takes no '\|'; write abs\(x\)"):
        tables.row("g", "n", Quantity("1", "A number.", formula="|x|"))


@pytest.mark.parametrize("change", [("JacobianNorm", "JacobianNorms"), ("table: JacobianNorm", "no table")])
def test_an_observable_without_a_place_is_named(tables, change):
    page = tables.PAGE.read_text(encoding="utf-8").replace(f"<!-- {change[0]}", f"<!-- {change[1]}")
    page = page.replace(f"table: {change[0]} ", f"table: {change[1]} ")
    with pytest.raises(SystemExit, match=r"the code has .*'JacobianNorm'.*: write a line"):
        tables.written(page)


@pytest.mark.parametrize("kind", OBSERVABLES)
def test_every_row_says_how_the_number_is_made_and_what_it_tells(kind):
    for name, words in kind.quantities.items():
        assert words.formula, name
        assert words.tells, name


@pytest.fixture
def nothing_stays_registered():
    tables = (rules.RULES, families._FAMILIES)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    rules._unverified.clear()


def page(title):
    """What the example on a page of CONTRIBUTING.md defines."""
    code = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(f"## {title}\n")[2]
    names = {"__name__": "example"}
    exec(code.split("```python\n")[1].split("```")[0], names)
    return names


def test_the_example_of_a_readings_words_runs():
    names = page("A reading's words")
    model = nn.Linear(200, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for size, said in ((0.01, "the weights are of one size."), (100.0, "a few weights are far larger")):
        with torch.no_grad():
            model.weight.fill_(0.01)
            model.weight[0, 0] = size
        observables = [names["WeightSpread"](schedule=1)]
        with Monitor(model, optimizer, observables, on_error="raise") as monitor:
            with monitor.micro_batch(torch.zeros(2, 200)):
                model(torch.zeros(2, 200)).sum().backward()
            monitor.before_step()
            optimizer.step()
        assert said in monitor.table()
    assert names["WeightSpread"].key(names["CREST"]) == "weights/crest"


def test_the_example_of_a_collector_runs():
    names = page("Add a collector")
    model = nn.Linear(1, 1, bias=False)
    training = Training(model, sgd := torch.optim.SGD(model.parameters(), lr=0.1))
    collector = names["LargestGradient"](training, Step(0, Sections(model, sgd, ["0"]), grad_scale=2.0), {})
    (6 * model(torch.ones(1, 1))).sum().backward()
    collector.before_step()
    assert collector.result() == 3.0
    assert collector.stages == {"before_step"}


def test_the_example_of_a_layer_rule_runs(nothing_stays_registered):
    names = page("Add a layer rule")
    x = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(empirical_ntk(names["Scale"](2), x), torch.tensor([[2.5]]).double())


def test_the_example_of_an_optimizer_runs(nothing_stays_registered):
    names = page("Add an optimizer")
    weights = [nn.Parameter(torch.tensor([3.0, -4.0]))]
    optimizer = names["SignSGD"](weights, lr=0.5)
    weights[0].square().sum().backward()
    assert rebuilds(optimizer)
    optimizer.step()
    assert squared_displacements(optimizer, optimizer.param_groups[0]).item() == pytest.approx(0.5)


# -- the code of the pages runs ---------------------------------------------------------------------


class Classifier(nn.Module):
    """What ``self`` is in a training step."""

    def __init__(self):
        super().__init__()
        self.layer, self.regularizer = nn.Linear(4, 2), JacobianRegularizer(0.01)

    def forward(self, x):
        return self.layer(x)


def blocks(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    return [part.partition("\n```")[0] for part in text.split("```python\n")[1:]]


def surroundings():
    """What the code of a page takes for granted."""
    import lightning as L
    from torch.nn.utils import clip_grad_norm_
    from torch.utils.data import DataLoader, RandomSampler, TensorDataset

    import gradiometer
    from gradiometer.callbacks import DynamicsMonitor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    modules = {"L": L, "torch": torch, "nn": nn, "F": nn.functional}
    return {
        **{name: getattr(gradiometer, name) for name in gradiometer.__all__},
        **modules,
        "clip_grad_norm_": clip_grad_norm_,
        "DataLoader": DataLoader,
        "RandomSampler": RandomSampler,
        "DynamicsMonitor": DynamicsMonitor,
        "dataset": TensorDataset(torch.randn(64, 4), torch.randint(2, (64,))),
        "model": model,
        "optimizer": optimizer,
        "loader": [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(3)],
        "self": Classifier(),
        "x": torch.randn(8, 4),
        "y": torch.randint(2, (8,)),
        "loss_fn": nn.functional.cross_entropy,
        "monitor": Monitor(model, optimizer),
    }


CODE = [(name, i) for name in PAGES for i in range(len(blocks(name)))]


@pytest.mark.filterwarnings("ignore::gradiometer.errors.MeasurementWarning")
@pytest.mark.parametrize(("name", "number"), CODE, ids=[f"{name}-{i}" for name, i in CODE])
def test_the_code_of_a_page_runs(name, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = surroundings()
    exec(blocks(name)[number], names)
    names["monitor"].close()


def test_the_pages_have_code():
    assert {name for name, _ in CODE} == {"README.md", "docs/control.md", "docs/design.md"}


# -- renaming a reading touches the file that makes it, its row and its tests ------------------------

KEYS = {f"{kind.group}/{name}" for kind in OBSERVABLES for name in kind.quantities}
KEYS |= {f"{panel.GROUP}/{name}" for name in panel.QUANTITIES}
KEYS |= {f"{cost.COST_GROUP}/{name}" for name in cost.COST_QUANTITIES}
SPELLED = re.compile(r"(?<!\w)(" + "|".join(sorted(KEYS, key=len, reverse=True)) + r")(?!\w)")


def spelled_keys(source):
    """Keys of readings in the strings of a source, docstrings apart."""
    tree = ast.parse(source)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    return [key for string in strings for key in SPELLED.findall(string)]


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "src" / "gradiometer").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_no_key_of_a_reading_is_spelled_by_hand(path):
    assert spelled_keys(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_prose_names_no_reading_that_there_is_not(path):
    named = set(re.findall(r"dynamics/(\w+/\w+)", path.read_text(encoding="utf-8")))
    assert named - {f"{key}_stderr" for key in KEYS} <= KEYS


def test_a_key_spelled_by_hand_would_be_found():
    assert spelled_keys('view.number("fdr/ratio")') == ["fdr/ratio"]
    assert spelled_keys('f"|fdr/ratio - 1| < {x}"') == ["fdr/ratio"]
    assert spelled_keys('"""Reads fdr/ratio."""') == []
