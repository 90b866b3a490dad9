"""A layer rule of one's own: the right gradients where it is right, an error by name where it is not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiometer import empirical_ntk, register_rule
from gradiometer.autodiff import rules
from gradiometer.autodiff.factors import Outer, Plain
from gradiometer.autodiff.per_example import per_example_grad_norms
from gradiometer.autodiff.ride_along import RideAlong
from gradiometer.errors import InputError


@pytest.fixture(autouse=True)
def rules_are_put_back():
    registered = dict(rules.RULES)
    yield
    rules.RULES.clear()
    rules.RULES.update(registered)
    rules._unverified.clear()


class Scale(nn.Module):
    """``gain * x + shift``, with something that must not run twice in the user's sight."""

    def __init__(self, width=3):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width, dtype=torch.float64))
        self.shift = nn.Parameter(torch.randn(width, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.gain * x + self.shift


class CosineLinear(nn.Module):
    """Logits are cosines: its weight is normalised in the forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


def scale(module, a):
    return lambda g: {"gain": Plain(g * a), "shift": Plain(g)}


def cosine(module, a):
    length = module.weight.norm(dim=-1, keepdim=True)
    unit = module.weight / length
    x = F.normalize(a, dim=-1)

    def gradients(g):
        plain = torch.einsum("kno,ni->knoi", g, x) / length
        return {"weight": Plain((plain - unit * (plain * unit).sum(-1, keepdim=True)).flatten(2))}

    return gradients


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), Scale(), nn.Tanh(), CosineLinear())


X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def half_squares(out, y):
    return (out - y).square().sum(1).mul(0.5).mean()


def test_kernel_norms_and_riding_along_use_the_rule():
    model, y = net(), torch.zeros(5, 2, dtype=torch.float64)
    kernel, norms = empirical_ntk(model, X), per_example_grad_norms(model, half_squares, X, y)
    register_rule(Scale, scale)
    register_rule(CosineLinear, cosine)
    torch.testing.assert_close(empirical_ntk(model, X), kernel)
    torch.testing.assert_close(per_example_grad_norms(model, half_squares, X, y), norms)
    tape = RideAlong(model, 5)
    half_squares(model(X), y).backward()
    tape.detach()
    sq_norms, skipped = tape.result()
    assert not skipped
    torch.testing.assert_close(25 * sum(sq_norms.values()), norms.square())


def test_the_comparison_leaves_no_trace():
    register_rule(Scale, scale)
    model = net()
    before = copy.deepcopy(model.state_dict())
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    random = torch.get_rng_state()
    tape = RideAlong(model, 5)
    model(X).sum().backward()
    tape.detach()
    tape.result()
    assert len(seen) == 1
    assert model[1].calls == before["1.calls"] + 1
    assert torch.equal(torch.get_rng_state(), random)


def wrong_rules():
    def halved(module, a):
        return lambda g: {"gain": Plain(0.5 * g * a), "shift": Plain(g)}

    def summed_over_examples(module, a):
        return lambda g: {"gain": Plain((g * a).sum(1, keepdim=True).expand_as(g)), "shift": Plain(g)}

    def first_function_only(module, a):
        return lambda g: {"gain": Plain((g * a)[:1].expand_as(g)), "shift": Plain(g)}

    def not_finite(module, a):
        return lambda g: {"gain": Plain(g * a / 0.0), "shift": Plain(g)}

    return [halved, summed_over_examples, first_function_only, not_finite]


@pytest.mark.parametrize("rule", wrong_rules(), ids=lambda rule: rule.__name__)
def test_a_wrong_rule_is_refused_by_name_each_time(rule):
    register_rule(Scale, rule)
    for _ in range(2):
        with pytest.raises(InputError, match="for Scale gives a wrong gradient of 'gain' at module '1'"):
            empirical_ntk(net(), X)
    model = net()
    tape = RideAlong(model, 5)
    model(X).sum().backward()  # the run goes on
    tape.detach()
    with pytest.raises(InputError, match="Scale gives a wrong gradient of 'gain'"):
        tape.result()


def malformed_rules():
    def forgets(module, a):
        return lambda g: {"gain": Plain(g * a)}

    def invents(module, a):
        return lambda g: {"gain": Plain(g * a), "shift": Plain(g), "bias": Plain(g)}

    def another_shape(module, a):
        return lambda g: {"gain": Plain(g * a), "shift": Plain(g[..., :2])}

    def fails(module, a):
        return lambda g: {"gain": Outer(a, g), "shift": module.missing}

    return [
        (forgets, "one factor for each parameter"),
        (invents, "one factor for each parameter"),
        (another_shape, "gives no gradient \\[K, N, 3\\] of 'shift'"),
        (fails, "fails at module '1'"),
    ]


@pytest.mark.parametrize(("rule", "message"), malformed_rules())
def test_a_malformed_rule_is_refused(rule, message):
    register_rule(Scale, rule)
    with pytest.raises(InputError, match=message):
        empirical_ntk(net(), X)


def test_a_rule_is_for_one_class_that_has_none():
    with pytest.raises(InputError, match="Linear has a rule"):
        register_rule(nn.Linear, scale)
    register_rule(Scale, scale)
    with pytest.raises(InputError, match="Scale has a rule"):
        register_rule(Scale, scale)
    with pytest.raises(InputError, match="for a class of modules"):
        register_rule(Scale(), scale)
    with pytest.raises(InputError, match="a rule is a function"):
        register_rule(CosineLinear, None)


def test_half_precision_and_autocast_do_not_refuse_a_right_rule():
    register_rule(Scale, scale)
    model, x = net().to(torch.bfloat16), X.to(torch.bfloat16)
    assert empirical_ntk(model, x).isfinite().all()
    rules._unverified.add(Scale)
    model, x = net().float(), X.float()
    tape = RideAlong(model, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).sum().backward()
    tape.detach()
    assert set(tape.result()[0]) >= {"1.gain", "1.shift"}
