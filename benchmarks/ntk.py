"""What a tangent kernel costs, beside the plain recipe, the least it could cost, and its targets.

    python benchmarks/ntk.py [--quick] [--cases NAME ...] [--peak CASE METHOD]

For each case: the median time of ``empirical_ntk``, of the reference (``vmap(jacrev)`` over single examples
and an ``einsum``), of nngeometry where it is installed, and of the floor: one forward pass, one backward
pass per output down to the outputs of the layers, and the contractions of each layer alone. All take turns
in one process. Peak memory is that of a fresh process for each method. After that: a kernel in units of the
model's own training step, how time and memory grow with each size of an MLP, and what the per-example norms
add to the step they ride along with.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    Case,
    Loop,
    adamw,
    cases,
    cost_in_steps,
    images,
    interleaved,
    keep,
    mlp,
    timed,
    tokens,
)
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradiometer import GradientNoiseScale, at, empirical_ntk, every

MOST_BYTES = 8e9  # of the reference's Jacobian
TOLERANCE = 1e-3  # between the reference and ours, relative to the largest entry


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def transformer() -> nn.Module:
    from gradiometer.demo.characters import Block, PositionEmbedding  # Lightning is slow to import

    blocks = [Block(128, 4) for _ in range(4)]
    embedding = [nn.Embedding(96, 128), PositionEmbedding(64, 128)]
    return nn.Sequential(*embedding, *blocks, nn.LayerNorm(128), nn.Linear(128, 96, bias=False))


def _text(g: torch.Generator) -> tuple[Tensor, Tensor]:
    text = torch.randint(96, (16, 65), generator=g)
    return text[:, :-1], text[:, 1:]


@dataclass(frozen=True)
class Kernel:
    """A kernel to be timed: at least ``faster`` times the reference, or at most ``steps`` training steps."""

    name: str
    make_model: Callable[[], nn.Module]
    make_inputs: Callable[[torch.Generator], Tensor]
    outputs: str
    position: bool = False
    projections: int | None = None
    faster: float | None = None
    memory: float | None = None
    loop: Case | None = None
    steps: float | None = None

    def build(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return self.make_model(), self.make_inputs(torch.Generator().manual_seed(1))

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """Outputs ``[N, O]``: of a sequence, those of its last position."""
        return model(x)[:, -1] if self.position else model(x)

    @property
    def full(self) -> bool:
        return self.outputs == "full"


def mlp_kernel(
    outputs: str,
    N: int = 64,
    O: int = 10,  # noqa: E741
    width: int = 512,
    depth: int = 3,
    faster: float | None = None,
) -> Kernel:
    return Kernel(
        f"mlp-N{N}-O{O}-W{width}-D{depth}-{outputs}",
        lambda: mlp([784, *[width] * depth, O]),
        lambda g: torch.randn(N, 784, generator=g),
        outputs,
        faster=faster,
    )


def kernels() -> dict[str, Kernel]:
    def pictures(g: torch.Generator) -> Tensor:
        return torch.randn(32, 3, 32, 32, generator=g)

    def digits(g: torch.Generator) -> Tensor:
        return torch.cat([images(g)[0], images(g)[0]])

    demos = {optimizer: {case.name: case for case in cases(optimizer)} for optimizer in ("sgd", "adamw")}
    convnet, characters = demos["sgd"]["convnet"], demos["adamw"]["transformer"]
    train = Case("transformer", transformer, _text, adamw, 6_500)
    last: dict[str, Any] = {"outputs": "trace", "position": True}
    few: dict[str, Any] = {**last, "projections": 8}
    return {
        "mlp512-full": mlp_kernel("full", faster=250),
        "mlp512-trace": mlp_kernel("trace", faster=150),
        "mlp1024-full": mlp_kernel("full", N=32, width=1024, faster=300),
        "conv-full": Kernel("conv-full", conv, pictures, "full", faster=1.5),
        "conv-trace": Kernel("conv-trace", conv, pictures, "trace", faster=2),
        "transformer-trace": Kernel(
            "transformer-trace", transformer, lambda g: _text(g)[0], faster=2.8, memory=0.25, **last
        ),
        "transformer-8": Kernel(
            "transformer-8", transformer, lambda g: _text(g)[0], loop=train, steps=6, **few
        ),
        "demo-convnet": Kernel("demo-convnet", convnet.make_model, digits, "trace", loop=convnet, steps=6),
        "demo-transformer": Kernel(
            "demo-transformer",
            characters.make_model,
            lambda g: tokens(g)[0],
            loop=characters,
            steps=12,
            **few,
        ),
    }


def find(name: str) -> Kernel:
    """A case, or an MLP whose sizes are its name."""
    sizes = re.fullmatch(r"mlp-N(\d+)-O(\d+)-W(\d+)-D(\d+)-(full|trace)", name)
    return mlp_kernel(sizes[5], *map(int, sizes.groups()[:4])) if sizes else kernels()[name]


# The methods.


def ours(kernel: Kernel, model: nn.Module, x: Tensor) -> Tensor:
    options: dict[str, Any] = {"outputs": kernel.outputs, "num_projections": kernel.projections}
    return empirical_ntk(model, x, forward=kernel.forward if kernel.position else None, **options)


def recipe(kernel: Kernel, model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian of every example with respect to all parameters, and its product with itself."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        count = kernel.forward(model, x[:1]).shape[1]

    def block(part: slice) -> Tensor:
        def single(p: dict[str, Tensor], example: Tensor) -> Tensor:
            out = functional_call(model, p, (example[None],))
            return (out[0, -1] if kernel.position else out[0])[part]

        jacobians = vmap(jacrev(single), (None, 0))(parameters, x).values()
        form = "Naf,Mbf->NMab" if kernel.full else "Naf,Maf->NM"
        return sum(torch.einsum(form, j.flatten(2), j.flatten(2)) for j in jacobians)

    if kernel.full:
        return block(slice(None))
    row = 4 * len(x) * sum(p.numel() for p in parameters.values())
    step = max(1, min(count, int(MOST_BYTES // row)))
    return sum(block(slice(o, o + step)) for o in range(0, count, step)) / count


def reference(kernel: Kernel, model: nn.Module, x: Tensor) -> Tensor:
    """The recipe at its best: the fused attention of the CPU has no batching rule and goes one by one."""
    with sdpa_kernel(SDPBackend.MATH):
        return recipe(kernel, model, x)


def nngeometry(kernel: Kernel, model: nn.Module, x: Tensor) -> Tensor:
    from nngeometry import GramMatrix

    return GramMatrix(model, (x, torch.zeros(len(x)))).data.permute(1, 3, 0, 2)  # the full kernel only


METHODS = {"ours": ours, "reference": reference}


def check(kernel: Kernel, model: nn.Module, x: Tensor, method: Callable[..., Tensor] = ours) -> float:
    """Largest difference from the reference on two examples, over the largest entry."""
    expected = reference(kernel, model, x[:2]).double()
    found = method(kernel, model, x[:2]).double()
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < TOLERANCE:
        raise SystemExit(f"{kernel.name}: {method.__name__} differs from the reference by {difference:.1e}")
    return difference


# The floor.


def captured(
    kernel: Kernel, model: nn.Module, x: Tensor
) -> tuple[Tensor, list[nn.Module], list[Tensor], Any]:
    """Outputs, the layers that own parameters, their inputs, and where the gradient of each arrives."""
    layers: list[nn.Module] = []
    inputs: list[Tensor] = []
    edges: list[Any] = []

    def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        layers.append(layer)
        inputs.append(args[0].detach())
        edges.append(get_gradient_edge(out))

    owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [m.register_forward_hook(hook) for m in owners]
    out = kernel.forward(model, x)
    for handle in handles:
        handle.remove()
    return out, layers, inputs, edges


def directions(kernel: Kernel, out: Tensor) -> Tensor:
    """What is sent back: every output, or as many random combinations."""
    count = out.shape[1]
    if kernel.projections is None:
        return torch.eye(count).to(out)
    return torch.randn(kernel.projections, count, generator=torch.Generator().manual_seed(0)).to(out)


def passes(kernel: Kernel, model: nn.Module, x: Tensor, batched: bool) -> None:
    """One forward pass, and one backward pass per output to the outputs of the layers."""
    with sdpa_kernel(SDPBackend.MATH) if batched else nullcontext():  # as in the reference, or as it comes
        out, _, _, edges = captured(kernel, model, x)
        rows = directions(kernel, out)
        if batched:
            rows = rows[:, None].expand(-1, *out.shape)
            torch.autograd.grad(out, edges, rows, is_grads_batched=True)
        else:
            for row in rows:
                torch.autograd.grad(out, edges, row.expand_as(out), retain_graph=True)


def jacobian(layer: nn.Module, a: Tensor, g: Tensor) -> Iterator[Tensor]:
    """Gradients ``[N, O, ...]`` of every example by each of the layer's parameters."""
    if isinstance(layer, nn.Conv2d):
        a = F.unfold(a, layer.kernel_size, padding=layer.padding, stride=layer.stride)
        yield torch.bmm(g.flatten(1, 2), a.mT).view(*g.shape[:3], -1)
    elif isinstance(layer, nn.Linear):
        yield torch.bmm(g.flatten(1, 2), a).view(*g.shape[:3], -1)
    elif isinstance(layer, nn.LayerNorm):
        yield (g * F.layer_norm(a, layer.normalized_shape)[:, None]).sum(2)
        yield g.sum(2)
    elif isinstance(layer, nn.Embedding):
        index = a[:, None, :, None].expand_as(g)
        zeros = g.new_zeros(*g.shape[:2], *layer.weight.shape)
        yield zeros.scatter_add_(2, index, g)
    else:  # added to its input
        yield g
    if getattr(layer, "bias", None) is not None and not isinstance(layer, nn.LayerNorm):
        yield g.sum(-1)


