"""Which run directory a command uses: a run that ended before its first checkpoint does not hold its name."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launcher.config.compose import to_yaml
from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.run_dir.open_run import (
    OpenedRun,
    resolve_directory,
    reuse_resolved_batch,
    run_path,
    write_run_files,
)
from launcher.run_dir.resume import ResumeDecision
from launcher.run_dir.run_directory import RunDirectory

CONFIG = RunConfig(
    recipe={"_target_": "launcher.recipes.mlp.Mlp", "width": 64}, optimizer={"_target_": "torch.optim.SGD"}
)
OTHER = replace(CONFIG, seed=5)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    """A run that was started and wrote rows, but has no checkpoint."""
    run_dir = RunDirectory(tmp_path / "x")
    run_dir.create()
    run_dir.increment_generation()
    run_dir.run_yaml.write_text(to_yaml(replace(CONFIG, run=replace(CONFIG.run, name="x", dir=str(run_dir.path)))))
    for file in (run_dir.metrics, run_dir.events, run_dir.plan_json):
        file.write_text("{}\n")
    return run_dir


def decide(run_dir: RunDirectory, config: RunConfig) -> ResumeDecision:
    _, path, decision = resolve_directory(config, run_dir.path)
    assert path == run_dir.path, "it is the same directory, so that the name finds it again"
    return decision


def test_failed_run_without_checkpoint_does_not_hold_its_name(run_dir: RunDirectory) -> None:
    assert decide(run_dir, OTHER).starts_over
    assert decide(run_dir, CONFIG) == ResumeDecision(), "the same configuration needs no decision"


def test_checkpoint_being_written_does_not_count(run_dir: RunDirectory) -> None:
    (run_dir.checkpoints / ".tmp-update-00000001").mkdir()
    assert decide(run_dir, OTHER).starts_over


@pytest.mark.parametrize("holder", ["checkpoint", "done", "live process", "resume=must"])
def test_other_runs_hold_their_name(run_dir: RunDirectory, holder: str) -> None:
    config, lock = OTHER, None
    if holder == "checkpoint":
        (run_dir.checkpoints / "update-00000001").mkdir()  # also a damaged one: it may be all there is
    elif holder == "done":
        run_dir.done_json.write_text("{}")
    elif holder == "live process":
        lock = run_dir.lock()
    else:
        config = replace(OTHER, resume="must")
    with pytest.raises(UsageError, match=r"was trained with other values of seed"):
        resolve_directory(config, run_dir.path)
    if lock is not None:
        lock.release()


def test_records_of_the_replaced_run_are_kept_apart(run_dir: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    first_id = run_dir.ensure_wandb_id()
    opened: Any = SimpleNamespace(
        config=OTHER, run_dir=run_dir, decision=ResumeDecision(starts_over=True), is_restart=False
    )
    write_run_files(cast(OpenedRun, opened))
    assert not run_dir.metrics.exists()
    assert not run_dir.plan_json.exists(), "it would be taken for the plan before a resize"
    assert {path.name for path in run_dir.logs.iterdir()} == {
        *("metrics-g1.jsonl", "events-g1.jsonl", "plan-g1.json", "wandb-id-g1"),
    }
    assert run_dir.ensure_wandb_id() != first_id
    assert capsys.readouterr().err.startswith(f"note: {run_dir.path} ended before its first checkpoint")


def test_batch_size_of_a_failed_run_is_measured_again(run_dir: RunDirectory) -> None:
    auto = replace(CONFIG, batch=replace(CONFIG.batch, per_device="auto"))
    stored = replace(CONFIG, batch=replace(CONFIG.batch, per_device=48))
    run_dir.run_yaml.write_text(to_yaml(stored))
    assert reuse_resolved_batch(auto, run_dir.path).batch.per_device == "auto"
    assert reuse_resolved_batch(auto, run_dir.path, is_restart=True).batch.per_device == 48
    (run_dir.checkpoints / "update-00000001").mkdir()
    assert reuse_resolved_batch(auto, run_dir.path).batch.per_device == 48


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"SLURM_JOB_ID": "4711", "ENVIRONMENT": "BATCH"}, "mlp-4711"),
        ({"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "1"}, "mlp-4711"),
        ({"SLURM_JOB_ID": "4712", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3"}, "mlp-4711_3"),
    ],
)
def test_batch_job_is_named_by_its_id(
    env: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A requeued job has the same id, and so finds its run again."""
    assert choose_name(env, monkeypatch, tmp_path) == name


@pytest.mark.parametrize("env", [{}, {"SLURM_JOB_ID": "4711"}, {"SLURM_JOB_ID": "4711", "ENVIRONMENT": "login"}])
def test_other_runs_are_named_by_their_time(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In an interactive allocation, whose id every run has, as without Slurm."""
    assert re.fullmatch(r"mlp-\d{8}-\d{6}", choose_name(env, monkeypatch, tmp_path))


def choose_name(env: dict[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    for variable in [name for name in os.environ if name.startswith(("SLURM_", "WANDB_")) or name == "ENVIRONMENT"]:
        monkeypatch.delenv(variable)
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(folder)
    return run_path(CONFIG, None, 1).name
