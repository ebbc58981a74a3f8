"""batch.per_device=auto with real processes: the training equals the one with the resolved number given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.jobs import environment, events, furthest, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SIZES = "tune.sizes=[8,16]"
MLP = ["recipe=mlp", "recipe.subset=300", "sink=[]", "train.duration=10ba", "tune.budget_s=0.5"]
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
    """Return the number in run.yaml, which the plan event also contains."""
    size = yaml.safe_load((run_dir / "run.yaml").read_text())["batch"]["per_device"]
    assert events(run_dir, "plan")[0]["per_device"] == size
    return int(size)


def test_the_drivers_workers_measure_and_train_as_with_the_number_typed(tmp_path: Path) -> None:
    driver = [sys.executable]
    well(trained(tmp_path, driver, *MLP, SIZES, AUTO, "run.name=one"))
    one = tmp_path / "runs" / "one"
    size = taken(one)
    assert events(one, "plan")[0]["why"].startswith(f"batch.per_device=auto chose {size}: ")
    well(trained(tmp_path, driver, *MLP, f"batch.per_device={size}", "run.name=typed"))
    assert furthest(one, tmp_path / "runs" / "typed") == 0.0


def test_a_torchrun_of_ones_own_measures_beside_its_workers_and_keeps_what_it_found(tmp_path: Path) -> None:
    two = [*TORCHRUN, "--nproc-per-node=2"]
    well(trained(tmp_path, two, *MLP, SIZES, AUTO, "run.name=one"))
    one = tmp_path / "runs" / "one"
    size = taken(one)
    profile = next((tmp_path / "runs" / ".profiles").iterdir())
    found = json.loads(profile.read_text())["found"]
    assert found["recommended"] == size
    assert found["splits"] == [], "training waits for a number, and not for what explains it"
    well(trained(tmp_path, two, *MLP, f"batch.per_device={size}", "run.name=typed"))
    assert furthest(one, tmp_path / "runs" / "typed") == 0.0

    profile.unlink()
    again = trained(tmp_path, two, *MLP, SIZES, AUTO, "run.name=one")
    assert "is complete" in again.stdout, "a run that has a number asks nobody"
    assert taken(one) == size
    assert not profile.exists()


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
    """Rank 1 fails at 16 samples after the dry run: the sidecar processes are restarted without 16."""
    (tmp_path / "late.py").write_text(LATE)
    own = ["recipe._target_=late.Late", "recipe.trust=[late]", SIZES, "run.name=one"]
    two = [*TORCHRUN, "--nproc-per-node=2"]
    well(trained(tmp_path, two, *MLP, *own, AUTO))
    assert taken(tmp_path / "runs" / "one") == 8


def test_goodput_begins_with_the_base_batch_and_chooses_once_the_noise_is_known(tmp_path: Path) -> None:
    asked = ["recipe=mlp", "sink=[]", "batch=goodput", "tune.sizes=[8,16,64]", "tune.budget_s=0.5", "run.name=one"]
    well(trained(tmp_path, [sys.executable], *asked, "launch.workers=2", "train.duration=120ba"))
    one = tmp_path / "runs" / "one"
    first, *later = events(one, "plan")
    assert (first["policy"], first["global"]) == ("goodput", 64)
    assert "the noise scale is unknown" in first["why"]
    assert later, "the noise scale became known to no avail"
    for event in later:
        assert "at a noise scale of" in event["why"]
        assert event["from"]["global"] != event["global"] or event["from"]["per_device"] != event["per_device"]
        assert event["lr"] == pytest.approx(event["lr_base"] * event["global"] / 64)
    used = [row["batch/global"] for row in rows(one)]
    assert list(dict.fromkeys(used))[:2] == [64, later[0]["global"]]
    assert json.loads((one / "profile.json").read_text())["cap"] == 64
    known = next(row["noise/scale"] for row in rows(one) if "noise/scale" in row)
    again = ["launch.workers=2", "train.duration=5ba", "plan.noise=one", "run.name=two"]
    well(trained(tmp_path, [sys.executable], *asked[:-1], *again))
    begun = events(tmp_path / "runs" / "two", "plan")[0]
    assert f"at a noise scale of {known:.3g} samples (plan.noise), " in begun["why"]
    assert begun["global"] > 64


def test_goodput_chooses_anew_where_workers_come_or_go_and_measures_nothing_again(tmp_path: Path) -> None:
    """Two workers, then one, then three: update times from the run folder, and a known noise scale."""
    asked = ["recipe=mlp", "sink=[]", "batch=goodput", "tune.sizes=[8,16,64]", "tune.budget_s=0.5", "run.name=one"]
    one = tmp_path / "runs" / "one"
    for workers, updates in ((2, 120), (1, 140), (3, 160)):
        duration = f"train.duration={updates}ba"  # in base batches: fewer and larger updates
        said = well(trained(tmp_path, [sys.executable], *asked, f"launch.workers={workers}", duration))
        assert ("measured" in said) == (workers == 2), said
        assert rows(one)[-1]["noise/scale"] > 0, "it is known by then"
    for resize, (before, now) in zip(events(one, "resize"), ((2, 1), (1, 3)), strict=True):
        assert (resize["from"]["world"], resize["to"]["world"]) == (before, now)
        assert resize["why"].startswith(f"{before} workers before, {now} now; goodput: at a noise scale of ")
        assert resize["to"]["lr"] == pytest.approx(resize["to"]["lr_base"] * resize["to"]["global"] / 64)
    assert [row["update"] for row in rows(one)] == list(range(1, len(rows(one)) + 1))
