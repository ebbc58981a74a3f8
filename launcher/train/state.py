"""The training state between two updates: everything a checkpoint restores besides tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from launcher.config.schema import TargetConfig
from launcher.goodput.noise_scale import NoiseScale
from launcher.plan.adam_moments import SecondMomentScale
from launcher.plan.lr_scaling import has_second_moment
from launcher.plan.lr_schedule import LrSchedule
from launcher.plan.timeline import Position, Update
from launcher.plan.training_plan import TrainingPlan

if TYPE_CHECKING:
    from launcher.distributed.rank_stats import GatheredStats

__all__ = ["MetricTarget", "NoiseObservation", "TrainState", "UpdateCounts"]

NOISE_DELAY = 2  # updates until an observation is part of the noise scale


@dataclass(frozen=True)
class MetricTarget:
    """The metric value that training should reach."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None

    @classmethod
    def from_settings(cls, settings: TargetConfig) -> MetricTarget | None:
        return None if settings.metric is None else cls(settings.metric, settings.at_least, settings.at_most)

    def is_met(self, measured: Mapping[str, float]) -> bool:
        """Return whether the measured metrics meet the target; one that was not measured does not."""
        value = measured.get(self.metric, math.nan)
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


@dataclass(frozen=True)
class UpdateCounts:
    """Updates since the start of the run that took no step or whose loss says nothing.

    `skipped`: the gradient was not finite. `empty`: the loss counted 0 on all ranks. `loss_not_finite`: the step was
    taken, but a rank's loss was NaN or infinite. `empty_validations`: validations whose loss counted 0.
    """

    skipped: int = 0
    empty: int = 0
    loss_not_finite: int = 0
    empty_validations: int = 0

    def with_update(self, gathered: GatheredStats) -> UpdateCounts:
        """Count an update by its gathered statistics."""
        if not gathered.loss_count:
            return replace(self, empty=self.empty + 1)
        if not gathered.finite:
            return replace(self, skipped=self.skipped + 1)
        return replace(self, loss_not_finite=self.loss_not_finite + 1) if gathered.not_finite else self


@dataclass(frozen=True)
class NoiseObservation:
    """What one update says about the gradient's noise.

    `groups` parts of the update's `samples`, with the loss count `count` in all, had gradients whose mean square norm
    is `mean_sq_norm`; `sq_norm` is that of the whole gradient. For n groups, the estimate needs no more than that.
    """

    update: int
    samples: int
    groups: int
    count: float
    mean_sq_norm: float
    sq_norm: float

    @classmethod
    def from_stats(cls, gathered: GatheredStats, update: Update) -> NoiseObservation | None:
        """The observation of `update`; None for partial and skipped updates, and those that were not measured."""
        groups, count = gathered.groups, gathered.loss_count
        if update.is_partial or groups < 2 or not count or not gathered.finite:
            return None
        mean_sq_norm = gathered.group_sq_norm_sum * update.samples**2 / count
        return cls(update.index, update.samples, groups, count, mean_sq_norm, gathered.grad_norm**2)

    def apply(self, noise: NoiseScale) -> NoiseScale:
        """The noise scale after this observation."""
        groups = self.groups
        return noise.update([self.count / groups] * groups, [self.mean_sq_norm] * groups, self.sq_norm, self.samples)


