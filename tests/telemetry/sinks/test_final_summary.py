"""The final summary: stages, bottleneck, noise scale."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from launcher.system.formatting import (
    Style,
)
from launcher.telemetry.records import MetricsRow
from launcher.telemetry.sinks.final_summary import describe_bottleneck, format_closing_lines, format_stage_table
from launcher.telemetry.sinks.running_stats import RunningStats, StageShare


def test_small_compute_share_is_called_largest_part() -> None:
    stages = [StageShare("forward", 4.0, 0.4), StageShare("other", 3.5, 0.35), StageShare("data", 2.5, 0.25)]
    facts = {"device": "cpu", "world": 2, "cores": 8}
    assert describe_bottleneck(stages, facts) == "compute, 40%, the largest part. Faster: more workers or a GPU"


@pytest.mark.parametrize("facts", [{"world": 2, "cores": 2}, {"world": 8, "nodes": 2, "cores": 4}, {"world": 1}])
def test_more_workers_are_not_advised_without_free_cores(facts: dict[str, int]) -> None:
    """Nor where the number of cores is unknown, as in runs of earlier versions."""
    stages = [StageShare("forward", 4.0, 0.4), StageShare("other", 3.5, 0.35)]
    assert describe_bottleneck(stages, {"device": "cpu", **facts}).endswith("Faster: a GPU or more machines")


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        ("data", "data.num_workers=2"),
        ("sync", "batch.accumulation"),
        ("optimizer", "larger batch"),
        ("checkpoint", "checkpoint.every"),
        ("other", "train.validate_every"),
        ("transfer", "batch.per_device"),
        ("forward", "bf16"),
    ],
)
def test_each_bottleneck_has_advice(stage: str, advice: str) -> None:
    stages = [StageShare(stage, 70.0, 0.7), StageShare("backward" if stage == "forward" else "forward", 30.0, 0.3)]
    text = describe_bottleneck(stages, {"device": "cuda", "precision": "fp32"})
    assert text.startswith("compute, 100%" if stage == "forward" else f"{stage}, 70%")
    assert advice in text


def test_stage_table_without_stages_is_empty() -> None:
    assert format_stage_table([], Style(False), 80) == []


@pytest.mark.parametrize(
    ("noise", "line"),
    [
        ({"scale": 312.4, "scale_low": 280.0, "scale_high": 350.0}, "312.4 samples (280 to 350) · batch 64"),
        ({"scale_low": 280.0}, "at least 280 samples · batch 64"),
        ({}, None),
    ],
)
def test_final_summary_shows_noise_scale(noise: Mapping[str, float], line: str | None) -> None:
    stats = RunningStats()
    values = {"batch/global": 64, "train/loss": 1.0, **{f"noise/{key}": value for key, value in noise.items()}}
    stats.add(MetricsRow(time=0.0, samples=64, update=1, epoch=0, world=1, generation=1, values=values))
    text = "\n".join(format_closing_lines(stats, {}, {}, Style(False), 80))
    assert (line in text) if line else ("noise" not in text)
