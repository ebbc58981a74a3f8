"""The batch with the highest goodput, from a fitted update-time model and the gradient noise scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.goodput.noise_scale import compute_efficiency
from launcher.goodput.update_time_model import UpdateModel

__all__ = ["BatchBounds", "BatchChoice", "best_choice", "compute_best_batch"]


@dataclass(frozen=True)
class BatchBounds:
    """Lower and upper bound of the global batch."""

    low: int
    high: int


def compute_best_batch(noise: float, constant_s: float, per_sample_s: float) -> float:
    """The batch with the highest goodput if an update takes constant + per_sample x batch: sqrt(phi c0 / c1)."""
    return math.sqrt(noise * constant_s / per_sample_s)


@dataclass(frozen=True)
class BatchChoice:
    """A batch with its samples/s, its efficiency relative to the base batch, and their product, the goodput."""

    per_device: int
    accumulation: int
    global_batch: int
    samples_per_s: float
    efficiency: float
    goodput: float


def best_choice(
    model: UpdateModel,
    world: int,
    noise: float,
    base_batch: int,
    bounds: BatchBounds,
    *,
    cap: int,
    nodes: int = 1,
) -> BatchChoice:
    """The (per_device, accumulation) with the highest goodput, per_device up to `cap`; ties go to the smaller batch.

    The global batch is world x per_device x accumulation, clamped to the bounds as under batch.policy=bounded.

    Raises:
        ValueError: the bounds leave no batch.
    """
    choices: list[BatchChoice] = []
    if 1 <= bounds.low <= bounds.high and cap >= 1:
        search = _AccumulationSearch(model, world, nodes, noise, base_batch, bounds)
        candidates = (choice for size in range(1, cap + 1) for choice in search.iter_candidates(size))
        choices = [choice for choice in candidates if choice.per_device <= cap]
    if not choices:
        raise ValueError(f"no batch lies between {bounds.low} and {bounds.high} with micro-batches up to {cap}")
    return max(choices, key=lambda choice: (choice.goodput, -choice.global_batch, -choice.accumulation))


@dataclass(frozen=True)
class _AccumulationSearch:
    """The search for the best accumulation at one world size, noise scale and base batch."""

    model: UpdateModel
    world: int
    nodes: int
    noise: float
    base_batch: int
    bounds: BatchBounds

    def iter_candidates(self, size: int) -> Iterator[BatchChoice]:
        """Yield the best accumulation for one micro-batch size, and both ends of its range, where the batch is clamped.

        Time is convex in the accumulation a, so time x (phi + B) / B is too, and bisection finds the minimum.
        """
        low = max(1, self.bounds.low // (self.world * size))
        high = max(1, -(-self.bounds.high // (self.world * size)))
        yield self._evaluate(size, low)
        yield self._evaluate(size, high)
        low, high = low + 1, high - 1
        while low < high:
            middle = (low + high) // 2
            is_rising = self._evaluate(size, middle).goodput < self._evaluate(size, middle + 1).goodput
            low, high = (middle + 1, high) if is_rising else (low, middle)
        if low == high:
            yield self._evaluate(size, low)

    def _evaluate(self, size: int, accumulation: int) -> BatchChoice:
        batch = min(max(self.world * size * accumulation, self.bounds.low), self.bounds.high)
        per_device = -(-batch // (self.world * accumulation))
        speed = batch / self.model.compute_seconds(per_device, accumulation, self.world, self.nodes)
        efficiency = compute_efficiency(batch, self.base_batch, self.noise)
        return BatchChoice(per_device, accumulation, batch, speed, efficiency, speed * efficiency)
