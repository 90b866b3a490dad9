"""What the tangent kernel refuses, in which words, and what it leaves out on request."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradiometer import empirical_ntk, layer_ntks
from gradiometer.errors import InputError, UnsupportedError

from ..zoo import (
    ENTRIES,
    HARD,
    Attention,
    Checkpointed,
    batch,
    build,
    build_entry,
    disturb,
    draws,
    error,
    jacobian,
    kernel,
    mlp,
)


def refused(kind, *words, model, x=None, x2=None, **arguments):
    """The refusal names what was found and, in a sentence of its own, what to write."""
    x = draws(5, 4) if x is None else x
    with pytest.raises(kind) as caught:
        empirical_ntk(model, x, x2, **arguments)
    text = str(caught.value)
    for word in words:
        assert re.search(word, text), (word, text)
    assert len(re.findall(r"[.!](?:\s|$)", text)) >= 2, f"no second sentence that says what to write: {text}"
    return text


def simple():
    return build("mlp")


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"outputs": "sum"}, ["got 'sum'", "trace", "full", "diagonal"]),
        ({"outputs": None}, ["got None", "trace"]),
        ({"on_unsupported": "ignore"}, ["got 'ignore'", "raise", "skip"]),
        ({"chunk_size": 0}, ["chunk_size", "got 0"]),
        ({"chunk_size": -3}, ["chunk_size", "got -3"]),
        ({"max_memory": 0}, ["max_memory", r"\b0\b"]),
        ({"max_memory": -1}, ["max_memory", r"-1\b"]),
        ({"sketch_size": 0}, ["sketch_size", "got 0"]),
        ({"num_projections": 0}, ["got 0", r"\b3\b"]),
        ({"num_projections": 4}, ["got 4", r"\b3\b"]),
        ({"num_projections": 1, "outputs": "full"}, ["projection", "got outputs='full'", "trace"]),
    ],
    ids=str,
)
def test_impossible_arguments(arguments, words):
    refused(InputError, *words, model=simple(), **arguments)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"0.wieght": 1.0}, ["0.wieght", r"named_parameters|0\.weight"]),
        ({"": 1.0}, [r"named_parameters|0\.weight"]),
        ({"0.weight": 1.0, "7.bias": 0.0}, ["7.bias"]),
        ({"0.weight": torch.ones(4, 6)}, ["0.weight", r"\[4, 6\]", r"\[6, 4\]"]),
        ({"0.bias": torch.ones(5)}, ["0.bias", r"\[5\]", r"\[6\]"]),
        ({"0.weight": -0.5}, ["0.weight", r"-0\.5|negative"]),
        ({"0.bias": torch.tensor([1.0, 1, 1, -2, 1, 1])}, ["0.bias", r"-2|negative"]),
        ({"0.bias": float("nan")}, ["0.bias", "nan|finite"]),
        ({"0.bias": float("inf")}, ["0.bias", "inf|finite"]),
    ],
    ids=["misspelt", "empty", "one of two", "transposed", "length", "negative", "one negative", "nan", "inf"],
)
def test_impossible_weights(weights, words):
    refused(InputError, *words, model=simple(), weights=weights)


def test_the_second_name_of_a_tied_parameter_is_no_name_of_a_weight():
    model = build("tied layers")
    assert "again.weight" not in dict(model.named_parameters())
    refused(InputError, "again.weight", model=model, weights={"again.weight": 1.0})


def test_a_weight_of_a_frozen_parameter():
    model, x = build("frozen layers"), batch("frozen layers")
    refused(InputError, "2.weight", "not trained", model=model, x=x, weights={"2.weight": 5.0})


def test_too_little_memory_names_the_bytes_that_would_do():
    text = refused(InputError, "max_memory", model=simple(), max_memory=1)
    least = max(int(each.replace(",", "").replace("_", "")) for each in re.findall(r"\d[\d,_]*", text))
    assert least > 1
    assert empirical_ntk(simple(), draws(5, 4), max_memory=least).shape == (5, 5)


# -- models ----------------------------------------------------------------------------------------


def test_a_model_without_trainable_parameters():
    with pytest.raises(InputError, match=r"Sequential has no trainable parameter.*requires_grad_\(True\)"):
        empirical_ntk(simple().requires_grad_(False), draws(5, 4))
    with pytest.raises(InputError, match="ReLU has no trainable parameter"):
        empirical_ntk(nn.ReLU(), draws(5, 4))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3, dtype=torch.complex128)

    def forward(self, x):
        return self.inner(x.to(torch.complex128)).abs()


def test_complex_parameters():
    refused(InputError, "complex", r"inner\.(weight|bias)", model=Complex())


def test_complex_outputs():
    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) * 1j

    refused((InputError, UnsupportedError), "complex", model=Rotated().double())


# -- inputs ----------------------------------------------------------------------------------------

UNUSABLE = {
    "no example": (draws(0, 4), [r"at least one example", "got 0"]),
    "scalar": (torch.ones(()), ["counts the examples", "got a scalar tensor"]),
    "no tensor": ([1, 2], ["counts the examples", "got list"]),
    "nan": (torch.full((5, 4), torch.nan, dtype=torch.float64), ["finite", "got NaN or infinity"]),
    "one infinity": (draws(5, 4).index_fill(0, torch.tensor(3), torch.inf), ["finite", "NaN or infinity"]),
    "other device": (torch.ones(5, 4, device="meta"), ["one device", "inputs on meta, model on cpu", "to"]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_inputs(name):
    x, words = UNUSABLE[name]
    refused(InputError, *words, model=simple(), x=x)
    refused(InputError, *words, model=simple(), x2=x)


def test_nothing_in_a_mapping_may_be_infinite():
    x = batch("mask")
    x["x"][2, 1, 0] = torch.inf
    refused(InputError, "finite", "NaN or infinity", model=build("mask"), x=x)


def test_a_mapping_of_different_numbers_of_examples():
    x = batch("mask")
    refused(InputError, r"\b5\b", r"\b3\b", model=build("mask"), x=x | {"mask": x["mask"][:3]})


@pytest.mark.parametrize(
    ("name", "other", "words"),
    [
        ("mlp", draws(3, 6), [r"\b4\]", r"\b6\]"]),
        ("conv net", draws(3, 1, 6, 6), [r"4, 4\]", r"6, 6\]"]),
        ("conv net", draws(3, 1, 16), [r"4, 4\]", r"16\]"]),
        ("embedding bag", torch.zeros(3, 2, dtype=torch.int64), [r"\b4\]", r"\b2\]"]),
    ],
    ids=["width", "image", "axes", "length"],
)
def test_two_sets_of_different_shapes(name, other, words):
    """Also where the model itself could take both."""
    refused(InputError, *words, "x2", model=build(name), x=batch(name), x2=other)


def test_two_sets_of_different_kinds():
    x = batch("mask")
    refused(InputError, "x2", model=build("mask"), x=x, x2=x["x"])
    refused(InputError, "x2", model=build("mask"), x=x, x2={"x": x["x"]})
    refused(InputError, "x2", model=build("mask"), x=x, x2=x | {"mask": x["mask"][:, :3]})


# -- outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda model, x: model(x)[:, 0], r"\[\d+\]"),
        (lambda model, x: model(x)[:, :, None], r"\[\d+, 3, 1\]"),
        (lambda model, x: model(x).sum(), r"\[\]"),
        (lambda model, x: model(x).T, r"\[3, \d+\]"),
        (lambda model, x: (model(x),), "tuple"),
        (lambda model, x: {"logits": model(x)}, "dict"),
        (lambda model, x: model(x).repeat(2, 1), r"\[\d+, 3\]"),
    ],
    ids=["vector", "three axes", "scalar", "transposed", "tuple", "mapping", "too many"],
)
def test_outputs_must_be_a_matrix(forward, found):
    words = [r"must have shape \[N, O\]", f"got {found}", "forward="]
    refused(InputError, *words, model=simple(), forward=forward)


def test_outputs_of_another_number_of_outputs_in_the_second_set():
    def forward(model, x):
        return model(x)[:, : 2 if bool((x > 50).any()) else 3]

    refused(InputError, "outputs", r"\b2\b", r"\b3\b", model=simple(), x2=draws(5, 4) + 100, forward=forward)


@pytest.mark.parametrize(
    "forward",
    [
        lambda model, x: x[:, :2].clone(),
        lambda model, x: model(x).detach(),
        torch.no_grad()(lambda m, x: m(x)),
    ],
    ids=["inputs", "detached", "without gradients"],
)
def test_outputs_that_depend_on_no_parameter(forward):
    refused(
        InputError, "no trainable parameter reaches the outputs", "detach", model=simple(), forward=forward
    )


# -- examples that are not independent -------------------------------------------------------------


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.first(x)
        return self.head(torch.tanh(x - x.mean(0)))


class Contrast(nn.Module):
    """A softmax over the examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x).softmax(0)


