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
from launcher.failure import left
from launcher.sinks.text import plural, size, took

__all__ = [
    "Check",
    "Seen",
    "address",
    "ask_torch",
    "backends",
    "cores",
    "folder",
    "gpus",
    "granted",
    "open_files",
    "shared_memory",
    "slurm",
    "wandb",
]

SHM, CPU_MAX = Path("/dev/shm"), Path("/sys/fs/cgroup/cpu.max")
LEAST_SHM = 256e6  # a batch of 256 x 3 x 224 x 224 floats takes 154 MB; the default of containers is 64 MB
LEAST_FILES = 1024  # each tensor in transit from a loader process is an open file
LEAST_DISK = 1e9
IMPORT_S = 120.0


@dataclass(frozen=True)
class Check:
    """The result of a check; if it failed, `mend` says what to type."""

    name: str
    ok: bool
    detail: str
    mend: str = ""


@dataclass(frozen=True)
class Seen:
    """What torch reports: the CUDA version it was built for, the number of GPUs that compute, and why others fail."""

    version: str
    cuda: str | None
    gpus: int
    backends: Sequence[str]
    why: str = ""


def address(name: str, host: str) -> Check:
    """Whether ranks can connect there: torchrun and gloo fail if the host name resolves to another machine."""
    why = ""
    try:
        for family, _, _, _, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, socket.SOCK_STREAM) as own:
                    own.bind(place)
                return Check(name, True, f"{host} resolves to {place[0]}" if host != place[0] else host)
            except OSError as problem:
                why = f"{host} resolves to {place[0]}, which is not an address of this machine ({problem.strerror})"
    except (OSError, UnicodeError) as problem:  # UnicodeError: the name is too long to resolve
        why = f"{host} does not resolve ({getattr(problem, 'strerror', None) or problem})"
    mend = "ip link set lo up" if name == "loopback" else f"as root: echo '127.0.0.1 {host}' >> /etc/hosts"
    return Check(name, False, why, mend)


def shared_memory(place: Path) -> Check:
    """Check shared memory: loader processes pass batches through it and die with a bus error when it is full.

    Nothing else needs it, so this check never fails.
    """
    free = shutil.disk_usage(place).free if place.is_dir() else 0
    few = "" if free >= LEAST_SHM else ", too little for data.workers=1 or more: docker run --shm-size=2g"
    return Check("shm", True, f"{size(free)} free in {place}{few}")


def open_files(soft: int, hard: int) -> Check:
    if soft >= LEAST_FILES or soft == resource.RLIM_INFINITY:
        return Check("open files", True, "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft:,}")
    raised = hard >= LEAST_FILES or hard == resource.RLIM_INFINITY
    mend = f"ulimit -n {4 * LEAST_FILES if hard < 0 else min(hard, 4 * LEAST_FILES)}"
    return Check("open files", False, f"up to {soft:,}", mend if raised else "raise nofile in limits.conf, as root")


def granted(cpu_max: Path) -> float | None:
    """Return the CPU limit of the control group in cores; None if it sets none."""
    try:
        quota, period = cpu_max.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # the file does not exist or contains "max"
        return None


def cores(own: int, given: float | None, env: Mapping[str, str]) -> Check:
    """Check OMP_NUM_THREADS: with more threads than cores, the threads wait for each other at every step."""
    most = max(1, min(own, int(given or own)))
    told = plural(own, "core") + ("" if most == own else f", limited by the container to {given:g}")
    asked = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not asked.isdecimal():
        return Check(
            "cores", True, told if most == own else f"{told}: use launch.threads={most}, or fewer for several workers"
        )
    mend = "" if int(asked) <= most else f"unset OMP_NUM_THREADS, or export OMP_NUM_THREADS={most}"
    return Check("cores", not mend, f"{told}, OMP_NUM_THREADS={asked}", mend)


