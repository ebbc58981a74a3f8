"""Check configuration values beyond their types, before anything starts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, Literal

from launcher.errors import RequestError
from launcher.keys import flat, nearest
from launcher.settings import LaunchSettings, Run
from launcher.slurm import check_launch
from launcher.strategies import problems as strategy_problems
from launcher.typed import MisfitError, fit, shown, words

__all__ = ["check"]

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SEEDS = 2**63

#: The smallest allowed value of each key; None is handled where the key is used.
LEAST: Mapping[str, float] = {
    "batch.per_device": 1,
    "batch.accumulation": 1,
    "batch.global": 1,
    "batch.min_global": 1,
    "batch.max_global": 1,
    "lr.base": 0,
    "lr.base_batch": 1,
    "data.workers": 0,
    "data.prefetch": 1,
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
    "sweep.at_once": 1,
    "sweep.trials": 1,
}
POSITIVE = ("launch.timeout_s", "train.clip_norm", "schedule.factor")

#: Sink name -> its options and their types.
SINKS: Mapping[str, Mapping[str, Any]] = {
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


def check(run: Run) -> Run:
    """Return the configuration unchanged if it is valid.

    Raises:
        UsageError: names the first invalid value.
    """
    for problem in _problems(run):
        raise RequestError(problem)
    return run


def _problems(run: Run) -> Iterator[str]:
    yield from _bounds(flat(run))
    yield from _places(run)
    yield from _targets(run)
    yield from _optimizer(run.optimizer)
    yield from strategy_problems(run)
    for name, options in run.sink.items():
        yield from _sink(name, options)


def _bounds(values: Mapping[str, Any]) -> Iterator[str]:
    for key, least in LEAST.items():
        value = values[key]
        if isinstance(value, int | float) and value < least:
            yield f"{key}={shown(value)} is below {least:g}: type {key}={least:g} or more"
    for key in POSITIVE:
        value = values[key]
        if value is not None and value <= 0:
            yield f"{key}={shown(value)} must be > 0: type a number above 0"
    if values["seed"] >= SEEDS:
        yield f"seed={values['seed']} is too large: type a whole number below 2**63"
    low, high = values["elastic.min_workers"], values["elastic.max_workers"]
    if high is not None and high < low:
        yield f"elastic.max_workers={high} is below elastic.min_workers={low}: type elastic.max_workers={low} or more"
    if any(world < 1 for world in values["plan.worlds"] or ()):
        yield f"plan.worlds={shown(values['plan.worlds'])}: world sizes must be >= 1, e.g. plan.worlds=[1,2,8]"


def _places(run: Run) -> Iterator[str]:
    name = run.run.name
    if name is not None and not RUN_NAME.fullmatch(name):
        yield f"run.name={shown(name)}: type up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
    if run.run.dir == "":
        yield "run.dir= is empty: type a folder, e.g. run.dir=runs/first"
    if run.launch.kind == "slurm":
        check_launch(run.launch)
    elif run.launch.nodes != "1":
        yield f"launch.nodes={run.launch.nodes}: launch=local uses this machine only: type launch=slurm"
    else:
        yield from _without_slurm(run.launch)
    for variable in run.launch.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            yield f"launch.env.{variable} is not a valid environment variable name: use letters, digits and _"


def _without_slurm(launch: LaunchSettings) -> Iterator[str]:
    for name in ("time", "partition", "account", "qos", "constraint", "extra"):
        if value := getattr(launch, name):
            yield f"launch.{name}={shown(value)} has no effect under launch=local: type launch=slurm, or remove it"


def _targets(run: Run) -> Iterator[str]:
    target = run.train.target
    given = [bound for bound in (target.at_least, target.at_most) if bound is not None]
    if target.metric is None and given:
        yield "train.target.metric is not set: type the metric to watch, e.g. train.target.metric=val/accuracy"
    if target.metric is not None and len(given) != 1:
        yield f"train.target.metric={target.metric} needs either train.target.at_least= or train.target.at_most="
    if run.train.stop_at_target and target.metric is None:
        yield "train.stop_at_target=true has no target: type train.target.metric=val/accuracy and a bound"


def _optimizer(optimizer: Mapping[str, Any]) -> Iterator[str]:
    if "lr" in optimizer:
        rate = shown(optimizer["lr"])
        yield f"optimizer.lr={rate}: the learning rate is set by lr.base and the schedule: type lr.base={rate}"
    if not isinstance(optimizer.get("_target_"), str):
        yield "optimizer._target_ names no class: type optimizer=sgd or optimizer._target_=torch.optim.RAdam"
    for name, value in optimizer.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"optimizer.{name}={value}: type a finite number"


def _sink(name: str, options: Any) -> Iterator[str]:
    if name not in SINKS:
        yield f"sink={name} is not a sink: choose from {', '.join(sorted(SINKS))}"
    elif not isinstance(options, Mapping | NoneType):
        yield f"sink.{name}={shown(options)}: expected a mapping of options"
    else:
        for option, value in (options or {}).items():
            yield from _sink_option(name, option, value)


def _sink_option(name: str, option: str, value: Any) -> Iterator[str]:
    kinds = SINKS[name]
    if option not in kinds:
        meant = nearest(option, kinds)
        hint = f"did you mean sink.{name}.{meant}?" if meant else f"{name} takes {', '.join(kinds) or 'none'}"
        yield f"sink.{name}.{option} is not a key: {hint}"
        return
    try:
        fit(value, kinds[option])
    except MisfitError:
        yield f"sink.{name}.{option}={shown(value)}: expected {words(kinds[option])}"
