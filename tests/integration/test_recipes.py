"""The shipped recipes and experiments, trained to their end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.jobs import read_events, read_rows
from tests.helpers.small_job import TORCHRUN, run_command, run_launcher

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("recipe", ["resnet", "gpt", pytest.param("mlp", marks=pytest.mark.core)])
def test_recipe_trains_under_own_torchrun(tmp_path: Path, recipe: str) -> None:
    argv = [*TORCHRUN, "--nproc-per-node=2", "-m", "launcher", f"recipe={recipe}", "run.name=r"]
    completed = run_command([*argv, *(["recipe.text_bytes=60000"] if recipe == "gpt" else [])], tmp_path)
    finished = json.loads((tmp_path / "runs/r/done.json").read_text())
    assert finished["metrics"]["val/accuracy"] >= {"resnet": 0.97, "gpt": 0.2, "mlp": 0.9}[recipe]
    assert "offline" in completed.stdout + completed.stderr, "no wandb key: one line, and the run continues"
    stages = ("data", "transfer", "forward", "backward", "sync", "optimizer", "checkpoint", "other")
    whole = [row for row in read_rows(tmp_path / "runs/r")[1:] if "throughput/samples_per_s" in row]
    assert all(sum(row[f"stage/{stage}/share"] for stage in stages) == pytest.approx(1) for row in whole)
    wall_ms = sum(row["batch/global"] / row["throughput/samples_per_s"] * 1e3 for row in whole)
    assert sum(row[f"stage/{stage}/ms"] for row in whole for stage in stages) == pytest.approx(wall_ms, rel=0.25)
    assert list((tmp_path / "runs/r/wandb").glob("offline-run-*/*.wandb"))


SMALL = [
    *("recipe.layers=2", "recipe.width=64", "recipe.heads=4", "recipe.block=64", "recipe.text_bytes=60000"),
    *("batch.global=32", "lr.base_batch=32", "train.duration=8ba"),
]


@pytest.mark.parametrize(("experiment", "strategy"), [("gpt2_fsdp", "fsdp"), ("gpt2_zero3", "deepspeed")])
def test_experiment_trains_at_a_small_size(workdir: Path, experiment: str, strategy: str) -> None:
    """In bf16 as at full size; the output names the strategy, and the loss falls."""
    completed = run_launcher(workdir, f"experiment={experiment}", *SMALL, "launch.workers=2", "run.name=small")
    assert strategy in completed.stdout + completed.stderr
    [start] = read_events(workdir / "runs/small", "start")
    assert (start["strategy"], start["precision"], start["world"]) == (strategy, "bf16", 2)
    losses = [row["train/loss"] for row in read_rows(workdir / "runs/small")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
