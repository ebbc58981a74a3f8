"""The numeric limits of the configuration keys: one table, checked when a configuration is composed and planned."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from launcher.config.coercion import format_value
from launcher.config.schema import ALIASES, RunConfig

__all__ = ["LIMITS", "Limit", "get_value", "iter_limit_errors"]


@dataclass(frozen=True)
class Limit:
    """The finite numbers from `low` to `high` that a key allows, and the error message for all others.

    `above`: `low` itself is refused too. `problem` and `advice` are the two halves of the message; `below` replaces
    `problem` for a value below `low`. By default they say "is below LOW: type KEY=LOW or more".
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    problem: str = ""
    advice: str = ""
    below: str = ""

    def allows(self, value: float) -> bool:
        is_within = -math.inf < value < math.inf and self.low <= value <= self.high
        return is_within and not (self.above and value == self.low)

    def format_error(self, key: str, value: float) -> str:
        problem = (self.below if value < self.low else "") or self.problem or f"is below {self.low:g}"
        return f"{key}={format_value(value)} {problem}: type {self.advice or f'{key}={self.low:g} or more'}"


_NOT_NEGATIVE, _AT_LEAST_ONE = Limit(0), Limit(1)
_POSITIVE = Limit(0, above=True, problem="must be > 0", advice="a number above 0")
_SHARE = Limit(0, 1, problem="is not a share of the learning rate", advice="a number from 0 to 1")

#: What each key allows. Values that are not numbers (null, auto, full) are not checked.
LIMITS: Mapping[str, Limit] = {
    "batch.per_device": _AT_LEAST_ONE,
    "batch.accumulation": _AT_LEAST_ONE,
    "batch.global": _AT_LEAST_ONE,
    "batch.min_global": _AT_LEAST_ONE,
    "batch.max_global": _AT_LEAST_ONE,
    "lr.base": Limit(
        0,
        sys.float_info.max,
        above=True,
        problem="is not a learning rate",
        advice="a finite number above 0, e.g. lr.base=0.1",
        below="is below 0",
    ),
    "lr.base_batch": _AT_LEAST_ONE,
    "schedule.warmup_from": _SHARE,
    "schedule.start": _SHARE,
    "schedule.end": _SHARE,
    "schedule.min": _SHARE,
    "schedule.factor": Limit(
        0, 1, above=True, problem="would not lower the learning rate", advice="a number above 0, up to 1"
    ),
    "schedule.patience": _AT_LEAST_ONE,
    "train.clip_norm": _POSITIVE,
    "train.target.at_least": Limit(problem="is not a bound", advice="a finite number, e.g. train.target.at_least=0.95"),
    "train.target.at_most": Limit(problem="is not a bound", advice="a finite number, e.g. train.target.at_most=0.1"),
    "data.num_workers": _NOT_NEGATIVE,
    "data.prefetch_factor": _AT_LEAST_ONE,
    "elastic.min_workers": _AT_LEAST_ONE,
    "elastic.max_workers": _AT_LEAST_ONE,
    "elastic.max_restarts": _NOT_NEGATIVE,
    "elastic.shards": Limit(1, problem="is not a power of two", advice="elastic.shards=1 or 2"),
    "elastic.hang_timeout_s": Limit(
        1, problem="is below 1 second", advice="elastic.hang_timeout_s=8, or 1e9 to disable it"
    ),
    "launch.workers": _AT_LEAST_ONE,
    "launch.threads": _AT_LEAST_ONE,
    "launch.timeout_s": _POSITIVE,
    "launch.grace_s": _POSITIVE,
    "checkpoint.keep": _AT_LEAST_ONE,
    "log.every": _AT_LEAST_ONE,
    "tune.max": _AT_LEAST_ONE,
    "tune.budget_s": Limit(0, above=True, problem="must be > 0", advice="e.g. tune.budget_s=120"),
    "sweep.max_parallel": _AT_LEAST_ONE,
    "sweep.trials": _AT_LEAST_ONE,
    "seed": Limit(
        0, 2**63 - 1, problem="is too large", advice="a whole number from 0 to 2**63 - 1", below="is below 0"
    ),
}


def iter_limit_errors(config: RunConfig) -> Iterator[str]:
    """One line for each number that is outside its key's limits, and for each range whose ends are reversed."""
    for key, limit, read in _LIMIT_READERS:
        value = read(config)
        if isinstance(value, int | float) and not limit.allows(value):
            yield limit.format_error(key, value)
    yield from _check_lists(config)
    yield from _check_ranges(config)


def get_value(config: RunConfig, key: str) -> Any:
    """The value of a dotted key, e.g. `batch.global`."""
    return _make_reader(key)(config)


def _make_reader(key: str) -> attrgetter[Any]:
    return attrgetter(".".join(ALIASES.get(name, name) for name in key.split(".")))


_LIMIT_READERS = tuple((key, limit, _make_reader(key)) for key, limit in LIMITS.items())


def _check_lists(config: RunConfig) -> Iterator[str]:
    world_sizes, sizes = config.plan.world_sizes, config.tune.sizes
    if any(size < 1 for size in world_sizes or ()):
        yield f"plan.world_sizes={format_value(world_sizes)}: world sizes must be >= 1, e.g. plan.world_sizes=[1,2,8]"
    if sizes is not None and (not sizes or min(sizes) < 1):
        yield f"tune.sizes={list(sizes)} must list sizes >= 1: type e.g. tune.sizes=[20,45]"


def _check_ranges(config: RunConfig) -> Iterator[str]:
    low, high = config.elastic.min_workers, config.elastic.max_workers
    if high is not None and high < low:
        yield f"elastic.max_workers={high} is below elastic.min_workers={low}: type elastic.max_workers={low} or more"
    smallest, largest = config.batch.min_global, config.batch.max_global
    if smallest is not None and largest is not None and smallest > largest:
        yield (
            f"batch.min_global={smallest} is above batch.max_global={largest}: type batch.max_global={smallest} or more"
        )
    hang_s, first_s = config.elastic.hang_timeout_s, config.elastic.first_timeout_s
    if not first_s >= hang_s:
        yield (
            f"elastic.first_timeout_s={first_s} is below elastic.hang_timeout_s={hang_s}: "
            f"type elastic.first_timeout_s={hang_s}"
        )
