"""The rules on the exactly solvable case: a quadratic with gradient noise, many runs at a time."""

import numpy as np
import pytest

from gradiometer.errors import InputError
from gradiometer.stats.stationarity import FEWEST_KNOTS, end_point_deviation, sasa_plus, stationary

FOUR = {"curvature": (0.1, 0.3, 1.0, 3.0), "noise": (1.0, 0.5, 2.0, 1.5)}
EQUAL = {"curvature": (0.5,) * 100, "noise": (1.0,) * 100}


class Runs:
    """Independent runs of SGD; levels at every ``gap`` steps, the right side sampled in between.

    ``start`` scales the squared weights: 1.0 draws them from the stationary state, any other value
    (one for all or one per mode) sets them to so many times their variance there.
    """

    def __init__(self, curvature, noise, *, steps, gap, start=1.0, lr=0.1, momentum=0.0, every=10, runs=300):
        rng = np.random.default_rng(0)
        h, c, mu = np.array(curvature, np.float32), np.array(noise, np.float32), momentum
        variance = lr * c * (1 + mu) / (h * (1 - mu) * (2 * (1 + mu) - lr * h))
        settled = np.ndim(start) == 0 and start == 1.0
        theta = rng.standard_normal((runs, len(h)), np.float32) if settled else np.ones((runs, 1), np.float32)
        theta = (theta * np.sqrt(variance * np.asarray(start))).astype(np.float32)
        velocity = np.zeros_like(theta)
        levels, rights, samples = [], [], []
        warm_up = round(20 / (1 - mu)) if settled and mu else 0
        for t in range(-warm_up, steps + 1):
            if t >= 0 and t % gap == 0:
                square, dot = np.square(theta).sum(1, dtype=float), (theta * velocity).sum(1, dtype=float)
                levels.append((1 - mu) / (2 * lr) * square - mu * dot)
                rights += [np.mean(samples, axis=0)] if samples else []
                samples = []
            gradient = h * theta + np.sqrt(c) * rng.standard_normal(theta.shape, np.float32)
            velocity = np.float32(mu) * velocity + gradient
            theta = theta - np.float32(lr) * velocity
            if t >= 0 and t % every == 0:
                samples.append((1 + mu) / 2 * lr * np.square(velocity).sum(1, dtype=float))
        self.steps, self.level, self.right = gap * np.arange(len(levels)), np.array(levels), np.array(rights)
        self.steps = self.steps.astype(float)

    def window(self, last):
        """Knots of the half-running window that ends at knot ``last``, at most 33."""
        knots = np.arange(last // 2, last + 1)
        while len(knots) > 33:
            knots = np.unique(np.append(knots[::2], last))
        return knots

    def decisions(self, last, tolerance):
        """Of the rule for each run, when the run has come to knot ``last``."""
        knots = self.window(last)
        sums = np.cumsum(np.vstack([np.zeros_like(self.right[:1]), self.right]), axis=0)
        weights = np.diff(knots).astype(float)
        right = np.diff(sums[knots], axis=0) / weights[:, None]
        return np.array(
            [
                stationary(self.steps[knots], level, own, weights, tolerance).value
                for level, own in zip(self.level[knots].T, right.T, strict=True)
            ]
        )

    def true_excess(self, last):
        """Left over right side less 1 of all runs together."""
        first = last // 2
        drift = (self.level[last] - self.level[first]).mean() / (self.steps[last] - self.steps[first])
        return -drift / self.right[first:last].mean()


# -- the scatter of the end points -----------------------------------------------------------------


def ornstein_uhlenbeck(times, knots, runs=3000):
    """Series of variance 1 over so many correlation times."""
    rng = np.random.default_rng(0)
    decay = np.exp(-times / (knots - 1))
    path = rng.normal(size=(knots, runs))
    for k in range(1, knots):
        path[k] = decay * path[k - 1] + (1 - decay**2) ** 0.5 * path[k]
    return np.arange(knots) * 50.0, path


@pytest.mark.parametrize("knots", [10, 17, 33, 129])
@pytest.mark.parametrize("times", [0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 50.0, 1000.0])
def test_end_point_deviation_is_honest_from_short_to_long_windows(times, knots):
    steps, path = ornstein_uhlenbeck(times, knots)
    deviation = end_point_deviation(steps, path)
    difference = path[-1] - path[0]
    truth = (2 * (1 - np.exp(-times))) ** 0.5
    assert 0.75 < np.sqrt(np.square(deviation).mean()) / truth < 1.7
    assert (abs(difference) < 2 * deviation).mean() > (0.9 if times >= 4 else 0.8 if times >= 1 else 0.75)
    # in any long window the price of the doubt is small
    assert times < 1000 or np.median(deviation) < 1.2 * truth


def test_end_point_deviation_does_not_see_a_trend_nor_the_unit():
    steps, path = ornstein_uhlenbeck(10.0, 20, runs=5)
    trend = 1e3 + 0.7 * steps[:, None]
    np.testing.assert_allclose(
        end_point_deviation(steps, 3 * path + trend), 3 * end_point_deviation(steps, path), rtol=1e-9
    )
    np.testing.assert_allclose(
        end_point_deviation(10 * steps + 7, path), end_point_deviation(steps, path), rtol=1e-9
    )


def test_end_point_deviation_of_one_path_of_a_line_and_of_too_few_knots():
    steps, path = ornstein_uhlenbeck(10.0, 20, runs=2)
    one, both = end_point_deviation(steps, path[:, 0]), end_point_deviation(steps, path)
    assert one == pytest.approx(both[0], rel=1e-12)
    assert end_point_deviation(steps, np.ones(20)) == 0.0
    assert np.isnan(end_point_deviation(steps[: FEWEST_KNOTS - 1], path[: FEWEST_KNOTS - 1])).all()


# -- the rule --------------------------------------------------------------------------------------

SETTINGS = {
    "equal modes": dict(EQUAL, every=1),
    "equal soft modes": {"curvature": (0.05,) * 100, "noise": (1.0,) * 100},
    "four modes": FOUR,
    "four modes, momentum": dict(FOUR, lr=0.05, momentum=0.9),
}


@pytest.mark.parametrize("tolerance", [0.05, 0.1])
@pytest.mark.parametrize("name", SETTINGS)
def test_stationary_runs_are_declared_in_time(name, tolerance):
    # at t = 4 / (lr h X sqrt(P)) the standard deviation of the ratio is half the tolerance
    settings = SETTINGS[name]
    h, mu = settings["curvature"], settings.get("momentum", 0.0)
    time = 4 * (1 - mu) / (settings.get("lr", 0.1) * min(h) * tolerance * len(h) ** 0.5)
    gap = round(time / 20)
    runs = Runs(**settings, steps=30 * gap, gap=gap)
    checks = [20, 22, 25, 28, 30]
    declared = np.array([runs.decisions(last, tolerance) == 1.0 for last in checks])
    assert declared[0].mean() > 0.5
    assert declared[-1].mean() > 0.85
    assert declared.any(0).mean() >= 0.95


TRANSIENTS = {
    "from above": dict(EQUAL, start=3.0, steps=80, gap=1, every=1),
    "from far above": dict(EQUAL, start=10.0, steps=80, gap=1, every=1),
    "soft, from above": dict(SETTINGS["equal soft modes"], start=3.0, steps=400, gap=5, every=5),
    "soft, from below": dict(SETTINGS["equal soft modes"], start=0.0, steps=400, gap=5, every=5),
    "four modes from above": dict(FOUR, start=10.0, steps=200, gap=2, every=2),
    "four modes, momentum": dict(FOUR, start=100.0, steps=100, gap=1, every=1, lr=0.05, momentum=0.9),
    "up, then down": {
        "curvature": (0.02,) * 50 + (0.2,) * 50,
        "noise": (1.0,) * 100,
        "start": (0.0,) * 50 + (20.0,) * 50,
        "steps": 500,
        "gap": 2,
        "every": 2,
    },
}


@pytest.mark.parametrize("tolerance", [0.05, 0.1])
@pytest.mark.parametrize("name", TRANSIENTS)
def test_transient_runs_are_not_declared(name, tolerance):
    runs = Runs(**TRANSIENTS[name])
    checks = np.unique(np.geomspace(2 * FEWEST_KNOTS, len(runs.steps) - 1, 20).astype(int))
    checks = [last for last in checks if abs(runs.true_excess(last)) > 3 * tolerance]
    assert len(checks) > 0
    declared = np.array([runs.decisions(last, tolerance) == 1.0 for last in checks])
    assert declared.mean(1).max() < 0.03
    assert declared.any(0).mean() < 0.05


def test_a_level_that_passes_through_a_maximum_does_not_rest():
    steps = np.arange(0.0, 2001.0, 100.0)
    noise = 0.01 * np.random.default_rng(0).normal(size=len(steps))
    peak = 300 * (1 - (steps / 1000 - 1) ** 2) + noise
    assert abs(peak[-1] - peak[0]) / 2000 < 1e-4
    ones = np.ones(20)
    assert stationary(steps, peak, ones, ones, tolerance=0.1).value != 1.0
    assert stationary(steps, noise, ones, ones, tolerance=0.1).value == 1.0


def test_the_check_before_this_one_has_to_agree():
    steps = np.arange(0.0, 2001.0, 100.0)
    noise = np.random.default_rng(0).normal(size=len(steps))
    ones = np.ones(20)
    bump = 180.0 * (steps == 1600)  # more than 0.1 a step until then, gone at the end
    assert stationary(steps, noise, ones, ones, tolerance=0.1).value == 1.0
    assert stationary(steps, noise + bump, ones, ones, tolerance=0.1).value == 0.0


def test_a_clear_drift_needs_no_long_window():
    steps = np.arange(0.0, 101.0, 10.0)
    wild = 5 * np.random.default_rng(0).normal(size=11)
    ones = np.ones(10)
    undecided = stationary(steps, wild, ones, ones, tolerance=0.05)
    assert np.isnan(undecided.value)
    assert undecided.reason == "the window is too short to resolve a tolerance of 0.05"
    assert stationary(steps, wild + 2 * steps, ones, ones, tolerance=0.05) == (0.0, "")


@pytest.mark.parametrize("rule", [stationary, sasa_plus])
def test_reasons_for_no_decision(rule):
    steps, level, ones = np.arange(20.0), np.random.default_rng(0).normal(size=20), np.ones(19)

    def reason(steps, level, right=ones, weights=ones, **arguments):
        if rule is sasa_plus:
            decision = sasa_plus(steps, level, errors="end_points", **arguments)
        else:
            decision = stationary(steps, level, right, weights, 0.05, **arguments)
        assert np.isnan(decision.value)
        return decision.reason

    assert reason(steps, level, constant_lr=False) == "the learning rate changes"
    assert reason(steps[:9], level[:9], ones[:8], ones[:8]) == "the window holds fewer than 10 records"
    assert reason(steps, np.where(steps == 5, np.nan, level)) == "the level of the weights is not finite"
    if rule is stationary:
        assert reason(steps, level, 0 * ones) == "the weights do not move"
        assert reason(steps, level, ones, 0 * ones) == "the weights do not move"


def test_blocks_without_a_sample_and_uneven_knots_are_taken_as_they_are():
    rng = np.random.default_rng(0)
    steps = np.append(np.arange(0.0, 2000.0, 100.0), 1930.0)
    level, right, weights = 0.1 * rng.normal(size=21), np.ones(20), np.full(20, 10.0)
    right[3], weights[3] = np.nan, 0.0
    assert stationary(steps, level, right, weights, 0.05) == (1.0, "")
    gap = np.append(0.0, np.arange(2000.0, 2020.0))
    assert stationary(gap, level, np.ones(20), np.ones(20), 0.05).value == 1.0


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="tolerance must be positive, got 0"):
        stationary(np.arange(9.0), np.ones(9), np.ones(8), np.ones(8), 0)
    with pytest.raises(InputError, match='errors must be "blocks" or "end_points", got \'iid\''):
        sasa_plus(np.arange(9.0), np.ones(9), errors="iid")


