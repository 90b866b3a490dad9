"""Whether a change of the code changes a number: save what runs read before it, compare after it.

    python tests/same_numbers.py save before.json
    python tests/same_numbers.py compare before.json

The runs are the demo (its TensorBoard files, read back), the examples, and plain loops over all observables
and controllers that are stopped, saved and resumed. Scalars, errors, intervals, arrays and decisions must be
equal to the last bit; words may differ and are listed. One thread, so that sums have one order.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import gradiometer as g
from gradiometer.demo.run import run_demo

ROOT = Path(__file__).parents[1]
EXAMPLES = {"plain_loop": 60, "new_observable": 30, "equilibrium": 1200, "batch_growth": 400}
DEMO = {"convnet": 3000, "gpt": 120}
OFTEN = {"schedule": 4, "sampling": 2}


def number(value: Any) -> str:
    """Every bit of a number, or of an array."""
    if isinstance(value, (int, float)):
        return float(value).hex()
    array = np.ascontiguousarray(value)
    if np.isnan(array).all():
        return "nan"
    return f"{array.dtype}{list(array.shape)}:{hashlib.sha256(array.tobytes()).hexdigest()}"


def collected(memory: g.MemoryRecorder) -> dict[str, Any]:
    """Numbers and words of everything a run recorded; times are left out."""
    numbers: dict[str, list[Any]] = {}
    words: dict[str, list[Any]] = {}
    for step, readings in memory.records:
        for r in readings:
            if "/cost/" in r.key:
                continue
            bits = [number(v) for v in (r.value, r.stderr, r.low, r.high)]
            numbers.setdefault(r.key, []).append([step, *bits, r.resolved])
            words.setdefault(r.key, []).append([r.unit, r.sentence, r.note])
    for i, decision in enumerate(memory.decisions):
        plain = decision.plain()
        words[f"decision {i}"] = [plain.pop("rule"), plain.pop("reason"), sorted(plain.pop("read"))]
        numbers[f"decision {i}"] = [json.dumps(plain, sort_keys=True)]
    return {"numbers": numbers, "words": words}


def written(folder: Path) -> dict[str, Any]:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    board = EventAccumulator(str(folder), everything)
    board.Reload()
    tags = board.Tags()
    numbers: dict[str, Any] = {}
    for tag in tags["scalars"]:
        if "/cost/" not in tag:
            numbers[tag] = [[e.step, float(e.value).hex()] for e in board.Scalars(tag)]
    for tag in tags["images"]:
        images = board.Images(tag)
        numbers[tag] = [[e.step, hashlib.sha256(e.encoded_image_string).hexdigest()] for e in images]
    for tag in tags["histograms"]:
        numbers[tag] = [[e.step, repr(e.histogram_value)] for e in board.Histograms(tag)]
    words = {
        tag: [e.tensor_proto.string_val[0].decode() for e in board.Tensors(tag)]
        for tag in tags["tensors"]
        if "text_summary" in tag
    }
    return {"numbers": numbers, "words": words}


class Branchy(nn.Module):
    """Norm layers, a shared weight and a parameter used on its own, in two parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 12))
        self.shift = nn.Parameter(torch.zeros(12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x) + self.shift
        return self.head(torch.relu(hidden))


def batch_normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))


def optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    parameters: list[Any] = list(model.parameters())
    groups = [
        {"params": parameters[:-2], "lr": 0.02, "name": "body"},
        {"params": parameters[-2:], "lr": 0.01, "name": "head"},
    ]
    makers = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3),
        "plain": lambda: torch.optim.SGD(parameters, lr=0.05, weight_decay=1e-2),
        "nesterov": lambda: torch.optim.SGD(parameters, lr=0.02, momentum=0.8, nesterov=True),
        "adam": lambda: torch.optim.Adam(groups, lr=0.01, weight_decay=1e-2),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.01, weight_decay=1e-2),
        "rmsprop": lambda: torch.optim.RMSprop(parameters, lr=1e-3),
        "adagrad": lambda: torch.optim.Adagrad(parameters, lr=0.01),
    }
    return makers[kind]()


def observables(kind: str) -> list[g.Observable]:
    sgd = kind in ("sgd", "plain", "nesterov")
    known = sgd or kind in ("adam", "adamw")
    chosen: list[g.Observable] = [
        g.NeuralTangentKernel(schedule=5, outputs="full" if kind == "sgd" else "trace"),
        g.JacobianNorm(schedule=5, num_projections=2),
        g.GradientNoiseScale(
            **OFTEN,
            source="norm layers" if kind == "adamw" else "auto",
            cross_check="split batch" if kind in ("plain", "adam") else None,
            preconditioned=kind in ("adam", "adamw"),
            estimator=g.Window(30),
        ),
        g.FluctuationDissipation(
            **OFTEN,
            verify=kind in ("sgd", "nesterov", "rmsprop"),
            centred=kind == "adamw",
            test="sasa" if kind == "plain" else "tolerance",
        ),
        g.NoiseCurvature(**OFTEN),
    ]
    if known:
        chosen += [
            g.NeuralTangentKernel(schedule=5, outputs="diagonal", preconditioned=True),
            g.LearningRateLimit(schedule=10),
        ]
    if sgd:
        chosen.append(g.SecondFluctuationDissipation(**OFTEN, allow_shuffled=True))
    return chosen


