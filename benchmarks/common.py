"""What the benchmarks share: models, loops, interleaved timing, saved results, the page of their tables."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradiometer import Monitor, Observable

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


@dataclass
class Case:
    """A model, a batch maker, a loss and an optimizer, as a user's loop would hold them."""

    name: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    dataset_size: int
    lightning_steps: int = 1000

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, -2), y.flatten())


def mlp(sizes: Sequence[int] = (784, 1024, 1024, 1024, 10)) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits_convnet() -> nn.Module:
    from gradiometer.demo.digits import DigitsConvNet  # Lightning is slow to import

    return DigitsConvNet()


def character_transformer() -> nn.Module:
    from gradiometer.demo.characters import CharacterTransformer

    return CharacterTransformer()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def vectors(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(128, 784, generator=g), torch.randint(10, (128,), generator=g)


def images(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(16, 1, 8, 8, generator=g), torch.randint(10, (16,), generator=g)


def tokens(g: torch.Generator) -> tuple[Tensor, Tensor]:
    text = torch.randint(101, (32, 65), generator=g)
    return text[:, :-1], text[:, 1:]


def cases(optimizer: str) -> list[Case]:
    """MLP 784-1024x3-10 at B=128, the digits ConvNet at B=16, the character transformer at B=32."""
    make = {"sgd": sgd, "adamw": adamw}[optimizer]
    return [
        Case("mlp", mlp, vectors, make, 60_000),
        Case("convnet", digits_convnet, images, make, 1_437, 8000),
        Case("transformer", character_transformer, tokens, make, 6_500),
    ]


def batches(case: Case, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Eight different batches, over and over: making data is not what is timed."""
    generator = torch.Generator().manual_seed(seed)
    made = [case.make_batch(generator) for _ in range(8)]
    while True:
        yield from made


def timed(function: Callable[[], Any]) -> float:
    began = perf_counter()
    function()
    return perf_counter() - began


def interleaved(runs: Mapping[str, tuple[Callable[[], Any], int]]) -> dict[str, list[float]]:
    """Times of each function, called as often as it asks, the calls of all spread over the same period."""
    turns = [(k / max(1, count - 1), name) for name, (_, count) in runs.items() for k in range(count)]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _, name in sorted(turns, key=lambda turn: turn[0]):
        times[name].append(timed(runs[name][0]))
    return times


class Loop:
    """A user's training loop, one step at a time, its batch in so many micro-batches.

    ``wrap`` turns the model into what is called: ``DistributedDataParallel`` on several processes.
    """

    def __init__(
        self,
        case: Case,
        observables: list[Observable] | None = None,
        *,
        plain: bool = False,
        parts: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        torch.manual_seed(0)
        self.case, self.parts = case, parts
        self.model = case.make_model().train()
        self.called = wrap(self.model)
        self.optimizer = case.make_optimizer(self.model)
        self.data = batches(case)
        self.monitor = None
        if not plain:
            self.monitor = Monitor(
                self.model, self.optimizer, observables, dataset_size=case.dataset_size, on_error="raise"
            )

    def step(self) -> None:
        batch = next(self.data)
        for x, y in zip(*(each.chunk(self.parts) for each in batch), strict=True):
            with self.monitor.micro_batch(x, y) if self.monitor else nullcontext():
                (self.case.loss(self.called(x), y) / self.parts).backward()
        if self.monitor is not None:
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


def cost_in_steps(case: Case, observable: Observable, repeats: int, **loop: Any) -> float:
    """Median extra time of a step on which the observable is due, over the median plain step."""
    plain, measured = Loop(case, plain=True, **loop), Loop(case, [observable], **loop)
    for loop in (plain, measured, plain, measured):
        loop.step()
    pairs = in_turn(plain, measured, repeats)
    base = median(p for p, _ in pairs)
    return median(m - p for p, m in pairs) / base


def environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def save(name: str, result: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
    return path


def saved_results(name: str) -> dict[str, Any]:
    """The last saved run: what is measured anew replaces its rows, the others are kept."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def keep(name: str, results: dict[str, Any], markdown: Callable[[dict[str, Any]], str]) -> None:
    """Save what was measured among the rows of earlier runs, and show all of them on the page."""
    kept = saved_results(name)
    for part, rows in results.items():
        kept.setdefault(part, {}).update(rows)
    print(f"\nsaved: {save(name, {'results': kept})}")
    onto_page(name, markdown(kept))


def onto_page(mark: str, table: str) -> None:
    """Put the table between its marks."""
    text = PAGE.read_text()
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, _, rest = text.partition(begin)
    PAGE.write_text(before + begin + table + "\n" + end + rest.partition(end)[2])
