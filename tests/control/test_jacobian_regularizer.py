import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from gradiometer import JacobianRegularizer, jacobian_norms
from gradiometer.errors import InputError

OUTPUTS, INPUTS = 6, 4


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(outputs=OUTPUTS, inputs=INPUTS):
    model = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        model.weight.copy_(draws(outputs, inputs, seed=1))
    return model


def term(model, x, strength=1.0, num_projections=None):
    x = x.detach().requires_grad_()
    return JacobianRegularizer(strength, num_projections=num_projections)(x, model(x))


def jacobian(model, x):
    """``[N, O, D]``, one example at a time, differentiable in the parameters."""
    rows = [
        torch.autograd.functional.jacobian(lambda one: model(one[None])[0].flatten(), each, create_graph=True)
        for each in x
    ]
    return torch.stack([row.flatten(1) for row in rows])


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- the exact term ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, OUTPUTS])
def test_linear_model_in_closed_form(k):
    """The term is λ/2 |W|^2 and its gradient λ W, whatever the inputs."""
    model, strength = linear(), 0.3
    found = term(model, draws(5, INPUTS), strength, k)
    close(found, strength / 2 * model.weight.square().sum())
    (gradient,) = torch.autograd.grad(found, model.weight)
    close(gradient, strength * model.weight)


