"""Check a configuration for contradictions before anything is planned. Every error names key, value and fix."""

from __future__ import annotations

import math
from typing import Any

from launcher.errors import RequestError
from launcher.settings import ALIASES, ElasticSettings, Run

__all__ = ["check_data", "check_request"]

#: The smallest allowed value of integer keys; None, auto and full are not checked.
_LEAST = {
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
_SHARES = ("schedule.end", "schedule.start", "schedule.min", "schedule.warmup_from")


def check_request(run: Run) -> None:
    """Raise UsageError for the first setting that is wrong regardless of world size and data."""
    _check_numbers(run)
    _check_rate(run)
    _check_batch(run)
    _check_schedule(run)
    _check_target(run)
    if run.elastic.exact:
        _check_exact(run)
    elif run.elastic.shards != ElasticSettings().shards:
        raise RequestError(
            f"elastic.shards={run.elastic.shards} has no effect without elastic.exact=true: type that too, or neither"
        )
    _check_hang(run)
    _check_tune(run)
    low, high = run.elastic.min_workers, run.elastic.max_workers
    if high is not None and high < low:
        raise RequestError(
            f"elastic.max_workers={high} is below elastic.min_workers={low}: type elastic.max_workers={low} or more"
        )


def check_data(run: Run, train: int, val: int) -> None:
    """Raise UsageError if training or validation data are empty, or batch.global exceeds the training set."""
    if train < 1:
        raise RequestError("recipe: the training data are empty: point the recipe at a folder or split with samples")
    if val < 1 and run.train.validate_every is not None:
        raise RequestError(
            f"train.validate_every={run.train.validate_every} but the recipe's validation data are empty: "
            "add validation samples, or type train.validate_every=null"
        )
    asked = run.batch.global_batch
    if isinstance(asked, int) and asked > train:
        raise RequestError(
            f"batch.global={asked} exceeds the {train} training samples: type batch.global=full, or {train} or less"
        )


def _value(run: Run, key: str) -> Any:
    value: Any = run
    for name in key.split("."):
        value = getattr(value, ALIASES.get(name, name))
    return value


def _check_numbers(run: Run) -> None:
    for key, least in _LEAST.items():
        value = _value(run, key)
        if isinstance(value, int) and value < least:
            raise RequestError(f"{key}={value} is below {least}: type {key}={least} or more")
    for key in _SHARES:
        value = _value(run, key)
        if not isinstance(value, str) and not 0 <= value <= 1:
            raise RequestError(f"{key}={value} is not a share of the learning rate: type a number from 0 to 1")


def _check_rate(run: Run) -> None:
    for key in ("lr.base", "lr.base_batch"):
        if _value(run, key) is None:
            raise RequestError(
                f"{key} is not set: type e.g. lr.base=0.1 lr.base_batch=256, a learning rate and its global batch"
            )
    base = run.lr.base
    if base is not None and not 0 < base < math.inf:
        raise RequestError(f"lr.base={base} is not a learning rate: type a finite number above 0, e.g. lr.base=0.1")


def _check_batch(run: Run) -> None:
    batch = run.batch
    low, high = batch.min_global, batch.max_global
    bound = next((key for key in ("batch.min_global", "batch.max_global") if _value(run, key) is not None), None)
    if batch.policy == "bounded":
        if bound is None:
            raise RequestError("batch.policy=bounded has no bound: type batch.min_global=N, batch.max_global=N or both")
        if batch.global_batch is not None:
            raise RequestError(
                f"batch.global={batch.global_batch} does not work with batch.policy=bounded: type batch=hold, "
                "or remove it"
            )
    elif batch.policy == "goodput":
        _check_goodput(run)
    elif bound is not None:
        had = f"{bound}={_value(run, bound)}"
        raise RequestError(f"{had} has no effect under batch.policy={batch.policy}: type batch=bounded, or remove it")
    if low is not None and high is not None and low > high:
        raise RequestError(
            f"batch.min_global={low} is above batch.max_global={high}: type batch.max_global={low} or more"
        )
    if batch.policy == "hold" and batch.global_batch is None:
        raise RequestError("batch.policy=hold needs a global batch: type batch.global=256 or batch.global=full")


def _check_goodput(run: Run) -> None:
    """Refuse settings that the goodput policy chooses itself or that would conflict with it."""
    batch = run.batch
    wrong = {
        "batch.global": (batch.global_batch is not None, "batch=hold, or remove it"),
        "batch.ramp": (batch.ramp is not None, "batch=bounded, or remove it"),
        "elastic.balance": (run.elastic.balance, "elastic.balance=false"),
    }
    for key, (refused, mend) in wrong.items():
        if refused:
            value = str(_value(run, key)).lower()
            raise RequestError(f"{key}={value} does not work with batch.policy=goodput: type {mend}")


def _check_schedule(run: Run) -> None:
    schedule = run.schedule
    if not 0 < schedule.factor <= 1:
        raise RequestError(
            f"schedule.factor={schedule.factor} would not lower the learning rate: type a number above 0, up to 1"
        )
    if schedule.decay == "step" and bool(schedule.milestones) == (schedule.every is not None):
        raise RequestError(
            f"schedule.milestones={list(schedule.milestones)} with schedule.every={schedule.every}: schedule=step "
            "needs exactly one: type schedule.milestones=[30ep,60ep], or schedule.every=30ep schedule.milestones=[]"
        )
    if schedule.momentum is not None:
        _check_momentum(run, tuple(schedule.momentum))
    if schedule.decay == "onecycle" and schedule.warmup_from != "zero":
        had = f"schedule.warmup_from={schedule.warmup_from}"
        raise RequestError(f"{had} has no effect under schedule=onecycle: type schedule.start=0.04 instead")


def _check_momentum(run: Run, momentum: tuple[float, ...]) -> None:
    if run.schedule.decay != "onecycle":
        raise RequestError(
            f"schedule.momentum={list(momentum)} has no effect under schedule={run.schedule.decay}: "
            "type schedule=onecycle, or optimizer.momentum"
        )
    if len(momentum) != 2 or not 0 <= momentum[0] <= momentum[1] < 1:
        raise RequestError(f"schedule.momentum={list(momentum)} is not [low, high] between 0 and 1: type [0.85,0.95]")


def _check_exact(run: Run) -> None:
    """Refuse settings that bitwise equality at every world size rules out."""
    batch, shards = run.batch, run.elastic.shards
    if shards < 1 or shards & (shards - 1):
        below = 1 << max(shards.bit_length() - 1, 0)
        raise RequestError(f"elastic.shards={shards} is not a power of two: type elastic.shards={below} or {2 * below}")
    if batch.policy in ("bounded", "goodput") or batch.global_batch is None:
        raise RequestError(
            f"batch.policy={batch.policy} with elastic.exact=true: the batch must be the same at every world size: "
            "type batch.policy=hold batch.global=256"
        )
    wrong = {
        "batch.accumulation": (batch.accumulation != "auto", "auto"),
        "train.precision": (run.train.precision == "fp16", "bf16"),
        "train.compile": (run.train.compile, "false"),
        "strategy.name": (run.strategy.name != "ddp", "ddp"),
        "elastic.balance": (run.elastic.balance, "false"),
        "launch.threads": (run.launch.threads not in (None, 1), "1"),
    }
    for key, (refused, mend) in wrong.items():
        if refused:
            value = str(_value(run, key)).lower()
            raise RequestError(f"{key}={value} does not work with elastic.exact=true: type {key}={mend}")


def _check_hang(run: Run) -> None:
    hang_s, first_s = run.elastic.hang_s, run.elastic.first_s
    if not hang_s >= 1:
        raise RequestError(f"elastic.hang_s={hang_s} is below 1 second: type elastic.hang_s=8, or 1e9 to disable it")
    if not first_s >= hang_s:
        raise RequestError(f"elastic.first_s={first_s} is below elastic.hang_s={hang_s}: type elastic.first_s={hang_s}")


def _check_tune(run: Run) -> None:
    sizes, budget_s = run.tune.sizes, run.tune.budget_s
    if sizes is not None and (not sizes or min(sizes) < 1):
        raise RequestError(f"tune.sizes={list(sizes)} must list sizes >= 1: type e.g. tune.sizes=[20,45]")
    if sizes is not None and run.tune.max is not None:
        raise RequestError(f"tune.max={run.tune.max} has no effect if tune.sizes is set: remove one of them")
    if budget_s is not None and not 0 < budget_s < math.inf:
        raise RequestError(f"tune.budget_s={budget_s} must be > 0: type e.g. tune.budget_s=120")


def _check_target(run: Run) -> None:
    target = run.train.target
    bounds = [bound for bound in (target.at_least, target.at_most) if bound is not None]
    wants = target.metric is not None or bool(bounds) or run.train.stop_at_target
    if wants and (target.metric is None or len(bounds) != 1 or not math.isfinite(bounds[0])):
        raise RequestError(
            f"train.target={{metric: {target.metric}, at_least: {target.at_least}, at_most: {target.at_most}}} needs a "
            "metric and one finite bound: type train.target.metric=val/accuracy train.target.at_least=0.95"
        )
