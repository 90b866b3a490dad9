"""Factored gradients against the explicit ones they stand for."""

import pytest
import torch

from gradiometer.autodiff import factors
from gradiometer.autodiff.factors import Outer, Plain, Rows, Side, add, gram, sketch
from gradiometer.stats.linalg import gram_matrix

EINSUM = {"trace": "knp,kmp->nm", "diagonal": "knp,kmp->knm", "full": "knp,lmp->knlm"}
MODES = list(EINSUM)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def indices(*shape, rows=4, seed=0):
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


def outer(k=2, n=3, groups=1, t=2, i=5, o=4, seed=0):
    return Outer(draws(n, groups, t, i, seed=seed), draws(k, n, groups, t, o, seed=seed + 1))


def rows(k=2, n=3, t=3, d=5, seed=0):
    return Rows(indices(n, t, seed=seed), draws(k, n, t, d, seed=seed))


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def outer_dense(f):
    return torch.einsum("ngti,kngto->kngoi", f.a, f.g).flatten(2)


@pytest.mark.parametrize("positions", [1, 2, 40])
@pytest.mark.parametrize("block", [2**24, 8])
def test_outer_norms_and_dense(positions, block, monkeypatch):
    """Both contractions, in one piece and example by example."""
    monkeypatch.setattr(factors, "BLOCK", block)
    f = outer(groups=2, t=positions, i=7)
    close(f.dense(torch.Size([8, 7])), outer_dense(f))
    close(f.sq_norms(), outer_dense(f).square().sum(-1))


def test_rows_norms_and_dense():
    f = rows()
    dense = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for k in range(2):
        for n in range(3):
            dense[k, n].index_add_(0, f.index[n], f.g[k, n])
    close(f.dense(torch.Size([4, 5])), dense.flatten(2))
    close(f.sq_norms(), dense.flatten(2).square().sum(-1))


@pytest.mark.parametrize("make", [lambda: outer(n=6), lambda: rows(n=6), lambda: Plain(draws(2, 6, 20))])
def test_folding_adds_neighbours(make):
    shape = torch.Size([4, 5])
    folded = make().fold(3)
    close(folded.dense(shape), make().dense(shape).unflatten(1, (2, 3)).sum(2))


def test_uses_of_one_form_become_one():
    shape = torch.Size([4, 5])
    uses = [
        outer(),
        rows(),
        Plain(draws(2, 3, 20)),
        outer(seed=5, t=3),
        rows(seed=5),
        Plain(draws(2, 3, 20, seed=5)),
    ]
    added = add(uses)
    assert [type(use) for use in added] == [Outer, Rows, Plain]
    close(sum(use.dense(shape) for use in added), sum(use.dense(shape) for use in uses))


PAIRS = {
    "one position": (lambda s: [outer(t=1, seed=s)]),
    "one position, groups": (lambda s: [outer(t=1, groups=3, seed=s)]),
    "by gram": (lambda s: [outer(t=2, i=60, o=50, seed=s)]),
    "by gram, groups": (lambda s: [outer(t=2, i=60, o=50, groups=2, seed=s)]),
    "by columns": (lambda s: [outer(t=30, i=3, o=2, seed=s)]),
    "by columns, groups": (lambda s: [outer(t=30, i=3, o=2, groups=2, seed=s)]),
    "rows": (lambda s: [rows(seed=s)]),
    "plain": (lambda s: [Plain(draws(2, 3, 20, seed=s))]),
    "outer and rows": (lambda s: [outer(seed=s), rows(seed=s)]),
    "rows and outer of one position": (lambda s: [rows(seed=s), outer(seed=s, t=1)]),
    "all": (lambda s: [rows(seed=s), outer(seed=s), Plain(draws(2, 3, 20, seed=s))]),
}


def shape_of(uses):
    for use in uses:
        if isinstance(use, Outer):
            return torch.Size([use.g.shape[2] * use.g.shape[4], use.a.shape[-1]])
    return torch.Size([4, 5])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [2**21, 64])
@pytest.mark.parametrize("weight", [1.0, 0.3, "entries"])
@pytest.mark.parametrize("pair", PAIRS)
def test_gram_is_the_product_of_explicit_gradients(pair, weight, block, mode, monkeypatch):
    monkeypatch.setattr(factors, "BLOCK", block)
    left, right = PAIRS[pair](0), PAIRS[pair](10)
    shape = shape_of(left)
    weight = draws(*shape, seed=3).square() if weight == "entries" else weight
    flat = weight.flatten() if isinstance(weight, torch.Tensor) else weight
    one, two = (sum(use.dense(shape) for use in uses) for uses in (left, right))
    sides = [Side(left, shape, weight)], [Side(right, shape, weight)]
    close(gram(*sides, mode, False), torch.einsum(EINSUM[mode], one * flat, two))
    close(gram(sides[0], sides[0], mode, True), torch.einsum(EINSUM[mode], one * flat, one))


@pytest.mark.parametrize("t", [1, 2, 30])
def test_a_weight_and_its_bias_are_contracted_together(t):
    def pair(seed):
        weight = outer(t=t, i=9, o=8, seed=seed)
        bias = Outer(torch.ones(3, 1, t, 1, dtype=torch.float64), weight.g)
        return [Side([weight], torch.Size([8, 9]), 2.0), Side([bias], torch.Size([8]), 0.5)]

    left, right = pair(0), pair(10)
    expected = sum(
        torch.einsum(EINSUM["full"], a.uses[0].dense(a.shape) * a.weight, b.uses[0].dense(b.shape))
        for a, b in zip(left, right, strict=True)
    )
    close(gram(left, right, "full", False), expected)


def test_gram_matrix_mirrors_what_it_computes():
    a = draws(300, 7)
    close(gram_matrix(a, a, same=True), a @ a.mT)
    close(gram_matrix(a, a, same=True)[..., :75, 75:].mT, gram_matrix(a, a, same=True)[..., 75:, :75], 0)


@pytest.mark.parametrize("pair", ["one position, groups", "rows", "plain", "all"])
@pytest.mark.parametrize("weight", [1.0, "entries"])
def test_a_sketch_is_the_same_random_map_for_all_examples(pair, weight, monkeypatch):
    """Additive over examples, whatever the form; drawn in blocks."""
    monkeypatch.setattr(factors, "BLOCK", 64)
    uses = PAIRS[pair](0)
    shape = shape_of(uses)
    weight = draws(*shape, seed=3).square() if weight == "entries" else weight
    side = Side(uses, shape, weight)
    features = sketch([side], 6, torch.Generator().manual_seed(1))
    basis = Side([Plain(torch.eye(shape.numel(), dtype=torch.float64)[None])], shape)
    if isinstance(uses[0], Outer) and len(uses) == 1:  # drawn column by column
        columns = torch.eye(shape[1], dtype=torch.float64)
        drawn = []
        for row in range(shape[0]):
            one = torch.zeros(1, shape[1], 3, 1, 4, dtype=torch.float64)
            one[0, :, row // 4, 0, row % 4] = 1
            a = columns[:, None, None].expand(-1, 3, 1, -1)
            drawn.append(sketch([Side([Outer(a, one)], shape)], 6, torch.Generator().manual_seed(1))[0])
        random = torch.cat(drawn)
    else:
        random = sketch([basis], 6, torch.Generator().manual_seed(1))[0]
    close(features, side.dense() @ random)
    assert abs(random.var().item() * 6 - 1) < 0.5
