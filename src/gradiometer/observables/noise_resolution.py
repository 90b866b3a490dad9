"""When the noise scale, a ratio of two averages, is resolved, what is said of it, and whose it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..collect.snapshot import Snapshot
from ..stats.jackknife import FEWEST_GROUPS, jackknife_covariance, ratio_interval, t_quantile
from .base import Estimate

NEAR = 0.5
"""B_simple above this share of the data set is said to be near it."""
OF_THE_DATA_SET = "examples of the data set"
"""Part of a note that a verdict looks for."""


def population(snapshot: Snapshot) -> tuple[float | None, str]:
    """Whose noise and gradient the parts of a batch show.

    Parts that share no example are corrected for that, see ``of_training_set``, where it is known that they
    do not, and of how many examples they are drawn. Nothing is corrected elsewhere.

    Args:
        snapshot: With ``dataset_size`` and ``replacement`` where they are known.

    Returns:
        Share of the training set that one example is, to correct with: 0 where examples are independent
        draws from it, ``None`` where moments are not those of the training set. And a clause that says
        whose moments they are.
    """
    sized, told = snapshot.has("dataset_size"), snapshot.has("replacement")
    size = f" of {snapshot.dataset_size} examples" if sized else ""
    if told and snapshot.replacement:
        return 0.0, f"of the training set{size}"
    in_order = snapshot.has("fixed_order") and snapshot.fixed_order
    if told and sized and not in_order and snapshot.batch_size <= snapshot.dataset_size:
        return 1 / snapshot.dataset_size, f"of the training set{size}"
    return None, "of the distribution the examples are drawn from"


def critical_fraction(batch: Tensor, scale: Estimate) -> Estimate:
    """``B / (B + B_simple)``, with the ends of the scale's interval.

    Args:
        batch: Batch size and its replicates.
        scale: The noise scale.
    """
    return Estimate(
        batch / (batch + scale.value),
        scale.stderr,
        low=None if scale.high is None else float(batch[0] / (batch[0] + scale.high)),
        high=None if scale.low is None else float(batch[0] / (batch[0] + scale.low)),
        resolved=scale.resolved,
        note="" if scale.resolved else scale.note,
    )


def beside_data_set(scale: Estimate, dataset_size: float) -> Estimate:
    """The scale, with a word where it comes near the number of examples there are.

    Args:
        scale: The noise scale.
        dataset_size: Examples in the data set.
    """
    value = float(scale.value[0])
    least = scale.low if math.isnan(value) else value
    if least is None or not least > NEAR * dataset_size:
        return scale
    beside = f"near the {dataset_size:.0f} {OF_THE_DATA_SET}, beyond which it cannot be measured"
    return scale._replace(note="; ".join(filter(None, (beside, scale.note))))


def resolved_scale(
    trace: Tensor, signal: Tensor, weights: Tensor, batch: float, *, of: str = "the gradient"
) -> dict[str, Estimate]:
    """Noise over signal and its lower bound; not resolved within two standard errors of no signal.

    Args:
        trace: Average of the noise and its replicates.
        signal: Average of the signal and its replicates.
        weights: Samples in each block that a replicate leaves out.
        batch: Examples behind a step: the signal is below its noise where noise over signal is above this.
        of: What the signal is, in words.

    Shapes:
        trace and signal ``[1 + g]``, weights ``[g]``.
    """
    ratio = torch.where((signal > 0) & (trace > 0), trace / signal, torch.nan)
    rows = torch.stack([trace, signal], 1)
    covariance = jackknife_covariance(rows[0], rows[1:], weights)
    if not covariance.groups or not bool(rows.isfinite().all()):
        unknown = {"stderr": math.nan, "low": math.nan, "high": math.nan}
        note = f"not resolved: {_why_no_error(rows, weights, of)}"
        return {"scale": Estimate(ratio, **unknown, resolved=False, note=note)}
    (var_n, cov), (_, var_d) = covariance.matrix.tolist()
    above, below = rows[0].tolist()
    ends = ratio_interval(above, below, var_n, var_d, cov, t_quantile(covariance.groups))
    low, high = (max(ends[0], 0.0), ends[1]) if ends[1] > 0 else (0.0, math.inf)
    why = _why_not_resolved(above, below, var_d**0.5, batch, of)
    scale = Estimate(ratio, low=low, high=high)
    if why:
        bound = f"at least {low:.3g}" if low > 0 else "without a bound"
        note = f"not resolved, {bound}: {why}"
        scale = Estimate(ratio * math.nan, low=low, high=high, resolved=False, note=note)
    return {"scale": scale, "scale_lower_bound": Estimate(low, math.nan)}


def _why_no_error(rows: Tensor, weights: Tensor, of: str) -> str:
    """Why two averages have no error."""
    if not bool(rows.isfinite().all()):
        return f"{of} is not finite"
    if len(weights) < FEWEST_GROUPS:
        return f"too few records yet, an error needs {FEWEST_GROUPS}"
    if round(float(weights.sum() ** 2 / weights.square().sum())) < FEWEST_GROUPS:
        return f"the average rests on its last few records, an error needs {FEWEST_GROUPS}"
    return f"{of} or its noise still changes from record to record, so that their averages have no error yet"


def _why_not_resolved(noise: float, signal: float, error: float, batch: float, of: str) -> str:
    """Why noise over signal is no number; empty where it is one."""
    if signal <= 0 and not error:
        return f"{of} is zero"
    if signal >= 2 * error:
        return "" if noise > 0 else f"no noise is seen in {of}"
    if signal <= 0 or noise > batch * signal:
        return f"{of} is below its own noise, average longer"
    return f"{of} changes too much from record to record"


def ratio_of_scales(above: Estimate, below: Estimate) -> Tensor | Estimate:
    """One noise scale over another; a ratio of positive numbers, and resolved where both are.

    Args:
        above: A noise scale.
        below: Another one.
    """
    ratio: Tensor = above.value / below.value
    if above.resolved and below.resolved:
        return ratio
    note = above.note if not above.resolved else below.note
    return Estimate(ratio, math.nan, low=0.0, high=math.inf, resolved=False, note=note)


def positive(value: Tensor, part: Tensor, otherwise: str) -> Estimate:
    """A number that rests on an average which must be positive.

    Args:
        value: The number and its replicates.
        part: The average and its replicates.
        otherwise: What it means that the average is not.
    """
    resolved = bool(part[0] > 0)
    return Estimate(value, resolved=resolved, note="" if resolved else f"not resolved: {otherwise}")


def not_measured(why: str) -> Estimate:
    """A reading that cannot be had, with the reason; never 0.

    Args:
        why: The reason, as a clause.
    """
    return Estimate(math.nan, math.nan, resolved=False, note=f"not measured: {why}")
