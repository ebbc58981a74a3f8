"""Checks of this machine: each when it passes and, as realistically as is cheap, when it fails."""

from __future__ import annotations

import os
import resource
import signal
import socket
from pathlib import Path

import pytest

from launcher.cli import doctor, machine_checks
from launcher.cli.machine_checks import CheckResult, TorchInfo
from tests.helpers.check_results import assert_failed, assert_passed

TWO = TorchInfo("2.13.0+cu128", "12.8", 2, ["gloo", "nccl"])


NONE = TorchInfo("2.13.0+cpu", None, 0, ["gloo"])


# --- the machine --------------------------------------------------------------------------------------------------


def test_local_address_passes() -> None:
    assert machine_checks.check_address("loopback", "127.0.0.1") == CheckResult("loopback", True, "127.0.0.1")
    assert_passed(machine_checks.check_address("localhost", "localhost"), "localhost resolves to ")


def test_unresolvable_or_foreign_host_name_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = machine_checks.check_address(
        "host name", "192.0.2.1"
    )  # reserved for documentation: no machine has this address
    assert_failed(elsewhere, "is not an address of this machine", fix="echo '127.0.0.1 192.0.2.1' >> /etc/hosts")

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert_failed(machine_checks.check_address("host name", "n" * 64), "does not resolve", fix="127.0.0.1 nnn")
    nowhere = machine_checks.check_address("host name", "node7")
    assert_failed(nowhere, "node7 does not resolve (Name or service not known)", fix="'127.0.0.1 node7'")
    assert_failed(machine_checks.check_address("loopback", "127.0.0.1"), fix="ip link set lo up")


