"""LBFGS: the weights move several times in a step, and only the last move could be seen."""

from __future__ import annotations

from torch.optim import LBFGS

from .base import Family, register

__all__ = ["LBFGSFamily"]


class LBFGSFamily(Family):
    """``torch.optim.LBFGS``."""

    classes = (LBFGS,)
    moves_once = False


register(LBFGSFamily())
