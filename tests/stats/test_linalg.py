import pytest
import torch

from gradiometer.errors import InputError
from gradiometer.stats.linalg import (
    accumulation_dtype,
    in_reals,
    inner_products,
    random_orthonormal_rows,
    real_numbers,
    squared_norms,
)


def test_squared_norms_in_float64():
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor(3.0), torch.full((4,), 0.5)]
    norms = squared_norms(tensors)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, torch.tensor([55.0, 9.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squared_norms_of_half_precision_are_taken_in_float32(dtype):
    # 400 values of 256: the sum of squares 2.6e7 is beyond float16, and bfloat16 would lose the last term
    values = torch.cat([torch.full((400,), 256.0), torch.full((400,), 8.0)]).to(dtype)
    expected = torch.tensor([400 * 256.0**2 + 400 * 64.0], dtype=torch.float64)
    torch.testing.assert_close(squared_norms([values]), expected, rtol=1e-6, atol=0)


def test_squared_norms_keep_the_digits_across_tensors():
    # in float32 the sum over tensors would lose the small one
    total = squared_norms([torch.tensor([1e4]), torch.tensor([1.0])]).sum()
    assert total.item() == 1e8 + 1


def test_squared_norms_of_mixed_precision():
    tensors = [
        torch.full((3,), 300.0, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64)
    ]
    expected = torch.full((3,), 27e4, dtype=torch.float64)
    torch.testing.assert_close(squared_norms(tensors), expected, rtol=1e-6, atol=0)
    tensors = [torch.full((3,), 0.1, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    torch.testing.assert_close(squared_norms(tensors)[1].item(), 0.03, rtol=1e-14, atol=0)


def test_inner_products_promote_half_and_mixed_precision():
    half = torch.full((100,), 300.0, dtype=torch.float16)
    double = torch.full((100,), 2.0, dtype=torch.float64)
    products = inner_products([half, half], [half, double])
    assert products.dtype == torch.float64
    expected = torch.tensor([100 * 300.0**2, 100 * 600.0], dtype=torch.float64)
    torch.testing.assert_close(products, expected, rtol=1e-6, atol=0)


def test_inner_products_of_shaped_and_strided_tensors():
    a = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    b = torch.arange(6.0, dtype=torch.float64).reshape(3, 2).mT
    torch.testing.assert_close(inner_products([a], [b])[0], (a * b).sum(), rtol=1e-14, atol=0)


def test_inner_products_refuse_lists_of_different_length():
    with pytest.raises(ValueError, match="shorter"):
        inner_products([torch.ones(1), torch.ones(1)], [torch.ones(1)])


def test_accumulation_is_in_float64_where_the_device_has_it():
    assert accumulation_dtype(torch.device("cpu")) == torch.float64
    assert accumulation_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("rows", "dimension"), [(1, 1), (1, 7), (3, 7), (7, 7)])
def test_rows_are_orthonormal(rows, dimension):
    v = random_orthonormal_rows(rows, dimension, batch=5)
    assert v.shape == (5, rows, dimension)
    assert v.dtype == torch.float64
    identity = torch.eye(rows, dtype=torch.float64).expand(5, rows, rows)
    torch.testing.assert_close(v @ v.mT, identity, rtol=0, atol=1e-13)


def test_rows_are_uniform_on_the_sphere():
    count, dimension = 20_000, 5
    v = random_orthonormal_rows(2, dimension, batch=count)
    for row in v.unbind(1):
        # E v = 0 and E v v^T = 1/D; Var v_i = 1/D, Var v_i^2 = 2 (D - 1) / (D^2 (D + 2))
        assert row.mean(0).abs().max() < 4 * (1 / dimension / count) ** 0.5
        spread = (2 * (dimension - 1) / (dimension**2 * (dimension + 2)) / count) ** 0.5
        assert (row.square().mean(0) - 1 / dimension).abs().max() < 4 * spread


def test_the_generator_decides_and_the_global_one_is_left_alone():
    before = torch.get_rng_state()
    first = random_orthonormal_rows(2, 5)
    torch.testing.assert_close(
        first, random_orthonormal_rows(2, 5, generator=torch.Generator().manual_seed(0)), rtol=0, atol=0
    )
    other = random_orthonormal_rows(2, 5, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rows", [0, 6])
def test_impossible_numbers_of_rows_are_refused(rows):
    message = f"projections must lie between 1 and the 5 outputs, got {rows}. Write num_projections=2"
    with pytest.raises(InputError, match=message):
        random_orthonormal_rows(rows, 5)


def complex_pair(dtype=torch.complex128):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, dtype=dtype, generator=generator) for _ in range(2)]


def test_complex_tensors_count_as_pairs_of_reals():
    a, b = complex_pair()
    expected = (a.real * b.real + a.imag * b.imag).sum()
    torch.testing.assert_close(inner_products([a], [b])[0], expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(squared_norms([a])[0], a.abs().square().sum(), rtol=1e-14, atol=0)
    assert inner_products([a], [1j * a]).item() == pytest.approx(0.0, abs=1e-12)


def test_a_lazy_conjugate_is_taken_as_it_reads():
    a, b = complex_pair()
    expected = (a.real * b.real - a.imag * b.imag).sum()
    torch.testing.assert_close(inner_products([a], [b.conj()])[0], expected, rtol=1e-14, atol=0)
    assert torch.equal(in_reals(a.conj()), torch.stack([a.real, -a.imag], -1))


def test_complex_beside_real_and_half_precision():
    half = torch.full((4,), 300.0, dtype=torch.float16)
    tensors = [torch.full((2,), 3 + 4j, dtype=torch.complex64), half, torch.ones(3, dtype=torch.float64)]
    torch.testing.assert_close(squared_norms(tensors).tolist(), [50.0, 360000.0, 3.0])


def test_a_complex_number_is_two_real_ones():
    assert [real_numbers(torch.ones(3, dtype=kind)) for kind in (torch.float32, torch.complex64)] == [3, 6]
