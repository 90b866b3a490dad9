import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from gradiometer.errors import SampleSkippedError, UnsupportedError
from gradiometer.optimizers.updates import displacements, rebuilds, squared_displacements, step_was_made

SHAPES = [(5, 3), (5,), (2, 5), (2,), ()]

SETTINGS = {
    "sgd": (SGD, {"lr": 0.05}),
    "sgd l2": (SGD, {"lr": 0.05, "weight_decay": 0.3}),
    "sgd maximize": (SGD, {"lr": 0.05, "maximize": True}),
    "sgd l2 maximize": (SGD, {"lr": 0.05, "weight_decay": 0.3, "maximize": True}),
    "momentum": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "momentum l2 dampening": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.3, "dampening": 0.2}),
    "momentum l2 maximize": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.3, "maximize": True}),
    "nesterov": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "nesterov l2": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.3}),
    "nesterov maximize": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "nesterov l2 maximize": (
        SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.3, "maximize": True},
    ),
    "sgd tensor lr": (SGD, {"lr": torch.tensor(0.05, dtype=torch.float64), "weight_decay": 0.3}),
    "adam": (Adam, {"lr": 0.01}),
    "adam l2": (Adam, {"lr": 0.01, "weight_decay": 0.3}),
    "adam eps": (Adam, {"lr": 0.01, "eps": 0.1, "betas": (0.5, 0.7)}),
    "adam amsgrad maximize": (Adam, {"lr": 0.01, "amsgrad": True, "maximize": True, "betas": (0.9, 0.5)}),
    "adam decoupled": (Adam, {"lr": 0.01, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.3}),
    "adamw no decay": (AdamW, {"lr": 0.01, "weight_decay": 0.0}),
    "adamw large decay": (AdamW, {"lr": 0.01, "weight_decay": 130.0}),
    "adamw all": (
        AdamW,
        {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True, "maximize": True, "eps": 0.1, "betas": (0.9, 0.5)},
    ),
    "adamw zero betas": (AdamW, {"lr": 0.01, "betas": (0.0, 0.0)}),
    "rmsprop": (RMSprop, {"lr": 0.01}),
    "rmsprop l2": (RMSprop, {"lr": 0.01, "weight_decay": 0.3}),
    "rmsprop eps centered": (RMSprop, {"lr": 0.01, "eps": 0.1, "centered": True}),
    "rmsprop l2 centered maximize": (
        RMSprop,
        {"lr": 0.01, "weight_decay": 0.3, "centered": True, "maximize": True, "alpha": 0.9},
    ),
    "rmsprop momentum": (
        RMSprop,
        {"lr": 0.01, "weight_decay": 0.3, "momentum": 0.9, "centered": True, "maximize": True},
    ),
}
if "decoupled_weight_decay" not in Adam([nn.Parameter(torch.ones(1))]).param_groups[0]:  # torch before 2.7
    del SETTINGS["adam decoupled"]

