"""batch.per_device=auto with real processes: the training equals the one with the resolved number given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.jobs import max_parameter_difference, read_events, read_rows
from tests.helpers.small_job import TORCHRUN, run_command, run_launcher

pytestmark = pytest.mark.slow

SIZES = "tune.sizes=[8,16]"
MLP = ["recipe=mlp", "recipe.subset=300", "sink=[]", "train.duration=10ba", "tune.budget_s=0.5"]
AUTO = "batch.per_device=auto"
ON_TWO = [*TORCHRUN, "--nproc-per-node=2", "-m", "launcher"]


def chosen_size(run_dir: Path) -> int:
    """Return the number in run.yaml, which the plan event also contains."""
    size = yaml.safe_load((run_dir / "run.yaml").read_text())["batch"]["per_device"]
    assert read_events(run_dir, "plan")[0]["per_device"] == size
    return int(size)


@pytest.mark.core
def test_driver_measures_and_trains_like_the_chosen_size(tmp_path: Path) -> None:
    run_launcher(tmp_path, *MLP, SIZES, AUTO, "run.name=one")
    one = tmp_path / "runs" / "one"
    size = chosen_size(one)
    assert read_events(one, "plan")[0]["why"].startswith(f"batch.per_device=auto chose {size}: ")
    run_launcher(tmp_path, *MLP, f"batch.per_device={size}", "run.name=fixed")
    assert max_parameter_difference(one, tmp_path / "runs" / "fixed") == 0.0


def test_own_torchrun_measures_and_keeps_the_size(tmp_path: Path) -> None:
    run_command([*ON_TWO, *MLP, SIZES, AUTO, "run.name=one"], tmp_path)
    one = tmp_path / "runs" / "one"
    size = chosen_size(one)
    profile = next((tmp_path / "runs" / ".profiles").iterdir())
    found = json.loads(profile.read_text())["found"]
    assert found["recommended"] == size
    assert found["splits"] == [], "training waits for the size, and not for what explains it"
    run_command([*ON_TWO, *MLP, f"batch.per_device={size}", "run.name=fixed"], tmp_path)
    assert max_parameter_difference(one, tmp_path / "runs" / "fixed") == 0.0

    profile.unlink()
    again = run_command([*ON_TWO, *MLP, SIZES, AUTO, "run.name=one"], tmp_path)
    assert "is complete" in again.stdout, "a run that has a size measures nothing"
    assert chosen_size(one) == size
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


def test_out_of_memory_in_a_collective_hangs_nothing(tmp_path: Path) -> None:
    """Rank 1 fails at 16 samples after the dry run: the sidecar processes are restarted without 16."""
    (tmp_path / "late.py").write_text(LATE)
    own = ["recipe._target_=late.Late", "recipe.trust=[late]", SIZES, "run.name=one"]
    run_command([*ON_TWO, *MLP, *own, AUTO], tmp_path)
    assert chosen_size(tmp_path / "runs" / "one") == 8


GOODPUT = ["recipe=mlp", "sink=[]", "batch=goodput", "tune.sizes=[8,16,64]", "tune.budget_s=0.5"]


@pytest.fixture(scope="module")
def goodput_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/one, which two workers began."""
    folder = tmp_path_factory.mktemp("goodput")
    begun = run_launcher(folder, *GOODPUT, "run.name=one", "launch.workers=2", "train.duration=120ba")
    assert "measured" in begun.stderr
    return folder


def noise_scales(run_dir: Path) -> list[float]:
    """Return the logged estimates of the noise scale; later in a run they are not in every row."""
    return [row["noise/scale"] for row in read_rows(run_dir) if "noise/scale" in row]


def test_goodput_batch_changes_once_the_noise_is_known(goodput_folder: Path) -> None:
    one = goodput_folder / "runs" / "one"
    first, *later = read_events(one, "plan")
    assert (first["policy"], first["global"]) == ("goodput", 64)
    assert "the noise scale is unknown" in first["why"]
    assert later, "the known noise scale changes the batch"
    for event in later:
        assert "at a noise scale of" in event["why"]
        assert event["from"]["global"] != event["global"] or event["from"]["per_device"] != event["per_device"]
        assert event["lr"] == pytest.approx(event["lr_base"] * event["global"] / 64)
    used = [row["batch/global"] for row in read_rows(one)]
    assert list(dict.fromkeys(used))[:2] == [64, later[0]["global"]]
    assert json.loads((one / "profile.json").read_text())["cap"] == 64
    known = noise_scales(one)[0]
    again = ["launch.workers=2", "train.duration=5ba", "plan.noise=one", "run.name=two"]
    run_launcher(goodput_folder, *GOODPUT, *again)
    begun = read_events(goodput_folder / "runs" / "two", "plan")[0]
    assert f"at a noise scale of {known:.3g} samples (plan.noise), " in begun["why"]
    assert begun["global"] > 64


def test_goodput_batch_follows_the_workers_unmeasured(goodput_folder: Path) -> None:
    """Then one worker, then three: update times from the run directory, and the known noise scale."""
    one = goodput_folder / "runs" / "one"
    assert noise_scales(one)[-1] > 0, "it is known by then"
    for workers, updates in ((1, 140), (3, 160)):
        duration = f"train.duration={updates}ba"  # in base batches: fewer and larger updates
        completed = run_launcher(goodput_folder, *GOODPUT, "run.name=one", f"launch.workers={workers}", duration)
        assert "measured" not in completed.stderr
        assert noise_scales(one)[-1] > 0
    for resize, (before, now) in zip(read_events(one, "resize"), ((2, 1), (1, 3)), strict=True):
        assert (resize["from"]["world"], resize["to"]["world"]) == (before, now)
        assert resize["why"].startswith(f"{before} workers before, {now} now; goodput: at a noise scale of ")
        assert resize["to"]["lr"] == pytest.approx(resize["to"]["lr_base"] * resize["to"]["global"] / 64)
    assert [row["update"] for row in read_rows(one)] == list(range(1, len(read_rows(one)) + 1))
