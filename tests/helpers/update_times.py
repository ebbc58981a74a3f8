"""A machine with known update times, and the profile that tune would measure on it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from launcher.config.schema import BatchConfig, LrConfig, RunConfig
from launcher.goodput.policy import (
    BatchChooser,
    TimingProfile,
)
from launcher.plan.training_plan import DatasetSizes

ALPHA_S, BETA_S, SYNC_S, EACH_S = 0.010, 0.0005, 0.004, 0.001


SIZES = DatasetSizes(20_000, 1000)


RUN = RunConfig(
    recipe={"_target_": "launcher.recipes.mlp.Mlp"},
    batch=BatchConfig(policy="goodput", per_device="auto"),
    lr=LrConfig(base=0.1, base_batch=64),
    optimizer={"_target_": "torch.optim.SGD"},
)


def compute_update_s(per_device: int, world: int, accumulation: int = 1) -> float:
    """Alpha and beta of a micro-batch, and exposed communication; gamma is 1."""
    sync_s = SYNC_S + EACH_S * max(world - 2, 0) if world > 1 else 0.0
    return accumulation * (ALPHA_S + BETA_S * per_device) + sync_s


def tune_result(world: int, sizes: tuple[int, ...] = (8, 16, 32, 64, 128)) -> dict[str, Any]:
    """A result of `tune` on a machine without timing noise."""
    points = []
    for size in sizes:
        seconds = compute_update_s(size, world)
        speed = world * size / seconds
        stages = {"sync": 1e3 * (seconds - compute_update_s(size, 1)), "optimizer": 0.0, "other": 0.0}
        points.append(
            {
                "per_device": size,
                "samples_per_s": speed,
                "low": speed / 1.01,
                "high": speed * 1.01,
                "ms_per_update": 1e3 * seconds,
                "stages": stages,
                "label": "rising",
            }
        )
    return {"points": points, "world": world, "nodes": 1, "accumulation": 1}


@lru_cache
def make_profile(*worlds: int) -> TimingProfile:
    """Fitted once."""
    return TimingProfile.from_documents([tune_result(world) for world in worlds or (1, 2, 4)])


def make_chooser(*worlds: int, config: RunConfig = RUN) -> BatchChooser:
    return BatchChooser(make_profile(*worlds), config, SIZES.train)
