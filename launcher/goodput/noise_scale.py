"""The gradient noise scale: the batch size at which signal and noise in the gradient are equal.

McCandlish 2018 (arXiv 1812.06162): phi = S / |G|^2, with S the variance of a single sample's gradient and G the true
gradient. Both are estimated from the gradients of groups (ranks or micro-batches) within an update, which distributed
training computes anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from launcher.system.statistics import student_t_quantile

__all__ = ["NoiseScale", "changed_by_factor", "compute_efficiency", "estimate_variance_and_square"]

CHANGE_FACTOR = 2.0
_WINDOW_HALF_LIVES = 8  # with this window length, 1/256 of the total weight is dropped
_BLOCK_UPDATES = 5  # updates per block; neighbouring updates may be correlated, so the estimate moves once per block
_MIN_BLOCKS = 4


def estimate_variance_and_square(
    shares: Sequence[float], square_norms: Sequence[float], mean_square_norm: float
) -> tuple[float, float]:
    """Unbiased (S, |G|^2) of one update: per-sample gradient variance and squared norm of the true gradient.

    Group i has `shares[i]` samples and a mean gradient of squared norm `square_norms[i]`; `mean_square_norm` is the
    squared norm of the whole update's mean gradient. S = (sum b_i |g_i|^2 - B |g|^2) / (n - 1), and
    |G|^2 = |g|^2 - S / B. Groups without samples are ignored. The estimate of |G|^2 can be negative. ValueError if
    fewer than two groups have samples.
    """
    groups = [(share, norm) for share, norm in zip(shares, square_norms, strict=True) if share > 0]
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} groups with samples: estimating the noise needs two or more")
    batch = sum(share for share, _ in groups)
    spread = math.fsum(share * norm for share, norm in groups) - batch * mean_square_norm
    variance = max(0.0, spread / (len(groups) - 1))  # negative only through rounding
    return variance, mean_square_norm - variance / batch


def compute_efficiency(batch: float, base_batch: float, noise: float) -> float:
    """Progress per sample at `batch` relative to the base batch: (noise + base) / (noise + batch)."""
    return 1.0 if noise == math.inf else (noise + base_batch) / (noise + batch)


def changed_by_factor(before: float | None, now: float | None) -> bool:
    """Return whether to act on the noise scale `now`: it is the first known one, or has changed by a factor of two."""
    if now is None:
        return False
    return before is None or not before / CHANGE_FACTOR < now < before * CHANGE_FACTOR


@dataclass(frozen=True)
class NoiseScale:
    """Immutable estimate of the noise scale in samples, with the statistics it is computed from.

    `window` holds (S, |G|^2) of the latest blocks of five updates each, `block` those of the current, unfinished block.
    The scale is the ratio of two averages over the window, whose weights halve every `half_life` updates; an average
    of ratios would be useless, because single |G|^2 are often near zero. The interval is Fieller's interval for a
    ratio, from a block jackknife of both averages. If the interval of |G|^2 includes zero, `scale` is None (unknown).

    Samples are drawn without replacement; given `dataset_size`, the bias this causes on small datasets is corrected.
    `applied` is the scale last acted on: its interval was within a factor of two either way, and it had changed by a
    factor of two since the one before (see `changed_by_factor`). `lower_bound` is the low end of the interval, updated
    under the same factor-of-two rule, and only until there is an `applied` scale.
    """

    half_life: float = 25.0
    dataset_size: int | None = None
    window: tuple[tuple[float, float], ...] = ()
    block: tuple[tuple[float, float], ...] = ()
    applied: float | None = None
    lower_bound: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.half_life < math.inf:
            raise ValueError(f"half_life={self.half_life} updates: must be more than 0")
        if self.dataset_size is not None and self.dataset_size < 2:
            raise ValueError(f"dataset_size={self.dataset_size} samples: must be at least 2")

    def update(
        self,
        shares: Sequence[float],
        square_norms: Sequence[float],
        mean_square_norm: float,
        samples: float | None = None,
    ) -> NoiseScale:
        """Return the estimate with one more update (arguments as in `estimate_variance_and_square`).

        It is unchanged if fewer than two groups have samples. Groups are the ranks or one rank's micro-batches, never
        both. Gradients are taken after unscaling and before clipping. If shares count tokens, `samples` is the update's
        number of samples: the scale is always in samples. Non-finite norms (a skipped update) change nothing.
        """
        if sum(share > 0 for share in shares) < 2 or not all(map(math.isfinite, (*square_norms, mean_square_norm))):
            return self
        variance, square = estimate_variance_and_square(shares, square_norms, mean_square_norm)
        if samples is not None:
            variance *= samples / sum(shares)
        block = (*self.block, (variance, square))
        return replace(self, block=block) if len(block) < _BLOCK_UPDATES else self._with_block(block)

    def _with_block(self, block: Sequence[tuple[float, float]]) -> NoiseScale:
        variances, squares = zip(*block, strict=True)
        length = math.ceil(_WINDOW_HALF_LIVES * self.half_life / _BLOCK_UPDATES)
        means = (math.fsum(variances) / _BLOCK_UPDATES, math.fsum(squares) / _BLOCK_UPDATES)
        updated = replace(self, window=(*self.window, means)[-length:], block=())
        if updated._is_narrow and changed_by_factor(self.applied, updated.scale):
            return replace(updated, applied=updated.scale)
        low = updated.interval[0] if updated.interval else 0.0
        if self.applied is None and low > 0 and changed_by_factor(self.lower_bound, low):
            return replace(updated, lower_bound=low)
        return updated

    @property
    def scale(self) -> float | None:
        """The noise scale in samples; None if unknown."""
        return self._scale_and_interval[0]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval (low, high) in samples; high is infinite if the scale is unknown.

        None if there is no estimate yet.
        """
        return self._scale_and_interval[1]

    def to_metrics(self, batch: float, base_batch: float) -> dict[str, float]:
        """The `noise/` values for metrics.jsonl; unknown ones are left out."""
        values: dict[str, float] = {}
        scale, interval = self._scale_and_interval
        if scale is not None:
            values |= {"noise/scale": scale, "noise/efficiency": compute_efficiency(batch, base_batch, scale)}
        if interval is not None:
            bounds = zip(("noise/scale_low", "noise/scale_high"), interval, strict=True)
            values |= {key: bound for key, bound in bounds if bound < math.inf}
        return values

    def to_facts(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict for a checkpoint."""
        return {
            "half_life": self.half_life,
            "population": self.dataset_size,
            "window": [list(pair) for pair in self.window],
            "block": [list(pair) for pair in self.block],
            "acted": self.applied,
            "least": self.lower_bound,
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> NoiseScale:
        """Inverse of `to_facts`."""
        window, block = (tuple((s, g) for s, g in facts[name]) for name in ("window", "block"))
        return cls(facts["half_life"], facts["population"], window, block, facts["acted"], facts.get("least"))

    @property
    def _is_narrow(self) -> bool:
        return self.interval is not None and self.interval[1] <= CHANGE_FACTOR**2 * self.interval[0]

    @property
    def _scale_and_interval(self) -> tuple[float | None, tuple[float, float] | None]:
        scale, interval = _estimate_ratio(self.half_life, self.window)
        if interval is None:
            return None, None
        corrected = None if scale is None else self._correct_for_dataset_size(scale)
        return corrected, (self._correct_for_dataset_size(interval[0]), self._correct_for_dataset_size(interval[1]))

    def _correct_for_dataset_size(self, scale: float) -> float:
        """phi (N - 1) / (N + phi): drawing without replacement from N samples biases |G|^2 low and S slightly high."""
        if self.dataset_size is None:
            return scale
        if scale == math.inf:
            return self.dataset_size - 1
        return scale * (self.dataset_size - 1) / (self.dataset_size + scale)


@lru_cache(maxsize=8)  # four of five updates have the same window as the previous one
def _estimate_ratio(
    half_life: float, window: tuple[tuple[float, float], ...]
) -> tuple[float | None, tuple[float, float] | None]:
    """The ratio of the two averages over the window (None if unknown), and its interval."""
    if len(window) < _MIN_BLOCKS:
        return None, None
    weights = _compute_weights(half_life, len(window))
    variance = math.fsum(weight * block[0] for weight, block in zip(weights, window, strict=True))
    square = math.fsum(weight * block[1] for weight, block in zip(weights, window, strict=True))
    deviations_s = [weight * (block[0] - variance) for weight, block in zip(weights, window, strict=True)]
    deviations_g = [weight * (block[1] - square) for weight, block in zip(weights, window, strict=True)]
    interval = _compute_fieller_interval(variance, square, *_compute_covariance(weights, deviations_s, deviations_g))
    is_known = interval is not None and interval[1] < math.inf
    return variance / square if is_known else None, interval


@lru_cache(maxsize=8)
def _compute_weights(half_life: float, length: int) -> tuple[float, ...]:
    """Weights of `length` blocks, oldest first; they sum to 1."""
    weights = [0.5 ** (age * _BLOCK_UPDATES / half_life) for age in range(length - 1, -1, -1)]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def _compute_covariance(
    weights: Sequence[float], deviations_s: Sequence[float], deviations_g: Sequence[float]
) -> tuple[float, float, float, float]:
    """Var(S), Cov(S, |G|^2), Var(|G|^2) of the weighted means, and their degrees of freedom.

    `deviations_s`, `deviations_g`: each block's deviation from the mean, times its weight.
    Leave-one-block-out jackknife: without block j of weight p, the mean changes by p (mean - block j) / (1 - p). The
    denominators and the unequal weights reduce to one common factor, which is exact for blocks of equal variance.
    """
    sum2, sum3 = (math.fsum(weight**power for weight in weights) for power in (2, 3))
    unbiased = sum2 / (sum2 * (1 + sum2) - 2 * sum3)
    var_s = sum(s * s for s in deviations_s)
    cov = sum(s * g for s, g in zip(deviations_s, deviations_g, strict=True))
    var_g = sum(g * g for g in deviations_g)
    return unbiased * var_s, unbiased * cov, unbiased * var_g, 1 / sum2 - 1


def _compute_fieller_interval(
    variance: float, square: float, var_s: float, cov: float, var_g: float, freedom: float
) -> tuple[float, float] | None:
    """The interval of variance / square (Fieller 1954): all ratios r for which S - r |G|^2 = 0 is not rejected.

    High is infinite if |G|^2 itself may be zero. None if no positive ratio can be rejected.
    """
    t2 = student_t_quantile(freedom) ** 2
    a = square * square - t2 * var_g
    b = variance * square - t2 * cov
    c = variance * variance - t2 * var_s
    discriminant = b * b - a * c
    if a > 0 and square > 0:
        root = math.sqrt(max(0.0, discriminant))
        return max(0.0, (b - root) / a), (b + root) / a
    if discriminant <= 0 or a == 0 or c <= 0:
        return None
    return max((b - math.sqrt(discriminant)) / a, (b + math.sqrt(discriminant)) / a), math.inf
