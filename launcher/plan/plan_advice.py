"""The warnings of a training plan: settings without effect, costs, and lengths and batches that rarely work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launcher.config.coercion import format_value
from launcher.config.schema import RunConfig, StrategyConfig
from launcher.plan.batch import BatchPlan
from launcher.plan.lr_scaling import Rule, batch_ratio_warning, check_warmup_length
from launcher.plan.lr_schedule import LrSchedule
from launcher.plan.virtual_shards import num_training_ranks

__all__ = ["collect_plan_advice"]

#: Keys of the section `strategy` that not all strategies use -> those that do.
STRATEGIES_OWNING_KEY: dict[str, tuple[str, ...]] = {
    "find_unused_parameters": ("ddp", "fsdp"),
    "static_graph": ("ddp",),
    **dict.fromkeys(("reshard_after_forward", "param_dtype", "meta_init"), ("fsdp",)),
    **dict.fromkeys(("stage", "config"), ("deepspeed",)),
}


def collect_plan_advice(
    config: RunConfig, rule: Rule, schedule: LrSchedule, stages: Sequence[tuple[int, BatchPlan]]
) -> tuple[str, ...]:
    """The warnings about a plan with these stages, (start sample, plan)."""
    largest = max(plan.global_batch for _, plan in stages)
    lines = [
        _advise_on_hold(config),
        _advise_on_goodput(config),
        *_advise_on_strategy(config),
        *_advise_on_exact(config, stages[-1][1]),
        _advise_on_noise(rule, stages[-1][1]),
        batch_ratio_warning(config, rule, largest / schedule.base_batch),
        check_warmup_length(config, schedule.warmup_samples, schedule.duration, largest),
    ]
    if schedule.warmup > schedule.duration:
        lines.append("schedule.warmup is longer than train.duration: the learning rate never reaches its target")
    if stages[-1][0] >= schedule.duration:
        lines.append("batch.ramp has stages after train.duration: they are never reached")
    return tuple(line for line in lines if line)


def _advise_on_exact(config: RunConfig, plan: BatchPlan) -> Iterator[str]:
    """Warn about the cost of elastic.exact, and about ranks that do not train."""
    if not config.elastic.exact:
        return
    shards, world_size = config.elastic.shards, plan.world
    yield (
        f"elastic.exact=true is slower: an update is {shards} backward passes or more of at most "
        f"{plan.per_device} samples, with one thread per worker and no overlap of communication and computation"
    )
    active = num_training_ranks(world_size, shards)
    if active < world_size:
        yield (
            f"elastic.exact=true trains on {active} of {world_size} workers, a power of two up to "
            f"elastic.shards={shards}; {world_size - active} get no samples"
        )


def _advise_on_noise(rule: Rule, plan: BatchPlan) -> str:
    """Explain what lr.rule=noise does until the noise scale is known, and warn if it never will be."""
    if rule != "noise":
        return ""
    until = "until then the learning rate scales as for infinite noise"
    if sum(share > 0 for share in plan.shares) < 2 and plan.accumulation < 2:
        return f"lr.rule=noise needs at least 2 workers or micro-batches; {until}: type batch.accumulation=2"
    return f"lr.rule=noise: the gradient noise scale is known after about twenty updates or more; {until}"


def _advise_on_goodput(config: RunConfig) -> str:
    if config.batch.policy != "goodput" or config.train.stop_at_target:
        return ""
    return (
        "batch.policy=goodput: train.duration counts samples, and each sample of a larger batch contributes less: set "
        "a longer train.duration, and to stop at a target train.target.metric=val/accuracy "
        "train.target.at_least=0.95 train.stop_at_target=true"
    )


def _advise_on_strategy(config: RunConfig) -> Iterator[str]:
    """Warn about keys of another strategy; an error would break sweeps over strategies, where some points have them."""
    defaults, selected = StrategyConfig(), config.strategy.name
    for name, owners in STRATEGIES_OWNING_KEY.items():
        value = getattr(config.strategy, name)
        if value != getattr(defaults, name) and selected not in owners:
            setting = f"strategy.{name}={format_value(value)}"
            yield f"{setting} has no effect under strategy={selected}: it is for strategy={' or '.join(owners)}"


def _advise_on_hold(config: RunConfig) -> str:
    if config.batch.policy == "scale" and config.batch.global_batch is not None:
        return f"batch.global={config.batch.global_batch} selects batch.policy=hold: the global batch is fixed"
    return ""
