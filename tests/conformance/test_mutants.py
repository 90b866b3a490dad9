"""Every mistake that estimators of these two quantities are known for fails a case that is about it.

A mutant is a correct estimator with one mistake; it is named after the mistake.
"""

import numpy as np
import pytest

from gradiometer.conformance import check, noise_cases, reference, relation_cases

CASES = {case.name: case for case in (*noise_cases(), *relation_cases())}


@pytest.fixture(autouse=True)
def mutants_may_divide_by_zero():
    with np.errstate(all="ignore"):
        yield


# -- the noise scale -------------------------------------------------------------------------------


def usable(steps):
    return [step for step in steps if step.finite and len(step.sizes) > 1]


def parts(step):
    return step.gradients / step.loss_scale


def sq(vector):
    return float(vector @ vector)


def solve(small, big, b, batch):
    """The two-batch formula: squared norms at batch sizes b and batch."""
    trace = (small - big) / (1 / b - 1 / batch)
    return trace, big - trace / batch


def two_batches(step):
    """Trace and signal of one step of equal parts, as published."""
    g = parts(step)
    b = sum(step.sizes) / len(g)
    return solve(np.mean([sq(each) for each in g]), sq(g.mean(0)), b, b * len(g))


def answer(trace, signal):
    return {"trace": trace, "grad_sq_norm": signal, "scale": np.float64(trace) / signal}


def averaged(estimate):
    """An estimator that averages one step's estimate over the usable steps."""

    def adapter(steps):
        pairs = [estimate(step) for step in usable(steps)]
        return answer(*np.mean(pairs, axis=0)) if pairs else answer(np.nan, np.nan)

    return adapter


def undefined_name(steps):
    return answer(sq(model.grad), 1.0)  # noqa: F821


@averaged
def small_batch_is_the_global_batch(step):
    g, batch = parts(step), sum(step.sizes)
    return solve(np.mean([sq(each) for each in g]), sq(g.mean(0)), batch, batch * len(g))


def big_gradient_sums_successive_steps(steps):
    pairs = []
    for first, second in zip(steps[::2], steps[1::2], strict=False):
        means = [parts(first).mean(0), parts(second).mean(0)]
        b = sum(first.sizes)
        pairs.append(solve(np.mean([sq(m) for m in means]), sq(sum(means) / 2), b, 2 * b))
    return answer(*np.mean(pairs, axis=0))


@averaged
def variance_of_batch_means_without_the_batch_size(step):
    g = parts(step)
    return g.var(0, ddof=1).sum(), sq(g.mean(0)) - g.var(0, ddof=1).sum() / len(g)


@averaged
def mean_with_its_noise_left_in(step):
    return two_batches(step)[0], sq(parts(step).mean(0))


@averaged
def one_micro_batch_as_the_small_batch(step):
    g = parts(step)
    b = sum(step.sizes) / len(g)
    return solve(sq(g[0]), sq(g.mean(0)), b, b * len(g))


@averaged
def hook_fires_on_the_last_micro_batch_only(step):
    g = parts(step)
    b = sum(step.sizes) / len(g)
    whole = sq(g.mean(0))  # what is in .grad by then, taken for one micro-batch
    return solve(whole, whole, b, b * len(g))


@averaged
def no_bessel_term(step):
    g = parts(step)
    b = sum(step.sizes) / len(g)
    trace = b * g.var(0).sum()
    return trace, sq(g.mean(0)) - trace / (b * len(g))


@averaged
def equal_sizes_assumed(step):
    return two_batches(step)


def average_of_ratios(steps):
    ratios = [np.divide(*two_batches(step)) for step in usable(steps)]
    return {"scale": np.mean(ratios) if ratios else np.nan}


def hard_cap(steps):
    right = averaged(two_batches)(steps)
    return right | {"scale": min(right["scale"], 1e5)}


def failures_become_a_constant(steps):
    try:
        pairs = [solve(1.0, 1.0, 1, 1) if len(step.sizes) < 2 else two_batches(step) for step in steps]
        trace, signal = np.mean(pairs, axis=0)
        if not np.isfinite(trace):
            raise ValueError
        return answer(trace, signal)
    except (ZeroDivisionError, ValueError):
        return answer(1.0, 1.0)


