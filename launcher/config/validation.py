"""Check configuration values beyond their types, before anything starts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, Literal

from launcher.config.coercion import CoercionError, coerce, describe_type, format_value
from launcher.config.keys import closest_match, flatten
from launcher.config.schema import LaunchConfig, RunConfig
from launcher.config.slurm_syntax import check_launch_keys
from launcher.config.strategy_checks import config_errors as strategy_problems
from launcher.errors import UsageError

__all__ = ["validate"]

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SEED_LIMIT = 2**63

#: The smallest allowed value of each key; None is handled where the key is used.
MIN_VALUES: Mapping[str, float] = {
    "batch.per_device": 1,
    "batch.accumulation": 1,
    "batch.global": 1,
    "batch.min_global": 1,
    "batch.max_global": 1,
    "lr.base": 0,
    "lr.base_batch": 1,
    "data.num_workers": 0,
    "data.prefetch_factor": 1,
    "elastic.min_workers": 1,
    "elastic.max_workers": 1,
    "elastic.max_restarts": 0,
    "elastic.shards": 1,
    "launch.workers": 1,
    "launch.threads": 1,
    "checkpoint.keep": 1,
    "log.every": 1,
    "schedule.patience": 0,
    "seed": 0,
    "sweep.max_parallel": 1,
    "sweep.trials": 1,
}
POSITIVE_KEYS = ("launch.timeout_s", "train.clip_norm", "schedule.factor")

#: Sink name -> its options and their types.
SINK_OPTION_TYPES: Mapping[str, Mapping[str, Any]] = {
    "console": {},
    "tensorboard": {},
    "wandb": {
        "project": str | None,
        "entity": str | None,
        "group": str | None,
        "tags": tuple[str, ...],
        "mode": Literal["online", "offline", "disabled"] | None,
    },
}


def validate(config: RunConfig) -> RunConfig:
    """Return the configuration unchanged if it is valid.

    Raises:
        UsageError: names the first invalid value.
    """
    for problem in _iter_problems(config):
        raise UsageError(problem)
    return config


def _iter_problems(config: RunConfig) -> Iterator[str]:
    yield from _check_bounds(flatten(config))
    yield from _check_run_and_launch(config)
    yield from _check_target(config)
    yield from _check_optimizer(config.optimizer)
    yield from strategy_problems(config)
    for name, options in config.sink.items():
        yield from _check_sink(name, options)


def _check_bounds(values: Mapping[str, Any]) -> Iterator[str]:
    for key, least in MIN_VALUES.items():
        value = values[key]
        if isinstance(value, int | float) and value < least:
            yield f"{key}={format_value(value)} is below {least:g}: type {key}={least:g} or more"
    for key in POSITIVE_KEYS:
        value = values[key]
        if value is not None and value <= 0:
            yield f"{key}={format_value(value)} must be > 0: type a number above 0"
    if values["seed"] >= SEED_LIMIT:
        yield f"seed={values['seed']} is too large: type a whole number below 2**63"
    low, high = values["elastic.min_workers"], values["elastic.max_workers"]
    if high is not None and high < low:
        yield f"elastic.max_workers={high} is below elastic.min_workers={low}: type elastic.max_workers={low} or more"
    if any(world < 1 for world in values["plan.world_sizes"] or ()):
        yield f"plan.world_sizes={format_value(values['plan.world_sizes'])}: world sizes must be >= 1, e.g. plan.world_sizes=[1,2,8]"


def _check_run_and_launch(config: RunConfig) -> Iterator[str]:
    name = config.run.name
    if name is not None and not RUN_NAME.fullmatch(name):
        yield f"run.name={format_value(name)}: type up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
    if config.run.dir == "":
        yield "run.dir= is empty: type a folder, e.g. run.dir=runs/first"
    if config.launch.kind == "slurm":
        check_launch_keys(config.launch)
    elif config.launch.nodes != "1":
        yield f"launch.nodes={config.launch.nodes}: launch=local uses this machine only: type launch=slurm"
    else:
        yield from _check_slurm_only_keys(config.launch)
    for variable in config.launch.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            yield f"launch.env.{variable} is not a valid environment variable name: use letters, digits and _"


def _check_slurm_only_keys(launch: LaunchConfig) -> Iterator[str]:
    for name in ("time", "partition", "account", "qos", "constraint", "extra"):
        if value := getattr(launch, name):
            yield f"launch.{name}={format_value(value)} has no effect under launch=local: type launch=slurm, or remove it"


def _check_target(config: RunConfig) -> Iterator[str]:
    target = config.train.target
    given = [bound for bound in (target.at_least, target.at_most) if bound is not None]
    if target.metric is None and given:
        yield "train.target.metric is not set: type the metric to watch, e.g. train.target.metric=val/accuracy"
    if target.metric is not None and len(given) != 1:
        yield f"train.target.metric={target.metric} needs either train.target.at_least= or train.target.at_most="
    if config.train.stop_at_target and target.metric is None:
        yield "train.stop_at_target=true has no target: type train.target.metric=val/accuracy and a bound"


def _check_optimizer(optimizer: Mapping[str, Any]) -> Iterator[str]:
    if "lr" in optimizer:
        rate = format_value(optimizer["lr"])
        yield f"optimizer.lr={rate}: the learning rate is set by lr.base and the schedule: type lr.base={rate}"
    if not isinstance(optimizer.get("_target_"), str):
        yield "optimizer._target_ names no class: type optimizer=sgd or optimizer._target_=torch.optim.RAdam"
    for name, value in optimizer.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"optimizer.{name}={value}: type a finite number"


def _check_sink(name: str, options: Any) -> Iterator[str]:
    if name not in SINK_OPTION_TYPES:
        yield f"sink={name} is not a sink: choose from {', '.join(sorted(SINK_OPTION_TYPES))}"
    elif not isinstance(options, Mapping | NoneType):
        yield f"sink.{name}={format_value(options)}: expected a mapping of options"
    else:
        for option, value in (options or {}).items():
            yield from _check_sink_option(name, option, value)


def _check_sink_option(name: str, option: str, value: Any) -> Iterator[str]:
    kinds = SINK_OPTION_TYPES[name]
    if option not in kinds:
        meant = closest_match(option, kinds)
        hint = f"did you mean sink.{name}.{meant}?" if meant else f"{name} takes {', '.join(kinds) or 'none'}"
        yield f"sink.{name}.{option} is not a key: {hint}"
        return
    try:
        coerce(value, kinds[option])
    except CoercionError:
        yield f"sink.{name}.{option}={format_value(value)}: expected {describe_type(kinds[option])}"
