"""Check a composed configuration beyond its types: limits, names, the launch keys, the strategy and the sinks.

What contradicts what in a plan is checked by `launcher.config.consistency`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, Literal

from launcher.config.coercion import CoercionError, coerce, describe_type, format_value
from launcher.config.consistency import iter_target_errors
from launcher.config.keys import closest_match
from launcher.config.limits import iter_limit_errors
from launcher.config.schema import LaunchConfig, RunConfig
from launcher.config.slurm_syntax import check_launch_keys
from launcher.config.strategy_checks import config_errors
from launcher.errors import UsageError
from launcher.system.run_files import RUN_NAME_PATTERN

__all__ = ["validate_composed"]


#: Sink name -> its options and their types.
SINK_OPTION_TYPES: Mapping[str, Mapping[str, Any]] = {
    "console": {},
    "tensorboard": {},
    "wandb": {
        "project": str | None,
        "entity": str | None,
        "group": str | None,
        "name": str | None,
        "tags": tuple[str, ...],
        "mode": Literal["online", "offline", "disabled"] | None,
        "system_metrics": bool,
    },
}


def validate_composed(config: RunConfig) -> RunConfig:
    """Return the configuration unchanged if it is valid.

    Raises:
        UsageError: names the first invalid value.
    """
    for problem in _iter_problems(config):
        raise UsageError(problem)
    return config


def _iter_problems(config: RunConfig) -> Iterator[str]:
    yield from iter_limit_errors(config)
    yield from _check_run_and_launch(config)
    yield from iter_target_errors(config)
    yield from _check_optimizer(config.optimizer)
    yield from config_errors(config)
    for name, options in config.sink.items():
        yield from _check_sink(name, options)


def _check_run_and_launch(config: RunConfig) -> Iterator[str]:
    name = config.run.name
    if name is not None and not RUN_NAME_PATTERN.fullmatch(name):
        yield (
            f"run.name={format_value(name)}: "
            "type up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
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
            setting = f"launch.{name}={format_value(value)}"
            yield f"{setting} has no effect under launch=local: type launch=slurm, or remove it"


def _check_optimizer(optimizer: Mapping[str, Any]) -> Iterator[str]:
    if "lr" in optimizer:
        lr = format_value(optimizer["lr"])
        yield f"optimizer.lr={lr}: the learning rate is set by lr.base and the schedule: type lr.base={lr}"
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
        match = closest_match(option, kinds)
        hint = f"did you mean sink.{name}.{match}?" if match else f"{name} takes {', '.join(kinds) or 'none'}"
        yield f"sink.{name}.{option} is not a key: {hint}"
        return
    try:
        coerce(value, kinds[option])
    except CoercionError:
        yield f"sink.{name}.{option}={format_value(value)}: expected {describe_type(kinds[option])}"
