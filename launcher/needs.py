"""How many updates a target needs at each batch: fitted over the points of a sweep, and read for waste."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["LEAST_SIZES", "Needs", "fit", "told"]

LEAST_SIZES = 4


@dataclass(frozen=True)
class Needs:
    """updates = least · (1 + noise / batch): McCandlish et al. 2018, "An Empirical Model of Large-Batch Training".

    `least`: updates that no batch goes below. `noise`, in samples: at this batch both the updates and the samples are
    twice the least there are; past it a larger batch costs relatively more samples than it saves updates.
    """

    least: float
    noise: float

    def updates(self, batch: float) -> float:
        return self.least * (1 + self.noise / batch)


def fit(points: Sequence[tuple[int, float]]) -> Needs | None:
    """Least squares of updates over 1/batch; each point is (batch, updates). None below four different batches.

    A `least` or `noise` that is not above 0 is what the points say: updates that fall as fast as the batch grows, or
    that do not fall at all.
    """
    if len({batch for batch, _ in points}) < LEAST_SIZES:
        return None
    inverse = [1 / batch for batch, _ in points]
    middle, mean = sum(inverse) / len(points), sum(updates for _, updates in points) / len(points)
    slope = sum((x - middle) * (updates - mean) for x, (_, updates) in zip(inverse, points, strict=True))
    slope /= sum((x - middle) ** 2 for x in inverse)
    least = mean - slope * middle
    return Needs(least, slope / least if least else float("inf"))


def told(points: Sequence[tuple[int, float]]) -> Iterator[str]:
    """The fit in words, in lines of at most 80 columns; nothing where there is none."""
    needs, sizes = fit(points), sorted({batch for batch, _ in points})
    if needs is None:
        return
    if needs.least <= 0:
        yield f"updates to the target fall as fast as the batch grows from {sizes[0]:,} to {sizes[-1]:,}:"
        yield "none of these batches wastes samples"
    elif needs.noise <= 0:
        yield f"updates to the target do not fall from a batch of {sizes[0]:,} to {sizes[-1]:,}:"
        yield f"samples are wasted past {sizes[0]:,}"
    else:
        model = f"{needs.least:,.0f} * (1 + {needs.noise:,.3g} / batch)"
        yield f"updates to the target: {model}, over {len(sizes)} batches:"
        yield wasted(needs.noise, sizes)


def wasted(noise: float, sizes: Sequence[int]) -> str:
    if noise >= sizes[-1]:
        return f"none of these batches wastes samples, up to {noise:,.0f} they would not"
    return f"samples are wasted past a batch of {noise:,.0f}: more are needed than updates saved"
