"""The training plan: everything a run will do, derived from configuration, data sizes and world size, in samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, cast

from launcher import strategies
from launcher.batch import BatchPlan, BatchPolicy, PlanError, plan_batch
from launcher.duration import Duration, Units
from launcher.errors import RequestError
from launcher.limits import check_data, check_request
from launcher.rules import Rule, far_advice, optimizer_of, power_of, rule_of, warmup_advice
from launcher.schedule import Decay, LrSchedule
from launcher.settings import BatchSettings, Run, StrategySettings
from launcher.shards import ShardPlan, trainers
from launcher.timeline import Timeline
from launcher.typed import shown

__all__ = ["Sizes", "Study", "policy_of", "study"]

#: Keys of the section `strategy` that only one strategy uses -> that strategy.
STRATEGY_OF = {
    "find_unused_parameters": "ddp",
    **dict.fromkeys(("reshard", "gather", "meta"), "fsdp"),
    **dict.fromkeys(("stage", "config"), "deepspeed"),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a recipe's data: training and validation samples, and tokens per sample if it has tokens."""

    train: int
    val: int
    tokens_per_sample: int | None = None


@dataclass(frozen=True)
class Study:
    """What a run will do at one world size. Lengths are in samples, `checkpoint_every_s` is in seconds.

    `plan` is the full batch; `stages` are (start sample, plan), one per entry of batch.ramp, otherwise `plan` alone.
    `warmup` is the length of the warmup. If `validate_every` is None, or both `checkpoint_every` and
    `checkpoint_every_s` are, it happens only at the end. `advice` contains one-line warnings.
    """

    run: Run
    sizes: Sizes
    world: int
    policy: str
    rule: Rule
    plan: BatchPlan
    stages: tuple[tuple[int, BatchPlan], ...]
    timeline: Timeline
    schedule: LrSchedule
    duration: int
    warmup: int
    validate_every: int | None
    checkpoint_every: int | None
    checkpoint_every_s: float | None
    advice: tuple[str, ...]

    def plan_at(self, samples: int) -> BatchPlan:
        """The batch plan in effect after `samples`."""
        return [plan for begin, plan in self.stages if begin <= samples][-1]

    def batch_at(self, samples: int) -> int:
        """The global batch in effect after `samples`."""
        return self.plan_at(samples).global_batch

    def resumed(self, facts: Mapping[str, Any], samples: int) -> Study:
        """This plan with the learning rate history from a checkpoint at `samples`.

        If the checkpoint had another batch, this is a resize at `samples`; otherwise the history is unchanged.
        """
        return replace(self, schedule=self.schedule.from_facts(facts).planned(samples, _batches(self.stages)))

    def learned(self, schedule: LrSchedule, samples: int, noise: float | None) -> LrSchedule:
        """Update `schedule`, which carries this plan's history, with a noise scale measured after `samples`."""
        after = schedule.learned(samples, self.batch_at(samples), noise)
        return schedule if after is schedule else after.planned(samples + 1, _batches(self.stages))


def study(run: Run, sizes: Sizes, world: int, speeds: Sequence[float] | None = None) -> Study:
    """Make the training plan for data of `sizes` at world size `world`, with shares by the ranks' `speeds` if given.

    Raises UsageError if the request is wrong, or its subclass PlanError if it only does not fit this world size.
    """
    check_request(run)
    check_data(run, sizes.train, sizes.val)
    rule = rule_of(run)
    units = _units(run, sizes)
    schedule = _schedule(run, units, rule)
    validate_every = _every(run.train.validate_every, "train.validate_every", units)
    every, every_s = _checkpoint_every(run, units)
    ramp = _ramp(run, units)
    # From here on an error may concern only this world size.
    _check_world(run, world)
    policy = _policy(run, sizes)
    plan = _in_shards(run, plan_batch(policy, world, speeds))
    _check_plan(run, sizes, plan)
    stages = tuple((begin, _in_shards(run, _stage(share, sizes, policy, plan, speeds))) for begin, share in ramp)
    _check_rprop(run, sizes, stages)
    return Study(
        run=run,
        sizes=sizes,
        world=world,
        policy=policy_of(run),
        rule=rule,
        plan=plan,
        stages=stages,
        timeline=Timeline(sizes.train, schedule.duration, stages, run.data.tail, strategies.even(run)),
        schedule=schedule.planned(0, _batches(stages)),
        duration=schedule.duration,
        warmup=schedule.rise,
        validate_every=validate_every,
        checkpoint_every=every,
        checkpoint_every_s=every_s,
        advice=_advice(run, rule, schedule, stages),
    )