def stopped(kind: str, model: str, parts: int, *, layers: bool, controllers: bool) -> dict[str, Any]:
    """Two runs of one loop, the second from the first one's checkpoint."""
    memory, saved = g.MemoryRecorder(), None
    generator = torch.Generator().manual_seed(1)
    for steps in (41, 40):
        torch.manual_seed(0)
        net = {"branchy": Branchy, "norm": batch_normalised}[model]()
        optim = optimizer(kind, net)
        acting: list[g.Controller] = []
        if controllers:
            acting = [
                g.EquilibriumLR(policy="yaida", tolerance=5.0, check_every=16, max_drops=2),
                g.NoiseScaleBatchSize(check_every=8, patience=1, kappa=50.0),
            ]
        monitor = g.Monitor(
            net,
            optim,
            observables(kind),
            controllers=acting,
            recorders=[memory],
            dataset_size=1000,
            replacement=kind != "plain",
            loss_fn=F.cross_entropy,
            layers=layers,
        )
        if saved is not None:
            state = torch.load(io.BytesIO(saved), weights_only=True)
            net.load_state_dict(state["model"])
            optim.load_state_dict(state["optimizer"])
            monitor.load_state_dict(state["monitor"])
        with monitor:
            for step in range(steps):
                if step == 25 and kind == "sgd":
                    for group in optim.param_groups:
                        group["lr"] *= 0.5
                for _ in range(monitor.accumulation or parts):
                    x = torch.randn(24, 6, generator=generator)
                    y = torch.randint(4, (24,), generator=generator)
                    with monitor.micro_batch(x, y):
                        (F.cross_entropy(net(x), y) / (monitor.accumulation or parts)).backward()
                monitor.before_step()
                optim.step()
                optim.zero_grad()
            buffer = io.BytesIO()
            torch.save(
                {
                    "model": net.state_dict(),
                    "optimizer": optim.state_dict(),
                    "monitor": monitor.state_dict(),
                },
                buffer,
            )
            saved = buffer.getvalue()
    found = collected(memory)
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    found["numbers"]["weights"] = [number(weights.numpy())]
    return found


def example(name: str, steps: int) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return collected(module.main(steps=steps))


@contextlib.contextmanager
def moved_to(folder: str) -> Iterator[None]:
    """Examples write where they are started."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def runs() -> dict[str, Any]:
    """Name of each run, and what makes it."""
    found: dict[str, Any] = {
        f"{kind} {model} {parts}": (stopped, kind, model, parts)
        for kind, model, parts in (
            ("sgd", "branchy", 1),
            ("plain", "branchy", 1),
            ("plain", "norm", 1),
            ("nesterov", "branchy", 2),
            ("adam", "branchy", 1),
            ("adamw", "branchy", 1),
            ("adamw", "branchy", 2),
            ("rmsprop", "branchy", 1),
            ("adagrad", "norm", 1),
        )
    }
    found["controllers"] = (stopped, "plain", "branchy", 1)
    found |= {f"example {name}": (example, name, steps) for name, steps in EXAMPLES.items()}
    return found


def measure(only: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    warnings.simplefilter("ignore")
    for name, (function, *arguments) in runs().items():
        if only not in name:
            continue
        options = {}
        if function is stopped:
            options = {"layers": arguments[0] in ("adam", "rmsprop"), "controllers": name == "controllers"}
        quiet = contextlib.redirect_stdout(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, moved_to(folder), quiet:
            results[name] = function(*arguments, **options)
        print(name, len(results[name]["numbers"]), file=sys.stderr)
    for model, steps in DEMO.items():
        if only not in f"demo {model}":
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            results[f"demo {model}"] = written(run_demo(model, steps=steps, log_dir=Path(folder), quiet=True))
        print("demo", model, len(results[f"demo {model}"]["numbers"]), file=sys.stderr)
    return results


def differences(before: dict[str, Any], after: dict[str, Any], kind: str) -> list[str]:
    found = []
    for run in before.keys() & after.keys():
        old, new = before[run][kind], after[run][kind]
        for key in sorted(old.keys() | new.keys()):
            left, right = old.get(key, []), new.get(key, [])
            pairs = [(a, b) for a, b in zip(left, right, strict=False) if a != b]
            if pairs or len(left) != len(right):
                shown = pairs[0] if pairs else (f"{len(left)} entries", f"{len(right)} entries")
                found.append(f"{run}: {key}: {len(pairs)} of {len(left)} differ, first {shown}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["save", "compare"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--words", action="store_true", help="list the words that differ, too")
    options = parser.parse_args()
    results = json.loads(json.dumps(measure(options.only)))
    if options.action == "save":
        options.path.write_text(json.dumps(results))
        return
    before = json.loads(options.path.read_text())
    changed = differences(before, results, "numbers")
    print(*changed, sep="\n")
    words = differences(before, results, "words")
    print(*words if options.words else (), sep="\n")
    print(f"{len(changed)} series of numbers and {len(words)} of words differ")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
