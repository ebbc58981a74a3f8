"""The run directory: readable as the umask says, with fixed file names and a name that is decided once."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
from datetime import datetime
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.run_dir.run_directory import RunDirectory, resolve_named_dir, unique_run_name

NOON = datetime(2024, 5, 6, 12, 30, 15)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "runs" / "one")
    made.create()
    return made


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def file_mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- files --------------------------------------------------------------------------------------------------------


def test_file_names_are_fixed(run_dir: RunDirectory) -> None:
    paths = (run_dir.run_yaml, run_dir.plan_json, run_dir.metrics, run_dir.events, run_dir.logs, run_dir.checkpoints,
             run_dir.wandb, run_dir.model, run_dir.done_json, run_dir.stop_file)  # fmt: skip
    assert [str(path.relative_to(run_dir.path)) for path in paths] == [
        "run.yaml", "plan.json", "metrics.jsonl", "events.jsonl", "logs", "checkpoints", "wandb", "model.safetensors",
        "done.json", "stop",
    ]  # fmt: skip
    assert run_dir.get_log_path(1, 3) == run_dir.logs / "rank1-g3.log"


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_files_are_readable_for_whom_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run_dir = RunDirectory(tmp_path / "runs" / "one")
        run_dir.create()
        run_dir.increment_generation()
        run_dir.write_done({"samples": 1})
        run_dir.ensure_wandb_id()
        run_dir.lock().release()
    finally:
        os.umask(before)
    made = [tmp_path / "runs", run_dir.path, *run_dir.path.rglob("*")]
    assert {path.name for path in made} >= {"runs", "one", "logs", "checkpoints", "generation", "done.json", ".lock"}
    assert {file_mode(path) for path in made if path.is_dir()} == {0o777 & ~umask}
    assert {file_mode(path) for path in made if path.is_file()} == {0o666 & ~umask}


def test_existing_folder_is_kept(run_dir: RunDirectory) -> None:
    run_dir.path.chmod(0o750)
    run_dir.run_yaml.write_text("seed: 1")
    run_dir.create()
    assert run_dir.run_yaml.read_text() == "seed: 1"
    assert file_mode(run_dir.path) == 0o750


def test_uncreatable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=re.escape(f"run.dir={path} cannot be created (Not a directory): type")):
            RunDirectory(path).create()


def test_symlinked_subfolder_is_refused(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path / "one")
    run_dir.path.mkdir()
    (tmp_path / "elsewhere").mkdir()
    run_dir.checkpoints.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="checkpoints is a link or not a folder"):
        run_dir.create()


# --- generations, stop, done --------------------------------------------------------------------------------------


def test_generation_increments(run_dir: RunDirectory) -> None:
    assert run_dir.read_generation() == 0
    assert [run_dir.increment_generation() for _ in range(3)] == [1, 2, 3]
    assert RunDirectory(run_dir.path).read_generation() == 3


def test_unreadable_generation_is_refused(run_dir: RunDirectory) -> None:
    (run_dir.path / "generation").write_text("")
    with pytest.raises(UsageError, match=r"generation has no number: write the last generation of metrics\.jsonl"):
        run_dir.increment_generation()


def test_touched_stop_file_requests_stop(run_dir: RunDirectory) -> None:
    (run_dir.path / "stop").touch()
    assert run_dir.stop_file.exists()
    assert run_dir.read_stop_reason() == ""
    run_dir.clear_stop()
    run_dir.clear_stop()
    assert not run_dir.stop_file.exists()


def test_stop_file_holds_the_reason(run_dir: RunDirectory) -> None:
    assert run_dir.read_stop_reason() == ""
    run_dir.request_stop("launcher stop")
    assert (run_dir.stop_requested(), run_dir.read_stop_reason()) == (True, "launcher stop")
    run_dir.request_stop("SIGINT")
    assert run_dir.read_stop_reason() == "SIGINT"
    run_dir.clear_stop()
    os.mkfifo(run_dir.stop_file)  # a pipe without a writer
    assert (run_dir.stop_requested(), run_dir.read_stop_reason()) == (True, "")


def test_stop_works_on_full_disk(run_dir: RunDirectory) -> None:
    """As there, files can be created but have no room for a byte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        run_dir.request_stop("SIGTERM")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run_dir.stop_requested()
    assert not list(run_dir.path.glob(".tmp*"))


def test_done_round_trips(run_dir: RunDirectory) -> None:
    assert run_dir.read_done() is None
    done = {"samples": 640, "updates": 10, "seconds": 1.5, "metrics": {"val/accuracy": 0.97}}
    run_dir.write_done(done)
    assert run_dir.read_done() == done == json.loads(run_dir.done_json.read_text())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"samples": "many"}'])
def test_unreadable_done_is_refused(run_dir: RunDirectory, text: str) -> None:
    run_dir.done_json.write_text(text)
    with pytest.raises(UsageError, match=r"done\.json cannot be read: remove it, and the run continues from its check"):
        run_dir.read_done()


def test_wandb_id_is_created_once(run_dir: RunDirectory) -> None:
    assert run_dir.ensure_wandb_id() == RunDirectory(run_dir.path).ensure_wandb_id()
    assert re.fullmatch("[0-9a-f]{8}", run_dir.ensure_wandb_id())


def test_wandb_id_is_the_required_one(run_dir: RunDirectory) -> None:
    """An id from the environment replaces the own one, and stays where later starts require none."""
    run_dir.ensure_wandb_id()
    assert [run_dir.ensure_wandb_id(required) for required in ("a1", None, "b2", "b2")] == ["a1", "a1", "b2", "b2"]


# --- names --------------------------------------------------------------------------------------------------------


def test_run_name_is_recipe_and_time(work_dir: Path) -> None:
    assert unique_run_name("resnet", None, NOON) == "resnet-20240506-123015"
    for expected in ("resnet-20240506-123015", "resnet-20240506-123015-2", "resnet-20240506-123015-3"):
        name = unique_run_name("resnet", None, NOON)
        assert name == expected
        RunDirectory(Path("runs") / name).create()


def test_requeued_job_keeps_its_name(work_dir: Path) -> None:
    RunDirectory(Path("runs/resnet-123_4")).create()
    assert unique_run_name("resnet", "123_4", NOON) == "resnet-123_4"


@pytest.mark.parametrize("name", ["../out", "a/b", "..", "", ".hidden", "a\nb", "-x", "x" * 65, "ü", "a\0b"])
def test_run_name_must_not_be_a_path(work_dir: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"^run\.name=.*: type up to 64 letters"):
        resolve_named_dir(name)
    with pytest.raises(UsageError):
        unique_run_name("resnet", f"/../{name}", NOON)


def test_run_name_must_not_link_outside_runs(work_dir: Path) -> None:
    (work_dir / "elsewhere").mkdir()
    Path("runs").mkdir()
    Path("runs/out").symlink_to(work_dir / "elsewhere")
    with pytest.raises(
        UsageError, match=r"run\.name=out is a link that points outside runs/: type run\.dir=.*elsewhere"
    ):
        resolve_named_dir("out")
    (Path("runs") / "one").mkdir()
    Path("runs/latest").symlink_to("one")
    assert resolve_named_dir("latest") == Path("runs/latest")


def test_runs_folder_may_be_a_symlink(work_dir: Path) -> None:
    (work_dir / "scratch").mkdir()
    Path("runs").symlink_to(work_dir / "scratch")
    (work_dir / "scratch" / "one").mkdir()
    assert resolve_named_dir("one") == Path("runs/one")
