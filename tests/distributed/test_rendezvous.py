"""The first messages of the ranks: rank 0 gets all of them, whatever earlier generations left in the store."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist

from launcher.distributed import rendezvous
from launcher.distributed.rendezvous import answer_hellos, gather_to_rank0
from launcher.topology import Topology
from tests.helpers.counted_store import CountedStore, run_ranks

TIMEOUT_S = 20.0


def make_topology(rank: int, world: int) -> Topology:
    return Topology(rank=rank, world=world)


def gather(store: dist.Store, rank: int, world: int) -> tuple[list[str], dist.Store]:
    return gather_to_rank0(store, make_topology(rank, world), f"message {rank}", TIMEOUT_S)


@pytest.mark.parametrize("world", [1, 2, 7])
def test_rank0_gets_every_message_in_each_generation(world: int) -> None:
    store = dist.HashStore()
    for _ in range(3):
        (messages, section), *others = run_ranks(world, lambda rank: gather(store, rank, world))
        assert messages == [f"message {rank}" for rank in range(world)]
        section.set("key", "of this generation")
        assert all(not texts and each.get("key") == b"of this generation" for texts, each in others)


def test_hello_of_an_earlier_generation_is_replaced() -> None:
    """Rank 0 answers the old hello first, and rank 1 arrives later."""
    store = dist.HashStore()
    store.set("hello/1", "an old token")
    messages: list[Any] = []
    rank0 = threading.Thread(target=lambda: messages.append(gather(store, 0, 2)[0]))
    rank0.start()
    store.wait(["answer/an old token"])
    gather(store, 1, 2)
    rank0.join(TIMEOUT_S)
    assert messages == [["message 0", "message 1"]]


def test_missing_ranks_are_named() -> None:
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not connect within launch.timeout_s=0.1"):
        answer_hellos(store, 3, "token", 0.1)
    store.set("hello/1", "one")
    store.set("hello/2", "two")  # of an earlier generation: no message follows
    store.set("token/1", "")
    with pytest.raises(TimeoutError, match=r"ranks \[2\] did not connect"):
        answer_hellos(store, 3, "token", 0.1)
    with pytest.raises(TimeoutError, match=r"rank 0 did not answer within launch.timeout_s=0.1"):
        gather_to_rank0(dist.HashStore(), make_topology(1, 2), "", 0.1)


def test_number_of_requests_does_not_grow_with_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = {}
    for world in (2, 24):
        store = dist.HashStore()
        for rank in range(1, world):
            store.set(f"hello/{rank}", f"hello-{rank}")
        counted = CountedStore(store)

        def send_messages(_: float, world: int = world, store: dist.Store = store) -> None:
            for rank in range(1, world):
                assert store.get(f"answer/hello-{rank}") == b"token"
                store.set(f"token/{rank}", str(rank))

        monkeypatch.setattr(rendezvous.time, "sleep", send_messages)
        assert answer_hellos(counted, world, "token", TIMEOUT_S) == [str(rank) for rank in range(1, world)]  # type: ignore[arg-type]
        requests[world] = counted.requests
    assert requests[24] == requests[2] <= 6