class Shifted(nn.Module):
    """Every example also sees its neighbour."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x + 0.5 * x.roll(1, 0))


class BehindZero(nn.Module):
    """The branch that couples the examples begins at zero: the outputs do not show it."""

    def __init__(self, norm):
        super().__init__()
        self.layer, self.norm, self.gain = nn.Linear(4, 3), norm, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        out = self.layer(x)
        return out + self.gain * self.norm(out)


class Centre(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def batch_statistics():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))


def wrong_axis():
    model = Attention(batch_first=True)
    model.attend.batch_first = False  # attends over the examples
    return model


COUPLED = {
    "batch statistics": (batch_statistics, (4,), ["'1'"]),
    "batch statistics, images": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 3)
        ),
        (1, 4, 4),
        ["'1'"],
    ),
    "centred": (Centred, (4,), []),
    "softmax over the examples": (Contrast, (4,), []),
    "neighbours": (Shifted, (4,), []),
    "attention over the examples": (wrong_axis, (5, 4), []),
}


@pytest.mark.parametrize(
    "arguments", [{}, {"chunk_size": 2}, {"outputs": "full"}, {"sketch_size": 2}], ids=str
)
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_examples(name, arguments):
    make, shape, words = COUPLED[name]
    model = disturb(make().double())
    refused(UnsupportedError, "examples|batch", *words, model=model, x=draws(5, *shape), **arguments)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(3, affine=False, track_running_stats=False), Centre()],
    ids=["batch statistics", "centred"],
)
def test_coupled_examples_that_the_outputs_do_not_show(norm):
    refused(UnsupportedError, "examples|batch", model=BehindZero(norm).double().eval())


def test_examples_coupled_in_single_precision():
    refused(UnsupportedError, "examples|batch", model=Centred(), x=draws(5, 4).float())


@pytest.mark.filterwarnings("ignore:the model is in train mode")
def test_running_statistics_couple_nothing():
    """The same layers in the same train mode are measured in evaluation mode."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    disturb(model).train()
    x = draws(5, 4)
    assert error(empirical_ntk(model, x), kernel(jacobian(model, x))) < 1e-10
    assert model.training
    assert model[1].training


