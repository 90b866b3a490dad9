"""What measuring costs, in units of one training step of the user's own loop.

    python benchmarks/overhead.py [--quick]

For three models: each observable's median cost at a sampling and at a recording step, its share at the
default cadence, the default set's share (sum of median cost x cadence), and beside it whole loops with
and without the default set, raw and under Lightning; then the fluctuation-dissipation relation sampled at
every step, and the noise scale from two micro-batches and from two processes. Steps with and without
measuring alternate, so a machine that changes its speed changes both.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import subprocess
import sys
import warnings
from typing import Any

import lightning as L
import torch
from common import Case, Loop, cases, cost_in_steps, in_turn, keep, timed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    NeuralTangentKernel,
    Observable,
    at,
    every,
)
from gradiometer.callbacks import DynamicsMonitor

NEVER = at([10**9])
RUN = 10_000  # steps over which cadences are counted


def events(observable: Observable) -> dict[str, tuple[Observable, float]]:
    """An observable's kinds of event: the observable due on every step, and how often that is, per step."""
    kind = type(observable)
    recorded = sum(observable.due(step) for step in range(RUN))
    sampled = sum(observable.samples(step) for step in range(RUN)) - recorded
    every_step: dict[str, Any] = {"schedule": every(1)}
    found = {"record": (kind(**every_step), recorded / RUN)}
    if sampled > 1:  # of one sample for each record the last period may be cut off
        found["sample"] = (kind(schedule=at([0]), sampling=every(1)), sampled / RUN)
    return found


def whole_loop(case: Case, steps: int) -> float:
    """Extra time of a whole run with the default set over one without it, their steps in turn."""
    plain, measured = Loop(case, plain=True), Loop(case)
    pairs = in_turn(plain, measured, steps)
    return sum(m for _, m in pairs) / sum(p for p, _ in pairs) - 1


class _Module(L.LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.network = case, case.make_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.case.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.case.make_optimizer(self)


def whole_lightning(case: Case, steps: int) -> float:
    """The same under a Lightning Trainer without progress bar and logger: plain, measured, plain."""
    x, y = case.make_batch(torch.Generator().manual_seed(0))
    data = TensorDataset(x.repeat_interleave(4, 0), y.repeat_interleave(4, 0))

    def run(callbacks: list[L.Callback]) -> float:
        torch.manual_seed(0)
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        module = _Module(case)
        return timed(lambda: trainer.fit(module, DataLoader(data, batch_size=len(x))))

    before, measured, after = run([]), run([DynamicsMonitor(print_table=False)]), run([])
    return 2 * measured / (before + after) - 1


def on_two_processes(case: Case, optimizer: str, repeats: int) -> float:
    """Cost of a record of the noise scale from two processes of one thread each, in their own steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--rank-of", case.name, optimizer, str(repeats)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([*command, str(rank), meeting], env=alone, stdout=subprocess.PIPE) for rank in (0, 1)
    ]
    outputs = [run.communicate()[0] for run in runs]
    return float(outputs[0].decode().split()[-1])


def one_rank(name: str, optimizer: str, repeats: str, rank: str, meeting: str) -> None:
    """What each of the two processes does; both make the same steps at the same time."""
    torch.distributed.init_process_group("gloo", meeting, rank=int(rank), world_size=2)
    case = next(each for each in cases(optimizer) if each.name == name)
    print(cost_in_steps(case, GradientNoiseScale(schedule=1), int(repeats), wrap=DistributedDataParallel))
    torch.distributed.destroy_process_group()


def measure(case: Case, optimizer: str, quick: bool) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    total = 0.0
    defaults = [NeuralTangentKernel(), JacobianNorm(), GradientNoiseScale(), FluctuationDissipation()]
    for observable in defaults:
        few = 3 if isinstance(observable, NeuralTangentKernel) else 10
        share = 0.0
        row: dict[str, Any] = {}
        for kind, (due, rate) in events(observable).items():
            row[kind] = cost_in_steps(case, due, few if quick else 5 * few)
            share += row[kind] * rate
        rows[observable.group] = {**row, "share": share}
        total += share
    idle = cost_in_steps(case, FluctuationDissipation(schedule=NEVER, sampling=NEVER), 20 if quick else 200)
    fdr = rows["fdr"]
    every_step = fdr["sample"] * (1 - 1 / 50) + fdr["record"] / 50
    noise = GradientNoiseScale(schedule=1)
    few = 10 if quick else 100
    sources = {
        "micro_batches": cost_in_steps(case, noise, few, parts=2) / 50,
        "processes": on_two_processes(case, optimizer, few) / 50,
    }
    raw_steps, lightning_steps = (100, 100) if quick else (2000, case.lightning_steps)
    return {
        "observables": rows,
        "idle": idle,
        "fdr_every_step": every_step,
        **sources,
        "default_share": total + idle,
        "whole_loop_steps": raw_steps,
        "whole_loop": whole_loop(case, raw_steps),
        "whole_lightning_steps": lightning_steps,
        "whole_lightning": whole_lightning(case, lightning_steps),
    }


GROUPS = ("ntk", "jacobian", "noise", "fdr")


FDR_TARGETS = {"sgd": 0.01, "adamw": 0.02}
EVERY_STEP_TARGETS = {"mlp": 0.06, "convnet": 0.02, "transformer": 0.02}
SOURCE_TARGET = 0.03


def against(share: float, target: float) -> str:
    """A share of the loop beside the most it should be."""
    verdict = "met" if share <= target else "**missed**"
    return f"{100 * share:.2f} % ({100 * target:.0f} %: {verdict})"


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/benchmarks.md: one row per model and optimizer."""
    return f"{costs(results)}\n\n{targets(results)}"


def targets(results: dict[str, Any]) -> str:
    """Shares of the loop against their targets."""
    head = ["model", "optimizer", "fdr", "fdr at every step", "noise, 2 micro-batches", "noise, 2 processes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for optimizer, models in results.items():
        for name, result in models.items():
            cells = [
                against(result["observables"]["fdr"]["share"], FDR_TARGETS[optimizer]),
                against(result["fdr_every_step"], EVERY_STEP_TARGETS[name]),
                against(result["micro_batches"], SOURCE_TARGET),
                against(result["processes"], SOURCE_TARGET),
            ]
            lines.append("| " + " | ".join([name, optimizer, *cells]) + " |")
    return "\n".join(lines)


def costs(results: dict[str, Any]) -> str:
    """Cost of one record of each observable, and shares of the whole."""
    head = ["model", "optimizer", *GROUPS, "nothing due", "default set", "whole loop", "in Lightning"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for optimizer, models in results.items():
        for name, result in models.items():
            cells = [
                f"{result['observables'][g]['record']:.2f} ({100 * result['observables'][g]['share']:.2f} %)"
                for g in GROUPS
            ]
            shares = ("idle", "default_share", "whole_loop", "whole_lightning")
            cells += [f"{100 * result[share]:.1f} %" for share in shares]
            lines.append("| " + " | ".join([name, optimizer, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats, for the tests; nothing is saved")
    parser.add_argument("--models", nargs="*", default=None, help="measure these, keep the other saved rows")
    parser.add_argument("--rank-of", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        one_rank(*options.rank_of)
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for optimizer in ("sgd", "adamw"):
        results[optimizer] = {
            case.name: measure(case, optimizer, options.quick)
            for case in cases(optimizer)
            if options.models is None or case.name in options.models
        }
    print("Cost of one record in training steps (share of the loop at the default cadence)\n")
    print(markdown(results))
    if not options.quick:
        keep("overhead", results, markdown)


if __name__ == "__main__":
    main()
