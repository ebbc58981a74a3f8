"""Links that lead out of a run directory: no command shows what they link to, or writes there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import launcher
from launcher.cli.main import main
from launcher.errors import EXIT_OK, EXIT_USAGE, UsageError
from launcher.goodput.measured_noise import _list_newest_runs
from launcher.run_dir.failures import read_failures
from launcher.run_dir.outward_links import READ_ENTRIES, find_outward_link
from launcher.run_dir.run_directory import RunDirectory
from launcher.slurm.submit import compute_requeue_status

SECRET = "hunter2"
ROW = '{"time": 1.0, "samples": 8, "update": 1, "generation": 1, "train/loss": 1.5, "throughput/samples_per_s": 4.0}\n'
RUN_YAML = "recipe: {_target_: launcher.recipes.mlp.MLP}\n"
CONTENT = {
    "metrics.jsonl": ROW.replace("1.5", "0.123456"),
    "events.jsonl": f'{{"time": 1.0, "event": "alarm", "kind": "x", "detail": "{SECRET}"}}\n',
    "run.yaml": f"recipe: {{_target_: launcher.recipes.mlp.MLP}}\nseed: {SECRET}\n",
    "done.json": f'{{"samples": 8, "updates": 1, "seconds": 1.0, "metrics": {{"{SECRET}": 0.123456}}}}',
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("runs/one")
    RunDirectory(path).create()
    (path / "metrics.jsonl").write_text(ROW)
    (path / "run.yaml").write_text(RUN_YAML)
    return path


def link_out(path: Path, text: str = SECRET) -> Path:
    """Replace a file by a link to one outside the run directory."""
    outside = Path("outside") / path.name
    outside.parent.mkdir(exist_ok=True)
    outside.write_text(text)
    path.unlink(missing_ok=True)
    path.symlink_to(outside.resolve())
    return outside


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("verb", ["export", "explain", "report", "status", "stop", "watch"])
def test_no_command_follows_a_link(run: Path, verb: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    link_out(run / name, CONTENT[name])
    assert main([verb, "one"]) == EXIT_USAGE
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith(f"error: {run / name} is a link that leads out of the run directory, which is not followed")
    assert not printed.out
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["run.yaml", "generation", "logs", "metrics.jsonl"])
def test_training_does_not_continue_through_a_link(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "logs":
        shutil.rmtree(run / name)
    link_out(run / name, "7")
    assert main(["recipe=mlp", "run.name=one", "launch.dry_run=true", "train.device=cpu"]) == EXIT_USAGE
    assert "leads out of the run directory" in capsys.readouterr().err
    with pytest.raises(UsageError, match="is a link"):
        RunDirectory(run).create()


def test_model_is_not_loaded_through_a_link(run: Path) -> None:
    link_out(run / "model.safetensors")
    with pytest.raises(UsageError, match=r"model\.safetensors is a link that leads out"):
        launcher.load(run)


def test_folders_and_their_contents(run: Path) -> None:
    """A link to a folder, a link to a link, and a relative path with `..`; a link may lead to another entry."""
    (run / "best.safetensors").write_text("")
    (run / "model.safetensors").symlink_to("best.safetensors")
    (run / "data").symlink_to("/")
    assert find_outward_link(run) is None, "links inside, and entries of the user's own"
    (run / "stop").symlink_to("data")
    assert find_outward_link(run) == run / "stop"
    (run / "stop").unlink()
    (run / "profile.json").symlink_to("../two/profile.json")
    assert find_outward_link(run) == run / "profile.json"
    (run / "logs/error-g1-r0.json").symlink_to(link_out(run / "logs/x", '{"rank": 0}').resolve())
    assert read_failures(run / "logs") == []


def test_run_directory_may_be_a_link(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("here").symlink_to(run.resolve())
    assert main(["export", "here"]) == EXIT_OK
    assert "1.5" in capsys.readouterr().out


def test_points_of_a_sweep_are_not_links(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of a folder shows what lies in it; a run elsewhere can be named itself."""
    Path("runs/sweep").mkdir()
    shutil.copytree(run, "runs/sweep/0")
    Path("runs/sweep/1").symlink_to(run.resolve())
    assert main(["report", "sweep"]) == EXIT_USAGE
    assert "runs/sweep/1 is a link that leads out of runs/sweep" in capsys.readouterr().err
    Path("runs/sweep/1").unlink()
    link_out(Path("runs/sweep/0/events.jsonl"))
    assert main(["report", "sweep"]) == EXIT_USAGE
    assert "runs/sweep/0/events.jsonl is a link" in capsys.readouterr().err


def test_report_replaces_a_link_in_the_run_directory(run: Path) -> None:
    outside = link_out(run / "report.html")
    assert main(["report", "one"]) == EXIT_OK
    assert outside.read_text() == SECRET
    assert not (run / "report.html").is_symlink()


def test_nothing_is_appended_through_a_link(run: Path) -> None:
    outside = link_out(run / "slurm-failures")
    with pytest.raises(UsageError, match="leads out"):
        compute_requeue_status(str(run), "7")
    assert outside.read_text() == SECRET


def test_measured_noise_skips_such_runs(run: Path) -> None:
    assert _list_newest_runs() == [run]
    link_out(run / "metrics.jsonl", ROW)
    assert _list_newest_runs() == []


def test_every_file_of_the_launcher_is_checked(run: Path) -> None:
    """What a new run directory has, and what its small files are called."""
    run_dir = RunDirectory(run)
    run_dir.increment_generation()
    run_dir.increment_restarts()
    run_dir.record_saved_generation(1)
    run_dir.ensure_wandb_id()
    run_dir.request_stop("test")
    run_dir.lock().release()
    assert {path.name for path in run.iterdir()} <= READ_ENTRIES