# -- SASA+ -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settled():
    """One long window of each of 600 runs at equilibrium."""
    runs = Runs((0.5,) * 10, (1.0,) * 10, steps=3000, gap=45, every=45, runs=600)
    knots = runs.window(len(runs.steps) - 1)
    return runs.steps[knots], runs.level[knots].T


def test_block_errors_of_a_telescoping_series_are_several_times_too_wide(settled):
    # with a same-sign rule that always holds, what is left is the interval
    steps, levels = settled
    held = {}
    for errors in ("blocks", "end_points"):
        same = [abs_drift_only(level) for level in levels]
        held[errors] = np.mean([sasa_plus(steps, level, errors=errors).value for level in same])
    assert held["blocks"] > 0.995
    assert 0.9 < held["end_points"] < 0.98


def abs_drift_only(level):
    """The path with its middle knot half way between its ends, so that both halves drift the same way."""
    level = level.copy()
    level[(len(level) - 1) // 2] = (level[0] + level[-1]) / 2
    return level


@pytest.mark.parametrize("errors", ["blocks", "end_points"])
def test_same_sign_rule_passes_a_third_of_the_settled_windows(settled, errors):
    steps, levels = settled
    passed = np.mean([sasa_plus(steps, level, errors=errors).value for level in levels])
    assert 0.25 < passed < 0.41


def test_sasa_plus_sees_a_drift():
    steps, path = ornstein_uhlenbeck(100.0, 33, runs=50)
    for errors, drift in (("end_points", 15.0), ("blocks", 40.0)):
        for level in path.T:
            assert sasa_plus(steps, level + drift * steps / steps[-1], errors=errors).value == 0.0
