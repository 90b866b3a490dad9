import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from gradiometer.errors import InputError
from gradiometer.stats.jackknife import (
    correlated_jackknife,
    delete_block_jackknife,
    jackknife_covariance,
    lumping,
    ratio_interval,
    t_quantile,
)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def left_out_means(x, w):
    return ((w * x).sum() - w * x)[:, None] / (w.sum() - w)[:, None]


def test_jackknife_of_a_mean_is_the_usual_error():
    x = draws(9)
    w = torch.full((9,), 3.0, dtype=torch.float64)
    error = delete_block_jackknife(x.mean()[None], left_out_means(x, w), w)
    torch.testing.assert_close(error, (x.std() / 3)[None], rtol=1e-12, atol=0)


def test_jackknife_with_unequal_blocks_in_closed_form():
    # for a weighted mean the pseudo-values are the block means themselves
    x, w = draws(6), torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 5.0], dtype=torch.float64)
    mean = (w * x).sum() / w.sum()
    h = w.sum() / w
    expected = ((x - mean).square() / (h * (h - 1))).sum().sqrt()
    error = delete_block_jackknife(mean[None], left_out_means(x, w), w)
    torch.testing.assert_close(error[0], expected, rtol=1e-12, atol=0)


def test_jackknife_with_unequal_blocks_finds_the_variance():
    # block means of w samples have variance 1 / w; the weighted mean has 1 / sum w
    w = torch.tensor([1.0, 2.0, 3.0, 4.0] * 4, dtype=torch.float64)
    replicas = 4000
    x = draws(replicas, 16) / w.sqrt()
    mean = (w * x).sum(1) / w.sum()
    left = ((w * x).sum(1, keepdim=True) - w * x) / (w.sum() - w)
    variance = delete_block_jackknife(mean, left.mT, w).square()
    spread = variance.std() / replicas**0.5
    assert (variance.mean() - 1 / w.sum()).abs() < 3 * spread
    assert spread < 0.02 / w.sum()


@pytest.mark.parametrize("blocks", [0, 2, 3])
def test_jackknife_needs_four_blocks(blocks):
    error = delete_block_jackknife(torch.ones(2), torch.ones(blocks, 2), torch.ones(blocks))
    assert error.shape == (2,)
    assert error.isnan().all()


def test_jackknife_covers_for_a_ratio_of_averages():
    # 16 blocks and 1.96 errors: a normal mean is covered with P(|t_15| < 1.96) = 0.931
    replicas, blocks = 20_000, 16
    x, y = 4 + draws(replicas, blocks), 8 + 2 * draws(replicas, blocks, seed=1)
    ratio = y.sum(1) / x.sum(1)
    left = (y.sum(1, keepdim=True) - y) / (x.sum(1, keepdim=True) - x)
    error = delete_block_jackknife(ratio, left.mT, torch.ones(blocks))
    coverage = ((ratio - 2).abs() < 1.96 * error).double().mean().item()
    assert abs(coverage - 0.931) < 4 * (0.931 * 0.069 / replicas) ** 0.5


def test_jackknife_finds_the_variance_under_weights_that_decay():
    # blocks of equal variance 1 with weights of a moving average: the mean has sum p^2
    p = 0.8 ** torch.arange(20, dtype=torch.float64)
    p = p / p.sum()
    x = draws(4000, 20)
    mean = x @ p
    left = (mean[:, None] - p * x) / (1 - p)
    variance = delete_block_jackknife(mean, left.mT, p).square().mean()
    assert variance.item() == pytest.approx(p.square().sum().item(), rel=0.1)


# -- correlated series -----------------------------------------------------------------------------

REPLICAS = 1500


def series(phi, length, replicas=REPLICAS, seed=0):
    """AR(1) series of variance 1, one per column; independent for ``phi = 0``."""
    noise = np.random.default_rng(seed).normal(size=(length, replicas))
    noise[1:] *= (1 - phi**2) ** 0.5
    return lfilter([1.0], [1.0, -phi], noise, axis=0)


