"""Values that are wrong almost everywhere, for the tests that give every argument every one of them."""

import inspect
import math

import numpy as np
import torch
from torch import nn
from torch.utils.data import SequentialSampler

from gradiometer import (
    Ema,
    FluctuationDissipation,
    GradientNoiseScale,
    HalfRun,
    JacobianRegularizer,
    Quantity,
    Reading,
    StopWhenSettled,
    Window,
    at,
    every,
    log_spaced,
)

NET = nn.Linear(3, 2)
SGD = torch.optim.SGD(NET.parameters(), lr=0.1)
SAMPLER = SequentialSampler(range(9))
NAMES = (
    "tolerance",
    "sasa",
    "auto",
    "split batch",
    "trace",
    "full",
    "sum",
    "warn",
    "yaida",
    "keep",
    "linear",
)
POOL = [
    *(None, True, False, 0, 1, 3, -1, 10**30, 0.0, 0.5, 1.0, -2.5, math.nan, math.inf, 1j),
    *("", "a", "a/b", "\x1b[2J", "\ud800", b"bytes", *NAMES),
    *([], [1], [None], (), {}, {"a": 1}, {1, 2}, range(3), iter(()), object(), object, int, lambda *_: 0),
    *(torch.zeros(3), torch.zeros(()), torch.ones(2, 3), torch.tensor(True), np.ones(2), np.float32(0.5)),
    *(Window, Window(9), HalfRun(), Ema, every, every(3), log_spaced(), at([1]), torch.float32),
    *(GradientNoiseScale, GradientNoiseScale(), [FluctuationDissipation()], [StopWhenSettled()]),
    *([GradientNoiseScale], [StopWhenSettled], NET, nn.LazyLinear(2), SGD, SAMPLER),
    *(JacobianRegularizer(0.1), Quantity("1", "It."), Reading("a/b/c", 1.0)),
]


def arguments_of(kind):
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
