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

from launcher import runfolder
from launcher.durable import private_folder, write_whole
from launcher.errors import RequestError
from launcher.process import started_at
from launcher.runfolder import Recalled, RunFolder, free_name, named_folder, recall, remember

NOON = datetime(2024, 5, 6, 12, 30, 15)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "runs" / "one")
    made.create()
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- files --------------------------------------------------------------------------------------------------------


def test_its_files_have_the_names_that_people_rely_on(folder: RunFolder) -> None:
    paths = (folder.run_yaml, folder.plan_json, folder.metrics, folder.events, folder.logs, folder.checkpoints,
             folder.wandb, folder.model, folder.done_json, folder.stop_file)  # fmt: skip
    assert [str(path.relative_to(folder.path)) for path in paths] == [
        "run.yaml", "plan.json", "metrics.jsonl", "events.jsonl", "logs", "checkpoints", "wandb", "model.safetensors",
        "done.json", "stop",
    ]  # fmt: skip
    assert folder.log(1, 3) == folder.logs / "rank1-g3.log"


def test_everything_in_it_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = RunFolder(tmp_path / "runs" / "one")
        folder.create()
        folder.next_generation()
        folder.write_done({"samples": 1})
        folder.wandb_id()
        folder.lock().release()
    finally:
        os.umask(before)
    made = [tmp_path / "runs", folder.path, *folder.path.rglob("*")]
    assert {path.name for path in made} >= {"runs", "one", "logs", "checkpoints", "generation", "done.json", ".lock"}
    assert {mode(path) for path in made if path.is_dir()} == {0o700}
    assert {mode(path) for path in made if path.is_file()} == {0o600}


def test_a_folder_that_is_there_stays_as_it_is(folder: RunFolder) -> None:
    folder.path.chmod(0o750)
    folder.run_yaml.write_text("seed: 1")
    folder.create()
    assert folder.run_yaml.read_text() == "seed: 1"
    assert mode(folder.path) == 0o750


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RequestError, match=re.escape(f"run.dir={path} cannot be created (Not a directory): type")):
            RunFolder(path).create()


def test_its_parts_are_no_links_out_of_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "one")
    folder.path.mkdir()
    (tmp_path / "elsewhere").mkdir()
    folder.checkpoints.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="checkpoints is a link or not a folder"):
        folder.create()


# --- generations, stop, done --------------------------------------------------------------------------------------


def test_each_start_of_the_workers_is_a_generation(folder: RunFolder) -> None:
    assert folder.generation() == 0
    assert [folder.next_generation() for _ in range(3)] == [1, 2, 3]
    assert RunFolder(folder.path).generation() == 3


def test_a_generation_that_cannot_be_known_is_never_1_again(folder: RunFolder) -> None:
    (folder.path / "generation").write_text("")
    with pytest.raises(RequestError, match=r"generation has no number: write the last generation of metrics\.jsonl"):
        folder.next_generation()


def test_a_stop_is_a_file_that_anybody_may_touch(folder: RunFolder) -> None:
    (folder.path / "stop").touch()
    assert folder.stop_file.exists()
    assert folder.stop_reason() == ""
    folder.clear_stop()
    folder.clear_stop()
    assert not folder.stop_file.exists()


def test_a_stop_may_say_what_it_was_asked_for_by(folder: RunFolder) -> None:
    assert folder.stop_reason() == ""
    folder.ask_to_stop("launcher stop")
    assert (folder.asks_to_stop(), folder.stop_reason()) == (True, "launcher stop")
    folder.ask_to_stop("SIGINT")
    assert folder.stop_reason() == "SIGINT"
    folder.clear_stop()
    os.mkfifo(folder.stop_file)  # a pipe without a writer
    assert (folder.asks_to_stop(), folder.stop_reason()) == (True, "")


def test_a_full_disk_hinders_no_stop(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launcher.runfolder.write_whole", full)
    folder.ask_to_stop("SIGTERM")
    assert folder.asks_to_stop()


def test_done_is_written_whole(folder: RunFolder) -> None:
    assert folder.read_done() is None
    done = {"samples": 640, "updates": 10, "seconds": 1.5, "metrics": {"val/accuracy": 0.97}}
    folder.write_done(done)
    assert folder.read_done() == done == json.loads(folder.done_json.read_text())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"samples": "many"}'])
def test_done_that_cannot_be_read_is_not_taken_for_either(folder: RunFolder, text: str) -> None:
    folder.done_json.write_text(text)
    with pytest.raises(
        RequestError, match=r"done\.json cannot be read: remove it, and the run continues from its check"
    ):
        folder.read_done()


def test_wandbs_id_is_made_once(folder: RunFolder) -> None:
    assert folder.wandb_id() == RunFolder(folder.path).wandb_id()
    assert re.fullmatch("[0-9a-f]{8}", folder.wandb_id())


