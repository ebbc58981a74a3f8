"""The cleanup process: what a process started ends after it, however it ends; its temporary files are removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.distributed.cleanup_process import locate_private_dir
from launcher.distributed.leftovers import MARK_ENV
from launcher.system.processes import identify_process
from tests.helpers.jobs import is_alive, wait_for

OWNER = """
import os, subprocess, sys
from launcher.distributed.cleanup_process import CleanupProcess, private_temp_dir

cleanup = CleanupProcess.start()
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
started = [
    subprocess.Popen(["sleep", "600"]),
    subprocess.Popen(["sleep", "600"], start_new_session=True),
    subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE),
]
started[-1].stdout.read(1)
daemon = subprocess.run(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!"], stdout=subprocess.PIPE)
(private_temp_dir() / "file").touch()
forgotten = os.path.join(sys.argv[1], "forgotten")
open(forgotten, "w").close()
from pathlib import Path
cleanup.remove_at_end(Path(forgotten))
print(private_temp_dir(), *[process.pid for process in started], daemon.stdout.decode(), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("length", [1, 40, 200])
def test_sockets_fit_into_the_temporary_folder(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever TMPDIR is: Linux allows 107 bytes for the path of a socket."""
    monkeypatch.setenv("TMPDIR", "/" + "x" * length)
    folder = locate_private_dir("4194303-12345678")
    assert len(os.fsencode(folder / "listener-abcdefgh")) <= 107
    assert (folder.parent == Path("/tmp")) is (length == 200)


@pytest.mark.parametrize("end", ["it is killed", "it exits"])
def test_everything_a_process_started_ends_with_it(owner: subprocess.Popen[str], tmp_path: Path, end: str) -> None:
    """Also what has a session of its own, what is no child any more and what ignores SIGTERM."""
    assert owner.stdout is not None
    folder, *pids = owner.stdout.readline().split()
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        assert len(pids) == 4
        assert all(is_alive(int(pid)) for pid in pids)
        assert Path(folder).is_dir()
        if end == "it is killed":
            owner.kill()
        else:
            owner.communicate("exit\n", timeout=60)
            assert not any(is_alive(int(pid)) for pid in pids), "before it exits"
        wait_for(lambda: not any(is_alive(int(pid)) for pid in pids), within_s=60)
        wait_for(lambda: not Path(folder).exists() and not list(tmp_path.iterdir()), within_s=60)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_job_submitted_to_slurm_is_not_ours(owner: subprocess.Popen[str]) -> None:
    """sbatch passes the whole environment on; the job belongs to another step and is left alone."""
    assert owner.stdout is not None
    _, *pids = owner.stdout.readline().split()
    mark = {MARK_ENV: str(identify_process(owner.pid))}
    other_job = subprocess.Popen(["sleep", "600"], env=os.environ | mark | {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"})
    own = subprocess.Popen(["sleep", "600"], env=os.environ | mark)
    try:
        owner.send_signal(signal.SIGKILL)
        assert own.wait(timeout=60) == -signal.SIGTERM
        wait_for(lambda: not any(is_alive(int(pid)) for pid in pids), within_s=60)
        assert other_job.poll() is None
    finally:
        for process in (own, other_job):
            process.kill()
            process.wait()
