import random

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradiometer.autodiff.products import (
    hessian_vector_product,
    loss_gradient,
    split_curvature,
    split_gradients,
)
from gradiometer.autodiff.untouched import as_training
from gradiometer.errors import InputError, UnsupportedError

# torch.func's forward mode compiles its own formulas on first use
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def random_vectors(model, count):
    source = seeded(5)
    return [
        [torch.randn(p.shape, generator=source, dtype=p.dtype) for p in trainable(model)]
        for _ in range(count)
    ]


class Tied(nn.Module):
    """A layer under two names, its transpose as the output layer, and a frozen layer in between."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.alias = self.inner
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        return F.linear(torch.tanh(self.frozen(torch.tanh(self.alias(x)))), self.inner.weight.t())


class Attention(nn.Module):
    """Causal attention through the fused kernel's front door, and one parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.project, self.read = nn.Linear(3, 12), nn.Linear(4, 3)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        q, k, v = self.project(x.unsqueeze(1) * torch.arange(1.0, 4.0, dtype=x.dtype)[:, None]).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(*(each.unsqueeze(1) for each in (q, k, v)), is_causal=True)
        return self.read(mixed.squeeze(1)).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.read = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        return self.read(self.cell(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


MODELS = {
    "tanh mlp": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)),
    "tied and frozen": Tied,
    "attention": Attention,
    "lstm": Recurrent,
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.GELU(), nn.Flatten(), nn.Linear(4, 3)
    ),
    "batch norm in train mode": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    ),
    "spectral norm in train mode": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)
    ),
}


def model_and_batch(make, count=7):
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(count, 3, generator=seeded(1), dtype=torch.float64)
    return model, x, torch.randint(3, (count,), generator=seeded(2))


def explicit(model, loss_fn, x, y):
    """Gradient and Hessian of the flat vector of trainable parameters, by torch.func."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    values = [model.get_parameter(name).detach() for name in names]
    shapes = [value.shape for value in values]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss(vector):
        pieces = vector.split([shape.numel() for shape in shapes])
        state = {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return loss_fn(functional_call(model, {**state, **copies}, (x,)), y)

    point = flat(values)
    plain = (nn.LSTM, nn.BatchNorm1d, nn.utils.parametrize.ParametrizationList)
    if any(isinstance(module, plain) for module in model.modules()):  # what function transforms refuse
        point = point.requires_grad_()
        gradient = torch.autograd.grad(loss(point), point)[0]
        return gradient, torch.autograd.functional.hessian(loss, point.detach())
    return torch.func.grad(loss)(point), hessian(loss)(point)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_gradient_and_products_are_those_of_the_explicit_hessian(make):
    model, x, y = model_and_batch(make)
    gradient, matrix = explicit(model, F.cross_entropy, x, y)
    assert matrix.norm() > 1e-2
    torch.testing.assert_close(
        flat(loss_gradient(model, F.cross_entropy, x, y)), gradient, rtol=0, atol=1e-12
    )
    vectors = random_vectors(model, 3)
    products = hessian_vector_product(model, F.cross_entropy, x, y, vectors)
    assert len(products) == 3
    for vector, product in zip(vectors, products, strict=True):
        assert [entry.shape for entry in product] == [p.shape for p in trainable(model)]
        torch.testing.assert_close(flat(product), matrix @ flat(vector), rtol=0, atol=1e-10)


def test_some_parameters_give_a_block_of_the_hessian():
    model, x, y = model_and_batch(MODELS["tanh mlp"])
    gradient, matrix = explicit(model, F.cross_entropy, x, y)
    chosen = [model[2].bias, model[0].weight]  # in an order of their own: entries 35:38 and 0:15
    index = torch.tensor([*range(35, 38), *range(15)])
    found = loss_gradient(model, F.cross_entropy, x, y, parameters=chosen)
    torch.testing.assert_close(flat(found), gradient[index])
    vector = [torch.randn(p.shape, generator=seeded(3), dtype=p.dtype) for p in chosen]
    (product,) = hessian_vector_product(model, F.cross_entropy, x, y, [vector], parameters=chosen)
    torch.testing.assert_close(flat(product), matrix[index][:, index] @ flat(vector), rtol=0, atol=1e-10)


def test_a_loss_linear_in_the_parameters_has_no_curvature():
    model, x, _ = model_and_batch(lambda: nn.Linear(3, 1))
    (product,) = hessian_vector_product(model, lambda out, y: out.mean(), x, None, random_vectors(model, 1))
    assert all(torch.equal(entry, torch.zeros_like(entry)) for entry in product)


def test_no_vectors_no_products():
    model, x, y = model_and_batch(MODELS["tanh mlp"])
    assert hessian_vector_product(model, F.cross_entropy, x, y, []) == []


def test_a_summed_loss_has_the_summed_hessian():
    model, x, y = model_and_batch(MODELS["tanh mlp"])
    vectors = random_vectors(model, 1)
    (mean,) = hessian_vector_product(model, F.cross_entropy, x, y, vectors)
    (total,) = hessian_vector_product(model, nn.CrossEntropyLoss(reduction="sum"), x, y, vectors)
    torch.testing.assert_close(flat(total), 7 * flat(mean))


def test_inputs_in_nests_and_made_under_inference_mode():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, a, b):
            return self.layer(a) * b

    with torch.inference_mode():
        x = {"a": torch.ones(4, 3, dtype=torch.float64), "b": torch.arange(4.0, dtype=torch.float64)[:, None]}
    gradients, sizes = split_gradients(Net(), lambda out, y: (out * y["w"]).mean(), x, {"w": x["b"]}, 2)
    assert sizes.tolist() == [2, 2]
    torch.testing.assert_close(gradients[1][1], torch.full((3,), (4 + 9) / 6, dtype=torch.float64))


# -- modes, buffers, masks ---------------------------------------------------------------------------


class Noisy(nn.Module):
    """Everything a forward may leave behind: running statistics, masks, an attribute, python's random."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(), nn.BatchNorm1d(6), nn.Linear(6, 3)
        )
        self.layers[4].eval()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layers(x) * (1 + 0.01 * random.random())


