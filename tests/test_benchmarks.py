"""The benchmark runs in its short form, and the README shows the figures of its last saved run."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_overhead_runs_quickly_and_prints_its_table():
    command = [sys.executable, "benchmarks/overhead.py", "--quick", "--models", "convnet"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "| convnet | sgd |" in run.stdout
    assert "| convnet | adamw |" in run.stdout


def test_readme_shows_the_saved_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import overhead

    saved = json.loads((ROOT / "benchmarks/results/overhead.json").read_text())
    assert overhead.markdown(saved["results"]) in (ROOT / "README.md").read_text()
    assert saved["environment"]["torch"].startswith("2.13.0")
