"""Exchanges through a store: one answer for all, one bounded wait, and nothing left behind."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from gradiometer import parallel
from gradiometer.parallel import ApartError, Meeting


def meet(*scripts, seconds=0.4):
    """Run ``scripts[rank](meeting)`` in threads; what each returned or was refused with, and the store."""
    store, results = dist.HashStore(), [None] * len(scripts)

    def run(rank):
        try:
            results[rank] = scripts[rank](Meeting(store, rank, len(scripts), seconds))
        except ApartError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(scripts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results, store


def test_without_a_process_group_there_is_one_process():
    assert parallel.world_size() == 1


@pytest.mark.parametrize("world", [2, 3, 5])
def test_all_get_the_first_processs_answer_and_keys_do_not_pile_up(world):
    def exchanges(count):
        return lambda rank: (
            lambda meeting: [meeting.exchange((rank, turn), lambda posts: posts) for turn in range(count)]
        )

    stores = []
    for count in (3, 30):
        results, store = meet(*(exchanges(count)(rank) for rank in range(world)))
        expected = [[(rank, turn) for rank in range(world)] for turn in range(count)]
        assert results == [expected] * world
        stores.append(store.num_keys())
    assert stores[0] == stores[1]


def test_what_is_larger_than_one_value_of_a_store_arrives(monkeypatch):
    monkeypatch.setattr(parallel, "_PIECE", 1000)
    data = torch.arange(3000.0)
    results, store = meet(
        lambda meeting: [meeting.exchange(data, lambda posts: posts[1]) for _ in range(2)][-1],
        lambda meeting: [meeting.exchange(2 * data, lambda posts: posts[1]) for _ in range(2)][-1],
    )
    assert all(torch.equal(result, 2 * data) for result in results)
    assert store.num_keys() < 30  # those of the last answer


def test_what_is_larger_than_a_tcp_store_takes_arrives():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    data = torch.arange(9 * 2**18, dtype=torch.float32)  # 9 MiB, where 8 are refused
    assert torch.equal(Meeting(store, 0, 1, 5.0).exchange(data, lambda posts: posts[0]), data)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_process_that_does_not_come_costs_one_wait_and_all_know_the_same(absent):
    def come(meeting):
        began = time.perf_counter()
        with pytest.raises(ApartError) as first:
            meeting.exchange("here", lambda posts: posts)
        return str(first.value), time.perf_counter() - began

    def late(meeting):
        time.sleep(1.0)
        return come(meeting)

    results, _ = meet(*(late if rank == absent else come for rank in range(3)))
    assert len({reason for reason, _ in results}) == 1
    assert results[0][0] == f"process {absent} did not come within 0.4 s"
    waits = [seconds for _, seconds in results]
    assert waits[absent] < 0.3  # the word is there already
    assert max(waits) < 0.9


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_nobody_waits_for_a_process_that_has_left(leaver):
    def script(rank):
        def run(meeting):
            assert meeting.exchange(rank, sum) == 3
            if rank == leaver:
                return meeting.leave()
            began = time.perf_counter()
            with pytest.raises(ApartError) as error:
                meeting.exchange(rank, sum)
            assert time.perf_counter() - began < 5
            return str(error.value)

        return run

    results, _ = meet(*(script(rank) for rank in range(3)), seconds=15)
    expected = f"process {leaver} has closed its monitor"
    assert results == [None if rank == leaver else expected for rank in range(3)]


def test_a_process_that_leaves_before_the_answer_is_heard_by_all():
    def leave(meeting):
        meeting.post("here")
        meeting.leave()
        return "left"

    def lead(meeting):
        time.sleep(0.2)
        return meeting.exchange("here", lambda posts: posts)

    results, _ = meet(lead, leave, seconds=15)
    assert results == ["process 1 has closed its monitor", "left"]


def test_a_refusal_of_the_first_process_is_every_ones():
    def refuse(posts):
        raise ApartError(f"{posts} do not fit")

    results, _ = meet(*(lambda meeting, rank=rank: meeting.exchange(rank, refuse) for rank in range(2)))
    assert results == ["[0, 1] do not fit"] * 2


def test_a_store_that_is_gone_is_said_and_leaving_it_is_no_error():
    class Gone(dist.HashStore):
        def set(self, key, value):
            raise dist.DistNetworkError("Connection reset by peer")

    meeting = Meeting(Gone(), 1, 2, 0.1)
    with pytest.raises(ApartError, match="cannot be reached"):
        meeting.exchange("here", lambda posts: posts)
    meeting.leave()
