"""Who takes how many samples of an update: the batch as a pure function of the world size. Exact integer arithmetic."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from launcher.errors import RequestError

__all__ = ["BatchPlan", "BatchPolicy", "PlanError", "friendly_batch", "level", "plan_batch"]


class PlanError(RequestError):
    """No plan meets the request at this world size. The message names the key, the value and the mend."""


@dataclass(frozen=True)
class BatchPolicy:
    """How the batch follows the number of workers; checked by `plan_batch`.

    scale: global = world x per_device x accumulation (None counts as 1).
    hold: the global batch stays, per_device is a cap on the micro-batch; accumulation None is the smallest that fits.
    bounded: global = clamp(world x per_device x accumulation, min_global, max_global), divided as under hold with the
    smallest accumulation that fits; a bound of None does not bind.
    idle: whether a plan may leave a worker without samples.
    """

    kind: Literal["scale", "hold", "bounded"]
    per_device: int
    accumulation: int | None = None
    global_batch: int | None = None
    min_global: int | None = None
    max_global: int | None = None
    idle: bool = False


@dataclass(frozen=True)
class BatchPlan:
    """One update's samples over the workers.

    `shares` are samples per update by rank, `per_device` is the largest micro-batch of any rank, `accumulation` the
    most micro-batches of any rank. Every rank makes `accumulation` micro-batches, or one per sample where its share is
    smaller; with `fewest` each makes only as many as its share needs at `per_device`, so that a small share is not cut
    into needlessly small pieces.
    """

    world: int
    shares: tuple[int, ...]
    per_device: int
    accumulation: int
    fewest: bool = False

    @cached_property
    def global_batch(self) -> int:
        """Samples per update over all ranks."""
        return sum(self.shares)

    def micro_batches(self, rank: int) -> tuple[int, ...]:
        """Sizes of the rank's micro-batches in order: they differ by at most one, larger first; none for no share."""
        share = self.shares[rank]
        return level(share, _ceil(share, self.per_device) if self.fewest else min(self.accumulation, share))

    def addresses(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(place, index) of each of the rank's micro-batches, to seed its generators by. The place is the rank."""
        return tuple((rank, index) for index in range(len(self.micro_batches(rank))))

    def part(self, samples: int) -> BatchPlan:
        """This plan for an update of fewer samples: an epoch's tail, the run's last update.

        Split in proportion to the shares, none above what it was; ranks may be left without samples, the last first
        where shares are level. Micro-batches stay within `per_device`. ValueError unless 1 <= samples <= global_batch.
        """
        if not 1 <= samples <= self.global_batch:
            raise ValueError(f"{samples} samples are no part of a batch of {self.global_batch}")
        if samples == self.global_batch:
            return self
        return _packed(_split(samples, self.shares), self.per_device)


def plan_batch(policy: BatchPolicy, world: int, speeds: Sequence[float] | None = None) -> BatchPlan:
    """The batch of one update at `world` workers; O(world log world).

    `speeds` are relative, one per rank: shares follow them, and what is left over goes one by one to the smallest
    (share + 1) / speed, ties to the lower rank. Without speeds shares differ by at most one, larger ones first.

    Raises:
        PlanError: the policy cannot be met here, or is no policy at all.
    """
    _check(policy, world, speeds)
    total, source = _global_batch(policy, world)
    if total < world and not policy.idle:
        raise PlanError(f"{source}={total} is below {world} workers: type {source}={world} or more, {_OR_IDLE}")
    shares = level(total, world) if speeds is None else _split(total, speeds)
    if not policy.idle and speeds is not None and 0 in shares:
        raise _starved(policy, source, shares, speeds)
    if policy.kind == "scale":
        return _packed(shares, policy.per_device)
    return _capped(shares, policy, policy.accumulation if policy.kind == "hold" else None)


_OR_IDLE = "or elastic.idle=true"
_FINE = 10**12


def _check(policy: BatchPolicy, world: int, speeds: Sequence[float] | None) -> None:
    if policy.kind not in ("scale", "hold", "bounded"):
        raise PlanError(f"batch.policy={policy.kind} is no policy: type batch.policy=scale, hold or bounded")
    if world < 1:
        raise PlanError(f"a world of {world} workers trains nothing: start 1 worker or more")
    sizes = {
        "per_device": policy.per_device,
        "accumulation": policy.accumulation,
        "global": policy.global_batch,
        "min_global": policy.min_global,
        "max_global": policy.max_global,
    }
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise PlanError(f"batch.{name}={size} is no number of at least 1: type batch.{name}=1 or more")
    _check_bounds(policy)
    if speeds is not None:
        _check_speeds(speeds, world)


def _check_bounds(policy: BatchPolicy) -> None:
    """Each policy has what it needs, and no key is given that it would not heed."""
    if policy.kind == "hold" and policy.global_batch is None:
        raise PlanError("batch.policy=hold needs the batch to hold: type batch.global=256 or another number")
    if policy.kind != "hold" and policy.global_batch is not None:
        raise PlanError(
            f"batch.global={policy.global_batch} has no meaning under batch.policy={policy.kind}: "
            f"type batch.policy=hold, or batch.global=null"
        )
    low, high = policy.min_global, policy.max_global
    if policy.kind != "bounded" and (low is not None or high is not None):
        name, bound = ("min_global", low) if low is not None else ("max_global", high)
        raise PlanError(
            f"batch.{name}={bound} has no meaning under batch.policy={policy.kind}: "
            f"type batch.policy=bounded, or batch.{name}=null"
        )
    if low is not None and high is not None and low > high:
        raise PlanError(f"batch.min_global={low} is above batch.max_global={high}: type batch.max_global={low} or more")


def _check_speeds(speeds: Sequence[float], world: int) -> None:
    if len(speeds) != world:
        raise PlanError(f"{len(speeds)} speeds for {world} workers: give one speed per worker")
    for rank, speed in enumerate(speeds):
        if not (math.isfinite(speed) and speed > 0):
            raise PlanError(f"the speed {speed} of rank {rank} is no number above 0: give relative speeds such as 1.0")


def _global_batch(policy: BatchPolicy, world: int) -> tuple[int, str]:
    """Samples per update, and the key that decided them."""
    if policy.global_batch is not None:
        return policy.global_batch, "batch.global"
    total = world * policy.per_device * (policy.accumulation or 1)
    if policy.min_global is not None and total < policy.min_global:
        return policy.min_global, "batch.min_global"
    if policy.max_global is not None and total > policy.max_global:
        return policy.max_global, "batch.max_global"
    return total, "batch.per_device"


def _capped(shares: tuple[int, ...], policy: BatchPolicy, accumulation: int | None) -> BatchPlan:
    """The plan whose ranks all make the same number of micro-batches, none above the cap."""
    cap, largest = policy.per_device, max(shares)
    needed = _ceil(largest, cap)
    if accumulation is not None and accumulation < needed:
        raise PlanError(
            f"batch.accumulation={accumulation} makes micro-batches of {_ceil(largest, accumulation)} "
            f"at world size {len(shares)}, above batch.per_device={cap}: "
            f"type batch.accumulation={needed} or more, or batch.accumulation=auto"
        )
    count = min(accumulation or needed, largest)
    return BatchPlan(len(shares), shares, _ceil(largest, count), count)


def _packed(shares: tuple[int, ...], cap: int) -> BatchPlan:
    """The plan whose ranks each make the fewest micro-batches that the cap allows."""
    counts = [_ceil(share, cap) for share in shares]
    accumulation = max(counts)
    per_device = max(_ceil(share, count) for share, count in zip(shares, counts, strict=True) if count)
    uneven = any(count != min(accumulation, share) for share, count in zip(shares, counts, strict=True))
    return BatchPlan(len(shares), shares, per_device, accumulation, fewest=uneven)


def _starved(policy: BatchPolicy, source: str, shares: Sequence[int], speeds: Sequence[float]) -> PlanError:
    """A rank is so slow that it gets nothing: how large the batch must be for it to get one sample.

    By then every rank has the whole part of its speed over the slowest, rounded up a little as quotients are floats.
    """
    weights = _exact(speeds)
    slowest = min(weights)
    needed = sum(weight * (_FINE + 1) // (slowest * _FINE) for weight in weights)
    if source == "batch.per_device":
        needed = _ceil(needed, len(shares) * (policy.accumulation or 1))
    value = policy.per_device if source == "batch.per_device" else sum(shares)
    return PlanError(
        f"{source}={value} leaves rank {shares.index(0)} without samples, so slow is it: "
        f"type {source}={needed} or more, {_OR_IDLE}"
    )


def _split(total: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """`total` by relative speeds: whole parts of the quotas, then each sample to the smallest (share + 1) / speed.

    Zero speeds get nothing. The quotas are exact; equal quotients of a share and a speed are equal as floats too.
    """
    weights = _exact(speeds)
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    queue = [((share + 1) / speeds[rank], rank) for rank, share in enumerate(shares) if weights[rank]]
    heapq.heapify(queue)
    for _ in range(total - sum(shares)):
        rank = queue[0][1]
        shares[rank] += 1
        heapq.heapreplace(queue, ((shares[rank] + 1) / speeds[rank], rank))
    return tuple(shares)


def _exact(speeds: Sequence[float]) -> list[int]:
    """The speeds as integers in exactly their proportions; a float's denominator is a power of two."""
    ratios = [speed.as_integer_ratio() for speed in speeds]
    scale = max(denominator for _, denominator in ratios)
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def level(total: int, parts: int) -> tuple[int, ...]:
    """`total` in `parts` that differ by at most one, larger first."""
    if not parts:
        return ()
    size, larger = divmod(total, parts)
    return (size + 1,) * larger + (size,) * (parts - larger)


def _ceil(amount: int, per: int) -> int:
    return -(-amount // per)


def friendly_batch(
    micro_batches: Iterable[int], max_batch: int, min_world: int, max_world: int
) -> tuple[int, tuple[int, ...]]:
    """The batch that most world sizes divide, and those world sizes, ascending.

    A world size counts where some micro-batch divides batch / world. Never above `max_batch`, ties to the larger batch.
    The question is DeepSpeed's elastic training's (v0.1); here every batch is tried. Time grows as
    max_batch x log(max_world / min_world), memory as max_batch.

    Raises:
        PlanError: no world size in the range fits, or the question is wrong.
    """
    micros = sorted(set(micro_batches))
    if not micros or micros[0] < 1 or not 1 <= min_world <= max_world:
        raise PlanError(
            f"micro-batches {micros} on {min_world} to {max_world} workers: "
            "give micro-batches of 1 or more and an ascending range of workers from 1"
        )
    least = micros[0] * min_world
    if max_batch < least:
        raise PlanError(
            f"no batch of at most {max_batch} divides into micro-batches of {micros} on {min_world} to {max_world} "
            f"workers: allow a batch of {least} or more"
        )
    counts = _fitting_worlds(micros, max_batch, range(min_world, min(max_world, max_batch // micros[0]) + 1))
    batch = max(range(least, max_batch + 1), key=lambda size: (counts[size], size))
    worlds = range(min_world, min(max_world, batch) + 1)
    return batch, tuple(world for world in worlds if any(batch % (micro * world) == 0 for micro in micros))


def _fitting_worlds(micros: Sequence[int], max_batch: int, worlds: range) -> list[int]:
    """For each batch size the number of `worlds` that fit it: a sieve over the multiples of world x micro-batch."""
    prime = [micro for micro in micros if not any(micro % other == 0 for other in micros if other < micro)]
    counts = [0] * (max_batch + 1)
    latest = [0] * (max_batch + 1)
    for world in worlds:
        for micro in prime:
            for batch in range(world * micro, max_batch + 1, world * micro):
                if latest[batch] != world:
                    latest[batch] = world
                    counts[batch] += 1
    return counts
