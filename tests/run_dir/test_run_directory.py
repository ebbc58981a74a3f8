"""The run directory: private, locked by one job at a time, with a name that is decided once."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.launch import agent_memory
from launcher.launch.agent_memory import AgentMemory, load_agent_memory, save_agent_memory
from launcher.run_dir import lock
from launcher.run_dir.run_directory import RunDirectory, resolve_named_dir, unique_run_name
from launcher.system.atomic_files import atomic_write_text, make_private_dir
from launcher.system.processes import read_start_time

NOON = datetime(2024, 5, 6, 12, 30, 15)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "runs" / "one")
    made.create()
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- files --------------------------------------------------------------------------------------------------------


def test_its_files_have_the_names_that_people_rely_on(run_dir: RunDirectory) -> None:
    paths = (run_dir.run_yaml, run_dir.plan_json, run_dir.metrics, run_dir.events, run_dir.logs, run_dir.checkpoints,
             run_dir.wandb, run_dir.model, run_dir.done_json, run_dir.stop_file)  # fmt: skip
    assert [str(path.relative_to(run_dir.path)) for path in paths] == [
        "run.yaml", "plan.json", "metrics.jsonl", "events.jsonl", "logs", "checkpoints", "wandb", "model.safetensors",
        "done.json", "stop",
    ]  # fmt: skip
    assert run_dir.get_log_path(1, 3) == run_dir.logs / "rank1-g3.log"


def test_everything_in_it_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
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
    assert {mode(path) for path in made if path.is_dir()} == {0o700}
    assert {mode(path) for path in made if path.is_file()} == {0o600}


def test_a_folder_that_is_there_stays_as_it_is(run_dir: RunDirectory) -> None:
    run_dir.path.chmod(0o750)
    run_dir.run_yaml.write_text("seed: 1")
    run_dir.create()
    assert run_dir.run_yaml.read_text() == "seed: 1"
    assert mode(run_dir.path) == 0o750


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=re.escape(f"run.dir={path} cannot be created (Not a directory): type")):
            RunDirectory(path).create()


def test_its_parts_are_no_links_out_of_it(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path / "one")
    run_dir.path.mkdir()
    (tmp_path / "elsewhere").mkdir()
    run_dir.checkpoints.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="checkpoints is a link or not a folder"):
        run_dir.create()


# --- generations, stop, done --------------------------------------------------------------------------------------


def test_each_start_of_the_workers_is_a_generation(run_dir: RunDirectory) -> None:
    assert run_dir.read_generation() == 0
    assert [run_dir.increment_generation() for _ in range(3)] == [1, 2, 3]
    assert RunDirectory(run_dir.path).read_generation() == 3


def test_a_generation_that_cannot_be_known_is_never_1_again(run_dir: RunDirectory) -> None:
    (run_dir.path / "generation").write_text("")
    with pytest.raises(UsageError, match=r"generation has no number: write the last generation of metrics\.jsonl"):
        run_dir.increment_generation()


def test_a_stop_is_a_file_that_anybody_may_touch(run_dir: RunDirectory) -> None:
    (run_dir.path / "stop").touch()
    assert run_dir.stop_file.exists()
    assert run_dir.read_stop_reason() == ""
    run_dir.clear_stop()
    run_dir.clear_stop()
    assert not run_dir.stop_file.exists()


def test_a_stop_may_say_what_it_was_asked_for_by(run_dir: RunDirectory) -> None:
    assert run_dir.read_stop_reason() == ""
    run_dir.request_stop("launcher stop")
    assert (run_dir.stop_requested(), run_dir.read_stop_reason()) == (True, "launcher stop")
    run_dir.request_stop("SIGINT")
    assert run_dir.read_stop_reason() == "SIGINT"
    run_dir.clear_stop()
    os.mkfifo(run_dir.stop_file)  # a pipe without a writer
    assert (run_dir.stop_requested(), run_dir.read_stop_reason()) == (True, "")


def test_a_full_disk_hinders_no_stop(run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launcher.run_dir.run_directory.atomic_write_text", full)
    run_dir.request_stop("SIGTERM")
    assert run_dir.stop_requested()


def test_done_is_written_whole(run_dir: RunDirectory) -> None:
    assert run_dir.read_done() is None
    done = {"samples": 640, "updates": 10, "seconds": 1.5, "metrics": {"val/accuracy": 0.97}}
    run_dir.write_done(done)
    assert run_dir.read_done() == done == json.loads(run_dir.done_json.read_text())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"samples": "many"}'])
def test_done_that_cannot_be_read_is_not_taken_for_either(run_dir: RunDirectory, text: str) -> None:
    run_dir.done_json.write_text(text)
    with pytest.raises(UsageError, match=r"done\.json cannot be read: remove it, and the run continues from its check"):
        run_dir.read_done()


def test_wandbs_id_is_made_once(run_dir: RunDirectory) -> None:
    assert run_dir.ensure_wandb_id() == RunDirectory(run_dir.path).ensure_wandb_id()
    assert re.fullmatch("[0-9a-f]{8}", run_dir.ensure_wandb_id())


# --- atomic writes ------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            atomic_write_text(path, "new and longer")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    atomic_write_text(path, "new")
    assert path.read_text() == "new"


def test_what_a_dead_writer_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".tmp-file-{os.getpid()}").write_text("half")
    atomic_write_text(tmp_path / "file", "whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_device_is_an_error_where_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(os, "open", lambda *_: full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text(tmp_path / "file", "x")


def test_many_may_make_the_same_folder(tmp_path: Path) -> None:
    make_private_dir(tmp_path / "a" / "b")
    make_private_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


# --- the lock -----------------------------------------------------------------------------------------------------

HOLDER = r"""
import os, signal, sys
from pathlib import Path
from launcher.run_dir.run_directory import RunDirectory
lock = RunDirectory(Path(sys.argv[1])).lock()
if sys.argv[2] == "forks" and os.fork() == 0:
    os.write(1, f"forked {os.getpid()}\n".encode())  # in one piece: both write to one pipe
    signal.pause()