def measure_everything(model, x, y):
    loss_gradient(model, F.cross_entropy, x, y)
    hessian_vector_product(model, F.cross_entropy, x, y, random_vectors(model, 2))
    split_gradients(model, F.cross_entropy, x, y, 3)
    split_curvature(model, F.cross_entropy, x, y, 3)


def test_measuring_leaves_a_training_run_bit_identical():
    def run(measure):
        random.seed(3)
        model, x, y = model_and_batch(Noisy, 12)
        fired = []
        model.layers[0].weight.register_hook(lambda gradient: fired.append(gradient.sum()))
        model.layers[0].bias.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.sum()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.register_step_pre_hook(lambda *_: fired.append(torch.zeros(())))
        for _ in range(4):
            if measure:
                measure_everything(model, x, y)
            loss = F.cross_entropy(model(x), y)
            if measure:
                measure_everything(model, x, y)  # while a graph waits for its backward pass
            loss.backward()
            before = [p.grad for p in model.parameters()]
            if measure:
                measure_everything(model, x, y)
            assert all(p.grad is held for p, held in zip(model.parameters(), before, strict=True))
            optimizer.step()
            optimizer.zero_grad()
        state = [*model.state_dict().values(), *(s["momentum_buffer"] for s in optimizer.state.values())]
        modes = [module.training for module in model.modules()]
        return state, fired, modes, model.calls, torch.get_rng_state(), random.getstate()

    (plain, *rest), (measured, *others) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
    assert len(rest[0]) == len(others[0])
    assert all(torch.equal(a, b) for a, b in zip(rest[0], others[0], strict=True))
    assert rest[1:3] == others[1:3]
    assert rest[1][-3:] == [True, False, True]
    assert torch.equal(rest[3], others[3])
    assert rest[4] == others[4]


def test_the_gradient_is_that_of_the_next_step_of_training():
    random.seed(3)
    model, x, y = model_and_batch(Noisy, 12)
    found = loss_gradient(model, F.cross_entropy, x, y)
    F.cross_entropy(model(x), y).backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_as_training_keeps_modes_and_restores_running_statistics_after_a_failure():
    model, x, _ = model_and_batch(Noisy, 12)
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail():
        with as_training(model):
            assert [module.training for module in model.modules()] == modes
            model(x)
            assert not torch.equal(model.layers[1].running_mean, before["layers.1.running_mean"])
            model.eval()
            raise RuntimeError("broken")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0


