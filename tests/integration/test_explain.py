"""`launcher explain` on really trained runs: the same recipe, once with a slow data loader on one of two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_job import run_launcher

pytestmark = [pytest.mark.slow, pytest.mark.alone]

RECIPE = ("recipe=mlp", "train.duration=60ba", "train.validate_every=60ba", "sink=console", "launch.workers=2")


def test_slow_data_loader_is_named(tmp_path: Path) -> None:
    run_launcher(tmp_path, *RECIPE, "run.name=plain")
    run_launcher(tmp_path, *RECIPE, "run.name=slow", LAUNCHER_TEST_FAULTS="1", FAULT="slow@data:1:0")
    alone: dict[str, Any] = json.loads(run_launcher(tmp_path, "explain", "slow", "format=json").stdout)
    assert alone["bottleneck"] == "data"
    assert alone["share"] > 0.5
    assert [line for line in alone["advice"] if "the others wait for rank 1: its data takes" in line]
    both: dict[str, Any] = json.loads(run_launcher(tmp_path, "explain", "slow", "plain", "format=json").stdout)
    assert (both["faster"], both["grew"]) == ("B", "data")
    assert both["ratio"] > 1.5