def loss_scale_left_in(steps):
    factor = np.mean([step.loss_scale**2 for step in usable(steps)]) if usable(steps) else np.nan
    right = reference(steps)
    return {"trace": right["trace"] * factor, "grad_sq_norm": right["grad_sq_norm"] * factor}


def non_finite_steps_poison(steps):
    return answer(*np.mean([two_batches(step) for step in steps if len(step.sizes) > 1], axis=0))


def non_finite_gradients_become_zero(steps):
    pairs = []
    for step in steps:
        g = np.nan_to_num(parts(step), posinf=0.0, neginf=0.0) * np.isfinite(parts(step)).all()
        b = sum(step.sizes) / len(g)
        pairs.append(solve(np.mean([sq(each) for each in g]), sq(g.mean(0)), b, b * len(g)))
    return answer(*np.mean(pairs, axis=0))


def moving_average(decay, *, seeded=False, exponent=lambda updates: updates, every=1):
    """An exponential moving average over steps with a choice of mistakes; it names the right weights."""

    def adapter(steps):
        state, updates, weights = np.zeros(2), 0, np.zeros(len(steps))
        for t, step in enumerate(steps):
            if not (step.finite and len(step.sizes) > 1) or t % every:
                continue
            sample = np.array(two_batches(step))
            first = seeded and updates == 0
            state = sample if first else decay * state + (1 - decay) * sample
            updates += 1
            weights *= decay
            weights[t] = 1 - decay
        if not updates:
            return answer(np.nan, np.nan)
        debias = 1.0 if seeded else 1 - decay ** exponent(updates)
        return answer(*(state / debias)) | {"weights": weights}

    return adapter


debias_off_by_one = moving_average(0.95, exponent=lambda updates: updates + 1)
debias_counts_steps_not_updates = moving_average(0.95, every=2, exponent=lambda updates: 2 * updates)
seeded_and_not_debiased = moving_average(0.95, seeded=True)


def with_iid_interval(samples, times=1):
    """Mean and 95 % interval as if the samples were independent, and each counted ``times`` times."""
    samples = np.asarray(samples)
    half = 1.96 * samples.std(ddof=1) / np.sqrt(len(samples) * times)
    return {"trace": samples.mean(), "trace_interval": (samples.mean() - half, samples.mean() + half)}


def iid_variance_of_correlated_steps(steps):
    return with_iid_interval([two_batches(step)[0] for step in steps])


def two_splits_of_one_batch_count_as_two_batches(steps):
    return with_iid_interval([two_batches(step)[0] for step in steps], times=4)


def useless_interval(steps):
    return reference(steps) | {"trace_interval": (-np.inf, np.inf)}


def confident_without_signal(steps):
    trace = averaged(two_batches)(steps)["trace"]
    return {"scale": trace / 1e-3, "scale_interval": (0.9 * trace / 1e-3, 1.1 * trace / 1e-3)}


NOISE = {
    undefined_name: ["2 parts of 16"],
    small_batch_is_the_global_batch: ["2 parts of 16", "8 parts of 1", "ratio of averages"],
    big_gradient_sums_successive_steps: ["drifting weights"],
    variance_of_batch_means_without_the_batch_size: ["2 parts of 16", "ratio of averages"],
    mean_with_its_noise_left_in: ["8 parts of 1", "finite population", "ratio of averages"],
    one_micro_batch_as_the_small_batch: ["8 parts of 1", "32 parts of 4"],
    hook_fires_on_the_last_micro_batch_only: ["2 parts of 16", "32 parts of 4"],
    no_bessel_term: ["2 parts of 16", "large scale"],
    equal_sizes_assumed: ["unequal parts"],
    average_of_ratios: ["ratio of averages"],
    hard_cap: ["large scale"],
    failures_become_a_constant: ["one part per step", "no finite step"],
    loss_scale_left_in: ["loss scale"],
    non_finite_steps_poison: ["non-finite steps"],
    non_finite_gradients_become_zero: ["non-finite steps"],
    debias_off_by_one: ["2 parts of 16", "8 parts of 16"],
    debias_counts_steps_not_updates: ["8 parts of 16"],
    seeded_and_not_debiased: ["8 parts of 1"],
    iid_variance_of_correlated_steps: ["correlated steps"],
    two_splits_of_one_batch_count_as_two_batches: ["intervals"],
    useless_interval: ["intervals"],
    confident_without_signal: ["no signal"],
}


# -- the relation ----------------------------------------------------------------------------------


