"""Virtual shards (`elastic.exact`): a summation order that is the same at every world size.

Floating-point addition is not associative, so a sum over workers depends on their number. Here an update is split
into a fixed number of shards, regardless of which rank computes them, and their results are added as
((0+1)+(2+3))+…: a tree in which each rank holds whole subtrees if the number of ranks is a power of two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher.plan.batch import BatchPlan, split_evenly

__all__ = ["ShardPlan", "TreeSum", "compute_tree_sum", "num_training_ranks"]


class TreeSum:
    """Incremental sum in a fixed binary tree, which keeps only about log2(n) partial sums of n values.

    If the number of values is not a power of two, the result is as if zeros were appended.
    """

    def __init__(self) -> None:
        self.size = 0
        self._held: list[Any] = []  # one partial sum per 1 bit of `size`, largest first

    def add(self, value: Any) -> None:
        carried = self.size
        while carried & 1:
            value = self._held.pop() + value
            carried >>= 1
        self._held.append(value)
        self.size += 1

    def total(self) -> Any:
        """The sum of all values; 0.0 if there are none."""
        total = self._held[-1] if self._held else 0.0
        for value in reversed(self._held[:-1]):
            total = value + total
        return total


def compute_tree_sum(values: Iterable[Any]) -> Any:
    """Sum values as ((0+1)+(2+3))+….

    The tree sum of the ranks' tree sums equals that of all values in rank order, if each rank has the same power of
    two of values.
    """
    tree = TreeSum()
    for value in values:
        tree.add(value)
    return tree.total()


def num_training_ranks(world: int, shards: int) -> int:
    """How many of `world` ranks train: the largest power of two that exceeds neither `world` nor `shards`."""
    return 1 << (min(world, shards).bit_length() - 1)


@dataclass(frozen=True)
class ShardPlan(BatchPlan):
    """A batch split into shards of the sizes `shards`.

    The first ranks get equal numbers of consecutive shards, the others none. A micro-batch never spans two shards, and
    its size depends only on its shard, not on the world size.
    """

    shards: tuple[int, ...] = ()

    @classmethod
    def from_batch_size(cls, samples: int, world: int, shards: int, cap: int) -> ShardPlan:
        """Split `samples` into shards that differ by at most one, larger first; few samples leave some shards empty."""
        sizes = split_evenly(samples, shards)
        per_rank = shards // num_training_ranks(world, shards)
        largest = _split_to_micro_batches(sizes[0], cap)[0]
        pieces = [len(_split_to_micro_batches(size, largest)) for size in sizes]
        return cls(
            world=world,
            shares=tuple(sum(sizes[rank * per_rank : (rank + 1) * per_rank]) for rank in range(world)),
            per_device=largest,
            accumulation=max(sum(pieces[start : start + per_rank]) for start in range(0, shards, per_rank)),
            minimal_micro_batches=True,
            shards=sizes,
        )

    @cached_property
    def shards_per_rank(self) -> int:
        """Number of shards of each rank that trains."""
        return len(self.shards) // num_training_ranks(self.world, len(self.shards))

    def micro_batches(self, rank: int) -> tuple[int, ...]:
        return tuple(
            size
            for shard in self._get_shard_range(rank)
            for size in _split_to_micro_batches(self.shards[shard], self.per_device)
        )

    def rng_keys(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(shard, index within it) of each micro-batch."""
        cuts = (
            (shard, _split_to_micro_batches(self.shards[shard], self.per_device))
            for shard in self._get_shard_range(rank)
        )
        return tuple((shard, index) for shard, sizes in cuts for index in range(len(sizes)))

    def truncated(self, samples: int) -> BatchPlan:
        """The same number of shards with fewer samples. ValueError unless 1 <= samples <= global_batch."""
        if not 1 <= samples <= self.global_batch:
            raise ValueError(f"{samples} samples are not between 1 and the global batch of {self.global_batch}")
        if samples == self.global_batch:
            return self
        return ShardPlan.from_batch_size(samples, self.world, len(self.shards), self.per_device)

    def _get_shard_range(self, rank: int) -> range:
        return range(len(self.shards))[rank * self.shards_per_rank : (rank + 1) * self.shards_per_rank]


def _split_to_micro_batches(size: int, cap: int) -> tuple[int, ...]:
    return split_evenly(size, -(-size // cap))
