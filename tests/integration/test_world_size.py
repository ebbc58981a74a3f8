"""The same training at any number of workers, and the options that must not change it.

The jobs of all tests run in four starts of workers, at world sizes 2, 1, 3 and 4. A job in several starts is stopped in
between and continues at the next world size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.job_sequence import Job, train_in_sequence
from tests.helpers.jobs import max_parameter_difference, read_events, read_rows
from tests.helpers.small_job import HELD, OWN, RECIPE, TORCHRUN, run_command

pytestmark = [pytest.mark.slow, pytest.mark.core]

SLOW = """
import os, time
from dataclasses import dataclass
import own

@dataclass(frozen=True)
class Slow(own.Own):
    def loss(self, model, batch):
        time.sleep(len(batch[1]) * (0.004 if os.environ["RANK"] == "1" else 0.001))
        return super().loss(model, batch)
"""
LOADED = """
from dataclasses import dataclass
from torch import nn
import own

@dataclass(frozen=True)
class Loaded(own.Own):
    def model(self):
        return nn.Sequential(super().model().eval(), nn.Linear(4, 4))
"""
FP64 = [*HELD, "train.precision=fp64"]
VARIANTS = {"plain": [], "tokens": ["+recipe.tokens=true"], "carry": ["data.tail=carry", "train.clip_norm=0.3"]}
TAIL = [*FP64, "batch.global=101", "batch.per_device=40"]
IDLE = [*FP64, "batch.global=2", "lr.base_batch=2", "train.duration=0.2ep", "elastic.allow_idle=true"]
BALANCED = [*FP64, "recipe._target_=slow.Slow", "recipe.trust=[slow]", "batch.per_device=50", "train.duration=10ep"]
EVALUATED = [*HELD, "recipe._target_=loaded.Loaded", "recipe.trust=[loaded]", "recipe.drop=0.5", "train.duration=1ep"]
RESIZED = [*FP64, "optimizer=adamw", "lr.base=0.01", "schedule=cosine", "schedule.warmup=1ep"]
SCALED = [*OWN, "batch.per_device=10", "sink=[]", "train.duration=6ep", "schedule=constant", "schedule.warmup=0sp"]
MEAN = [*HELD, "recipe.mean=true"]
LAYOUTS = {"ddp": [], "fsdp": ["strategy=fsdp"]}


def stop_at(update: int, generation: int) -> str:
    return f"stop@forward:0:{update}:{generation}"


def same_jobs(world_size: int) -> dict[str, Job]:
    """The jobs that run at 1, 2 and 3 workers alike."""
    return {f"{name}-{world_size}": Job([*FP64, *extra]) for name, extra in VARIANTS.items()}


def jobs_on_two() -> dict[str, Job]:
    jobs = same_jobs(2)
    jobs |= {precision: Job([*HELD, f"train.precision={precision}"]) for precision in ("bf16", "fp16")}
    for layout, strategy in LAYOUTS.items():
        jobs[f"mean-{layout}"] = Job([*MEAN, *strategy, "train.duration=1ep"])
        jobs[f"longer-{layout}"] = Job([*MEAN, *strategy, "train.duration=2ep"], name=f"mean-{layout}")
    jobs["nan"] = Job(HELD, fault="nan@forward:1:5")
    jobs["balanced-2"] = Job([*BALANCED, "elastic.balance=true"])
    return jobs | {"resized": Job(RESIZED, fault=stop_at(6, 1)), "scaled": Job(SCALED, fault=stop_at(15, 1))}


def jobs_on_one() -> dict[str, Job]:
    jobs = same_jobs(1) | {"tail-1": Job(TAIL), "idle-1": Job(IDLE), "balanced-1": Job(BALANCED)}
    jobs |= {f"loaders-{count}": Job([*HELD, f"data.num_workers={count}"]) for count in (0, 2)}
    jobs["ramp"] = Job([*HELD, "batch.ramp=[[0dur,0.5],[0.5dur,1]]"])
    jobs |= {"whole": Job(RESIZED), "evaluated": Job(EVALUATED)}
    return jobs | {"resized": Job(RESIZED, fault=stop_at(11, 2)), "scaled": Job(SCALED, fault=stop_at(30, 2))}


def jobs_on_three() -> dict[str, Job]:
    jobs = same_jobs(3) | {"tail-3": Job(TAIL), "idle-3": Job(IDLE)}
    return jobs | {"resized": Job(RESIZED, fault=stop_at(17, 3)), "scaled": Job(SCALED)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the finished runs of every job."""
    folder = tmp_path_factory.mktemp("world_size")
    (folder / "own.py").write_text(RECIPE)
    (folder / "slow.py").write_text(SLOW)
    (folder / "loaded.py").write_text(LOADED)
    starts: Mapping[int, Mapping[str, Job]] = {
        2: jobs_on_two(),
        1: jobs_on_one(),
        3: jobs_on_three(),
        4: {"resized": Job(RESIZED)},
    }
    for world_size, jobs in starts.items():
        train_in_sequence(folder, world_size, jobs, PYTHONPATH=str(folder))
    return folder