def counted(steps):
    return [step for step in steps if step.counted]


def summed(left, right):
    """An estimator that averages the terms of both sides over the counted steps."""

    def adapter(steps):
        chosen = counted(steps)
        both = np.mean([left(step) for step in chosen]), np.mean([right(step) for step in chosen])
        return {"left": both[0], "right": both[1], "ratio": both[0] / both[1]}

    return adapter


def work(step):
    return step.weights @ step.gradient


def heavy_ball(step):
    moved = step.velocity_after if step.momentum else step.gradient
    return (1 + step.momentum) / (2 * (1 - step.dampening)) * step.lr * sq(moved)


def plain(step):
    return 0.5 * step.lr * sq(step.gradient)


heavy_ball_for_nesterov = summed(work, heavy_ball)
plain_formula_under_momentum = summed(work, plain)
dampening_forgotten = summed(
    work, lambda s: (1 + s.momentum) / 2 * s.lr * sq(s.velocity_after if s.momentum else s.gradient)
)
decay_left_out_of_the_gradient = summed(lambda step: step.weights @ step.loss_gradient, heavy_ball)
velocity_before_the_step = summed(
    work,
    lambda s: (
        (1 + s.momentum) / (2 * (1 - s.dampening)) * s.lr * sq(s.velocity if s.momentum else s.gradient)
    ),
)


def coupled_formula_with_decoupled_decay(steps):
    def pull(step):
        return step.loss_gradient + step.weight_decay * step.weights

    return summed(lambda step: step.weights @ pull(step), heavy_ball)(steps)


def average_of_step_ratios(steps):
    return {"ratio": np.mean([work(step) / heavy_ball(step) for step in counted(steps)])}


def learning_rate_read_once(steps):
    return summed(work, lambda step: heavy_ball(step) * steps[0].lr / step.lr)(steps)


def transient_not_dropped(steps):
    both = [(work(step), heavy_ball(step)) for step in steps]
    left, right = np.mean(both, axis=0)
    return {"left": left, "right": right}


def fixed_threshold(steps):
    return {"stationary": bool(abs(reference(steps)["ratio"] - 1) < 0.1)}


def iid_variance_of_a_telescoping_series(steps):
    right = reference(steps)
    terms = [work(step) - heavy_ball(step) for step in counted(steps)]
    half = 1.96 * np.std(terms, ddof=1) / np.sqrt(len(terms)) / right["right"]
    return {"ratio": right["ratio"], "ratio_interval": (right["ratio"] - half, right["ratio"] + half)}


RELATION = {
    heavy_ball_for_nesterov: ["identity: Nesterov, L2", "quadratic: Nesterov, L2"],
    plain_formula_under_momentum: ["identity: momentum", "quadratic: momentum"],
    dampening_forgotten: ["identity: dampening, L2", "quadratic: dampening, L2"],
    decay_left_out_of_the_gradient: ["identity: L2", "quadratic: L2", "scale-invariant weights"],
    velocity_before_the_step: ["identity: momentum"],
    coupled_formula_with_decoupled_decay: ["identity: decoupled decay", "quadratic: decoupled decay"],
    average_of_step_ratios: ["ratio intervals", "transient"],
    learning_rate_read_once: ["jump of the learning rate"],
    transient_not_dropped: ["identity: plain"],
    fixed_threshold: ["short window", "turning point"],
    iid_variance_of_a_telescoping_series: ["ratio intervals"],
}

MUTANTS = NOISE | RELATION
NAMES = {mutant: name for name, mutant in globals().items() if callable(mutant) and mutant in MUTANTS}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: NAMES[mutant])
def test_a_mutant_fails_the_cases_that_are_about_its_mistake(mutant):
    for name in MUTANTS[mutant]:
        report = check(mutant, [CASES[name]])
        assert report.failures, report.table()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: NAMES[mutant])
def test_it_is_the_mistake_that_fails(mutant):
    """What the mutant is made from passes where the mutant fails."""
    report = check(reference, [CASES[name] for name in MUTANTS[mutant]])
    assert report.passed, report.table()


def test_a_correct_moving_average_passes():
    """It names its weights, so forgetting is no mistake."""
    names = ("2 parts of 16", "8 parts of 1", "8 parts of 16", "loss scale", "drifting weights")
    report = check(moving_average(0.95), [CASES[name] for name in names])
    assert report.passed, report.table()