class Sequence(nn.Module):
    """Attention over three positions of two numbers; outputs ``[N, 3, 5]``."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 5)

    def forward(self, x):
        x = x[:, None]  # one head
        return self.out(torch.tanh(F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]))


def perceptron(*end):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), *end)


MODELS = {
    "vectors": (perceptron, (4,)),
    "a number each": (lambda: perceptron(nn.Linear(3, 1), nn.Flatten(0)), (4,)),
    "one output": (lambda: perceptron(nn.Linear(3, 1)), (4,)),
    "sequences": (Sequence, (3, 2)),
    "images to images, in place": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.ELU(inplace=True), nn.Conv2d(3, 2, 3)
        ),
        (2, 4, 4),
    ),
    "not contiguous": (lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.Tanh(), Transposed()), (2, 3)),
}


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


@pytest.mark.parametrize("name", MODELS)
def test_term_and_gradient_for_outputs_of_any_shape(name):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double(), draws(3, *shape)
    with sdpa_kernel(SDPBackend.MATH):
        j = jacobian(model, x)
        found = term(model, x, 0.7)
    expected = 0.7 / 2 * j.square().sum((1, 2)).mean()
    close(found, expected)
    every = [p for p in model.parameters() if p.ndim > 1]  # the last bias has no part in it
    for a, b in zip(torch.autograd.grad(found, every), torch.autograd.grad(expected, every), strict=True):
        assert b.abs().max() > 1e-4
        close(a, b)


@pytest.mark.parametrize("k", [None, 1, 2])
def test_gradient_against_differences(k):
    """The same directions at every evaluation: double backward of the estimate itself."""
    torch.manual_seed(0)
    model, x = perceptron().double(), draws(3, 4)
    weights = dict(model.named_parameters())

    def function(*values):
        torch.manual_seed(5)
        return term(
            lambda x: torch.func.functional_call(model, dict(zip(weights, values, strict=True)), (x,)),
            x,
            1.0,
            k,
        )

    inputs = [p.detach().clone().requires_grad_() for p in weights.values()]
    assert torch.autograd.gradcheck(function, inputs)


# -- the projections ---------------------------------------------------------------------------------


def variance_of_one(a):
    return 2 * OUTPUTS / (OUTPUTS + 2) * ((a @ a).trace() - a.trace().square() / OUTPUTS)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "examples"), [(1, 1), (1, 8), (2, 1), (4, 3)])
def test_mean_and_variance_over_projections(k, examples):
    """Unbiased; with directions of its own, each example brings the variance down as if alone."""
    model, draw = linear(), 4000
    a = (model.weight @ model.weight.mT).detach()
    x = draws(1, INPUTS).expand(examples, INPUTS)
    torch.manual_seed(0)
    found = torch.stack([term(model, x, 2.0, k).detach() for _ in range(draw)])
    assert (found.mean() - a.trace()).abs() < 4 * found.std() / draw**0.5
    expected = variance_of_one(a) / k * (OUTPUTS - k) / (OUTPUTS - 1) / examples
    assert found.var().item() == pytest.approx(expected.item(), rel=0.1)


def test_gradient_is_unbiased():
    """Mean over projections of the gradient, against the exact one: λ W."""
    model = linear()
    torch.manual_seed(0)
    found = torch.stack(
        [torch.autograd.grad(term(model, draws(1, INPUTS), 1.0, 1), model.weight)[0] for _ in range(4000)]
    )
    error = found.std(0) / 4000**0.5
    assert ((found.mean(0) - model.weight).abs() < 4.5 * error).all()
    assert error.max() < 0.1


@pytest.mark.parametrize("k", [1, 2])
def test_the_global_generator_decides(k):
    model, x = linear(), draws(5, INPUTS)
    torch.manual_seed(3)
    first, second = term(model, x, 1.0, k), term(model, x, 1.0, k)
    torch.manual_seed(3)
    assert torch.equal(term(model, x, 1.0, k), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("outputs", "k"), [(1, 1), (1, None), (3, 3)])
def test_all_outputs_need_no_draw(outputs, k):
    """On the sphere of one dimension there is nothing to draw, nor with as many directions as outputs."""
    model, state = linear(outputs), torch.get_rng_state()
    close(term(model, draws(5, INPUTS), 2.0, k), model.weight.square().sum())
    assert torch.equal(state, torch.get_rng_state())


# -- in a training step ------------------------------------------------------------------------------


def test_the_documented_lines_leave_the_batch_alone_and_add_to_the_loss():
    torch.manual_seed(0)
    model, batch, y = perceptron().double(), draws(5, 4), torch.tensor([0, 1, 2, 0, 1])
    regularizer = JacobianRegularizer(0.3, num_projections=None)
    x = batch.detach().requires_grad_()
    logits = model(x)
    loss = F.cross_entropy(logits, y) + regularizer(x, logits)
    loss.backward()
    assert not batch.requires_grad
    assert batch.grad is None
    alone = torch.autograd.grad(F.cross_entropy(model(batch), y), list(model.parameters()))
    ours = torch.autograd.grad(term(model, batch, 0.3), list(model.parameters()), materialize_grads=True)
    for parameter, a, b in zip(model.parameters(), alone, ours, strict=True):
        close(parameter.grad, a + b)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_that_of_the_forward_pass(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), linear()).train(training)
    x = torch.ones(7, INPUTS, dtype=torch.float64).requires_grad_()
    kept = model[0](x)  # the inputs are 1: 2 where kept, 0 where dropped
    found = JacobianRegularizer(2.0, num_projections=None)(x, model[1](kept))
    weight = model[1].weight
    close(found, (weight * kept[:, None]).square().sum((1, 2)).mean())
    assert bool((kept == 0).any()) is training


def test_batch_norm_couples_the_examples_in_train_mode_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    x = draws(6, 4)
    together = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)  # [O, N, D]
    close(term(model, x, 2.0), together.square().sum((0, 2)).mean())
    model.eval()
    close(term(model, x, 2.0), jacobian(model, x).square().sum((1, 2)).mean())
    together = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)
    close(term(model, x, 2.0), together.square().sum((0, 2)).mean())


def test_tokens_are_differentiated_at_their_embedding():
    torch.manual_seed(0)
    table, model = nn.Embedding(7, 2).double(), Sequence().double()
    embedded = table(torch.tensor([[0, 1, 2], [3, 1, 6]]))
    with sdpa_kernel(SDPBackend.MATH):
        found = JacobianRegularizer(2.0, num_projections=None)(embedded, model(embedded))
        close(found, jacobian(model, embedded.detach()).square().sum((1, 2)).mean())
    found.backward()
    assert table.weight.grad.norm() > 0


def test_fused_attention_is_refused_by_torch():
    embedded = draws(2, 3, 2).requires_grad_()
    found = JacobianRegularizer(1.0)(embedded, Sequence().double()(embedded))
    with pytest.raises(
        RuntimeError, match=r"derivative for aten::_scaled_dot_product_\w+ is not implemented"
    ):
        found.backward()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [None, 1, 2])
def test_half_precision_gives_a_float32_term(kind, k):
    model = linear()
    expected = model.weight.square().sum().item()
    x = draws(2000, INPUTS)
    found = term(model.to(kind), x.to(kind), 2.0, k)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=0.01 if k is None else 0.05)


def test_under_autocast():
    torch.manual_seed(0)
    model, x = perceptron(), draws(64, 4).float()
    exact = term(model, x, 2.0)
    exact.backward()
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = term(model, x, 2.0)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=0.02)
    assert (model[0].weight.grad - gradient).norm() < 0.05 * gradient.norm()


def test_what_was_computed_in_float32_is_differentiated_in_float32():
    torch.manual_seed(0)
    model, x = perceptron(), draws(8, 4).float().requires_grad_()
    logits = model(x)
    exact = JacobianRegularizer(2.0, num_projections=None)(x, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(JacobianRegularizer(2.0, num_projections=None)(x, logits), exact)


def test_in_a_lightning_training_step():
    """A trainer's steps are those of a loop."""
    import lightning as L
    from torch.utils.data import DataLoader, TensorDataset

    x, y = draws(24, 4), torch.arange(24) % 3

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.regularizer = perceptron().double(), JacobianRegularizer(0.5, num_projections=None)

        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x.detach().requires_grad_()
            logits = self.net(x)
            return F.cross_entropy(logits, y) + self.regularizer(x, logits)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trained = Net()
    L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(trained, DataLoader(TensorDataset(x, y), batch_size=8))
    plain = Net()
    optimizer = plain.configure_optimizers()
    for i in [0, 8, 16] * 2:
        optimizer.zero_grad()
        plain.training_step((x[i : i + 8], y[i : i + 8]), 0).backward()
        optimizer.step()
    for a, b in zip(trained.parameters(), plain.parameters(), strict=True):
        close(a, b)