def test_a_batch_norm_that_waits_for_its_backward_pass_is_not_disturbed():
    model, x, _ = model_and_batch(MODELS["batch norm in train mode"])
    loss = model(x).square().sum()
    with as_training(model):
        model(x)
    loss.backward()


def test_evaluation_mode_is_kept_too():
    model, x, y = model_and_batch(Noisy, 12)
    model.eval()
    random.seed(3)
    first = loss_gradient(model, F.cross_entropy, x, y)
    torch.rand(1)
    again = loss_gradient(model, F.cross_entropy, x, y)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_masks_of_all_gradients_and_hessians_are_drawn_independently():
    class Masked(nn.Module):
        """Loss m w^2 / 2 with a mask of its own at every call: g = H = m."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return torch.rand((), dtype=torch.float64) * self.w**2 / 2 + 0 * x

    torch.manual_seed(0)
    found = split_curvature(Masked(), lambda out, y: out.mean(), torch.ones(3, dtype=torch.float64), None, 3)
    g = found.gram.diagonal().sqrt()
    curvature = torch.stack([found.forms[j, i, i] / g[i] ** 2 for j, i in ((0, 1), (1, 2), (2, 0))])
    assert len(torch.cat([g, curvature]).unique()) == 6


# -- parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 5, 7])
def test_parts_are_consecutive_nearly_equal_and_add_up_to_the_batch(parts):
    model, x, y = model_and_batch(MODELS["tanh mlp"])
    gradients, sizes = split_gradients(model, F.cross_entropy, x, y, parts)
    assert sizes.sum() == 7
    assert sizes.max() - sizes.min() <= 1
    begin = 0
    for gradient, size in zip(gradients, sizes.tolist(), strict=True):
        own = loss_gradient(model, F.cross_entropy, x[begin : begin + size], y[begin : begin + size])
        assert all(torch.equal(a, b) for a, b in zip(gradient, own, strict=True))
        begin += size
    whole = flat(loss_gradient(model, F.cross_entropy, x, y))
    mean = sum(size * flat(gradient) for size, gradient in zip(sizes, gradients, strict=True)) / 7
    torch.testing.assert_close(mean, whole)


def test_split_curvature_by_explicit_hessians():
    model, x, y = model_and_batch(MODELS["tanh mlp"])
    found = split_curvature(model, F.cross_entropy, x, y, 3)
    assert found.sizes.tolist() == [2, 2, 3]
    parts = [(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:])]
    gradients, matrices = zip(*(explicit(model, F.cross_entropy, *part) for part in parts), strict=True)
    g = torch.stack(gradients)
    torch.testing.assert_close(found.gram, g @ g.T)
    forms = torch.einsum("ip,jpq,lq->jil", g, torch.stack(matrices), g)
    for j in range(3):
        forms[j, :, j] = 0
    torch.testing.assert_close(found.forms, forms, rtol=0, atol=1e-10)


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [0, 1, 8])
def test_numbers_of_parts_that_make_no_sense(parts):
    model, x, y = model_and_batch(MODELS["tanh mlp"])
    with pytest.raises(InputError, match=f"must lie between 2 and the 7 examples of the batch, got {parts}"):
        split_gradients(model, F.cross_entropy, x, y, parts)
    with pytest.raises(InputError, match="must lie between 3 and the 7 examples"):
        split_curvature(model, F.cross_entropy, x, y, min(parts, 2))


def test_targets_that_do_not_begin_with_the_examples():
    model, x, y = model_and_batch(MODELS["tanh mlp"])
    with pytest.raises(InputError, match=r"must begin with the 7 examples, got shape \[6\]"):
        split_gradients(model, F.cross_entropy, x, y[:6], 2)
    with pytest.raises(InputError, match=r"must begin with the 7 examples, got shape \[\]"):
        split_gradients(model, F.cross_entropy, x, [y, torch.tensor(1.0)], 2)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"must return one number, got shape \[7\]"),
        (lambda out, y: 1.0, "must return one number, got float"),
        (lambda out, y: out.detach().mean(), "does not depend on the parameters"),
    ],
)
def test_losses_without_a_gradient(loss_fn, message):
    model, x, y = model_and_batch(MODELS["tanh mlp"])
    for function in (loss_gradient, lambda *batch: hessian_vector_product(*batch, random_vectors(model, 1))):
        with pytest.raises(InputError, match=message):
            function(model, loss_fn, x, y)


def test_parameters_that_are_frozen_foreign_or_none():
    model, x, y = model_and_batch(Tied)
    for chosen in ([model.frozen.weight], [nn.Parameter(torch.ones(2))], []):
        with pytest.raises(InputError, match="must be trainable parameters of the model"):
            loss_gradient(model, F.cross_entropy, x, y, parameters=chosen)
    with pytest.raises(InputError, match="has no trainable parameter"):
        loss_gradient(model.requires_grad_(False), F.cross_entropy, x, y)


def test_vectors_of_wrong_shapes():
    model, x, y = model_and_batch(MODELS["tanh mlp"])
    (vector,) = random_vectors(model, 1)
    for wrong in (vector[:-1], [vector[0].T, *vector[1:]]):
        with pytest.raises(InputError, match="one tensor per parameter, of its shape"):
            hessian_vector_product(model, F.cross_entropy, x, y, [vector, wrong])


def test_inputs_that_are_not_finite():
    model, x, y = model_and_batch(MODELS["tanh mlp"])
    with pytest.raises(InputError, match="must be finite"):
        loss_gradient(model, F.cross_entropy, x / 0, y)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        return 2 * ctx.saved_tensors[0] * cotangent


class Squares(nn.Linear):
    """The second term keeps a graph, so that autograd itself would not complain."""

    def forward(self, x):
        out = super().forward(x)
        return Once.apply(out) + torch.tanh(out)


def test_operations_without_a_second_derivative_are_refused_with_the_reason():
    model, x, y = model_and_batch(lambda: Squares(3, 3))
    assert len(loss_gradient(model, F.cross_entropy, x, y)) == 2
    for measure in (
        lambda: hessian_vector_product(model, F.cross_entropy, x, y, random_vectors(model, 1)),
        lambda: split_curvature(model, F.cross_entropy, x, y, 3),
    ):
        with pytest.raises(UnsupportedError, match=r"loss twice, got .* once_differentiable"):
            measure()


def test_weight_norm_whose_second_derivative_is_wrong_in_torch_is_refused():
    model, x, y = model_and_batch(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    originals = [p.detach().clone().requires_grad_() for p in list(model.parameters())[1:]]
    right = torch.autograd.gradgradcheck(
        lambda g, v: torch._weight_norm(v, g, 0).sin(), originals, raise_exception=False
    )
    assert not right, "torch has mended it: take it off the list"
    assert len(loss_gradient(model, F.cross_entropy, x, y)) == 3
    with pytest.raises(UnsupportedError, match="weight_norm, whose second derivative is wrong"):
        hessian_vector_product(model, F.cross_entropy, x, y, random_vectors(model, 1))


def test_operations_that_autograd_itself_refuses_to_differentiate_twice():
    model, x, y = model_and_batch(MODELS["tanh mlp"])

    def ctc(out, y):
        lengths = torch.full((7,), 1)
        return F.ctc_loss(out.log_softmax(-1).expand(1, 7, 3), y[:, None] % 2 + 1, lengths, lengths)

    assert len(loss_gradient(model, ctc, x, y)) == 4
    with pytest.raises(UnsupportedError, match=r"this loss, got .*derivative for"):
        hessian_vector_product(model, ctc, x, y, random_vectors(model, 1))


def test_reentrant_checkpointing_is_refused_and_the_other_kind_works():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.first, self.last, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 3), reentrant

        def forward(self, x):
            return checkpoint(lambda h: self.last(torch.tanh(h)), self.first(x), use_reentrant=self.reentrant)

    model, x, y = model_and_batch(lambda: Checkpointed(True))
    with pytest.raises(UnsupportedError, match=r"use_reentrant=False"):
        loss_gradient(model, F.cross_entropy, x, y)
    model.reentrant = False
    _, matrix = explicit(nn.Sequential(model.first, nn.Tanh(), model.last), F.cross_entropy, x, y)
    vectors = random_vectors(model, 1)
    (product,) = hessian_vector_product(model, F.cross_entropy, x, y, vectors)
    torch.testing.assert_close(flat(product), matrix @ flat(vectors[0]), rtol=0, atol=1e-10)


def test_running_out_of_memory_is_not_a_property_of_the_model(monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("full")

    model, x, y = model_and_batch(MODELS["tanh mlp"])
    monkeypatch.setattr(torch.autograd, "grad", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        loss_gradient(model, F.cross_entropy, x, y)
