"""Split an update's samples over the ranks: the batch plan, a pure function of the world size in exact integers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

from launcher.errors import UsageError

__all__ = ["BatchPlan", "BatchPolicy", "PlanError", "most_divisible_batch", "plan_batch", "split_evenly"]


class PlanError(UsageError):
    """No plan meets the request at this world size. The message names the key, the value and the fix."""


@dataclass(frozen=True)
class BatchPolicy:
    """How the batch depends on the world size; validated by `plan_batch`.

    scale: global = world size x per_device x accumulation (None counts as 1).
    hold: the global batch is fixed and per_device limits the micro-batch; accumulation=None is the smallest that fits.
    bounded: global = clamp(world size x per_device x accumulation, min_global, max_global), split as under hold with
    the smallest accumulation that fits; a bound of None is not applied.
    `allow_idle`: whether a plan may leave a worker without samples.
    """

    kind: Literal["scale", "hold", "bounded"]
    per_device: int
    accumulation: int | None = None
    global_batch: int | None = None
    min_global: int | None = None
    max_global: int | None = None
    allow_idle: bool = False


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of one update are split over the ranks.

    `shares` are the samples per update by rank, `per_device` is the largest micro-batch and `accumulation` the largest
    number of micro-batches of any rank. Every rank makes `accumulation` micro-batches, or one per sample if its share
    is smaller. With `minimal_micro_batches` each rank makes only as many as its share needs at `per_device`, so that
    a small share is not cut into needlessly small pieces.
    """

    world: int
    shares: tuple[int, ...]
    per_device: int
    accumulation: int
    minimal_micro_batches: bool = False

    @cached_property
    def global_batch(self) -> int:
        """Samples per update over all ranks."""
        return sum(self.shares)

    @cached_property
    def share_starts(self) -> tuple[int, ...]:
        """For each rank, how many samples of the update belong to the ranks before it."""
        return tuple(accumulate(self.shares[:-1], initial=0))

    @cached_property
    def most_micro_batches(self) -> int:
        """The largest number of micro-batches of any rank."""
        return max(len(self.micro_batches(rank)) for rank in range(self.world))

    def micro_batches(self, rank: int) -> tuple[int, ...]:
        """Sizes of the rank's micro-batches, larger first, which differ by at most one; empty without a share."""
        share = self.shares[rank]
        return split_evenly(
            share,
            _ceil_div(share, self.per_device) if self.minimal_micro_batches else min(self.accumulation, share),
        )

    def rng_keys(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(rank, index) of each of the rank's micro-batches, from which its random generators are seeded."""
        return tuple((rank, index) for index in range(len(self.micro_batches(rank))))

    def cuts(self, rank: int) -> tuple[tuple[int, int, int, int], ...]:
        """(start, stop, shard, index) of each of the rank's micro-batches, counted from the update's first sample."""
        if rank not in self._cuts_by_rank:
            ends = pairwise(accumulate(self.micro_batches(rank), initial=self.share_starts[rank]))
            keys = self.rng_keys(rank)
            self._cuts_by_rank[rank] = tuple((*cut, *key) for cut, key in zip(ends, keys, strict=True))
        return self._cuts_by_rank[rank]

    @cached_property
    def _cuts_by_rank(self) -> dict[int, tuple[tuple[int, int, int, int], ...]]:
        return {}

    def truncated(self, samples: int) -> BatchPlan:
        """This plan for an update of fewer samples: the partial batch at the end of an epoch or of the run.

        The samples are split in proportion to the shares and no share grows. Ranks may get no samples; with equal
        shares the last ranks first. Micro-batches stay within `per_device`.

        Raises:
            ValueError: unless 1 <= samples <= global_batch.
        """
        if not 1 <= samples <= self.global_batch:
            raise ValueError(f"{samples} samples are not between 1 and the global batch of {self.global_batch}")
        if samples == self.global_batch:
            return self
        return _plan_fewest_micro_batches(_split_by_speed(samples, self.shares), self.per_device)


def plan_batch(policy: BatchPolicy, world: int, speeds: Sequence[float] | None = None) -> BatchPlan:
    """Plan the batch of one update for `world` ranks; O(world log world).

    `speeds` are relative, one per rank. Shares are proportional to them, rounded down; each remaining sample goes to
    the rank with the smallest (share + 1) / speed, ties to the lower rank. Without speeds the shares differ by at most
    one, larger ones first.

    Raises:
        PlanError: the policy is invalid or cannot be met at this world size.
    """
    _check_request(policy, world, speeds)
    total, source = _choose_global_batch(policy, world)
    if total < world and not policy.allow_idle:
        raise PlanError(f"{source}={total} is below {world} workers: type {source}={world} or more, {_IDLE_HINT}")
    shares = split_evenly(total, world) if speeds is None else _split_by_speed(total, speeds)
    if not policy.allow_idle and speeds is not None and 0 in shares:
        raise _empty_rank_error(policy, source, shares, speeds)
    if policy.kind == "scale":
        return _plan_fewest_micro_batches(shares, policy.per_device)
    return _plan_equal_accumulation(shares, policy, policy.accumulation if policy.kind == "hold" else None)


_IDLE_HINT = "or elastic.allow_idle=true"
_TOLERANCE_DENOMINATOR = 10**12


def _check_request(policy: BatchPolicy, world: int, speeds: Sequence[float] | None) -> None:
    if policy.kind not in ("scale", "hold", "bounded"):
        raise PlanError(f"batch.policy={policy.kind} is not a policy: type batch.policy=scale, hold or bounded")
    if world < 1:
        raise PlanError(f"a world size of {world} is too small: start 1 worker or more")
    sizes = {
        "per_device": policy.per_device,
        "accumulation": policy.accumulation,
        "global": policy.global_batch,
        "min_global": policy.min_global,
        "max_global": policy.max_global,
    }
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise PlanError(f"batch.{name}={size} is not a whole number >= 1: type batch.{name}=1 or more")
    _check_bounds(policy)
    if speeds is not None:
        _check_speeds(speeds, world)


def _check_bounds(policy: BatchPolicy) -> None:
    """Check that the policy has the keys it needs and none that it would ignore."""
    if policy.kind == "hold" and policy.global_batch is None:
        raise PlanError("batch.policy=hold needs a global batch: type batch.global=256 or another number")
    if policy.kind != "hold" and policy.global_batch is not None:
        raise PlanError(
            f"batch.global={policy.global_batch} has no effect under batch.policy={policy.kind}: "
            f"type batch.policy=hold, or batch.global=null"
        )
    low, high = policy.min_global, policy.max_global
    if policy.kind != "bounded" and (low is not None or high is not None):
        name, bound = ("min_global", low) if low is not None else ("max_global", high)
        raise PlanError(
            f"batch.{name}={bound} has no effect under batch.policy={policy.kind}: "
            f"type batch.policy=bounded, or batch.{name}=null"
        )
    if low is not None and high is not None and low > high:
        raise PlanError(f"batch.min_global={low} is above batch.max_global={high}: type batch.max_global={low} or more")


def _check_speeds(speeds: Sequence[float], world: int) -> None:
    if len(speeds) != world:
        raise PlanError(f"{len(speeds)} speeds for {world} workers: give one speed per worker")
    for rank, speed in enumerate(speeds):
        if not (math.isfinite(speed) and speed > 0):
            raise PlanError(f"the speed {speed} of rank {rank} is not a number above 0: give relative speeds, e.g. 1.0")


def _choose_global_batch(policy: BatchPolicy, world: int) -> tuple[int, str]:
    """Samples per update, and the key that determined them."""
    if policy.global_batch is not None:
        return policy.global_batch, "batch.global"
    total = world * policy.per_device * (policy.accumulation or 1)
    if policy.min_global is not None and total < policy.min_global:
        return policy.min_global, "batch.min_global"
    if policy.max_global is not None and total > policy.max_global:
        return policy.max_global, "batch.max_global"
    return total, "batch.per_device"


def _plan_equal_accumulation(shares: tuple[int, ...], policy: BatchPolicy, accumulation: int | None) -> BatchPlan:
    """The plan in which all ranks make the same number of micro-batches, none larger than the cap."""
    cap, largest = policy.per_device, max(shares)
    needed = _ceil_div(largest, cap)
    if accumulation is not None and accumulation < needed:
        raise PlanError(
            f"batch.accumulation={accumulation} gives micro-batches of {_ceil_div(largest, accumulation)} "
            f"at world size {len(shares)}, above batch.per_device={cap}: "
            f"type batch.accumulation={needed} or more, or batch.accumulation=auto"
        )
    count = min(accumulation or needed, largest)
    return BatchPlan(len(shares), shares, _ceil_div(largest, count), count)


def _plan_fewest_micro_batches(shares: tuple[int, ...], cap: int) -> BatchPlan:
    """The plan in which each rank makes the fewest micro-batches that the cap allows."""
    counts = [_ceil_div(share, cap) for share in shares]
    accumulation = max(counts)
    per_device = max(_ceil_div(share, count) for share, count in zip(shares, counts, strict=True) if count)
    uneven = any(count != min(accumulation, share) for share, count in zip(shares, counts, strict=True))
    return BatchPlan(len(shares), shares, per_device, accumulation, minimal_micro_batches=uneven)


def _empty_rank_error(policy: BatchPolicy, source: str, shares: Sequence[int], speeds: Sequence[float]) -> PlanError:
    """The error for a rank that is too slow to get a sample, with the batch size at which it would get one.

    At that size every rank has floor(its speed / the slowest speed) samples; the quotient is increased by 1e-12,
    since the quotients compared in `_split_by_speed` are floats.
    """
    weights = _scale_to_integers(speeds)
    slowest = min(weights)
    needed = sum(weight * (_TOLERANCE_DENOMINATOR + 1) // (slowest * _TOLERANCE_DENOMINATOR) for weight in weights)
    if source == "batch.per_device":
        needed = _ceil_div(needed, len(shares) * (policy.accumulation or 1))
    value = policy.per_device if source == "batch.per_device" else sum(shares)
    return PlanError(
        f"{source}={value}: rank {shares.index(0)} is too slow to get a sample: "
        f"type {source}={needed} or more, {_IDLE_HINT}"
    )


def _split_by_speed(total: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Split `total` by relative speeds: quotas rounded down, then each sample to the smallest (share + 1) / speed.

    A speed of zero gets nothing. The quotas are exact; mathematically equal quotients are equal as floats too.
    """
    weights = _scale_to_integers(speeds)
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    queue = [((share + 1) / speeds[rank], rank) for rank, share in enumerate(shares) if weights[rank]]
    heapq.heapify(queue)
    for _ in range(total - sum(shares)):
        rank = queue[0][1]
        shares[rank] += 1
        heapq.heapreplace(queue, ((shares[rank] + 1) / speeds[rank], rank))
    return tuple(shares)


def _scale_to_integers(speeds: Sequence[float]) -> list[int]:
    """The speeds as integers in exactly the same proportions; a float's denominator is a power of two."""
    ratios = [speed.as_integer_ratio() for speed in speeds]
    scale = max(denominator for _, denominator in ratios)
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """Split `total` into `parts` integers that differ by at most one, larger first."""
    if not parts:
        return ()
    size, larger = divmod(total, parts)
    return (size + 1,) * larger + (size,) * (parts - larger)


def _ceil_div(amount: int, per: int) -> int:
    return -(-amount // per)


def most_divisible_batch(
    micro_batches: Iterable[int],
    max_batch: int,
    min_world: int,
    max_world: int,
    world_sizes: Collection[int] | None = None,
) -> tuple[int, tuple[int, ...]]:
    """The batch size of at most `max_batch` that fits the most world sizes, and those world sizes, ascending.

    The world sizes are those from `min_world` to `max_world`, or those of `world_sizes` within that range. A world size
    fits if some micro-batch divides batch / world size; ties go to the larger batch. This is the problem of DeepSpeed's
    elastic training (v0.1); here every batch size is tried. Time grows as max_batch x log(max_world / min_world),
    memory as max_batch.

    Raises:
        PlanError: no world size in the range fits, or an argument is invalid.
    """
    micros = sorted(set(micro_batches))
    if not micros or micros[0] < 1 or not 1 <= min_world <= max_world:
        raise PlanError(
            f"micro-batches {micros} on {min_world} to {max_world} workers: "
            "give micro-batches >= 1 and an ascending range of workers from 1"
        )
    in_range = range(min_world, max_world + 1)
    candidates = in_range if world_sizes is None else sorted(set(world_sizes).intersection(in_range))
    least = micros[0] * min(candidates, default=min_world)
    if max_batch < least:
        raise PlanError(
            f"no batch of at most {max_batch} divides into micro-batches of {micros} on {min_world} to {max_world} "
            f"workers: allow a batch of {least} or more"
        )
    counts = _count_fitting_worlds(micros, max_batch, candidates)
    batch = max(range(least, max_batch + 1), key=lambda size: (counts[size], size))
    return batch, tuple(size for size in candidates if any(batch % (micro * size) == 0 for micro in micros))


def _count_fitting_worlds(micros: Sequence[int], max_batch: int, world_sizes: Sequence[int]) -> list[int]:
    """For each batch size the number of world sizes that fit, by a sieve over the multiples of world x micro-batch."""
    prime = [micro for micro in micros if not any(micro % other == 0 for other in micros if other < micro)]
    counts = [0] * (max_batch + 1)
    latest = [0] * (max_batch + 1)
    for world_size in world_sizes:
        if world_size * micros[0] > max_batch:
            break
        for micro in prime:
            for batch in range(world_size * micro, max_batch + 1, world_size * micro):
                if latest[batch] != world_size:
                    latest[batch] = world_size
                    counts[batch] += 1
    return counts
