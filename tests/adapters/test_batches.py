"""What a loader says about its data set."""

import pytest
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler

from gradiometer.adapters.batches import dataset_size_of


class Broken(Dataset):
    """A data set whose length is asked of something that does not exist."""

    def __getitem__(self, index):
        return index

    def __len__(self):
        return len(self.rows)


def test_an_error_in_the_length_of_a_data_set_is_not_taken_for_a_stream():
    loader = DataLoader(Broken(), batch_sampler=[[0, 1]])
    with pytest.raises(AttributeError, match="'Broken' object has no attribute 'rows'"):
        dataset_size_of(loader)


class Unknown(Dataset):
    def __getitem__(self, index):
        return index

    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize("loader", [None, [1, 2], DataLoader(Unknown(), batch_sampler=[[0, 1]])])
def test_what_has_no_length_has_no_size(loader):
    assert dataset_size_of(loader) is None


ROWS = list(range(50))


@pytest.mark.parametrize(
    ("loader", "batches", "size"),
    [
        (DataLoader(ROWS, 8), None, 50),
        (DataLoader(ROWS, 8), 7, 50),
        (DataLoader(ROWS, 8), 1, 8),  # overfit_batches=1: the same batch at every step
        (DataLoader(ROWS, 8), float("inf"), 50),
        (DataLoader(ROWS, 8, shuffle=True), 2, 50),  # others come in the next epoch
        (DataLoader(ROWS, batch_sampler=BatchSampler(range(50), 5, False)), 2, 50),  # of no known order
        (DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 5, False)), 2, 50),
        (DataLoader(ROWS, 5, sampler=DistributedSampler(ROWS, 2, 0, shuffle=False)), 3, 30),
        (DataLoader(ROWS, 5, sampler=DistributedSampler(ROWS, 2, 0, shuffle=True)), 3, 50),
    ],
)
def test_of_an_unshuffled_loader_only_what_an_epoch_takes_is_trained_on(loader, batches, size):
    assert dataset_size_of(loader, batches) == size
