"""Batches without a target, at 2 and 3 workers under every strategy, train as a plain loop over the whole batch does.

The loop sums gradients and divides by the number of targets. Of every four updates one has no target at all, and in the
others some rank or micro-batch has none. In validation each rank sees other metrics.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.plan.sample_order import SamplePermutation
from tests.helpers.job_sequence import Job, train_in_sequence
from tests.helpers.jobs import read_events, read_rows
from tests.helpers.small_job import run_launcher

pytestmark = [pytest.mark.slow, pytest.mark.core]

RECIPE = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset
from launcher.plan.sample_order import SamplePermutation
from launcher.recipe import Loss

#: In the order in which the first epoch takes the samples.
HAS = [1, 1, 0, 0, 1, 0] + [0] * 6 + [0, 0, 0, 0, 1, 1] + [1, 0, 1, 1, 0, 0]

#: What people return for a batch without a target.
NOTHING = {
    "leaf": lambda model, x: torch.zeros((), requires_grad=True),
    "constant": lambda model, x: torch.zeros(1),
    "number": lambda model, x: 0.0,
    "integer": lambda model, x: torch.tensor(0),
    "unlinked": lambda model, x: 2 * torch.zeros((), requires_grad=True),
    "graph": lambda model, x: model(x).sum() * 0,
    "detached": lambda model, x: model(x).sum().detach() * 0,
    "mean": lambda model, x: model(x)[:0].mean(),  # NaN
    "undefined": lambda model, x: float("nan"),
}

@dataclass(frozen=True)
class Targets:
    nothing: str = "graph"
    val_has: bool = True

    def model(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.Linear(2, 1))

    def dataset(self, split):
        count = len(HAS) if split == "train" else 7
        x = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
        has = torch.full((count,), self.val_has)
        if split == "train":
            has[SamplePermutation(count, 0, 0)[:]] = torch.tensor(HAS) > 0
        return TensorDataset(x, x.sum(1, keepdim=True), has, torch.arange(count))

    def loss(self, model, batch):
        x, y, has, index = batch
        if not has.any():
            return Loss(NOTHING[self.nothing](model, x), 0)
        square = (model(x[has]) - y[has]) ** 2
        metrics = {f"of{i}": value for i, value in zip(index.tolist(), square.flatten())} if not model.training else {}
        return Loss(square.sum(), has.sum(), dict(reversed(metrics.items())) if index[0] % 2 else metrics)
"""
JOB = [
    *("recipe=own", "recipe._target_=targets.Targets", "recipe.trust=[targets]", "lr.base=0.05", "lr.base_batch=6"),
    *("batch.global=6", "batch.per_device=2", "train.duration=2ep", "seed=0", "sink=[]"),
    *("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=false", "optimizer.weight_decay=0.1"),
    *("schedule=constant", "schedule.warmup=0sp"),
]
FP64 = [*JOB, "train.precision=fp64"]
FSDP = [*FP64, "strategy=fsdp"]
LAYOUTS = {
    "ddp": FP64,
    "unused": [*FP64, "strategy.find_unused_parameters=true"],
    "exact": [*FP64, "elastic.exact=true", "elastic.shards=4"],
    "fsdp": FSDP,
    "kept": [*FSDP, "strategy.reshard_after_forward=false"],
    **{f"zero{stage}": [*JOB, "strategy=deepspeed", f"strategy.stage={stage}"] for stage in range(4)},
}
KINDS = ["leaf", "constant", "number", "unlinked", "graph", "mean", "undefined"]
COMPARED = {
    2: [
        *(("ddp", kind) for kind in KINDS),
        *(("unused", "mean"), ("unused", "leaf"), ("exact", "mean"), ("exact", "leaf"), ("kept", "leaf")),
        *(("zero1", "mean"), ("zero2", "graph"), ("zero3", "mean")),
    ],
    3: [
        *(("ddp", "leaf"), ("ddp", "mean")),
        *(("fsdp", kind) for kind in ("leaf", "unlinked", "graph", "detached", "mean")),
        *(("zero1", "leaf"), ("zero2", "mean")),
    ],
}


#: As on a GPU, where the loss count scales the gradients on the device, and the host reads it one update late.
LATE = [("ddp", "leaf"), ("ddp", "mean"), ("unused", "mean"), ("exact", "mean"), ("fsdp", "leaf"), ("zero2", "graph")]


