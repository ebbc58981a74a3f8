"""Exact mode as a user runs it: bitwise identical files at every world size, through a kill and a resize."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import read_rows
from tests.helpers.small_job import run_launcher

pytestmark = pytest.mark.slow

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
    """`ten` is a buffer that nothing changes, `unused` a parameter that gets no gradient; two buffers are assigned."""
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.Flatten(), nn.Linear(32, 2),
        )
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("ten", torch.full((3,), 0.1))
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
    def forward(self, x):
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.mean()
            self.calls = self.calls + 1
        return super().forward(x - self.centre)

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


def train(folder: Path, *overrides: str, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    return run_launcher(folder, *JOB, *overrides, status=status, **env)


def parameters(run_dir: Path) -> dict[str, bytes]:
    """Return every tensor of the finished model, as raw bits."""
    from safetensors.torch import load_file

    return {name: value.numpy().tobytes() for name, value in load_file(run_dir / "model.safetensors").items()}


def hash_checkpoint(run_dir: Path) -> dict[str, str]:
    """Return the hashes of the files of the newest checkpoint, including the optimizer state."""
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in newest.glob("*.safetensors")}


def training_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the last row of each update: losses, norms, learning rates and validations."""
    kept = ("update", "samples", "train/loss", "train/grad_norm", "lr/value", "val/loss", "val/surprise")
    last = {row["update"]: row for row in read_rows(run_dir)}
    return [{name: row[name] for name in kept if name in row} for row in last.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reference run: one worker, undisturbed."""
    path = tmp_path_factory.mktemp("exact")
    (path / "exactly.py").write_text(RECIPE)
    train(path, "launch.workers=1", "run.name=w1")
    return path


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.core), 3])
def test_world_size_changes_no_bit(folder: Path, world_size: int) -> None:
    """Convolutions, BatchNorm, dropout, AdamW, clipping, weighted losses, tails of 3 samples, plateau schedule."""
    stderr = train(folder, f"launch.workers={world_size}", f"run.name=w{world_size}").stderr
    one, other = folder / "runs/w1", folder / f"runs/w{world_size}"
    assert parameters(one) == parameters(other)
    assert hash_checkpoint(one) == hash_checkpoint(other)
    assert training_metrics(one) == training_metrics(other)
    assert "elastic.exact=true is slower" in stderr
    assert ("trains on 2 of 3 workers" in stderr) == (world_size == 3)


def test_training_changes_only_what_it_should(folder: Path) -> None:
    from safetensors.torch import load_file

    model = load_file(folder / "runs/w1/model.safetensors")
    learned = training_metrics(folder / "runs/w1")
    assert learned[-1]["train/loss"] < learned[0]["train/loss"]
    assert set(model["ten"].double().tolist()) == {0.10000000149011612}, "0.1 as a single, not a mean of three of them"
    assert set(model["unused"].flatten().tolist()) == {1.0}
    assert int(model["1.num_batches_tracked"]) == 15, "shard 0: two micro-batches in a whole update, one in a tail"
    assert len({row["lr/value"] for row in learned}) > 1, "the plateau changed the learning rate"


def test_kill_stop_and_resize_change_no_bit(folder: Path) -> None:
    """Killed and stopped on two workers, and continued on four."""
    fault = "kill@backward:1:3,stop@forward:1:6:2"
    train(folder, "launch.workers=2", "run.name=broken", LAUNCHER_TEST_FAULTS="1", FAULT=fault)
    assert not (folder / "runs/broken/done.json").exists()
    stderr = train(folder, "launch.workers=4", "run.name=broken").stderr
    assert "elastic.exact=true is slower" in stderr
    assert "trains on 2 of" not in stderr
    assert parameters(folder / "runs/w1") == parameters(folder / "runs/broken")
    assert hash_checkpoint(folder / "runs/w1") == hash_checkpoint(folder / "runs/broken")
    assert training_metrics(folder / "runs/w1") == training_metrics(folder / "runs/broken")


def test_another_torch_is_refused_on_resume(folder: Path) -> None:
    shutil.copytree(folder / "runs/w1", folder / "runs/moved")
    for path in (folder / "runs/moved/checkpoints").glob("*/manifest.json"):
        replace_torch_version(path)
    refused = train(folder, "run.name=moved", "train.duration=4ep", status=2)
    assert "error: elastic.exact=true: torch was 1.0 in the checkpoint" in refused.stderr


def replace_torch_version(manifest: Path) -> None:
    """Change the manifest as if another version of torch had written it."""
    from launcher.checkpoint.manifest import Manifest

    found = Manifest.from_json(manifest.read_text())
    exact = {**found.facts["exact"], "torch": "1.0"}
    manifest.write_text(replace(found, facts={**found.facts, "exact": exact}).to_json())
