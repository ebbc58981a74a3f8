"""Check a configuration for contradictions before anything is planned. Every error names key, value and fix."""

from __future__ import annotations

import math
from typing import Any

from launcher.config.schema import ALIASES, ElasticConfig, RunConfig
from launcher.errors import UsageError

__all__ = ["validate_config", "validate_dataset_sizes"]

#: The smallest allowed value of integer keys; None, auto and full are not checked.
_MIN_VALUES = {
    "batch.per_device": 1,
    "batch.accumulation": 1,
    "batch.global": 1,
    "batch.min_global": 1,
    "batch.max_global": 1,
    "lr.base_batch": 1,
    "schedule.patience": 1,
    "elastic.min_workers": 1,
    "elastic.max_workers": 1,
    "checkpoint.keep": 1,
    "log.every": 1,
    "tune.max": 1,
}
_SHARE_KEYS = ("schedule.end", "schedule.start", "schedule.min", "schedule.warmup_from")


def validate_config(config: RunConfig) -> None:
    """Raise UsageError for the first setting that is wrong regardless of world size and data."""
    _check_numbers(config)
    _check_lr(config)
    _check_batch(config)
    _check_schedule(config)
    _check_target(config)
    if config.elastic.exact:
        _check_exact(config)
    elif config.elastic.shards != ElasticConfig().shards:
        raise UsageError(
            f"elastic.shards={config.elastic.shards} has no effect without elastic.exact=true: type that too, or neither"
        )
    _check_hang(config)
    _check_tune(config)
    low, high = config.elastic.min_workers, config.elastic.max_workers
    if high is not None and high < low:
        raise UsageError(
            f"elastic.max_workers={high} is below elastic.min_workers={low}: type elastic.max_workers={low} or more"
        )


def validate_dataset_sizes(config: RunConfig, train: int, val: int) -> None:
    """Raise UsageError if training or validation data are empty, or batch.global exceeds the training set."""
    if train < 1:
        raise UsageError("recipe: the training data are empty: point the recipe at a folder or split with samples")
    if val < 1 and config.train.validate_every is not None:
        raise UsageError(
            f"train.validate_every={config.train.validate_every} but the recipe's validation data are empty: "
            "add validation samples, or type train.validate_every=null"
        )
    asked = config.batch.global_batch
    if isinstance(asked, int) and asked > train:
        raise UsageError(
            f"batch.global={asked} exceeds the {train} training samples: type batch.global=full, or {train} or less"
        )


def _get_value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, ALIASES.get(name, name))
    return value


def _check_numbers(config: RunConfig) -> None:
    for key, least in _MIN_VALUES.items():
        value = _get_value(config, key)
        if isinstance(value, int) and value < least:
            raise UsageError(f"{key}={value} is below {least}: type {key}={least} or more")
    for key in _SHARE_KEYS:
        value = _get_value(config, key)
        if not isinstance(value, str) and not 0 <= value <= 1:
            raise UsageError(f"{key}={value} is not a share of the learning rate: type a number from 0 to 1")


def _check_lr(config: RunConfig) -> None:
    for key in ("lr.base", "lr.base_batch"):
        if _get_value(config, key) is None:
            raise UsageError(
                f"{key} is not set: type e.g. lr.base=0.1 lr.base_batch=256, a learning rate and its global batch"
            )
    base = config.lr.base
    if base is not None and not 0 < base < math.inf:
        raise UsageError(f"lr.base={base} is not a learning rate: type a finite number above 0, e.g. lr.base=0.1")


def _check_batch(config: RunConfig) -> None:
    batch = config.batch
    low, high = batch.min_global, batch.max_global
    bound = next((key for key in ("batch.min_global", "batch.max_global") if _get_value(config, key) is not None), None)
    if batch.policy == "bounded":
        if bound is None:
            raise UsageError("batch.policy=bounded has no bound: type batch.min_global=N, batch.max_global=N or both")
        if batch.global_batch is not None:
            raise UsageError(
                f"batch.global={batch.global_batch} does not work with batch.policy=bounded: type batch=hold, "
                "or remove it"
            )
    elif batch.policy == "goodput":
        _check_goodput(config)
    elif bound is not None:
        had = f"{bound}={_get_value(config, bound)}"
        raise UsageError(f"{had} has no effect under batch.policy={batch.policy}: type batch=bounded, or remove it")
    if low is not None and high is not None and low > high:
        raise UsageError(
            f"batch.min_global={low} is above batch.max_global={high}: type batch.max_global={low} or more"
        )
    if batch.policy == "hold" and batch.global_batch is None:
        raise UsageError("batch.policy=hold needs a global batch: type batch.global=256 or batch.global=full")


