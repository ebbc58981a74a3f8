"""The points of a sweep: run directories, parallel points, failures, shards and invalid points."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.cli.train import launch_or_submit
from launcher.config import compose
from launcher.config.overrides import parse_overrides
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, UsageError
from launcher.run_dir.run_directory import RunDirectory
from launcher.sweep import points, run_sweep
from tests.helpers.config_dirs import make_config_dir

pytestmark = pytest.mark.process


@pytest.fixture
def config_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_config_dir(tmp_path, monkeypatch)


@pytest.fixture
def start_sweep(config_dir: Path) -> Iterator[Any]:
    SEEN.clear()
    yield lambda *overrides, point=record_point: run_sweep.run_sweep(
        ["--config-dir", str(config_dir), "-m", "recipe=tiny", *overrides], point
    )
    SEEN.clear()


SEEN: list[RunConfig] = []
TINY_RECIPE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Tiny:
    width: int = 16
    data: str | None = None

    def model(self): ...
    def dataset(self, split): return range(1000)
    def loss(self, model, batch): ...
"""


def record_point(config: RunConfig, overrides: Sequence[str]) -> int:
    SEEN.append(config)
    write_done(config)
    return EXIT_OK


def write_done(config: RunConfig) -> None:
    run_dir = RunDirectory(Path(str(config.run.dir)))
    run_dir.path.mkdir(parents=True, exist_ok=True)
    run_dir.write_done({"samples": 1000, "updates": 10, "seconds": 2.0})


def stop_at_16(config: RunConfig, overrides: Sequence[str]) -> int:
    SEEN.append(config)
    if config.batch.per_device != 16:
        write_done(config)
    return EXIT_OK


def fail_at_16(config: RunConfig, overrides: Sequence[str]) -> int:
    if config.batch.per_device == 16:
        SEEN.append(config)
        raise OSError("no disk at s3://u:hunter2@h")
    return record_point(config, overrides)


def interrupt(config: RunConfig, overrides: Sequence[str]) -> int:
    SEEN.append(config)
    return EXIT_INTERRUPTED


