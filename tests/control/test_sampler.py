"""Batches that grow: nothing lost or repeated, lengths that are right, and noise as of a lower rate."""

import copy
import pickle
import random

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from gradiometer.control.sampler import GrowingBatchSampler
from gradiometer.errors import InputError

DATA = TensorDataset(torch.arange(100))


def growing(batch_size=10, **options):
    return GrowingBatchSampler(SequentialSampler(DATA), batch_size, **options)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 7, 10, 100, 101])
def test_a_size_that_stays_cuts_as_torch_does(size, drop_last):
    own, torchs = growing(size, drop_last=drop_last), BatchSampler(SequentialSampler(DATA), size, drop_last)
    assert len(own) == len(torchs)
    assert list(own) == list(torchs)
    assert len(own) == len(torchs)


def test_a_change_holds_from_the_next_batch():
    sampler, sizes = growing(), []
    for batch in sampler:
        sizes.append(len(batch))
        if len(sizes) == 3:
            sampler.batch_size = 25
    assert sizes == [10, 10, 10, 25, 25, 20]
    assert [len(batch) for batch in sampler] == [25] * 4


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_any_changes_lose_and_repeat_nothing_and_the_length_is_what_would_come(seed, drop_last):
    draw = random.Random(seed)
    sampler, given, taken = growing(drop_last=drop_last), 0, []
    sampler.sampler = RandomSampler(DATA)
    epoch = iter(sampler)
    while True:
        sampler.batch_size = draw.randint(1, 30)
        rest = BatchSampler(range(100 - len(taken)), sampler.batch_size, drop_last)
        assert len(sampler) == given + len(rest)
        batch = next(epoch, None)
        if batch is None:
            break
        given, taken = given + 1, taken + batch
    assert len(set(taken)) == len(taken)
    left = 100 - len(taken)
    assert 0 <= left < sampler.batch_size if drop_last else left == 0
    assert next(epoch, None) is None
    sampler.batch_size = 1
    assert len(sampler) == given  # what was dropped does not come back


def test_between_epochs_the_length_is_that_of_the_next():
    sampler = growing()
    given = 0
    for _ in sampler:
        given += 1
        sampler.batch_size = 25
        assert len(sampler) == 5  # 10, 25, 25, 25, 15
    assert given == 5
    assert len(sampler) == 4
    for _ in sampler:
        sampler.batch_size = 50
        break
    assert len(sampler) == 2
    held = iter(sampler)
    next(held)
    sampler.batch_size = 10
    assert len(sampler) == 6
    later = iter(sampler)  # as a loader does that keeps its iterator: the next epoch begins
    assert len(sampler) == 10
    assert len(list(later)) == 10


def test_two_passes_at_a_time_do_not_disturb_each_other():
    sampler = growing()
    one, other = iter(sampler), iter(sampler)
    next(one), next(one)
    assert len(sampler) == 10
    assert next(other) == list(range(10))
    assert next(one) == list(range(20, 30))
    sampler.batch_size = 45
    assert len(sampler) == 3  # of the pass begun last: 10, 45, 45


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_what_they_have_prefetched_and_then_the_new_size(persistent):
    sampler = growing()
    loader = DataLoader(
        DATA, batch_sampler=sampler, num_workers=2, prefetch_factor=3, persistent_workers=persistent
    )
    expected = [[10] * 9 + [5, 5], [5] * 20]
    for epoch in expected:
        sizes, seen, lengths = [], [], []
        for (x,) in loader:
            sizes.append(len(x))
            seen += x.tolist()
            if len(sizes) == 3:
                sampler.batch_size = 5
            lengths.append(len(loader))
        assert sizes == epoch
        assert seen == list(range(100))
        assert lengths[2:] == [len(epoch)] * (len(epoch) - 2)  # also while the prefetched ones run out
        if not persistent:
            assert len(loader) == 20


def test_a_loader_without_workers_follows_at_once():
    generator = torch.Generator().manual_seed(0)
    sampler = GrowingBatchSampler(RandomSampler(DATA, generator=generator), 10)
    loader = DataLoader(DATA, batch_sampler=sampler)
    for epoch in ([10, 10, 40, 40], [40, 40, 20]):
        sizes, seen = [], []
        for (x,) in loader:
            sizes.append(len(x))
            seen += x.tolist()
            if len(sizes) == 2:
                sampler.batch_size = 40
        assert sizes == epoch
        assert sorted(seen) == list(range(100))
        assert seen != sorted(seen)
        assert len(loader) == 3


def test_set_epoch_after_iter_is_in_time():
    def order(epoch):
        examples = DistributedSampler(DATA, num_replicas=2, rank=1)
        examples.set_epoch(epoch)
        return list(examples)

    sampler = GrowingBatchSampler(DistributedSampler(DATA, num_replicas=2, rank=1), 50)
    assert len(sampler) == 1
    begun = iter(sampler)
    sampler.sampler.set_epoch(3)
    assert next(begun) == order(3) != order(0)


