"""tune with real processes: two workers of the driver, one of them out of memory, and under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import make_env

pytestmark = pytest.mark.slow

TWO = ("recipe=mlp", "tune.sizes=[20,45]", "launch.workers=2", "tune.budget_s=1")
RECIPES = '''
import os, time
from dataclasses import dataclass
import torch
from launcher.errors import UsageError
from launcher.recipe import Loss
from launcher.recipes.mlp import Mlp

FAR = 1 << 60


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        torch.empty(FAR)


@dataclass(frozen=True)
class Greedy(Mlp):
    """More than 30 samples on rank 1 ask for more memory than there is anywhere; or another error strikes there."""

    where: str = "forward"

    def loss(self, model, batch):
        print("a recipe that talks")
        loss = super().loss(model, batch)
        full = os.environ["RANK"] == "1" and len(batch[1]) > 30
        if full and self.where == "wrong":
            raise RuntimeError("shapes do not go together")
        if full and self.where == "forward":
            torch.empty(FAR)
        total = Backward.apply(loss.total) if full and self.where == "backward" else loss.total
        return Loss(total, loss.count, loss.metrics)


@dataclass(frozen=True)
class Uneven(Mlp):
    """More than 30 samples take a hundred times as many sines."""

    def loss(self, model, batch):
        wave = torch.ones(100_000)
        for _ in range(100 if len(batch[1]) > 30 else 1):
            torch.sin(wave)
        return super().loss(model, batch)


class Slow:
    deterministic = True

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitems__(self, samples):
        time.sleep(0.005 * len(samples))
        return self.items.__getitems__(samples)

    def __getitem__(self, sample):
        return tuple(one[0] for one in self.items.__getitems__([sample]))


@dataclass(frozen=True)
class SlowData(Mlp):
    def dataset(self, split):
        return Slow(super().dataset(split))


@dataclass(frozen=True)
class Pictures(Mlp):
    """Digits that were blown up: what they take grows with image_size, and little else does."""

    image_size: int = 8

    def __post_init__(self):
        if self.image_size < 1:
            raise UsageError(f"recipe.image_size={self.image_size} is no size: type pixels")

    def loss(self, model, batch):
        large = torch.nn.functional.interpolate(batch[0], self.image_size)
        return super().loss(model, (torch.nn.functional.adaptive_avg_pool2d(large, 8), batch[1]))
'''


def own(kind: str, *fields: str) -> tuple[str, ...]:
    return (f"recipe._target_=recipes_of_ours.{kind}", "recipe.trust=[recipes_of_ours]", *fields)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "lib").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "lib" / "recipes_of_ours.py").write_text(RECIPES)
    return tmp_path


def run_module(here: Path, command: Sequence[str], **env: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a folder that afterwards contains profiles at most, next to one for temporary files."""
    places = {"PYTHONPATH": str(here / "lib"), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(here / "tmp")}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=here / "work",
        env=make_env(**places, **env),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert not [path for path in (here / "work").rglob("*") if path.is_file() and path.parent.name != ".profiles"]
    assert not list((here / "tmp").glob("launcher-*"))
    return done


