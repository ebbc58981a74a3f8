"""batch.per_device=auto with real processes: what is trained is what it would be with the number typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jobs import environment, events, furthest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
MLP = ["recipe=mlp", "sink=[]", "train.duration=1ep", "tune.max=24", "tune.budget_s=2"]
AUTO = "batch.per_device=auto"


def trained(here: Path, command: list[str], *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, "-m", "launcher", *args],
        cwd=here,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def well(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stderr


def taken(run_dir: Path) -> int:
    """The number in run.yaml, which is also that of the plan's event."""
    size = yaml.safe_load((run_dir / "run.yaml").read_text())["batch"]["per_device"]
    assert events(run_dir, "plan")[0]["per_device"] == size
    return int(size)


def test_the_drivers_workers_measure_keep_and_train_as_with_the_number_typed(tmp_path: Path) -> None:
    driver = [sys.executable]
    well(trained(tmp_path, driver, *MLP, AUTO, "run.name=one"))
    one = tmp_path / "runs" / "one"
    size = taken(one)
    assert events(one, "plan")[0]["why"].startswith(f"batch.per_device=auto took {size}: ")
    well(trained(tmp_path, driver, *MLP, f"batch.per_device={size}", "run.name=typed"))
    assert furthest(one, tmp_path / "runs" / "typed") == 0.0

    well(trained(tmp_path, driver, *MLP, AUTO, "run.name=two"))
    assert ", kept from " in events(tmp_path / "runs" / "two", "plan")[0]["why"]

    profile = next((tmp_path / "runs" / ".profiles").iterdir())
    profile.write_text("{")
    longer = [word.replace("1ep", "2ep") for word in MLP]
    said = well(trained(tmp_path, driver, *longer, AUTO, "run.name=one"))
    assert taken(one) == size
    assert "cannot be trusted" not in said  # a run that has a number asks nobody
    assert "nothing was measured" in events(one, "plan")[-1]["why"]


def test_a_torchrun_of_ones_own_measures_beside_its_workers(tmp_path: Path) -> None:
    two = [*TORCHRUN, "--nproc-per-node=2"]
    well(trained(tmp_path, two, *MLP, AUTO, "run.name=one"))
    size = taken(tmp_path / "runs" / "one")
    well(trained(tmp_path, two, *MLP, f"batch.per_device={size}", "run.name=typed"))
    assert furthest(tmp_path / "runs" / "one", tmp_path / "runs" / "typed") == 0.0


LATE = """
import os
from dataclasses import dataclass
import torch
from launcher.recipes.mlp import Mlp

seen = []


@dataclass(frozen=True)
class Late(Mlp):
    def loss(self, model, batch):
        if model.training and len(batch[1]) == 16 and os.environ["RANK"] == "1":
            seen.append(1)
            if len(seen) > 4:
                torch.empty(1 << 60)
        return super().loss(model, batch)
"""


def test_a_worker_out_of_memory_where_others_wait_for_it_hangs_nobody(tmp_path: Path) -> None:
    """Rank 1 at 16 samples, past the rehearsal: the processes beside the workers are started again without 16."""
    (tmp_path / "late.py").write_text(LATE)
    own = ["recipe._target_=late.Late", "recipe.trust=[late]", "tune.sizes=[8,16]", "run.name=one"]
    two = [*TORCHRUN, "--nproc-per-node=2"]
    asked = [word for word in MLP if not word.startswith("tune.max")]
    well(trained(tmp_path, two, *asked, *own, AUTO))
    assert taken(tmp_path / "runs" / "one") == 8


def test_a_damaged_profile_is_said_and_measured_anew(tmp_path: Path) -> None:
    well(trained(tmp_path, [sys.executable], "tune", "recipe=mlp", "tune.max=24", "tune.budget_s=2"))
    profile = next((tmp_path / "runs" / ".profiles").iterdir())
    profile.write_text(profile.read_text()[:-40])
    said = well(trained(tmp_path, [sys.executable], *MLP, AUTO, "run.name=one"))
    assert f"{profile.relative_to(tmp_path)} cannot be trusted" in said
    assert "measured now in" in events(tmp_path / "runs" / "one", "plan")[0]["why"]
    assert json.loads(profile.read_text())["found"]["recommended"] == taken(tmp_path / "runs" / "one")
