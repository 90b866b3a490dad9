"""Two processes: the same readings on both, the noise between them, and no deadlock."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gradiometer import (
    GradientNoiseScale,
    JacobianNorm,
    Mean,
    MemoryRecorder,
    Monitor,
    NeuralTangentKernel,
)
from gradiometer.collect.snapshot import Probe
from gradiometer.engine.ranks import _sent
from gradiometer.parallel import ApartError
from gradiometer.record import read_json_lines

WORKER = Path(__file__).parent / "parallel_worker.py"


def test_a_batch_that_cannot_be_sent_is_a_reason_to_stay_apart():
    for stowaway in (lambda: 0, (number for number in range(3))):
        with pytest.raises(ApartError, match="first batch cannot be sent to other processes"):
            _sent(["plan", "plan"], Probe({"x": torch.ones(2, 3), "note": stowaway}))
    with pytest.raises(ApartError, match="process 2 has others than process 0"):
        _sent(["plan", "plan", "another"], Probe(torch.ones(2, 3)))


def run(kind, folder):
    """Records and output of both ranks; none of them may hang."""
    runs = [
        subprocess.Popen(
            [sys.executable, WORKER, kind, str(rank), str(folder / "meeting"), str(folder / f"{rank}.jsonl")],
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
    files = [folder / f"{rank}.jsonl" for rank in (0, 1)]
    records = [list(read_json_lines(path)) if path.exists() else [] for path in files]
    output = [json.loads(out) for out, _ in said]
    assert output[0]["weights"] == output[1]["weights"]
    return records, [each["said"] for each in output]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run("default", tmp_path_factory.mktemp("ranks"))


def values(records, without=("cost",)):
    return {
        (record["step"], key): (reading["value"], reading["stderr"], reading["low"], reading["note"])
        for record in records
        for key, reading in record["readings"].items()
        if key.split("/")[1] not in without
    }


@pytest.mark.slow
def test_readings_are_bit_equal_on_all_ranks(ranks):
    (first, second), said = ranks
    assert values(first) == values(second)
    keys = {key for _, key in values(first)}
    assert {"dynamics/ntk/drift", "dynamics/jacobian/frobenius_norm", "dynamics/fdr/ratio"} <= keys
    assert "dynamics/noise/trace" in keys
    assert said == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "parts"), [("noise", 1), ("accumulate", 3)])
def test_two_processes_and_one_with_twice_the_batch_find_the_same_noise(kind, parts, tmp_path):
    (records, other), said = run(kind, tmp_path)
    assert values(records) == values(other)
    assert said == [[], []]
    found = records[-1]["readings"]
    source = "2 processes" if parts == 1 else "micro-batches of 2 processes"
    assert found["dynamics/noise/trace"]["note"].startswith(source)
    alone = one_process(parts)
    for name in ("trace", "grad_sq_norm"):
        ours, theirs = found[f"dynamics/noise/{name}"], alone[f"dynamics/noise/{name}"]
        error = math.hypot(ours["stderr"], theirs.stderr)
        assert error < 0.3 * theirs.value
        assert abs(ours["value"] - theirs.value) < 3 * error


def one_process(parts):
    """The same data, all parts as micro-batches of one process: 120 steps at a fixed point."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    memory = MemoryRecorder()
    generators = [torch.Generator().manual_seed(rank) for rank in (0, 1)]
    observables = [GradientNoiseScale(schedule=1, estimator=Mean())]
    with Monitor(net, optimizer, observables, recorders=[memory], on_error="raise") as monitor:
        for _ in range(120):
            for _ in range(parts):
                for data in generators:
                    x = torch.randn(6, 3, generator=data)
                    y = (x[:, 0] > 0).long()
                    with monitor.micro_batch(x, y):
                        (F.cross_entropy(net(x), y) / (2 * parts)).backward()
            monitor.before_step()
            optimizer.step()
            optimizer.zero_grad()
    return memory.latest()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["idle", "alone"])
def test_a_rank_with_nothing_due_or_without_a_monitor_is_not_waited_for(kind, tmp_path):
    (first, second), said = run(kind, tmp_path)
    assert max(record["step"] for record in first) == 8
    assert not second
    assert len(said[0]) == 1
    assert "not all of the 2 processes have a monitor with the same observables" in said[0][0]
    assert "Build the same Monitor on every rank" in said[0][0]


@pytest.mark.slow
def test_what_one_rank_cannot_measure_is_left_out_on_all(tmp_path):
    (first, second), said = run("fragile", tmp_path)
    without_reason = values(first, without=("cost", "fragile"))
    assert without_reason == values(second, without=("cost", "fragile"))
    keys = {key for _, key in values(first)}
    assert keys == {key for _, key in values(second)}
    assert "dynamics/noise/trace" in keys
    last = {key for step, key in values(first) if step == 8}
    assert not any(key.startswith("dynamics/fragile") for key in last)
    assert ["another process could not measure" in text for text in said[0]] == [True]
    assert ["no such thing here" in text for text in said[1]] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clipped", "summed", "outside"])
def test_a_gradient_that_is_not_the_mean_over_the_ranks_is_refused(kind, tmp_path):
    (first, second), said = run(kind, tmp_path)
    assert values(first) == values(second)
    noise = [value for (_, key), (value, *_) in values(first).items() if "/noise/" in key]
    assert set(noise) == {None}  # nan
    for texts in said:
        (text,) = texts
        assert "is not the mean over the processes of what their backward passes gave" in text
        assert "Call monitor.before_step() right after the last backward pass" in text


@pytest.mark.slow
def test_a_wrapped_model_goes_on_training(tmp_path):
    """A forward of the wrapper announces a backward pass, which a measurement does not make."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(3, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        observables = [NeuralTangentKernel(schedule=1), JacobianNorm(schedule=1)]
        with Monitor(model, optimizer, observables, on_error="raise") as monitor:
            for _ in range(3):
                with monitor.micro_batch(torch.randn(4, 3), None):
                    model(torch.randn(4, 3)).sum().backward()
                monitor.before_step()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        dist.destroy_process_group()
