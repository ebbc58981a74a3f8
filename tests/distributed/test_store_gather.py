"""Gathering values of all ranks through the store."""

from __future__ import annotations

import threading

import torch.distributed as dist

from launcher.distributed.store_gather import StoreGather


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
