"""Checks of the machine for `launcher doctor`, without side effects. The only network lookup is its own name."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from launcher.errors import EXIT_OK
from launcher.run_dir.failures import describe_exit
from launcher.system.formatting import format_bytes, format_duration, format_plural

__all__ = [
    "CheckResult",
    "TorchInfo",
    "check_address",
    "check_backends",
    "check_cores",
    "check_gpus",
    "check_open_files",
    "check_run_folder",
    "check_shared_memory",
    "check_slurm",
    "check_wandb",
    "inspect_torch_in_subprocess",
    "read_cgroup_cpu_limit",
]

SHM_PATH, CPU_MAX_PATH = Path("/dev/shm"), Path("/sys/fs/cgroup/cpu.max")
MIN_SHM_BYTES = 256e6  # a batch of 256 x 3 x 224 x 224 floats takes 154 MB; the default of containers is 64 MB
MIN_OPEN_FILES = 1024  # each tensor in transit from a loader process is an open file
MIN_DISK_BYTES = 1e9
IMPORT_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class CheckResult:
    """The result of a check; if it failed, `fix` says what to type."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class TorchInfo:
    """What torch reports: the CUDA version it was built for, the number of GPUs that compute, and why others do not."""

    version: str
    cuda: str | None
    gpus: int
    backends: Sequence[str]
    problems: str = ""


def check_address(name: str, host: str) -> CheckResult:
    """Whether ranks can connect there: torchrun and gloo fail if the host name resolves to another machine."""
    problem = ""
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    probe.bind(address)
                return CheckResult(name, True, f"{host} resolves to {address[0]}" if host != address[0] else host)
            except OSError as error:
                problem = f"{host} resolves to {address[0]}, which is not an address of this machine ({error.strerror})"
    except (OSError, UnicodeError) as error:  # UnicodeError: the name is too long to resolve
        problem = f"{host} does not resolve ({getattr(error, 'strerror', None) or error})"
    fix = "ip link set lo up" if name == "loopback" else f"as root: echo '127.0.0.1 {host}' >> /etc/hosts"
    return CheckResult(name, False, problem, fix)


def check_shared_memory(folder: Path) -> CheckResult:
    """Check shared memory: loader processes pass batches through it and die with a bus error when it is full.

    Nothing else needs it, so this check never fails.
    """
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    hint = "" if free >= MIN_SHM_BYTES else ", too little for data.num_workers=1 or more: docker run --shm-size=2g"
    return CheckResult("shm", True, f"{format_bytes(free)} free in {folder}{hint}")


def check_open_files(soft: int, hard: int) -> CheckResult:
    if soft >= MIN_OPEN_FILES or soft == resource.RLIM_INFINITY:
        return CheckResult("open files", True, "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft:,}")
    can_raise = hard >= MIN_OPEN_FILES or hard == resource.RLIM_INFINITY
    fix = f"ulimit -n {4 * MIN_OPEN_FILES if hard < 0 else min(hard, 4 * MIN_OPEN_FILES)}"
    return CheckResult(
        "open files", False, f"up to {soft:,}", fix if can_raise else "raise nofile in limits.conf, as root"
    )


def read_cgroup_cpu_limit(cpu_max: Path) -> float | None:
    """Return the CPU limit of the control group in cores; None if it sets none."""
    try:
        quota, period = cpu_max.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # the file does not exist or contains "max"
        return None


def check_cores(cores: int, limit: float | None, env: Mapping[str, str]) -> CheckResult:
    """Check OMP_NUM_THREADS: with more threads than cores, the threads wait for each other at every step."""
    usable = max(1, min(cores, int(limit or cores)))
    detail = format_plural(cores, "core") + ("" if usable == cores else f", limited by the container to {limit:g}")
    threads = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not threads.isdecimal():
        hint = "" if usable == cores else f": use launch.threads={usable}, or fewer for several workers"
        return CheckResult("cores", True, detail + hint)
    fix = "" if int(threads) <= usable else f"unset OMP_NUM_THREADS, or export OMP_NUM_THREADS={usable}"
    return CheckResult("cores", not fix, f"{detail}, OMP_NUM_THREADS={threads}", fix)