# -- what no rule handles --------------------------------------------------------------------------


class Beside(nn.Module):
    """A reentrant checkpoint on a branch of its own."""

    def __init__(self, reentrant):
        super().__init__()
        self.table, self.branch = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.head, self.reentrant = nn.Linear(4, 3), reentrant

    def forward(self, x):
        x = self.table(x).sum(1)
        branch = checkpoint(self.branch, x, use_reentrant=self.reentrant)
        return self.head(x) + self.head(torch.tanh(branch))


def reentrant(name):
    """The model with a reentrant checkpoint, its twin with a plain one, and inputs."""
    if name == "chain":
        model, twin, x = Checkpointed(reentrant=True), Checkpointed(active=False), draws(5, 4)
    else:
        model, twin, x = Beside(reentrant=True), Beside(reentrant=False), torch.arange(10).view(5, 2) % 6
    model, twin = disturb(model.double()), disturb(twin.double())
    twin.load_state_dict(model.state_dict())
    return model, twin, x


# what checkpoint says where it is called without gradients
QUIET = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
REENTRANT = {"chain": "body", "beside": "branch"}


@QUIET
@pytest.mark.parametrize("name", REENTRANT)
def test_reentrant_checkpoints_are_refused(name):
    model, _, x = reentrant(name)
    words = [rf"{REENTRANT[name]}\b", "use_reentrant=False"]
    refused(UnsupportedError, *words, model=model, x=x)
    assert all(p.grad is None for p in model.parameters())
    found = empirical_ntk(*reentrant(name)[1:])
    assert found.shape == (5, 5)


@pytest.mark.parametrize("outputs", ["trace", "full"])
@QUIET
@pytest.mark.parametrize("name", REENTRANT)
def test_reentrant_checkpoints_are_left_out_by_name(name, outputs):
    model, twin, x = reentrant(name)
    with pytest.warns(UserWarning, match="leaves out") as caught:
        found = empirical_ntk(model, x, outputs=outputs, on_unsupported="skip")
    text = " ".join(str(each.message) for each in caught)
    rows = jacobian(twin, x)
    left_out = {each for each in rows if re.search(rf"(?<![\w.]){re.escape(each)}(?![\w.]*\w)", text)}
    assert left_out >= {each for each in rows if each.startswith(REENTRANT[name])}, text
    assert not any(each.startswith("head") for each in left_out), text
    kept = {each: row for each, row in rows.items() if each not in left_out}
    assert error(found, kernel(kept, outputs=outputs)) < 1e-10
    assert all(p.grad is None for p in model.parameters())


@QUIET
def test_layers_say_what_was_left_out():
    model, twin, x = reentrant("chain")
    with pytest.warns(UserWarning, match=r"body\.0\.weight"):
        found = layer_ntks(model, x, on_unsupported="skip")
    rows = jacobian(twin, x)
    head = kernel({each: row for each, row in rows.items() if each.startswith("head")})
    assert error(found["head"], head) < 1e-10
    assert all(path not in found or found[path].norm() == 0 for path in ("body.0", "body.2"))