def _units(run: Run, sizes: Sizes) -> Units:
    units = Units(sizes.train, run.lr.base_batch or 1, sizes.tokens_per_sample)
    duration = Duration.parse(run.train.duration, "train.duration").samples(units)
    if duration < 1:
        raise RequestError(f"train.duration={run.train.duration} is zero samples: type train.duration=10ep")
    return replace(units, duration=duration)


def _samples(text: str, key: str, units: Units) -> int:
    return Duration.parse(text, key).samples(units)


def _interval(text: str, key: str, seconds: bool = False) -> Duration:
    interval = Duration.parse(text, key, seconds)
    if not interval.value:
        raise RequestError(f"{key}={text} is not an interval: type {key}=1ep, or {key}=null for only at the end")
    return interval


def _every(text: str | None, key: str, units: Units) -> int | None:
    return None if text is None else _interval(text, key).samples(units)


def _checkpoint_every(run: Run, units: Units) -> tuple[int | None, float | None]:
    """checkpoint.every as (samples, seconds), of which the one that was not typed is None."""
    if run.checkpoint.every is None:
        return None, None
    interval = _interval(run.checkpoint.every, "checkpoint.every", seconds=True)
    return (interval.samples(units), None) if interval.seconds is None else (None, interval.seconds)


def policy_of(run: Run) -> Literal["scale", "hold", "bounded", "goodput"]:
    """batch.policy; batch.global without a policy selects hold."""
    batch = run.batch
    return "hold" if batch.policy == "scale" and batch.global_batch is not None else batch.policy


def _policy(run: Run, sizes: Sizes) -> BatchPolicy:
    batch, kind = run.batch, policy_of(run)
    if kind == "goodput" and batch.accumulation == "auto":  # nothing is chosen yet: start with the base batch
        usual = min(max(run.lr.base_batch or 1, batch.min_global or 1), batch.max_global or sizes.train, sizes.train)
        batch = replace(batch, per_device=usual, min_global=usual, max_global=usual)
    return BatchPolicy(
        kind="bounded" if kind == "goodput" else kind,
        per_device=_per_device(batch),
        accumulation=None if batch.accumulation == "auto" else batch.accumulation,
        global_batch=sizes.train if batch.global_batch == "full" else batch.global_batch,
        min_global=batch.min_global,
        max_global=batch.max_global,
        idle=run.elastic.idle or run.elastic.exact,
    )


def _per_device(batch: BatchSettings) -> int:
    if batch.per_device == "auto":
        raise RequestError(
            "batch.per_device=auto is only resolved when training starts: type batch.per_device=32, or the value that "
            "launcher tune recommends"
        )
    return batch.per_device


def _check_world(run: Run, world: int) -> None:
    low, high = run.elastic.min_workers, run.elastic.max_workers
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


def _check_plan(run: Run, sizes: Sizes, plan: BatchPlan) -> None:
    if plan.global_batch <= sizes.train:
        return
    fits = sizes.train // (plan.world * (1 if run.batch.accumulation == "auto" else run.batch.accumulation))
    if run.batch.policy in ("bounded", "goodput"):
        mend = f"type batch.max_global={sizes.train} or less"
    elif fits:
        mend = f"type batch.per_device={fits} or less, or batch.global={sizes.train}"
    else:
        mend = f"start {sizes.train} workers or fewer, or lower batch.accumulation"
    raise PlanError(
        f"batch.per_device={run.batch.per_device} makes a global batch of {plan.global_batch} at {plan.world} "
        f"worker{'s' * (plan.world > 1)}, more than the {sizes.train} training samples: {mend}"
    )


