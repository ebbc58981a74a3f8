"""Another strategy is another layout of the same training: same parameters, same checkpoints, any number of workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from jobs import environment, furthest, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: Odd sizes that nothing divides, two kinds of parameter groups, a tail of 23 samples and one of 11 in the end.
HELD = [
    *("recipe=mlp", "sink=[]", "recipe.subset=203", "recipe.hidden=37", "recipe.depth=3"),
    *("batch.global=60", "batch.per_device=17", "train.duration=1100sp", "train.validate_every=null"),
    *("schedule=cosine", "schedule.warmup=1ep", "checkpoint.every=null"),
]
OPTIMIZERS = {
    "sgd": ["optimizer=sgd", "optimizer.momentum=0.9", "optimizer.weight_decay=0.01"],
    "adamw": ["optimizer=adamw", "lr.base=0.01", "lr.base_batch=60"],
}
LAYOUTS = {"fsdp": ["strategy=fsdp"]}


def sessions(folder: Path, world: int, jobs: Mapping[str, Sequence[str]]) -> None:
    """Run each of `jobs`, a run's name and its arguments, on `world` workers one after the other."""
    told = folder / f"jobs-{world}.json"
    lines = [json.dumps([*arguments, f"run.dir={folder / name}"]) for name, arguments in jobs.items()]
    told.write_text("\n".join(lines))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    script = Path(__file__).with_name("sessions.py")
    done = subprocess.run(
        [*torchrun, str(script), str(told)], env=environment(), capture_output=True, text=True, cwd=folder, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DDP on one worker, to compare with."""
    folder = tmp_path_factory.mktemp("alone")
    sessions(folder, 1, {name: [*HELD, *options] for name, options in OPTIMIZERS.items()})
    return folder


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parameters_are_those_of_ddp_on_one_worker(alone: Path, tmp_path: Path, world: int) -> None:
    """Shares of 60, 30 and 20 in micro-batches of at most 17, and uneven ones in every tail."""
    jobs = {
        f"{layout}-{name}": [*HELD, *options, *strategy]
        for layout, strategy in LAYOUTS.items()
        for name, options in OPTIMIZERS.items()
    }
    sessions(tmp_path, world, jobs)
    for job in jobs:
        assert furthest(alone / job.split("-")[1], tmp_path / job) <= 1e-5, job
        assert [row["update"] for row in rows(tmp_path / job)] == list(range(1, 23))
