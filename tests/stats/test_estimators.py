import copy
import io
import math

import pytest
import torch

from gradiometer.errors import InputError
from gradiometer.stats.estimators import Ema, HalfRun, Last, Mean, Window
from gradiometer.stats.jackknife import delete_block_jackknife


def number(value):
    return torch.tensor(float(value), dtype=torch.float64)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(estimator, values, per_close=1, *, levels=False):
    """One sample per step; a close at every ``per_close``-th step, the first at step 0."""
    for step, value in enumerate(values):
        estimator.add({"x": number(value)})
        if step % per_close == 0:
            estimator.close(step, {"step": number(step)} if levels else None)
    return estimator


KINDS = [Last, Mean, lambda: Window(20), HalfRun, lambda: Ema(0.9)]
NAMES = ["last", "mean", "window", "half_run", "ema"]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=NAMES)


# -- averages against plain lists ------------------------------------------------------------------

OLDEST = {
    "last": lambda begin, step: step - 1,
    "mean": lambda begin, step: -math.inf,
    "window": lambda begin, step: step - 20,
    "half_run": lambda begin, step: begin + (step - begin) // 2,
}


@pytest.mark.parametrize("per_close", [1, 3])
@pytest.mark.parametrize("name", list(OLDEST))
def test_averages_are_those_of_the_samples_in_the_window(name, per_close):
    values = draws(91).tolist()
    estimator = dict(zip(NAMES, KINDS, strict=True))[name]()
    closed: list[tuple[int, list[float]]] = []
    pending: list[float] = []
    for step, value in enumerate(values):
        estimator.add({"x": number(value)})
        pending.append(value)
        if step % per_close:
            continue
        estimator.close(step)
        closed, pending = [*closed, (step, pending)], []
        oldest = OLDEST[name](0, step)
        kept = [x for end, samples in closed if end > oldest or end == step for x in samples]
        assert estimator.averages()["x"].item() == pytest.approx(sum(kept) / len(kept), rel=1e-12)


def test_mean_over_many_merges_is_the_plain_mean():
    values = draws(1000).tolist()
    estimator = run(Mean(), values)
    assert estimator.averages()["x"].item() == pytest.approx(sum(values) / 1000, rel=1e-12)
    assert estimator.reference().samples == 1000


