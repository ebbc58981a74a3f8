"""The noise scale in real jobs: what ranks, micro-batches and shards tell is one and the same, and it is the truth."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from jobs import events, furthest, rows
from test_strategies import Job, sessions

from launcher.checkpoint import load
from launcher.manifest import newest
from launcher.schedule import gain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

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
STILL = [*JOB, "lr.base=1e-12"]
EXACT = [*STILL, "batch.per_device=25", "elastic.exact=true", "elastic.shards=4"]
RAMPED = [*JOB, "train.precision=fp32", "batch.per_device=25", "optimizer=adamw", "lr.base=1e-4"]
RAMPED += ["batch.ramp=[[0dur,0.5],[0.6dur,1]]"]
LAYOUTS = {"ddp": [], "fsdp": ["strategy=fsdp"], "zero": ["strategy=deepspeed", "strategy.stage=2"]}
MOVING = [*JOB, "batch.per_device=25", "lr.rule=noise", "optimizer=adamw", "lr.base=1e-4", "checkpoint.every=750sp"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job of this module, in as few starts of the workers as there can be."""
    folder = tmp_path_factory.mktemp("noise")
    (folder / "quadratic.py").write_text(RECIPE)
    env = {"PYTHONPATH": str(folder)}
    thirds = [*STILL, "batch.per_device=17"]
    grown = [*MOVING, "batch.policy=scale", "batch.global=null", "batch.accumulation=2", "batch.per_device=20"]
    sessions(folder, 1, {"thirds1": Job(thirds), "exact1": Job(EXACT)}, **env)
    begun = {"parts": Job([*MOVING, "train.duration=2650sp"]), "grown": Job([*grown, "train.duration=4000sp"])}
    sessions(folder, 2, begun, **env)
    two = {"exact2": Job(EXACT), "whole": Job(MOVING), "parts": Job(MOVING)}
    two |= {name: Job([*RAMPED, *strategy]) for name, strategy in LAYOUTS.items()}
    sessions(folder, 2, two, **env)
    sessions(folder, 3, {"thirds3": Job(thirds), "grown": Job(grown)}, **env)
    return folder


def told(run_dir: Path) -> dict[int, dict[str, float]]:
    """What each row says of the noise, by update."""
    return {row["update"]: {key: row[key] for key in row if key.startswith("noise/")} for row in rows(run_dir)}


def close(one: Path, other: Path, rel: float) -> None:
    a, b = told(one), told(other)
    assert len(a) == len(b) >= 100
    for update, values in a.items():
        assert values == pytest.approx(b[update], rel=rel), update


@pytest.mark.parametrize("name", ["thirds1", "thirds3", "exact2"])
def test_a_known_noise_scale_is_found(here: Path, name: str) -> None:
    last = told(here / name)[100]
    assert last["noise/scale_low"] <= PHI <= last["noise/scale_high"]
    assert last["noise/efficiency"] == pytest.approx((last["noise/scale"] + 25) / (last["noise/scale"] + 50))
    first = next(update for update, values in told(here / name).items() if values)
    assert 20 <= first <= 30, "four blocks of five updates"


def test_ranks_tell_the_same_as_micro_batches_of_the_same_samples(here: Path) -> None:
    """17, 17 and 16."""
    close(here / "thirds1", here / "thirds3", rel=1e-9)


def test_in_exact_mode_it_is_the_same_to_the_last_bit(here: Path) -> None:
    assert told(here / "exact1") == told(here / "exact2")


@pytest.mark.parametrize("strategy", ["fsdp", "zero"])
def test_another_strategy_tells_the_same(here: Path, strategy: str) -> None:
    close(here / "ddp", here / strategy, rel=1e-3)


@pytest.mark.parametrize("strategy", LAYOUTS)
def test_a_stage_of_the_batch_rescales_adams_second_moment(here: Path, strategy: str) -> None:
    """From 25 samples to 50, under every strategy alike."""
    (stage,) = [event for event in events(here / strategy, "plan") if "batch.ramp" in event["why"]]
    assert 0.6 < stage["moments"] < 0.9
    assert moments(here / strategy) == pytest.approx(moments(here / "ddp"), rel=1e-3)


def moments(run_dir: Path) -> list[float]:
    """Adam's average of squared gradients in the last checkpoint."""
    found = newest(run_dir / "checkpoints")
    assert found is not None
    squares: list[float] = load(found).optimizer["at/exp_avg_sq"].tolist()
    return squares


def test_the_rate_follows_and_that_is_an_event(here: Path) -> None:
    moves = [event for event in events(here / "whole", "plan") if "noise scale" in event["why"]]
    assert moves[0]["from"]["lr_scale"] == pytest.approx(math.sqrt(2)), "unknown: as if noise were all there is"
    found = rows(here / "whole")
    for event in moves:
        assert event["lr_scale"] == pytest.approx(math.sqrt(gain(50, 25, event["lr_noise"])))
    assert [row["lr/scale"] for row in found][-1] == pytest.approx(moves[-1]["lr_scale"])
    assert len({row["lr/scale"] for row in found}) == 1 + len(moves)


def test_a_training_that_ended_goes_on_with_the_same_bits(here: Path) -> None:
    assert len(rows(here / "parts")) == 100
    assert told(here / "parts") == told(here / "whole")
    assert furthest(here / "parts", here / "whole") == 0.0
    assert [row["lr/value"] for row in rows(here / "parts")] == [row["lr/value"] for row in rows(here / "whole")]


def test_a_resize_keeps_what_is_known_and_rescales_adams_second_moment(here: Path) -> None:
    """80 samples at two workers and 120 at three, the noise known by then."""
    found = told(here / "grown")
    assert found[52]
    assert found[53].keys() == found[52].keys()
    (resize,) = events(here / "grown", "resize")
    noise = resize["to"]["lr_noise"]
    assert resize["moments"] == pytest.approx((1 + noise / 120) / (1 + noise / 80))