@dataclass(frozen=True)
class TrainState:
    """Training progress, in samples seen.

    `skips` counts consecutive non-finite updates, `counts` those of the whole run; `seconds` is the time trained.
    `noise` is the gradient noise scale, equal on every rank, since it is computed only from statistics that all ranks
    have; `observations` are those of the last updates, which it does not include yet.
    `second_moment` tracks the batch size that Adam's second moment corresponds to, None for other optimizers.
    """

    position: Position
    schedule: LrSchedule
    noise: NoiseScale = NoiseScale()
    observations: tuple[NoiseObservation, ...] = ()
    second_moment: SecondMomentScale | None = None
    skips: int = 0
    counts: UpdateCounts = UpdateCounts()
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    target_reached: Mapping[str, Any] | None = None
    best: float | None = None
    best_checkpoint: str | None = None

    @classmethod
    def initial(cls, training_plan: TrainingPlan) -> TrainState:
        batch = training_plan.batch_at(0)
        second_moment = SecondMomentScale(batch, batch) if has_second_moment(training_plan.config) else None
        return cls(
            Position(),
            training_plan.schedule,
            NoiseScale(dataset_size=get_noise_population_size(training_plan)),
            second_moment=second_moment,
        )

    def advance(self, update: Update) -> TrainState:
        return replace(self, position=update.next_position)

    def with_gathered_stats(self, gathered: GatheredStats) -> TrainState:
        """Take the statistics of the previous update: its counts, and what it observed of the gradient's noise."""
        update = gathered.previous_update
        if update is None:
            return self
        state = self._count_update(gathered)
        observation = NoiseObservation.from_stats(gathered, update)
        return state if observation is None else replace(state, observations=(*self.observations, observation))

    def apply_observations(self, update: Update, training_plan: TrainingPlan) -> TrainState:
        """At `update`, apply the observations of the updates up to two before it to the noise scale.

        lr.rule=noise follows the noise scale, so the delay is always the same: on a GPU, later updates are not known
        yet. Those that are already known wait, also in a checkpoint.
        """
        due = [each for each in self.observations if each.update <= update.index - NOISE_DELAY]
        if not due:
            return self
        noise = self.noise
        for observation in due:
            noise = observation.apply(noise)
        state = replace(self, noise=noise, observations=self.observations[len(due) :])
        if training_plan.rule != "noise":
            return state
        schedule = training_plan.schedule_with_noise(self.schedule, self.position.samples, noise.applied)
        return replace(state, schedule=schedule)

    def _count_update(self, gathered: GatheredStats) -> TrainState:
        """Count an update. One that counted nothing neither failed nor ends a series of those that did."""
        if not self.skips and gathered.is_regular:
            return self
        counts = self.counts.with_update(gathered)
        skips = self.skips if counts.empty > self.counts.empty else 0 if gathered.finite else self.skips + 1
        return self if (skips, counts) == (self.skips, self.counts) else replace(self, skips=skips, counts=counts)

    def advance_second_moment(self, update: Update) -> tuple[TrainState, float]:
        """During a change of batch: the state at `update`, and the factor to multiply Adam's second moment by."""
        if self.second_moment is None:
            return self, 1.0
        batch = update.full_plan.global_batch
        transition_progress = self.schedule.progress(update.start, batch)
        after = self.second_moment.start_transition(batch, self.noise.applied).advance(transition_progress)
        return replace(self, second_moment=after), self.second_moment.compute_factor(after)

    def second_moment_factor(self, batch: int) -> float | str:
        """For events: the total factor on Adam's second moment if the batch changes to `batch`, or "kept"."""
        transition = self.second_moment and self.second_moment.start_transition(batch, self.noise.applied)
        if transition is None or transition == self.second_moment or transition.noise is None:
            return "kept"
        return transition.compute_factor(transition.advance(1.0))

    def with_empty_validation(self, measured: Mapping[str, float]) -> TrainState:
        """Store the metrics of a validation that counted nothing, which are NaN: no schedule or record follows them."""
        counts = replace(self.counts, empty_validations=self.counts.empty_validations + 1)
        return replace(self, metrics=dict(measured), counts=counts)

    def with_validation(self, measured: Mapping[str, float], samples: int, watched: str) -> TrainState:
        """Store the metrics and, for schedule.decay=plateau, pass the watched metric to the schedule if it is there."""
        schedule = self.schedule
        if schedule.decay.kind == "plateau" and watched in measured:
            schedule = schedule.validated(samples, measured[watched])
        return replace(self, schedule=schedule, metrics=dict(measured))

    def with_best_checkpoint(self, measured: Mapping[str, float], best: str | None, mode: str, name: str) -> TrainState:
        """With `checkpoint.best`: record `name` as the best checkpoint if the metric has improved."""
        if best is None or best not in measured:
            return self
        value = measured[best]
        lower = mode == "min" or (mode == "auto" and "loss" in best)
        before = math.nan if self.best is None else self.best
        better = math.isnan(before) and not math.isnan(value)  # the first number; NaN is never the best
        better = better or (value < before if lower else value > before)
        return replace(self, best=value, best_checkpoint=name) if better else self

    def should_stop_at_target(self, training_plan: TrainingPlan) -> bool:
        return self.target_reached is not None and training_plan.config.train.stop_at_target

    def state_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict for a checkpoint."""
        return {
            "schedule": self.schedule.to_facts(),
            "noise": self.noise.to_facts(),
            "observations": [asdict(observation) for observation in self.observations],
            "moments": self.second_moment and self.second_moment.to_facts(),
            "skips": self.skips,
            "counts": asdict(self.counts),
            "seconds": self.seconds,
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.metrics.items()},
            "reached": self.target_reached,
            "best": self.best,
            "best_checkpoint": self.best_checkpoint,
        }

    @classmethod
    def from_state_dict(cls, training_plan: TrainingPlan, position: Position, facts: Mapping[str, Any]) -> TrainState:
        return cls(
            position=position,
            schedule=training_plan.with_lr_history(facts["schedule"], position.samples).schedule,
            noise=replace(NoiseScale.from_facts(facts["noise"]), dataset_size=get_noise_population_size(training_plan)),
            observations=tuple(NoiseObservation(**each) for each in facts.get("observations", ())),
            second_moment=SecondMomentScale.from_facts(facts["moments"]) if facts["moments"] else None,
            skips=facts["skips"],
            counts=UpdateCounts(**facts.get("counts", {})),
            seconds=facts["seconds"],
            metrics={name: math.nan if value is None else value for name, value in facts["metrics"].items()},
            target_reached=facts["reached"],
            best=facts["best"],
            best_checkpoint=facts["best_checkpoint"],
        )


def get_noise_population_size(training_plan: TrainingPlan) -> int | None:
    """Dataset size for the noise scale's correction for sampling without replacement; None for a single sample."""
    return training_plan.sizes.train if training_plan.sizes.train > 1 else None
