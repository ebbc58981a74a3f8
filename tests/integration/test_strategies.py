"""Strategies are layouts of the same training: same parameters and checkpoints, at any world size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch
from test_main_job import HELD as HELD_JOB
from test_main_job import driven, here  # noqa: F401 (a fixture)

from launcher.checkpoint.manifest import VerifiedCheckpoint, latest_valid
from launcher.checkpoint.tensor_io import load_checkpoint
from tests.helpers.jobs import environment, events, furthest, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

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


@dataclass(frozen=True)
class Job:
    """Arguments of a training, or of a job that loads the checkpoint `carry` and saves it again."""

    arguments: Sequence[str]
    carry: Path | None = None


def sessions(folder: Path, world: int, jobs: Mapping[str, Job], **env: str) -> None:
    """Run each of `jobs` on `world` workers, in sequence, in the folder of its name."""
    told = folder / f"jobs-{world}.json"
    lines = [
        {"arguments": [*job.arguments, f"run.dir={folder / name}"], "carry": job.carry and str(job.carry)}
        for name, job in jobs.items()
    ]
    told.write_text("\n".join(map(json.dumps, lines)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    script = Path(__file__).parents[1] / "helpers" / "sessions.py"
    command = [*torchrun, str(script), str(told)]
    done = subprocess.run(
        command, check=False, env=environment(**env), capture_output=True, text=True, cwd=folder, timeout=580
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("E1")]
    assert done.returncode == 0, "\n".join(said[:60])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: DDP on one worker."""
    folder = tmp_path_factory.mktemp("alone")
    sessions(folder, 1, {name: Job([*HELD, *options]) for name, options in OPTIMIZERS.items()})
    return folder


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parameters_are_those_of_ddp_on_one_worker(alone: Path, tmp_path: Path, world: int) -> None:
    """Uneven shares, with three workers also unequal numbers of micro-batches, and tails without samples for a rank."""
    jobs = {
        f"{layout}-{name}": Job([*HELD, *options, *strategy])
        for layout, strategy in LAYOUTS.items()
        for name, options in OPTIMIZERS.items()
    }
    sessions(tmp_path, world, jobs)
    for job in jobs:
        assert furthest(alone / job.split("-")[1], tmp_path / job) <= 1e-5, job
        assert [row["update"] for row in rows(tmp_path / job)] == list(range(1, 22))


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


