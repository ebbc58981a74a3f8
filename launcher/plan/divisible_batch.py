"""`launcher plan batch.global=divisible`: the batch that most of the world sizes divide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.plan.batch import most_divisible_batch

__all__ = ["DivisibleBatch", "find_divisible_batch", "hold_divisible_batch"]


@dataclass(frozen=True)
class DivisibleBatch:
    """The batch of at most `max_global` samples that most of the world sizes `candidates` divide.

    `world_sizes` are those that divide it.
    """

    global_batch: int
    max_global: int
    world_sizes: tuple[int, ...]
    candidates: tuple[int, ...]


def find_divisible_batch(config: RunConfig, train_samples: int, world_sizes: Sequence[int]) -> DivisibleBatch:
    """Find the batch, of at most batch.max_global and the training set, for the world sizes that the job accepts.

    A world size divides a batch if all its workers get the same number of samples. Under batch=hold any micro-batch up
    to batch.per_device will do, so that batch.per_device does not restrict the batch.

    Raises:
        UsageError: batch.max_global is not set or too small, or batch.min_global is set.
    """
    low, high = config.elastic.min_workers, config.elastic.max_workers
    accepted = [size for size in world_sizes if low <= size and (high is None or size <= high)]
    candidates = tuple(sorted(set(accepted or world_sizes)))
    if config.batch.max_global is None:
        raise UsageError("batch.global=divisible needs an upper limit: type batch.max_global=4096 or another number")
    if config.batch.min_global is not None:
        raise UsageError(
            f"batch.min_global={config.batch.min_global} has no effect with batch.global=divisible: remove it"
        )
    max_global = min(config.batch.max_global, train_samples)
    if max_global < candidates[0]:
        smallest = f"the smallest world size, {candidates[0]}: type plan.world_sizes=[1,2,4]"
        if train_samples < candidates[0]:
            raise UsageError(f"a training set of {train_samples} samples is below {smallest}")
        raise UsageError(
            f"batch.max_global={max_global} is below {smallest}, or batch.max_global={candidates[0]} or more"
        )
    global_batch, dividing = most_divisible_batch([1], max_global, candidates[0], candidates[-1], candidates)
    return DivisibleBatch(global_batch, max_global, dividing, candidates)


def hold_divisible_batch(config: RunConfig, divisible: DivisibleBatch) -> RunConfig:
    """The configuration that keeps this global batch at every world size."""
    batch = replace(config.batch, policy="hold", global_batch=divisible.global_batch, max_global=None)
    return replace(config, batch=batch)
