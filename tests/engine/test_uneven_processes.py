"""Processes that do not train in unison end as they do without a monitor, and read for themselves."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "uneven_worker.py"
STEPS = 12

LATE = ("join", "join last", "skip", "skip unseen", "controlled skip", "ends", "cadence")
REASONS = {
    **dict.fromkeys(LATE, "did not come"),
    **dict.fromkeys(("closes", "raises"), "has closed its monitor"),
}
"""Why processes stop measuring together. The odd one is the last; in the first kind it is process 0."""
GONE = ("join", "join last", "ends", "closes", "raises")
"""Kinds where the odd one has no monitor any more, or makes no step."""
KINDS = ["unison", *REASONS, "only on the first", "only on the last", "slow"]


def meeting(world, folder):
    """Two processes meet in a file, more through a server."""
    if world == 2:
        return f"file://{folder / 'meeting'}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def run(world, monitored, kinds, folder):
    """Exit codes, what each process printed, and what it wrote to stderr; none of them may hang."""
    address = meeting(world, folder)
    runs = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(world), address, monitored, *kinds],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [each.communicate(timeout=150) for each in runs]
    finally:
        for each in runs:
            each.kill()
    output = [json.loads(out) if out else {} for out, _ in said]
    return [each.returncode for each in runs], output, [err for _, err in said]


@pytest.fixture(scope="module", params=[2, 3])
def world(request):
    return request.param


@pytest.fixture(scope="module")
def outputs(world, tmp_path_factory):
    """What the processes printed with a monitor and without, by kind and rank."""
    results = {}
    for monitored in ("without", "with"):
        codes, output, errors = run(world, monitored, KINDS, tmp_path_factory.mktemp("ranks"))
        assert codes == [0] * world, errors
        results[monitored] = {kind: [of_rank[kind] for of_rank in output] for kind in KINDS}
    return results


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "controlled skip"])
def test_the_run_and_its_own_collectives_are_those_without_a_monitor(kind, outputs):
    for ours, theirs in zip(outputs["with"][kind], outputs["without"][kind], strict=True):
        assert ours["losses"] == theirs["losses"]
        assert ours["total"] == theirs["total"]
        assert ours["weights"] == theirs["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_more_than_once(kind, outputs):
    for ours in outputs["with"][kind]:
        assert ours["seconds"] < 10  # the patience is 2 s, and so is what a busy machine takes


@pytest.mark.slow
@pytest.mark.parametrize("kind", REASONS)
def test_each_process_that_goes_on_says_once_why_and_reads_for_itself(kind, outputs):
    ranks = outputs["with"][kind]
    odd = 0 if kind == "join" else len(ranks) - 1
    for rank, ours in enumerate(ranks):
        said = [text for text in ours["said"] if "controllers are off" not in text]
        if rank == odd and kind in GONE:
            assert said == []
            continue
        (text,) = said
        assert re.match(rf"at step \d+ .*, because process {odd} {REASONS[kind]}.*: readings are this", text)
        step = int(text.split()[2])
        assert max(ours["steps"]) > step or step >= STEPS - 2  # it went on reading
        assert all(at < step for at in ours["noise"])  # which compares the gradients of all processes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unison", "slow"])
def test_processes_in_step_stay_together_however_late_one_of_them_is_between_steps(kind, outputs):
    for ours in outputs["with"][kind]:
        assert ours["said"] == []
        assert ours["steps"] == [2, 4, 6, 8, 10]
        assert ours["noise"] == [0, 5, 10]


@pytest.mark.slow
def test_a_monitor_on_one_process_alone_reads_for_itself_after_one_wait(world, outputs):
    for kind, alone in (("only on the first", 0), ("only on the last", world - 1)):
        for rank, ours in enumerate(outputs["with"][kind]):
            assert ours["steps"] == ([2, 4, 6, 8, 10] if rank == alone else [])
            assert len(ours["said"]) == (rank == alone)
        assert f"not all of the {world} processes" in outputs["with"][kind][alone]["said"][0]


@pytest.mark.slow
def test_rates_stay_equal_when_controllers_are_turned_off(outputs):
    ranks = outputs["with"]["controlled skip"]
    for ours in ranks:
        assert sum("controllers are off" in text for text in ours["said"]) == 1
        assert ours["rates"][-1] < 0.05  # what was decided together holds
        assert ours["rates"][-7:] == ranks[0]["rates"][-7:]


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_with_it(world, tmp_path):
    for monitored in ("without", "with"):
        (tmp_path / monitored).mkdir()
        codes, _, errors = run(world, monitored, ["dies"], tmp_path / monitored)
        assert codes == [0] * (world - 1) + [1], errors
