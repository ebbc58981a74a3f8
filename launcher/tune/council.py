"""What the ranks agree on between updates, through the job's store: no collective is needed, and none can hang."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["Council"]


class Council:
    """Rounds in which every rank says one JSON value and hears all."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._round = 0

    def gather(self, word: Any) -> list[Any]:
        """Every rank's word, in order of rank; waits for all of them."""
        if self._world == 1:
            return [word]
        self._round += 1
        self._store.set(self._key(self._round, self._rank), json.dumps(word))
        if self._round > 2:  # whoever has begun this round has heard the one before the last
            self._store.delete_key(self._key(self._round - 2, self._rank))
        return [json.loads(self._store.get(self._key(self._round, rank))) for rank in range(self._world)]

    def of_first(self, word: Any) -> Any:
        """Rank 0's word on every rank: what depends on a clock is decided there."""
        return self.gather(word)[0]

    def adjourn(self) -> None:
        """The last word: rank 0, which may serve the store, stays until the others have heard all."""
        if self._rank:
            self._store.set(f"council/heard/{self._rank}", "")
        else:
            self._store.wait([f"council/heard/{rank}" for rank in range(1, self._world)])

    def _key(self, number: int, rank: int) -> str:
        return f"council/{number}/{rank}"