def _in_shards(run: Run, plan: BatchPlan) -> BatchPlan:
    """Under elastic.exact the same batch in shards, which ignore speeds; otherwise the plan unchanged."""
    shards = run.elastic.shards
    if not run.elastic.exact:
        return plan
    if plan.global_batch < shards:
        raise RequestError(
            f"elastic.shards={shards} exceeds the {plan.global_batch} samples of a batch: "
            f"type elastic.shards={trainers(plan.global_batch, shards)}"
        )
    return ShardPlan.of(plan.global_batch, plan.world, shards, _per_device(run.batch))


def _stage(
    share: Fraction, sizes: Sizes, policy: BatchPolicy, plan: BatchPlan, speeds: Sequence[float] | None
) -> BatchPlan:
    """The plan for a share of `plan`'s global batch, with the same limit on the micro-batch."""
    size = int(share * plan.global_batch + Fraction(1, 2))
    if size == plan.global_batch:
        return plan
    least = 1 if policy.idle else plan.world
    if not least <= size <= sizes.train:
        bound = f"below {least} workers" if size < least else f"above the {sizes.train} training samples"
        raise PlanError(
            f"batch.ramp: the share {float(share):g} of {plan.global_batch} is a batch of {size}, {bound}: "
            f"type a {'larger' if size < least else 'smaller'} share"
        )
    held = BatchPolicy(kind="hold", per_device=policy.per_device, global_batch=size, idle=policy.idle)
    return plan_batch(held, plan.world, speeds)


def _batches(stages: Sequence[tuple[int, BatchPlan]]) -> list[tuple[int, int]]:
    return [(begin, plan.global_batch) for begin, plan in stages]


def _ramp(run: Run, units: Units) -> list[tuple[int, Fraction]]:
    """batch.ramp as (start sample, share), ascending from 0; if it is not set, the full batch from 0 on."""
    if run.batch.ramp is None:
        return [(0, Fraction(1))]
    mend = "type batch.ramp=[[0dur,0.25],[0.1dur,0.5],[0.2dur,1]]"
    ramp: list[tuple[int, Fraction]] = []
    for entry in run.batch.ramp:
        if isinstance(entry, str) or len(entry) != 2:
            raise RequestError(f"batch.ramp: {entry} is not a time and a share: {mend}")
        begin, share = _samples(entry[0], "batch.ramp", units), _share(entry[1], mend)
        if begin <= ramp[-1][0] if ramp else begin != 0:
            raise RequestError(f"batch.ramp: {entry[0]} is out of order, times must ascend from 0: {mend}")
        ramp.append((begin, share))
    if not ramp:
        raise RequestError(f"batch.ramp=[] has no stage: {mend}, or batch.ramp=null")
    return ramp


def _share(value: Any, mend: str) -> Fraction:
    try:
        share = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if share <= 0:
        raise RequestError(f"batch.ramp: {value} is not a share above 0 of the global batch: {mend}")
    return share


def _check_rprop(run: Run, sizes: Sizes, stages: Sequence[tuple[int, BatchPlan]]) -> None:
    least = min(plan.global_batch for _, plan in stages)
    if optimizer_of(run) == "rprop" and least < sizes.train:
        raise RequestError(
            f"optimizer=rprop with a batch of {least} of {sizes.train} samples: its step sizes follow the sign of "
            "successive gradients, which minibatch noise flips: type batch.global=full or another optimizer"
        )


def _schedule(run: Run, units: Units, rule: Rule) -> LrSchedule:
    schedule = run.schedule
    return LrSchedule(
        base=cast(float, run.lr.base),
        base_batch=units.base_batch,
        duration=cast(int, units.duration),
        epoch=units.epoch,
        rule=rule,
        power=power_of(run),
        warmup=_samples(schedule.warmup, "schedule.warmup", units),
        warmup_shape=schedule.warmup_shape,
        warmup_from=schedule.warmup_from,
        per=schedule.per,
        decay=_decay(run, units),
    )


