"""How the ranks of a job find one another, and what rank 0 tells the others before anything else."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.topology import Topology, master_port

__all__ = ["join", "loopback_store", "meet"]


def loopback_socket(port: int = 0) -> socket.socket:
    """A listening socket that only this machine can reach."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen(4096)
    return listening


def loopback_store(port: int, *, serve: bool, world: int | None = None, timeout_s: float = 600.0) -> dist.TCPStore:
    """A store that listens on 127.0.0.1 alone, which torch's own never does. Port 0 takes a free one."""
    listening = loopback_socket(port) if serve else None
    if listening is not None:
        port = listening.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        world_size=world,
        is_master=serve,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach() if listening is not None else None,
    )


def meet(topology: Topology, *, loopback: bool, timeout_s: float) -> dist.Store:
    """The job's store: the one that torchrun's variables name, or one of our own on the loopback."""
    if not loopback:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        if topology.shares_store:  # it outlives the workers, with what they wrote before a restart
            return dist.PrefixStore(f"restarts-left-{topology.restarts_left}", store)
        return store
    return loopback_store(master_port(), serve=topology.rank == 0, world=topology.world, timeout_s=timeout_s)


def join(store: dist.Store, topology: Topology, device: torch.device, backend: str, timeout_s: float) -> str:
    """Form the process group; the name of the backend that was taken."""
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=topology.rank, world_size=topology.world, timeout=timedelta(seconds=timeout_s)
    )
    return backend
