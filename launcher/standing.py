"""The training state between two updates: everything a checkpoint restores besides tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from launcher.errors import RequestError
from launcher.moments import Moments
from launcher.noise import NoiseScale
from launcher.rules import has_second_moment
from launcher.schedule import LrSchedule
from launcher.settings import TargetSettings
from launcher.study import Study
from launcher.timeline import Position, Update

if TYPE_CHECKING:
    from launcher.vote import Agreed

__all__ = ["Standing", "Target", "heard", "measured_value"]


def measured_value(measured: Mapping[str, float], metric: str, key: str) -> float:
    """The value of a metric; `key` is the configuration key to name in the error.

    Raises:
        UsageError: the recipe does not measure this metric.
    """
    if metric not in measured:
        raise RequestError(f"{key}={metric} is not measured here: choose from {', '.join(sorted(measured))}")
    return measured[metric]


@dataclass(frozen=True)
class Target:
    """The metric value that training should reach."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None

    @classmethod
    def of(cls, wanted: TargetSettings) -> Target | None:
        return None if wanted.metric is None else cls(wanted.metric, wanted.at_least, wanted.at_most)

    def met(self, measured: Mapping[str, float]) -> bool:
        """Return whether the measured metrics meet the target.

        Raises:
            UsageError: the recipe does not measure this metric.
        """
        value = measured_value(measured, self.metric, "train.target.metric")
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


@dataclass(frozen=True)
class Standing:
    """Training progress, in samples seen.

    `skips` counts consecutive non-finite updates, `seconds` the time trained. `noise` is the gradient noise scale,
    equal on every rank, since it is computed only from all-gathered statistics. `moments` tracks the batch size that
    Adam's second moment corresponds to, None for other optimizers.
    """

    position: Position
    schedule: LrSchedule
    noise: NoiseScale = NoiseScale()
    moments: Moments | None = None
    skips: int = 0
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    reached: Mapping[str, Any] | None = None
    best: float | None = None
    best_checkpoint: str | None = None

    @classmethod
    def fresh(cls, study: Study) -> Standing:
        batch = study.batch_at(0)
        moments = Moments(batch, batch) if has_second_moment(study.run) else None
        return cls(Position(), study.schedule, NoiseScale(population=population(study)), moments)

    def after(self, update: Update) -> Standing:
        return replace(self, position=update.after)

    def heard(self, agreed: Agreed, update: Update | None, study: Study) -> Standing:
        """Apply the gathered gradient statistics of `update`; under lr.rule=noise the learning rate follows."""
        noise = heard(self.noise, agreed, update)
        if noise is self.noise:
            return self
        if study.rule != "noise":
            return replace(self, noise=noise)
        schedule = study.learned(self.schedule, self.position.samples, noise.acted)
        return replace(self, noise=noise, schedule=schedule)

    def followed(self, update: Update) -> tuple[Standing, float]:
        """During a change of batch: the state at `update`, and the factor to multiply Adam's second moment by."""
        if self.moments is None:
            return self, 1.0
        batch = update.nominal.global_batch
        done = self.schedule.progress(update.start, batch)
        after = self.moments.toward(batch, self.noise.acted).reached(done)
        return replace(self, moments=after), self.moments.factor(after)

    def moments_to(self, batch: int) -> float | str:
        """For events: the total factor on Adam's second moment if the batch changes to `batch`, or "kept"."""
        way = self.moments and self.moments.toward(batch, self.noise.acted)
        if way is None or way == self.moments or way.noise is None:
            return "kept"
        return way.factor(way.reached(1.0))

    def skipped(self, skips: int) -> Standing:
        return self if skips == self.skips else replace(self, skips=skips)

    def validated(self, measured: Mapping[str, float], samples: int, watched: str) -> Standing:
        """Store the metrics and, for schedule.decay=plateau, pass the watched metric to the schedule."""
        schedule = self.schedule
        if schedule.decay.kind == "plateau":
            schedule = schedule.validated(samples, measured_value(measured, watched, "schedule.metric"))
        return replace(self, schedule=schedule, metrics=dict(measured))

    def improved(self, measured: Mapping[str, float], best: str | None, mode: str, name: str) -> Standing:
        """With `checkpoint.best`: record `name` as the best checkpoint if the metric has improved."""
        if best is None or not measured:
            return self
        value = measured_value(measured, best, "checkpoint.best")
        lower = mode == "min" or (mode == "auto" and "loss" in best)
        better = self.best is None or (value < self.best if lower else value > self.best)
        return replace(self, best=value, best_checkpoint=name) if better else self

    def target_ends(self, study: Study) -> bool:
        return self.reached is not None and study.run.train.stop_at_target

    def facts(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict for a checkpoint."""
        return {
            "schedule": self.schedule.to_facts(),
            "noise": self.noise.to_facts(),
            "moments": self.moments and self.moments.to_facts(),
            "skips": self.skips,
            "seconds": self.seconds,
            "metrics": dict(self.metrics),
            "reached": self.reached,
            "best": self.best,
            "best_checkpoint": self.best_checkpoint,
        }

    @classmethod
    def restored(cls, study: Study, position: Position, facts: Mapping[str, Any]) -> Standing:
        return cls(
            position=position,
            schedule=study.resumed(facts["schedule"], position.samples).schedule,
            noise=replace(NoiseScale.from_facts(facts["noise"]), population=population(study)),
            moments=Moments.from_facts(facts["moments"]) if facts["moments"] else None,
            skips=facts["skips"],
            seconds=facts["seconds"],
            metrics=facts["metrics"],
            reached=facts["reached"],
            best=facts["best"],
            best_checkpoint=facts["best_checkpoint"],
        )


def population(study: Study) -> int | None:
    """Dataset size for the noise scale's correction for sampling without replacement; None for a single sample."""
    return study.sizes.train if study.sizes.train > 1 else None


def heard(noise: NoiseScale, agreed: Agreed, update: Update | None) -> NoiseScale:
    """Noise scale updated with the gathered gradient statistics of `update`; partial and skipped updates are ignored.

    For n groups the estimate needs only their number, their total count, and the mean of their |g|².
    """
    groups, count = agreed.groups, agreed.loss_count
    if update is None or update.tail or groups < 2 or not count or not agreed.finite:
        return noise
    mean = agreed.spread * update.samples**2 / count
    return noise.update([count / groups] * groups, [mean] * groups, agreed.norm**2, update.samples)
