"""Two processes: the same readings on both, and a clear refusal of what is not available there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradiometer import JacobianNorm, Monitor, NeuralTangentKernel, parallel, read_json_lines

WORKER = Path(__file__).parent / "parallel_worker.py"


def test_one_process_agrees_with_itself():
    numbers = [torch.ones(2), torch.zeros(())]
    assert parallel.world_size() == 1
    assert parallel.mean(numbers, torch.device("cpu")) is numbers
    assert parallel.everywhere([True, False], torch.device("cpu")) == [True, False]
    assert parallel.broadcast(numbers) is numbers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    runs = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(folder / "meeting"), str(folder / f"{rank}.jsonl")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    records = [list(read_json_lines(folder / f"{rank}.jsonl")) for rank in (0, 1)]
    return records, [out for out, _ in said]


def values(records):
    return {
        (record["step"], key): reading["value"]
        for record in records
        for key, reading in record["readings"].items()
        if "/cost/" not in key and "/noise/" not in key
    }


def test_readings_are_bit_equal_on_all_ranks(ranks):
    (first, second), _ = ranks
    assert values(first) == values(second)
    keys = {key for _, key in values(first)}
    assert {"dynamics/ntk/drift", "dynamics/jacobian/frobenius_norm", "dynamics/fdr/ratio"} <= keys


def test_the_noise_scale_refuses_and_the_run_goes_on(ranks):
    records, said = ranks
    for own, text in zip(records, said, strict=True):
        assert text.count("the noise scale is not available under data-parallel training, got 2") == 1
        assert max(record["step"] for record in own) == 8


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