def run_tune(here: Path, *args: str, **env: str) -> dict[str, Any]:
    done = run_module(here, ["launcher", "tune", *args, "format=json"], **env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def by_size(found: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {point["per_device"]: point for point in found["points"]}


@pytest.mark.core
def test_two_sizes_on_two_workers(here: Path) -> None:
    found = run_tune(here, *TWO)
    points = by_size(found)
    assert list(points) == [20, 45]
    for size, point in points.items():
        assert 0 < point["low"] <= point["samples_per_s"] <= point["high"]
        assert point["ms_per_update"] == pytest.approx(1e3 * 2 * size / point["samples_per_s"])
        assert point["epoch_s"] == pytest.approx(1437 / point["samples_per_s"])
        assert point["memory_bytes"] > 10**8
        assert point["stages"]["forward"] > 0 < point["stages"]["sync"]
    assert (found["world"], found["memory_max"]) == (2, 45)
    assert found["recommended"] in points


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_rank_out_of_memory_hangs_nothing(here: Path, where: str) -> None:
    found = run_tune(here, *TWO, *own("Greedy", f"+recipe.where={where}"))
    points = by_size(found)
    assert points[20]["samples_per_s"] > 0
    assert (points[45]["label"], points[45]["where"], points[45]["predicted"]) == ("oom", where, False)
    assert (found["memory_max"], found["recommended"]) == (20, 20)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_out_of_memory_in_every_dry_run(here: Path, phase: str) -> None:
    found = run_tune(here, *TWO, LAUNCHER_TEST_FAULTS="1", FAULT=f"oom@{phase}:1:1:0")
    assert [point["label"] for point in found["points"]] == ["oom", "oom"]
    assert found["recommended"] is None


def test_out_of_memory_in_a_collective(here: Path) -> None:
    """Update 6 only occurs at sizes that are timed; the second start of the workers has no fault."""
    found = run_tune(here, *TWO, LAUNCHER_TEST_FAULTS="1", FAULT="oom@backward:1:6:1")
    points = by_size(found)
    assert points[20]["label"] == "oom"
    assert points[45]["samples_per_s"] > 0


def test_error_other_than_memory_is_shown(here: Path) -> None:
    done = run_module(here, ["launcher", "tune", *TWO, *own("Greedy", "+recipe.where=wrong"), "format=json"])
    assert (done.returncode, done.stdout) == (1, "")
    assert "RuntimeError: shapes do not go together" in done.stderr


@pytest.mark.alone
def test_slow_data_loader_is_named(here: Path) -> None:
    found = run_tune(here, "recipe=mlp", "tune.sizes=[16]", "launch.workers=1", "tune.budget_s=1", *own("SlowData"))
    assert found["bottleneck"] == "data"
    assert found["synthetic"][0]["samples_per_s"] > found["points"][0]["samples_per_s"]
    assert "would keep up" in found["why"]


@pytest.mark.alone
def test_slowing_operator_is_named_and_splits_measured(here: Path) -> None:
    arguments = ("recipe=mlp", "tune.sizes=[20,45]", "launch.workers=2", "tune.budget_s=14", *own("Uneven"))
    found = run_tune(here, *arguments)
    assert by_size(found)[45]["label"] == "regressed"
    assert "the forward pass takes" in found["why"]
    sine = found["operators"][0]
    assert (sine["name"], sine["stage"]) == ("aten::sin", "forward")
    assert (sine["per_device_before"], sine["per_device_after"]) == (20, 45)
    assert sine["ms_per_sample_after"] > 5 * sine["ms_per_sample_before"] > 0
    assert [(one["per_device"], one["accumulation"]) for one in found["splits"]] == [(20, 1), (10, 2), (5, 4)]
    for one in found["splits"]:
        assert 0 < one["low"] <= one["samples_per_s"] <= one["high"]
        assert one["memory_bytes"] > 10**8
        assert one["sync_ms"] > 0


def test_own_torchrun_prints_one_document(here: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "launcher", "tune"]
    arguments = ["recipe=mlp", "tune.sizes=[20,25]", "tune.budget_s=1", "format=json", *own("Greedy")]
    done = run_module(here, [*torchrun, *arguments])
    assert done.returncode == 0, done.stderr
    assert list(by_size(json.loads(done.stdout))) == [20, 25]
    assert "a recipe that talks" in done.stderr


def test_search_prints_a_table_and_writes_files(here: Path) -> None:
    out = Path(tempfile.mkdtemp(dir=here)) / "tuned"
    done = run_module(
        here,
        ["launcher", "tune", "recipe=mlp", "launch.workers=1", "tune.max=6", "tune.budget_s=20", f"tune.out={out}"],
    )
    assert done.returncode == 0, done.stderr
    assert "  recommended" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    found = json.loads((out / "tune.json").read_text())
    assert found["memory_max"] == 6
    assert "<svg" in (out / "tune.html").read_text()


def test_several_points_make_one_document(here: Path) -> None:
    """Images of two sizes; a third point is invalid, which is shown and does not stop the others."""
    out = here / "tuned"
    small = ("recipe=mlp", "launch.workers=1", "tune.sizes=[16,64]", "tune.budget_s=1", *own("Pictures"))
    arguments = [*small, "+recipe.image_size=8,0,512", "format=json", f"tune.out={out}"]
    done = run_module(here, ["launcher", "tune", "-m", *arguments])
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)
    assert [one["overrides"]["recipe.image_size"] for one in found["points"]] == [8, 0, 512]
    first, wrong, last = found["points"]
    assert (wrong["found"], wrong["error"]) == (None, "recipe.image_size=0 is no size: type pixels")
    assert all(list(by_size(one["found"])) == [16, 64] for one in (first, last))
    assert found["memory"]["sizes"] == [[8, 8], [512, 512]]
    assert 4 <= found["memory"]["pixel_bytes"]["value"] < 16, "a float each, and what it was made of"
    assert json.loads((out / "tune.json").read_text()) == found
    assert (out / "2" / "tune.html").exists()
