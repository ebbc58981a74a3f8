"""The training plan: everything a run will do, derived from configuration, data sizes and world size, in samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, cast

from launcher.config.consistency import validate_dataset_sizes, validate_for_plan
from launcher.config.schema import BatchConfig, RunConfig
from launcher.config.strategy_checks import needs_equal_micro_batches
from launcher.errors import UsageError
from launcher.plan.batch import BatchPlan, BatchPolicy, PlanError, plan_batch
from launcher.plan.duration import Duration, Units
from launcher.plan.lr_scaling import (
    Rule,
    noise_exponent,
    optimizer_name,
    resolve_lr_rule,
)
from launcher.plan.lr_schedule import Decay, LrSchedule
from launcher.plan.plan_advice import collect_plan_advice
from launcher.plan.timeline import Timeline
from launcher.plan.virtual_shards import ShardPlan, num_training_ranks

__all__ = ["DatasetSizes", "TrainingPlan", "make_training_plan", "resolve_batch_policy"]


@dataclass(frozen=True)
class DatasetSizes:
    """The sizes of a recipe's data: training and validation samples, and tokens per sample if it has tokens."""

    train: int
    val: int
    tokens_per_sample: int | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will do at one world size. Lengths are in samples, `checkpoint_every_s` is in seconds.

    `plan` is the batch plan of a full update; `stages` are (start sample, plan), one per entry of batch.ramp, otherwise
    `plan` alone. `warmup` is the length of the warmup. If `validate_every` is None, or both `checkpoint_every` and
    `checkpoint_every_s` are, it happens only at the end. `advice` contains one-line notes for the user.
    """

    config: RunConfig
    sizes: DatasetSizes
    world: int
    policy: str
    rule: Rule
    batch_plan: BatchPlan
    stages: tuple[tuple[int, BatchPlan], ...]
    timeline: Timeline
    schedule: LrSchedule
    duration: int
    warmup: int
    validate_every: int | None
    checkpoint_every: int | None
    checkpoint_every_s: float | None
    advice: tuple[str, ...]

    def batch_plan_at(self, samples: int) -> BatchPlan:
        """The batch plan in effect after `samples`."""
        return [plan for begin, plan in self.stages if begin <= samples][-1]

    def batch_at(self, samples: int) -> int:
        """The global batch in effect after `samples`."""
        return self.batch_plan_at(samples).global_batch

    def with_lr_history(self, facts: Mapping[str, Any], samples: int) -> TrainingPlan:
        """This plan with the learning rate history from a checkpoint at `samples`.

        If the checkpoint had another batch, this is a resize at `samples`; otherwise the history is unchanged.
        """
        return replace(
            self, schedule=self.schedule.from_facts(facts).with_stages(samples, _list_stage_batches(self.stages))
        )

    def schedule_with_noise(self, schedule: LrSchedule, samples: int, noise: float | None) -> LrSchedule:
        """Update `schedule`, which carries this plan's history, with a noise scale measured after `samples`."""
        after = schedule.with_noise_at(samples, self.batch_at(samples), noise)
        return schedule if after is schedule else after.with_stages(samples + 1, _list_stage_batches(self.stages))


def make_training_plan(
    config: RunConfig, sizes: DatasetSizes, world: int, speeds: Sequence[float] | None = None
) -> TrainingPlan:
    """Make the training plan for data of `sizes` at world size `world`, with shares by the ranks' `speeds` if given.

    Raises UsageError if the request is wrong, or its subclass PlanError if it only does not fit this world size.
    """
    validate_for_plan(config)
    validate_dataset_sizes(config, sizes.train, sizes.val)
    rule = resolve_lr_rule(config)
    units = _make_units(config, sizes)
    schedule = _make_lr_schedule(config, units, rule)
    validate_every = _parse_interval_samples(config.train.validate_every, "train.validate_every", units)
    every, every_s = _parse_checkpoint_interval(config, units)
    ramp = _parse_batch_ramp(config, units)
    # From here on an error may concern only this world size.
    _check_world(config, world)
    policy = _make_batch_policy(config, sizes)
    plan = _split_into_shards(config, plan_batch(policy, world, speeds))
    _check_plan(config, sizes, plan)
    stages = tuple(
        (begin, _split_into_shards(config, _make_stage_plan(share, sizes, policy, plan, speeds)))
        for begin, share in ramp
    )
    _check_rprop(config, sizes, stages)
    return TrainingPlan(
        config=config,
        sizes=sizes,
        world=world,
        policy=resolve_batch_policy(config),
        rule=rule,
        batch_plan=plan,
        stages=stages,
        timeline=Timeline(sizes.train, schedule.duration, stages, config.data.tail, needs_equal_micro_batches(config)),
        schedule=schedule.with_stages(0, _list_stage_batches(stages)),
        duration=schedule.duration,
        warmup=schedule.warmup_samples,
        validate_every=validate_every,
        checkpoint_every=every,
        checkpoint_every_s=every_s,
        advice=collect_plan_advice(config, rule, schedule, stages),
    )


