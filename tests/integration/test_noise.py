"""The noise scale in real jobs: ranks, micro-batches and shards give the same estimate, and it is correct."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import latest_valid
from launcher.checkpoint.tensor_io import load_checkpoint
from launcher.plan.lr_schedule import noise_gain
from tests.helpers.job_sequence import Job, train_in_sequence
from tests.helpers.jobs import max_parameter_difference, read_events, read_rows

pytestmark = pytest.mark.slow

PHI = 30.0
RECIPE = '''
from dataclasses import dataclass
import torch
from torch import nn
from launcher.recipe import Loss

class Points:
    """1000 points about one at distance 1, spread so that the noise scale at zero is exactly 30."""
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(1000, 20, generator=g, dtype=torch.float64)
        x -= x.mean(0)
        self.x = x * (30 / x.square().sum(1).mean()).sqrt()
        self.x[:, 0] += 1
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return self.x[i]

class Where(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(20))
    def forward(self, x):
        return x - self.at

@dataclass(frozen=True)
class Quadratic:
    def model(self):
        return Where()
    def dataset(self, split):
        return Points()
    def loss(self, model, batch):
        return Loss(model(batch).square().sum() / 2, len(batch))
'''
JOB = [
    *("recipe=own", "recipe._target_=quadratic.Quadratic", "recipe.trust=[quadratic]", "sink=[]", "lr.base_batch=25"),
    *("batch.global=50", "train.duration=5000sp", "train.validate_every=null", "train.precision=fp64"),
    *("schedule.warmup=0sp", "schedule=constant", "optimizer=sgd"),
]
THIRDS = [*JOB, "lr.base=1e-12", "batch.per_device=17"]
MOVING = [*JOB, "batch.per_device=20", "lr.rule=noise", "optimizer=adamw", "lr.base=1e-4", "checkpoint.every=750sp"]
EXACT = [*MOVING, "elastic.exact=true", "elastic.shards=4"]
SCALED = [*MOVING, "batch.policy=scale", "batch.global=null", "batch.accumulation=2"]
RAMPED = [*JOB, "train.precision=fp32", "batch.per_device=25", "optimizer=adamw", "lr.base=1e-4"]
RAMPED += ["batch.ramp=[[0dur,0.5],[0.6dur,1]]"]
LAYOUTS = {"ddp": [], "fsdp": ["strategy=fsdp"], "zero": ["strategy=deepspeed", "strategy.stage=2"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every job of this module, in as few starts of workers as possible."""
    folder = tmp_path_factory.mktemp("noise")
    (folder / "quadratic.py").write_text(RECIPE)
    env = {"PYTHONPATH": str(folder)}
    first = {"parts": Job([*EXACT, "train.duration=2650sp"]), "grown": Job([*SCALED, "train.duration=3000sp"])}
    train_in_sequence(folder, 1, {"thirds1": Job(THIRDS), **first}, **env)
    layouts = {name: Job([*RAMPED, *strategy]) for name, strategy in LAYOUTS.items()}
    late = {
        "late": Job(EXACT, reads_late=True),
        "late-stopped": Job(EXACT, reads_late=True, fault="stop@forward:0:37", name="late-parts"),
        "late-continued": Job(EXACT, reads_late=True, name="late-parts"),
        "late-saving": Job([*EXACT, "checkpoint.every=50sp"], reads_late=True, fault="stop@forward:0:5"),
    }
    train_in_sequence(folder, 2, {"parts": Job(EXACT), "whole": Job(EXACT), **late, **layouts}, **env)
    train_in_sequence(folder, 3, {"thirds3": Job(THIRDS), "grown": Job(SCALED)}, **env)
    return folder


