"""What a loader says about its data set."""

import pytest
from torch.utils.data import DataLoader, Dataset

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