Blocks = Iterator[tuple[slice, Tensor]]


def triangle(rows: Tensor) -> Blocks:
    """Products of the rows of each block of examples with those that follow; one block where rows are few."""
    count = len(rows)
    step = -(-count // (4 if rows.shape[:-1].numel() >= 128 else 1))
    for begin in range(0, count, step):
        part = slice(begin, begin + step)
        yield part, rows[part].flatten(0, -2) @ rows[begin:].flatten(0, -2).mT


def contraction(kernel: Kernel, layer: nn.Module, a: Tensor, g: Tensor) -> Callable[[], Blocks]:
    """The kernel of one layer from its inputs and gradients ``[N, O, ...]``, upper triangle only."""
    outer = g.shape[1] if kernel.full else 1
    if isinstance(layer, nn.Linear) and a.ndim == 2:
        rows = g if kernel.full else g.flatten(1)

        def product() -> Blocks:
            of_inputs = a @ a.mT + (layer.bias is not None)
            for part, block in triangle(rows):
                factor = of_inputs[part, part.start :]
                block.view(len(factor), outer, -1, outer).mul_(factor[:, None, :, None])
                yield part, block

        return product
    if isinstance(layer, nn.Linear):
        g = g.mT.contiguous()
    if isinstance(layer, nn.Conv2d):
        g = g.flatten(3)
    numel = sum(p.numel() for p in layer.parameters(recurse=False))
    step = g.shape[1] if kernel.full else max(1, 2**22 // (len(g) * numel))  # 16 MiB stay in the cache

    def explicit() -> Blocks:
        for begin in range(0, g.shape[1], step):
            for j in jacobian(layer, a, g[:, begin : begin + step]):
                yield from triangle(j.flatten(2) if kernel.full else j.flatten(1))

    return explicit


def contractions(kernel: Kernel, model: nn.Module, x: Tensor) -> Callable[[], Blocks]:
    """All layers' contractions, on gradients made beforehand."""
    out, layers, inputs, edges = captured(kernel, model, x)
    rows = directions(kernel, out)
    kept: list[Tensor] = []
    for i, row in enumerate(rows):
        grads = torch.autograd.grad(out, edges, row.expand_as(out), retain_graph=True)
        if not kept:
            kept = [g.new_empty(len(g), len(rows), *g.shape[1:]) for g in grads]
        for store, g in zip(kept, grads, strict=True):
            store[:, i] = g
    parts = [contraction(kernel, *each) for each in zip(layers, inputs, kept, strict=True)]

    def blocks() -> Blocks:
        for part in parts:
            yield from part()

    return blocks


# Memory.


def high_water() -> float:
    """The most memory this process has held, in MiB.

    On Linux not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak(name: str, method: str) -> float:
    """How much one call raises the high water, after one on two examples."""
    kernel, call = find(name), METHODS[method]
    model, x = kernel.build()
    call(kernel, model, x[:2])
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high water falls to what is held now
    before = high_water()
    call(kernel, model, x)
    return high_water() - before


def peak_apart(name: str, method: str) -> float:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, method]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {run.returncode}:\n{run.stderr}")
    return float(run.stdout)


# The measurements.


def enough(call: Callable[[], Any], quick: bool, most: int = 25) -> tuple[Callable[[], Any], int]:
    """The call, and as many repeats of it as two seconds hold; the call that tells also warms it up."""
    repeats = int(2 / timed(call))
    return call, 3 if quick else max(3, min(most, repeats))


def measure(name: str, kernel: Kernel, quick: bool) -> dict[str, Any]:
    """Times of everything in turn, in seconds, and memory in MiB."""
    model, x = kernel.build()
    x = x[:4] if quick else x
    row: dict[str, Any] = {}
    runs: dict[str, tuple[Callable[[], Any], int]] = {}
    if kernel.faster is not None:
        runs["reference"] = partial(reference, kernel, model, x), 1 if quick else 2
        if kernel.position:
            runs["recipe"] = partial(recipe, kernel, model, x), 1
        if not kernel.full:
            row["nngeometry"] = "full only"
        elif find_spec("nngeometry") is None:
            row["nngeometry"] = "not installed"
        else:
            check(kernel, model, x, nngeometry)
            runs["nngeometry"] = partial(nngeometry, kernel, model, x), 1
    if kernel.projections is None:
        row["difference"] = check(kernel, model, x)
    if kernel.loop is not None:
        runs["step"] = enough(Loop(kernel.loop, plain=True).step, quick, 100)
    runs["ours"] = enough(partial(ours, kernel, model, x), quick)
    runs["passes, one by one"] = enough(partial(passes, kernel, model, x, batched=False), quick)
    runs["passes, batched"] = enough(partial(passes, kernel, model, x, batched=True), quick)
    blocks = contractions(kernel, model, x)
    runs["contractions"] = enough(lambda: deque(blocks(), 0), quick)
    row |= {part: median(times) for part, times in interleaved(runs).items()}
    row["passes"] = min(row["passes, one by one"], row["passes, batched"])
    row["floor"] = row["passes"] + row["contractions"]
    memory = peak if quick else peak_apart
    row["peak"] = {method: memory(name, method) for method in METHODS if method in runs}
    return row


AXES = {"N": (16, 32, 64, 128), "O": (2, 4, 8, 16, 32), "width": (128, 256, 512, 1024), "depth": (2, 4, 8)}
SMALL_AXES = {"N": (4, 8), "O": (2, 4), "width": (32, 64), "depth": (1, 2)}


def exponent(values: tuple[int, ...], costs: list[float]) -> float:
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def measure_growth(quick: bool) -> dict[str, Any]:
    """Fitted exponents of time and of peak memory over each size of the MLP, and what they are fitted to."""
    base = {"N": 4, "O": 2, "width": 32, "depth": 2} if quick else {}
    memory: dict[str, float] = {}
    result: dict[str, Any] = {}
    for (axis, values), mode in product((SMALL_AXES if quick else AXES).items(), ("full", "trace")):
        some = [mlp_kernel(mode, **{**base, axis: value}) for value in values]
        runs: dict[str, tuple[Callable[[], Any], int]] = {}
        for kernel in some:
            model, x = kernel.build()
            runs[kernel.name] = enough(partial(ours, kernel, model, x), quick, 9)
        times = [median(seconds) for seconds in interleaved(runs).values()]
        entry: dict[str, Any] = {"values": values, "time": times, "time_exponent": exponent(values, times)}
        if not quick:
            for kernel in some:
                if kernel.name not in memory:
                    memory[kernel.name] = max(peak_apart(kernel.name, "ours"), 0.1)
            entry["peak"] = [memory[kernel.name] for kernel in some]
            entry["peak_exponent"] = exponent(values, entry["peak"])
        result.setdefault(axis, {})[mode] = entry
    return result


NORMS = {"mlp": ("sgd", 0.3), "convnet": ("sgd", 1.0), "transformer": ("adamw", 0.5)}


def measure_norms(quick: bool) -> dict[str, Any]:
    """What the noise scale adds to a step on which it is sampled, and to one on which it is recorded too."""
    sampled = GradientNoiseScale(schedule=at([0]), sampling=every(1))
    recorded = GradientNoiseScale(schedule=every(1))
    result: dict[str, Any] = {}
    for name in ["convnet"] if quick else NORMS:
        optimizer = NORMS[name][0]
        case = next(case for case in cases(optimizer) if case.name == name)
        repeats = 10 if quick else 400 if name == "convnet" else 50
        result[name] = {
            "sampled": cost_in_steps(case, sampled, repeats),
            "recorded": cost_in_steps(case, recorded, repeats),
        }
    return result


# The tables.


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(value: float | str | None) -> str:
    return number(1000 * value) if isinstance(value, float) else value or "-"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


FLOOR = ["ours / floor", "passes", "contractions"]


def _floor(row: dict[str, Any]) -> list[str]:
    parts = [milliseconds(row[part]) for part in ("passes", "contractions")]
    return [number(row["ours"] / row["floor"]), *parts]


def _against_reference(rows: dict[str, Any]) -> str:
    """Cases that are compared with the reference, times in ms, memory in MiB."""
    head = [
        "case",
        "ours",
        "reference",
        "faster",
        "target",
        *FLOOR,
        "memory",
        "of the reference",
        "nngeometry",
    ]
    lines = []
    for name, kernel in kernels().items():
        if name not in rows or kernel.faster is None:
            continue
        row = rows[name]
        plain = min(row["reference"], row.get("recipe", row["reference"]))
        faster, memory = plain / row["ours"], row["peak"]["ours"] / row["peak"]["reference"]
        target = f"{kernel.faster:g}×: {verdict(faster >= kernel.faster)}"
        if kernel.memory is not None:
            target += f"; memory {kernel.memory:g}×: {verdict(memory <= kernel.memory)}"
        times = [milliseconds(row["ours"]), milliseconds(plain)]
        peaks = [number(row["peak"]["ours"]), number(row["peak"]["reference"])]
        cells = [name, *times, f"{number(faster)}×", target, *_floor(row), *peaks]
        lines.append([*cells, milliseconds(row.get("nngeometry"))])
    return table(head, lines) if lines else ""


def _in_steps(rows: dict[str, Any]) -> str:
    """Cases in units of the model's own training step."""
    head = ["case", "ours", "training step", "steps", "target", *FLOOR, "memory"]
    lines = []
    for name, kernel in kernels().items():
        if name not in rows or kernel.steps is None:
            continue
        row = rows[name]
        steps = row["ours"] / row["step"]
        times = [milliseconds(row["ours"]), milliseconds(row["step"])]
        target = f"{kernel.steps:g}: {verdict(steps <= kernel.steps)}"
        lines.append([name, *times, number(steps), target, *_floor(row), number(row["peak"]["ours"])])
    return table(head, lines) if lines else ""


def _growth(growth: dict[str, Any]) -> str:
    head = ["exponent over", "from", "to", "time, full", "time, trace", "memory, full", "memory, trace"]
    lines = []
    for axis, modes in growth.items():
        values = modes["full"]["values"]
        cells = [axis, f"{values[0]}", f"{values[-1]}"]
        for cost in ("time_exponent", "peak_exponent"):
            cells += [f"{modes[m][cost]:.2f}" if cost in modes[m] else "-" for m in ("full", "trace")]
        lines.append(cells)
    return table(head, lines) if lines else ""


def _norms(norms: dict[str, Any]) -> str:
    head = ["model", "optimizer", "sampled", "target", "sampled and recorded"]
    lines = []
    for name, row in norms.items():
        optimizer, most = NORMS[name]
        target = f"{100 * most:.0f} %: {verdict(row['sampled'] <= most)}"
        extra = [f"{100 * row[kind]:.0f} %" for kind in ("sampled", "recorded")]
        lines.append([name, optimizer, extra[0], target, extra[1]])
    return table(head, lines) if lines else ""


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/benchmarks.md, of whatever has been measured."""
    rows = results.get("kernels", {})
    parts = [
        _against_reference(rows),
        _in_steps(rows),
        _growth(results.get("growth", {})),
        _norms(results.get("norms", {})),
    ]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    names = [*kernels(), "growth", "norms"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats, for the tests; nothing is saved")
    parser.add_argument(
        "--cases", nargs="*", choices=names, default=None, help="measure these, keep the other saved rows"
    )
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "METHOD"), help="print MiB of one call, and stop")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peak:
        print(peak(*options.peak))
        return
    small = ["conv-trace", "demo-convnet", "growth", "norms"]
    wanted = options.cases or (small if options.quick else names)
    results: dict[str, Any] = {"kernels": {}, "growth": {}, "norms": {}}
    for name, kernel in kernels().items():
        if name in wanted:
            print(f"{name} ...", flush=True)
            results["kernels"][name] = measure(name, kernel, options.quick)
    for part, run in {"growth": measure_growth, "norms": measure_norms}.items():
        if part in wanted:
            print(f"{part} ...", flush=True)
            results[part] = run(options.quick)
    print("\n" + markdown(results))
    if not options.quick:
        keep("ntk", results, markdown)


if __name__ == "__main__":
    main()
