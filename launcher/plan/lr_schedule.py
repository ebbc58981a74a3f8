"""The learning rate as a pure function of the samples seen: base x scale x decay, with a warmup.

Only the scale depends on the batch. `base` and `base_batch` never change, so repeated resizes do not compound. A
schedule is a frozen value that contains its history (batch changes, validations, noise); methods that extend the
history return a new one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["Decay", "LrScaleRamp", "LrSchedule", "noise_gain"]

_RAMPED_GROWTH = 2.0  # from this growth of the scale on, the change is ramped
_RAMP_UPDATES = 100
_RAMP_PART = 100  # a ramp takes at least 1/100 of the duration
_ONECYCLE_RISE = 0.3


def noise_gain(batch: float, base_batch: float, noise: float | None) -> float:
    """Progress of one update at `batch` in updates at `base_batch`: (1 + noise/base_batch) / (1 + noise/batch).

    `noise` is the gradient noise scale in samples. The gain is 1 at the base batch, and batch/base_batch (linear
    scaling) if the noise is infinite or None (unknown). Raises ValueError if the noise is negative or NaN.
    McCandlish 2018 (arXiv 1812.06162), AdaScale 2020 (arXiv 2007.05105), Pollux 2021.
    """
    if noise is None or noise == math.inf:
        return batch / base_batch
    if not noise >= 0:
        raise ValueError(f"a gradient noise scale of {noise} is not a number of samples")
    return (batch / base_batch) * ((base_batch + noise) / (batch + noise))


@dataclass(frozen=True)
class LrScaleRamp:
    """A change to `batch` at sample `at`; the scale moves linearly from `start` over `over` samples (0: at once)."""

    at: int
    over: int
    start: float
    batch: int


@dataclass(frozen=True)
class Decay:
    """The decay as a share of the peak learning rate after the warmup; lengths are in samples.

    linear, cosine: from 1 to `end` over the duration that remains after the warmup. step: multiplied by `factor` at
    each of `milestones`, or once per `every`. exponential: `factor` to the power samples/every, at least `floor`.
    plateau: multiplied by `factor` after `patience` validations without improvement (`mode`), at least `floor`.
    onecycle: from `start` up to the peak and down to `end`, both as a cosine, while `momentum` (low, high) moves in the
    opposite direction. step and exponential count from the first sample, not from the end of the warmup.
    """

    kind: Literal["constant", "linear", "cosine", "step", "exponential", "plateau", "onecycle"] = "constant"
    end: float = 0.0
    start: float = 0.04
    momentum: tuple[float, float] | None = None
    milestones: tuple[int, ...] = ()
    every: int | None = None
    factor: float = 0.1
    floor: float = 0.0
    mode: Literal["min", "max"] = "min"
    patience: int = 3

    def fraction(self, samples: int, progress: float, results: Sequence[float | None]) -> float:
        """The share at `samples`; `progress` (0 to 1) counts from the end of the warmup, `results` are validations."""
        if self.kind == "linear":
            return (1 - progress) + self.end * progress
        if self.kind in ("cosine", "onecycle"):
            return (1 - _compute_cosine_rise(progress)) + self.end * _compute_cosine_rise(progress)
        if self.kind == "step":
            passed = samples // self.every if self.every else sum(1 for at in self.milestones if at <= samples)
            return self.factor**passed
        if self.kind == "exponential":
            return max(self.factor ** (samples / self.every) if self.every else 1.0, self.floor)
        if self.kind == "plateau":
            return max(self.factor ** self._count_reductions(results), self.floor)
        return 1.0

    def _count_reductions(self, results: Sequence[float | None]) -> int:
        best, waited, falls = math.inf, 0, 0
        for result in results:
            loss = math.inf if result is None else result if self.mode == "min" else -result
            waited = 0 if loss < best else waited + 1
            best = min(best, loss)
            if waited >= self.patience:
                falls, waited = falls + 1, 0
        return falls


@dataclass(frozen=True)
class LrSchedule:
    """The learning rate of a whole run; `base` is the learning rate at a global batch of `base_batch`.

    `duration`, `epoch` and `warmup` are in samples.
    rule: the scale as a function of kappa = batch/base_batch: kappa (linear), its square root (sqrt), 1 (none), or
    noise_gain**power once `observed` has set a noise scale and kappa**power until then (noise; power is 1 for SGD and
    0.5 for the Adam family).
    warmup_from: the warmup starts at zero, at `base` (Goyal 2017), or at a share of the target learning rate.
    per: with epoch, the learning rate changes only at epoch boundaries. The warmup is evaluated at the epoch's end, so
    that the first epoch does not train at learning rate zero, and the decay at its start. A ramp of the scale after a
    batch change still advances with every update.
    Past the duration every schedule keeps its last value.
    """

    base: float
    base_batch: int
    duration: int
    epoch: int
    rule: Literal["linear", "sqrt", "noise", "none"] = "linear"
    power: float = 1.0
    warmup: int = 0
    warmup_shape: Literal["linear", "cosine"] = "linear"
    warmup_from: Literal["zero", "base"] | float = "zero"
    per: Literal["update", "epoch"] = "update"
    decay: Decay = Decay()
    noise: float | None = None
    ramps: tuple[LrScaleRamp, ...] = ()
    validations: tuple[tuple[int, float | None], ...] = ()

    def lr(self, samples: int, batch: int) -> float:
        """The learning rate of an update of `batch` samples that starts after `samples`."""
        first, last = self._find_evaluation_points(samples)
        return self._warmed_up(last, self.base * self.scale(samples, batch)) * self._compute_decay_share(first)

    def scale(self, samples: int, batch: int) -> float:
        """The batch-dependent factor of the learning rate: 1 at the base batch, interpolated during a ramp."""
        samples = min(samples, self.duration)
        target, ramp = self.target_scale(batch), self._find_ramp(samples, batch)
        return target if ramp is None else ramp.start + (target - ramp.start) * (samples - ramp.at) / ramp.over

    def progress(self, samples: int, batch: int) -> float:
        """Completed part of the ramp to `batch`, 0 to 1; 1 if no ramp is active."""
        samples = min(samples, self.duration)
        ramp = self._find_ramp(samples, batch)
        return 1.0 if ramp is None else (samples - ramp.at) / ramp.over

    def _find_ramp(self, samples: int, batch: int) -> LrScaleRamp | None:
        """The active ramp to `batch`, if any."""
        ramp = next((ramp for ramp in reversed(self.ramps) if ramp.at <= samples and ramp.batch == batch), None)
        return None if ramp is None or samples >= ramp.at + ramp.over else ramp

    def target_scale(self, batch: int) -> float:
        """The scale of `batch` once its ramp is complete."""
        kappa = batch / self.base_batch
        if self.rule == "linear":
            return kappa
        if self.rule == "sqrt":
            return math.sqrt(kappa)
        if self.rule == "noise":
            return math.pow(noise_gain(batch, self.base_batch, self.noise), self.power)
        return 1.0

    def momentum(self, samples: int) -> float | None:
        """onecycle's momentum: from high down to low at the learning rate's peak, and back. None if it is not set."""
        if self.decay.kind != "onecycle" or self.decay.momentum is None:
            return None
        low, high = self.decay.momentum
        first, last = self._find_evaluation_points(samples)
        risen = _compute_cosine_rise(min(1.0, last / self.warmup_samples)) if self.warmup_samples else 1.0
        return high - (high - low) * (risen - _compute_cosine_rise(self._compute_decay_progress(first)))

    @property
    def warmup_samples(self) -> int:
        """Samples until the peak: the warmup, or for onecycle without a warmup 30 % of the duration."""
        if self.decay.kind == "onecycle" and not self.warmup:
            return int(self.duration * _ONECYCLE_RISE)
        return self.warmup

    def resized(self, samples: int, old_batch: int, new_batch: int) -> LrSchedule:
        """The schedule with a batch change after `samples`; changes planned for later are dropped.

        If the scale grows by a factor of 2 or more from its current value (also within a ramp), it is ramped linearly
        over 100 updates of the new batch or 1 % of the duration, whichever is longer. Smaller growth and any decrease
        take effect at once.
        """
        if old_batch == new_batch:
            return self
        return self._ramp_from(samples, self.scale(samples, old_batch), new_batch)

    def _ramp_from(self, samples: int, now: float, batch: int) -> LrSchedule:
        """Change from the scale `now`, in effect after `samples`, to that of `batch`."""
        ramped = self.target_scale(batch) >= _RAMPED_GROWTH * now
        over = max(_RAMP_UPDATES * batch, -(-self.duration // _RAMP_PART)) if ramped else 0
        past = tuple(ramp for ramp in self.ramps if ramp.at <= samples)
        return replace(self, ramps=(*past, LrScaleRamp(samples, over, now, batch)))

    def with_stages(self, samples: int, stages: Sequence[tuple[int, int]]) -> LrSchedule:
        """The schedule whose batch from `samples` on follows `stages`: (start sample, batch), ascending.

        The history before `samples` is kept. The same stages therefore change nothing when a run is resumed, and the
        stages of another world size act as a resize at `samples`.
        """
        past = tuple(
            ramp for ramp in self.ramps if ramp.at < samples or (ramp.at == samples and self._keeps_batch(ramp))
        )
        schedule = replace(self, ramps=past)
        batch = past[-1].batch if past else None
        begun = sum(at <= samples for at, _ in stages)
        for at, following in stages[max(begun - 1, 0) :]:
            at = max(at, samples)
            first = LrScaleRamp(at, 0, self.target_scale(following), following)
            schedule = replace(schedule, ramps=(first,)) if batch is None else schedule.resized(at, batch, following)
            batch = following
        return schedule

    def _keeps_batch(self, ramp: LrScaleRamp) -> bool:
        """Whether a ramp keeps the batch: then it is due to a new noise scale, not to a change of plan."""
        before = [other.batch for other in self.ramps[: self.ramps.index(ramp)]][-1:]
        return before == [ramp.batch]

    def validated(self, samples: int, value: float) -> LrSchedule:
        """The schedule after a validation; only plateau uses it. A non-finite value counts as no improvement."""
        if self.decay.kind != "plateau":
            return self
        earlier = tuple((at, result) for at, result in self.validations if at < samples)
        return replace(self, validations=(*earlier, (samples, value if math.isfinite(value) else None)))

    def observed(self, noise: float | None) -> LrSchedule:
        """The schedule with this gradient noise scale in samples, ignored until it changed by a factor of two."""
        if noise is None or noise == math.inf:  # unknown: no gradient was measurable above the noise
            return self
        if self.noise is not None and self.noise / 2 < noise < self.noise * 2:
            return self
        noise_gain(self.base_batch, self.base_batch, noise)  # raises for an invalid noise scale
        return replace(self, noise=noise)

    def with_noise_at(self, samples: int, batch: int, noise: float | None) -> LrSchedule:
        """As `observed`, during training after `samples` at `batch`; changes planned for later are dropped.

        A scale that grows by a factor of 2 or more is ramped as after a resize; otherwise it takes effect at once.
        """
        after = self.observed(noise)
        return self if after is self else after._ramp_from(samples, self.scale(samples, batch), batch)

    def to_facts(self) -> dict[str, Any]:
        """The history as JSON for a checkpoint: the state that the configuration does not determine."""
        return {
            "ramps": [[ramp.at, ramp.over, ramp.start, ramp.batch] for ramp in self.ramps],
            "validations": [list(validation) for validation in self.validations],
            "noise": self.noise,
        }

    def from_facts(self, facts: Mapping[str, Any]) -> LrSchedule:
        """This schedule with the history from `to_facts`."""
        return replace(
            self,
            ramps=tuple(LrScaleRamp(*ramp) for ramp in facts["ramps"]),
            validations=tuple((at, result) for at, result in facts["validations"]),
            noise=facts["noise"],
        )

    def _find_evaluation_points(self, samples: int) -> tuple[int, int]:
        """The sample counts at which the decay and the warmup are evaluated."""
        samples = min(samples, self.duration)
        if self.per == "update":
            return samples, samples
        begin = samples // self.epoch * self.epoch
        return begin, min(begin + self.epoch, self.duration)

    def _warmed_up(self, samples: int, peak: float) -> float:
        if samples >= self.warmup_samples:
            return peak
        onecycle = self.decay.kind == "onecycle"
        start = self.decay.start if onecycle else self.warmup_from
        first = self.base if start == "base" else 0.0 if start == "zero" else peak * float(start)
        progress = samples / self.warmup_samples
        return first + (peak - first) * (
            _compute_cosine_rise(progress) if onecycle or self.warmup_shape == "cosine" else progress
        )

    def _compute_decay_share(self, samples: int) -> float:
        results = [result for at, result in self.validations if at <= samples]
        return self.decay.fraction(samples, self._compute_decay_progress(samples), results)

    def _compute_decay_progress(self, samples: int) -> float:
        """Completed part of the duration after the warmup, 0 to 1; 0 if the warmup leaves nothing."""
        left = self.duration - self.warmup_samples
        return max(0, samples - self.warmup_samples) / left if left > 0 else 0.0


def _compute_cosine_rise(progress: float) -> float:
    """Half a cosine wave, rising from 0 to 1."""
    return (1 - math.cos(math.pi * progress)) / 2