def noise_by_update(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the noise values of each row, by update."""
    return {row["update"]: {key: row[key] for key in row if key.startswith("noise/")} for row in read_rows(run_dir)}


def assert_close(one: Path, other: Path, rel: float) -> None:
    a, b = noise_by_update(one), noise_by_update(other)
    assert len(a) == len(b) >= 100
    for update, values in list(a.items())[:40]:  # later: only in every fourth update
        assert values == pytest.approx(b[update], rel=rel), update


@pytest.mark.parametrize("name", ["thirds1", "thirds3"])
def test_known_noise_scale_is_estimated(runs: Path, name: str) -> None:
    last = noise_by_update(runs / name)[100]
    assert last["noise/scale_low"] <= PHI <= last["noise/scale_high"]
    assert last["noise/efficiency"] == pytest.approx((last["noise/scale"] + 25) / (last["noise/scale"] + 50))
    first = next(update for update, values in noise_by_update(runs / name).items() if values)
    assert 20 <= first <= 30, "four blocks of five updates"


def test_ranks_and_micro_batches_give_equal_estimates(runs: Path) -> None:
    """17, 17 and 16."""
    assert_close(runs / "thirds1", runs / "thirds3", rel=1e-9)


@pytest.mark.parametrize("strategy", ["fsdp", "zero"])
def test_strategies_give_the_same_noise_scale(runs: Path, strategy: str) -> None:
    assert_close(runs / "ddp", runs / strategy, rel=1e-3)


@pytest.mark.parametrize("strategy", LAYOUTS)
def test_batch_ramp_rescales_adams_second_moment(runs: Path, strategy: str) -> None:
    """From 25 samples to 50, under every strategy."""
    (stage,) = [event for event in read_events(runs / strategy, "plan") if "batch.ramp" in event["why"]]
    assert 0.6 < stage["moments"] < 0.9
    assert moments(runs / strategy) == pytest.approx(moments(runs / "ddp"), rel=1e-3)


def moments(run_dir: Path) -> list[float]:
    """Return Adam's second moment in the last checkpoint."""
    found = latest_valid(run_dir / "checkpoints")
    assert found is not None
    squares: list[float] = load_checkpoint(found).optimizer["at/exp_avg_sq"].tolist()
    return squares


def test_lr_follows_the_noise_scale_with_events(runs: Path) -> None:
    changes = [event for event in read_events(runs / "whole", "plan") if "noise scale" in event["why"]]
    assert changes[0]["from"]["lr_scale"] == pytest.approx(math.sqrt(2)), "unknown: as if noise were all there is"
    found = read_rows(runs / "whole")
    for event in changes:
        assert event["lr_scale"] == pytest.approx(math.sqrt(noise_gain(50, 25, event["lr_noise"])))
    assert [row["lr/scale"] for row in found][-1] == pytest.approx(changes[-1]["lr_scale"])
    assert len({row["lr/scale"] for row in found}) == 1 + len(changes)


def test_exact_mode_is_bitwise_equal_after_a_resize(runs: Path) -> None:
    """53 updates on one worker and the rest on two, or all on two: same estimates, learning rates and parameters."""
    assert len(read_rows(runs / "parts")) == 100
    assert noise_by_update(runs / "parts") == noise_by_update(runs / "whole")
    assert max_parameter_difference(runs / "parts", runs / "whole") == 0.0
    assert [row["lr/value"] for row in read_rows(runs / "parts")] == [
        row["lr/value"] for row in read_rows(runs / "whole")
    ]


@pytest.mark.parametrize("name", ["late", "late-parts"])
def test_statistics_that_are_read_late_change_nothing(runs: Path, name: str) -> None:
    """As on a GPU. The learning rate follows the noise scale with the same delay, also over a stop at any update."""
    whole, late = read_rows(runs / "whole"), read_rows(runs / name)
    for key in ("update", "lr/value", "train/loss", "train/grad_norm", "noise/scale"):
        assert [row.get(key) for row in late] == [row.get(key) for row in whole], key
    assert max_parameter_difference(runs / name, runs / "whole") == 0.0


def test_stop_is_seen_while_every_update_is_saved(runs: Path) -> None:
    """A save reads the statistics that are still unread, with the requests in them."""
    assert [row["update"] for row in read_rows(runs / "late-saving")] == [1, 2, 3, 4, 5]


def test_resize_keeps_noise_scale_and_rescales_moments(runs: Path) -> None:
    """40 samples on one worker and 120 on three, with a known noise scale."""
    found = noise_by_update(runs / "grown")
    last = max(row["update"] for row in read_rows(runs / "grown") if row["world"] == 1)
    assert found[last]["noise/scale"] == pytest.approx(found[last + 1]["noise/scale"], rel=0.1)
    (resize,) = read_events(runs / "grown", "resize")
    noise = resize["to"]["lr_noise"]
    assert resize["moments"] == pytest.approx((1 + noise / 120) / (1 + noise / 40))