# --- atomic writes ------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, "new and longer")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_what_a_dead_writer_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".tmp-file-{os.getpid()}").write_text("half")
    write_whole(tmp_path / "file", "whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_device_is_an_error_where_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(os, "open", lambda *_: full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "x")


def test_many_may_make_the_same_folder(tmp_path: Path) -> None:
    private_folder(tmp_path / "a" / "b")
    private_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


# --- the lock -----------------------------------------------------------------------------------------------------

HOLDER = r"""
import os, signal, sys
from pathlib import Path
from launcher.runfolder import RunFolder
lock = RunFolder(Path(sys.argv[1])).lock()
if sys.argv[2] == "forks" and os.fork() == 0:
    os.write(1, f"forked {os.getpid()}\n".encode())  # in one piece: both write to one pipe
    signal.pause()
os.write(1, f"holds {os.getpid()}\n".encode())
signal.pause()
"""


def holder(folder: RunFolder, kind: str = "alone") -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(folder.path), kind], stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def test_a_second_job_is_refused_naming_the_first(folder: RunFolder) -> None:
    first = holder(folder)
    try:
        assert line(first) == f"holds {first.pid}\n"
        with pytest.raises(RequestError) as error:
            folder.lock()
    finally:
        end(first)
    owner = rf"process {first.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\dT[\d:]+\+?[\d:-]*"
    assert re.fullmatch(rf"{re.escape(str(folder.path))} is in use by {owner}: wait .*run\.name=", str(error.value))
    folder.lock().release()  # a killed process leaves no lock


def test_a_lock_in_this_process_counts_as_well(folder: RunFolder) -> None:
    lock = folder.lock()
    with pytest.raises(RequestError, match=f"in use by process {os.getpid()}"):
        folder.lock()
    lock.release()
    folder.lock().release()


def test_a_forked_child_does_not_keep_its_dead_parents_lock(folder: RunFolder) -> None:
    """A loader process outlives its rank by seconds; the restarted rank must not wait for it."""
    first = holder(folder, "forks")
    lines = dict(line(first).split() for _ in range(2))
    child = int(lines["forked"])
    try:
        first.kill()
        first.wait()
        assert started_at(child) is not None
        folder.lock().release()
    finally:
        os.kill(child, signal.SIGKILL)
        end(first)


def test_a_file_system_without_locks_is_named(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(runfolder.fcntl, "flock", unsupported)
    with pytest.raises(RequestError, match=r"cannot be locked \(Function not implemented\): type run\.dir="):
        folder.lock()


# --- names --------------------------------------------------------------------------------------------------------


def test_a_run_is_named_by_its_recipe_and_the_time(here: Path) -> None:
    assert free_name("resnet", None, NOON) == "resnet-20240506-123015"
    for expected in ("resnet-20240506-123015", "resnet-20240506-123015-2", "resnet-20240506-123015-3"):
        name = free_name("resnet", None, NOON)
        assert name == expected
        RunFolder(Path("runs") / name).create()


def test_a_requeued_job_finds_its_folder(here: Path) -> None:
    RunFolder(Path("runs/resnet-123_4")).create()
    assert free_name("resnet", "123_4", NOON) == "resnet-123_4"


@pytest.mark.parametrize("name", ["../out", "a/b", "..", "", ".hidden", "a\nb", "-x", "x" * 65, "ü", "a\0b"])
def test_a_name_is_no_path(here: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"^run\.name=.*: type up to 64 letters"):
        named_folder(name)
    with pytest.raises(RequestError):
        free_name("resnet", f"/../{name}", NOON)


def test_a_name_does_not_lead_out_of_runs_by_a_link(here: Path) -> None:
    (here / "elsewhere").mkdir()
    Path("runs").mkdir()
    Path("runs/out").symlink_to(here / "elsewhere")
    with pytest.raises(
        RequestError, match=r"run\.name=out is a link that points outside runs/: type run\.dir=.*elsewhere"
    ):
        named_folder("out")
    (Path("runs") / "one").mkdir()
    Path("runs/latest").symlink_to("one")
    assert named_folder("latest") == Path("runs/latest")


def test_runs_itself_may_lie_elsewhere(here: Path) -> None:
    (here / "scratch").mkdir()
    Path("runs").symlink_to(here / "scratch")
    (here / "scratch" / "one").mkdir()
    assert named_folder("one") == Path("runs/one")


# --- memory across worker restarts, where the user ran torchrun ---------------------------------------------------


def test_the_name_is_kept_for_the_restarts_of_the_same_agent(here: Path) -> None:
    assert recall() is None
    remember(Recalled(Path("runs/resnet-1"), "update-7 12"))
    assert recall() == Recalled(Path("runs/resnet-1"), "update-7 12")
    (kept,) = Path("runs/.agents").iterdir()
    assert kept.name == f"{socket.gethostname()}@{os.getppid()}-{started_at(os.getppid())}"
    assert (mode(kept), mode(kept.parent), mode(Path("runs"))) == (0o600, 0o700, 0o700)


def test_another_agent_with_the_same_pid_is_another_job(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(Recalled(Path("runs/resnet-1"), "update-7 12"))
    monkeypatch.setattr(runfolder, "started_at", lambda pid: 12345)
    assert recall() is None


def test_what_dead_agents_left_is_removed_and_nothing_else(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    agents = Path("runs/.agents")
    agents.mkdir(parents=True)
    others = {f"node-1@{dead.pid}-77", "node-1-2@5-6", "notes", "node@mine"}
    for name in (*others, f"node@{dead.pid}-77"):
        (agents / name).write_text("runs/x")
    remember(Recalled(Path("runs/resnet-1"), "update-7 12"))
    mine = f"node@{os.getppid()}-{started_at(os.getppid())}"
    assert {path.name for path in agents.iterdir()} == {*others, mine}
