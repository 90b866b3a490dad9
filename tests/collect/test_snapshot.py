"""A snapshot holds what was supplied, refuses the rest by name, and never changes."""

import copy
import dataclasses
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn

from gradiometer import GradientNoiseScale, MemoryRecorder, Monitor, Observable, Quantity, Snapshot
from gradiometer.collect import snapshot as module
from gradiometer.errors import InputError, MissingFieldError
from gradiometer.observables.noise_curvature import curvature_of_noise, noise_curvature


def test_only_what_was_supplied_is_there():
    snapshot = Snapshot(step=3, batch_size=8)
    assert (snapshot.step, snapshot.batch_size, snapshot.loss_reduction, snapshot.loss_fn) == (
        3,
        8,
        "mean",
        None,
    )
    assert [name for name in Snapshot.__annotations__ if snapshot.has(name)] == [
        "step",
        "batch_size",
        "loss_reduction",
        "loss_fn",
    ]
    assert not snapshot.has("nothing_of_this_name")
    with pytest.raises(
        MissingFieldError, match=r"snapshot of step 3 has no 'dataset_size'. It is supplied by Mon"
    ):
        snapshot.dataset_size  # noqa: B018
    with pytest.raises(MissingFieldError, match=r"It is supplied by Snapshot\(model=...\)"):
        snapshot.model  # noqa: B018


def test_a_field_that_is_none_was_supplied():
    snapshot = Snapshot(step=0, previous_gradient=None)
    assert snapshot.has("previous_gradient")
    assert snapshot.previous_gradient is None


def test_replace_adds_fields_to_a_copy():
    first = Snapshot(step=0, batch_size=8)
    second = first.replace(batch_size=4, dataset_size=100)
    assert (second.step, second.batch_size, second.dataset_size) == (0, 4, 100)
    assert first.batch_size == 8
    assert not first.has("dataset_size")


def test_it_is_frozen_and_can_be_copied():
    snapshot = Snapshot(step=0, batch_size=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.batch_size = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.dataset_size = 4
    for again in (copy.copy(snapshot), copy.deepcopy(snapshot), pickle.loads(pickle.dumps(snapshot))):
        assert (again.step, again.batch_size) == (0, 8)


def test_what_no_snapshot_has_is_refused():
    with pytest.raises(
        InputError, match=r"no such field, got batchsize. Write one of batch_size, centred_weights"
    ):
        Snapshot(step=0, batchsize=8)
    with pytest.raises(AttributeError, match="no field 'batchsize'"):
        Snapshot(step=0).batchsize  # noqa: B018
    assert not hasattr(Snapshot(step=0), "batchsize")


# -- names that were others ------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), module.RENAMED.items())
def test_an_old_name_of_a_field_still_works_and_says_the_new_one(old, new):
    expected = rf"'{old}' is now called '{new}'"
    with pytest.warns(DeprecationWarning, match=expected):
        snapshot = Snapshot(step=0, **{old: "parts"})
    assert getattr(snapshot, new) == "parts"
    with pytest.warns(DeprecationWarning, match=expected):
        assert getattr(snapshot, old) == "parts"
    with pytest.warns(DeprecationWarning, match=expected):
        assert snapshot.has(old)
    with (
        pytest.warns(DeprecationWarning, match=expected),
        pytest.raises(MissingFieldError, match=f"has no '{new}'"),
    ):
        getattr(Snapshot(step=0), old)


def test_an_observable_that_needs_an_old_name_is_still_served():
    with pytest.warns(DeprecationWarning, match="'chunks' is now called 'gradient_parts'") as caught:

        class OldNames(Observable):
            group = "old"
            quantities: ClassVar = {"norm": Quantity("1", "A norm.")}
            needs = frozenset({"chunks"})

            def statistics(self, snapshot):
                return {"norm": snapshot.chunks.batch_sq_norm}

            def readings(self, now, reference):
                return {"norm": now["norm"].sum(-1)}

    assert caught[0].filename == __file__
    model, memory = nn.Linear(2, 1), MemoryRecorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observables = [OldNames(schedule=1), GradientNoiseScale(schedule=1)]
    with (
        Monitor(model, optimizer, observables, recorders=[memory], on_error="raise") as monitor,
        pytest.warns(DeprecationWarning, match="'chunks'"),
    ):
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        with monitor.micro_batch(x):
            model(x).square().mean().backward()
        monitor.before_step()
        optimizer.step()
    latest = memory.latest()
    assert latest["dynamics/old/norm"].value == latest["dynamics/noise/batch_grad_sq_norm"].value


def test_old_names_of_a_class_and_of_a_function():
    with pytest.warns(DeprecationWarning, match="Chunks is now called GradientParts"):
        assert module.Chunks is module.GradientParts
    with pytest.raises(AttributeError, match="has no attribute 'Chunk'"):
        module.Chunk  # noqa: B018
    gram = torch.outer(torch.arange(3.0), torch.arange(3.0))
    products = gram, gram.expand(3, 3, 3), torch.ones(3)
    with pytest.warns(DeprecationWarning, match=r"is now called noise_curvature\(...\)"):
        old = curvature_of_noise(*products)
    assert old == noise_curvature(*products)
