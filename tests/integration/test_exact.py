"""Exact mode as a user runs it: bitwise identical files at every world size, through a kill and a resize."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import environment, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

RECIPE = '''
from dataclasses import dataclass
import random
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from launcher.recipe import Loss

class Noisy:
    """Small images whose items draw random numbers, as augmentation does."""
    def __init__(self, n):
        g = torch.Generator().manual_seed(1)
        self.x, self.n = torch.randn(n, 1, 6, 6, generator=g), n
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        return self.x[i] + 0.1 * random.random() * torch.randn(1, 6, 6), int(self.x[i].mean() > 0)

class Model(nn.Sequential):
    """`ten` is a buffer that nothing changes, `unused` a parameter that gets no gradient."""
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.Flatten(), nn.Linear(32, 2),
        )
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("ten", torch.full((3,), 0.1))

@dataclass(frozen=True)
class Exact:
    def model(self):
        return Model()
    def dataset(self, split):
        return Noisy(103 if split == "train" else 29)
    def loss(self, model, batch):
        x, y = batch
        weights = torch.where(y == 1, 1.1, 0.7)
        losses = cross_entropy(model(x), y, reduction="none") * weights
        return Loss(losses.sum(), weights.sum(), {"surprise": losses.detach().square().sum()})
'''
JOB = [
    *("recipe=own", "recipe._target_=exactly.Exact", "recipe.trust=[exactly]", "lr.base=0.01", "lr.base_batch=50"),
    *("batch.global=50", "batch.per_device=4", "optimizer=adamw", "train.clip_norm=0.3", "train.duration=3ep"),
    *(
        "elastic.exact=true",
        "elastic.shards=8",
        "sink=[]",
        "schedule=plateau",
        "schedule.patience=1",
        "train.validate_every=0.5ep",
    ),
]


def driven(here: Path, *overrides: str, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "launcher", *JOB, *overrides]
    done = subprocess.run(
        argv, cwd=here, env=environment(**env), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def parameters(run_dir: Path) -> dict[str, bytes]:
    """Return every tensor of the finished model, as raw bits."""
    from safetensors.torch import load_file

    return {name: value.numpy().tobytes() for name, value in load_file(run_dir / "model.safetensors").items()}


def moments(run_dir: Path) -> dict[str, str]:
    """Return the hashes of the files of the newest checkpoint, including the optimizer state."""
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in newest.glob("*.safetensors")}


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """Return the logged training metrics: losses, norms, learning rates and validations."""
    kept = ("update", "samples", "train/loss", "train/grad_norm", "lr/value", "val/loss", "val/surprise")
    return [{name: row[name] for name in kept if name in row} for row in rows(run_dir)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reference run: one worker, undisturbed."""
    path = tmp_path_factory.mktemp("exact")
    (path / "exactly.py").write_text(RECIPE)
    driven(path, "launch.workers=1", "run.name=w1")
    return path


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_workers_trains_bitwise_the_same_model(here: Path, world: int) -> None:
    """Convolutions, BatchNorm, dropout, AdamW, clipping, weighted losses, tails of 3 samples, plateau schedule."""
    said = driven(here, f"launch.workers={world}", f"run.name=w{world}").stderr
    one, other = here / "runs/w1", here / f"runs/w{world}"
    assert parameters(one) == parameters(other)
    assert moments(one) == moments(other)
    assert figures(one) == figures(other)
    assert "costs speed" in said
    assert ("trains on 2 of 3 workers" in said) == (world == 3)


def test_it_trains_and_leaves_alone_what_it_should(here: Path) -> None:
    from safetensors.torch import load_file

    model = load_file(here / "runs/w1/model.safetensors")
    learned = figures(here / "runs/w1")
    assert learned[-1]["train/loss"] < learned[0]["train/loss"]
    assert set(model["ten"].double().tolist()) == {0.10000000149011612}, "0.1 as a single, not a mean of three of them"
    assert set(model["unused"].flatten().tolist()) == {1.0}
    assert int(model["1.num_batches_tracked"]) == 15, "shard 0: two micro-batches in a whole update, one in a tail"
    assert len({row["lr/value"] for row in learned}) > 1, "the plateau moved the rate"


def test_a_kill_a_stop_and_another_world_size_change_nothing(here: Path) -> None:
    fault = "kill@backward:1:3,stop@forward:1:6:2"
    driven(here, "launch.workers=2", "run.name=broken", LAUNCHER_TEST_FAULTS="1", FAULT=fault)
    assert not (here / "runs/broken/done.json").exists()
    driven(here, "launch.workers=4", "run.name=broken")
    assert parameters(here / "runs/w1") == parameters(here / "runs/broken")
    assert moments(here / "runs/w1") == moments(here / "runs/broken")
    assert figures(here / "runs/w1")[-1] == figures(here / "runs/broken")[-1]


def test_other_arithmetic_is_refused_on_resume(here: Path) -> None:
    shutil.copytree(here / "runs/w1", here / "runs/moved")
    for path in (here / "runs/moved/checkpoints").glob("*/manifest.json"):
        rewritten(path)
    refused = driven(here, "run.name=moved", "train.duration=4ep", status=2)
    assert "error: elastic.exact=true: torch was 1.0 in the checkpoint" in refused.stderr


def rewritten(manifest: Path) -> None:
    """Change the manifest as if another version of torch had written it."""
    from launcher.checkpoint.manifest import Manifest

    found = Manifest.from_json(manifest.read_text())
    exact = {**found.facts["exact"], "torch": "1.0"}
    manifest.write_text(replace(found, facts={**found.facts, "exact": exact}).to_json())