os.write(1, f"holds {os.getpid()}\n".encode())
signal.pause()
"""


def holder(run_dir: RunDirectory, kind: str = "alone") -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir.path), kind], stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def test_a_second_job_is_refused_naming_the_first(run_dir: RunDirectory) -> None:
    first = holder(run_dir)
    try:
        assert line(first) == f"holds {first.pid}\n"
        with pytest.raises(UsageError) as error:
            run_dir.lock()
    finally:
        end(first)
    owner = rf"process {first.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\dT[\d:]+\+?[\d:-]*"
    assert re.fullmatch(rf"{re.escape(str(run_dir.path))} is in use by {owner}: wait .*run\.name=", str(error.value))
    run_dir.lock().release()  # a killed process leaves no lock


def test_a_lock_in_this_process_counts_as_well(run_dir: RunDirectory) -> None:
    lock = run_dir.lock()
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        run_dir.lock()
    lock.release()
    run_dir.lock().release()


def test_a_forked_child_does_not_keep_its_dead_parents_lock(run_dir: RunDirectory) -> None:
    """A loader process outlives its rank by seconds; the restarted rank must not wait for it."""
    first = holder(run_dir, "forks")
    lines = dict(line(first).split() for _ in range(2))
    child = int(lines["forked"])
    try:
        first.kill()
        first.wait()
        assert read_start_time(child) is not None
        run_dir.lock().release()
    finally:
        os.kill(child, signal.SIGKILL)
        end(first)


def test_a_file_system_without_locks_is_named(run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with pytest.raises(UsageError, match=r"cannot be locked \(Function not implemented\): type run\.dir="):
        run_dir.lock()


# --- names --------------------------------------------------------------------------------------------------------


def test_a_run_is_named_by_its_recipe_and_the_time(here: Path) -> None:
    assert unique_run_name("resnet", None, NOON) == "resnet-20240506-123015"
    for expected in ("resnet-20240506-123015", "resnet-20240506-123015-2", "resnet-20240506-123015-3"):
        name = unique_run_name("resnet", None, NOON)
        assert name == expected
        RunDirectory(Path("runs") / name).create()


def test_a_requeued_job_finds_its_folder(here: Path) -> None:
    RunDirectory(Path("runs/resnet-123_4")).create()
    assert unique_run_name("resnet", "123_4", NOON) == "resnet-123_4"


@pytest.mark.parametrize("name", ["../out", "a/b", "..", "", ".hidden", "a\nb", "-x", "x" * 65, "ü", "a\0b"])
def test_a_name_is_no_path(here: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"^run\.name=.*: type up to 64 letters"):
        resolve_named_dir(name)
    with pytest.raises(UsageError):
        unique_run_name("resnet", f"/../{name}", NOON)


def test_a_name_does_not_lead_out_of_runs_by_a_link(here: Path) -> None:
    (here / "elsewhere").mkdir()
    Path("runs").mkdir()
    Path("runs/out").symlink_to(here / "elsewhere")
    with pytest.raises(
        UsageError, match=r"run\.name=out is a link that points outside runs/: type run\.dir=.*elsewhere"
    ):
        resolve_named_dir("out")
    (Path("runs") / "one").mkdir()
    Path("runs/latest").symlink_to("one")
    assert resolve_named_dir("latest") == Path("runs/latest")


def test_runs_itself_may_lie_elsewhere(here: Path) -> None:
    (here / "scratch").mkdir()
    Path("runs").symlink_to(here / "scratch")
    (here / "scratch" / "one").mkdir()
    assert resolve_named_dir("one") == Path("runs/one")


# --- memory across worker restarts, where the user ran torchrun ---------------------------------------------------


def test_the_name_is_kept_for_the_restarts_of_the_same_agent(here: Path) -> None:
    assert load_agent_memory() is None
    save_agent_memory(AgentMemory(Path("runs/resnet-1"), "update-7 12"))
    assert load_agent_memory() == AgentMemory(Path("runs/resnet-1"), "update-7 12")
    (kept,) = Path("runs/.agents").iterdir()
    assert kept.name == f"{socket.gethostname()}@{os.getppid()}-{read_start_time(os.getppid())}"
    assert (mode(kept), mode(kept.parent), mode(Path("runs"))) == (0o600, 0o700, 0o700)


def test_another_agent_with_the_same_pid_is_another_job(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_agent_memory(AgentMemory(Path("runs/resnet-1"), "update-7 12"))
    monkeypatch.setattr(agent_memory, "read_start_time", lambda pid: 12345)
    assert load_agent_memory() is None


def test_what_dead_agents_left_is_removed_and_nothing_else(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    agents = Path("runs/.agents")
    agents.mkdir(parents=True)
    others = {f"node-1@{dead.pid}-77", "node-1-2@5-6", "notes", "node@mine"}
    for name in (*others, f"node@{dead.pid}-77"):
        (agents / name).write_text("runs/x")
    save_agent_memory(AgentMemory(Path("runs/resnet-1"), "update-7 12"))
    mine = f"node@{os.getppid()}-{read_start_time(os.getppid())}"
    assert {path.name for path in agents.iterdir()} == {*others, mine}