def test_ema_is_debiased():
    estimator, decay = Ema(0.9), 0.9
    values = (3 + draws(300)).tolist()
    lengths = [1, 2, 7, 1, 4]
    closes = {sum((lengths * 20)[: i + 1]) - 1 for i in range(100)}
    for step, value in enumerate(values):
        estimator.add({"x": number(value)})
        if step not in closes:
            continue
        estimator.close(step)
        weights = [decay ** (step - i) for i in range(step + 1)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert estimator.averages()["x"].item() == pytest.approx(expected, rel=1e-11)
    assert step == 299


def test_ema_of_one_sample_is_the_sample():
    assert run(Ema(0.999), [5.0]).averages()["x"].item() == pytest.approx(5.0, rel=1e-14)


def test_arrays_are_averaged_elementwise_in_float64():
    estimator = Mean()
    for step in range(3):
        estimator.add({"x": torch.tensor([16777216.0, step], dtype=torch.float32)})
    estimator.add({"x": torch.tensor([16777220.0, 5.0], dtype=torch.float32)})
    estimator.close(3)
    expected = torch.tensor([16777217.0, 2.0], dtype=torch.float64)  # float32 cannot hold the first
    torch.testing.assert_close(estimator.averages()["x"], expected, rtol=0, atol=0)


def test_a_close_without_samples_changes_no_average():
    estimator = run(Mean(), range(100))
    estimator.close(100)
    for step in range(101, 140):
        estimator.close(step)
    assert estimator.averages()["x"].item() == 49.5
    estimator.add({"x": number(150.5)})
    estimator.close(140)
    assert estimator.averages()["x"].item() == pytest.approx((4950 + 150.5) / 101)


# -- windows and levels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "oldest", "longest_share"),
    [
        (HalfRun, lambda step: step // 2, 1 / 32),
        (lambda: Window(3000), lambda step: step - 3000, 1 / 16),
    ],
    ids=["half_run", "window"],
)
def test_window_begins_where_it_should_to_the_precision_of_a_block(kind, oldest, longest_share):
    estimator = kind()
    values = draws(10_001).tolist()
    for step, value in enumerate(values):
        estimator.add({"x": number(value)})
        estimator.close(step, {"step": number(step)})
        if step in (2, 9, 511, 513, 1023, 3000, 3001, 7777, 10_000):
            path = estimator.reference().path["step"]
            start, ideal = int(path[0]), max(0, oldest(step))
            block = max(1, (step - ideal) * longest_share)
            assert ideal - block < start <= ideal
            assert (path == estimator.reference().path_steps).all()
            assert path[-1] == step
            inside = values[start + 1 : step + 1]
            assert estimator.averages()["x"].item() == pytest.approx(sum(inside) / len(inside), rel=1e-10)
            assert estimator.reference().samples == step - start


def test_samples_before_the_first_known_level_are_left_out():
    estimator = run(Mean(), [100.0, 1.0, 5.0], levels=True)
    assert estimator.averages()["x"].item() == 3.0
    assert estimator.averages()["step"].item() == 2.0
    assert estimator.reference().path_steps.tolist() == [0.0, 1.0, 2.0]


def test_last_compares_with_the_record_before():
    estimator = run(Last(), range(9), per_close=4, levels=True)
    reference = estimator.reference()
    assert reference.path_steps.tolist() == [4.0, 8.0]
    assert estimator.averages()["x"].item() == 6.5  # 5, 6, 7, 8


@every_kind
def test_first_and_previous_levels_are_kept(kind):
    estimator = kind()
    for step in range(0, 1000, 2):
        estimator.add({"x": number(step)})
        estimator.close(step, {"kernel": torch.full((2, 2), float(step))})
        reference = estimator.reference()
        assert reference.step == step
        assert torch.equal(reference.first["kernel"], torch.zeros(2, 2))
        if step:
            assert reference.previous_step == step - 2
            assert torch.equal(reference.previous["kernel"], torch.full((2, 2), step - 2.0))
        else:
            assert reference.previous == {}
            assert reference.previous_step == -1


@every_kind
def test_memory_does_not_grow_with_the_number_of_records(kind):
    estimator = kind()
    most = 0
    for step in range(10_000):
        estimator.add({"x": number(step)})
        estimator.close(step, {"level": number(step)})
        if step % 97 == 0:
            most = max(most, len(estimator.state_dict()["blocks"]))
    assert most <= (128 if isinstance(estimator, HalfRun) else 32)


def test_merging_keeps_at_least_half_of_the_blocks():
    assert 16 <= len(run(Mean(), range(10_000)).state_dict()["blocks"]) <= 32
    assert 32 <= len(run(HalfRun(), range(1019)).state_dict()["blocks"]) <= 64


def test_reset_forgets_the_window_and_keeps_the_first_record():
    estimator = run(Mean(), [100.0, 200.0, 300.0], levels=True)
    estimator.add({"x": number(1e6)})
    estimator.reset()
    for step, value in enumerate([7.0, 1.0, 2.0], start=3):
        estimator.add({"x": number(value)})
        estimator.close(step, {"step": number(step)})
    assert estimator.averages()["x"].item() == 1.5  # the 7 came before the new window's first level
    reference = estimator.reference()
    assert reference.path_steps.tolist() == [3.0, 4.0, 5.0]


def test_reset_of_a_half_run_begins_a_new_half():
    estimator = run(HalfRun(), range(100))
    estimator.reset()
    for step in range(100, 109):
        estimator.add({"x": number(step)})
        estimator.close(step)
    assert estimator.averages()["x"].item() == 106.5  # 105 ... 108


def test_reset_of_an_ema_keeps_its_block_length():
    estimator = Ema(0.99)
    before = estimator.state_dict()["span"]
    assert before > 1
    estimator.reset()
    assert estimator.state_dict()["span"] == before


# -- blocks left out -------------------------------------------------------------------------------


def test_replicates_against_plain_lists():
    values = draws(48).tolist()
    rows, weights = run(Mean(), values).replicates()
    groups = [values[i : i + 2] for i in range(0, 48, 2)]
    assert weights.tolist() == [2.0] * 24
    expected = [sum(values) / 48] + [(sum(values) - sum(group)) / 46 for group in groups]
    torch.testing.assert_close(rows["x"], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_replicates_of_arrays_have_a_leading_axis():
    estimator = Mean()
    for step in range(5):
        estimator.add({"x": torch.full((2, 3), float(step))})
        estimator.close(step)
    rows, weights = estimator.replicates()
    assert rows["x"].shape == (6, 2, 3)
    assert rows["x"][:, 1, 2].tolist() == [2.0, 10 / 4, 9 / 4, 8 / 4, 7 / 4, 6 / 4]
    assert weights.tolist() == [1.0] * 5


def test_unequal_blocks_are_weighted_by_their_samples():
    estimator = Mean()
    for step, values in enumerate([[1.0], [2.0, 3.0], [4.0], [5.0, 6.0, 7.0]]):
        for value in values:
            estimator.add({"x": number(value)})
        estimator.close(step)
    rows, weights = estimator.replicates()
    assert weights.tolist() == [1.0, 2.0, 1.0, 3.0]
    expected = torch.tensor([28 / 7, 27 / 6, 23 / 5, 24 / 6, 10 / 4], dtype=torch.float64)
    torch.testing.assert_close(rows["x"], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("count", [4, 15, 16, 17, 32, 33, 65, 500])
def test_at_most_thirty_two_groups_are_left_out(count):
    rows, weights = run(Mean(), range(count)).replicates()
    assert 4 <= len(weights) <= 32
    assert len(rows["x"]) == 1 + len(weights)
    assert weights.sum() == count


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_than_four_blocks_are_not_left_out(count):
    rows, weights = run(Mean(), range(count)).replicates()
    assert len(weights) == 0
    assert rows["x"].tolist() == [(count - 1) / 2]


def test_an_empty_estimator_has_no_averages():
    assert Mean().replicates()[0] == Mean().averages() == Mean().levels() == {}


def test_interval_of_a_ratio_of_averages_covers():
    """16 blocks and 1.96 errors: P(|t_15| < 1.96) = 0.931 for a mean; the design promises 0.94."""
    replicas, blocks, samples = 4000, 16, 8
    x, y = 5 + draws(blocks, samples, replicas), 10 + 2 * draws(blocks, samples, replicas, seed=1)
    estimator = Mean()
    for step in range(blocks):
        for sample in range(samples):
            estimator.add({"x": x[step, sample], "y": y[step, sample]})
        estimator.close(step)
    rows, weights = estimator.replicates()
    assert len(weights) == 16
    ratio = rows["y"] / rows["x"]
    error = delete_block_jackknife(ratio[0], ratio[1:], weights)
    coverage = ((ratio[0] - 2).abs() < 1.96 * error).double().mean().item()
    binomial = (0.931 * 0.069 / replicas) ** 0.5  # 0.004
    assert 0.931 - 3 * binomial < coverage < 0.94 + 3 * binomial


# -- checkpoint ------------------------------------------------------------------------------------


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("length", [1, 50, 700])
@every_kind
def test_a_resumed_estimator_goes_on_bit_for_bit(kind, length):
    values = draws(length + 300).tolist()

    def feed(estimator, begin, end):
        for step in range(begin, end):
            estimator.add({"x": number(values[step]), "y": number(step)})
            if step % 3 == 0:
                estimator.close(step, {"level": number(values[step] ** 2)})

    whole, first, resumed = kind(), kind(), kind()
    feed(whole, 0, length + 300)
    feed(first, 0, length)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    feed(first, length, length + 7)  # going on does not reach into what was saved
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    feed(resumed, length, length + 300)
    same(whole.averages(), resumed.averages())
    (rows, weights), (resumed_rows, resumed_weights) = whole.replicates(), resumed.replicates()
    same(rows, resumed_rows)
    assert torch.equal(weights, resumed_weights)
    a, b = whole.reference(), resumed.reference()
    same(a.first, b.first)
    same(a.previous, b.previous)
    assert all((a.path[name] == b.path[name]).all() for name in a.path)
    assert (a.step, a.previous_step, a.samples) == (b.step, b.previous_step, b.samples)
    assert (a.path_steps == b.path_steps).all()


@pytest.mark.parametrize("pending", [False, True])
def test_a_saved_state_is_not_changed_by_going_on(pending):
    estimator = run(Ema(0.9), range(10), levels=True)
    if pending:
        estimator.add({"x": number(1)})
    saved = estimator.state_dict()
    before = copy.deepcopy(saved)
    other = Ema(0.9)
    other.load_state_dict(saved)
    for each in (estimator, other):
        each.add({"x": number(1)})
        run(each, range(500), levels=True)
    assert repr(saved) == repr(before)


# -- small print -----------------------------------------------------------------------------------


def test_pending_can_be_read_replaced_and_discarded():
    estimator = Mean()
    estimator.add({"x": number(4)})
    estimator.add({"x": number(6)})
    sums, weight = estimator.pending
    assert (sums["x"].item(), weight) == (10.0, 2.0)
    estimator.pending = ({"x": number(30)}, 3.0)
    estimator.close(0)
    assert estimator.averages()["x"].item() == 10.0
    estimator.add({"x": number(1000)})
    estimator.discard_pending()
    estimator.close(1)
    assert estimator.averages()["x"].item() == 10.0


def test_an_estimator_is_empty_until_it_is_closed():
    estimator = Mean()
    assert estimator.state_dict()["now"] is None
    estimator.add({"x": number(1)})
    assert estimator.state_dict()["now"] is None
    estimator.close(0)
    assert estimator.state_dict()["now"] is not None


def test_samples_are_taken_off_the_graph():
    estimator = Mean()
    estimator.add({"x": torch.ones((), requires_grad=True) * 2})
    assert not estimator.pending[0]["x"].requires_grad


def test_reference_needs_a_record():
    with pytest.raises(InputError, match=r"has no record yet. Call close\(step\) first"):
        Mean().reference()


def test_window_refuses_a_length_below_one():
    with pytest.raises(InputError, match=r"steps must be a whole number at least 1, got 0"):
        Window(0)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 2])
def test_ema_refuses_a_decay_outside_its_range(decay):
    with pytest.raises(InputError, match=r"decay must be a number above 0 and below 1, got"):
        Ema(decay)


# -- weights ---------------------------------------------------------------------------------------

EVERY = [Last, Mean, lambda: Window(7), HalfRun, lambda: Ema(0.8)]


def alike(left, right):
    assert left.keys() == right.keys()
    assert all((left[name] == right[name]).all() for name in left)


def fill(make, samples):
    """One sample per step, ``(value, weight)``; a weight that is ``None`` is not given."""
    estimator = make()
    for step, (value, weight) in enumerate(samples):
        given = () if weight is None else (weight,)
        estimator.add({"x": torch.tensor([value, 2 * value], dtype=torch.float64)}, *given)
        if step % 3 == 2:
            estimator.close(step)
    return estimator


@pytest.mark.parametrize("weight", [1, 1.0, torch.tensor(1.0), torch.tensor(True)])
@pytest.mark.parametrize("make", EVERY)
def test_weight_one_is_no_weight(make, weight):
    values = draws(60).tolist()
    plain = fill(make, [(value, None) for value in values])
    found = fill(make, [(value, weight) for value in values])
    for left, right in zip(plain.replicates(), found.replicates(), strict=True):
        alike(left, right) if isinstance(left, dict) else alike({"": left}, {"": right})
    assert plain.reference().samples == found.reference().samples
    assert (plain.reference().block_weights == found.reference().block_weights).all()


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.tensor(False)])
@pytest.mark.parametrize("make", EVERY)
def test_a_sample_of_weight_zero_changes_nothing(make, zero):
    """Whatever it holds, whether it comes first, last or alone in a block, and also under a decay."""
    plain, found = make(), make()
    spoilt = {"x": torch.tensor([torch.nan, torch.inf])}
    for step in range(30):
        sample = {"x": torch.tensor([step, step**2], dtype=torch.float64)}
        if step % 4 == 0:
            found.add(spoilt, zero)
        if step not in (6, 7, 8):
            plain.add(sample)
            found.add(sample)
        else:
            found.add(spoilt, zero)
        if step % 5 == 0:
            found.add(spoilt, zero)
        if step % 3 == 2:
            plain.close(step)
            found.close(step)
    alike(plain.averages(), found.averages())
    assert plain.reference().samples == found.reference().samples
    assert (plain.reference().block_weights == found.reference().block_weights).all()
    alike(plain.reference().block_means, found.reference().block_means)