def _make_units(config: RunConfig, sizes: DatasetSizes) -> Units:
    units = Units(sizes.train, config.lr.base_batch or 1, sizes.tokens_per_sample)
    duration = Duration.parse(config.train.duration, "train.duration").samples(units)
    if duration < 1:
        raise UsageError(f"train.duration={config.train.duration} is zero samples: type train.duration=10ep")
    return replace(units, duration=duration)


def _parse_samples(text: str, key: str, units: Units) -> int:
    return Duration.parse(text, key).samples(units)


def _parse_interval(text: str, key: str, seconds: bool = False) -> Duration:
    interval = Duration.parse(text, key, seconds)
    if not interval.value:
        raise UsageError(f"{key}={text} is not an interval: type {key}=1ep, or {key}=null for only at the end")
    return interval


def _parse_interval_samples(text: str | None, key: str, units: Units) -> int | None:
    return None if text is None else _parse_interval(text, key).samples(units)


def _parse_checkpoint_interval(config: RunConfig, units: Units) -> tuple[int | None, float | None]:
    """checkpoint.every as (samples, seconds), of which the one that was not typed is None."""
    if config.checkpoint.every is None:
        return None, None
    interval = _parse_interval(config.checkpoint.every, "checkpoint.every", seconds=True)
    return (interval.samples(units), None) if interval.seconds is None else (None, interval.seconds)


def resolve_batch_policy(config: RunConfig) -> Literal["scale", "hold", "bounded", "goodput"]:
    """batch.policy; batch.global without a policy selects hold."""
    batch = config.batch
    return "hold" if batch.policy == "scale" and batch.global_batch is not None else batch.policy


def _make_batch_policy(config: RunConfig, sizes: DatasetSizes) -> BatchPolicy:
    batch, kind = config.batch, resolve_batch_policy(config)
    if kind == "goodput" and batch.accumulation == "auto":  # nothing is chosen yet: start with the base batch
        base = min(max(config.lr.base_batch or 1, batch.min_global or 1), batch.max_global or sizes.train, sizes.train)
        batch = replace(batch, per_device=base, min_global=base, max_global=base)
    full_batch = sizes.train if batch.global_batch == "full" else None
    return BatchPolicy(
        kind="bounded" if kind == "goodput" else kind,
        per_device=_require_per_device(batch),
        accumulation=None if batch.accumulation == "auto" else batch.accumulation,
        global_batch=batch.global_batch if isinstance(batch.global_batch, int) else full_batch,
        min_global=batch.min_global,
        max_global=batch.max_global,
        allow_idle=config.elastic.allow_idle or config.elastic.exact,
    )


def _require_per_device(batch: BatchConfig) -> int:
    if batch.per_device == "auto":
        raise UsageError(
            "batch.per_device=auto is only resolved when training starts: type batch.per_device=32, or the value that "
            "launcher tune recommends"
        )
    return batch.per_device


def _check_world(config: RunConfig, world: int) -> None:
    low, high = config.elastic.min_workers, config.elastic.max_workers
    if world < low:
        raise PlanError(
            f"elastic.min_workers={low} but this job has {world}: start {low} workers or more, "
            f"or type elastic.min_workers={world}"
        )
    if high is not None and world > high:
        raise PlanError(
            f"elastic.max_workers={high} but this job has {world}: start {high} workers or fewer, "
            f"or type elastic.max_workers={world}"
        )


def _check_plan(config: RunConfig, sizes: DatasetSizes, plan: BatchPlan) -> None:
    if plan.global_batch <= sizes.train:
        return
    fits = sizes.train // (plan.world * (1 if config.batch.accumulation == "auto" else config.batch.accumulation))
    if config.batch.policy in ("bounded", "goodput"):
        fix = f"type batch.max_global={sizes.train} or less"
    elif fits:
        fix = f"type batch.per_device={fits} or less, or batch.global={sizes.train}"
    else:
        fix = f"start {sizes.train} workers or fewer, or lower batch.accumulation"
    raise PlanError(
        f"batch.per_device={config.batch.per_device} makes a global batch of {plan.global_batch} at {plan.world} "
        f"worker{'s' * (plan.world > 1)}, more than the {sizes.train} training samples: {fix}"
    )


