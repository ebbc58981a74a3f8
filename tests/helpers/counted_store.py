"""A store that counts the requests that one rank makes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


class CountedStore:
    """Passes every call on to a store and counts it."""

    def __init__(self, store: dist.Store) -> None:
        self.requests = 0
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any, **options: Any) -> Any:
            self.requests += 1
            return method(*args, **options)

        return call


def run_ranks(world: int, rank_function: Callable[[int], Result]) -> list[Result]:
    """Run a function for each rank in a thread of its own; return the results in rank order."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank_function, range(world)))