def _check_goodput(config: RunConfig) -> None:
    """Refuse settings that the goodput policy chooses itself or that would conflict with it."""
    batch = config.batch
    wrong = {
        "batch.global": (batch.global_batch is not None, "batch=hold, or remove it"),
        "batch.ramp": (batch.ramp is not None, "batch=bounded, or remove it"),
        "elastic.balance": (config.elastic.balance, "elastic.balance=false"),
    }
    for key, (refused, mend) in wrong.items():
        if refused:
            value = str(_get_value(config, key)).lower()
            raise UsageError(f"{key}={value} does not work with batch.policy=goodput: type {mend}")


def _check_schedule(config: RunConfig) -> None:
    schedule = config.schedule
    if not 0 < schedule.factor <= 1:
        raise UsageError(
            f"schedule.factor={schedule.factor} would not lower the learning rate: type a number above 0, up to 1"
        )
    if schedule.decay == "step" and bool(schedule.milestones) == (schedule.every is not None):
        raise UsageError(
            f"schedule.milestones={list(schedule.milestones)} with schedule.every={schedule.every}: schedule=step "
            "needs exactly one: type schedule.milestones=[30ep,60ep], or schedule.every=30ep schedule.milestones=[]"
        )
    if schedule.momentum is not None:
        _check_momentum(config, tuple(schedule.momentum))
    if schedule.decay == "onecycle" and schedule.warmup_from != "zero":
        had = f"schedule.warmup_from={schedule.warmup_from}"
        raise UsageError(f"{had} has no effect under schedule=onecycle: type schedule.start=0.04 instead")


def _check_momentum(config: RunConfig, momentum: tuple[float, ...]) -> None:
    if config.schedule.decay != "onecycle":
        raise UsageError(
            f"schedule.momentum={list(momentum)} has no effect under schedule={config.schedule.decay}: "
            "type schedule=onecycle, or optimizer.momentum"
        )
    if len(momentum) != 2 or not 0 <= momentum[0] <= momentum[1] < 1:
        raise UsageError(f"schedule.momentum={list(momentum)} is not [low, high] between 0 and 1: type [0.85,0.95]")


def _check_exact(config: RunConfig) -> None:
    """Refuse settings that bitwise equality at every world size rules out."""
    batch, shards = config.batch, config.elastic.shards
    if shards < 1 or shards & (shards - 1):
        below = 1 << max(shards.bit_length() - 1, 0)
        raise UsageError(f"elastic.shards={shards} is not a power of two: type elastic.shards={below} or {2 * below}")
    if batch.policy in ("bounded", "goodput") or batch.global_batch is None:
        raise UsageError(
            f"batch.policy={batch.policy} with elastic.exact=true: the batch must be the same at every world size: "
            "type batch.policy=hold batch.global=256"
        )
    wrong = {
        "batch.accumulation": (batch.accumulation != "auto", "auto"),
        "train.precision": (config.train.precision == "fp16", "bf16"),
        "train.compile": (config.train.compile, "false"),
        "strategy.name": (config.strategy.name != "ddp", "ddp"),
        "elastic.balance": (config.elastic.balance, "false"),
        "launch.threads": (config.launch.threads not in (None, 1), "1"),
    }
    for key, (refused, mend) in wrong.items():
        if refused:
            value = str(_get_value(config, key)).lower()
            raise UsageError(f"{key}={value} does not work with elastic.exact=true: type {key}={mend}")


def _check_hang(config: RunConfig) -> None:
    hang_s, first_s = config.elastic.hang_timeout_s, config.elastic.first_timeout_s
    if not hang_s >= 1:
        raise UsageError(
            f"elastic.hang_timeout_s={hang_s} is below 1 second: type elastic.hang_timeout_s=8, or 1e9 to disable it"
        )
    if not first_s >= hang_s:
        raise UsageError(
            f"elastic.first_timeout_s={first_s} is below elastic.hang_timeout_s={hang_s}: type elastic.first_timeout_s={hang_s}"
        )


def _check_tune(config: RunConfig) -> None:
    sizes, budget_s = config.tune.sizes, config.tune.budget_s
    if sizes is not None and (not sizes or min(sizes) < 1):
        raise UsageError(f"tune.sizes={list(sizes)} must list sizes >= 1: type e.g. tune.sizes=[20,45]")
    if sizes is not None and config.tune.max is not None:
        raise UsageError(f"tune.max={config.tune.max} has no effect if tune.sizes is set: remove one of them")
    if budget_s is not None and not 0 < budget_s < math.inf:
        raise UsageError(f"tune.budget_s={budget_s} must be > 0: type e.g. tune.budget_s=120")


def _check_target(config: RunConfig) -> None:
    target = config.train.target
    bounds = [bound for bound in (target.at_least, target.at_most) if bound is not None]
    wants = target.metric is not None or bool(bounds) or config.train.stop_at_target
    if wants and (target.metric is None or len(bounds) != 1 or not math.isfinite(bounds[0])):
        raise UsageError(
            f"train.target={{metric: {target.metric}, at_least: {target.at_least}, at_most: {target.at_most}}} needs a "
            "metric and one finite bound: type train.target.metric=val/accuracy train.target.at_least=0.95"
        )
