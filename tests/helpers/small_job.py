"""The small recipe and job that most integration tests train, and how they run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.jobs import make_env

__all__ = ["HELD", "LAUNCHER", "OWN", "RECIPE", "TORCHRUN", "run_command", "run_launcher"]

LAUNCHER = [sys.executable, "-m", "launcher"]
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


def run_command(argv: list[str], cwd: Path, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit status."""
    completed = subprocess.run(
        argv, cwd=cwd, env=make_env(**env), capture_output=True, text=True, timeout=1700, check=False
    )
    assert completed.returncode == status, completed.stdout[-3000:] + completed.stderr[-3000:]
    return completed


def run_launcher(cwd: Path, *arguments: str, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher to its end and check its exit status."""
    return run_command([*LAUNCHER, *arguments], cwd, status, **env)
