import math

import numpy as np
import pytest

from gradiometer.conformance import check, noise_cases, reference, relation_cases
from gradiometer.conformance.judges import (
    Run,
    close,
    constant,
    covers,
    median,
    silent,
    unbiased,
    width,
)
from gradiometer.conformance.noise_cases import SQUARES, TRACE
from gradiometer.conformance.relation_cases import (
    CURVATURES,
    OPTIMIZERS,
    VARIANCES,
    Descent,
    descend,
    expected_side,
    stationary_covariance,
)
from gradiometer.conformance.suite import Case
from gradiometer.conformance.verify import load_adapter, verify
from gradiometer.errors import InputError

CASES = {case.name: case for case in (*noise_cases(), *relation_cases())}


def one_case(*judges, runs=3, kind="noise"):
    return Case("one", "about", kind, lambda: iter([[run] for run in range(runs)]), judges)


def statuses(adapter, *judges, **settings):
    return [line.status for line in check(adapter, [one_case(*judges, **settings)]).checks]


# -- the truths ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reference_passes_everything():
    report = check(reference, [*CASES.values()])
    assert report.passed, report.table()
    assert {line.status for line in report.checks} == {"passed"}


def test_every_run_is_the_same_again():
    for case in CASES.values():
        first, second = (next(iter(case.runs())) for _ in range(2))
        for name, value in vars(first[0]).items():
            np.testing.assert_array_equal(value, getattr(second[0], name))


def test_every_case_has_a_name_of_its_own():
    cases = [*noise_cases(), *relation_cases()]
    assert len(CASES) == len(cases)
    assert all(case.about.endswith(".") and case.judges for case in cases)


@pytest.mark.parametrize(
    ("settings", "variances", "side"),
    [
        (Descent(0.1), (0.502513, 0.084602, 0.105263, 0.029412), 0.269130),
        (Descent(0.5), (2.564103, 0.450450, 0.666667, 0.500000), 2.558212),
        (Descent(0.05, 0.9), (2.503294, 0.418318, 0.506667, 0.130137), 1.272902),
        (Descent(0.2, 0.5, 0.2), (1.608579, 0.271003, 0.338028, 0.095238), 0.865901),
    ],
)
def test_stationary_state_of_the_quadratic_in_closed_form(settings, variances, side):
    damped = settings.lr * (1 - settings.dampening)
    sides = 0.0
    for h, c, rounded in zip(CURVATURES, VARIANCES, variances, strict=True):
        mu = settings.momentum
        exact = damped * c * (1 + mu) / (h * (1 - mu) * (2 * (1 + mu) - damped * h))
        found = stationary_covariance(h, c, settings)[0, 0]
        assert found == pytest.approx(exact, rel=1e-10)
        assert found == pytest.approx(rounded, abs=1e-6)
        sides += expected_side(h, c, settings)
    assert sides == pytest.approx(side, abs=1e-6)


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_stationary_state_stays_as_it_is(settings):
    """Ten steps from draws of the stationary state leave both variances where they are."""
    rng = np.random.default_rng(0)
    count, curvature, variance = 20_000, 0.7, 1.3
    covariance = stationary_covariance(curvature, variance, settings)
    weights, velocity = rng.multivariate_normal(np.zeros(2), covariance, count, method="eigh").T

    def gradient(step, weights):
        return curvature * weights + math.sqrt(variance) * rng.standard_normal(count)

    last = descend(weights, gradient, [settings] * 10, velocity=velocity * bool(settings.momentum))[-1]
    assert last.weights_after.var() == pytest.approx(covariance[0, 0], rel=0.05)
    if settings.momentum:
        assert last.velocity_after.var() == pytest.approx(covariance[1, 1], rel=0.05)


def test_spreads_of_the_two_batch_table():
    assert pytest.approx(55.0) == TRACE
    assert pytest.approx(74.551, abs=1e-3) == SQUARES
    table = {"2 parts of 16": (12.211, 0.9539), "8 parts of 1": (4.615, 2.2666)}
    table |= {"8 parts of 16": (4.615, 0.4063), "32 parts of 4": (2.193, 0.4051)}
    for name, spreads in table.items():
        steps = next(iter(CASES[name].runs()))
        asked = [judge for judge in CASES[name].judges if judge.aspect == "spread"]
        answers = [[Run(steps, {judge.quantity: value}) for value in (0, 1)] for judge in asked]
        least = [float(judge.find(runs).truth) for judge, runs in zip(asked, answers, strict=True)]
        found = np.array(least) * math.sqrt(len(steps))
        assert found == pytest.approx(spreads, rel=1e-3)


