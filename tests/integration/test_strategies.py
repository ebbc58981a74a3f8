"""Strategies are layouts of the same training: same parameters and checkpoints, at any world size.

Most jobs run in four starts of workers, at world sizes 1, 2, 3 and 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import torch

from launcher.checkpoint.manifest import VerifiedCheckpoint, latest_valid
from launcher.checkpoint.tensor_io import load_checkpoint
from tests.helpers.job_sequence import Job, train_in_sequence
from tests.helpers.jobs import make_env, max_parameter_difference, read_events, read_rows
from tests.helpers.small_job import HELD as HELD_JOB
from tests.helpers.small_job import OWN, RECIPE, run_launcher

pytestmark = pytest.mark.slow

#: Sizes that nothing divides and two parameter groups; the tail of each epoch is 2 samples, the last update 34.
HELD = [
    *("recipe=mlp", "sink=[]", "recipe.subset=185", "recipe.hidden=37", "recipe.depth=3"),
    *("batch.global=61", "batch.per_device=17", "train.duration=959sp", "train.validate_every=null"),
    *("schedule=cosine", "schedule.warmup=1ep", "checkpoint.every=null"),
]
OPTIMIZERS = {
    "sgd": ["optimizer=sgd", "optimizer.momentum=0.9", "optimizer.weight_decay=0.01"],
    "adamw": ["optimizer=adamw", "lr.base=0.01", "lr.base_batch=61"],
}
FSDP = ["strategy=fsdp", "strategy.meta_init=true"]
LAYOUTS = {"fsdp": FSDP, **{f"zero{n}": ["strategy=deepspeed", f"strategy.stage={n}"] for n in range(4)}}


GPT = [
    *("recipe=gpt", "recipe.layers=2", "recipe.width=30", "recipe.heads=3", "recipe.block=16", "sink=[]"),
    *("batch.global=8", "batch.per_device=4", "train.duration=40sp", "train.validate_every=null"),
    *("lr.base_batch=8", "checkpoint.every=null", "recipe.text_bytes=4000"),
]
RESNET = [
    *("recipe=resnet", "recipe.subset=60", "recipe.width=5", "sink=[]", "batch.global=20", "batch.per_device=10"),
    *("train.duration=60sp", "train.validate_every=null", "checkpoint.every=null"),
]
MODELS = {"gpt": GPT, "resnet": RESNET}
PARALLEL = {"ddp": [], **LAYOUTS}
UNSHARDED_BLOCKS = ["strategy=fsdp", "strategy.reshard_after_forward=false"]
VALIDATED = {"kept": UNSHARDED_BLOCKS, **PARALLEL}
RECOMPUTED = {"gpt": [*GPT, "recipe.dropout=0.2"], "resnet": RESNET}


def compared_jobs(world_size: int) -> dict[str, Job]:
    """The jobs whose parameters are compared with DDP on one worker."""
    return {
        f"{layout}-{name}-{world_size}": Job([*HELD, *options, *strategy])
        for layout, strategy in LAYOUTS.items()
        for name, options in OPTIMIZERS.items()
    }


def carrying_jobs(folder: Path, world_size: int, before: str) -> dict[str, Job]:
    """The jobs that load the last checkpoint written at the world size `before`, and save it again."""
    return {
        f"{name}-{layout}-{world_size}-{sharded}": Job(
            [*arguments, *strategy, f"checkpoint.sharded={sharded}"], newest_of(folder / f"{name}{before}").path
        )
        for layout, strategy in PARALLEL.items()
        for name, arguments in MODELS.items()
        for sharded in ("false", "true")
    }


def validated_jobs() -> dict[str, Job]:
    every = ["train.validate_every=1ba", "checkpoint.sharded=true"]
    plain = {f"plain-{layout}": Job([*GPT, *strategy]) for layout, strategy in VALIDATED.items()}
    return plain | {f"validated-{layout}": Job([*GPT, *strategy, *every]) for layout, strategy in VALIDATED.items()}


def recomputing_jobs() -> dict[str, Job]:
    jobs = {}
    for layout, strategy in PARALLEL.items():
        for name, arguments in RECOMPUTED.items():
            jobs[f"stored-{name}-{layout}"] = Job([*arguments, *strategy])
            jobs[f"recomputed-{name}-{layout}"] = Job([*arguments, *strategy, "train.activation_checkpointing=true"])
    return jobs


def rooted_jobs(folder: Path) -> dict[str, Job]:
    """The root of a mean as the loss."""
    recipe = RECIPE.replace("Loss(losses.mean(), len(y))", "Loss(losses.mean().sqrt(), len(y))")
    (folder / "own.py").write_text(recipe)
    job = [*OWN, "recipe.mean=true", "sink=[]", "batch.global=18", "batch.per_device=9", "train.duration=36sp"]
    job += ["train.validate_every=null", "checkpoint.every=null"]
    return {f"rooted-{layout}": Job([*job, *strategy]) for layout, strategy in PARALLEL.items()}


def straggling_jobs(folder: Path) -> dict[str, Job]:
    """Rank 1 sleeps 50 ms per micro-batch; in `gathering` all parameters are gathered in forward and backward."""
    config = folder / "gathering.json"
    config.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    layouts = {**LAYOUTS, "gathering": [*LAYOUTS["zero3"], f"strategy.config={config}"]}
    return {
        f"straggling-{layout}": Job([*GPT, *strategy, "train.duration=160sp"], fault="slow@data:1:0")
        for layout, strategy in layouts.items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the finished runs of every job; those of DDP on one worker are the reference."""
    folder = tmp_path_factory.mktemp("strategies")
    reference = {name: Job([*HELD, *options]) for name, options in OPTIMIZERS.items()}
    models = {name: Job(arguments) for name, arguments in MODELS.items()}
    train_in_sequence(folder, 1, reference | models | compared_jobs(1))
    on_two = compared_jobs(2) | validated_jobs() | recomputing_jobs() | straggling_jobs(folder) | rooted_jobs(folder)
    train_in_sequence(folder, 2, on_two | carrying_jobs(folder, 2, before=""), PYTHONPATH=str(folder))
    train_in_sequence(folder, 3, compared_jobs(3) | carrying_jobs(folder, 3, before="-zero3-2-true"))
    train_in_sequence(folder, 1, carrying_jobs(folder, 1, before="-zero3-3-true"))
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parameters_equal_ddp_on_one_worker(runs: Path, world_size: int) -> None:
    """Uneven shares, with three workers also unequal numbers of micro-batches, and tails without samples for a rank."""
    for job in compared_jobs(world_size):
        assert max_parameter_difference(runs / job.split("-")[1], runs / job) <= 1e-5, job
        assert [row["update"] for row in read_rows(runs / job)] == list(range(1, 22))


