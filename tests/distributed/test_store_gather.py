"""Gathering values of all ranks through the store."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from launcher.distributed.rendezvous import make_loopback_store
from launcher.distributed.store_gather import StoreGather
from tests.helpers.counted_store import CountedStore, run_ranks


def test_store_host_waits_for_other_ranks() -> None:
    """This rank may host the store: if it exits early, the others receive nothing."""
    store = dist.HashStore()
    thread = threading.Thread(target=StoreGather(store, 0, 2).close)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    StoreGather(store, 1, 2).close()
    thread.join(10)
    assert not thread.is_alive()
    StoreGather(store, 0, 1).close()


def test_every_rank_gets_the_values_of_all() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(gather_three, StoreGather(store, rank, 2), rank) for rank in (0, 1)]
        assert [future.result(10) for future in both] == [[[0, 10], [1, 11], [2, 12]]] * 2
    assert StoreGather(store, 0, 1).gather(0.5, 1.0) == [0.5]


def gather_three(gather: StoreGather, rank: int) -> list[list[int]]:
    return [gather.gather(10 * rank + call, within_s=10.0) for call in range(3)]


def test_rank_that_does_not_come_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="timeout"):
        StoreGather(dist.HashStore(), 0, 2).gather(0.0, within_s=0.05)


def test_rank_is_told_that_the_store_is_gone() -> None:
    """As where the rank that serves it is killed."""
    ports, ends = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=serve_store, args=(ends,))
    server.start()
    store = make_loopback_store(ports.recv(), serve=False, world=2)
    threading.Timer(0.2, server.kill).start()
    with pytest.raises(RuntimeError):
        StoreGather(store, 1, 2).gather(0.0, within_s=60.0)
    server.join()


def serve_store(ends: Any) -> None:
    store = make_loopback_store(0, serve=True, world=2)
    ends.send(store.port)
    time.sleep(60)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_all_ranks_get_all_values_in_rank_order(world: int) -> None:
    """Rounds of both kinds in turn; rank 0 may be several broadcasts ahead of the others."""
    store = dist.HashStore()

    def run(rank: int) -> list[Any]:
        gather = StoreGather(store, rank, world)
        first = gather.gather({"rank": rank})
        decisions = [gather.broadcast_from_rank0([rank, number]) for number in range(5)]
        return [first, decisions, gather.gather(rank), gather.gather(rank * 2)]

    expected = [
        [{"rank": rank} for rank in range(world)],
        [[0, number] for number in range(5)],
        [*range(world)],
        [*range(0, 2 * world, 2)],
    ]
    assert run_ranks(world, run) == [expected] * world
    assert store.num_keys() <= 1


def test_number_of_requests_of_a_rank_does_not_grow_with_the_ranks() -> None:
    requests = {}
    for world in (2, 16):
        store = dist.HashStore()
        stores = [CountedStore(store) for _ in range(world)]

        def run(rank: int, world: int = world, stores: list[CountedStore] = stores) -> None:
            gather = StoreGather(stores[rank], rank, world)  # type: ignore[arg-type]
            for number in range(4):
                gather.gather(number)
                gather.broadcast_from_rank0(number)

        run_ranks(world, run)
        requests[world] = [stores[0].requests, max(each.requests for each in stores[1:])]
    assert requests[16] == requests[2]
    assert max(requests[16]) <= 4 * 6
