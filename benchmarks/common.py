"""What the benchmarks share: models, data, interleaved timing, and the environment in the result."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradiometer.demo.characters import CharacterTransformer
from gradiometer.demo.digits import DigitsConvNet

RESULTS = Path(__file__).parent / "results"


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


def mlp() -> nn.Module:
    sizes = (784, 1024, 1024, 1024, 10)
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def _vectors(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(128, 784, generator=g), torch.randint(10, (128,), generator=g)


def _images(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(16, 1, 8, 8, generator=g), torch.randint(10, (16,), generator=g)


def _tokens(g: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(101, (32, 65), generator=g)
    return tokens[:, :-1], tokens[:, 1:]


def cases(optimizer: str) -> list[Case]:
    """MLP 784-1024x3-10 at B=128, the digits ConvNet at B=16, the character transformer at B=32."""
    make = {"sgd": sgd, "adamw": adamw}[optimizer]
    return [
        Case("mlp", mlp, _vectors, make, 60_000),
        Case("convnet", DigitsConvNet, _images, make, 1_437, 8000),
        Case("transformer", CharacterTransformer, _tokens, make, 6_500),
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