def compared_jobs(world_size: int) -> dict[str, Job]:
    jobs = {
        f"{layout}-{kind}-{world_size}": Job([*LAYOUTS[layout], f"+recipe.nothing={kind}"])
        for layout, kind in COMPARED[world_size]
    }
    if world_size == 2:
        for layout, kind in LATE:
            jobs[f"{layout}-{kind}-late"] = Job([*LAYOUTS[layout], f"+recipe.nothing={kind}"], reads_late=True)
    return jobs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the finished runs of every job."""
    folder = tmp_path_factory.mktemp("targets")
    (folder / "targets.py").write_text(RECIPE)
    plateau = ["schedule=plateau", "schedule.metric=val/loss", "schedule.patience=1", "schedule.warmup=0sp"]
    best = ["checkpoint.best=val/loss", "train.target.metric=val/loss", "train.target.at_most=1e9"]
    unvalidated = {"no-val-2": Job([*FP64, "+recipe.val_has=false", "+recipe.nothing=undefined", *plateau, *best])}
    train_in_sequence(folder, 3, compared_jobs(3), PYTHONPATH=str(folder))
    train_in_sequence(folder, 2, compared_jobs(2) | unvalidated, PYTHONPATH=str(folder))
    return folder


def load_recipe(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("targets", folder / "targets.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["targets"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_plainly(recipe: Any) -> tuple[dict[str, torch.Tensor], dict[str, float], list[int]]:
    """The parameters and the validation metrics of a plain loop, and the numbers of the updates without a target."""
    model, (x, y, has, _) = recipe.model().double(), recipe.dataset("train").tensors
    biases, weights = ([p for p in model.parameters() if (p.ndim > 1) == is_weight] for is_weight in (False, True))
    groups = [{"params": biases, "weight_decay": 0.0}, {"params": weights}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1)
    order = [*SamplePermutation(len(x), 0, 0)[:], *SamplePermutation(len(x), 0, 1)[:]]
    empty = []
    for number, start in enumerate(range(0, len(order), 6), 1):
        chosen = [sample for sample in order[start : start + 6] if has[sample]]
        if not chosen:
            empty.append(number)
            continue
        loss = ((model(x[chosen].double()) - y[chosen].double()) ** 2).sum() / len(chosen)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    x, y, _, _ = recipe.dataset("val").tensors
    square = ((model(x.double()) - y.double()) ** 2).flatten().tolist()
    metrics = {f"val/of{index}": value / len(x) for index, value in enumerate(square)}
    return dict(model.state_dict()), metrics | {"val/loss": sum(square) / len(x)}, empty


@pytest.mark.parametrize("world_size", [2, 3])
def test_parameters_and_metrics_equal_a_plain_loop(runs: Path, world_size: int) -> None:
    parameters, metrics, _ = train_plainly(load_recipe(runs).Targets())
    for name in compared_jobs(world_size):
        tolerance = 1e-6 if name.startswith("zero") else 1e-12
        found = load_file(runs / name / "model.safetensors")
        for parameter, value in parameters.items():
            assert torch.allclose(found[parameter].double(), value, rtol=0, atol=tolerance), (name, parameter)
        measured = json.loads((runs / name / "done.json").read_text())["metrics"]
        assert measured == pytest.approx(metrics, rel=1e-4 if name.startswith("zero") else 1e-10), name


def test_updates_without_a_target_are_told_as_such(runs: Path) -> None:
    *_, empty = train_plainly(load_recipe(runs).Targets())
    assert 2 in empty
    for name in (*compared_jobs(2), *compared_jobs(3)):
        alarms = [event for event in read_events(runs / name, "alarm") if event["kind"] != "straggler"]
        assert {alarm["kind"] for alarm in alarms} == {"empty_update"}, name
        assert "update 2 took no step, since its loss counted 0" in alarms[0]["detail"]
        done = json.loads((runs / name / "done.json").read_text())
        assert (done["empty_updates"], done["updates"], "skipped_updates" in done) == (len(empty), 8, False)
        rows = {row["update"]: row for row in read_rows(runs / name)}
        assert [update for update, row in rows.items() if "train/loss" not in row] == empty


def test_validation_without_a_target_is_nan_and_told_once(runs: Path) -> None:
    """No best checkpoint, no target, and no reduction of the learning rate follows from it."""
    run_dir = runs / "no-val-2"
    assert len([event for event in read_events(run_dir, "alarm") if event["kind"] == "empty_validation"]) == 1
    done = json.loads((run_dir / "done.json").read_text())
    assert done["metrics"] == {"val/loss": None}
    assert "target" not in done
    assert not (run_dir / "best.safetensors").exists()
    assert {row["lr/value"] for row in read_rows(run_dir)} == {0.05}


CUT = """
from dataclasses import dataclass, replace
from targets import Targets

@dataclass(frozen=True)
class Cut(Targets):
    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return replace(loss, total=loss.total.detach())
"""


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("cut.Cut", FP64, " but returned a total without a gradient: compute it from the model's output"),
        ("targets.Targets", LAYOUTS["zero2"], "strategy.stage=2: recipe.loss counted 0 and returned a total that"),
    ],
)
def test_loss_without_a_gradient_is_refused(tmp_path: Path, recipe: str, arguments: list[str], message: str) -> None:
    """Something was counted, or all ranks must go through the model in the same order: final, with no restart."""
    (tmp_path / "targets.py").write_text(RECIPE)
    (tmp_path / "cut.py").write_text(CUT)
    own = [f"recipe._target_={recipe}", "recipe.trust=[cut,targets]", "recipe.nothing=leaf", "run.name=refused"]
    done = run_launcher(tmp_path, *arguments, *own, "launch.workers=2", status=1)
    assert message in done.stderr
    assert not (tmp_path / "runs/refused/done.json").exists()