def folder(place: Path) -> Check:
    """Check that runs/ can be written here, with a temporary file that leaves no name behind."""
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as problem:
        return Check(
            "folder",
            False,
            f"{place} cannot be written ({problem.strerror})",
            "cd to a folder that you can write to",
        )
    mend = "" if free >= LEAST_DISK else "cd to a larger disk, or type run.dir=/path/on/it/NAME"
    return Check("folder", not mend, f"{size(free)} free in {place}", mend)


def wandb(env: Mapping[str, str]) -> Check:
    """Report whether metrics would go online, without calling wandb, which would log in. The key is never shown."""
    import netrc

    if (mode := env.get("WANDB_MODE", "online")) != "online":
        return Check("wandb", True, f"WANDB_MODE={mode}")
    file = Path(env.get("NETRC") or os.path.expanduser("~/.netrc"))
    try:
        host = urlsplit(env.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
        key = bool(env.get("WANDB_API_KEY") or netrc.netrc(str(file)).authenticators(host))
    except (OSError, ValueError, netrc.NetrcParseError):
        key = False
    return Check("wandb", True, "online, with a key" if key else "offline, no key: wandb login")


def slurm() -> Check:
    there = [name for name in ("sbatch", "srun", "squeue", "scancel", "scontrol") if shutil.which(name)]
    return Check("slurm", True, ", ".join(there) or "sbatch is not installed; only launch=slurm needs it")


# --- torch and GPUs -----------------------------------------------------------------------------------------------


def ask_torch(here: Path, torch: str) -> Seen | Check:
    """Inspect torch in a subprocess, because importing a broken torch may crash the process.

    `torch`: the requirement to pass to pip.
    """
    argv = [sys.executable, "-B", "-m", "launcher.machine"]  # -B: write no bytecode into this folder
    try:
        said = subprocess.run(
            argv, cwd=here, capture_output=True, text=True, errors="replace", timeout=IMPORT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Check(
            "torch", False, f"the import took longer than {took(IMPORT_S)}", "copy the environment to a local disk"
        )
    if said.returncode == EXIT_OK:
        return Seen(**json.loads(said.stdout.splitlines()[-1]))
    lines = [line for line in said.stderr.splitlines() if line.strip()] if said.returncode > 0 else []
    why = lines[-1] if lines else left("importing it", said.returncode)
    mend = f"pip install --force-reinstall '{torch}'"
    for name in ("torch.py", "torch/__init__.py"):
        mend = f"rename {name} in this folder: it shadows torch" if (here / name).exists() else mend
    return Check("torch", False, why, mend)


def own_words() -> Seen:
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
    return Seen(str(torch.__version__), torch.version.cuda or torch.version.hip, able, backends, " ".join(why))


def gpus(seen: Seen, listed: int) -> Check:
    """Check that torch computes on all GPUs. `listed`: the number the NVIDIA driver has; each would get a worker."""
    if listed <= seen.gpus:
        return Check("gpus", True, plural(seen.gpus, "GPU") if seen.gpus else "none: training runs on the CPU")
    told = f"{plural(listed, 'GPU')} found, torch computes on {seen.gpus}"
    if seen.cuda is None:
        mend = "install torch built for CUDA; or export CUDA_VISIBLE_DEVICES= to train on the CPU"
        return Check("gpus", False, f"{told}: it is a CPU-only build", mend)
    mend = f"check the driver with nvidia-smi; launch.workers={max(1, seen.gpus)} trains on the GPUs that work"
    return Check("gpus", False, " ".join([told + ",", f"built for {seen.cuda}", seen.why]).strip(), mend)


def backends(seen: Seen) -> Check:
    # per-update statistics always use gloo, whatever the gradients use
    needed = ["gloo", *(["nccl"] if seen.gpus else [])]
    told = ", ".join(seen.backends) or "none"
    mend = "install a build of torch with " + " and ".join(needed)
    return Check("backends", True, told) if {*needed} <= {*seen.backends} else Check("backends", False, told, mend)


if __name__ == "__main__":
    print(json.dumps(asdict(own_words())))