def newest_of(run_dir: Path) -> VerifiedCheckpoint:
    found = latest_valid(run_dir / "checkpoints")
    assert found is not None
    return found


def assert_same(one: VerifiedCheckpoint, other: VerifiedCheckpoint) -> None:
    """Assert the same tensors and the same state."""
    assert_same_tensors(one, other)
    for facts in ("position", "facts"):
        assert getattr(one.manifest, facts) == getattr(other.manifest, facts)


def assert_same_tensors(one: VerifiedCheckpoint, other: VerifiedCheckpoint) -> None:
    """Bitwise equal under the same names, with tied tensors tied."""
    a, b = load_checkpoint(one), load_checkpoint(other)
    for group in ("model", "optimizer"):
        before, after = dict(getattr(a, group)), dict(getattr(b, group))
        assert before.keys() == after.keys(), other.path
        assert all(torch.equal(before[name], after[name]) for name in before), other.path
    assert aliases(one) == aliases(other), other.path


def aliases(found: VerifiedCheckpoint) -> dict[str, list[str]]:
    """Count only tensors of parameters: an optimizer may keep one number for several."""
    return {name: facts["aliases"] for name, facts in found.manifest.tensors.items() if "/" not in name}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parameters_on_gpus_equal_the_cpus(tmp_path: Path) -> None:
    """As many workers as GPUs, up to three, over NCCL."""
    train_in_sequence(tmp_path, 1, {name: Job([*HELD, *options]) for name, options in OPTIMIZERS.items()})
    jobs = {
        f"{layout}-{name}": Job([*HELD, *options, *strategy, "train.device=cuda"])
        for layout, strategy in PARALLEL.items()
        for name, options in OPTIMIZERS.items()
    }
    train_in_sequence(tmp_path, min(3, torch.cuda.device_count()), jobs)
    for job in jobs:
        assert max_parameter_difference(tmp_path / job.split("-")[1], tmp_path / job) <= 1e-4, job


def test_checkpoints_equal_whichever_layout_wrote_them(runs: Path) -> None:
    """A tied embedding, buffers, groups: from DDP through each layout at 2, 3 and 1 workers, whole and sharded."""
    start = {name: newest_of(runs / name) for name in MODELS}
    for world_size in (2, 3, 1):
        for layout in PARALLEL:
            for name in MODELS:
                for sharded in ("false", "true"):
                    found = newest_of(runs / f"{name}-{layout}-{world_size}-{sharded}")
                    assert_same(start[name], found)
                    files = [file for file in found.manifest.files if file.startswith("model")]
                    assert len(files) == (world_size if sharded == "true" else 1)


