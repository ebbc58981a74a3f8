"""All-gather of JSON values between updates through the job's store, without a collective that could hang."""

from __future__ import annotations

import json
import zlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["StoreGather"]


class StoreGather:
    """Gathers one JSON value per rank on all ranks; every rank must make the same sequence of calls.

    Rank 0 reads the values of all ranks in one request and writes them as one value, which the other ranks read: a few
    requests per rank at any number of ranks. That value is compressed, as a store limits the size of a value.
    """

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._round = 0
        self._sent: list[str] = []  # keys that rank 0 has written and other ranks may still read

    def gather(self, value: Any, within_s: float | None = None) -> list[Any]:
        """Return the values of all ranks in rank order; waits for all of them.

        Raises:
            RuntimeError: the rank that serves the store was lost, or not all ranks called this within `within_s`
                seconds (None: within the store's own timeout).
        """
        if self._world == 1:
            return [value]
        self._round += 1
        if self._rank == 0:
            keys = [self._make_key(str(rank)) for rank in range(1, self._world)]
            self._wait(keys, within_s)
            values = [value, *map(json.loads, self._store.multi_get(keys))]
            for key in self._sent:  # all ranks have begun this gather, so they have read everything before
                self._store.delete_key(key)
            self._sent = []
            return list(self._send(values))
        own_key = self._make_key(str(self._rank))
        self._store.set(own_key, json.dumps(value))
        self._wait([self._make_key("all")], within_s)
        values = list(self._receive())
        self._store.delete_key(own_key)
        return values

    def broadcast_from_rank0(self, value: Any) -> Any:
        """Return rank 0's value on every rank, for decisions that depend on a clock."""
        if self._world == 1:
            return value
        self._round += 1
        return self._send(value) if self._rank == 0 else self._receive()

    def _wait(self, keys: list[str], within_s: float | None) -> None:
        self._store.wait(keys, *([] if within_s is None else [timedelta(seconds=within_s)]))

    def _send(self, value: Any) -> Any:
        """Write a value for all ranks and return it as they read it."""
        text = json.dumps(value)
        self._store.set(self._make_key("all"), zlib.compress(text.encode(), level=1))  # type: ignore[arg-type]
        self._sent.append(self._make_key("all"))
        return json.loads(text)

    def _receive(self) -> Any:
        return json.loads(zlib.decompress(self._store.get(self._make_key("all"))))

    def close(self) -> None:
        """Finish: rank 0, which may serve the store, waits until the other ranks have read everything."""
        if self._rank:
            self._store.set(f"gather/done/{self._rank}", "")
        else:
            self._store.wait([f"gather/done/{rank}" for rank in range(1, self._world)])

    def _make_key(self, who: str) -> str:
        return f"gather/{self._round}/{who}"
