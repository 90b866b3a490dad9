"""What measuring costs, in units of one training step of the user's own loop.

    python benchmarks/overhead.py [--quick]

For three models: each observable's median cost at a sampling and at a recording step, its share at the
default cadence, the default set's share (sum of median cost x cadence), and beside it whole loops with
and without the default set, raw and under Lightning. Steps with and without measuring alternate, so a
machine that changes its speed changes both.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from common import RESULTS, Case, batches, cases, save, timed
from torch.utils.data import DataLoader, TensorDataset

from gradiometer import (
    FluctuationDissipation,
    GradientNoiseScale,
    JacobianNorm,
    Monitor,
    NeuralTangentKernel,
    Observable,
    at,
    every,
)
from gradiometer.callbacks import DynamicsMonitor

NEVER = at([10**9])


class Loop:
    """A user's training loop, one step at a time."""

    def __init__(
        self, case: Case, observables: list[Observable] | None = None, *, plain: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = case.make_model().train()
        self.optimizer = case.make_optimizer(self.model)
        self.data = batches(case)
        self.monitor = None
        if not plain:
            self.monitor = Monitor(
                self.model, self.optimizer, observables, dataset_size=case.dataset_size, on_error="raise"
            )

    def step(self) -> None:
        x, y = next(self.data)
        if self.monitor is None:
            self.case.loss(self.model(x), y).backward()
        else:
            with self.monitor.micro_batch(x, y):
                self.case.loss(self.model(x), y).backward()
            self.monitor.before_step()
        self.optimizer.step()
        self.optimizer.zero_grad()


def in_turn(plain: Loop, measured: Loop, count: int) -> list[tuple[float, float]]:
    """Times of plain and measured steps, each going first every other time."""
    pairs = []
    for i in range(count):
        if i % 2:
            extra, base = timed(measured.step), timed(plain.step)
        else:
            base, extra = timed(plain.step), timed(measured.step)
        pairs.append((base, extra))
    return pairs


def cost_in_steps(case: Case, observable: Observable, repeats: int) -> float:
    """Median extra time of a step on which the observable is due, over the median plain step."""
    plain, measured = Loop(case, plain=True), Loop(case, [observable])
    for loop in (plain, measured, plain, measured):
        loop.step()
    pairs = in_turn(plain, measured, repeats)
    base = median(p for p, _ in pairs)
    return median(m - p for p, m in pairs) / base


def events(observable: Observable) -> dict[str, tuple[Observable, float]]:
    """An observable's kinds of event: the observable due on every step, and how often that is, per step."""
    kind = type(observable)
    record = observable.schedule.steps
    every_step: dict[str, Any] = {"schedule": every(1)}
    found = {"record": (kind(**every_step), 1 / record)}
    if observable.sampling is not None:
        rate = 1 / observable.sampling.steps - 1 / record
        found["sample"] = (kind(schedule=at([0]), sampling=every(1)), rate)
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


def measure(case: Case, quick: bool) -> dict[str, Any]:
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
    raw_steps, lightning_steps = (100, 100) if quick else (2000, case.lightning_steps)
    return {
        "observables": rows,
        "idle": idle,
        "default_share": total + idle,
        "whole_loop_steps": raw_steps,
        "whole_loop": whole_loop(case, raw_steps),
        "whole_lightning_steps": lightning_steps,
        "whole_lightning": whole_lightning(case, lightning_steps),
    }


GROUPS = ("ntk", "jacobian", "noise", "fdr")
README = Path(__file__).parents[1] / "README.md"


def markdown(results: dict[str, Any]) -> str:
    """The table of the README: one row per model and optimizer."""
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


def saved_results() -> dict[str, Any]:
    """The last saved run; ``--models`` replaces the rows it measures and keeps the others."""
    path = RESULTS / "overhead.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def into_readme(table: str) -> None:
    """Put the table between its marks."""
    text = README.read_text()
    begin, end = "<!-- overhead -->\n", "<!-- /overhead -->"
    before, _, rest = text.partition(begin)
    README.write_text(before + begin + table + "\n" + end + rest.partition(end)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats, for the tests; nothing is saved")
    parser.add_argument("--models", nargs="*", default=None, help="measure these, keep the other saved rows")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for optimizer in ("sgd", "adamw"):
        results[optimizer] = {
            case.name: measure(case, options.quick)
            for case in cases(optimizer)
            if options.models is None or case.name in options.models
        }
    print("Cost of one record in training steps (share of the loop at the default cadence)\n")
    print(markdown(results))
    if not options.quick:
        kept = saved_results()
        for optimizer, models in results.items():
            kept.setdefault(optimizer, {}).update(models)
        print(f"\nsaved: {save('overhead', {'results': kept})}")
        into_readme(markdown(kept))


if __name__ == "__main__":
    main()
