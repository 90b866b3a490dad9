import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer.autodiff.functional import (
    call,
    check_inputs,
    check_outputs,
    detached_copy,
    examples,
    matrix_forward,
    pure_function,
    take,
)
from gradiometer.autodiff.untouched import measuring
from gradiometer.errors import InputError


class Shared(nn.Module):
    """One module under two names, two parameters tied, one frozen, one buffer written to."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.alias = self.layer
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.layer.weight
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.frozen(self.tied(torch.tanh(self.alias(torch.tanh(self.layer(x))))))


# -- calling ---------------------------------------------------------------------------------------


def test_call_spreads_mappings():
    class Net(nn.Module):
        def forward(self, a, b):
            return a - b

    assert call(Net(), {"b": torch.tensor(1.0), "a": torch.tensor(3.0)}).item() == 2.0
    assert call(nn.Identity(), torch.tensor(3.0)).item() == 3.0


def test_call_needs_a_forward():
    with pytest.raises(InputError, match=r"Module has no usable forward. Pass forward=lambda model, x"):
        call(nn.Module(), torch.ones(1))


class Returns(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x):
        return self.out


class Output:
    def __init__(self, **entries):
        self.__dict__.update(entries)


def test_matrix_forward_makes_a_matrix_where_that_is_safe():
    sequence = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(matrix_forward(Returns(sequence), None), sequence[:, -1])
    assert torch.equal(matrix_forward(Returns(torch.ones(5)), None), torch.ones(5, 1))
    assert torch.equal(matrix_forward(Returns(sequence[0]), None), sequence[0])
    image = torch.ones(2, 3, 4, 5)
    assert torch.equal(matrix_forward(Returns(image), None), image.flatten(1))


def test_matrix_forward_finds_the_logits():
    logits, other = torch.ones(2, 3), torch.zeros(2, 4)
    assert matrix_forward(Returns({"logits": logits, "loss": 1.0}), None) is logits
    assert matrix_forward(Returns(Output(logits=logits)), None) is logits
    assert matrix_forward(Returns({"logits": logits, "scores": other}), None, "scores") is other


def test_matrix_forward_says_which_outputs_there_are():
    with pytest.raises(InputError, match=r"are no tensor and have no 'logits', got \['loss', 'scores'\]"):
        matrix_forward(Returns({"scores": 1, "loss": 2}), None)
    with pytest.raises(InputError, match="are no tensor and have no 'z', got Output"):
        matrix_forward(Returns(Output(logits=1)), None, "z")


# -- measuring -------------------------------------------------------------------------------------


def test_measuring_restores_modes_one_by_one():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    net[2].eval()
    with measuring(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == [True, True, True, False]


def test_measuring_restores_modes_and_random_states_after_a_failure():
    net = nn.Dropout()

    def states():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002

    def fail():
        with measuring(net):
            torch.rand(3)
            np.random.rand(3)  # noqa: NPY002
            random.random()
            raise RuntimeError("broken")

    before = states()
    with pytest.raises(RuntimeError, match="broken"):
        fail()
    after = states()
    assert net.training
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]


def test_measuring_turns_gradients_on_and_autocast_off():
    net = nn.Linear(2, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), measuring(net):
        out = net(torch.ones(1, 2))
    assert out.dtype == torch.float32
    assert out.requires_grad
    with torch.inference_mode(), measuring(net):
        assert net(torch.ones(1, 2)).requires_grad


def test_measuring_gives_attention_a_second_derivative():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with measuring(nn.Linear(1, 1)):
        out = F.scaled_dot_product_attention(q, q, q).square().sum()
        (first,) = torch.autograd.grad(out, q, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), q)
    assert second.abs().sum() > 0


# -- pure functions --------------------------------------------------------------------------------


def test_a_pure_function_is_the_module():
    net, x = Shared(), torch.randn(4, 3)
    function, parameters = pure_function(net)
    assert torch.equal(function(parameters, x), net(x))


def test_tied_and_shared_parameters_are_taken_once_and_frozen_ones_not_at_all():
    net = Shared()
    _, parameters = pure_function(net)
    shapes = sorted(tuple(p.shape) for p in parameters.values())
    assert shapes == [(3,), (3,), (3, 3)]
    assert not any(p.requires_grad for p in parameters.values())


def test_derivatives_of_shared_parameters_are_summed():
    net, x = Shared().double(), torch.randn(4, 3, dtype=torch.float64)
    function, parameters = pure_function(net)
    taken = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    gradients = torch.autograd.grad(function(taken, x).square().sum(), list(taken.values()))
    net(x).square().sum().backward()
    expected = [p.grad for p in net.parameters() if p.requires_grad]
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_pure_function_takes_other_values_and_leaves_the_module_alone():
    net, x = Shared(), torch.randn(4, 3)
    identities = {name: id(p) for name, p in net.named_parameters(remove_duplicate=False)}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    out = net(x).detach()
    function, parameters = pure_function(net)
    moved = function({name: p + 1 for name, p in parameters.items()}, x)
    assert not torch.allclose(moved, out)
    assert {name: id(p) for name, p in net.named_parameters(remove_duplicate=False)} == identities
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert net.calls == 1  # the pure call counted on a copy


def test_a_pure_function_of_a_forward():
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    function, parameters = pure_function(net, lambda model, x: model(x)[:, :1])
    assert torch.equal(function(parameters, x), net(x)[:, :1])


def test_a_pure_function_needs_a_trainable_parameter():
    with pytest.raises(InputError, match=r"Linear has no trainable parameter. Call model.requires_grad_"):
        pure_function(nn.Linear(2, 2).requires_grad_(False))


# -- batches ---------------------------------------------------------------------------------------


def test_examples_counts_the_first_dimension_of_the_first_tensor():
    assert examples(torch.zeros(4, 2)) == 4
    assert examples({"name": "x", "a": torch.zeros(3)}) == 3
    assert examples([torch.zeros(2, 5), torch.zeros(7)]) == 2


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(()), "counts the examples, got a scalar tensor"),
        ({"a": 3}, "counts the examples, got dict"),
        (torch.zeros(0, 3), "a batch must hold at least one example, got 0"),
    ],
    ids=["scalar", "no tensor", "empty"],
)
def test_batches_without_examples_are_refused(x, message):
    with pytest.raises(InputError, match=message):
        examples(x)


def test_take_indexes_every_tensor():
    x = {"a": torch.arange(4), "b": [torch.arange(8).reshape(4, 2)], "c": "kept"}
    taken = take(x, slice(1, 3))
    assert taken["a"].tolist() == [1, 2]
    assert taken["b"][0].tolist() == [[2, 3], [4, 5]]
    assert taken["c"] == "kept"
    assert take(torch.arange(3), None).shape == (1, 3)


def test_detached_copies_share_nothing():
    x = {"a": torch.ones(2, requires_grad=True) * 2, "b": 3}
    copied = detached_copy(x)
    assert not copied["a"].requires_grad
    copied["a"].zero_()
    assert x["a"].tolist() == [2.0, 2.0]
    assert copied["b"] == 3


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 2, device="meta"), r"inputs on meta, model on cpu. Write x.to\('cpu'\)"),
        ({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}, "must be finite, got NaN or infinity"),
        (torch.tensor([torch.inf]), "must be finite, got NaN or infinity"),
        (torch.ones(0), "at least one example"),
    ],
    ids=["device", "nan", "infinity", "empty"],
)
def test_unusable_inputs_are_refused(x, message):
    with pytest.raises(InputError, match=message):
        check_inputs(nn.Linear(2, 2), x)


def test_usable_inputs_are_not_refused():
    check_inputs(nn.Linear(2, 2), {"ids": torch.ones(2, dtype=torch.int64), "x": torch.ones(2)})
    check_inputs(nn.Identity(), torch.ones(2, device="meta", dtype=torch.int64))  # at home anywhere


@pytest.mark.parametrize(
    ("out", "found"),
    [
        (torch.ones(3), r"\[3\]"),
        (torch.ones(2, 3), r"\[2, 3\]"),
        (torch.ones(3, 2, 2), r"\[3, 2, 2\]"),
        ((), "tuple"),
    ],
    ids=["vector", "count", "tensor", "tuple"],
)
def test_outputs_that_are_no_matrix_are_refused(out, found):
    with pytest.raises(InputError, match=rf"must have shape \[N, O\] with N = 3, got {found}. Pass forward="):
        check_outputs(out, 3)


def test_a_matrix_of_outputs_is_not_refused():
    check_outputs(torch.ones(3, 5), 3)
