"""The folder of an agent's slots: where it is, what it records, and when it is removed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.launch.slot_folder import SlotFolder
from launcher.system.processes import identify_process

OWN = str(identify_process(os.getpid()))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[SlotFolder]:
    folder = SlotFolder(str(tmp_path / "slots"))
    with folder.lock(create=True):
        yield folder


@pytest.fixture
def other() -> Iterator[str]:
    """Another process that runs."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield str(identify_process(process.pid))
        process.kill()


def test_folder_is_where_a_socket_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert SlotFolder.of_agent("12-345").path == "/scratch/launcher-slots-12-345"
    monkeypatch.setenv("TMPDIR", "/scratch/" + "x" * 80)
    assert SlotFolder.of_agent("12-345").path == "/tmp/launcher-slots-12-345"
    monkeypatch.delenv("TMPDIR")
    longest = SlotFolder.of_agent(f"{2**22}-{2**63}")
    assert len(os.fsencode(longest.locate_socket(999))) <= 107


def test_missing_folder_is_made_only_for_a_slot(tmp_path: Path) -> None:
    folder = SlotFolder(str(tmp_path / "slots"))
    with pytest.raises(FileNotFoundError), folder.lock():
        pass
    with folder.lock(create=True):
        assert Path(folder.path).stat().st_mode & 0o777 == 0o700


def test_status_is_that_of_the_recorded_trainer(folder: SlotFolder) -> None:
    assert folder.read_trainer(0) is None
    folder.record(0, OWN)
    assert (folder.read_trainer(0), folder.read_status(0, OWN)) == (OWN, None)
    folder.record_status(0, 0)
    assert folder.read_status(0, OWN) == 0
    assert folder.read_status(0, "1-1") is None


def test_slot_is_in_place_that_runs_or_has_succeeded(folder: SlotFolder, other: str) -> None:
    folder.record_slot(0, OWN)
    assert folder.count_in_place(range(4)) == 1
    folder.record(0, other)
    folder.record_status(0, 0)  # its slot has not seen it end
    assert folder.count_in_place(range(4)) == 1
    folder.record_slot(0, "1-1")
    assert folder.count_in_place(range(4)) == 1
    folder.record_slot(1, "1-1")
    folder.record(1, other)
    folder.record_status(1, 75)
    assert folder.count_in_place(range(4)) == 1
    assert folder.count_in_place(range(1, 4)) == 0


def test_decision_is_that_of_this_start(folder: SlotFolder) -> None:
    assert folder.read_decision() is None
    for is_restart in (True, False):
        folder.record_decision(is_restart)
        assert folder.read_decision() is is_restart
        folder.record_slot(0, OWN)
        assert folder.read_decision() is None


def test_process_that_was_forked_under_the_lock_does_not_keep_it(tmp_path: Path) -> None:
    folder = SlotFolder(str(tmp_path / "forked"))
    with folder.lock(create=True):
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        descriptor = os.open(folder.path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_folder_stays_while_a_trainer_runs(folder: SlotFolder) -> None:
    folder.record(0, "1-1")  # it has ended
    folder.record(1, OWN)
    folder.record_status(1, 0)  # its slot has not seen it end
    folder.remove_if_unused()
    assert folder.list_trainers() == {1: OWN}


def test_last_trainer_to_end_removes_the_folder(folder: SlotFolder, other: str) -> None:
    """One that has recorded its status is about to end as well."""
    folder.record(0, OWN)
    folder.record(1, other)
    folder.record_status(0, 1)
    folder.remove_if_unused(ending=0)
    assert Path(folder.path).exists()
    folder.record_status(1, 1)
    folder.remove_if_unused(ending=1)
    assert not Path(folder.path).exists()


def test_files_of_a_long_run_do_not_grow_old(folder: SlotFolder) -> None:
    """What is old in /tmp is removed on many machines."""
    folder.record(0, OWN)
    os.utime(folder.locate_record(0), (0, 0))
    folder.touch(0)
    assert os.stat(folder.locate_record(0)).st_mtime > 0
