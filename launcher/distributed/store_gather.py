"""All-gather of JSON values between updates through the job's store, without a collective that could hang."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["StoreGather"]


class StoreGather:
    """Gathers one JSON value per rank on all ranks; every rank must make the same sequence of calls."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._round = 0

    def gather(self, value: Any, within_s: float | None = None) -> list[Any]:
        """Return the values of all ranks in rank order; waits for all of them.

        Raises:
            RuntimeError: the rank that serves the store was lost, or not all ranks called this within `within_s`
                seconds (None: within the store's own timeout).
        """
        if self._world == 1:
            return [value]
        self._round += 1
        self._store.set(self._make_key(self._round, self._rank), json.dumps(value))
        if self._round > 2:  # a rank that has begun this gather has read the one before the previous
            self._store.delete_key(self._make_key(self._round - 2, self._rank))
        keys = [self._make_key(self._round, rank) for rank in range(self._world)]
        self._store.wait(keys, *([] if within_s is None else [timedelta(seconds=within_s)]))
        return [json.loads(self._store.get(key)) for key in keys]

    def broadcast_from_rank0(self, value: Any) -> Any:
        """Return rank 0's value on every rank, for decisions that depend on a clock."""
        return self.gather(value)[0]

    def close(self) -> None:
        """Finish: rank 0, which may serve the store, waits until the other ranks have read everything."""
        if self._rank:
            self._store.set(f"gather/done/{self._rank}", "")
        else:
            self._store.wait([f"gather/done/{rank}" for rank in range(1, self._world)])

    def _make_key(self, call: int, rank: int) -> str:
        return f"gather/{call}/{rank}"
