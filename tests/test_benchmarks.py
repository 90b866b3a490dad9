"""The benchmarks run in their short form, and their page shows the figures of their last saved runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from gradiometer.demo.characters import Block, PositionEmbedding

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ntk(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ntk

    return ntk


@pytest.mark.slow
def test_overhead_runs_quickly_and_prints_its_table():
    command = [sys.executable, "benchmarks/overhead.py", "--quick", "--models", "convnet"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "| convnet | sgd |" in run.stdout
    assert "| convnet | adamw |" in run.stdout


@pytest.mark.parametrize("name", ["overhead", "schedules", "jacobian_regularizer"])
def test_the_page_shows_the_saved_run(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    saved = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert import_module(name).markdown(saved["results"]) in (ROOT / "docs" / "benchmarks.md").read_text()
    assert saved["environment"]["torch"].startswith("2.13.0")


@pytest.mark.slow
def test_the_regulariser_runs_quickly_and_prints_its_table():
    command = [sys.executable, "benchmarks/jacobian_regularizer.py", "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for row in ("| convnet |", "| convnet, B = 128 |", "| mlp |", "| transformer |"):
        assert row in run.stdout


@pytest.mark.slow
def test_schedules_run_quickly_and_those_that_do_nothing_end_where_the_constant_rate_does():
    command = [sys.executable, "benchmarks/schedules.py", "--quick"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    for name in ("EquilibriumLR", "NoiseScaleBatchSize"):
        found = [row[1:6] for row in rows if row[0] == f"| {name}"]
        assert found == [row[1:6] for row in rows if row[0] == "| constant"]
        assert len(found) == 2  # one for each model


@pytest.mark.slow
def test_ntk_runs_quickly_and_prints_its_tables():
    command = [sys.executable, "benchmarks/ntk.py", "--quick"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # not slowed by whatever else runs
    run = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for row in ("| conv-trace |", "| demo-convnet |", "| width | 32 | 64 |", "| convnet | sgd |"):
        assert row in run.stdout


@pytest.mark.slow
def test_peak_memory_is_that_of_one_call(ntk):
    small, large = (ntk.peak_apart(f"mlp-N{n}-O4-W256-D2-full", "reference") for n in (4, 32))
    jacobian = 32 * 4 * (784 * 256 + 256 * 256) * 4 / 2**20
    assert small < jacobian / 4
    assert jacobian < large < 4 * jacobian


def tiny_transformer():
    layers = [nn.Embedding(96, 8), PositionEmbedding(64, 8), Block(8, 2), nn.LayerNorm(8), nn.Linear(8, 6)]
    return nn.Sequential(*layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [("mlp512-full", 16), ("conv-full", 13), ("conv-trace", 3), ("transformer-trace", 4)]
)
def test_the_floor_computes_the_kernel(ntk, name, count):
    kernel = ntk.kernels()[name]
    if kernel.position:
        kernel = replace(kernel, make_model=tiny_transformer)
    model, x = kernel.build()
    model.double()
    x = x[:count].double() if x.is_floating_point() else x[:count]
    expected = ntk.reference(kernel, model, x)
    outputs = kernel.forward(model, x).shape[1]
    if kernel.full:
        expected = expected.permute(0, 2, 1, 3).flatten(2).flatten(0, 1) / outputs
    each = len(expected) // count
    total = torch.zeros_like(expected)
    for part, block in ntk.contractions(kernel, model, x)():
        begin = part.start * each
        total[begin : begin + len(block), begin:] += block.detach() / outputs
    assert torch.allclose(total.triu(), expected.triu(), rtol=1e-9, atol=1e-9)


def test_the_page_shows_the_saved_kernels(ntk):
    saved = json.loads((ROOT / "benchmarks/results/ntk.json").read_text())
    assert ntk.markdown(saved["results"]) in (ROOT / "docs" / "benchmarks.md").read_text()