# -- two processes -----------------------------------------------------------------------------------


class Step(nn.Module):
    """Loss and term inside the wrapped forward, as under Lightning."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).square().mean() + term(self.net, x, 0.5)


KINDS = ("outside", "inside", "unused parameters are looked for")


def gradients(kind, x, wrap=lambda module, **options: module):
    """Of a loss with the exact term, taken outside or inside what is wrapped."""
    torch.manual_seed(0)
    net = perceptron().double()
    if kind == "inside":
        model = wrap(Step(net))
        loss = model(x)
    else:
        model = wrap(net, find_unused_parameters=kind.startswith("unused"))
        x = x.requires_grad_()
        out = model(x)
        loss = out.square().mean() + JacobianRegularizer(0.5, num_projections=None)(x, out)
    loss.backward()
    return [p.grad for p in net.parameters()]


def worker(rank, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    half = slice(4 * rank, 4 * rank + 4)
    found = {kind: gradients(kind, draws(8, 4)[half], DistributedDataParallel) for kind in KINDS}
    print(json.dumps({kind: [g.tolist() for g in found[kind]] for kind in KINDS}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found; neither may hang."""
    meeting = str(tmp_path_factory.mktemp("ranks") / "meeting")
    runs = [
        subprocess.Popen([sys.executable, __file__, rank, meeting], stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    try:
        said = [run.communicate(timeout=120)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0]
    return [json.loads(text) for text in said]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_half_the_batch_each_have_the_gradient_of_one(kind, ranks):
    whole = gradients(kind, draws(8, 4))
    for found in ranks:
        for a, b in zip(found[kind], whole, strict=True):
            close(torch.tensor(a, dtype=torch.float64), b)


# -- robustness --------------------------------------------------------------------------------------


def train_digits(strength, seed):
    """MLP 64-100-100-10, 40 epochs: mean norm on held-out digits, accuracy on them, clean and with noise."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.as_tensor(digits.data, dtype=torch.float32), torch.as_tensor(digits.target)
    x = (x - x.mean()) / x.std()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    test, train = order[:360], order[360:]
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    regularizer = JacobianRegularizer(strength)
    for _ in range(40):
        for batch in train[torch.randperm(len(train), generator=generator)].split(100):
            inputs = x[batch].requires_grad_()
            logits = model(inputs)
            loss = F.cross_entropy(logits, y[batch])
            if strength:
                loss = loss + regularizer(inputs, logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    noise = torch.randn(20, len(test), 64, generator=generator)
    with torch.no_grad():
        accuracy = [(model(x[test] + s * noise).argmax(-1) == y[test]).float().mean() for s in (0.0, 1.0)]
    return torch.stack([jacobian_norms(model, x[test]).mean(), *accuracy])


@pytest.mark.slow
def test_digits_are_read_under_noise():
    """Four to five times smaller Jacobian at the same accuracy, and better under noise."""
    plain, regular = (
        torch.stack([train_digits(strength, seed) for seed in range(3)]).mean(0) for strength in (0.0, 0.01)
    )
    norm, clean, noisy = plain.tolist()
    assert clean > 0.96
    assert regular[0] < 0.4 * norm
    assert regular[1] > clean - 0.01
    assert regular[2] > noisy + 0.04


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), "0.1"])
def test_strength_is_a_finite_number(strength):
    with pytest.raises(InputError, match=r"strength must be a number at least 0, got "):
        JacobianRegularizer(strength)


def test_numbers_of_projections():
    for wrong in (0, 1.5):
        with pytest.raises(InputError, match=r"num_projections must be a whole number at least 1, got "):
            JacobianRegularizer(0.1, num_projections=wrong)
    with pytest.raises(InputError, match="must lie between 1 and the 6 outputs, got 7"):
        term(linear(), draws(2, INPUTS), 1.0, 7)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("x", "logits", "message"),
    [
        (
            ONES.long(),
            ONES,
            r"needs one tensor of floating-point inputs, got torch.int64.*output of the embedding",
        ),
        ({"x": ONES}, ONES, "needs one tensor of floating-point inputs, got dict"),
        (ONES, ONES, r"inputs do not require a gradient. Write x = x.detach\(\).requires_grad_\(\) before"),
        (
            ONES.clone().requires_grad_(),
            (ONES,),
            r"must be one tensor, got tuple.*regularizer\(x, out.logits\)",
        ),
        (
            ONES.clone().requires_grad_(),
            ONES,
            r"do not depend on these inputs. Write x = .*, and pass this x",
        ),
        (ONES.clone().requires_grad_(), ONES.clone().requires_grad_(), "do not depend on these inputs"),
        (ONES.clone().requires_grad_(), torch.ones(3, 2), r"got inputs \[2, 3\] and outputs \[3, 2\]"),
        (ONES.clone().requires_grad_(), torch.ones(()), r"got inputs \[2, 3\] and outputs \[\]"),
        (torch.ones((), requires_grad=True), ONES, r"got inputs \[\] and outputs \[2, 3\]"),
        (torch.ones(0, 3, requires_grad=True), torch.ones(0, 3), r"at least one, got inputs \[0, 3\]"),
    ],
)
def test_what_has_no_jacobian_is_refused(x, logits, message):
    with pytest.raises(InputError, match=message):
        JacobianRegularizer(0.1)(x, logits)


def test_asking_for_the_gradient_after_the_forward_pass_is_too_late():
    model, x = linear(), draws(3, INPUTS)
    logits = model(x)
    with pytest.raises(InputError, match="do not depend on these inputs"):
        JacobianRegularizer(0.1)(x.requires_grad_(), logits)


def test_without_gradients_there_is_no_term():
    x = draws(3, INPUTS).requires_grad_()
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"disabled here\. Leave the term out under torch\.no_grad"),
    ):
        JacobianRegularizer(0.1)(x, linear()(x))


def test_it_is_a_frozen_value():
    regularizer = JacobianRegularizer(0.1, num_projections=2)
    assert pickle.loads(pickle.dumps(regularizer)) == regularizer
    with pytest.raises(dataclasses.FrozenInstanceError):
        regularizer.strength = 1.0


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