def parameters(run_dir: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(run_dir / "model.safetensors"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_world_size_trains_the_same_model(runs: Path, variant: str) -> None:
    """Uneven shares (17, 17, 16), accumulation, tails of 3 samples, counts other than samples, clipping: fp64."""
    for world_size in (2, 3):
        assert max_parameter_difference(runs / f"{variant}-1", runs / f"{variant}-{world_size}") <= 1e-10
    last = [read_rows(runs / f"{variant}-{world_size}")[-1] for world_size in (1, 2, 3)]
    assert len({row["update"] for row in last}) == 1
    assert max(row["val/loss"] for row in last) - min(row["val/loss"] for row in last) <= 1e-9


def test_tail_smaller_than_the_world_size(runs: Path) -> None:
    """203 samples in batches of 101: the tail has one sample, and ranks 1 and 2 have none."""
    assert max_parameter_difference(runs / "tail-1", runs / "tail-3") <= 1e-10


def test_rank_without_samples_takes_part(runs: Path) -> None:
    """A batch of 2 on 3 workers: allowed by elastic.allow_idle, equal to one process with the whole batch."""
    assert max_parameter_difference(runs / "idle-1", runs / "idle-3") <= 1e-10


def test_resizes_change_nothing(runs: Path) -> None:
    """Adam, a cosine schedule and unequal shares (13, 13, 12, 12): parameters equal those of one process."""
    assert max_parameter_difference(runs / "whole", runs / "resized") <= 1e-10
    resized = read_rows(runs / "resized")
    assert [row["update"] for row in resized] == list(range(1, 26)), "no update is lost, none is run twice"
    assert [row["lr/value"] for row in resized] == [row["lr/value"] for row in read_rows(runs / "whole")]
    resizes = read_events(runs / "resized", "resize")
    assert [(event["from"]["world"], event["to"]["world"]) for event in resizes] == [(2, 1), (1, 3), (3, 4)]
    assert resizes[1]["to"]["shares"] == [17, 17, 16]
    assert resizes[2]["why"] == "3 workers before, 4 now"


def test_scaled_batch_and_lr_follow_the_workers(runs: Path) -> None:
    scaled = read_rows(runs / "scaled")
    assert [row["update"] for row in scaled] == list(range(1, len(scaled) + 1))
    assert scaled[-1]["samples"] == 6 * 203, "every sample of every epoch, once"
    scales = {row["batch/global"]: row["lr/scale"] for row in scaled}
    assert scales[20] == pytest.approx(20 / 50)
    assert scales[10] == pytest.approx(10 / 50)
    grown = [row["lr/scale"] for row in scaled if row["batch/global"] == 30]
    assert grown[0] < 30 / 50, "growth by 2 or more ramps"
    assert grown == sorted(grown)


def test_shares_follow_the_measured_speeds(runs: Path) -> None:
    """Rank 1 takes four times as long per sample: it ends up with about a fifth of the batch, in the same training."""
    assert max_parameter_difference(runs / "balanced-1", runs / "balanced-2") <= 1e-10
    changes = read_events(runs / "balanced-2", "plan")[1:]
    assert changes[0]["from"]["shares"] == [25, 25]
    assert changes[0]["shares"][1] <= 15
    assert changes[0]["global"] == 50
    assert changes[0]["why"] == "shares follow the measured speeds of the workers"
    assert [row["update"] for row in read_rows(runs / "balanced-2")] == list(range(1, 51))


def test_batch_ramp_is_logged_with_both_lrs(runs: Path) -> None:
    first, second = read_events(runs / "ramp", "plan")
    assert (first["global"], second["global"], second["from"]["global"]) == (25, 50, 25)
    assert (second["from"]["lr"], second["lr"]) == (0.05, 0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains(runs: Path, precision: str) -> None:
    assert read_rows(runs / precision)[-1]["train/loss"] < 1.0


def test_loader_processes_change_nothing(runs: Path) -> None:
    assert max_parameter_difference(runs / "loaders-0", runs / "loaders-2") == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_loss_alarm_is_raised_only_once(runs: Path, layout: str) -> None:
    """At the start of training, and not again when the run continues."""
    assert read_rows(runs / f"mean-{layout}")[-1]["samples"] == 2 * 203
    (alarm,) = read_events(runs / f"mean-{layout}", "alarm")
    assert alarm["kind"] == "loss"
    assert alarm["detail"].startswith("loss() of Own returns a mean (MeanBackward0) and counts 9: return sums")


def test_trained_part_in_eval_mode_raises_an_alarm(runs: Path) -> None:
    (alarm,) = read_events(runs / "evaluated", "alarm")
    assert alarm["kind"] == "eval_mode"
    assert alarm["detail"].startswith("0 is trained in eval mode, as model() returned it: without dropout")


def test_nan_on_one_rank_is_skipped_and_named(runs: Path) -> None:
    assert read_events(runs / "nan", "alarm")[0]["ranks"] == [1]
    assert all(bool(value.isfinite().all()) for value in parameters(runs / "nan").values())


def test_kills_under_own_torchrun_change_nothing(runs: Path) -> None:
    """`--standalone` shares the agent's store with the workers: leftovers of earlier starts must not mislead them."""
    kills = [
        f"kill@forward:{rank}:{update}:{start}" for start, (rank, update) in enumerate([(1, 4), (0, 6), (2, 9)], 1)
    ]
    command = [*TORCHRUN, "--nproc-per-node=3", "--max-restarts=9", "-m", "launcher", *FP64, "run.name=killed"]
    run_command(command, runs, LAUNCHER_TEST_FAULTS="1", FAULT=",".join(kills))
    assert max_parameter_difference(runs / "runs/killed", runs / "plain-3") <= 1e-10
    assert [event["generation"] for event in read_events(runs / "runs/killed", "start")] == [1, 2, 3, 4]