@pytest.mark.parametrize("name", ["mlp", "tied layers", "lstm", "checkpoint"])
def test_nothing_is_left_out_of_a_model_that_is_supported(name):
    model, x, forward = build(name), batch(name), ENTRIES[name].forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = empirical_ntk(model, x, forward=forward, on_unsupported="skip")
    assert error(found, kernel(jacobian(model, x, forward))) < 1e-10


@pytest.mark.parametrize("name", HARD)
def test_what_is_left_out_of_a_hard_model_is_said(name):
    """On request the kernel is that of the parameters that no warning names, if it can be had at all."""
    model, x = build_entry(HARD[name]), HARD[name].inputs(5, torch.Generator().manual_seed(0))
    rows = jacobian(model, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = empirical_ntk(model, x, on_unsupported="skip")
        except UnsupportedError:
            return
    text = " ".join(str(each.message) for each in caught)
    kept = {each: row for each, row in rows.items() if each not in text}
    expected = kernel(kept) if kept else torch.zeros(5, 5, dtype=torch.float64)
    assert (found - expected).norm() <= 1e-10 * kernel(rows).norm()


def test_the_refusal_names_the_module():
    """A routed layer mixes the examples; if it is refused, then by its path."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.experts = nn.Linear(4, 4), HARD["routed"].make()

        def forward(self, x):
            return self.experts(torch.tanh(self.stem(x)))

    model, x = Net().double(), draws(5, 5, 4)
    try:
        found = empirical_ntk(model, x)
    except UnsupportedError as refusal:
        text = str(refusal)
    else:
        text = "experts.experts.0"
        assert error(found, kernel(jacobian(model, x))) < 1e-10
    assert "experts" in text


def test_an_error_of_the_model_itself_is_not_disguised():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        empirical_ntk(mlp().double(), draws(5, 3))
    with pytest.raises(RuntimeError, match=r"dtype"):
        empirical_ntk(mlp(), draws(5, 4))
    with pytest.raises(TypeError, match="unexpected keyword"):
        empirical_ntk(mlp().double(), {"inputs": draws(5, 4)})
    with pytest.raises(ZeroDivisionError):
        empirical_ntk(mlp().double(), draws(5, 4), forward=lambda model, x: model(x) / (1 // 0))


def test_layers_as_an_argument_warn_and_still_give_the_layers():
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), torch.ones(3, 2)
    with pytest.warns(DeprecationWarning, match="write layer_ntks"):
        layers = empirical_ntk(model, x, layers=True)
    assert layers.keys() == {"0", "1"}
    assert torch.equal(layers["0"], layer_ntks(model, x)["0"])


class Cornered(nn.Module):
    """A unit stands at the corner of its activation for the first example; indices or numbers go in."""

    def __init__(self, seed, activation, tokens):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(50, 37) if tokens else nn.Identity()
        self.first, self.second = nn.Linear(37, 64), nn.Linear(64, 3)
        self.activation = activation
        self.x = torch.randint(50, (4,)) if tokens else torch.randn(4, 37)
        with torch.no_grad():
            self.first.bias -= self.first(self.table(self.x[:1]))[0]

    def forward(self, x):
        return self.second(self.activation(self.first(self.table(x))))


class CoupledAtCorners(Cornered):
    """The same, and its gradients, not its outputs, know of the other examples."""

    def forward(self, x):
        out = super().forward(x)
        others = self.second.weight.sum() * (x.float().reshape(len(x), -1).mean(1).sum() - 7)
        return out + (others - others.detach())


@pytest.mark.parametrize("activation", [torch.relu, torch.abs], ids=["relu", "abs"])
@pytest.mark.parametrize("tokens", [False, True], ids=["numbers", "tokens"])
def test_a_unit_at_a_corner_is_no_coupling(activation, tokens):
    flips = 0
    for seed in range(8):
        model = Cornered(seed, activation, tokens)
        alone, company = (model.first(model.table(model.x[:n]))[0].sign() for n in (1, 2))
        flips += int(not torch.equal(alone, company))
        assert empirical_ntk(model, model.x).isfinite().all()
    assert flips  # else this could not fail


@pytest.mark.parametrize("tokens", [False, True], ids=["numbers", "tokens"])
def test_a_coupling_is_found_also_where_units_stand_at_corners(tokens):
    model = CoupledAtCorners(0, torch.relu, tokens)
    refused(UnsupportedError, "'second.weight' shows it", model=model, x=model.x)