def test_a_weight_is_a_number_of_samples():
    for make in (Mean, lambda: Ema(0.7)):
        often, once = make(), make()
        for estimator in (often, once):
            estimator.add({"x": number(3.0)})
        for _ in range(2):
            often.add({"x": number(10.0)})
        once.add({"x": number(10.0)}, torch.tensor(2.0))
        for estimator in (often, once):
            estimator.add({"x": number(5.0)}, 3.0)
            estimator.close(0)
            estimator.add({"x": number(-1.0)}, 2)
            estimator.close(1)
        assert once.averages()["x"].item() == pytest.approx(often.averages()["x"].item(), rel=1e-14)
        assert once.reference().samples == pytest.approx(often.reference().samples, rel=1e-14)


def test_a_window_without_a_sample_that_counts_has_no_average():
    estimator = Mean()
    estimator.add({"x": number(torch.nan)}, 0)
    estimator.close(0)
    assert estimator.averages() == {}
    assert estimator.reference().samples == 0
    estimator.add({"x": number(4.0)})
    estimator.close(1)
    assert estimator.averages()["x"].item() == 4.0


def test_a_weight_of_the_device_is_saved_as_a_number():
    estimator = Mean()
    estimator.add({"x": number(4.0)}, torch.tensor(1.0))
    saved = estimator.state_dict()
    assert saved["open_weight"] == 1.0
    assert isinstance(saved["open_weight"], float)
    again = Mean()
    again.load_state_dict(saved)
    again.add({"x": number(torch.nan)}, torch.tensor(0.0))
    again.close(0)
    assert again.averages()["x"].item() == 4.0


@pytest.mark.parametrize("weight", [-1, -0.5, float("nan")])
def test_a_negative_weight_is_refused(weight):
    with pytest.raises(InputError, match=r"must not be negative, got .* Write weight=0"):
        Mean().add({"x": number(1.0)}, weight)
