"""The batch in virtual shards (`elastic.exact`): what is added to what, and in which order, at any world size.

Floating-point addition is not associative, so a sum over workers depends on how many there are. Here an update is cut
into a fixed number of shards, whoever computes them, and what they give is added as ((0+1)+(2+3))+…: a tree whose
subtrees lie whole on a rank wherever the number of ranks is a power of two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher.batch import BatchPlan, level

__all__ = ["ShardPlan", "Tree", "trainers", "tree_sum"]


class Tree:
    """Values added in a fixed binary tree as they come; of n values log2(n) sums are held, never all of them.

    A number of values that is no power of two gives what zeros in the missing places would.
    """

    def __init__(self) -> None:
        self.size = 0
        self._held: list[Any] = []  # sums of descending powers of two of values: the ones in the binary `size`

    def add(self, value: Any) -> None:
        carried = self.size
        while carried & 1:
            value = self._held.pop() + value
            carried >>= 1
        self._held.append(value)
        self.size += 1

    def total(self) -> Any:
        """0.0 where nothing was added."""
        total = self._held[-1] if self._held else 0.0
        for value in reversed(self._held[:-1]):
            total = value + total
        return total


def tree_sum(values: Iterable[Any]) -> Any:
    """((0+1)+(2+3))+…: the same for the ranks' sums as for the values of all ranks one after the other, where the
    ranks have equal powers of two of them."""
    tree = Tree()
    for value in values:
        tree.add(value)
    return tree.total()


def trainers(world: int, shards: int) -> int:
    """How many of `world` ranks train: the largest power of two that neither the ranks nor the shards fall short of."""
    return 1 << (min(world, shards).bit_length() - 1)


@dataclass(frozen=True)
class ShardPlan(BatchPlan):
    """A batch in shards, `shards` their sizes. The first ranks have equal numbers of consecutive ones, the rest none.

    A micro-batch never spans two shards, and its size depends on its shard alone: not on the world size.
    """

    shards: tuple[int, ...] = ()

    @classmethod
    def of(cls, samples: int, world: int, shards: int, cap: int) -> ShardPlan:
        """`samples` in shards whose sizes differ by at most one, larger first; a small tail leaves some empty."""
        sizes = level(samples, shards)
        own = shards // trainers(world, shards)
        largest = _cut(sizes[0], cap)[0]
        pieces = [len(_cut(size, largest)) for size in sizes]
        return cls(
            world=world,
            shares=tuple(sum(sizes[rank * own : (rank + 1) * own]) for rank in range(world)),
            per_device=largest,
            accumulation=max(sum(pieces[start : start + own]) for start in range(0, shards, own)),
            fewest=True,
            shards=sizes,
        )

    @cached_property
    def own(self) -> int:
        """Shards of each rank that trains."""
        return len(self.shards) // trainers(self.world, len(self.shards))

    def micro_batches(self, rank: int) -> tuple[int, ...]:
        return tuple(size for shard in self._of(rank) for size in _cut(self.shards[shard], self.per_device))

    def addresses(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(shard, index within it) of each micro-batch."""
        cuts = ((shard, _cut(self.shards[shard], self.per_device)) for shard in self._of(rank))
        return tuple((shard, index) for shard, sizes in cuts for index in range(len(sizes)))

    def part(self, samples: int) -> BatchPlan:
        """The same number of shards of fewer samples. ValueError unless 1 <= samples <= global_batch."""
        if not 1 <= samples <= self.global_batch:
            raise ValueError(f"{samples} samples are no part of a batch of {self.global_batch}")
        return ShardPlan.of(samples, self.world, len(self.shards), self.per_device)

    def _of(self, rank: int) -> range:
        return range(len(self.shards))[rank * self.own : (rank + 1) * self.own]


def _cut(size: int, cap: int) -> tuple[int, ...]:
    return level(size, -(-size // cap))