GPT = [
    *("recipe=gpt", "recipe.layers=2", "recipe.width=30", "recipe.heads=3", "recipe.block=16", "sink=[]"),
    *("batch.global=8", "batch.per_device=4", "train.duration=40sp", "train.validate_every=null"),
    *("lr.base_batch=8", "checkpoint.every=null", "recipe.text_bytes=4000"),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_gpus_they_are_those_of_the_cpu(alone: Path, tmp_path: Path) -> None:
    """As many workers as GPUs, up to three, over NCCL."""
    jobs = {
        f"{layout}-{name}": Job([*HELD, *options, *strategy, "train.device=cuda"])
        for layout, strategy in {"ddp": [], **LAYOUTS}.items()
        for name, options in OPTIMIZERS.items()
    }
    sessions(tmp_path, min(3, torch.cuda.device_count()), jobs)
    for job in jobs:
        assert furthest(alone / job.split("-")[1], tmp_path / job) <= 1e-4, job


RESNET = [
    *("recipe=resnet", "recipe.subset=60", "recipe.width=5", "sink=[]", "batch.global=20", "batch.per_device=10"),
    *("train.duration=60sp", "train.validate_every=null", "checkpoint.every=null"),
]


def test_a_checkpoint_is_the_same_whoever_wrote_it(tmp_path: Path) -> None:
    """A tied embedding, buffers, groups: from DDP through each layout at 2, 1 and 3 workers, whole and sharded."""
    models = {"gpt": GPT, "resnet": RESNET}
    sessions(tmp_path, 1, {name: Job(arguments) for name, arguments in models.items()})
    start = {name: newest_of(tmp_path / name) for name in models}
    last = dict(start)
    for world in (2, 1, 3):
        jobs = {}
        for layout, strategy in {"ddp": [], **LAYOUTS}.items():
            for name, arguments in models.items():
                for parts in ("false", "true"):
                    settings = [*arguments, *strategy, f"checkpoint.sharded={parts}"]
                    jobs[f"{name}-{layout}-{world}-{parts}"] = Job(settings, last[name].path)
        sessions(tmp_path, world, jobs)
        for job in jobs:
            found = newest_of(tmp_path / job)
            name, _, _, parts = job.split("-")
            assert_same(start[name], found)
            files = [file for file in found.manifest.files if file.startswith("model")]
            assert len(files) == (world if parts == "true" else 1)
            last[name] = found


def test_a_validation_between_changes_nothing_of_what_is_saved(tmp_path: Path) -> None:
    """FSDP leaves some blocks gathered: the outermost one, and with reshard=false all of them."""
    layouts = {"ddp": [], "kept": ["strategy=fsdp", "strategy.reshard_after_forward=false"], **LAYOUTS}
    jobs = {}
    for layout, strategy in layouts.items():
        jobs[layout] = Job([*GPT, *strategy])
        jobs[f"{layout}-validated"] = Job([*GPT, *strategy, "train.validate_every=1ba", "checkpoint.sharded=true"])
    sessions(tmp_path, 2, jobs)
    for layout in layouts:
        assert_same_tensors(newest_of(tmp_path / layout), newest_of(tmp_path / f"{layout}-validated"))
        assert furthest(tmp_path / "ddp", tmp_path / layout) <= 1e-5, layout


def test_activations_computed_anew_change_nothing(tmp_path: Path) -> None:
    """Bitwise equal, with dropout (same draws) and BatchNorm (statistics updated once), in each layout."""
    models = {"gpt": [*GPT, "recipe.dropout=0.2"], "resnet": RESNET}
    anew = "train.activation_checkpointing=true"
    jobs = {}
    for layout, strategy in {"ddp": [], **LAYOUTS}.items():
        for name, arguments in models.items():
            jobs[f"{name}-{layout}"] = Job([*arguments, *strategy])
            jobs[f"{name}-{layout}-anew"] = Job([*arguments, *strategy, anew])
    sessions(tmp_path, 2, jobs)
    for job in jobs:
        if not job.endswith("-anew"):
            assert furthest(tmp_path / job, tmp_path / f"{job}-anew") == 0.0, job


def test_who_keeps_the_others_waiting_is_named(tmp_path: Path) -> None:
    """Rank 1 sleeps 50 ms per micro-batch; rank 0 waits for rank 1, wherever the strategy synchronises.

    Not in every update: while a strategy starts up, rank 0 has more work and is briefly the late one.
    """
    (tmp_path / "small_too.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    gathering = [*LAYOUTS["zero3"], f"strategy.config={tmp_path}/small_too.json"]
    layouts = {**LAYOUTS, "gathering": gathering}
    jobs = {layout: Job([*GPT, *strategy, "train.duration=160sp"]) for layout, strategy in layouts.items()}
    sessions(tmp_path, 2, jobs, LAUNCHER_TEST_FAULTS="1", FAULT="slow@data:1:0")
    for layout in jobs:
        named = [row for row in rows(tmp_path / layout) if row["stage/rank"] == 1]
        assert len(named) > 10, layout  # of twenty updates
        assert all(row["stage/data/ms"] >= 50 for row in named), layout
        assert median(row["stage/sync/ms_max"] for row in named) >= 40, layout


MEMORY = Path(__file__).parents[2] / "benchmarks/memory.py"


def weighed(*arguments: str) -> dict[str, float]:
    """The result of benchmarks/memory.py for two real workers and a GPT of 32 million parameters, 128 MB."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(MEMORY)]
    large = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory is returned to the system
    command = [*torchrun, *arguments, "recipe.layers=10"]
    done = subprocess.run(command, check=True, env=environment(**large), capture_output=True, text=True, timeout=280)
    found: dict[str, float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def test_rank_0_alone_ever_holds_the_whole_model() -> None:
    """FSDP with strategy.meta_init=true; otherwise every rank first builds the whole model."""
    whole_mb = 128.0
    assert weighed("strategy=fsdp", "strategy.meta_init=false")["start_peak_last_rank_MB"] > whole_mb
    assert weighed(*FSDP)["start_peak_last_rank_MB"] < 0.75 * whole_mb


@pytest.mark.parametrize("layout", ["fsdp", "zero2"])
def test_the_memory_that_a_plan_predicts_is_what_it_takes(layout: str) -> None:
    """Resident memory of two real workers, increased by 32 million parameters, gradients and AdamW state."""
    found = weighed(*LAYOUTS[layout])
    assert found["layout"] == layout
    assert 0.9 <= found["total_over_predicted"] <= 1.1


SMALL = [
    *("recipe.layers=2", "recipe.width=64", "recipe.heads=4", "recipe.block=64", "recipe.text_bytes=60000"),
    *("batch.global=32", "lr.base_batch=32", "train.duration=8ba"),
]


@pytest.mark.parametrize(("experiment", "strategy"), [("gpt2_fsdp", "fsdp"), ("gpt2_zero3", "deepspeed")])
def test_the_experiments_train_at_a_small_size(here: Path, experiment: str, strategy: str) -> None:  # noqa: F811
    """In bf16 as at full size; the output names the strategy, and the loss falls."""
    said = driven(here, f"experiment={experiment}", *SMALL, "launch.workers=2", "run.name=small")
    assert strategy in said.stdout + said.stderr
    [start] = events(here / "runs/small", "start")
    assert (start["strategy"], start["precision"], start["world"]) == (strategy, "bf16", 2)
    losses = [row["train/loss"] for row in rows(here / "runs/small")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_a_job_changes_its_strategy_and_its_workers_on_the_way(here: Path) -> None:  # noqa: F811
    """DDP on 2, FSDP on 3 with sharded saving and a lost worker, DDP on 1: the parameters of one process."""
    job = [*HELD_JOB, "train.precision=fp64", "optimizer=adamw", "lr.base=0.01", "schedule=cosine"]
    driven(here, *job, "launch.workers=1", "run.name=whole")
    fault = {"LAUNCHER_TEST_FAULTS": "1"}
    driven(here, *job, "launch.workers=2", "run.name=parts", **fault, FAULT="stop@forward:0:6:1")
    fsdp = ["strategy=fsdp", "checkpoint.sharded=true", "launch.workers=3", "run.name=parts"]
    driven(here, *job, *fsdp, **fault, FAULT="kill@backward:1:9:2,stop@forward:0:14:3")
    driven(here, *job, "launch.workers=1", "run.name=parts")
    assert furthest(here / "runs/whole", here / "runs/parts") <= 1e-10
    found = {row["update"]: row for row in rows(here / "runs/parts")}
    assert list(found) == list(range(1, 26))
    changed = [event["changed"] for event in events(here / "runs/parts", "resume")]
    assert [change.get("strategy.name") for change in changed] == [["ddp", "fsdp"], None, ["fsdp", "ddp"]]