# -- the rules -------------------------------------------------------------------------------------


def test_what_is_not_returned_is_not_offered():
    truth = constant(1.0)
    judges = (close("trace", truth=truth), close("scale", truth=truth), covers("trace", truth=truth))
    assert statuses(lambda steps: {"trace": 1.0}, *judges) == ["passed", "not offered", "not offered"]


def test_nothing_offered_is_not_passed():
    report = check(lambda steps: {}, [one_case(close("trace", truth=constant(1.0)))])
    assert not report.passed
    assert not report.failures


def test_an_answer_in_some_runs_only_is_not_passed():
    def adapter(steps):
        return {"trace": 1.0} if steps[0] else {}

    assert statuses(adapter, close("trace", truth=constant(1.0))) == ["not offered"]


def test_an_adapter_that_raises_fails_with_its_message():
    def adapter(steps):
        raise NameError("name 'model' is not defined")

    (line,) = check(adapter, [one_case(close("trace", truth=constant(1.0)))]).checks
    assert line.status == "FAILED"
    assert line.measured == "NameError: name 'model' is not defined"


@pytest.mark.parametrize("value", [None, "1", [1.0], {}])
def test_an_answer_that_is_no_number_fails(value):
    wanted = "passed" if value == "1" else "FAILED"
    assert statuses(lambda steps: {"trace": value}, close("trace", truth=constant(1.0))) == [wanted]


def test_misspelt_quantities_are_refused():
    case = [one_case(close("trace", truth=constant(1.0)))]
    with pytest.raises(InputError, match=r"means nothing in a noise case, got 'b_simple'. Use trace, grad"):
        check(lambda steps: {"b_simple": 1.0}, case)


def test_no_cases_are_refused():
    with pytest.raises(InputError, match="nothing to check"):
        check(reference, [])


def test_where_nothing_can_be_measured_silence_and_refusal_pass():
    def refusing(steps):
        raise ValueError("too few parts")

    assert statuses(lambda steps: {"scale": math.nan}, silent("scale")) == ["passed"]
    assert statuses(refusing, silent("scale")) == ["passed"]
    assert statuses(lambda steps: {"scale": 1.0}, silent("scale")) == ["FAILED"]


@pytest.mark.parametrize("judge", [unbiased, median, close])
def test_nan_is_no_truth(judge):
    assert statuses(lambda steps: {"trace": math.nan}, judge("trace", truth=constant(1.0))) == ["FAILED"]


def test_intervals_may_be_neither_too_narrow_nor_too_wide():
    def adapter(half):
        rng = np.random.default_rng(0)

        def answer(steps):
            value = rng.standard_normal()
            return {"trace": value, "trace_interval": (value - half, value + half)}

        return answer

    judges = (covers("trace", truth=constant(0.0)), width("trace"))
    assert statuses(adapter(1.96), *judges, runs=200) == ["passed", "passed"]
    assert statuses(adapter(0.8), *judges, runs=200) == ["FAILED", "passed"]
    assert statuses(adapter(8.0), *judges, runs=200) == ["passed", "FAILED"]


# -- the command -----------------------------------------------------------------------------------


def test_verify_prints_a_table_and_what_failed_is_about():
    shown = []
    assert not verify(f"{__name__}:nothing_moves", "relation", write=shown.append)
    text = "\n".join(shown)
    assert "identity: plain" in text
    assert "FAILED" in text
    assert "transient: The ratio is what it is, and not near 1." in text


def nothing_moves(steps):
    return {"ratio": 1.0, "stationary": True}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mine", "an adapter is a module and a function, got 'mine'"),
        ("no_such_module:mine", "the adapter was not found, got No module named"),
        ("gradiometer.errors:mine", "the adapter was not found"),
        ("gradiometer.errors:__doc__", "the adapter is not a function"),
    ],
)
def test_adapters_that_cannot_be_found(path, message):
    with pytest.raises(InputError, match=message):
        load_adapter(path)


def test_adapters_are_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "adapter_of_mine.py").write_text("def mine(steps):\n    return {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    assert load_adapter("adapter_of_mine:mine")([]) == {}
