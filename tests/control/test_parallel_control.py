"""Two processes decide as one: rank 0 for both, whatever the other has read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "control_worker.py"


def run(kind, folder):
    """What both ranks decided; none of them may hang."""
    runs = [
        subprocess.Popen(
            [sys.executable, WORKER, kind, str(rank), str(folder / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [each.communicate(timeout=120) for each in runs]
    finally:
        for each in runs:
            each.kill()
    assert [each.returncode for each in runs] == [0, 0], said
    first, second = (json.loads(out) for out, _ in said)
    assert first["weights"] == second["weights"]
    assert first["in_force"] == second["in_force"]
    return first, second


@pytest.mark.slow
def test_ranks_that_read_differently_decide_the_same_at_the_same_step(tmp_path):
    first, second = run("differ", tmp_path)
    assert first["decisions"] == second["decisions"]
    assert [(d["step"], d["factor"]) for d in first["decisions"]] == [
        (step, 0.5 if step % 6 == 0 else 1.0)
        for step in range(0, 14, 2)  # rank 0's reading, which rank 1 does not have
    ]
    assert first["in_force"][:8] == pytest.approx([0.1] + [0.05] * 6 + [0.025])
    assert first["said"] == second["said"] == []


@pytest.mark.slow
def test_equilibrium_on_two_processes(tmp_path):
    first, second = run("equilibrium", tmp_path)
    assert first["decisions"] == second["decisions"]
    drops = [decision["step"] for decision in first["decisions"] if decision["factor"] != 1.0]
    assert drops
    assert first["in_force"][drops[0] + 1] == pytest.approx(0.05)
    assert first["said"] == second["said"] == []


@pytest.mark.slow
def test_batches_grow_together_and_count_all_processes(tmp_path):
    first, second = run("grow", tmp_path)
    assert first["decisions"] == second["decisions"]
    changes = [d for d in first["decisions"] if d["factor"] != 1.0]
    assert [d["before"] for d in changes] == [8.0, 16.0]  # of both ranks, up to 32
    assert first["sizes"] == second["sizes"]
    assert sorted(set(first["sizes"])) == [4, 8, 16]  # of each
    assert all(size == 2 * first["sizes"][step] for step, size in first["in_force"])


@pytest.mark.slow
def test_a_controller_on_one_rank_alone_does_not_act(tmp_path):
    first, second = run("idle", tmp_path)
    assert first["decisions"] == second["decisions"] == []
    assert set(first["in_force"]) == {0.1}
    assert any("controllers are off" in text for text in first["said"])


@pytest.mark.slow
def test_a_controller_that_breaks_decides_nothing_on_any_rank(tmp_path):
    first, second = run("breaks", tmp_path)
    assert first["decisions"] == second["decisions"] == []
    assert set(first["in_force"]) == {0.1}
    for one in (first, second):
        assert one["said"] == ["Halve could not decide: RuntimeError: out of luck"]
