"""Limits of the machine that would leave a job waiting: each is found before the job starts, in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.distributed import machine_limits
from launcher.distributed.machine_limits import check_host_name, check_machine, describe_loader_limit
from launcher.errors import UsageError
from tests.helpers.namespaces import run_in_namespace
from tests.helpers.small_job import LAUNCHER, OWN, RECIPE

CHECK = "from launcher.distributed.machine_limits import *\ntry: {call}\nexcept ValueError as error: print(error)"


def check_with_limit(limits: str, call: str) -> str:
    argv = [sys.executable, "-c", CHECK.format(call=call)]
    return subprocess.run(
        ["bash", "-c", f'ulimit {limits} && exec "$@"', "bash", *argv], capture_output=True, text=True, check=True
    ).stdout


def test_this_machine_is_fit() -> None:
    check_machine(2, 0)


def test_machine_without_loopback_is_refused(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", CHECK.format(call="check_machine(2, 0)")]
    refused = run_in_namespace("-n", "true", argv, Path.cwd())
    assert "connect over 127.0.0.1, which does not work here (Network is unreachable): type ip link" in refused.stdout


def test_job_without_loopback_is_refused_at_once(tmp_path: Path) -> None:
    """Before, torch tried to connect for ten minutes, and SIGTERM did not end it."""
    (tmp_path / "own.py").write_text(RECIPE)
    refused = run_in_namespace("-n", "true", [*LAUNCHER, *OWN, "sink=[]"], tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the workers connect over 127.0.0.1")
    assert refused.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["own.py"]


def test_too_few_open_files_are_refused() -> None:
    refused = check_with_limit("-n 24", "check_machine(2, 4)")
    assert refused.startswith("ulimit -n is 24, and each worker of this job opens up to 104 files: type ulimit -n 104")


def test_soft_limit_on_open_files_is_raised() -> None:
    call = "ensure_open_files(estimate_open_files(2, 4)); import resource; print(resource.getrlimit(7))"
    assert check_with_limit("-Sn 24 && ulimit -Hn 500", call) == "(104, 500)\n"
    assert check_with_limit("-Sn 200 && ulimit -Hn 500", call) == "(200, 500)\n", "it is never lowered"


def test_unresolvable_host_is_refused() -> None:
    check_host_name("127.0.0.1", 29500)
    with pytest.raises(UsageError, match=r"^MASTER_ADDR=no\.such\.invalid, which torchrun has set, cannot be resolved"):
        check_host_name("no.such.invalid", 29500)


@pytest.mark.parametrize(
    "message",
    [
        "unable to allocate shared memory(shm) for file </torch_22882_1989862579_7>: No space left on device (28)",
        "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are out "
        "of shared memory. Please try to raise your shared memory limit.",
        "unable to write to file </torch_12_1>",
    ],
)
def test_full_shared_memory_is_explained(message: str) -> None:
    described = describe_loader_limit(message)
    assert described is not None
    assert "/dev/shm, which is too small (" in described
    assert "in all, " in described
    assert "type data.num_workers=0, or make it larger (docker run --shm-size=8g)" in described


def test_missing_shared_memory_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine_limits, "SHM_DIR", tmp_path / "none")
    described = describe_loader_limit("unable to open shared memory object </torch_1_2> in read-write mode")
    assert described is not None
    assert "(No such file or directory)" in described


@pytest.mark.parametrize("message", ["received 0 items of ancdata", "[Errno 24] Too many open files"])
def test_open_files_of_a_loader_are_explained(message: str) -> None:
    described = describe_loader_limit(message)
    assert described is not None
    assert "too many open files (ulimit -n is " in described


def test_other_errors_of_a_loader_are_not_limits() -> None:
    assert describe_loader_limit("[Errno 28] No space left on device: '/data/cache'") is None
    assert describe_loader_limit("DataLoader worker (pid 12) is killed by signal: Killed. ") is None