def test_each_point_gets_a_numbered_run_directory(start_sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start_sweep("batch.per_device=8,16", "seed=1,2", "run.name=sizes") == EXIT_OK
    assert [(config.batch.per_device, config.seed) for config in SEEN] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert [config.run.dir for config in SEEN] == [f"runs/sizes/{n}" for n in range(4)]
    assert [config.run.name for config in SEEN] == [f"sizes-{n}" for n in range(4)]
    assert [path.name for path in Path.cwd().iterdir()] == ["runs"]
    assert [path.name for path in Path("runs").iterdir()] == ["sizes"]
    [line] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  3 ")]
    assert line == ["3", "-", "-", "500", "2.0", "-", "16", "2"]


def test_run_dir_sets_the_sweep_folder(start_sweep: Any, tmp_path: Path) -> None:
    sweep_dir = tmp_path / "a place"
    assert start_sweep("seed=1,2", f"run.dir='{sweep_dir}'") == EXIT_OK
    assert [config.run.dir for config in SEEN] == [str(sweep_dir / "0"), str(sweep_dir / "1")]
    assert list(Path.cwd().iterdir()) == []


def test_unnamed_sweep_is_named_by_time(start_sweep: Any) -> None:
    start_sweep("seed=1,2")
    [sweep_dir] = Path("runs").iterdir()
    assert sweep_dir.name.startswith("sweep-2")
    assert [config.run.dir for config in SEEN] == [str(sweep_dir / "0"), str(sweep_dir / "1")]


def test_failed_point_is_reported_and_others_run(start_sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start_sweep("batch.per_device=8,16,32", "run.name=sizes", point=fail_at_16) == 1
    assert [config.batch.per_device for config in SEEN] == [8, 16, 32]
    captured = capsys.readouterr()
    assert "error: OSError: no disk at s3://u:***@h" in captured.err
    [line] = [line.split() for line in captured.out.splitlines() if line.startswith("  1 ")]
    assert line == ["1", "-", "-", "failed", "(1)", "-", "-", "16"]


def test_second_interrupt_of_a_point_ends_sweep(start_sweep: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        start_sweep("seed=1,2,3", point=interrupt)
    assert len(SEEN) == 1


def test_stopped_point_ends_the_sweep(start_sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start_sweep("batch.per_device=8,16,32", "run.name=sizes", point=stop_at_16) == EXIT_OK
    assert [config.batch.per_device for config in SEEN] == [8, 16]
    cells = [line.split()[3] for line in capsys.readouterr().out.splitlines() if line[:4].strip().isdigit()]
    assert cells == ["500", "stopped", "not"]


def test_shard_runs_only_its_own_points(start_sweep: Any) -> None:
    start_sweep("batch.per_device=8,16,32", "seed=1,2", "run.name=sizes", "--shard=1/4")
    assert [config.run.dir for config in SEEN] == ["runs/sizes/1", "runs/sizes/5"]


def test_overrides_of_a_point_compose_its_config(start_sweep: Any) -> None:
    """A job started elsewhere with these overrides trains the same run in the same folder."""
    seen_overrides: list[Sequence[str]] = []

    def keep(config: RunConfig, overrides: Sequence[str]) -> int:
        seen_overrides.append(overrides)
        return record_point(config, overrides)

    start_sweep("batch.per_device=8,16", "run.dir='a b'", "sink=wandb", point=keep)
    configs = [compose.compose(overrides) for overrides in seen_overrides]
    assert [config.batch.per_device for config in configs] == [8, 16]
    assert [config.run.dir for config in configs] == ["a b/0", "a b/1"]
    assert [config.sink["wandb"]["group"] for config in configs] == ["a b", "a b"]


def test_points_share_the_environment_s_group(start_sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    start_sweep("batch.per_device=8,16", "sink=wandb", "run.name=sizes")
    assert [config.sink["wandb"]["group"] for config in SEEN] == ["mine", "mine"]


def test_one_wandb_id_for_all_points_is_refused(start_sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All points would be written into one run in W&B, one over the other."""
    monkeypatch.setenv("WANDB_RUN_ID", "abc12345")
    with pytest.raises(UsageError, match=r"WANDB_RUN_ID=abc12345 names one run.*env -u WANDB_RUN_ID"):
        start_sweep("batch.per_device=8,16", "sink=wandb")
    start_sweep("batch.per_device=8,16", "sink=[]")
    assert len(SEEN) == 2


def test_global_batch_selects_hold_at_every_point(start_sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    start_sweep("batch.global=64,128")
    assert [(config.batch.policy, config.batch.global_batch) for config in SEEN] == [("hold", 64), ("hold", 128)]
    assert "note: batch.global=64 selects batch=hold" in capsys.readouterr().err


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two points at a time take two cores")
def test_parallel_points_write_separate_logs(start_sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start_sweep("batch.per_device=8,16,32", "run.name=s", "sweep.max_parallel=2", point=fail_at_16) == 1
    captured = capsys.readouterr()
    [failed] = [line for line in captured.err.splitlines() if line.startswith("point 1 ")]
    assert failed == "point 1 failed (1), error: OSError: no disk at s3://u:***@h (log: runs/s/1.log)"
    assert Path("runs/s/1.log").read_text().startswith("point 1: recipe=tiny batch.per_device=16\n")
    assert [(Path("runs/s") / str(point) / "done.json").exists() for point in range(3)] == [True, False, True]
    assert SEEN == [], "each ran in a process of its own"
    assert [line.split()[3] for line in captured.out.splitlines()[2:5]] == ["500", "failed", "500"]


def test_sweep_can_be_defined_in_experiment_file(start_sweep: Any, config_dir: Path) -> None:
    (config_dir / "experiment").mkdir()
    (config_dir / "experiment" / "seeds.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 1,2\n"
    )
    assert start_sweep("experiment=seeds") == EXIT_OK
    assert [config.seed for config in SEEN] == [1, 2]


def test_multirun_yaml_holds_no_secret(start_sweep: Any) -> None:
    start_sweep("seed=1,2", "recipe.data=s3://u:hunter2@h", "run.name=s")
    written = Path("runs/s/multirun.yaml")
    assert "hunter2" not in written.read_text()
    assert written.stat().st_mode & 0o077 == 0
    assert SEEN[0].recipe["data"] == "s3://u:hunter2@h"


@given(st.text(st.sampled_from("ab '\"\\\\$`;#,=[{}%\u00e9"), max_size=12).filter(lambda text: "${" not in text))
def test_quoted_value_parses_unchanged(text: str) -> None:
    assert parse_overrides([f"run.dir={points.quote_override(text)}"])[0].value() == text


def test_point_task_can_be_pickled() -> None:
    restored = pickle.loads(pickle.dumps(functools.partial(points.run_point, points.PointTask(record_point), [])))
    assert restored.args == (points.PointTask(record_point), [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch.per_device=8,x"], "batch.per_device=x: expected a whole number"),
        (["batch=hold,scal", "batch.global=8"], "batch=scal: did you mean scale?"),
        (["seed=1,2", "batch.per_devic=3"], "did you mean batch.per_device?"),
        (["run.name=a,b"], "run.name can't be swept over"),
        (["run.dir=a,b"], "run.dir can't be swept over"),
        (["run.name=../a", "seed=1,2"], "run.name=../a: type up to 64 letters"),
        (["hydra.sweep.dir=a", "seed=1,2"], "the sweep's folder is set by run.name= or run.dir="),
        (["hydra/launcher=nowhere", "seed=1,2"], "hydra/launcher=nowhere: choose from basic"),
        (["seed=interval(1,2)"], "does not support sweep type"),
        (["sweep.max_parallel=1,2"], "sweep.max_parallel can't be swept over"),
        (["sweep.max_parallel=0", "seed=1,2"], "sweep.max_parallel=0 is below 1: type sweep.max_parallel=1 or more"),
        (
            ["sweep.max_parallel=2", "seed=1,2", "launch=slurm"],
            "points on this machine only: leave it out, or launch=s",
        ),
        (["sweep.max_parallel=2", "seed=1,2", "launch.workers=999"], "each point needs 999 cores"),
        (["hydra/sweeper=optuna", "seed=1,2"], "type sweep.trials=20 instead"),
        (
            ["batch.per_device=8,16", "seed=1,2", "run.name=b-${batch.per_device}"],
            "run.name=b-${batch.per_device}: points 0 and 1 both get runs/b-8: add ${seed}, so that each point has",
        ),
        (["seed=1,2,1", "run.dir=a/../b${seed}"], "points 0 and 2 both get a/../b1: add another key"),
        (["seed=1,2", "run.name='a b-${seed}'"], "run.name=a b-1: type up to 64 letters"),
        (["seed=1,2", "launch.dry_run=true,false"], "launch.dry_run can't be swept over"),
        (
            ["seed=range(1,9)", "sweep.trials=2", "sweep.metric=val/loss", "launch.dry_run=true"],
            "cannot show the points",
        ),
        (
            ["seed=range(1,9)", "sweep.trials=2", "sweep.metric=val/loss", "run.name=s-${seed}"],
            "run.name=s-${seed} depends on a key that is searched over",
        ),
    ],
)
def test_invalid_point_is_refused_before_any_starts(start_sweep: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=None) as caught:
        start_sweep(*overrides)
    assert message in str(caught.value)
    assert SEEN == []
    assert list(Path.cwd().iterdir()) == []


# --- names of their own, and dry runs -----------------------------------------------------------------------------

NAMED = "run.name=size-${batch.per_device}"


def test_name_that_contains_a_swept_key_is_each_points_own(start_sweep: Any, capsys: Any) -> None:
    assert start_sweep("batch.per_device=8,16", NAMED, "recipe.data=b-${batch.per_device}") == EXIT_OK
    assert [(config.run.name, config.run.dir) for config in SEEN] == [(f"size-{n}", f"runs/size-{n}") for n in (8, 16)]
    assert [config.recipe["data"] for config in SEEN] == ["b-8", "b-16"]
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert rows == ["size-8", "size-16"]
    assert all(Path(f"runs/size-{size}/done.json").exists() for size in (8, 16))
    [folder] = [path for path in Path("runs").iterdir() if path.name.startswith("sweep-")]
    assert [path.name for path in folder.iterdir()] == ["multirun.yaml"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two points at a time take two cores")
def test_parallel_points_have_names_of_their_own(start_sweep: Any, capsys: Any) -> None:
    more = ["sweep.max_parallel=2", "recipe.data=b-${batch.per_device}"]
    assert start_sweep("batch.per_device=8,16,32", NAMED, *more, point=fail_at_16) == 1
    cells = [line.split() for line in capsys.readouterr().out.splitlines()[2:5]]
    assert [cells[n][:1] + cells[n][3:4] for n in range(3)] == [
        ["size-8", "500"],
        ["size-16", "failed"],
        ["size-32", "500"],
    ]
    assert all((Path("runs") / f"size-{size}/done.json").exists() for size in (8, 32))


def test_shard_of_points_with_names_of_their_own(start_sweep: Any) -> None:
    start_sweep("batch.per_device=8,16,32", "run.dir='out/${batch.per_device}'", "--shard=1/2")
    assert [(config.run.name, config.run.dir) for config in SEEN] == [(None, "out/16")]


@pytest.mark.parametrize("name", ["run.name=x-${data.num_workers}", "run.dir=runs/x-${data.num_workers}"])
def test_name_without_a_swept_key_is_that_of_the_sweep(start_sweep: Any, name: str) -> None:
    start_sweep("batch.per_device=8,16", name)
    assert [config.run.dir for config in SEEN] == ["runs/x-0/0", "runs/x-0/1"]


def test_swept_key_of_a_name_may_be_new(start_sweep: Any) -> None:
    """The sweep's own configuration does not contain it, only those of the points do."""
    start_sweep("+recipe.deep=1,2", "run.name=x-${recipe.deep}")
    assert [config.run.name for config in SEEN] == ["x-1", "x-2"]


SLURM = ["launch=slurm", "launch.time=10"]


@pytest.mark.parametrize("launch", [[], SLURM], ids=["local", "slurm"])
def test_dry_sweep_shows_every_point_and_makes_nothing(
    launch_sweep: Any, launch: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch_sweep("batch.per_device=8,16,32", "launch.dry_run=true", NAMED, *launch) == EXIT_OK
    out = capsys.readouterr().out
    for number, size in enumerate((8, 16, 32)):
        assert f"# point {number}, runs/size-{size}: recipe=tiny " in out
        assert f" batch.per_device={size}" in out
    assert out.count("#SBATCH --job-name=size-" if launch else "torchrun_agent") == 3
    assert list(Path.cwd().iterdir()) == []


def test_dry_sweep_shows_the_points_that_cannot_run(launch_sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_sweep("batch.global=8,99999", "launch.dry_run=true", "--shard=1/2") == EXIT_USAGE
    assert launch_sweep("batch.global=8,99999", "launch.dry_run=true") == EXIT_USAGE
    printed = capsys.readouterr()
    assert printed.err.count("error: batch.global=99999 exceeds") == 2
    assert [line[:9] for line in printed.out.splitlines() if line.startswith("#")] == [
        "# point 1",
        "# point 0",
        "# point 1",
    ]
    assert list(Path.cwd().iterdir()) == []


@pytest.fixture
def launch_sweep(start_sweep: Any, config_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start a sweep of real jobs."""
    code = config_dir.parent / "code"
    code.mkdir(exist_ok=True)
    (code / "tiny_recipe.py").write_text(TINY_RECIPE)
    monkeypatch.syspath_prepend(str(code))
    own = ["recipe._target_=tiny_recipe.Tiny", "recipe.trust=[tiny_recipe]"]
    return lambda *overrides: start_sweep(*own, *overrides, point=launch_or_submit)
