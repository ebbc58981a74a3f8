"""One table of limits, which composing and planning both use."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from launcher.config.keys import config_keys, from_mapping
from launcher.config.limits import LIMITS, get_value, iter_limit_errors
from launcher.config.schema import BatchConfig, ElasticConfig, PlanConfig, RunConfig, ScheduleConfig
from launcher.errors import UsageError

DEFAULTS = RunConfig()


def test_limits_name_only_keys_that_exist() -> None:
    assert LIMITS.keys() <= config_keys().keys()
    assert list(iter_limit_errors(DEFAULTS)) == []


@pytest.mark.parametrize("key", sorted(LIMITS))
def test_value_at_the_limit_is_allowed(key: str) -> None:
    limit = LIMITS[key]
    assert all(limit.allows(end) is not limit.above for end in [limit.low] if math.isfinite(end))
    assert not any(limit.allows(value) for value in (math.nan, math.inf, -math.inf))
    assert math.isinf(limit.low) or not limit.allows(limit.low - 1)
    assert math.isinf(limit.high) or limit.allows(limit.high)


def test_default_values_are_within_the_limits() -> None:
    for key, limit in LIMITS.items():
        value = get_value(DEFAULTS, key)
        assert not isinstance(value, int | float) or limit.allows(value), key


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(DEFAULTS, schedule=ScheduleConfig(patience=0)),
            "schedule.patience=0 is below 1: type schedule.patience=1 or more",
        ),
        (
            replace(DEFAULTS, seed=10**400),
            f"seed={'1' + '0' * 76}... is too large: type a whole number from 0 to 2**63 - 1",
        ),
        (
            replace(DEFAULTS, plan=PlanConfig(world_sizes=(2, 0))),
            "plan.world_sizes=[2,0]: world sizes must be >= 1, e.g. plan.world_sizes=[1,2,8]",
        ),
        (
            replace(DEFAULTS, batch=BatchConfig(min_global=8, max_global=4)),
            "batch.min_global=8 is above batch.max_global=4: type batch.max_global=8 or more",
        ),
        (
            replace(DEFAULTS, elastic=ElasticConfig(min_workers=3, max_workers=2)),
            "elastic.max_workers=2 is below elastic.min_workers=3: type elastic.max_workers=3 or more",
        ),
    ],
)
def test_error_names_key_value_and_fix(config: RunConfig, message: str) -> None:
    assert list(iter_limit_errors(config)) == [message]


def test_number_beyond_every_float_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^lr\.base=10+\.\.\.: expected a number or null, e\.g\. lr\.base=0\.1$"):
        from_mapping({"lr": {"base": 10**400}})
    assert from_mapping({"seed": 10**400}).seed == 10**400
