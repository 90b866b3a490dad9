"""What a step with the Jacobian regulariser costs, in plain steps of the same model.

    python benchmarks/jacobian_regularizer.py [--quick]

Plain and regularised steps alternate, optimizer included; each cost is the median of the ratios of
neighbours. The transformer is differentiated at its embedding, and its regularised steps use attention in
its plain form, as they must; its plain steps use the fused one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from common import Case, Loop, cases, in_turn, keep
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradiometer import JacobianRegularizer

TARGETS = {"convnet": 2.4}
PROJECTIONS = {"1": 1, "2": 2, "exact": None}

Forward = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
"""Maps a model and a batch to what is differentiated and to the logits."""


def at_the_inputs(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    return x, model(x)


def at_the_embedding(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    embedded = model.token_embedding(tokens)
    with sdpa_kernel(SDPBackend.MATH):
        return embedded, model.head(model.norm(model.blocks(model.position_embedding(embedded))))


class Regularised(Loop):
    """The same loop with the term."""

    def __init__(self, case: Case, num_projections: int | None, forward: Forward) -> None:
        super().__init__(case, plain=True)
        self.regularizer = JacobianRegularizer(0.01, num_projections=num_projections)
        self.forward = forward

    def step(self) -> None:
        batch, y = next(self.data)
        x, logits = self.forward(self.model, batch)
        (self.case.loss(logits, y) + self.regularizer(x, logits)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(
    case: Case, forward: Forward, projections: dict[str, int | None], repeats: int
) -> dict[str, float]:
    """Cost of a regularised step for each number of projections, and the plain step's milliseconds."""
    row: dict[str, float] = {}
    for name, k in projections.items():
        plain, regularised = Loop(case, plain=True), Regularised(case, k, forward)
        for loop in (plain, regularised) * 2:
            loop.step()
        pairs = in_turn(plain, regularised, repeats)
        row[name] = median(r / p for p, r in pairs)
        row["plain step, ms"] = 1e3 * median(p for p, _ in pairs)
    return row


def more_images(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(128, 1, 8, 8, generator=g), torch.randint(10, (128,), generator=g)


def all_cases(quick: bool) -> dict[str, dict[str, float]]:
    mlp, convnet, transformer = cases("sgd")[:2] + cases("adamw")[2:]
    large = replace(convnet, name="convnet, B = 128", make_batch=more_images)
    few = 5 if quick else 60
    sampled: dict[str, int | None] = {"1": 1, "2": 2}
    return {
        convnet.name: measure(convnet, at_the_inputs, PROJECTIONS, 10 * few),
        large.name: measure(large, at_the_inputs, PROJECTIONS, few),
        mlp.name: measure(mlp, at_the_inputs, PROJECTIONS, few // 4),
        transformer.name: measure(transformer, at_the_embedding, sampled, few // 4),
    }


def markdown(results: dict[str, Any]) -> str:
    """One row per model: costs by number of projections, against the target where there is one."""
    head = ["model", "plain step, ms", "1 projection", "2 projections", "exact"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in results.items():
        cells = [f"{row[k]:.2f}" if k in row else "–" for k in PROJECTIONS]
        if name in TARGETS:
            verdict = "met" if row["1"] <= TARGETS[name] else "**missed**"
            cells[0] += f" ({TARGETS[name]:.1f}: {verdict})"
        lines.append("| " + " | ".join([name, f"{row['plain step, ms']:.2f}", *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats, for the tests; nothing is saved")
    options = parser.parse_args()
    results = all_cases(options.quick)
    print("Cost of one regularised step in plain steps\n")
    print(markdown(results))
    if not options.quick:
        keep("jacobian_regularizer", results, markdown)


if __name__ == "__main__":
    main()
