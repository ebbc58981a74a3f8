"""Whole jobs whose optimizer keeps state in unusual places and layouts end the same whether or not they are stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.job_sequence import Job, train_in_sequence
from tests.helpers.jobs import max_parameter_difference, read_events

pytestmark = pytest.mark.slow

RECIPE = '''
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset
from launcher.recipe import Loss

class Counting(torch.optim.Optimizer):
    """Counts in its groups, and keeps lists of tensors of other shapes by parameter."""
    def __init__(self, params, lr, weight_decay=0.0, **options):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                kept = self.state[p].setdefault("kept", [torch.zeros_like(p), torch.zeros(p.shape[:1])])
                kept[0].lerp_(p.grad, 0.1)
                kept[1].add_(p.grad.flatten(1).sum(1) if p.ndim > 1 else p.grad)
                p.sub_(kept[0] / (1 - 0.9 ** group["count"]) + 1e-3 * kept[1].mean(), alpha=group["lr"])

@dataclass(frozen=True)
class Own:
    def model(self):
        net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Flatten(), nn.Linear(12, 2))
        return net.to(memory_format=torch.channels_last)
    def dataset(self, split):
        x = torch.randn(48 if split == "train" else 4, 2, 6, 6, generator=torch.Generator().manual_seed(1))
        return TensorDataset(x, x[:, :, 0, 0])
    def loss(self, model, batch):
        x, y = batch
        return Loss((model(x) - y).square().sum(), len(y))
'''
JOB = [
    *("recipe=own", "recipe._target_=own.Own", "recipe.trust=[own]", "lr.base=0.02", "lr.base_batch=8", "sink=[]"),
    *("lr.rule=none", "batch.global=8", "batch.per_device=2", "train.duration=2ep", "train.validate_every=null"),
]
OPTIMIZERS = {
    "counting": ["optimizer=sgd", "optimizer._target_=own.Counting"],
    "sgd": ["optimizer=sgd"],
    "adamw": ["optimizer=adamw"],
}
EXACT = ["elastic.exact=true", "elastic.shards=2"]
CASES = {**OPTIMIZERS, "exact": [*OPTIMIZERS["counting"], *EXACT]}


@pytest.mark.core
def test_stopped_jobs_end_like_whole_ones(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(RECIPE)
    jobs = {}
    for name, settings in CASES.items():
        arguments = [*JOB, *settings]
        jobs[name] = Job(arguments)
        jobs[f"{name}-stopped"] = Job(arguments, fault="stop@forward:0:5", name=f"{name}-parts")
        jobs[f"{name}-continued"] = Job(arguments, name=f"{name}-parts")
    train_in_sequence(tmp_path, 2, jobs, PYTHONPATH=str(tmp_path))
    for name in CASES:
        assert read_events(tmp_path / f"{name}-parts", "preempt"), "it was stopped"
        assert max_parameter_difference(tmp_path / name, tmp_path / f"{name}-parts") == 0.0, name