def check_run_folder(folder: Path) -> CheckResult:
    """Check that runs/ can be written here, with a temporary file that leaves no name behind."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return CheckResult(
            "folder",
            False,
            f"{folder} cannot be written ({error.strerror})",
            "cd to a folder that you can write to",
        )
    fix = "" if free >= MIN_DISK_BYTES else "cd to a larger disk, or type run.dir=/path/on/it/NAME"
    return CheckResult("folder", not fix, f"{format_bytes(free)} free in {folder}", fix)


def check_wandb(env: Mapping[str, str]) -> CheckResult:
    """Report whether metrics would go online, without calling wandb, which would log in. The key is never shown."""
    import netrc

    if (mode := env.get("WANDB_MODE", "online")) != "online":
        return CheckResult("wandb", True, f"WANDB_MODE={mode}")
    file = Path(env.get("NETRC") or os.path.expanduser("~/.netrc"))
    try:
        host = urlsplit(env.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
        key = bool(env.get("WANDB_API_KEY") or netrc.netrc(str(file)).authenticators(host))
    except (OSError, ValueError, netrc.NetrcParseError):
        key = False
    return CheckResult("wandb", True, "online, with a key" if key else "offline, no key: wandb login")


def check_slurm() -> CheckResult:
    commands = [name for name in ("sbatch", "srun", "squeue", "scancel", "scontrol") if shutil.which(name)]
    return CheckResult("slurm", True, ", ".join(commands) or "sbatch is not installed; only launch=slurm needs it")


# --- torch and GPUs -----------------------------------------------------------------------------------------------


def inspect_torch_in_subprocess(folder: Path, requirement: str) -> TorchInfo | CheckResult:
    """Inspect torch in a subprocess, because importing a broken torch may crash the process.

    `requirement` is what to pass to pip.
    """
    argv = [sys.executable, "-B", "-m", "launcher.cli.machine_checks"]  # -B: write no bytecode into this folder
    try:
        completed = subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, errors="replace", timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return CheckResult(
            "torch",
            False,
            f"the import took longer than {format_duration(IMPORT_TIMEOUT_S)}",
            "copy the environment to a local disk",
        )
    if completed.returncode == EXIT_OK:
        return TorchInfo(**json.loads(completed.stdout.splitlines()[-1]))
    lines = [line for line in completed.stderr.splitlines() if line.strip()] if completed.returncode > 0 else []
    problem = lines[-1] if lines else describe_exit("importing it", completed.returncode)
    fix = f"pip install --force-reinstall '{requirement}'"
    for name in ("torch.py", "torch/__init__.py"):
        fix = f"rename {name} in this folder: it shadows torch" if (folder / name).exists() else fix
    return CheckResult("torch", False, problem, fix)


def inspect_torch() -> TorchInfo:
    """Inspect torch in this process. A GPU counts if it computes: torch may see GPUs that it was not built for."""
    import warnings

    import torch
    import torch.distributed as dist

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    problems, computing = [str(warning.message) for warning in caught], 0
    for index in range(count):
        try:
            computing += int(torch.ones(1, device=f"cuda:{index}").item())
        except RuntimeError as error:
            problems.append(str(error).splitlines()[0])
    available = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available} if dist.is_available() else {}
    backends = [name for name, is_available in available.items() if is_available()]
    return TorchInfo(
        str(torch.__version__), torch.version.cuda or torch.version.hip, computing, backends, " ".join(problems)
    )


def check_gpus(info: TorchInfo, listed: int) -> CheckResult:
    """Check that torch computes on all GPUs. `listed`: the number the NVIDIA driver has; each would get a worker."""
    if listed <= info.gpus:
        return CheckResult(
            "gpus", True, format_plural(info.gpus, "GPU") if info.gpus else "none: training runs on the CPU"
        )
    detail = f"{format_plural(listed, 'GPU')} found, torch computes on {info.gpus}"
    if info.cuda is None:
        fix = "install torch built for CUDA; or export CUDA_VISIBLE_DEVICES= to train on the CPU"
        return CheckResult("gpus", False, f"{detail}: it is a CPU-only build", fix)
    fix = f"check the driver with nvidia-smi; launch.workers={max(1, info.gpus)} trains on the GPUs that work"
    return CheckResult("gpus", False, " ".join([detail + ",", f"built for {info.cuda}", info.problems]).strip(), fix)


def check_backends(info: TorchInfo) -> CheckResult:
    # per-update statistics always use gloo, whatever the gradients use
    needed = ["gloo", *(["nccl"] if info.gpus else [])]
    detail = ", ".join(info.backends) or "none"
    fix = "install a build of torch with " + " and ".join(needed)
    return (
        CheckResult("backends", True, detail)
        if {*needed} <= {*info.backends}
        else CheckResult("backends", False, detail, fix)
    )


if __name__ == "__main__":
    print(json.dumps(asdict(inspect_torch())))