def _split_into_shards(config: RunConfig, plan: BatchPlan) -> BatchPlan:
    """Under elastic.exact the same batch in shards, which ignore speeds; otherwise the plan unchanged."""
    shards = config.elastic.shards
    if not config.elastic.exact:
        return plan
    if plan.global_batch < shards:
        raise UsageError(
            f"elastic.shards={shards} exceeds the {plan.global_batch} samples of a batch: "
            f"type elastic.shards={num_training_ranks(plan.global_batch, shards)}"
        )
    return ShardPlan.from_batch_size(plan.global_batch, plan.world, shards, _require_per_device(config.batch))


def _make_stage_plan(
    share: Fraction, sizes: DatasetSizes, policy: BatchPolicy, plan: BatchPlan, speeds: Sequence[float] | None
) -> BatchPlan:
    """The plan for a share of `plan`'s global batch, with the same limit on the micro-batch."""
    size = int(share * plan.global_batch + Fraction(1, 2))
    if size == plan.global_batch:
        return plan
    least = 1 if policy.allow_idle else plan.world
    if not least <= size <= sizes.train:
        bound = f"below {least} workers" if size < least else f"above the {sizes.train} training samples"
        raise PlanError(
            f"batch.ramp: the share {float(share):g} of {plan.global_batch} is a batch of {size}, {bound}: "
            f"type a {'larger' if size < least else 'smaller'} share"
        )
    held = BatchPolicy(kind="hold", per_device=policy.per_device, global_batch=size, allow_idle=policy.allow_idle)
    return plan_batch(held, plan.world, speeds)


def _list_stage_batches(stages: Sequence[tuple[int, BatchPlan]]) -> list[tuple[int, int]]:
    return [(begin, plan.global_batch) for begin, plan in stages]


def _parse_batch_ramp(config: RunConfig, units: Units) -> list[tuple[int, Fraction]]:
    """batch.ramp as (start sample, share), ascending from 0; if it is not set, the full batch from 0 on."""
    if config.batch.ramp is None:
        return [(0, Fraction(1))]
    fix = "type batch.ramp=[[0dur,0.25],[0.1dur,0.5],[0.2dur,1]]"
    ramp: list[tuple[int, Fraction]] = []
    for entry in config.batch.ramp:
        if isinstance(entry, str) or len(entry) != 2:
            raise UsageError(f"batch.ramp: {entry} is not a time and a share: {fix}")
        begin, share = _parse_samples(entry[0], "batch.ramp", units), _parse_share(entry[1], fix)
        if begin <= ramp[-1][0] if ramp else begin != 0:
            raise UsageError(f"batch.ramp: {entry[0]} is out of order, times must ascend from 0: {fix}")
        ramp.append((begin, share))
    if not ramp:
        raise UsageError(f"batch.ramp=[] has no stage: {fix}, or batch.ramp=null")
    return ramp


def _parse_share(value: Any, fix: str) -> Fraction:
    try:
        share = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if share <= 0:
        raise UsageError(f"batch.ramp: {value} is not a share above 0 of the global batch: {fix}")
    return share


def _check_rprop(config: RunConfig, sizes: DatasetSizes, stages: Sequence[tuple[int, BatchPlan]]) -> None:
    least = min(plan.global_batch for _, plan in stages)
    if optimizer_name(config) == "rprop" and least < sizes.train:
        raise UsageError(
            f"optimizer=rprop with a batch of {least} of {sizes.train} samples: its step sizes follow the sign of "
            "successive gradients, which minibatch noise flips: type batch.global=full or another optimizer"
        )


def _make_lr_schedule(config: RunConfig, units: Units, rule: Rule) -> LrSchedule:
    schedule = config.schedule
    return LrSchedule(
        base=cast(float, config.lr.base),
        base_batch=units.base_batch,
        duration=cast(int, units.duration),
        epoch=units.epoch,
        rule=rule,
        power=noise_exponent(config),
        warmup=_parse_samples(schedule.warmup, "schedule.warmup", units),
        warmup_shape=schedule.warmup_shape,
        warmup_from=schedule.warmup_from,
        per=schedule.per,
        decay=_make_decay(config, units),
    )


def _make_decay(config: RunConfig, units: Units) -> Decay:
    schedule = config.schedule
    every = schedule.every or ("1ep" if schedule.decay == "exponential" else None)
    momentum = schedule.momentum
    return Decay(
        kind=schedule.decay,
        end=schedule.end,
        start=schedule.start,
        momentum=None if momentum is None else (momentum[0], momentum[1]),
        milestones=tuple(_parse_samples(text, "schedule.milestones", units) for text in schedule.milestones),
        every=_parse_interval_samples(every, "schedule.every", units),
        factor=schedule.factor,
        floor=schedule.min,
        mode=schedule.mode,
        patience=schedule.patience,
    )