FORMS = {
    "default": {},
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def supported():
    """Every setting in every form that torch has for it."""
    for name, (kind, settings) in SETTINGS.items():
        for form, flags in FORMS.items():
            if "fused" in flags and (kind is RMSprop or (kind is SGD and "maximize" in settings)):
                continue
            yield pytest.param(kind, settings | flags, id=f"{name}, {form}")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_weights(*, dtype=torch.float64, scale=1.0):
    generator = seeded(1)
    return [
        nn.Parameter((scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype))
        for shape in SHAPES
    ]


def steps(optimizer, count=4, *, idle=True, gradient_scale=1.0):
    """Make steps with random gradients; give what was rebuilt in the hook and what copies say."""
    scratch = {}
    rebuilt = []

    def hook(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            rebuilt.append((displacements(optimizer, group), squared_displacements(optimizer, group)))
            again = squared_displacements(optimizer, group, scratch)
            assert torch.equal(again, rebuilt[-1][1])

    handle = optimizer.register_step_post_hook(hook)
    generator = seeded(2)
    for step in range(count):
        for group in optimizer.param_groups:
            for index, p in enumerate(group["params"]):
                draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                # one parameter joins late, another pauses: step counts of their own, stale buffers
                late = index == 0 and step == 0 and not group.get("fused")  # an error in fused SGD
                absent = idle and (late or (index == 1 and step == 2))
                p.grad = None if absent else (gradient_scale * draw).to(p.dtype)
        assert rebuilds(optimizer)
        before = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
        rebuilt.clear()
        optimizer.step()
        for old, group, (moves, squares) in zip(before, optimizer.param_groups, rebuilt, strict=True):
            expected = [a.double() - p.detach().double() for a, p in zip(old, group["params"], strict=True)]
            yield moves, squares, expected
    handle.remove()


def two_groups(make_optimizer, **arguments):
    weights = random_weights(**arguments)
    return make_optimizer([{"params": weights[:2]}, {"params": weights[2:]}])


def relative_error(measured, expected):
    """Largest error of a list of tensors, each relative to its own norm."""
    errors = [
        (a.double() - b).norm() / b.norm().clamp(min=1e-300) for a, b in zip(measured, expected, strict=True)
    ]
    return max(errors).item()


@pytest.mark.parametrize(("kind", "settings"), list(supported()))
def test_the_displacement_is_that_of_a_copy(kind, settings):
    def make_optimizer(groups):
        groups[1]["lr"] = 0.02  # of its own
        return kind(groups, **settings)

    for moves, squares, expected in steps(two_groups(make_optimizer)):
        assert relative_error(moves, expected) < 1e-10
        assert squares.dtype == torch.float64
        assert squares.shape == (len(expected),)
        exact = torch.stack([u.square().sum() for u in expected])
        torch.testing.assert_close(squares, exact, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("kind", "settings"), list(supported()))
def test_without_a_learning_rate_nothing_moves(kind, settings):
    optimizer = two_groups(lambda groups: kind(groups, **settings))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for moves, squares, expected in steps(optimizer):
        assert all(not u.any() for u in expected)
        assert all(not u.any() for u in moves)
        assert not squares.any()


def test_a_scheduled_learning_rate_is_that_of_the_step():
    optimizer = two_groups(lambda groups: AdamW(groups, lr=0.1))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for moves, _, expected in steps(optimizer):
        assert relative_error(moves, expected) < 1e-10
        scheduler.step()


def test_measuring_leaves_the_optimizer_alone():
    optimizer = SGD(random_weights(), lr=0.1, momentum=0.9)
    list(steps(optimizer, 1))
    assert optimizer.param_groups[0]["params"][0] not in optimizer.state  # no gradient yet
    squared_displacements(optimizer, optimizer.param_groups[0])
    assert optimizer.param_groups[0]["params"][0] not in optimizer.state


def test_what_is_returned_is_not_the_state():
    optimizer = SGD(random_weights(), lr=1.0, momentum=0.9)
    for moves, _, _ in steps(optimizer, 1, idle=False):
        held = optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"].clone()
        moves[0].zero_()
    assert torch.equal(optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"], held)


def test_scratch_is_used_again():
    optimizer = AdamW(random_weights(), lr=0.1)
    list(steps(optimizer, 1, idle=False))
    scratch = {}
    squared_displacements(optimizer, optimizer.param_groups[0], scratch)
    first = {p: t.data_ptr() for p, t in scratch.items()}
    squared_displacements(optimizer, optimizer.param_groups[0], scratch)
    assert first == {p: t.data_ptr() for p, t in scratch.items()}
    assert set(first) == set(optimizer.param_groups[0]["params"])


def test_a_group_without_gradients_did_not_move():
    optimizer = SGD([{"params": random_weights()}, {"params": []}], lr=0.1)
    optimizer.step()
    assert squared_displacements(optimizer, optimizer.param_groups[0]).tolist() == [0.0] * len(SHAPES)
    assert displacements(optimizer, optimizer.param_groups[1]) == []
    assert squared_displacements(optimizer, optimizer.param_groups[1]).shape == (0,)


# -- these tests can fail --------------------------------------------------------------------------


def adam_step(optimizer, p, *, eps_inside=False, corrected=True, decay=None):
    """Adam's formula with mistakes to choose from."""
    group, state = optimizer.param_groups[0], optimizer.state[p]
    step = state["step"].item() if corrected else 10**6
    beta1, beta2 = group["betas"]
    mean = state["exp_avg"] / (1 - beta1**step)
    square = state["exp_avg_sq"] / (1 - beta2**step)
    eps = group["eps"]
    s = group["lr"] * mean / ((square + eps**2).sqrt() if eps_inside else square.sqrt() + eps)
    decay = group["lr"] * group["weight_decay"] if decay is None else decay
    return (s + decay * p.detach()) / (1 - decay)


@pytest.mark.parametrize(
    ("mistake", "right"),
    [({}, True), ({"eps_inside": True}, False), ({"corrected": False}, False), ({"decay": 0.0}, False)],
    ids=str,
)
def test_mistakes_in_adams_formula_exceed_the_tolerance(mistake, right):
    optimizer = AdamW(random_weights(), lr=0.01, weight_decay=0.1, eps=1e-3)
    for moves, _, expected in steps(optimizer, idle=False):
        wrong = [adam_step(optimizer, p, **mistake) for p in optimizer.param_groups[0]["params"]]
        assert (relative_error(wrong, expected) < 1e-10) == right
        assert (relative_error(wrong, moves) < 1e-10) == right


def test_the_decay_of_the_new_weights_is_not_that_of_the_old():
    optimizer = SGD(random_weights(), lr=0.05, weight_decay=0.3)
    for _, _, expected in steps(optimizer, idle=False):
        naive = [0.05 * (p.grad + 0.3 * p.detach()) for p in optimizer.param_groups[0]["params"]]
        assert relative_error(naive, expected) > 1e-3


@pytest.mark.parametrize("foreach", [False, True])
def test_nesterovs_multi_tensor_form_overwrites_the_gradient(foreach):
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight.grad.tolist() == pytest.approx([1.9, 1.9] if foreach else [1.0, 1.0])


# -- precision -------------------------------------------------------------------------------------


def total_error(moves_and_expected):
    """Relative error of the summed squares, worst step."""
    return max(
        abs(squares.sum() / sum(u.square().sum() for u in expected) - 1).item()
        for _, squares, expected in moves_and_expected
    )


@pytest.mark.parametrize(("kind", "settings"), SETTINGS.values(), ids=SETTINGS)
def test_float32_with_weights_ten_thousand_times_the_update(kind, settings):
    settings = settings | {"lr": 1e-4, "weight_decay": 0.1 * settings.get("weight_decay", 0.0)}
    optimizer = kind(random_weights(dtype=torch.float32), **settings)
    assert total_error(steps(optimizer)) < 1e-3


def test_half_precision_weights_round_their_updates_away():
    optimizer = AdamW(random_weights(dtype=torch.bfloat16), lr=1e-3, weight_decay=0.0)
    assert not rebuilds(optimizer)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.step()
    moved = torch.cat(
        [(a - p.detach()).flatten() for a, p in zip(before, optimizer.param_groups[0]["params"], strict=True)]
    )
    assert (moved == 0).double().mean() > 0.5  # Adam moves each of them by 1e-3
    with pytest.raises(UnsupportedError, match=r"rounding of torch.bfloat16 weights is as large"):
        squared_displacements(optimizer, optimizer.param_groups[0])


def test_rmsprop_with_idle_inputs():
    """Weights that only decay come to rest where the implicit equation is worst conditioned."""
    weight = nn.Parameter(0.05 * torch.randn(20_000, generator=seeded()))
    optimizer = RMSprop([weight], lr=1e-2, weight_decay=1e-2)
    generator = seeded(1)
    worst = 0.0
    for _ in range(100):
        weight.grad = 1e-2 * torch.randn(20_000, generator=generator)
        weight.grad[:10_000] = 0.0
        before = weight.detach().clone()
        optimizer.step()
        (square,) = squared_displacements(optimizer, optimizer.param_groups[0])
        exact = (before.double() - weight.detach().double()).square().sum()
        worst = max(worst, abs(square / exact - 1).item())
    assert worst < 1e-5


@pytest.mark.parametrize("decay", [10.0 - 5e-3, 10.0, 10.0 + 5e-3])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_decay_that_leaves_nothing_is_refused(kind, decay):
    optimizer = kind(random_weights(), lr=0.1, weight_decay=decay)
    assert not rebuilds(optimizer)
    with pytest.raises(UnsupportedError, match="nothing is left of the weights before the step"):
        displacements(optimizer, optimizer.param_groups[0])


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_decay_that_leaves_a_little_is_not(kind):
    optimizer = kind(random_weights(dtype=torch.float32), lr=0.1, weight_decay=10.0 - 2e-2)
    assert total_error(steps(optimizer)) < 1e-3


def test_the_buffer_knows_any_decay():
    optimizer = SGD(random_weights(), lr=0.1, momentum=0.9, weight_decay=10.0)
    for moves, _, expected in steps(optimizer):
        assert relative_error(moves, expected) < 1e-10


# -- gradient scalers ------------------------------------------------------------------------------

FUSED = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd l2": (SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.3}),
    "adam": (Adam, {"lr": 0.01}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.3}),
}


@pytest.mark.parametrize("unscaled_before", [False, True])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("kind", "settings"), FUSED.values(), ids=FUSED)
def test_under_a_gradient_scaler(kind, settings, fused, unscaled_before):
    weights = [p.requires_grad_() for p in random_weights(dtype=torch.float32)]
    optimizer = kind(weights, fused=fused, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []

    def hook(optimizer, args, kwargs):
        made = step_was_made(optimizer)
        seen.append(made)
        if made:
            rebuilt.extend(squared_displacements(optimizer, optimizer.param_groups[0]))
        else:
            with pytest.raises(SampleSkippedError, match="the gradient scaler skipped this step"):
                squared_displacements(optimizer, optimizer.param_groups[0])

    optimizer.register_step_post_hook(hook)
    generator = seeded(3)
    # not the first step: fused SGD would leave its buffer uninitialised there
    for infinite in (False, True, False, False):
        optimizer.zero_grad()
        loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in weights)
        scaler.scale(loss * float("inf") if infinite else loss).backward()
        before = [p.detach().clone() for p in weights]
        rebuilt = []
        if unscaled_before:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved = torch.stack(
            [(a - p.detach()).double().square().sum() for a, p in zip(before, weights, strict=True)]
        )
        assert bool(moved.any()) != infinite
        if not infinite:
            torch.testing.assert_close(torch.stack(rebuilt), moved, rtol=1e-4, atol=0)
    # the step of an optimizer that is not fused is not called at all
    assert seen == ([True, False, True, True] if fused else [True, True, True])


