"""The main job as a user runs it: real torchrun, real processes, real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import environment, events, furthest, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

RECIPE = '''
from dataclasses import dataclass
import random
import numpy
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from launcher.recipe import Loss

class Noisy:
    """Items that draw from every generator there is, as augmentation does."""
    def __init__(self, n):
        g = torch.Generator().manual_seed(1)
        self.x, self.n = torch.randn(n, 12, generator=g), n
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        shift = random.random() + float(numpy.random.rand()) + float(torch.rand(()))
        return self.x[i] + 0.01 * shift, int(self.x[i, :4].argmax())

@dataclass(frozen=True)
class Own:
    drop: float = 0.0
    tokens: bool = False
    mean: bool = False
    fail_on: int = -1
    def model(self):
        return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(self.drop), nn.Linear(32, 4))
    def dataset(self, split):
        return Noisy(203 if split == "train" else 5)
    def loss(self, model, batch):
        x, y = batch
        if int(__import__("os").environ["RANK"]) == self.fail_on:
            raise RuntimeError("boom")
        losses = cross_entropy(model(x), y, reduction="none")
        if self.mean:
            return Loss(losses.mean(), len(y))
        weights = 1 + y if self.tokens else torch.ones_like(y)
        return Loss((losses * weights).sum(), int(weights.sum()), {"right": (model(x).argmax(1) == y).sum()})
'''
OWN = ["recipe=own", "recipe._target_=own.Own", "recipe.trust=[own]", "lr.base=0.1", "lr.base_batch=50"]
HELD = [*OWN, "batch.global=50", "batch.per_device=9", "sink=[]", "train.duration=5ep"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(RECIPE)
    return tmp_path


def run(argv: list[str], here: Path, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        argv, cwd=here, env=environment(**env), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def driven(here: Path, *overrides: str, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "launcher", *overrides], here, status, **env)


def parameters(run_dir: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(run_dir / "model.safetensors"))


@pytest.mark.parametrize("extra", [[], ["+recipe.tokens=true"], ["data.tail=carry", "train.clip_norm=0.3"]])
def test_one_two_and_three_workers_train_the_same_model(here: Path, extra: list[str]) -> None:
    """Uneven shares (17, 17, 16), accumulation, tails of 3 samples, counts other than samples, clipping: fp64."""
    for world in (1, 2, 3):
        driven(here, *HELD, *extra, "train.precision=fp64", f"launch.workers={world}", f"run.name=w{world}")
    for world in (2, 3):
        assert furthest(here / "runs/w1", here / f"runs/w{world}") <= 1e-10
    last = [rows(here / f"runs/w{world}")[-1] for world in (1, 2, 3)]
    assert len({row["update"] for row in last}) == 1
    assert max(row["val/loss"] for row in last) - min(row["val/loss"] for row in last) <= 1e-9


@pytest.mark.parametrize("extra", [[], ["strategy=fsdp"]])
def test_a_loss_that_is_a_mean_is_told_where_training_begins_and_not_again(here: Path, extra: list[str]) -> None:
    job = [*HELD, *extra, "recipe.mean=true", "train.duration=1ep", "launch.workers=2", "run.name=mean"]
    driven(here, *job)
    (alarm,) = events(here / "runs/mean", "alarm")
    assert alarm["kind"] == "loss"
    assert alarm["detail"].startswith("loss() of Own returns a mean (MeanBackward0) and counts 9: return sums")
    driven(here, *job, "train.duration=2ep")
    assert len(events(here / "runs/mean", "alarm")) == 1, "a run that goes on was told"


def test_a_tail_smaller_than_the_workers_leaves_some_without_samples(here: Path) -> None:
    """203 samples in batches of 101: the tail has one sample, and ranks 1 and 2 have none."""
    for world in (1, 3):
        own = ["batch.global=101", "batch.per_device=40", "train.precision=fp64"]
        driven(here, *HELD, *own, f"launch.workers={world}", f"run.name=t{world}")
    assert furthest(here / "runs/t1", here / "runs/t3") <= 1e-10


def test_a_stopped_run_that_goes_on_ends_where_one_without_a_stop_does(here: Path) -> None:
    """Includes dropout and augmentation: their randomness depends on the position only, so no RNG state is carried."""
    job = [*HELD, "+recipe.drop=0.3", "launch.workers=2", "optimizer=adamw", "lr.base=0.01", "schedule=cosine"]
    driven(here, *job, "run.name=whole")
    (here / "runs/parts").mkdir(parents=True)
    driven(here, *job, "run.name=parts", LAUNCHER_TEST_FAULTS="1", FAULT="stop@forward:1:7")
    assert events(here / "runs/parts", "preempt")
    assert not (here / "runs/parts/done.json").exists()
    driven(here, *job, "run.name=parts")
    updates = [row["update"] for row in rows(here / "runs/parts")]
    assert updates == list(range(1, 26)), "none is lost and none repeated"
    assert furthest(here / "runs/whole", here / "runs/parts") == 0.0


def test_a_killed_worker_is_replaced_and_the_end_is_the_same(here: Path) -> None:
    job = [*HELD, "+recipe.drop=0.3", "launch.workers=2"]
    driven(here, *job, "run.name=whole")
    driven(here, *job, "run.name=killed", LAUNCHER_TEST_FAULTS="1", FAULT="kill@backward:1:12,kill@forward:0:19:2")
    assert furthest(here / "runs/whole", here / "runs/killed") == 0.0
    assert [event["generation"] for event in events(here / "runs/killed", "start")] == [1, 2, 3]
    assert {row["update"] for row in rows(here / "runs/killed")} == set(range(1, 26)), "no row is missing"
    done = json.loads((here / "runs/killed/done.json").read_text())
    assert done["restarts"] == 2
    assert done["recovery_s"] > 0
    assert done["lost_samples"] > 0, "the updates since the checkpoint are run again, and that is said"


def test_a_damaged_checkpoint_is_passed_over_with_an_alarm(here: Path) -> None:
    driven(here, *HELD, "run.name=d", LAUNCHER_TEST_FAULTS="1", FAULT="stop@forward:0:12")
    newest = sorted((here / "runs/d/checkpoints").iterdir())[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    driven(here, *HELD, "run.name=d")
    assert newest.name in events(here / "runs/d", "alarm")[0]["detail"]
    assert (here / "runs/d/done.json").exists()


def test_a_nan_on_one_rank_is_skipped_by_all_and_named(here: Path) -> None:
    driven(here, *HELD, "launch.workers=2", "run.name=n", LAUNCHER_TEST_FAULTS="1", FAULT="nan@forward:1:5")
    assert events(here / "runs/n", "alarm")[0]["ranks"] == [1]
    assert all(bool(value.isfinite().all()) for value in parameters(here / "runs/n").values())


def test_three_nans_in_a_row_end_the_job_without_restarts(here: Path) -> None:
    fault = "nan@forward:1:5,nan@forward:1:6,nan@forward:1:7"
    done = driven(here, *HELD, "launch.workers=2", "run.name=n", status=1, LAUNCHER_TEST_FAULTS="1", FAULT=fault)
    assert "3 updates in a row were not finite" in done.stderr.splitlines()[-1]
    assert len(events(here / "runs/n", "start")) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_error_is_the_last_line_and_an_event_of_each_start(here: Path, rank: int) -> None:
    """For any rank: rank 0 writes the events, but only knows that the failed rank is gone."""
    failing = [f"+recipe.fail_on={rank}", "elastic.max_restarts=1"]
    done = driven(here, *HELD, *failing, "launch.workers=2", "run.name=f", status=1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: rank {rank} failed in own.py:")
    assert "RuntimeError: boom" in last
    assert "Traceback" not in done.stderr
    written = events(here / "runs/f", "error")
    assert [(one["rank"], one["generation"], one["type"], one["message"]) for one in written] == [
        (rank, 1, "RuntimeError", "boom"),
        (rank, 2, "RuntimeError", "boom"),
    ]
    assert all(one["where"].startswith("own.py:") and (here / one["log"]).exists() for one in written)


def test_a_named_checkpoint_is_gone_on_from_until_the_job_has_saved_one_of_its_own(here: Path) -> None:
    """The workers die before the first save: resuming the newest checkpoint or starting fresh would be wrong."""
    driven(here, *HELD, "run.name=a", "checkpoint.every=1ep", "checkpoint.keep=9")
    named = "resume=runs/a/checkpoints/update-00000010"
    fault = {"LAUNCHER_TEST_FAULTS": "1", "FAULT": "kill@forward:0:12"}
    driven(here, *HELD, "run.name=b", "checkpoint.every=1ep", named, **fault)
    assert [event["update"] for event in events(here / "runs/b", "resume")] == [10, 10]
    assert rows(here / "runs/b")[0]["update"] == 11
    assert furthest(here / "runs/a", here / "runs/b") == 0.0


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]


def test_under_the_users_own_torchrun_an_error_is_said_once(here: Path) -> None:
    argv = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", "-m", "launcher", *HELD, "run.name=t"]
    wrong = run([*argv, "batch.per_device=-1"], here, status=1)
    assert len(errors(wrong)) == 1, "also when torchrun tries again"
    failed = run([*argv, "+recipe.fail_on=1"], here, status=1, LOGLEVEL="ERROR")
    first, second = errors(failed)
    assert first.startswith("error: rank 1 failed in own.py:")
    assert second.startswith("error: rank 1 failed in own.py:"), "once for each start, and never a consequence"
    written = events(here / "runs/t", "error")
    assert [(one["rank"], one["generation"]) for one in written] == [(1, 1), (1, 2)]


def test_the_finished_run_says_so_and_a_longer_one_goes_on(here: Path) -> None:
    driven(here, *HELD, "run.name=x")
    again = driven(here, *HELD, "run.name=x")
    assert "is complete" in again.stdout
    driven(here, *HELD, "run.name=x", "train.duration=6ep")
    assert rows(here / "runs/x")[-1]["samples"] == 6 * 203
    other = driven(here, *HELD, "run.name=x", "seed=3", status=2)
    assert "seed (0 before, 3 now)" in other.stderr
    driven(here, *HELD, "run.name=x", "seed=3", "resume=never")
    assert (here / "runs/x-2/done.json").exists()


def test_a_batch_ramp_is_events_with_the_old_and_the_new_rate(here: Path) -> None:
    driven(here, *HELD, "batch.ramp=[[0dur,0.5],[0.5dur,1]]", "run.name=r")
    first, second = events(here / "runs/r", "plan")
    assert (first["global"], second["global"], second["from"]["global"]) == (25, 50, 25)
    assert (second["from"]["lr"], second["lr"]) == (0.05, 0.1)


@pytest.mark.parametrize("recipe", ["resnet", "gpt", "mlp"])
def test_each_recipe_trains_under_the_users_own_torchrun(tmp_path: Path, recipe: str) -> None:
    argv = [*TORCHRUN, "--nproc-per-node=2", "-m", "launcher", f"recipe={recipe}", "run.name=r"]
    done = run([*argv, *(["recipe.text_bytes=60000"] if recipe == "gpt" else [])], tmp_path)
    finished = json.loads((tmp_path / "runs/r/done.json").read_text())
    assert finished["metrics"]["val/accuracy"] >= {"resnet": 0.97, "gpt": 0.2, "mlp": 0.9}[recipe]
    assert "offline" in done.stdout + done.stderr, "no wandb key: one line, and the run goes on"
    stages = ("data", "transfer", "forward", "backward", "sync", "optimizer", "checkpoint", "other")
    whole = [row for row in rows(tmp_path / "runs/r")[1:] if "throughput/samples_per_s" in row]
    assert all(sum(row[f"stage/{stage}/share"] for stage in stages) == pytest.approx(1) for row in whole)
    wall_ms = sum(row["batch/global"] / row["throughput/samples_per_s"] * 1e3 for row in whole)
    assert sum(row[f"stage/{stage}/ms"] for row in whole for stage in stages) == pytest.approx(wall_ms, rel=0.25)
    assert list((tmp_path / "runs/r/wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains(here: Path, precision: str) -> None:
    driven(here, *HELD, f"train.precision={precision}", "launch.workers=2", "run.name=p")
    assert rows(here / "runs/p")[-1]["train/loss"] < 1.0


def test_loader_processes_change_nothing(here: Path) -> None:
    for workers in (0, 2):
        driven(here, *HELD, f"data.num_workers={workers}", f"run.name=l{workers}")
    assert furthest(here / "runs/l0", here / "runs/l2") == 0.0


def test_a_second_job_on_a_run_folder_is_refused_by_name(here: Path) -> None:
    from launcher.run_dir.run_directory import RunDirectory

    run_dir = RunDirectory(here / "runs/x")
    run_dir.create()
    lock = run_dir.lock()
    try:
        refused = driven(here, *HELD, "run.name=x", status=2)
    finally:
        lock.release()
    assert f"in use by process {os.getpid()}" in refused.stderr


def test_a_sweep_is_one_fresh_job_per_point(here: Path) -> None:
    done = driven(here, "-m", *HELD, "seed=0,1", "run.name=s")
    assert all((here / f"runs/s/{point}/done.json").exists() for point in (0, 1))
    assert "time-optimal: point" in done.stdout
    again = driven(here, "-m", *HELD, "seed=0,1,2", "run.name=s")
    assert [len(events(here / f"runs/s/{point}", "start")) for point in (0, 1, 2)] == [1, 1, 1], "what is done is done"
    assert again.stdout.count("is complete") == 2


def test_a_batchnorm_that_would_see_one_sample_is_refused_before_training(tmp_path: Path) -> None:
    job = ["recipe=resnet", "batch.global=1436", "batch.per_device=718", "sink=[]", "lr.base=0.01", "run.name=b"]
    refused = driven(tmp_path, *job, status=2)
    assert "BatchNorm layer" in refused.stderr
    assert not list(tmp_path.iterdir()), "a wrong request leaves nothing behind"
