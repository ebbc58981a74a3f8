"""Rendezvous: connect the ranks through a store, exchange their first messages, and form the process group."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.topology import Topology, get_master_port

__all__ = [
    "broadcast_text",
    "connect_store",
    "gather_to_rank0",
    "init_process_group",
    "make_loopback_store",
    "make_sub_store",
]

STORE_POLL_S = 0.01


def open_loopback_socket(port: int = 0) -> socket.socket:
    """Open a listening socket that only this machine can reach."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen(4096)
    return listening


def make_loopback_store(port: int, *, serve: bool, world: int | None = None, timeout_s: float = 600.0) -> dist.TCPStore:
    """A TCPStore that listens on 127.0.0.1 only; torch's own listens on all interfaces. Port 0 picks a free port."""
    listening = open_loopback_socket(port) if serve else None
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


def connect_store(topology: Topology, *, loopback: bool, timeout_s: float) -> dist.Store:
    """Connect to the job's store: torchrun's, as its environment variables name it, or our own on the loopback."""
    if not loopback:
        return next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))[0]
    return make_loopback_store(get_master_port(), serve=topology.rank == 0, world=topology.world, timeout_s=timeout_s)


def gather_to_rank0(
    store: dist.Store, topology: Topology, message: str, timeout_s: float
) -> tuple[list[str], dist.Store]:
    """Gather every rank's `message` on rank 0; also return a section of the store that is still unused.

    A torchrun that shares its store with the workers keeps what earlier generations wrote. So each rank writes a hello
    with a random token, rank 0 answers with all tokens, and a rank accepts only an answer that contains its own token.
    """
    token = os.urandom(8).hex()
    if topology.rank == 0:
        return [message, *answer_hellos(store, topology.world, token, timeout_s)], dist.PrefixStore(token, store)
    store.set(f"hello/{topology.rank}", token)
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        answer = json.loads(store.get("answer"))
        if answer["hello"].get(str(topology.rank)) == token:
            store.set(f"{answer['token']}/{topology.rank}", message)
            return [], dist.PrefixStore(answer["token"], store)
        time.sleep(STORE_POLL_S)
    raise TimeoutError(f"rank 0 did not answer within launch.timeout_s={timeout_s:g}")


def answer_hellos(store: dist.Store, world: int, token: str, timeout_s: float) -> list[str]:
    """Answer every hello, including those that change meanwhile, until all other ranks have sent their message."""
    keys = [f"{token}/{rank}" for rank in range(1, world)]
    last: dict[str, str] | None = None
    deadline_s = time.monotonic() + timeout_s
    while not store.check(keys):
        arrived = [rank for rank in range(1, world) if store.check([f"hello/{rank}"])]
        hello = {str(rank): store.get(f"hello/{rank}").decode() for rank in arrived}
        if hello != last:
            store.set("answer", json.dumps({"token": token, "hello": hello}))
            last = hello
        if time.monotonic() > deadline_s:
            missing = [rank for rank, key in enumerate(keys, start=1) if not store.check([key])]
            raise TimeoutError(f"ranks {missing} did not connect within launch.timeout_s={timeout_s:g}")
        time.sleep(STORE_POLL_S)
    return [store.get(key).decode() for key in keys]


def broadcast_text(store: dist.Store, text: str | None) -> str:
    """Broadcast rank 0's `text` through the store; the other ranks pass None."""
    if text is not None:
        store.set("text", text)
    return store.get("text").decode()


def make_sub_store(store: dist.Store, name: str) -> dist.Store:
    """The section `name` of the store."""
    return dist.PrefixStore(name, store)


def init_process_group(
    store: dist.Store, topology: Topology, device: torch.device, backend: str, timeout_s: float
) -> str:
    """Initialise the process group and return the name of its backend."""
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=topology.rank, world_size=topology.world, timeout=timedelta(seconds=timeout_s)
    )
    return backend