def block_sums(x, blocks):
    """Sums and lengths of this many blocks, the last one half as long as the others."""
    edges = np.round(len(x) * np.append(np.arange(blocks), blocks - 0.5) / (blocks - 0.5)).astype(int)
    return np.add.reduceat(x, edges[:-1], axis=0), np.diff(edges).astype(float)


def coverage(full, left, weights, truth):
    """Share of intervals that hold the truth, among those that are resolved, and the share of these."""
    error = correlated_jackknife(*(torch.from_numpy(v) for v in (full, left, weights)))
    resolved = error.groups > 0
    assert torch.equal(resolved, error.stderr.isfinite())
    quantile = torch.tensor([t_quantile(int(g)) for g in error.groups])
    hit = (torch.from_numpy(full) - truth).abs() < quantile * error.stderr
    return hit[resolved].double().mean().item(), resolved.double().mean().item()


def coverage_of_mean(x, blocks):
    sums, weights = block_sums(x, blocks)
    left = (sums.sum(0) - sums) / (weights.sum() - weights)[:, None]
    return coverage(sums.sum(0) / weights.sum(), left, weights, 0.0)


def coverage_of_ratio(x, y, blocks):
    sums, weights = block_sums(x, blocks)
    others, _ = block_sums(y, blocks)
    left = (others.sum(0) - others) / (sums.sum(0) - sums)
    return coverage(others.sum(0) / sums.sum(0), left, weights, 2.0)


@pytest.mark.parametrize("blocks", [16, 23, 32])
@pytest.mark.parametrize(("phi", "times"), [(0.0, 640), (0.5, 90), (0.9, 60), (0.97, 60), (0.97, 25)])
def test_intervals_cover_whatever_the_correlation(phi, times, blocks):
    # times: length in correlation times
    length = round(times / -np.log(phi)) if phi else times
    x, y = series(phi, length), series(phi, length, seed=1)
    for covered, resolved in (coverage_of_mean(x, blocks), coverage_of_ratio(4 + x, 8 + y, blocks)):
        assert 0.92 < covered < 0.98
        assert resolved > 0.97


def test_intervals_cover_with_few_blocks():
    for phi, length in ((0.0, 320), (0.97, 2000)):
        covered, resolved = coverage_of_mean(series(phi, length), 8)
        assert 0.92 < covered < 0.98
        assert resolved > 0.9


def test_a_slow_part_under_noise_is_seen():
    noise = series(0.0, 2000, seed=1)
    covered, resolved = coverage_of_mean(noise + series(0.97, 2000) / 3, 24)
    assert 0.92 < covered < 0.98
    assert resolved > 0.97


@pytest.mark.parametrize(("times", "fewest", "nans"), [(10, 0.88, 0.0), (3, 0.65, 0.3)])
def test_short_series_are_unresolved_or_wide(times, fewest, nans):
    covered, resolved = coverage_of_mean(series(0.97, 33 * times), 24)
    assert covered > fewest
    assert resolved < 1 - nans


@pytest.mark.parametrize(("samples", "resolved"), [(2, True), (20, False)])
def test_moving_averages_cover_or_are_unresolved(samples, resolved):
    # blocks of 2 samples under a decay of 0.95 count as 19, blocks of 20 as 2
    x = series(0.0, 32 * samples)
    decay = 0.95 ** np.arange(len(x) - 1, -1, -1.0)
    starts = samples * np.arange(32)
    sums, weights = np.add.reduceat(x * decay[:, None], starts, axis=0), np.add.reduceat(decay, starts)
    left = (sums.sum(0) - sums) / (weights.sum() - weights)[:, None]
    if resolved:
        covered, share = coverage(sums.sum(0) / weights.sum(), left, weights, 0.0)
        assert 0.92 < covered < 0.98
        assert share > 0.99
    else:
        assert not lumping(sums / weights[:, None], weights).groups.any()