def test_validation_does_not_change_checkpoints(runs: Path) -> None:
    """FSDP leaves some blocks gathered: the outermost one, and with reshard_after_forward=false all of them."""
    for layout in VALIDATED:
        assert_same_tensors(newest_of(runs / f"plain-{layout}"), newest_of(runs / f"validated-{layout}"))
        assert max_parameter_difference(runs / "plain-ddp", runs / f"plain-{layout}") <= 1e-5, layout


def test_activation_checkpointing_changes_nothing(runs: Path) -> None:
    """Bitwise equal, with dropout (same draws) and BatchNorm (statistics updated once), in each layout."""
    for layout in PARALLEL:
        for name in RECOMPUTED:
            job = f"{name}-{layout}"
            assert max_parameter_difference(runs / f"stored-{job}", runs / f"recomputed-{job}") == 0.0, job


def test_loss_that_is_no_sum_is_told_in_every_layout(runs: Path) -> None:
    """Every rank takes part where a forward pass gathers parameters; a sum raises no alarm."""
    for layout in PARALLEL:
        (alarm,) = read_events(runs / f"rooted-{layout}", "alarm")
        assert alarm["kind"] == "loss"
        assert alarm["detail"].startswith("loss() of Own does not add up: its total of 9 samples is 0."), layout
    others = [file.parent for file in runs.glob("*/events.jsonl") if not file.parent.name.startswith("rooted")]
    alarms = [event for run in others for event in read_events(run, "alarm") if event["kind"] == "loss"]
    assert alarms == []


@pytest.mark.parametrize("layout", [*LAYOUTS, "gathering"])
def test_rank_that_delays_the_others_is_named(runs: Path, layout: str) -> None:
    """Rank 1 sleeps; rank 0 waits for it, wherever the strategy synchronises.

    Not in every update: while a strategy starts up, rank 0 has more work and is briefly the late one.
    """
    named = [row for row in read_rows(runs / f"straggling-{layout}") if row["stage/rank"] == 1]
    assert len(named) > 10  # of twenty updates
    assert all(row["stage/data/ms"] >= 50 for row in named)
    assert median(row["stage/sync/ms_max"] for row in named) >= 40


MEMORY = Path(__file__).parents[2] / "benchmarks/memory.py"


@cache
def measure_memory(*arguments: str) -> dict[str, float]:
    """Return the result of benchmarks/memory.py for two real workers and a GPT of 32 million parameters, 128 MB."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(MEMORY)]
    large = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory is returned to the system
    command = [*torchrun, *arguments, "recipe.layers=10"]
    done = subprocess.run(command, check=True, env=make_env(**large), capture_output=True, text=True, timeout=600)
    found: dict[str, float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def test_meta_init_builds_only_on_rank_0() -> None:
    """FSDP with strategy.meta_init=true; otherwise every rank first builds the whole model."""
    whole_mb = 128.0
    assert measure_memory("strategy=fsdp", "strategy.meta_init=false")["start_peak_last_rank_MB"] > whole_mb
    assert measure_memory(*LAYOUTS["fsdp"])["start_peak_last_rank_MB"] < 0.75 * whole_mb


@pytest.mark.parametrize("layout", ["fsdp", "zero2"])
def test_memory_is_as_predicted_by_the_plan(layout: str) -> None:
    """Resident memory of two real workers, increased by 32 million parameters, gradients and AdamW state."""
    found = measure_memory(*LAYOUTS[layout])
    assert found["layout"] == layout
    assert 0.9 <= found["total_over_predicted"] <= 1.1


@pytest.mark.core
def test_job_changes_to_fsdp_and_back(workdir: Path) -> None:
    """DDP on 2, FSDP on 3 with sharded saving and a lost worker, DDP on 1: the parameters of one process."""
    job = [*HELD_JOB, "train.precision=fp64", "optimizer=adamw", "lr.base=0.01", "schedule=cosine"]
    run_launcher(workdir, *job, "launch.workers=1", "run.name=whole")
    fault = {"LAUNCHER_TEST_FAULTS": "1"}
    run_launcher(workdir, *job, "launch.workers=2", "run.name=parts", **fault, FAULT="stop@forward:0:6:1")
    fsdp = ["strategy=fsdp", "checkpoint.sharded=true", "launch.workers=3", "run.name=parts"]
    run_launcher(workdir, *job, *fsdp, **fault, FAULT="kill@backward:1:9:2,stop@forward:0:14:3")
    run_launcher(workdir, *job, "launch.workers=1", "run.name=parts")
    assert max_parameter_difference(workdir / "runs/whole", workdir / "runs/parts") <= 1e-10
    found = {row["update"]: row for row in read_rows(workdir / "runs/parts")}
    assert list(found) == list(range(1, 26))
    changed = [event["changed"] for event in read_events(workdir / "runs/parts", "resume")]
    assert [change.get("strategy.name") for change in changed] == [["ddp", "fsdp"], None, ["fsdp", "ddp"]]
