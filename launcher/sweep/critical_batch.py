"""Critical batch size from a sweep: fits the number of updates to the target over the batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import linear_regression

__all__ = ["MIN_BATCH_SIZES", "CriticalBatchFit", "describe_fit", "fit_critical_batch"]

MIN_BATCH_SIZES = 4


@dataclass(frozen=True)
class CriticalBatchFit:
    """updates = min_updates · (1 + noise / batch): McCandlish et al. 2018, An Empirical Model of Large-Batch Training.

    `min_updates` is the number of updates at infinite batch size. `noise` is the critical batch size in samples: there
    both updates and samples are twice their minimum, and above it the extra samples outweigh the saved updates.
    """

    min_updates: float
    noise: float

    def predict_updates(self, batch: float) -> float:
        return self.min_updates * (1 + self.noise / batch)


def fit_critical_batch(points: Sequence[tuple[int, float]]) -> CriticalBatchFit | None:
    """Least-squares fit of updates over 1/batch. Points are (batch, updates); None with fewer than four batch sizes.

    `min_updates` ≤ 0 means that updates fall at least as fast as the batch grows, `noise` ≤ 0 that they do not fall at
    all.
    """
    if len({batch for batch, _ in points}) < MIN_BATCH_SIZES:
        return None
    slope, min_updates = linear_regression([1 / batch for batch, _ in points], [updates for _, updates in points])
    return CriticalBatchFit(min_updates, slope / min_updates if min_updates else float("inf"))


def describe_fit(points: Sequence[tuple[int, float]]) -> Iterator[str]:
    """Describe the fit in lines of at most 80 columns; no lines without a fit."""
    fit, sizes = fit_critical_batch(points), sorted({batch for batch, _ in points})
    if fit is None:
        return
    if fit.min_updates <= 0:
        yield f"updates to the target fall as fast as the batch grows from {sizes[0]:,} to {sizes[-1]:,}:"
        yield "none of these batches wastes samples"
    elif fit.noise <= 0:
        yield f"updates to the target do not fall from a batch of {sizes[0]:,} to {sizes[-1]:,}:"
        yield f"batches above {sizes[0]:,} waste samples"
    else:
        model = f"{fit.min_updates:,.0f} * (1 + {fit.noise:,.3g} / batch)"
        yield f"updates to the target: {model}, over {len(sizes)} batches:"
        yield describe_wasted_samples(fit.noise, sizes)


def describe_wasted_samples(noise: float, sizes: Sequence[int]) -> str:
    if noise >= sizes[-1]:
        return f"none of these batches wastes samples: critical batch size ~{noise:,.0f}"
    return f"critical batch size ~{noise:,.0f}: above it, extra samples outweigh saved updates"