def test_lumping_does_not_see_scale_and_offset():
    x = draws(20, 3).numpy()
    scaled = lumping(np.array([1e-9, 1.0, 1e9]) * x + np.array([0.0, 1e3, 0.0]), np.ones(20))
    plain = lumping(x, np.ones(20))
    np.testing.assert_array_equal(scaled.groups, plain.groups)
    np.testing.assert_allclose(scaled.inflation, plain.inflation, rtol=1e-6)


def test_constant_columns_have_no_error():
    weights = torch.tensor([2.0] * 19 + [1.0], dtype=torch.float64)
    for value in (0.0, 0.1, -1e-8):
        full = torch.tensor([value], dtype=torch.float64)
        error = correlated_jackknife(full, full.expand(20, 1) * (1 + 1e-16), weights)
        assert error.groups.item() == 8
        assert error.stderr.item() <= 1e-14 * abs(value)


def test_nan_stays_in_its_column():
    x = draws(20, 2)
    x[3, 1] = torch.nan
    without = (x.sum(0) - x) / 19
    error = correlated_jackknife(x.mean(0), without, torch.ones(20))
    assert error.groups[1] == 0
    assert error.stderr.isnan().tolist() == [False, True]


@pytest.mark.parametrize("blocks", [0, 3])
def test_correlated_errors_need_four_blocks(blocks):
    arguments = torch.ones(2), torch.ones(blocks, 2), torch.ones(blocks)
    error = correlated_jackknife(*arguments)
    assert error.stderr.isnan().all()
    assert error.groups.tolist() == [0, 0]
    covariance = jackknife_covariance(*arguments)
    assert covariance.matrix.isnan().all()
    assert covariance.groups == 0


def test_covariance_agrees_with_the_errors():
    x = draws(24, 2) @ torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    without = (x.sum(0) - x) / 23
    covariance = jackknife_covariance(x.mean(0), without, torch.ones(24))
    error = correlated_jackknife(x.mean(0), without, torch.ones(24))
    assert covariance.groups == error.groups.min()
    same = error.groups == covariance.groups
    torch.testing.assert_close(covariance.matrix.diagonal()[same].sqrt(), error.stderr[same])
    torch.testing.assert_close(covariance.matrix, covariance.matrix.mT)


def test_covariance_of_independent_blocks_is_theirs():
    factor = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    estimates = []
    for seed in range(400):
        x = draws(24, 2, seed=seed) @ factor
        estimates.append(jackknife_covariance(x.mean(0), (x.sum(0) - x) / 23, torch.ones(24)).matrix)
    torch.testing.assert_close(torch.stack(estimates).mean(0), factor.mT @ factor / 24, rtol=0.15, atol=0)


def test_quantile_of_many_groups_is_normal():
    assert t_quantile(10**6) == pytest.approx(1.96, abs=1e-3)
    assert t_quantile(4) == pytest.approx(3.182, abs=1e-3)
    assert np.isnan(t_quantile(0))
    with pytest.raises(InputError, match="level must lie between 0 and 1"):
        t_quantile(8, level=95)


# -- the interval of a ratio -----------------------------------------------------------------------


def test_ratio_interval_holds_the_ratios_that_are_not_contradicted():
    n, d, v_n, v_d, c, q = 3.0, -2.0, 0.3, 0.2, 0.1, 2.0
    for end in ratio_interval(n, d, v_n, v_d, c, q):
        assert (n - end * d) ** 2 == pytest.approx(q**2 * (v_n - 2 * end * c + end**2 * v_d), rel=1e-12)
    low, high = ratio_interval(n, d, v_n, v_d, c, q)
    assert low < n / d < high < 0


def test_ratio_interval_changes_sign_with_the_numerator():
    for d in (2.0, 0.5):
        low, high = ratio_interval(3.0, d, 0.3, 0.2, 0.1, 2.0)
        assert ratio_interval(-3.0, d, 0.3, 0.2, -0.1, 2.0) == (-high, -low)