def _decay(run: Run, units: Units) -> Decay:
    schedule = run.schedule
    every = schedule.every or ("1ep" if schedule.decay == "exponential" else None)
    momentum = schedule.momentum
    return Decay(
        kind=schedule.decay,
        end=schedule.end,
        start=schedule.start,
        momentum=None if momentum is None else (momentum[0], momentum[1]),
        milestones=tuple(_samples(text, "schedule.milestones", units) for text in schedule.milestones),
        every=_every(every, "schedule.every", units),
        factor=schedule.factor,
        floor=schedule.min,
        mode=schedule.mode,
        patience=schedule.patience,
    )


def _advice(run: Run, rule: Rule, schedule: LrSchedule, stages: Sequence[tuple[int, BatchPlan]]) -> tuple[str, ...]:
    largest = max(plan.global_batch for _, plan in stages)
    lines = [
        _hold_advice(run),
        _goodput_advice(run),
        *_strategy_advice(run),
        *_exact_advice(run, stages[-1][1]),
        _noise_advice(rule, stages[-1][1]),
        far_advice(run, rule, largest / schedule.base_batch),
        warmup_advice(run, schedule.rise, schedule.duration, largest),
    ]
    if schedule.warmup > schedule.duration:
        lines.append("schedule.warmup is longer than train.duration: the learning rate never reaches its target")
    if stages[-1][0] >= schedule.duration:
        lines.append("batch.ramp has stages after train.duration: they are never reached")
    return tuple(line for line in lines if line)


def _exact_advice(run: Run, plan: BatchPlan) -> Iterator[str]:
    """Warn about the cost of elastic.exact, and about ranks that do not train."""
    if not run.elastic.exact:
        return
    shards, world = run.elastic.shards, plan.world
    yield (
        f"elastic.exact=true is slower: an update is {shards} backward passes or more of at most "
        f"{plan.per_device} samples, with one thread per worker and no overlap of communication and computation"
    )
    active = trainers(world, shards)
    if active < world:
        yield (
            f"elastic.exact=true trains on {active} of {world} workers, a power of two up to elastic.shards={shards}; "
            f"{world - active} get no samples"
        )


def _noise_advice(rule: Rule, plan: BatchPlan) -> str:
    """Explain what lr.rule=noise does until the noise scale is known, and warn if it never will be."""
    if rule != "noise":
        return ""
    until = "until then the learning rate scales as for infinite noise"
    if sum(share > 0 for share in plan.shares) < 2 and plan.accumulation < 2:
        return f"lr.rule=noise needs at least 2 workers or micro-batches; {until}: type batch.accumulation=2"
    return f"lr.rule=noise: the gradient noise scale is known after about twenty updates or more; {until}"


def _goodput_advice(run: Run) -> str:
    if run.batch.policy != "goodput" or run.train.stop_at_target:
        return ""
    return (
        "batch.policy=goodput: train.duration counts samples, and each sample of a larger batch contributes less: set "
        "a longer train.duration, and to stop at a target train.target.metric=val/accuracy "
        "train.target.at_least=0.95 train.stop_at_target=true"
    )


def _strategy_advice(run: Run) -> Iterator[str]:
    """Warn about keys of another strategy; an error would break sweeps over strategies, where some points have them."""
    usual, here = StrategySettings(), run.strategy.name
    for name, strategy in STRATEGY_OF.items():
        value = getattr(run.strategy, name)
        if value != getattr(usual, name) and here != strategy:
            yield f"strategy.{name}={shown(value)} has no effect under strategy={here}: it is for strategy={strategy}"


def _hold_advice(run: Run) -> str:
    if run.batch.policy == "scale" and run.batch.global_batch is not None:
        return f"batch.global={run.batch.global_batch} selects batch.policy=hold: the global batch is fixed"
    return ""
