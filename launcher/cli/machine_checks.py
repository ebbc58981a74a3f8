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
    "cgroup_cpu_limit",
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
]

SHM_PATH, CPU_MAX_PATH = Path("/dev/shm"), Path("/sys/fs/cgroup/cpu.max")
MIN_SHM_BYTES = 256e6  # a batch of 256 x 3 x 224 x 224 floats takes 154 MB; the default of containers is 64 MB
MIN_OPEN_FILES = 1024  # each tensor in transit from a loader process is an open file
MIN_DISK_BYTES = 1e9
IMPORT_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class CheckResult:
    """The result of a check; if it failed, `mend` says what to type."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class TorchInfo:
    """What torch reports: the CUDA version it was built for, the number of GPUs that compute, and why others fail."""

    version: str
    cuda: str | None
    gpus: int
    backends: Sequence[str]
    why: str = ""


def check_address(name: str, host: str) -> CheckResult:
    """Whether ranks can connect there: torchrun and gloo fail if the host name resolves to another machine."""
    why = ""
    try:
        for family, _, _, _, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, socket.SOCK_STREAM) as own:
                    own.bind(place)
                return CheckResult(name, True, f"{host} resolves to {place[0]}" if host != place[0] else host)
            except OSError as problem:
                why = f"{host} resolves to {place[0]}, which is not an address of this machine ({problem.strerror})"
    except (OSError, UnicodeError) as problem:  # UnicodeError: the name is too long to resolve
        why = f"{host} does not resolve ({getattr(problem, 'strerror', None) or problem})"
    mend = "ip link set lo up" if name == "loopback" else f"as root: echo '127.0.0.1 {host}' >> /etc/hosts"
    return CheckResult(name, False, why, mend)


def check_shared_memory(place: Path) -> CheckResult:
    """Check shared memory: loader processes pass batches through it and die with a bus error when it is full.

    Nothing else needs it, so this check never fails.
    """
    free = shutil.disk_usage(place).free if place.is_dir() else 0
    few = "" if free >= MIN_SHM_BYTES else ", too little for data.num_workers=1 or more: docker run --shm-size=2g"
    return CheckResult("shm", True, f"{format_bytes(free)} free in {place}{few}")


def check_open_files(soft: int, hard: int) -> CheckResult:
    if soft >= MIN_OPEN_FILES or soft == resource.RLIM_INFINITY:
        return CheckResult("open files", True, "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft:,}")
    raised = hard >= MIN_OPEN_FILES or hard == resource.RLIM_INFINITY
    mend = f"ulimit -n {4 * MIN_OPEN_FILES if hard < 0 else min(hard, 4 * MIN_OPEN_FILES)}"
    return CheckResult(
        "open files", False, f"up to {soft:,}", mend if raised else "raise nofile in limits.conf, as root"
    )


def cgroup_cpu_limit(cpu_max: Path) -> float | None:
    """Return the CPU limit of the control group in cores; None if it sets none."""
    try:
        quota, period = cpu_max.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # the file does not exist or contains "max"
        return None


def check_cores(own: int, given: float | None, env: Mapping[str, str]) -> CheckResult:
    """Check OMP_NUM_THREADS: with more threads than cores, the threads wait for each other at every step."""
    most = max(1, min(own, int(given or own)))
    told = format_plural(own, "core") + ("" if most == own else f", limited by the container to {given:g}")
    asked = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not asked.isdecimal():
        return CheckResult(
            "cores", True, told if most == own else f"{told}: use launch.threads={most}, or fewer for several workers"
        )
    mend = "" if int(asked) <= most else f"unset OMP_NUM_THREADS, or export OMP_NUM_THREADS={most}"
    return CheckResult("cores", not mend, f"{told}, OMP_NUM_THREADS={asked}", mend)


def check_run_folder(place: Path) -> CheckResult:
    """Check that runs/ can be written here, with a temporary file that leaves no name behind."""
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as problem:
        return CheckResult(
            "folder",
            False,
            f"{place} cannot be written ({problem.strerror})",
            "cd to a folder that you can write to",
        )
    mend = "" if free >= MIN_DISK_BYTES else "cd to a larger disk, or type run.dir=/path/on/it/NAME"
    return CheckResult("folder", not mend, f"{format_bytes(free)} free in {place}", mend)


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
    there = [name for name in ("sbatch", "srun", "squeue", "scancel", "scontrol") if shutil.which(name)]
    return CheckResult("slurm", True, ", ".join(there) or "sbatch is not installed; only launch=slurm needs it")


# --- torch and GPUs -----------------------------------------------------------------------------------------------


def inspect_torch_in_subprocess(here: Path, torch: str) -> TorchInfo | CheckResult:
    """Inspect torch in a subprocess, because importing a broken torch may crash the process.

    `torch`: the requirement to pass to pip.
    """
    argv = [sys.executable, "-B", "-m", "launcher.cli.machine_checks"]  # -B: write no bytecode into this folder
    try:
        said = subprocess.run(
            argv, cwd=here, capture_output=True, text=True, errors="replace", timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return CheckResult(
            "torch",
            False,
            f"the import took longer than {format_duration(IMPORT_TIMEOUT_S)}",
            "copy the environment to a local disk",
        )
    if said.returncode == EXIT_OK:
        return TorchInfo(**json.loads(said.stdout.splitlines()[-1]))
    lines = [line for line in said.stderr.splitlines() if line.strip()] if said.returncode > 0 else []
    why = lines[-1] if lines else describe_exit("importing it", said.returncode)
    mend = f"pip install --force-reinstall '{torch}'"
    for name in ("torch.py", "torch/__init__.py"):
        mend = f"rename {name} in this folder: it shadows torch" if (here / name).exists() else mend
    return CheckResult("torch", False, why, mend)


def inspect_torch() -> TorchInfo:
    """Inspect torch in this process. A GPU counts if it computes: torch may see GPUs that it was not built for."""
    import warnings

    import torch
    import torch.distributed as dist

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    why, able = [str(one.message) for one in said], 0
    for index in range(there):
        try:
            able += int(torch.ones(1, device=f"cuda:{index}").item())
        except RuntimeError as error:
            why.append(str(error).splitlines()[0])
    available = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available} if dist.is_available() else {}
    backends = [name for name, here in available.items() if here()]
    return TorchInfo(str(torch.__version__), torch.version.cuda or torch.version.hip, able, backends, " ".join(why))


def check_gpus(seen: TorchInfo, listed: int) -> CheckResult:
    """Check that torch computes on all GPUs. `listed`: the number the NVIDIA driver has; each would get a worker."""
    if listed <= seen.gpus:
        return CheckResult(
            "gpus", True, format_plural(seen.gpus, "GPU") if seen.gpus else "none: training runs on the CPU"
        )
    told = f"{format_plural(listed, 'GPU')} found, torch computes on {seen.gpus}"
    if seen.cuda is None:
        mend = "install torch built for CUDA; or export CUDA_VISIBLE_DEVICES= to train on the CPU"
        return CheckResult("gpus", False, f"{told}: it is a CPU-only build", mend)
    mend = f"check the driver with nvidia-smi; launch.workers={max(1, seen.gpus)} trains on the GPUs that work"
    return CheckResult("gpus", False, " ".join([told + ",", f"built for {seen.cuda}", seen.why]).strip(), mend)


def check_backends(seen: TorchInfo) -> CheckResult:
    # per-update statistics always use gloo, whatever the gradients use
    needed = ["gloo", *(["nccl"] if seen.gpus else [])]
    told = ", ".join(seen.backends) or "none"
    mend = "install a build of torch with " + " and ".join(needed)
    return (
        CheckResult("backends", True, told)
        if {*needed} <= {*seen.backends}
        else CheckResult("backends", False, told, mend)
    )


if __name__ == "__main__":
    print(json.dumps(asdict(inspect_torch())))