def test_ratio_interval_opens_where_the_denominator_may_vanish():
    low, high = ratio_interval(50.0, 1.0, 0.0, 0.25 + 1e-12, 0.0, 2.0)
    assert low == pytest.approx(25.0, rel=1e-6)
    assert high == float("inf")
    low, high = ratio_interval(50.0, 1.0, 0.0, 0.25 - 1e-12, 0.0, 2.0)
    assert low == pytest.approx(25.0, rel=1e-6)
    assert high > 1e9
    low, high = ratio_interval(50.0, -0.5, 0.0, 0.25, 0.0, 2.0)  # 50 / (-0.5 + 1)
    assert (low, high) == (100.0, float("inf"))
    assert ratio_interval(0.1, 0.1, 1.0, 1.0, 0.0, 2.0) == (-float("inf"), float("inf"))


def test_ratio_interval_of_exact_averages_is_a_point():
    assert ratio_interval(3.0, 2.0, 0.0, 0.0, 0.0, 2.0) == (1.5, 1.5)
    assert ratio_interval(0.0, 2.0, 0.0, 0.0, 0.0, 2.0) == (0.0, 0.0)


def test_ratio_interval_passes_nan_on_and_refuses_negative_variances():
    assert np.isnan(ratio_interval(1.0, 1.0, float("nan"), 1.0, 0.0, 2.0)).all()
    with pytest.raises(InputError, match="must not be negative"):
        ratio_interval(1.0, 1.0, -1.0, 1.0, 0.0, 2.0)


def noise_scale_series(grad_sq, steps, replicas, phi=0.0, chunks=8, size=4):
    """Estimates of tr Sigma and |G|^2 per step, from Gaussian gradients with 50 parameters."""
    rng = np.random.default_rng(0)
    scale = np.sqrt(np.linspace(0.2, 2.0, 50) / size).astype(np.float32)
    mean = np.float32((grad_sq / 50) ** 0.5)
    result = np.empty((steps, replicas, 2))
    for step in range(steps):
        gradients = rng.standard_normal((chunks, replicas, 50), dtype=np.float32) * scale + mean
        small = np.square(gradients).sum(-1).mean(0)
        big = np.square(gradients.mean(0)).sum(-1)
        result[step, :, 0] = (small - big) / (1 / size - 1 / (chunks * size))
        result[step, :, 1] = (chunks * big - small) / (chunks - 1)
    truth = np.array([55.0, grad_sq])
    result -= truth
    result[1:] *= (1 - phi**2) ** 0.5
    return lfilter([1.0], [1.0, -phi], result, axis=0) + truth


def noise_scale_intervals(estimates, blocks=20):
    sums, weights = block_sums(estimates, blocks)
    intervals = []
    for own in np.moveaxis(sums, 1, 0):
        full = torch.from_numpy(own.sum(0) / weights.sum())
        left = torch.from_numpy((own.sum(0) - own) / (weights.sum() - weights)[:, None])
        (v_n, c), (_, v_d) = (
            covariance := jackknife_covariance(full, left, torch.from_numpy(weights))
        ).matrix
        quantile = t_quantile(covariance.groups)
        intervals.append(ratio_interval(*full.tolist(), v_n.item(), v_d.item(), c.item(), quantile))
    return np.array(intervals).T


@pytest.mark.slow
@pytest.mark.parametrize(("grad_sq", "steps", "phi"), [(4.5, 160, 0.0), (4.5, 640, 0.9), (0.3, 160, 0.0)])
def test_intervals_of_the_noise_scale_cover(grad_sq, steps, phi):
    low, high = noise_scale_intervals(noise_scale_series(grad_sq, steps, 600, phi))
    assert not np.isinf(high).any()
    assert 0.92 < ((low < 55 / grad_sq) & (55 / grad_sq < high)).mean() < 0.98


def test_lower_limit_of_a_noise_scale_that_is_not_resolved():
    low, high = noise_scale_intervals(noise_scale_series(0.05, 160, 600))
    assert 0.5 < np.isinf(high).mean() < 0.9
    assert (low < 55 / 0.05).mean() > 0.95
    assert np.median(low) > 300  # and not trivial


# -- the scatter about a trend ---------------------------------------------------------------------
