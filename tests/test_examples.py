"""Every example runs, in a short form, and shows what it promises."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_examples_are_listed():
    names = {"batch_growth", "equilibrium", "new_observable", "plain_loop", "robust_classifier"}
    assert {path.stem for path in EXAMPLES} == names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_prints_its_table(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    memory = load(path).main(steps=25)
    assert "what it says" in capsys.readouterr().out
    assert memory.records
    numbers = [reading for reading in memory.latest().values() if isinstance(reading.value, float)]
    assert all(reading.is_finite or not reading.resolved for reading in numbers)
    assert any(reading.is_finite for reading in numbers)


def test_plain_loop_writes_all_groups_where_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (path,) = (path for path in EXAMPLES if path.stem == "plain_loop")
    memory = load(path).main(steps=25, log_dir="here")
    groups = {key.split("/")[1] for key in memory.latest()}
    assert groups == {"ntk", "jacobian", "noise", "fdr", "cost"}
    assert (tmp_path / "here" / "dynamics.jsonl").stat().st_size > 0
    assert list((tmp_path / "here").glob("events.*"))
