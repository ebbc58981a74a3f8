"""What of a machine gets in the way of training, looked at without side effects. Only its own name is looked up."""

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
LEAST_SHM = 256e6  # a batch of 256 x 3 x 224 x 224 floats has 154 MB; containers have 64 MB by default
LEAST_FILES = 1024  # a tensor on its way from a loader's process is an open file
LEAST_DISK = 1e9
IMPORT_S = 120.0


@dataclass(frozen=True)
class Check:
    """What was found under a name; where it is not fine, what to type instead."""

    name: str
    ok: bool
    detail: str
    mend: str = ""


@dataclass(frozen=True)
class Seen:
    """What torch says of itself: `cuda` is what it was built for, `gpus` those it computes on, `why` not on more."""

    version: str
    cuda: str | None
    gpus: int
    backends: Sequence[str]
    why: str = ""


def address(name: str, host: str) -> Check:
    """Whether ranks could meet there: torchrun and gloo fail where the machine's own name leads elsewhere."""
    why = ""
    try:
        for family, _, _, _, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, socket.SOCK_STREAM) as own:
                    own.bind(place)
                return Check(name, True, f"{host} is {place[0]}" if host != place[0] else host)
            except OSError as problem:
                why = f"{host} is {place[0]}, which is not this machine's ({problem.strerror})"
    except (OSError, UnicodeError) as problem:  # a name may be too long to be looked up
        why = f"{host} leads nowhere ({getattr(problem, 'strerror', None) or problem})"
    mend = "ip link set lo up" if name == "loopback" else f"as root: echo '127.0.0.1 {host}' >> /etc/hosts"
    return Check(name, False, why, mend)


def shared_memory(place: Path) -> Check:
    """Loader processes hand batches over in it, and die of a Bus error where it is full. Nobody else needs any."""
    free = shutil.disk_usage(place).free if place.is_dir() else 0
    few = "" if free >= LEAST_SHM else ", little for data.workers=1 or more: docker run --shm-size=2g"
    return Check("shm", True, f"{size(free)} free in {place}{few}")


def open_files(soft: int, hard: int) -> Check:
    if soft >= LEAST_FILES or soft == resource.RLIM_INFINITY:
        return Check("open files", True, "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft:,}")
    raised = hard >= LEAST_FILES or hard == resource.RLIM_INFINITY
    mend = f"ulimit -n {4 * LEAST_FILES if hard < 0 else min(hard, 4 * LEAST_FILES)}"
    return Check("open files", False, f"up to {soft:,}", mend if raised else "raise nofile in limits.conf, as root")


def granted(cpu_max: Path) -> float | None:
    """How many cores' time the control group gives, where it limits it."""
    try:
        quota, period = cpu_max.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # there is none, or it says "max"
        return None


def cores(own: int, given: float | None, env: Mapping[str, str]) -> Check:
    """More threads than cores wait for one another at every step."""
    most = max(1, min(own, int(given or own)))
    told = plural(own, "core") + ("" if most == own else f", of which the container gives the time of {given:g}")
    asked = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not asked.isdecimal():
        return Check("cores", True, told if most == own else f"{told}: launch.threads={most}, or less for more workers")
    mend = "" if int(asked) <= most else f"unset OMP_NUM_THREADS, or export OMP_NUM_THREADS={most}"
    return Check("cores", not mend, f"{told}, OMP_NUM_THREADS={asked}", mend)


def folder(place: Path) -> Check:
    """Whether runs/ could grow here. The file has no name, or loses it at once."""
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as problem:
        return Check(
            "folder",
            False,
            f"{place} cannot be written ({problem.strerror})",
            "cd to a folder of yours",
        )
    mend = "" if free >= LEAST_DISK else "cd to a larger disk, or type run.dir=/on/one/NAME"
    return Check("folder", not mend, f"{size(free)} free in {place}", mend)


def wandb(env: Mapping[str, str]) -> Check:
    """Whether figures would go online, without asking wandb, which would log in. The key is not told."""
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
    return Check("slurm", True, ", ".join(there) or "no sbatch here: launch=slurm needs it, nothing else does")


# --- torch and GPUs -----------------------------------------------------------------------------------------------


def ask_torch(here: Path, torch: str) -> Seen | Check:
    """What torch says, in a process of its own: one that is broken may take the process with it.

    `torch`: what pip would be asked for.
    """
    argv = [sys.executable, "-B", "-m", "launcher.machine"]  # -B: what it imports from here leaves nothing here
    try:
        said = subprocess.run(
            argv, cwd=here, capture_output=True, text=True, errors="replace", timeout=IMPORT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Check("torch", False, f"not imported within {took(IMPORT_S)}", "copy the environment to a local disk")
    if said.returncode == EXIT_OK:
        return Seen(**json.loads(said.stdout.splitlines()[-1]))
    lines = [line for line in said.stderr.splitlines() if line.strip()] if said.returncode > 0 else []
    why = lines[-1] if lines else left("importing it", said.returncode)
    mend = f"pip install --force-reinstall '{torch}'"
    for name in ("torch.py", "torch/__init__.py"):
        mend = f"rename {name} in this folder: it hides torch" if (here / name).exists() else mend
    return Check("torch", False, why, mend)


def own_words() -> Seen:
    """What torch says, in this process. A GPU counts if it computes: torch may not be built for one that it sees."""
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
    """`listed`: how many NVIDIA's driver has, for each of which a worker would be started."""
    if listed <= seen.gpus:
        return Check("gpus", True, plural(seen.gpus, "GPU") if seen.gpus else "none: training runs on the CPU")
    told = f"{plural(listed, 'GPU')} here, torch computes on {seen.gpus}"
    if seen.cuda is None:
        mend = "install torch built for CUDA; or export CUDA_VISIBLE_DEVICES= to train on the CPU"
        return Check("gpus", False, f"{told}: it is built for the CPU alone", mend)
    mend = f"nvidia-smi shows the driver's state; launch.workers={max(1, seen.gpus)} trains on what there is"
    return Check("gpus", False, " ".join([told + ",", f"built for {seen.cuda}", seen.why]).strip(), mend)


def backends(seen: Seen) -> Check:
    needed = ["gloo", *(["nccl"] if seen.gpus else [])]  # the vote goes over gloo, whatever the gradients go over
    told = ", ".join(seen.backends) or "none"
    mend = "install a build of torch that has " + " and ".join(needed)
    return Check("backends", True, told) if {*needed} <= {*seen.backends} else Check("backends", False, told, mend)


if __name__ == "__main__":
    print(json.dumps(asdict(own_words())))