# -- what is not rebuilt ---------------------------------------------------------------------------


class OwnSGD(SGD):
    def step(self, closure=None):
        super().step(closure)
        super().step(closure)


class OwnParameter(nn.Parameter):
    pass


REFUSED = {
    "no formula for OwnSGD": lambda p: OwnSGD([p], lr=0.1),
    "no formula for Adadelta": lambda p: torch.optim.Adadelta([p]),
    "differentiable=True": lambda p: Adam([p], differentiable=True),
    "where fused SGD puts the sign of maximize=True": lambda p: SGD([p], 0.1, maximize=True, fused=True),
    "OwnParameter may have arithmetic of its own": lambda p: SGD([OwnParameter(p.detach())], lr=0.1),
    "complex weights": lambda p: SGD([nn.Parameter(p.detach() + 0j)], lr=0.1),
}


@pytest.mark.parametrize(("reason", "make_optimizer"), REFUSED.items(), ids=REFUSED)
def test_refusals(reason, make_optimizer):
    optimizer = make_optimizer(nn.Parameter(torch.ones(2)))
    assert not rebuilds(optimizer)
    with pytest.raises(UnsupportedError, match=f"{reason}.* Copy the weights before the step"):
        displacements(optimizer, optimizer.param_groups[0])


def test_nesterov_off_the_cpu_is_refused_where_torch_chooses_the_form():
    def optimizer(**settings):
        weight = nn.Parameter(torch.ones(2, device="meta"))
        return SGD([weight], lr=0.1, momentum=0.9, nesterov=True, **settings)

    assert not rebuilds(optimizer())
    assert rebuilds(optimizer(weight_decay=0.1))
    assert rebuilds(optimizer(maximize=True))
    assert rebuilds(optimizer(foreach=True))
    assert rebuilds(optimizer(foreach=False))


def test_one_group_that_is_refused_refuses_the_optimizer():
    first, second = random_weights()[:2]
    groups = [{"params": [first]}, {"params": [second], "weight_decay": 10.0}]
    optimizer = SGD(groups, lr=0.1)
    assert not rebuilds(optimizer)
    optimizer.step()
    assert squared_displacements(optimizer, optimizer.param_groups[0]).tolist() == [0.0]


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(3, 2, sparse=True)
    optimizer = SGD(embedding.parameters(), lr=0.1)
    assert rebuilds(optimizer)  # no gradient to be seen
    embedding(torch.tensor([0, 1])).sum().backward()
    assert not rebuilds(optimizer)
    with pytest.raises(UnsupportedError, match="a gradient is sparse"):
        squared_displacements(optimizer, optimizer.param_groups[0])


@pytest.mark.parametrize("kind", [Adam, RMSprop])
def test_before_any_step_there_is_nothing_to_rebuild(kind):
    weight = nn.Parameter(torch.ones(2))
    optimizer = kind([weight])
    weight.grad = torch.ones(2)
    with pytest.raises(SampleSkippedError, match="it made no step yet"):
        squared_displacements(optimizer, optimizer.param_groups[0])
    assert weight not in optimizer.state
