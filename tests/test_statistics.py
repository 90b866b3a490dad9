import numpy as np
import pytest
import torch

from gradiometer.statistics import delete_block_jackknife, detrended_variance


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
    expected = ((x - mean).square() / (w.sum() / w - 1)).mean().sqrt()
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


def test_detrended_variance_is_that_of_a_straight_line_fit():
    steps = torch.tensor([0.0, 10.0, 20.0, 50.0, 60.0, 90.0], dtype=torch.float64)
    values = draws(6, 2) + steps[:, None] * 0.3
    for column, variance in zip(values.mT, detrended_variance(steps, values), strict=True):
        fit = np.polyval(np.polyfit(steps, column, 1), steps)
        assert variance.item() == pytest.approx(((column.numpy() - fit) ** 2).sum() / 4, rel=1e-10)


def test_detrended_variance_is_unbiased_under_a_trend():
    columns, length = 5000, 8
    steps = torch.arange(length, dtype=torch.float64)
    variance = detrended_variance(steps, 2 * draws(length, columns) + 100 * steps[:, None])
    assert (variance.mean() - 4).abs() < 3 * variance.std() / columns**0.5


def test_detrended_variance_needs_four_points():
    variance = detrended_variance(torch.arange(3.0), torch.ones(3, 2))
    assert variance.shape == (2,)
    assert variance.isnan().all()