def test_frameworks_can_make_it_anew_over_another_sampler():
    sampler = growing(drop_last=True)
    sampler.batch_size = 30
    examples = DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=False)
    again = type(sampler)(examples, batch_size=sampler.batch_size, drop_last=sampler.drop_last)
    assert list(again) == [list(range(0, 60, 2))]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_copy_begins_its_own_epoch(copied):
    sampler = growing()
    begun = iter(sampler)
    next(begun)
    sampler.batch_size = 30
    other = copied(sampler)
    assert (len(sampler), len(other)) == (4, 4)
    other.batch_size = 45
    assert (len(sampler), len(other)) == (4, 3)
    assert len(next(begun)) == 30
    assert [len(batch) for batch in other] == [45, 45, 10]


def test_a_sampler_without_a_length_has_batches_without_a_length():
    class Endless(SequentialSampler):
        __len__ = None

    sampler = GrowingBatchSampler(Endless(DATA), 30)
    assert [len(batch) for batch in sampler] == [30, 30, 30, 10]
    with pytest.raises(TypeError):
        len(sampler)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None, "32"])
def test_sizes_that_are_refused(size):
    with pytest.raises(InputError, match=r"at least 1, got .* Write batch_size=64"):
        growing(size)
    sampler = growing(10)
    with pytest.raises(InputError, match="whole number at least 1"):
        sampler.batch_size = size
    assert sampler.batch_size == 10


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(100)


@pytest.mark.parametrize(
    ("sampler", "fix"),
    [
        (DATA, r"got TensorDataset\. Write .*RandomSampler\(dataset\), 32\) and DataLoader\("),
        (DataLoader(DATA, batch_size=10), r"got DataLoader\. Write .*batch_sampler=sampler\)\.$"),
        (list(range(100)), r"got list\. Write .*RandomSampler"),
        (DataLoader(Stream(), batch_size=10), r"stream has no sampler: .*, or accumulate gradients"),
        (Stream(), "stream has no sampler"),
        (BatchSampler(SequentialSampler(DATA), 10, False), r"GrowingBatchSampler\(batches\.sampler, 32\)"),
        (growing(), r"pass its own sampler"),
    ],
    ids=["dataset", "loader", "list", "loader of a stream", "stream", "batches", "itself"],
)
def test_what_does_not_draw_examples_is_refused_with_the_line_to_write(sampler, fix):
    with pytest.raises(InputError, match=fix):
        GrowingBatchSampler(sampler, 32)


# Noise equivalence (Smith, Kindermans, Ying, Le 2017, arXiv:1711.00489). One network 64-32-32-10 per seed,
# all of them at once; at epochs 12 and 21 of 30 the batch grows fivefold, or the rate falls fivefold.
SEEDS, BATCH, RATE, DECAY, EPOCHS, CHANGES, FACTOR = 12, 10, 0.04, 0.01, 30, (12, 21), 5


def digits():
    data = load_digits()
    x, y = torch.as_tensor(data.data, dtype=torch.float32), torch.as_tensor(data.target)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:1500]
    return ((x - x.mean(0)) / (x.std(0) + 1e-6))[chosen], y[chosen]


def networks():
    weights = []
    for wide, narrow in ((64, 32), (32, 32), (32, 10)):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
        for rows in (wide, 1):  # weight, bias
            drawn = torch.stack([2 * torch.rand(rows, narrow, generator=seed) - 1 for seed in seeds])
            weights.append((drawn / wide**0.5).requires_grad_())
    return weights


def losses(weights, x, y):
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        x = torch.baddbmm(bias, x if weight is weights[0] else x.relu(), weight)
    return F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none").view(SEEDS, -1).mean(1)


def train(first_seed, *, grow):
    """Final training loss of every seed, and the number of updates."""
    x, y = digits()
    weights, updates = networks(), 0
    optimizer = torch.optim.SGD(weights, lr=RATE, weight_decay=DECAY)
    shuffles = [torch.Generator().manual_seed(first_seed + seed) for seed in range(SEEDS)]
    samplers = [GrowingBatchSampler(RandomSampler(y, generator=shuffle), BATCH) for shuffle in shuffles]
    for epoch in range(EPOCHS):
        if epoch in CHANGES and grow:
            for sampler in samplers:
                sampler.batch_size *= FACTOR
        elif epoch in CHANGES:
            optimizer.param_groups[0]["lr"] /= FACTOR
        for batch in zip(*samplers, strict=True):
            chosen = torch.tensor(batch)
            optimizer.zero_grad()
            losses(weights, x[chosen], y[chosen]).sum().backward()
            optimizer.step()
            updates += 1
    with torch.no_grad():
        return losses(weights, x.expand(SEEDS, -1, -1), y.expand(SEEDS, -1)).double(), updates


@pytest.mark.slow
def test_a_batch_five_times_as_large_is_a_rate_five_times_as_low_in_less_than_half_the_updates():
    decayed, updates = train(1000, grow=False)
    grown, fewer = train(2000, grow=True)  # its own shuffles: only the statistics are the same
    assert (updates, fewer) == (4500, 2124)
    stderr = float((decayed.var() / SEEDS + grown.var() / SEEDS).sqrt())
    assert stderr < 1e-3  # the loss is 0.075; at a constant rate and size it is 0.065
    assert abs(float(grown.mean() - decayed.mean())) < 2e-3
    assert float(decayed.mean()) == pytest.approx(0.075, abs=2e-3)
