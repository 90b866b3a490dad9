"""One of several processes that do not train in unison; prints what it summed and what it was told.

Run by test_uneven_processes.py, with and without a monitor.
"""

import json
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradiometer.parallel
from gradiometer import (
    Controller,
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    MemoryRecorder,
    Monitor,
)
from gradiometer.control import Effect
from gradiometer.observables import Schedule
from gradiometer.record.readings import Decision

STEPS = 12
SHORT = 9
"""Steps of the process that ends before the others."""


@dataclass(frozen=True)
class Private(Schedule):
    """Looks the same on every process, and is due at other steps on the last one."""

    def __call__(self, step):
        return step % (3 if dist.get_rank() == dist.get_world_size() - 1 else 2) == 0


class Broken(FluctuationDissipation):
    """Breaks on the last process at step 4."""

    def statistics(self, snapshot):
        if snapshot.step == 4 and dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("out of luck")
        return super().statistics(snapshot)


@dataclass(frozen=True)
class Lower(Controller):
    """Lowers the rate a little at every record."""

    knobs = ("learning_rate",)
    dry_run: bool = False

    def observables(self):
        return (FluctuationDissipation(schedule=2, sampling=1),)

    def start(self):
        return {"next": 0, "factor": 1.0}

    def effect(self, state):
        return Effect({"": state["factor"]})

    def decide(self, view, state):
        decision = Decision(view.step, "Lower", "learning_rate", "", {}, 0.05, 0.9)
        return [decision], {"next": view.step + 1, "factor": 0.9 * state["factor"]}, ""


def monitor_of(kind, net, optimizer, memory, last):
    """The monitor that this process has, ``None`` where it has none."""
    if (kind == "only on the first" and dist.get_rank() > 0) or (kind == "only on the last" and not last):
        return None
    schedule = Private() if kind == "cadence" else 2
    fdr = Broken if kind == "raises" else FluctuationDissipation
    observables = [
        GradientNoiseScale(schedule=5),
        fdr(schedule=schedule, sampling=1),
        JacobianNorm(schedule=6),
    ]
    return Monitor(
        net,
        optimizer,
        observables,
        controllers=[Lower()] if kind == "controlled skip" else [],
        recorders=[memory],
        on_error="raise" if kind == "raises" else "warn",
    )


def train(kind, monitored):
    """One run: the losses summed over processes by a collective of the script's own, and the readings."""
    rank, last = dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    joined = kind.startswith("join")
    model = net if kind in ("ends", "dies") else DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    memory, losses, rates = MemoryRecorder(), [], []
    monitor = monitor_of(kind, net, optimizer, memory, last) if monitored else None
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    data = torch.Generator().manual_seed(rank)
    ends = {"join": rank == 0, "join last": last, "ends": last}.get(kind, False)
    with model.join() if joined else nullcontext():
        for step in range(SHORT if ends else STEPS):
            x = torch.randn(8, 6, generator=data)
            y = torch.randint(3, (8,), generator=data)
            with nullcontext() if monitor is None else monitor.micro_batch(x, y):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
            if monitor is not None:
                monitor.before_step()
            skipped = {"skip": 4, "skip unseen": 3, "controlled skip": 4}.get(kind) == step and last
            if not skipped:
                try:
                    optimizer.step()
                except RuntimeError:  # the monitor's, under on_error="raise"
                    monitor.close()
                    monitor = None
            optimizer.zero_grad()
            loss = loss.detach()
            if isinstance(model, DistributedDataParallel) and not joined:
                dist.all_reduce(loss)
            losses.append(float(loss))
            if kind == "closes" and step == 3 and last and monitor is not None:
                monitor.close()
                monitor = None
            if kind == "slow" and step == 4 and last:
                time.sleep(4.0)  # longer than others are waited for, as one that writes a checkpoint
            if kind == "dies" and step == 4 and last:
                raise RuntimeError("out of luck")
    total = torch.tensor(sum(losses))
    if kind != "dies":
        dist.all_reduce(total)
    steps = sorted(step for step, _ in memory.series("dynamics/fdr/ratio"))
    noise = [step for step, value in memory.series("dynamics/noise/trace") if value == value]
    return {
        "losses": losses,
        "total": float(total),
        "weights": [p.tolist() for p in net.parameters()],
        "rates": rates,
        "steps": steps,
        "noise": noise,
    }


def main(rank: int, world: int, meeting: str, monitored: bool, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=wait)
    gradiometer.parallel.PATIENCE = 2.0
    found = {}
    for kind in kinds:
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[kind] = train(kind, monitored)
        found[kind]["said"] = [str(warning.message) for warning in caught]
        found[kind]["seconds"] = time.perf_counter() - began
    print(json.dumps(found))
    if kinds != ["dies"]:
        dist.barrier()  # gloo aborts a process whose peer leaves in the middle of a message
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "with", sys.argv[5:])
