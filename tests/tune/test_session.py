"""Requests that tune refuses before it measures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.config.schema import RunConfig, TuneConfig
from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes, make_training_plan
from launcher.tune.session import check_tune_request, compute_largest_size


def test_unmeasurable_size_is_refused_with_fix() -> None:
    config = RunConfig(
        recipe={"_target_": "x"}, optimizer={"_target_": "torch.optim.SGD"}, tune=TuneConfig(sizes=(20, 800))
    )
    config = replace(config, lr=replace(config.lr, base=0.1, base_batch=32))
    with pytest.raises(UsageError, match=r"^tune\.sizes: 800 samples on each of 2 workers .* type 718 or less$"):
        check_tune_request(config, DatasetSizes(1437, 360), 2)
    bounded = replace(config, tune=TuneConfig(max=100))
    assert (
        compute_largest_size(
            bounded, DatasetSizes(1437, 360), make_training_plan(bounded, DatasetSizes(1437, 360), 2).batch_plan
        )
        == 100
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TuneConfig(sizes=()), r"^tune\.sizes=\[\] must list sizes >= 1"),
        (TuneConfig(sizes=(8, 0)), r"^tune\.sizes=\[8, 0\] must list sizes >= 1: type e\.g\. tune\.sizes=\[20,45\]$"),
        (TuneConfig(sizes=(8,), max=9), r"^tune\.max=9 has no effect if tune\.sizes is set"),
        (TuneConfig(max=0), r"^tune\.max=0 is below 1"),
        (TuneConfig(budget_s=float("nan")), r"^tune\.budget_s=nan must be > 0"),
        (TuneConfig(budget_s=-1.0), r"^tune\.budget_s=-1\.0 must be > 0"),
    ],
)
def test_invalid_tune_options_are_refused(options: TuneConfig, message: str) -> None:
    config = RunConfig(recipe={"_target_": "x"}, optimizer={"_target_": "torch.optim.SGD"}, tune=options)
    with pytest.raises(UsageError, match=message):
        make_training_plan(replace(config, lr=replace(config.lr, base=0.1, base_batch=32)), DatasetSizes(1437, 360), 1)