def test_host_name_with_one_local_address_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(*_: object, **__: object) -> list[tuple[object, ...]]:
        stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*stream, ("192.0.2.1", 0)), (*stream, ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert_passed(machine_checks.check_address("host name", "node7"), "node7 resolves to 127.0.0.1")


def test_small_shared_memory_passes_with_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a failure: data.num_workers is 0 by default."""
    enough = machine_checks.check_shared_memory(tmp_path)
    assert_passed(enough, str(tmp_path))
    assert "data.num_workers" not in enough.detail
    assert_passed(machine_checks.check_shared_memory(tmp_path / "none"), "0 B free", "--shm-size")
    monkeypatch.setattr(machine_checks, "MIN_SHM_BYTES", 1e18)
    assert_passed(
        machine_checks.check_shared_memory(tmp_path),
        str(tmp_path),
        "too little for data.num_workers=1 or more: docker run --shm-size=2g",
    )


@pytest.mark.parametrize(
    ("soft", "hard", "fix"), [(256, 65536, "ulimit -n 4096"), (256, -1, "ulimit -n 4096"), (256, 2048, "-n 2048")]
)
def test_low_open_files_limit_fails_with_ulimit_fix(soft: int, hard: int, fix: str) -> None:
    assert_failed(machine_checks.check_open_files(soft, hard), "up to 256", fix=fix)


def test_low_hard_open_files_limit_names_limits_conf() -> None:
    assert_failed(machine_checks.check_open_files(256, 256), fix="limits.conf")
    assert_passed(machine_checks.check_open_files(1024, 1024), "1,024")
    assert_passed(machine_checks.check_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY), "no limit")


@pytest.mark.parametrize(
    ("text", "given"), [("200000 100000\n", 2.0), ("50000 100000", 0.5), ("max 100000\n", None), ("", None)]
)
def test_cgroup_cpu_limit_is_parsed(tmp_path: Path, text: str, given: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert machine_checks.read_cgroup_cpu_limit(tmp_path / "cpu.max") == given
    assert machine_checks.read_cgroup_cpu_limit(tmp_path / "none") is None


def test_more_threads_than_cores_fails() -> None:
    assert machine_checks.check_cores(1, None, {}) == CheckResult("cores", True, "1 core")
    assert_passed(machine_checks.check_cores(4, None, {"OMP_NUM_THREADS": "4"}), "4 cores, OMP_NUM_THREADS=4")
    assert_failed(
        machine_checks.check_cores(4, None, {"OMP_NUM_THREADS": "8,2"}),
        "OMP_NUM_THREADS=8",
        fix="export OMP_NUM_THREADS=4",
    )
    assert_failed(
        machine_checks.check_cores(64, 2.0, {"OMP_NUM_THREADS": "8"}),
        "limited by the container to 2",
        fix="export OMP_NUM_THREADS=2",
    )
    assert_passed(
        machine_checks.check_cores(64, 2.5, {}), "64 cores, limited by the container to 2.5", "launch.threads=2"
    )
    assert_passed(machine_checks.check_cores(2, 0.5, {"OMP_NUM_THREADS": "1"}), "limited by the container to 0.5")


def test_run_folder_check_leaves_folder_unchanged(tmp_path: Path) -> None:
    assert_passed(machine_checks.check_run_folder(tmp_path), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_unwritable_or_full_run_folder_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_failed(machine_checks.check_run_folder(Path("/proc")), "/proc cannot be written", fix="cd to ")
    monkeypatch.setattr(machine_checks, "MIN_DISK_BYTES", 1e18)
    assert_failed(machine_checks.check_run_folder(tmp_path), "free in", fix="run.dir=")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_folder_without_permission_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert_failed(machine_checks.check_run_folder(tmp_path), "Permission denied", fix="cd to ")


SECRET = "0123456789abcdef" * 3


@pytest.mark.parametrize(
    ("env", "detail"),
    [
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": SECRET}, "WANDB_MODE=disabled"),
        ({"WANDB_API_KEY": SECRET}, "online, with a key"),
        ({"NETRC": "netrc"}, "online, with a key"),
        ({"NETRC": "netrc", "WANDB_BASE_URL": "https://wandb.example.org"}, "offline, no key: wandb login"),
        ({"NETRC": "broken"}, "offline, no key: wandb login"),
        ({"NETRC": "none"}, "offline, no key: wandb login"),
    ],
)
def test_wandb_check_reports_mode_without_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], detail: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    Path("broken").write_text("machine\n\0 what")
    assert machine_checks.check_wandb(env) == CheckResult("wandb", True, detail)


def test_slurm_check_reports_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_passed(machine_checks.check_slurm(), "sbatch is not installed")
    (tmp_path / "sbatch").touch(mode=0o700)
    assert machine_checks.check_slurm() == CheckResult("slurm", True, "sbatch")


# --- torch and GPUs -----------------------------------------------------------------------------------------------


@pytest.mark.process
def test_torch_is_inspected_in_a_subprocess(tmp_path: Path) -> None:
    seen = machine_checks.inspect_torch_in_subprocess(tmp_path, "torch>=2.8")
    assert isinstance(seen, TorchInfo)
    assert doctor.is_version_within(seen.version, ">=2.8")
    assert "gloo" in seen.backends


@pytest.mark.parametrize("name", ["torch.py", "torch/__init__.py"])
def test_file_that_shadows_torch_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    assert_failed(
        machine_checks.inspect_torch_in_subprocess(tmp_path, "torch>=2.8"),
        "ImportError: libcudart.so.12",
        fix=f"rename {name}",
    )  # type: ignore[arg-type]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [name]


def test_crash_on_torch_import_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned = "import os, sys; sys.stderr.write('a warning\\n'); sys.stderr.flush(); "
    (tmp_path / "torch.py").write_text(f"{warned}os.kill(os.getpid(), {signal.SIGILL.value})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "here").mkdir()
    found = machine_checks.inspect_torch_in_subprocess(tmp_path / "here", "torch>=2.8")
    assert_failed(found, "importing it was killed by SIGILL", fix="--force-reinstall 'torch>=2.8'")  # type: ignore[arg-type]


def test_gpus_unusable_by_torch_fail() -> None:
    assert_passed(machine_checks.check_gpus(NONE, 0), "none: training runs on the CPU")
    assert_passed(machine_checks.check_gpus(TWO, 2), "2 GPUs")
    assert_passed(machine_checks.check_gpus(TWO, 0), "2 GPUs")  # the driver lists no GPU where we look
    assert_failed(machine_checks.check_gpus(NONE, 1), "1 GPU found", "CPU-only build", fix="CUDA_VISIBLE_DEVICES= ")
    old = TorchInfo("2.13.0", "12.8", 0, ["gloo", "nccl"], "The NVIDIA driver on your system is too old")
    assert_failed(machine_checks.check_gpus(old, 2), "computes on 0", "built for 12.8", "too old", fix="nvidia-smi")
    assert_failed(machine_checks.check_gpus(TWO, 8), "8 GPUs found, torch computes on 2", fix="launch.workers=2")


def test_gloo_is_required_and_nccl_with_gpus() -> None:
    assert_passed(machine_checks.check_backends(NONE), "gloo")
    assert_passed(machine_checks.check_backends(TWO), "gloo, nccl")
    assert_failed(machine_checks.check_backends(TorchInfo("2.13.0", None, 0, ["nccl"])), "nccl", fix="gloo")
    assert_failed(machine_checks.check_backends(TorchInfo("2.13.0", "12.8", 2, ["gloo"])), "gloo", fix="gloo and nccl")
    assert_failed(machine_checks.check_backends(TorchInfo("2.13.0", None, 0, [])), "none", fix="gloo")
