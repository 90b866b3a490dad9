"""The package's own estimators, through the monitor, pass every case."""

import math

import pytest

from gradiometer.conformance import check, noise_cases
from gradiometer.conformance.own import own_suites, relation, single_examples

PAIRS = [(name, case) for name, (_, cases) in own_suites().items() for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), PAIRS, ids=[f"{name}: {case.name}" for name, case in PAIRS])
def test_own_estimators_pass(name, case):
    adapter, _ = own_suites()[name]
    report = check(adapter, [case])
    assert report.passed, report.table()
    assert {line.status for line in report.checks} == {"passed"}


def test_single_examples_are_offered_only_where_they_are_the_parts():
    case = noise_cases()[0]
    assert single_examples(next(iter(case.runs()))) == {}


def test_a_loop_that_leaves_the_steps_of_the_case_is_noticed():
    _, cases = own_suites()["relation"]
    steps = list(next(iter(cases[0].runs())))
    steps[-1] = type(steps[-1])(**{**vars(steps[-1]), "weights_after": steps[-1].weights_after + 1.0})
    with pytest.raises(RuntimeError, match="did not follow"):
        relation(steps)


def test_where_nothing_is_measured_the_answer_is_nan():
    case = next(case for case in noise_cases() if case.name == "one part per step")
    answer = single_examples(next(iter(case.runs())))
    assert all(math.isnan(answer[name]) for name in ("trace", "grad_sq_norm", "scale"))
