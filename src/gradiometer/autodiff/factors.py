"""Per-example gradients in factored form, and the inner products between them.

One parameter's gradients for K outputs (or one loss) and N examples are held as

* ``Outer``: ``sum_t g[k, n, :, t] a[n, :, t]^T`` (Linear, convolution, and biases with ``a = 1``);
* ``Rows``: ``g[k, n, t]`` added to row ``index[n, t]`` (Embedding);
* ``Plain``: the gradient itself.

:func:`gram` sums products over parameters without forming more than a block of gradients at a time.
Sources: the factored kernel is the structured-derivatives form of Novak et al. 2022, arXiv:2206.08720;
norms without a position axis Goodfellow 2015, arXiv:1510.01799, with one Gray et al. 2024,
arXiv:2411.00999.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..stats.linalg import gram_matrix

Mode = Literal["trace", "diagonal", "full"]
Weight = float | Tensor

BLOCK = 2**21
"""Elements of explicit gradients formed at one time: 8 MB in float32, about one cache."""


@dataclass(frozen=True)
class Outer:
    """Sum over positions t of outer products, group by group.

    Shapes:
        a ``[N, G, T, i]``, g ``[K, N, G, T, o]``; the parameter flattens to ``[G, o, i]``.
    """

    a: Tensor
    g: Tensor

    def fold(self, size: int) -> Outer:
        """Make each run of ``size`` consecutive examples one example with more positions."""
        n, groups, positions = len(self.a) // size, self.a.shape[1], self.a.shape[2] * size
        a = self.a.unflatten(0, (n, size)).movedim(1, 2).reshape(n, groups, positions, -1)
        g = self.g.unflatten(1, (n, size)).movedim(2, 3)
        return Outer(a, g.reshape(len(self.g), n, groups, positions, -1))

    @property
    def cotangents(self) -> Tensor:
        """What differs between the K functions."""
        return self.g

    @property
    def width(self) -> int:
        """Length of the parameter's rows, as ``contract`` takes it."""
        return self.a.shape[-1]

    def contract(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Sum over outputs and examples, between a vector ``[p / width]`` and another ``[width]``."""
        along_g = (self.g @ rows.view(self.g.shape[2], -1, 1)).squeeze(-1)
        return (along_g * (self.a @ columns)).sum()

    def terms(self) -> Tensor:
        """Squared norms of all single terms, added up: what rounding in their sum is relative to."""
        return (self.a.square().sum(-1) * self.g.square().sum(-1)).sum()

    def sq_norms(self, weight: Tensor | None = None) -> Tensor:
        """Squared norm per output and example, ``[K, N]``, by the cheaper of two exact forms.

        Args:
            weight: What the square of each component counts, ``[p]``; 1 when ``None``.
        """
        outputs, batch, groups, positions, width = self.g.shape
        inputs = self.a.shape[-1]
        if positions == 1:
            a, g = self.a.square()[:, :, 0], self.g.square()[:, :, :, 0]
            if weight is None:
                return (a.sum(-1) * g.sum(-1)).sum(-1)
            return torch.einsum("kngo,goi,ngi->kn", g, weight.view(groups, width, inputs), a)
        if inputs == 1:
            return _sums(self.columns(0, 1).square(), weight)
        by_positions = weight is None and positions * (inputs + width) < inputs * width
        size = max(1, BLOCK // (groups * (positions**2 if by_positions else inputs * width)))
        norms = self.g.new_empty(outputs, batch)
        for k in range(outputs):
            for i in range(0, batch, size):
                a, g = self.a[i : i + size], self.g[k, i : i + size]
                norms[k, i : i + size] = (
                    ((a @ a.mT) * (g @ g.mT)).sum((1, 2, 3))
                    if by_positions
                    else _sums((g.mT @ a).square().flatten(1), weight)
                )
        return norms

    def joined_outputs(self) -> Outer:
        """For a sum over outputs: the K cotangents side by side, as those of one wider layer."""
        if len(self.g) == 1:
            return self
        if self.g.stride(-1) == 1:
            return Outer(self.a, self.g.permute(1, 2, 3, 0, 4).flatten(3)[None])
        return Outer(self.a, self.g.permute(1, 2, 0, 4, 3).flatten(2, 3).mT[None])

    def columns(self, begin: int, end: int) -> Tensor:
        """Explicit gradients for some columns of the parameter, ``[K, N, G o (end - begin)]``."""
        outputs, batch, groups, positions, width = self.g.shape
        if self.a.shape[-1] == 1:
            if not any(self.a.stride()):  # one number throughout: a bias
                return (self.g.sum(3) * self.a[0, 0, 0, 0]).flatten(2)
            return (self.g * self.a).sum(3).flatten(2)
        a = self.a[..., begin:end].reshape(batch * groups, positions, -1)
        rows = a.new_empty(outputs, batch * groups, width, a.shape[-1])
        for k in range(outputs):
            torch.bmm(self.g[k].reshape(batch * groups, positions, width).mT, a, out=rows[k])
        return rows.view(outputs, batch, -1)

    def dense(self, shape: torch.Size) -> Tensor:
        """Explicit gradients in the parameter's own layout, ``[K, N, p]``."""
        del shape
        return self.columns(0, self.a.shape[-1])


@dataclass(frozen=True)
class Rows:
    """Cotangents added to rows of a table.

    Shapes:
        index ``[N, T]``, g ``[K, N, T, d]``; the parameter is ``[V, d]``.
    """

    index: Tensor
    g: Tensor

    def fold(self, size: int) -> Rows:
        """Make each run of ``size`` consecutive examples one example with more positions."""
        n = len(self.index) // size
        return Rows(self.index.reshape(n, -1), self.g.reshape(len(self.g), n, -1, self.g.shape[-1]))

    @property
    def cotangents(self) -> Tensor:
        """What differs between the K functions."""
        return self.g

    @property
    def width(self) -> int:
        """Length of the parameter's rows, as ``contract`` takes it."""
        return self.g.shape[-1]

    def contract(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Sum over outputs and examples, between a vector ``[p / width]`` and another ``[width]``."""
        return (rows[self.index] * (self.g @ columns)).sum()

    def terms(self) -> Tensor:
        """Squared norms of all single terms, added up: what rounding in their sum is relative to."""
        return self.g.square().sum()

    def sq_norms(self, weight: Tensor | None = None) -> Tensor:
        """Squared norm per output and example, ``[K, N]``: equal rows of one example are added first.

        Args:
            weight: What the square of each component counts, ``[p]``; 1 when ``None``.
        """
        outputs, batch, positions, width = self.g.shape
        rows = int(self.index.max()) + 1
        example = torch.arange(batch, device=self.index.device)[:, None]
        touched, where = (example * rows + self.index).unique(return_inverse=True)
        sums = self.g.new_zeros(outputs, len(touched), width)
        sums.index_add_(1, where.reshape(-1), self.g.reshape(outputs, batch * positions, width))
        norms = self.g.new_zeros(outputs, batch)
        squares = sums.square()
        if weight is not None:
            squares = squares * weight.view(-1, width)[touched % rows]
        return norms.index_add_(1, touched // rows, squares.sum(-1))

    def some(self, where: Tensor, begin: int, end: int) -> Tensor:
        """Gradients of the rows that ``where [N, T]`` numbers ``begin`` to ``end``, ``[K, N, rows d]``."""
        outputs, batch, positions, width = self.g.shape
        count = end - begin
        inside = ((where >= begin) & (where < end)).reshape(-1).nonzero()[:, 0]
        row = inside // positions * count + where.reshape(-1)[inside] - begin
        rows = self.g.new_zeros(outputs, batch * count, width)
        rows.index_add_(1, row, self.g.reshape(outputs, batch * positions, width)[:, inside])
        return rows.view(outputs, batch, -1)

    def dense(self, shape: torch.Size) -> Tensor:
        """Explicit gradients in the parameter's own layout, ``[K, N, p]``."""
        return self.some(self.index, 0, shape[0])


@dataclass(frozen=True)
class Plain:
    """The gradient itself, ``[K, N, p]``."""

    gradient: Tensor

    def fold(self, size: int) -> Plain:
        """Make each run of ``size`` consecutive examples one example."""
        return Plain(self.gradient.unflatten(1, (-1, size)).sum(2))

    @property
    def cotangents(self) -> Tensor:
        """What differs between the K functions: all of it."""
        return self.gradient

    @property
    def width(self) -> int:
        """Length of the parameter's rows, as ``contract`` takes it: all of it is one."""
        return self.gradient.shape[-1]

    def contract(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Sum over outputs and examples, between a vector ``[p / width]`` and another ``[width]``."""
        return (self.gradient.unflatten(-1, (len(rows), -1)) @ columns @ rows).sum()

    def terms(self) -> Tensor:
        """Squared norms of all single terms, added up: what rounding in their sum is relative to."""
        return self.gradient.square().sum()

    def sq_norms(self, weight: Tensor | None = None) -> Tensor:
        """Squared norm per output and example, ``[K, N]``.

        Args:
            weight: What the square of each component counts, ``[p]``; 1 when ``None``.
        """
        return _sums(self.gradient.square(), weight)

    def dense(self, shape: torch.Size) -> Tensor:
        """The gradient, ``[K, N, p]``."""
        del shape
        return self.gradient


Factor = Outer | Rows | Plain


def _sums(squares: Tensor, weight: Tensor | None) -> Tensor:
    """Sum over the last axis, weighted."""
    return squares.sum(-1) if weight is None else squares @ weight


def add(uses: Sequence[Factor]) -> list[Factor]:
    """Add the gradients of several uses of one parameter, as far as they are of one form.

    Args:
        uses: One factor per use.

    Returns:
        One factor where all are of one form, else one per form: their sum is the gradient, and
        products between them must not be forgotten.
    """
    plain = [use.gradient for use in uses if isinstance(use, Plain)]
    rows = [use for use in uses if isinstance(use, Rows)]
    outers: dict[tuple[int, ...], list[Outer]] = {}
    for use in uses:
        if isinstance(use, Outer):
            outers.setdefault((use.a.shape[1], use.a.shape[3]), []).append(use)
    sums: list[Factor] = []
    for same in outers.values():
        joined = same[0]
        if len(same) > 1:
            joined = Outer(torch.cat([use.a for use in same], 2), torch.cat([use.g for use in same], 3))
        sums.append(joined)
    if len(rows) > 1:
        rows = [Rows(torch.cat([use.index for use in rows], 1), torch.cat([use.g for use in rows], 2))]
    sums.extend(rows)
    if plain:
        sums.append(Plain(torch.stack(plain).sum(0) if len(plain) > 1 else plain[0]))
    return sums


@dataclass(frozen=True)
class Side:
    """One parameter's gradients on one side of a kernel.

    Args:
        uses: Factors whose sum is the gradient, of different forms.
        shape: Shape of the parameter.
        weight: What its squared gradients count: a number, or a tensor of its shape.
    """

    uses: list[Factor]
    shape: torch.Size
    weight: Weight = 1.0

    def dense(self) -> Tensor:
        """Explicit gradients times the root of the weight, ``[K, N, p]``."""
        total = self.uses[0].dense(self.shape)
        for use in self.uses[1:]:
            total = total + use.dense(self.shape)
        return total * root(self.weight, total)


def root(weight: Weight, like: Tensor) -> Tensor | float:
    """Square root of a weight, flattened to the layout of explicit gradients."""
    return weight.reshape(-1).to(like).sqrt() if isinstance(weight, Tensor) else weight**0.5


def gram(left: Sequence[Side], right: Sequence[Side], mode: Mode, same: bool) -> Tensor:
    r"""Products of the gradients of one module's parameters, summed over the parameters.

    .. math:: \Theta_{kn,lm} = \sum_p w_p\, J_{kn,p} J'_{lm,p}

    Outer products that share their ``g`` (a weight and its bias) are contracted together.

    Args:
        left: The parameters' gradients at the first inputs.
        right: The same parameters' at the second inputs.
        mode: ``"trace"`` sums over ``k = l``, ``"diagonal"`` keeps each, ``"full"`` keeps all pairs.
        same: Whether right is left, so that half of each product can be mirrored.

    Shapes:
        K outputs and N examples left, L and M right -> trace ``[N, M]``, diagonal ``[K, N, M]``, full
        ``[K, N, L, M]``.
    """
    if mode == "diagonal":
        outputs = range(len(left[0].uses[0].cotangents))
        lefts = [_of_output(left, k) for k in outputs]
        rights = lefts if same else [_of_output(right, k) for k in outputs]
        return torch.stack([gram(a, b, "trace", same) for a, b in zip(lefts, rights, strict=True)])
    total: Tensor | None = None
    joint: dict[int, list[tuple[Side, Side]]] = {}
    for a, b in zip(left, right, strict=True):
        if len(a.uses) == 1 and isinstance(a.uses[0], Outer) and not isinstance(a.weight, Tensor):
            joint.setdefault(id(a.uses[0].g), []).append((a, b))
            continue
        for term in _mixed(a, b, mode, same):
            total = term if total is None else total.add_(term)
    for pairs in joint.values():
        for term in _outers(pairs, mode, same):
            total = term if total is None else total.add_(term)
    assert total is not None
    return total


def _of_output(sides: Sequence[Side], k: int) -> list[Side]:
    """The same gradients of one function; a weight and its bias still share their ``g``."""
    shared: dict[int, Tensor] = {}

    def of(use: Factor) -> Factor:
        g = shared.setdefault(id(use.cotangents), use.cotangents[k : k + 1])
        if isinstance(use, Outer):
            return Outer(use.a, g)
        return Rows(use.index, g) if isinstance(use, Rows) else Plain(g)

    return [Side([of(use) for use in side.uses], side.shape, side.weight) for side in sides]


def _mixed(left: Side, right: Side, mode: Mode, same: bool) -> Iterator[Tensor]:
    """Every pair of forms of one parameter."""
    if any(isinstance(use, Plain) for use in left.uses) or (
        len(left.uses) > 1 and isinstance(left.weight, Tensor)
    ):
        dense = left.dense()
        yield _explicit(dense, dense if same else right.dense(), mode, same)
        return
    for i, a in enumerate(left.uses):
        for j, b in enumerate(right.uses):
            if isinstance(a, Outer) and isinstance(b, Outer):
                if i == j:
                    yield _by_columns(a, b, left.weight, mode, same)
                else:
                    yield _explicit(a.dense(left.shape), b.dense(left.shape), mode, False) * left.weight
            elif isinstance(a, Rows) and isinstance(b, Rows):
                yield _rows(a, b, left.weight, mode, same)
            elif isinstance(a, Rows) and isinstance(b, Outer):
                yield _rows_by_outer(a, b, mode) * left.weight
            elif isinstance(a, Outer) and isinstance(b, Rows):
                yield _turned(_rows_by_outer(b, a, mode), mode) * left.weight


def _explicit(left: Tensor, right: Tensor, mode: Mode, same: bool) -> Tensor:
    """Products of explicit gradients ``[K, N, p]`` and ``[L, M, p]``."""
    if mode == "full":
        flat = gram_matrix(left.flatten(0, 1), right.flatten(0, 1), same=same)
        return flat.view(*left.shape[:2], *right.shape[:2])
    return left[0] @ right[0].mT if len(left) == 1 else (left @ right.mT).sum(0)


def _outers(pairs: list[tuple[Side, Side]], mode: Mode, same: bool) -> Iterator[Tensor]:
    """Outer products that share ``g``: through Gram blocks, or through explicit gradients."""
    uses = [(a.uses[0], b.uses[0], a.weight) for a, b in pairs]
    outers = [(a, b, w) for a, b, w in uses if isinstance(a, Outer) and isinstance(b, Outer)]
    a, b, _ = max(outers, key=lambda pair: pair[0].a.shape[-1])
    k, n, _, t, width = a.g.shape
    outputs, m, _, s, _ = b.g.shape
    inputs = a.a.shape[-1]
    pairs_of_outputs = k * outputs if mode == "full" else k
    by_gram = n * m * t * s * (inputs + pairs_of_outputs * (width + 4))
    formed = (k * n * t + (0 if same else outputs * m * s) + 4 * (k * n + outputs * m)) * inputs * width
    by_columns = formed + pairs_of_outputs * n * m * inputs * width
    if (t == 1 and s == 1) or by_gram < by_columns:
        yield _by_gram(a.g, b.g, [(a.a, b.a, float(w)) for a, b, w in outers], mode, same)
    else:
        for a, b, w in outers:
            yield _by_columns(a, b, w, mode, same)


def _by_columns(left: Outer, right: Outer, weight: Weight, mode: Mode, same: bool) -> Tensor:
    """Form explicit gradients for a block of columns at a time, and multiply those."""
    scalar = not isinstance(weight, Tensor)
    if mode == "trace" and scalar:
        left = left.joined_outputs()
        right = left if same else right.joined_outputs()
    inputs = left.a.shape[-1]
    row_length = max(len(side.g) * len(side.a) for side in (left, right)) * left.g.shape[2] * left.g.shape[4]
    step = max(1, BLOCK // row_length)
    total: Tensor | None = None
    for begin in range(0, inputs, step):
        end = min(begin + step, inputs)
        a_block = left.columns(begin, end)
        b_block = a_block if same else right.columns(begin, end)
        if isinstance(weight, Tensor):
            a_block = a_block * weight.reshape(-1, inputs)[:, begin:end].reshape(-1).to(a_block)
        term = _explicit(a_block, b_block, mode, same and scalar)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.mul_(weight) if scalar else total


def _by_gram(
    g: Tensor, h: Tensor, inputs: list[tuple[Tensor, Tensor, float]], mode: Mode, same: bool
) -> Tensor:
    """``sum_ts (sum_j w_j a_j a'_j^T) * (g g'^T)``, a few examples at a time where there are positions."""
    k, n, groups, t, _ = g.shape
    outputs, m, _, s, _ = h.shape
    if t == 1 and s == 1:
        a = _weighted(inputs, same)[..., :, 0, :, 0]
        left, right = g[:, :, :, 0], h[:, :, :, 0]
        if mode == "full":
            left, right = (side.movedim(2, 0).flatten(1, 2) for side in (left, right))
            product = gram_matrix(left, right, same=same).view(groups, k, n, outputs, m)
            product *= a[:, None, :, None]
            return product[0] if groups == 1 else product.sum(0)
        left, right = (side.permute(2, 1, 0, 3).flatten(2) for side in (left, right))
        product = gram_matrix(left, right, same=same) * a
        return product[0] if groups == 1 else product.sum(0)
    size = max(1, BLOCK // (groups * t * m * s * (outputs if mode == "full" else 1)))
    blocks = []
    for begin in range(0, n, size):
        some = slice(begin, begin + size)
        a = _weighted([(first[some], second, w) for first, second, w in inputs], False)
        left = g[:, some]
        if mode == "trace":
            first, second = (side.permute(2, 1, 3, 0, 4).flatten(1, 2).flatten(2) for side in (left, h))
            product = (first @ second.mT).view_as(a) * a
            blocks.append(product.sum((0, 2, 4)))
            continue
        rows = []
        for i in range(k):
            first = left[i].transpose(0, 1).flatten(1, 2)
            second = h.movedim(2, 0).flatten(1, 3)
            product = (first @ second.mT).view(groups, -1, t, outputs, m, s) * a[:, :, :, None]
            rows.append(product.sum((0, 2, 5)))
        blocks.append(torch.stack(rows))
    return torch.cat(blocks, 0 if mode == "trace" else 1)


def _weighted(inputs: list[tuple[Tensor, Tensor, float]], same: bool) -> Tensor:
    """Gram matrix of the inputs, ``[G, N, T, M, S]``."""
    total: Tensor | None = None
    for a, b, weight in inputs:
        left, right = (side.transpose(0, 1).flatten(1, 2) for side in (a, b))
        product = gram_matrix(left, right, same=same)
        product = product if weight == 1.0 else product * weight
        total = product if total is None else total + product
    assert total is not None
    (n, groups, t, _), (m, _, s, _) = inputs[0][0].shape, inputs[0][1].shape
    return total.view(groups, n, t, m, s)


def _rows(left: Rows, right: Rows, weight: Weight, mode: Mode, same: bool) -> Tensor:
    """Gradients of the touched rows of a table, a block of rows at a time."""
    indices = left.index if same else torch.cat([left.index.reshape(-1), right.index.reshape(-1)])
    touched, where = indices.unique(return_inverse=True)
    numbers = where.reshape(-1).split([left.index.numel(), where.numel() - left.index.numel()])
    first = numbers[0].view_as(left.index)
    second = first if same else numbers[1].view_as(right.index)
    row_length = max(len(left.g) * len(left.index), len(right.g) * len(right.index))
    step = max(1, 4 * BLOCK // (row_length * left.g.shape[-1]))
    total: Tensor | None = None
    for begin in range(0, len(touched), step):
        end = min(begin + step, len(touched))
        a_block = left.some(first, begin, end)
        b_block = a_block if same else right.some(second, begin, end)
        if isinstance(weight, Tensor):
            a_block = a_block * weight[touched[begin:end]].reshape(-1).to(a_block)
        term = _explicit(a_block, b_block, mode, same and not isinstance(weight, Tensor))
        total = term if total is None else total.add_(term)
    assert total is not None
    return total if isinstance(weight, Tensor) else total.mul_(weight)


def _rows_by_outer(rows: Rows, outer: Outer, mode: Mode) -> Tensor:
    """A table that is also a Linear's weight: ``sum_ts (e_nt . a_ms) g_ms[index_nt]``."""
    k, n, t, _ = rows.g.shape
    outputs, m, _, s, _ = outer.g.shape
    a, g = outer.a[:, 0], outer.g[:, :, 0]
    size = max(1, BLOCK // (t * m * s * (k + outputs)))
    blocks = []
    for begin in range(0, n, size):
        index = rows.index[begin : begin + size]
        products = torch.einsum("kntd,msd->kntms", rows.g[:, begin : begin + size], a)
        picked = g[..., index.reshape(-1)].unflatten(-1, index.shape)
        pairs = "kntms,kmsnt->nm" if mode == "trace" else "kntms,lmsnt->knlm"
        blocks.append(torch.einsum(pairs, products, picked))
    return torch.cat(blocks, 0 if mode == "trace" else 1)


def _turned(block: Tensor, mode: Mode) -> Tensor:
    """Left and right exchanged."""
    return block.permute(2, 3, 0, 1) if mode == "full" else block.mT


def sketch(sides: Sequence[Side], size: int, generator: torch.Generator) -> Tensor:
    r"""Random features of one module's gradients, ``J R`` with Gaussian ``R`` of variance ``1 / size``.

    Products of features are unbiased for those of the gradients; for one output
    ``Var = (Theta_nn Theta_mm + Theta_nm^2) / size``. The blocks in which R is drawn depend on the
    parameter's shape only, so that a seed always means the same R.

    Args:
        sides: The gradients of the parameters.
        size: Number of features.
        generator: CPU generator.

    Shapes:
        K outputs, N examples -> ``[K, N, size]``.
    """
    total: Tensor | None = None
    for side in sides:
        outer = side.uses[0] if len(side.uses) == 1 else None
        dense = None if isinstance(outer, Outer) else side.dense()
        rows = side.shape.numel() // outer.a.shape[-1] if isinstance(outer, Outer) else 1
        length = side.shape.numel() // rows
        step = max(1, BLOCK // (rows * size))
        for begin in range(0, length, step):
            end = min(begin + step, length)
            drawn = torch.randn(rows * (end - begin), size, generator=generator, dtype=torch.float32)
            if isinstance(outer, Outer):
                block = outer.columns(begin, end)
                if isinstance(side.weight, Tensor):
                    block = block * root(side.weight.reshape(rows, length)[:, begin:end], block)
                else:
                    block = block * root(side.weight, block)
            else:
                assert dense is not None
                block = dense[..., begin:end]
            term = block @ (drawn.to(block) / size**0.5)
            total = term if total is None else total.add_(term)
    assert total is not None
    return total
