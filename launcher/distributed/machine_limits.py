"""Limits of the machine that would end a job after its start or leave it waiting in silence."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

from launcher.errors import UsageError
from launcher.system.formatting import format_bytes

__all__ = [
    "check_host_name",
    "check_machine",
    "describe_loader_limit",
    "ensure_open_files",
    "estimate_open_files",
]

SHM_DIR = Path("/dev/shm")
CONNECT_TIMEOUT_S = 5.0
#: What one worker opens: a base, connections to the others, and the queues of a training and a validation loader.
BASE_OPEN_FILES, OPEN_FILES_PER_RANK, OPEN_FILES_PER_LOADER_PROCESS = 64, 4, 8
SHARED_MEMORY_SIGNS = ("shared memory", "</torch_", "killed by signal: Bus error")
OPEN_FILES_SIGNS = ("Too many open files", "items of ancdata")


def check_machine(workers: int, loader_processes: int) -> None:
    """Check what the workers of a job on this machine need, before the first of them starts.

    Raises:
        UsageError: the loopback interface does not work, or too few files may be open.
    """
    check_loopback()
    ensure_open_files(estimate_open_files(workers, loader_processes))


def check_loopback() -> None:
    """Connect to this machine over 127.0.0.1, as the workers of a job on one machine do.

    Raises:
        UsageError: the loopback interface is missing or down; a connection would be tried for ten minutes.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), CONNECT_TIMEOUT_S).close()
    except OSError as problem:
        raise UsageError(
            f"the workers connect over 127.0.0.1, which does not work here ({problem.strerror or problem}): "
            "type ip link set lo up, or start the container with a loopback interface"
        ) from problem


def check_host_name(host: str, port: int) -> None:
    """
    Raises:
        UsageError: the host that torchrun has named for the workers' store cannot be resolved.
    """
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as problem:
        raise UsageError(
            f"MASTER_ADDR={host}, which torchrun has set, cannot be resolved ({problem.strerror or problem}): "
            f"add {host} to /etc/hosts, or type torchrun --local-addr= with an address of this machine"
        ) from problem


def estimate_open_files(workers: int, loader_processes: int) -> int:
    """The number of files that each worker of a job must be able to open at once."""
    return BASE_OPEN_FILES + OPEN_FILES_PER_RANK * workers + OPEN_FILES_PER_LOADER_PROCESS * loader_processes


def ensure_open_files(needed: int) -> None:
    """Raise the limit on open files of this process and its children to `needed`, if it is lower.

    Raises:
        UsageError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"ulimit -n is {hard}, and each worker of this job opens up to {needed} files: type ulimit -n {needed} or "
            "more before the command, or fewer launch.workers or data.num_workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def describe_loader_limit(message: str) -> str | None:
    """What an error of a loader process means if it has met a limit of the machine; None if it has another cause."""
    if any(sign in message for sign in OPEN_FILES_SIGNS):
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"data.num_workers: too many open files (ulimit -n is {soft}), as each tensor on its way from a loader "
            "process is one: type ulimit -n 65536 before the command, or data.num_workers=0"
        )
    if any(sign in message for sign in SHARED_MEMORY_SIGNS):
        return (
            f"data.num_workers: batches from loader processes pass through {SHM_DIR}, which is too small "
            f"({describe_shared_memory()}): type data.num_workers=0, or make it larger (docker run --shm-size=8g)"
        )
    return None


def describe_shared_memory() -> str:
    try:
        status = os.statvfs(SHM_DIR)
    except OSError as problem:
        return str(problem.strerror)
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    return f"{format_bytes(size)} in all, {format_bytes(free)} free"
